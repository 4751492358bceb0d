"""The exercises of the notebooks: `check(name, function)` says whether the reader's is right.

It prints "right", or the first input at which the function errs, with what came out and what was
expected. Where the same comes out of a usual slip, it says which. A stub that returns nothing is
"not yet". Solutions are in the notebooks, folded, and tests/test_exercises.py runs them.

    name          the reader's function                              for
    quantize      f(w) -> tensor of w's shape                        Eqs. (1), (2)
    ste           f(w) -> the same, with a gradient                  Eq. (4)
    soft          f(w, tau) -> tensor of w's shape                   Eqs. (1), (7), (8)
    slope         f(w, tau) -> tensor of w's shape                   Lemma 4.1
    hutchpp       f(matvec, d, r, m) -> a number                     Eq. (12), with the 1/m
    scores        f(h, kappa) -> tensor of h's shape                 Eq. (13)
    pressure      f(t, T, rho) -> a number                           Eq. (10)
    temperature   f(t, T, rho, tau_init, s, alpha) -> a number       Eqs. (14), (15)
    gap           f(ste, full, loss) -> a number                     the gap recovered
    difference    f(a, b) -> tensor: mean, half width                95 % intervals
    pack          f(t) -> a whole number                             two bits per weight
    bits          f(linear, rest, group) -> a number                 bits of a whole model
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import hestia


class Wrong(Exception):
    """What is wrong, in a sentence, where two numbers side by side would not say it."""


class Exercise(NamedTuple):
    """right: a function that is. arguments: the names of a case's values. slips: {sentence: a
    function that errs so}. measure(f, *case) -> tensor: what is compared; what: what it is."""

    right: Callable
    arguments: tuple
    cases: list
    slips: dict
    measure: Callable = lambda f, *case: f(*case)
    what: str = "it gives"
    tolerance: float = 1e-4


# --------------------------------------------------------------------------------------------------
# notebook 1: rounding, and the straight-through estimator


def scale(w):
    """Eq. (1) for one tensor, with its gradient: w.abs().mean() + epsilon. A number."""
    return w.abs().mean() + 1e-8


def values_and_gradient(f, w):
    """Of f(w) and of the sum of its products with 1, 2, ...: (2, n). No graph is a gradient 0."""
    w = w.clone().requires_grad_(True)
    out = torch.as_tensor(f(w))
    if out.shape != w.shape:
        raise Wrong(f"the result has shape {tuple(out.shape)}, expected {tuple(w.shape)}")
    grad = torch.zeros_like(w)
    if out.requires_grad:
        (grad,) = torch.autograd.grad((out * torch.arange(1, len(w) + 1)).sum(), w)
    return torch.stack([out.detach(), grad])


ONE = torch.ones(1, 1)
# Of both the mean absolute value is 1, so that w / gamma is w. Only the second has ties.
SPREAD, TIES = torch.tensor([-2.4, -0.6, 0.2, 0.8]), torch.tensor([-1.5, -0.5, 0.5, 1.5])

QUANTIZE = Exercise(
    hestia.quantize, ("w",), [(SPREAD,), (3 * SPREAD,), (TIES,)],
    {"Gamma is forgotten: round w / gamma, and multiply the code by gamma":
        lambda w: w.round().clamp(-1, 1),
     "It returns codes: multiply them by gamma": lambda w: (w / scale(w)).round().clamp(-1, 1),
     "Clip the rounded code to -1 ... 1": lambda w: scale(w) * (w / scale(w)).round(),
     "A tie goes up: |w / gamma| = 1/2 has code 0, which torch.round gives and floor(z + 1/2) not":
        lambda w: scale(w) * (w / scale(w) + 0.5).floor().clamp(-1, 1)})

STE = Exercise(
    hestia.quantize_ste, ("w",), [(SPREAD,), (3 * SPREAD,)],
    {"No gradient reaches w: rounding has none. Add w - w.detach()": hestia.quantize,
     "The value is w itself, not Q(w)": lambda w: 1 * w,
     "A gradient goes through gamma, which is mean|w|: detach it":
        lambda w: scale(w) * hestia.quantize(w.detach() / scale(w).detach(), scale=ONE)
        + (w - w.detach()),
     "A gradient goes through gamma in w / gamma, too: detach it":
        lambda w: scale(w) * hestia.quantize_ste(w / scale(w), scale=ONE)},
    values_and_gradient, "values, then gradients of the sum of 1 out_1 + 2 out_2 + ..., are")


# --------------------------------------------------------------------------------------------------
# notebook 2: the softmax kernel, and Lemma 4.1


def soft_mean(z, tau, power=2, softmax=torch.softmax):
    """The mean code at z = w / gamma, from distances to this power. z: (n,). Returns (n,)."""
    q = torch.tensor(hestia.TERNARY, dtype=z.dtype)
    return (softmax(-(z[:, None] - q).abs() ** power / tau, -1) * q).sum(-1)


def naive_softmax(x, dim):
    return x.exp() / x.exp().sum(dim, keepdim=True)


def refusing_below_zero(f, w, tau):
    """f(w, tau), or 0 where tau is below zero and f raises the ValueError that it should."""
    if tau >= 0:
        return f(w, tau)
    try:
        f(w, tau)
    except ValueError:
        return torch.zeros(())
    raise Wrong("tau is below zero, where the farthest code would win: raise a ValueError")


def slope_by_autograd(w, tau, live=False):
    """dH/dw of the sum of H, with gamma held, or live."""
    w = w.clone().requires_grad_(True)
    gamma = scale(w) if live else scale(w).detach()
    return torch.autograd.grad((gamma * soft_mean(w / gamma, tau)).sum(), w)[0]


LINE = torch.tensor([-2.4, -0.6, 0.2, 0.8], dtype=torch.float64)
WARM = [(LINE, 0.35), (LINE, 1.0), (3 * LINE, 0.35)]

SOFT = Exercise(
    hestia.soft_quantize, ("w", "tau"), [*WARM, (LINE, 1e-5), (LINE, -1.0)],
    {"The distances are not squared": lambda w, tau: scale(w) * soft_mean(w / scale(w), tau, 1),
     "Gamma is forgotten: measure w in units of gamma, and multiply the mean code by gamma":
        soft_mean,
     "It returns mean codes: multiply them by gamma": lambda w, tau: soft_mean(w / scale(w), tau),
     "The sign of the exponent: the nearest code must get the largest share":
        lambda w, tau: scale(w) * soft_mean(w / scale(w), -tau),
     "exp(-distance / tau) is 0 for every code when tau is small, and 0 / 0 is no number: "
     "torch.softmax subtracts the largest exponent first":
        lambda w, tau: scale(w) * soft_mean(w / scale(w), tau, softmax=naive_softmax)},
    refusing_below_zero)

SLOPE = Exercise(
    hestia.soft_quantize_jacobian, ("w", "tau"), WARM,
    {"A gradient goes through gamma: Lemma 4.1 holds gamma constant":
        lambda w, tau: slope_by_autograd(w, tau, live=True),
     "That is the variance: the factor 2 / tau is missing":
        lambda w, tau: hestia.code_moments((w / scale(w))[None], tau)[1][0],
     "The variance is E[q^2] - mu^2; this is E[q^2]":
        lambda w, tau: 2 / tau * (hestia.assignment_probs(w, tau)[..., ::2].sum(-1)),
     "That is the slope over z = w / gamma of H: dz/dw = 1 / gamma is missing, Eq. (21)":
        lambda w, tau: scale(w) * hestia.soft_quantize_jacobian(w, tau)})


# --------------------------------------------------------------------------------------------------
# notebook 3: Hutch++, and scores


def signs(*shape):
    return 2.0 * torch.randint(0, 2, shape) - 1


def sketched(matvec, d, r, m, reuse=False, project=True, mean=True, first=True):
    """Eq. (12), or one of its misreadings."""
    S = signs(d, r)
    G = S[:, :m] if reuse else signs(d, m)
    Q = torch.linalg.qr(matvec(S)).Q
    G = G - Q @ (Q.T @ G) if project else G
    return first * (Q * matvec(Q)).sum() + (G * matvec(G)).sum() / (m if mean else 1)


def decaying(d):
    """A symmetric matrix (d, d) with eigenvalues 1, 1/2, 1/3, ... and no special axes."""
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(random).Q
    return basis @ torch.diag(1 / torch.arange(1, d + 1)) @ basis.T


def mean_over_trace(f, d, r, m, times=300):
    """(mean estimate over the true trace, products per estimate over 2 r + m), from 300 seeds."""
    H, total, products = decaying(d), 0.0, 0

    def matvec(V):
        nonlocal products
        products += V.numel() // d
        return H @ V

    with torch.random.fork_rng(devices=[]):  # the reader's own random numbers stay as they are
        torch.manual_seed(0)
        for _ in range(times):
            total += float(f(matvec, d, r, m)) / times
    return torch.tensor([round(total / float(H.trace()), 2), products / times / (2 * r + m)])


def logistic(x, kappa, unbiased=False, eps=1e-8):
    """Eq. (13) of x, which should be log h. (n,)"""
    return torch.sigmoid(kappa * (x - x.mean()) / (x.std(unbiased=unbiased) + eps))


HUTCHPP = Exercise(
    sketched, ("d", "r", "m"), [(40, 8, 8), (40, 4, 4)],
    {"The second term is a sum over m vectors: the 1/m is missing":
        lambda *case: sketched(*case, mean=False),
     "S is reused as G: Q depends on S, so that the rest is too small. Draw G anew":
        lambda *case: sketched(*case, reuse=True),
     "G is not projected: what Q has caught counts twice":
        lambda *case: sketched(*case, project=False),
     "The first term, the trace on the sketch, is missing":
        lambda *case: sketched(*case, first=False)},
    mean_over_trace, "mean of 300 estimates over the trace, and products used over 2 r + m, are",
    tolerance=0.04)

TRACES = torch.tensor([0.5, 2.0, 3.0, 40.0])
SCORES = Exercise(
    lambda h, kappa: torch.tensor(list(hestia.sensitivity_scores(
        dict(enumerate(h.tolist())), kappa).values())),
    ("h", "kappa"), [(TRACES, 1.0), (100 * TRACES, 1.0), (TRACES, 4.0), (torch.ones(3), 1.0)],
    {"The logarithm is missing: Eq. (13) standardises log h":
        logistic,
     "The standard deviation is the population's: divide by n, not by n - 1":
        lambda h, kappa: logistic(h.log(), kappa, unbiased=True),
     "Kappa is forgotten": lambda h, kappa: logistic(h.log(), 1.0),
     "All traces alike give 0 / 0: add epsilon to sigma":
        lambda h, kappa: logistic(h.log(), kappa, eps=0)})


# --------------------------------------------------------------------------------------------------
# notebook 4: the schedules


def annealed(t, T, rho, tau_init, s, alpha, sign=1, lift=1, hold=True):
    """Eqs. (14) and (15), or one of their misreadings."""
    share = (t - rho * T) / (T - rho * T) if hold else t / T
    cosine = math.cos(math.pi * (max(0.0, share) if hold else share))
    return tau_init / 2 * (lift + cosine) * math.exp(sign * alpha * s)


PRESSURE = Exercise(
    hestia.pressure, ("t", "T", "rho"),
    [(0, 100, 0.2), (5, 100, 0.2), (20, 100, 0.2), (90, 100, 0.2), (50, 100, 1.0), (0, 100, 0.0)],
    {"It goes on rising: p is at most 1": lambda t, T, rho: t / (rho * T) if rho else 1.0,
     "It rises over all T steps: it is full after rho T of them": lambda t, T, rho: t / T,
     "This is 1 - p, the share of W": lambda t, T, rho: 1 - hestia.pressure(t, T, rho)})

TEMPERATURE = Exercise(
    hestia.temperature, ("t", "T", "rho", "tau_init", "s", "alpha"),
    [(90, 100, 0.2, 0.35, 0.0, 0.4), (60, 100, 0.2, 0.35, 0.0, 0.4), (5, 100, 0.2, 0.35, 0.0, 0.4),
     (20, 100, 0.2, 0.35, 0.0, 0.4), (100, 100, 0.2, 0.35, 0.9, 0.4),
     (60, 100, 0.2, 0.35, 0.9, 0.4), (30, 100, 0.0, 0.3, 0.5, -0.4)],
    {"Tau falls below zero: the bracket of Eq. (14) is 1 + cos, which ends at 0":
        lambda *case: annealed(*case, lift=0),
     "The sign of alpha: a sensitive tensor stays warmer, exp(+alpha s)":
        lambda *case: annealed(*case, sign=-1),
     "The score is forgotten: multiply by exp(alpha s)":
        lambda *case: annealed(*case[:5], 0.0),
     "It cools from the first step: tau stays at tau_init until rho T, and the cosine starts there":
        lambda *case: annealed(*case, hold=False),
     "Before rho T the argument of the cosine is negative: hold tau at tau_init there":
        lambda t, T, rho, tau_init, s, alpha: tau_init / 2 * math.exp(alpha * s)
        * (1 + math.cos(math.pi * (t - rho * T) / (T - rho * T)))})


# --------------------------------------------------------------------------------------------------
# notebooks 5 and 6: differences, and bits

GAP = Exercise(
    lambda ste, full, loss: (ste - loss) / (ste - full), ("ste", "full", "loss"),
    [(1.5, 1.0, 1.25), (1.5, 1.0, 1.5), (2.0, 1.8, 1.75)],
    {"That is what is left of the gap: the STE is at 0 and full precision at 1":
        lambda ste, full, loss: (loss - full) / (ste - full),
     "The sign: what is below the STE recovers a positive share":
        lambda ste, full, loss: (loss - ste) / (ste - full)})

LOSSES = torch.tensor([1.50, 1.62, 1.47, 1.55, 1.58])
OTHERS = LOSSES + torch.tensor([0.01, 0.03, 0.02, 0.02, 0.03])


def interval(a, b, t=2.78, unbiased=True, paired=True, root=True):
    """(mean difference, half width of its 95 % interval), or one of the usual slips."""
    spread = (a - b).std(unbiased=unbiased) if paired else (a.var() + b.var()).sqrt()
    return torch.stack([(a - b).mean(), t * spread / (len(a) ** 0.5 if root else 1)])


DIFFERENCE = Exercise(
    interval, ("a", "b"), [(LOSSES, OTHERS), (OTHERS, LOSSES)],
    {"1.96 is for many seeds: with five of them t is 2.78": lambda a, b: interval(a, b, t=1.96),
     "The standard deviation of a sample divides by n - 1":
        lambda a, b: interval(a, b, unbiased=False),
     "Take the difference first, seed by seed: the noise of the batches cancels":
        lambda a, b: interval(a, b, paired=False),
     "The error of a mean is the standard deviation over the root of n":
        lambda a, b: interval(a, b, root=False),
     "The sign: it is a minus b": lambda a, b: interval(b, a)})


def packed(t, shift=2, first=1):
    return sum((int(code) + shift) << 2 * k for k, code in enumerate(t.tolist()[::first]))


CODES = torch.tensor([1, -1, 0, 1, 1, 0, 0, -1])
PACK = Exercise(
    packed, ("t",), [(CODES,), (-CODES.flip(0),)],
    {"The first code belongs in the lowest bits": lambda t: packed(t, first=-1),
     "A code c is stored as c + 2: 01 is -1, 10 is 0, 11 is +1": lambda t: packed(t, shift=1)},
    tolerance=1e-9)

BITS = Exercise(
    lambda linear, rest, group: (linear * (2 + 16 / group) + rest * 16) / (linear + rest),
    ("linear", "rest", "group"), [(973, 263, 128), (100, 0, 64)],
    {"The scales are forgotten: 16 bits for each group":
        lambda linear, rest, group: (linear * 2 + rest * 16) / (linear + rest),
     "What is not quantized is forgotten": lambda linear, rest, group: 2 + 16 / group,
     "Two bits are stored, not log2(3)": lambda linear, rest, group: (
         linear * (math.log2(3) + 16 / group) + rest * 16) / (linear + rest)})


EXERCISES = {"quantize": QUANTIZE, "ste": STE, "soft": SOFT, "slope": SLOPE, "hutchpp": HUTCHPP,
             "scores": SCORES, "pressure": PRESSURE, "temperature": TEMPERATURE, "gap": GAP,
             "difference": DIFFERENCE, "pack": PACK, "bits": BITS}


# --------------------------------------------------------------------------------------------------
# the check


def numbers(x):
    """A number or a tensor in print, with at most four digits.

    >>> numbers(torch.tensor([[0.58334, -1.0]])), numbers(3)
    ('[0.5833, -1]', '3')
    """
    flat = [f"{float(v) + 0:.4g}" for v in torch.as_tensor(x).detach().flatten()]
    return flat[0] if len(flat) == 1 else f"[{', '.join(flat)}]"


def near(a, b, tolerance):
    return a.shape == b.shape and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


def verdict(name, function):
    """What `check` prints.

    >>> verdict("pressure", lambda t, T, rho: ...)
    'not yet'
    >>> print(verdict("pressure", lambda t, T, rho: t / T))  # doctest: +ELLIPSIS
    wrong at t = 5, T = 100, rho = 0.2: it gives 0.05, expected 0.25. It rises over all T steps: ...
    """
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}; expected one of {', '.join(EXERCISES)}")
    exercise, returned = EXERCISES[name], []
    tolerance = exercise.tolerance

    def watched(*given):
        returned.append(function(*given))
        return returned[-1]

    def measured(f, case):
        return torch.as_tensor(exercise.measure(f, *case)).detach().double()

    for case in exercise.cases:
        where = ", ".join(f"{a} = {numbers(x)}" for a, x in zip(exercise.arguments, case))
        expected = measured(exercise.right, case)
        try:
            got = measured(watched, case)
        except NotImplementedError:
            return "not yet"
        except Wrong as error:
            return f"wrong at {where}: {error}."
        except Exception as error:  # whatever the reader's function raises
            stub = any(x is None or x is ... for x in returned)
            words = f"wrong at {where}: it raises {type(error).__name__}, {error}."
            return "not yet" if stub else words
        if near(got, expected, tolerance):
            continue
        words = f"wrong at {where}: {exercise.what} {numbers(got)}, expected {numbers(expected)}."
        for sentence, slip in exercise.slips.items():
            if near(got, measured(slip, case), tolerance):
                return f"{words} {sentence}."
        return words
    return "right"


def check(name, function):
    """Print whether the reader's function solves the exercise: right, wrong and why, or not yet.

    >>> check("quantize", lambda w: w.round().clamp(-1, 1))  # doctest: +ELLIPSIS
    wrong at w = [-7.2, -1.8, 0.6, 2.4]: it gives [-1, -1, 1, 1], expected [-3, -3, 0, 3]. Gamma ...
    """
    print(verdict(name, function))
