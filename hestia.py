r"""HESTIA in one file: ternary weights by a softmax that cools down, guided by the Hessian.

The paper is "HESTIA: A Hessian-Guided Differentiable Quantization-Aware Training Framework for
Extremely Low-Bit LLMs", arXiv 2601.20745. Read it on the left and this file on the right, top to
bottom. The sections stand in the paper's order, and each function names its equation.

The method in five lines. Ternary weights are gamma * {-1, 0, +1}. Rounding to them has derivative
zero almost everywhere. The usual remedy, the straight-through estimator (STE), pretends that it is
one. HESTIA replaces each weight by the mean of the three codes under a softmax of minus squared
distances over a temperature tau: a smooth function with a true derivative. A pressure p brings it
in, tau falls to zero, and it hardens into rounding, later where the Hessian's trace is large.

    Eq.    in the paper         here                 shape, unit
           W, w                 w, latents           any shape; the weights we train, float32
    1      gamma                absmean_scale        (n_groups, 1); the unit of a group's weights
    2      W-hat = Q(W)         quantize             w's shape; gamma times a code of TERNARY
    3      J(W)                 Hestia.hard, evaluate   nats per token, with hard weights
    4      STE                  quantize_ste         w's shape
    5      B                    nearest_code         +-gamma/2, where the nearest code changes
    6      Omega_dead           dead_zone            bool, w's shape
    7      pi_tau(q | w), tau   assignment_probs     (*w.shape, K); tau is in units of gamma
    8      w-tilde, H(w; tau)   soft_quantize        w's shape; gamma times the mean code
    9      W_eff                effective_weight     w's shape; what the model computes with
    10     p_t, rho             pressure             share of H in W_eff; rho T = T_comp steps
    11     J-tilde_t(W)         backward             nats per token, with W_eff
    12     h_i, r, Q_i          hutchpp, hessian_traces   nats per squared weight; r = rank
    13     s_i, kappa           sensitivity_scores   {tensor: number in (0, 1)}; kappa is its gain
    14     tau-bar(t)           base_temperature     in units of gamma
    15     tau_i(t)             temperature          in units of gamma
    16-17  mu_tau, V_tau        code_moments         (n_groups, g); of the code q at z = w / gamma
    18     Lemma 4.1            soft_quantize_jacobian   w's shape; no unit
    19     chain rule           soft_quantize, Hestia.pull_back   from dL/dW_eff to dL/dW
    20     Lemma 4.2            test_hestia.py: test_lemma_4_2_and_its_rate
    21-27  Lemma 4.1's proof    test_hestia.py: test_appendix_A1_equations_21_to_27
    28-36  Lemma 4.2's proof    test_hestia.py: test_appendix_A2_equations_28_to_36

    Algorithm 1, lines 1-3      hessian_traces, sensitivity_scores, train, batch_at
    Algorithm 1, lines 4-10     Hestia.relax, Hestia.step_of, Hestia.effective
    Algorithm 1, lines 11-12    Hestia.pull_back, update, train
    Algorithm 1, line 13        Hestia.harden
    Section 5.1                 linear_layers, optimal_tau_init, load_llama, save_llama
    Section 5.5                 notebooks/lab/bench.py: main
    Tables 1, 2 and 3           notebooks/lab/rivals.py: ROWS
    Table 4                     notebooks/lab/study.py: ABLATIONS
    Table 5                     train_tiny.py: PRESETS
    Figures 1 and 2             plots.py: staircase, schedules

Q means three things in the paper: the set of codes, the quantizer Q(W), and Q_i, an orthonormal
basis in Eq. 12. H means two: the function H(w; tau), and H_i, a block of the Hessian.
Where the paper leaves something open, or slips, this file decides (lab/GUIDE.md gives the reasons):
epsilon is 1e-8, and hardening rounds gamma to bfloat16; a tie |z| = 1/2 goes to code 0; Eq. 12 gets
the 1/m it lacks; the Hessian is that of the ordinary loss at the full-precision weights; traces
that are not positive are raised to a floor, never made absolute.
"""

import bisect
import itertools
import json
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TERNARY = (-1.0, 0.0, 1.0)  # codes in units of gamma: the paper's set Q
BINARY, TWO_BIT = (-1.0, 1.0), (-1.5, -0.5, 0.5, 1.5)


# -- 3.1 Problem definition: scale, hard quantizer, straight-through estimator, dead zone ----------
def _at_least_float32(w):
    """float16 would lose epsilon, and bfloat16 would lose codes."""
    if not w.is_floating_point():
        raise TypeError(f"weights are {w.dtype}; expected floating-point numbers")
    return w.to(torch.promote_types(w.dtype, torch.float32))

def _like(x, w):
    """x in w's dtype and shape. float16 ends at 65504, where a Jacobian at small tau does not."""
    if w.dtype == torch.float16:
        x = x.clamp(-65504, 65504)
    return x.to(w.dtype).view_as(w)

def _groups(w, group_size):
    """w as rows that share one scale: (n_groups, g). None: one scale per tensor, (1, w.numel())."""
    if group_size is None:
        return w.reshape(1, w.numel())
    width = w.shape[-1] if w.dim() else 1
    if group_size < 1 or width % group_size:
        fits = next((g for g in range(min(group_size, width), 0, -1) if width % g == 0), 1)
        raise ValueError(f"group size {group_size} does not divide the width {width}; {fits} "
                         "would, or None: one scale for the tensor")
    return w.reshape(w.numel() // group_size, group_size)

def absmean_scale(w, group_size=None, eps=1e-8):
    """Eq. (1): gamma = mean|w| + epsilon, the unit of codes and temperatures.

    w: any shape. Returns gamma, (n_groups, 1), detached, at least float32. group_size=None: one
    scale for the tensor; g: one for every g consecutive weights of the last dimension.

    >>> w = torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9])
    >>> absmean_scale(w)
    tensor([[0.5833]])
    >>> absmean_scale(w, group_size=3)
    tensor([[0.7000],
            [0.4667]])
    """
    return _groups(_at_least_float32(w.detach()), group_size).abs().mean(1, keepdim=True) + eps

def _normalize(w, group_size, scale):
    """z = w / gamma, (n_groups, g), and gamma, (n_groups, 1)."""
    gamma = absmean_scale(w, group_size) if scale is None else _at_least_float32(scale.detach())
    z = _groups(_at_least_float32(w), group_size)
    if gamma.shape != (z.shape[0], 1):
        raise ValueError(f"scale has shape {tuple(gamma.shape)}; expected {(z.shape[0], 1)}")
    return z / gamma, gamma

def nearest_code(z, codebook=TERNARY):
    """The code nearest to z = w / gamma, z's shape. It jumps at the boundaries of Eq. (5).

    They lie halfway between codes, at +-1/2 for TERNARY. A tie goes to 0 for TERNARY and to the
    upper code otherwise. codebook: at least two codes in ascending order (ValueError).

    >>> nearest_code(torch.tensor([-2.0, -0.6, 0.5, 0.6]))
    tensor([-1., -1.,  0.,  1.])
    """
    if list(codebook) != sorted(set(codebook)) or len(codebook) < 2:
        raise ValueError(f"codebook is {codebook}; expected at least two codes in ascending order")
    if tuple(codebook) == TERNARY:
        return z.round().clamp(-1, 1)  # Eq. (2): Clip(Round(z), -1, 1); round takes 1/2 to 0
    code = torch.full_like(z, codebook[0])
    for low, high in itertools.pairwise(codebook):
        code = torch.where(z >= (low + high) / 2, high, code)
    return code

def quantize(w, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (2): W-hat = Q(W) = gamma * Clip(Round(W / gamma), -1, +1), or gamma * nearest code.

    w's shape and dtype. scale: a gamma (n_groups, 1) to use in place of the computed one.

    >>> quantize(torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]))
    tensor([-0.5833, -0.5833, -0.5833,  0.0000,  0.5833,  0.5833])
    """
    z, gamma = _normalize(w, group_size, scale)
    return _like(gamma * nearest_code(z, codebook), w)

def quantize_ste(w, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (4): the value of Q(w) with the gradient of w, the straight-through estimator.

    >>> w = torch.tensor([-1.2, 0.1, 0.4], requires_grad=True)
    >>> quantize_ste(w).sum().backward()
    >>> w.grad
    tensor([1., 1., 1.])
    """
    # w - w.detach() is exactly zero and has the derivative 1
    return quantize(w.detach(), group_size, codebook, scale) + (w - w.detach())

def dead_zone(w, dw, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (6): True where the update dw changes no code, Q(w + dw) = Q(w), at w's gamma. w's shape.

    >>> dead_zone(torch.tensor([-1.0, 0.25, 0.25]), torch.tensor([0.1, 0.1, -0.1]))
    tensor([ True, False,  True])
    """
    z, gamma = _normalize(w, group_size, scale)
    moved, _ = _normalize(_at_least_float32(w) + dw, group_size, gamma)
    return (nearest_code(z, codebook) == nearest_code(moved, codebook)).view(w.shape)


# -- 3.2 Differentiable quantization: the softmax kernel. Section 4: its derivative ----------------
def _kernel(z, tau, codebook):
    """Eq. (7) for z = w / gamma: the codes q, (K, 1, 1), and pi_tau(q | z), (K, n_groups, g)."""
    if not tau >= 0:
        raise ValueError(f"tau is {tau}; expected a temperature >= 0, in units of gamma")
    q = torch.tensor(codebook, dtype=z.dtype, device=z.device).view(-1, 1, 1)
    near = nearest_code(z, codebook)
    if tau == 0:
        return q, (q == near).to(z.dtype)
    # A softmax stays as it is if one number is subtracted from all distances (z - q)^2. Subtract
    # the smallest, (z - near)^2, and multiply out: nothing then cancels, however small tau is.
    z = z.clamp(-1e18, 1e18)  # or 0 * infinity below
    distance = (near - q) * (2 * z - (near + q))
    return q, torch.softmax(-distance / max(tau, 1e-20), 0)  # 1 / tau must stay finite

def assignment_probs(w, tau, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (7): pi_tau(q | w) = softmax over q of -(w/gamma - q)^2 / tau. Shape (*w.shape, K).

    tau: a float >= 0 in units of gamma; 0 gives probability 1 to the nearest code.

    >>> assignment_probs(torch.tensor([-0.6, 0.3]), 0.5, scale=torch.ones(1, 1))
    tensor([[0.5958, 0.3993, 0.0049],
            [0.0274, 0.6711, 0.3015]])
    """
    z, _ = _normalize(w, group_size, scale)
    _, pi = _kernel(z, tau, codebook)  # (K, n_groups, g)
    return pi.movedim(0, -1).to(w.dtype).reshape(*w.shape, len(codebook))

def code_moments(z, tau, codebook=TERNARY):
    """Eqs. (16) and (17): mu_tau and V_tau, mean and variance of the code at z. Both of z's shape.

    z: (n_groups, g). At z = 1/2 and a small tau it is a coin toss between the codes 0 and 1:

    >>> code_moments(torch.tensor([[0.5]]), 0.01)
    (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    q, pi = _kernel(z, tau, codebook)
    mu = (q * pi).sum(0)
    # E[(q - mu)^2] is E[q^2] - mu^2, as Eq. (17) has it, without the difference of equal numbers
    return mu, ((q - mu).square() * pi).sum(0)

class _SoftQuantize(torch.autograd.Function):
    """Eq. (8) with Lemma 4.1 as its backward. It saves w and its few scales, and nothing else."""

    @staticmethod
    def forward(ctx, w, gamma, tau, group_size, codebook):
        ctx.save_for_backward(w, gamma)
        ctx.static = tau, group_size, codebook
        z, gamma = _normalize(w, group_size, gamma)  # (n_groups, g)
        q, pi = _kernel(z, tau, codebook)  # (K, 1, 1), (K, n_groups, g)
        return _like(gamma * (q * pi).sum(0), w)

    @staticmethod
    def backward(ctx, grad):
        (w, gamma), (tau, group_size, codebook) = ctx.saved_tensors, ctx.static
        # Eq. (19). It is plain torch, so it can be differentiated again
        return grad * soft_quantize_jacobian(w, tau, group_size, codebook, gamma), *[None] * 4

def soft_quantize(w, tau, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (8): w-tilde = H(w; tau) = gamma * sum over q of q * pi_tau(q | w). w's shape and dtype.

    Differentiable in w once (Lemma 4.1) and twice, with gamma held constant; for gradcheck hold it
    there too, by scale=absmean_scale(w). tau = 0 gives Q(w) exactly, with derivative 0.

    >>> w = torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9], requires_grad=True)
    >>> H = soft_quantize(w, tau=0.3)
    >>> H
    tensor([-0.5833, -0.5666, -0.3051,  0.0522,  0.4521,  0.5828],
           grad_fn=<_SoftQuantizeBackward>)
    >>> H.backward(torch.tensor([1.0, -2.0, 3.0, 0.5, -1.0, 2.0]))
    >>> print([round(g, 4) for g in w.grad.tolist()])
    [0.0002, -0.371, 5.0115, 0.3391, -1.1633, 0.0127]
    """
    gamma = absmean_scale(w, group_size) if scale is None else scale
    return _SoftQuantize.apply(w, gamma, tau, group_size, codebook)

def soft_quantize_jacobian(w, tau, group_size=None, codebook=TERNARY, scale=None):
    """Lemma 4.1, Eq. (18): the diagonal of dH/dw, (2 / tau) V_tau(w). w's shape, >= 0.

    Once tau is small it is largest at the boundaries of Eq. (5), where it is 1 / (2 tau). As tau
    falls to 0 it becomes a spike of mass gamma at each boundary: Lemma 4.2, Eq. (20).

    >>> soft_quantize_jacobian(torch.tensor([0.0, 0.3, 0.5]), 0.5, scale=torch.ones(1, 1))
    tensor([0.8521, 1.0149, 1.0719])
    """
    z, _ = _normalize(w, group_size, scale)
    _, variance = code_moments(z, tau, codebook)
    return _like(2 / max(tau, 1e-20) * variance, w)  # 0 at tau = 0, where V is

def effective_weight(w, tau, p, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (9): W_eff = (1 - p) W + p H(W; tau), what the model computes with. p: a float in [0, 1].

    >>> effective_weight(torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]), tau=0.3, p=0.5)
    tensor([-0.8917, -0.5833, -0.3025,  0.0761,  0.4261,  0.7414])
    """
    w32 = _at_least_float32(w)
    return _like((1 - p) * w32 + p * soft_quantize(w32, tau, group_size, codebook, scale), w)


# -- 3.3.1 Sensitivity: Hessian traces by Hutch++, and the scores they become ----------------------
class TraceEstimate(NamedTuple):
    """A trace and its standard error. flagged: within two standard errors of zero."""
    value: float
    stderr: float

    @property
    def flagged(self):
        return not abs(self.value) > 2 * self.stderr

def _estimate(known, readings):
    """known, which has no error, plus the mean of readings, whose spread gives the error."""
    readings = readings.cpu().double()  # some devices have no float64
    stderr = readings.std() / len(readings) ** 0.5 if len(readings) > 1 else math.inf
    return TraceEstimate(float(known + readings.mean()), float(stderr))

def _signs(shape, like, generator):
    """Rademacher vectors: +1 or -1 with equal chance, in like's dtype and on its device."""
    device = generator.device if generator else like.device
    bits = torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8)
    return (2 * bits - 1).to(like)

def _hutchpp(matvec, dim, rank, samples, generator, like):
    """The two terms of Eq. (12): the trace on the sketch, and `samples` readings of the rest."""
    if rank < 0 or samples < 1:
        raise ValueError(f"rank = {rank} and samples = {samples}; expected rank >= 0, samples >= 1")
    rank = min(rank, dim)
    S = _signs((dim, rank), like, generator)
    G = _signs((dim, samples), like, generator)  # of its own: S used twice would bias the trace
    Q = torch.linalg.qr(matvec(S)).Q if rank else S  # (dim, rank), spans the range of H S
    G = G - Q @ (Q.T @ G)  # (dim, samples), (I - Q Q^T) G
    HQ, HG = matvec(torch.cat([Q, G], 1)).split([rank, samples], 1)
    return (Q * HQ).sum(), (G * HG).sum(0)  # Tr(Q^T H Q), and the diagonal of G^T H G

def hutchpp(matvec, dim, rank=10, samples=20, generator=None, dtype=None, device=None):
    """Eq. (12), Hutch++: the trace of a symmetric linear operator from 2 rank + samples products.

    matvec: maps (dim, k) to (dim, k), k columns at once. The range of H times a random sketch S is
    traced exactly. The rest is the mean over `samples` Rademacher vectors G, where the paper prints
    their sum (lab/GUIDE.md). dtype, device: of the vectors that matvec gets. Returns a float.

    >>> H = torch.diag(torch.tensor([42.0, 0.5, 0.1, 0.0]))  # rank 3: a sketch of 3 catches it all
    >>> round(hutchpp(lambda V: H @ V, dim=4, rank=3), 4)
    42.6
    """
    like = torch.empty(0, dtype=dtype, device=device)
    return _estimate(*_hutchpp(matvec, dim, rank, samples, generator, like)).value

def _gradients(loss_fn, batch, params):
    """The gradients of a batch's mean loss, with their graph, to be differentiated again."""
    weights = list(params.values())
    grads = torch.autograd.grad(loss_fn(batch), weights, create_graph=True, allow_unused=True)
    if lost := ", ".join(name for name, g in zip(params, grads) if g is None):
        raise ValueError(f"the loss does not depend on {lost}; are they the model's own?")
    return grads

def _hessian_product(grads, weights, vectors):
    """H v = the gradient of g . v, a backward pass through the backward pass. Weights' shapes."""
    return torch.autograd.grad(grads, weights, vectors, retain_graph=True, materialize_grads=True)

def _hessian_times(loss_fn, batches, name, w, V, count):
    """H_i V, (d_i, k) -> (d_i, k), for the block of one tensor w, averaged over the batches."""
    HV = torch.zeros_like(V)
    for batch in batches:
        grads = _gradients(loss_fn, batch, {name: w})  # once for all columns of V
        for k in range(V.shape[1]):
            (Hv,) = _hessian_product(grads, [w], [V[:, k].view_as(w)])
            HV[:, k] += Hv.flatten() / len(batches)
            count()
        del grads, Hv  # and with them this batch's graph, before the next one is built
    return HV

def _joint_traces(loss_fn, params, batches, probes, generator, count):
    """All traces from the same products: ours, derived in notebooks/lab/curvature.py.

    Tensor j gets the probe a_j z_j, random signs z_j times a_j = 1 / ||g_j||. One product with the
    whole Hessian gives every tensor i a reading, z_i . (H v)_i / a_i. Its mean is Tr H_ii, since
    signs of different tensors are independent. Without a_j large traces would drown the others.
    """
    weights = list(params.values())
    readings = torch.zeros(len(weights), probes, dtype=weights[0].dtype)
    for batch in batches:  # each with signs of its own: the mean over batches averages noise too
        grads = _gradients(loss_fn, batch, params)
        norms = torch.stack([g.detach().norm() for g in grads])
        norms = norms / norms.max() if norms.any() else torch.ones_like(norms)
        a = 1 / norms.clamp_min(1e-3)  # (tensors,); only ratios matter, and none is infinite
        for k in range(probes):
            z = [_signs(w.shape, w, generator) for w in weights]
            Hv = _hessian_product(grads, weights, [a_j * z_j for a_j, z_j in zip(a, z)])
            t = [(z_i * Hv_i).sum() for z_i, Hv_i in zip(z, Hv)]
            readings[:, k] += (torch.stack(t) / a).cpu() / len(batches)
            count()
        del grads, Hv
    return {name: _estimate(0.0, t) for name, t in zip(params, readings)}

def hessian_traces(loss_fn, params, batches, estimator="hutchpp", rank=10, samples=20, *,
                   generator=None, progress=None):
    """Section 3.3.1: h_i = Tr(H_i), H_i the block of tensor i in the Hessian of loss_fn.

    loss_fn(batch) -> scalar, the mean loss in nats. params: {name: float32 or float64 weight}, by
    the names of linear_layers. batches: what loss_fn takes; their mean is differentiated, one graph
    at a time. estimator: "hutchpp", the paper's, with 2 rank + samples products for each tensor; or
    "joint", which reads all tensors from each product. generator: on the tensors' device.
    progress(done, total): called after each product. Returns {name: TraceEstimate}, in nats per
    squared weight. ValueError if the loss does not depend on a tensor.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = lambda batch: w[0] ** 3 + w[1] ** 2  # its Hessian is diag(6, 2)
    >>> [round(hessian_traces(loss, {"w": w}, [0], e)["w"].value, 4) for e in ("hutchpp", "joint")]
    [8.0, 8.0]
    """
    batches, products = list(batches), 2 * rank + samples
    if estimator not in ("hutchpp", "joint"):
        raise ValueError(f"unknown estimator {estimator!r}; expected 'hutchpp' or 'joint'")
    if not batches or not params or rank < 0 or samples < 1:
        raise ValueError("a trace needs a batch, a tensor, rank >= 0 and samples >= 1")
    for name, w in params.items():
        if not w.requires_grad or w.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: a trace needs float32 or float64 that requires grad")
    each = [2 * min(rank, w.numel()) + samples for w in params.values()]
    total = len(batches) * (sum(each) if estimator == "hutchpp" else products)
    done = itertools.count(1)
    count = lambda: progress and progress(next(done), total)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # what torch can differentiate twice
        if estimator == "joint":
            return _joint_traces(loss_fn, params, batches, products, generator, count)
        found = {}
        for name, w in params.items():
            matvec = lambda V, part=(name, w): _hessian_times(loss_fn, batches, *part, V, count)
            terms = _hutchpp(matvec, w.numel(), rank, samples, generator, w.detach())
            found[name] = _estimate(*terms)
        return found

def sensitivity_scores(traces, kappa=1.0, eps=1e-8):
    """Eq. (13): s_i = Sigmoid(kappa (log h_i - mu_h) / (sigma_h + eps)), 1/2 for an average tensor.

    traces: {name: float or TraceEstimate}. mu_h and sigma_h (population) run over these tensors. A
    trace may have no logarithm: what lies below half the smallest trustworthy one (positive, not
    flagged) counts as that half, with a warning. ValueError if one is not finite or none positive.

    >>> scores = sensitivity_scores({"q": 10.0, "v": 1000.0, "down": 100000.0})
    >>> {name: round(s, 4) for name, s in scores.items()}
    {'q': 0.2271, 'v': 0.5, 'down': 0.7729}
    """
    value = {name: float(getattr(h, "value", h)) for name, h in traces.items()}
    positive = [name for name, h in value.items() if h > 0]
    if not positive or not all(math.isfinite(h) for h in value.values()):
        raise ValueError("no Hessian trace is positive, or one is not finite; calibrate a trained "
                         "model on more tokens")
    trusted = [name for name in positive if not getattr(traces[name], "flagged", False)]
    floor = 0.5 * min(value[name] for name in trusted or positive)
    if lost := [name for name in value if name not in trusted]:
        warnings.warn(f"Hessian trace not positive, or lost in its error, for {', '.join(lost)}: "
                      f"below {floor:.3g} it counts as that", stacklevel=2)
    logs = {name: math.log(max(h, floor)) for name, h in value.items()}
    mu = sum(logs.values()) / len(logs)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in logs.values()) / len(logs))
    sigmoid = lambda x: 0.5 * (1 + math.tanh(x / 2))  # in this form it cannot overflow
    return {name: sigmoid(kappa * (x - mu) / (sigma + eps)) for name, x in logs.items()}


# -- 3.2 and 3.3.2 Schedules: pressure and temperature ---------------------------------------------
def pressure(t, T, rho):
    """Eq. (10): p_t, the share of H in W_eff. It grows linearly to 1 over the first rho T steps.

    >>> [pressure(t, T=10, rho=0.4) for t in (0, 1, 4, 10)]
    [0.0, 0.25, 1.0, 1.0]
    """
    if not (T > 0 and 0 <= rho <= 1):
        raise ValueError(f"T = {T} steps and rho = {rho}; expected T > 0 and rho between 0 and 1")
    return 1.0 if rho == 0 else min(1.0, t / (rho * T))

def base_temperature(t, T, rho, tau_init):
    """Eq. (14): tau-bar. tau_init to T_comp = rho T (Figure 2), then half a cosine to 0 at T.

    >>> [round(base_temperature(t, T=10, rho=0.2, tau_init=0.3), 4) for t in (0, 2, 6, 10)]
    [0.3, 0.3, 0.15, 0.0]
    """
    T_comp = rho * T
    if t >= T or t <= T_comp:
        return tau_init if t < T else 0.0
    return tau_init / 2 * (1 + math.cos(math.pi * (t - T_comp) / (T - T_comp)))

def temperature(t, T, rho, tau_init, score, alpha):
    """Eq. (15): tau_i = tau-bar * exp(alpha s_i). Sensitive tensors stay warmer.

    >>> round(temperature(0, T=10, rho=0.2, tau_init=0.3, score=1.0, alpha=0.4), 4)
    0.4475
    """
    return base_temperature(t, T, rho, tau_init) * math.exp(alpha * score)

@torch.no_grad()
def optimal_tau_init(weights, group_size=None, codebook=TERNARY):
    """Section 5.1: the tau at which H(W; tau) is closest to W in squared error, within 0.1 %.

    weights: a list or dict of tensors. tau is between 0.01 and 10, in units of gamma; for Gaussian
    weights it is 0.35, where Table 5 says 0.3: the minimum is flat. ValueError for weights that are
    all zero or not finite.

    >>> w = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    >>> round(optimal_tau_init([w]), 2)
    0.35
    """
    weights = weights.values() if isinstance(weights, dict) else weights
    weights = [_at_least_float32(w) for w in weights]  # or the search runs on rounding noise
    largest = float(torch.stack([w.abs().max().float() for w in weights]).max()) if weights else 0.0
    if not 0 < largest < math.inf:
        raise ValueError("tau_init needs finite weights that are not all zero")

    def error(tau):
        errors = (soft_quantize(w, tau, group_size, codebook) - w for w in weights)
        return sum(float((e / largest).square().sum(-1).cpu().double().sum()) for e in errors)

    # the error falls, then rises: bisect for the place where it begins to rise
    grid = [0.01 * 1.001**k for k in range(6912)]
    rises = lambda k: error(grid[k]) < error(grid[k + 1])
    return grid[bisect.bisect(range(len(grid) - 1), False, key=rises)]


# -- Algorithm 1: W moves once per step, so W_eff is put into an ordinary model once per step ------
class Step(NamedTuple):
    """What a method may know when it maps W to W_eff."""
    p: float
    tau: float
    group_size: int | None
    codebook: tuple

class Method(NamedTuple):
    """A row of the paper's tables: what training shows the model, and what is left of W."""
    label: str
    relax: Callable  # (W, Step) -> W_eff, differentiable in W
    harden: Callable  # (W, Step) -> W-hat
    soft: bool = False  # whether p and tau act on it

def hard_absmean(w, s):
    """Q(W) with gamma rounded to bfloat16: a ternary file in bfloat16 holds what was evaluated."""
    z, gamma = _normalize(w, s.group_size, None)
    return _like(gamma.bfloat16() * nearest_code(z, s.codebook), w)

def relax_full(w, s):
    return w

def relax_ste(w, s):
    return quantize_ste(w, s.group_size, s.codebook)

def relax_hestia(w, s):
    return effective_weight(w, s.tau, s.p, s.group_size, s.codebook)

METHODS = {  # to add one: a function and a line. notebooks/lab/rivals.py has the other methods
    "full": Method("full precision", relax_full, relax_full),
    "absmean": Method("AbsMean STE", relax_ste, hard_absmean),
    "hestia": Method("HESTIA", relax_hestia, hard_absmean, soft=True),
}

def linear_layers(model):
    """Section 5.1: {name: module} of every nn.Linear but the head.

    The head is model.get_output_embeddings(), or what is tied to an embedding. Where a model does
    not say it, names do, outside of numbered blocks: lm_head, output, score, classifier.

    >>> model = nn.ModuleDict({"up": nn.Linear(2, 3), "lm_head": nn.Linear(3, 9)})
    >>> linear_layers(model)
    {'up': Linear(in_features=2, out_features=3, bias=True)}
    """
    layers, embeddings = {}, [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, m in model.named_modules():
        *blocks, last = name.split(".")
        named = last in ("lm_head", "output", "score", "classifier")
        named = m is head if head else named and not any(block.isdigit() for block in blocks)
        if isinstance(m, nn.Linear) and not named and not any(m.weight is e for e in embeddings):
            layers[name] = m
    return layers

class Hestia:
    """Algorithm 1 around any model. It keeps a float32 latent copy W of every quantized weight.

    model: any nn.Module; wrap it in DDP or torch.compile after this. method: a name in METHODS.
    scores: {layer's name: s_i}; None for all 0. tau_init: None for `optimal_tau_init`. layers:
    {name: module with a weight}; None for `linear_layers(model)`. Frozen ones stay as they are.
    left_out: {matrix that is not quantized: what it is}. dtype: of the effective weights; None for
    the model's. ValueError says what cannot be used, RuntimeError what a loop does wrong.

    After relax(t) every layer's weight holds W_eff(t), without a gradient. After pull_back() every
    latents[name].grad is dL/dW or None. Subclasses override effective, hardened and parameters
    (what a method shows), or relax and pull_back (how fast).

    >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> qat = Hestia(model, total_steps=10, group_size=None)
    >>> optimizer = adamw(qat.parameters(), lr=1e-2)
    >>> for t in range(10):
    ...     qat.relax(t)           # W_eff(t) is in the model now: Algorithm 1, lines 4-10
    ...     model(torch.ones(3, 4)).square().mean().backward()
    ...     qat.pull_back()        # dL/dW = dL/dW_eff * dW_eff/dW, Eq. (19)
    ...     optimizer.step()       # line 11
    >>> qat.harden()               # line 13
    >>> len(model[0].weight.abs().unique()) <= 2  # only 0 and gamma are left
    True
    """

    def __init__(self, model, total_steps, *, method="hestia", group_size=128, rho=0.2, alpha=0.4,
                 tau_init=None, scores=None, codebook=TERNARY, layers=None, dtype=None):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
        self.model, self.method, self.total_steps = model, METHODS[method], total_steps
        self.group_size, self.codebook, self.rho, self.alpha = group_size, codebook, rho, alpha
        layers = linear_layers(model) if layers is None else layers
        self.layers = {name: m for name, m in layers.items() if m.weight.requires_grad}
        self.scores = dict.fromkeys(self.layers, 0.0) if scores is None else scores
        self._check_settings(tau_init)
        if tau_init is None and self.method.soft:
            weights = [layer.weight for layer in self.layers.values()]
            tau_init = optimal_tau_init(weights, group_size, codebook)
        self.tau_init = tau_init or 0.0  # a method without a temperature has none

        self.latents = {}  # {layer's name: W}
        self.dtypes = {}  # {layer's name: what its weight was, and will be again}
        for name, layer in self.layers.items():
            w = layer.weight.detach()
            self.latents[name] = nn.Parameter(_at_least_float32(w).clone())
            self.dtypes[name] = w.dtype
            if dtype not in (None, w.dtype):  # a new Parameter, which a compiled model notices
                layer.weight = nn.Parameter(w.to(dtype))
            layer.weight.grad = None
        quantized = {id(layer.weight) for layer in self.layers.values()}
        # embedding, norms, biases, head: trained, and not quantized
        self.rest = [p for p in model.parameters() if p.requires_grad and id(p) not in quantized]
        kind = lambda name: type(model.get_submodule(name.rpartition(".")[0])).__name__
        self.left_out = {name: kind(name) + ", frozen" * (not p.requires_grad)
                         for name, p in model.named_parameters()
                         if p.dim() > 1 and id(p) not in quantized}
        self.graphs = {}  # {layer's name: W_eff with its graph to W}, from relax to pull_back
        self.first, self.pulled, self.begun, self.last = self._sums(), 0, 0, 0  # begun: t + 1
        self.shown = self._look({})

    def _check_settings(self, tau_init):
        """One sentence for what cannot work, before anything in the model is changed."""
        pressure(0, self.total_steps, self.rho)  # refuses both
        nearest_code(torch.zeros(1), self.codebook)
        if self.rho == 1 and self.method.soft:
            warnings.warn("rho = 1 leaves no step in which the temperature falls", stacklevel=3)
        if not (tau_init is None or 0 < tau_init < math.inf):
            raise ValueError(f"tau_init is {tau_init}; expected a number above 0, such as 0.3")
        if not self.layers:
            raise ValueError("nothing to quantize: no nn.Linear but the head, or frozen or packed")
        for name, layer in self.layers.items():
            _groups(layer.weight, self.group_size)
            if layer.weight.is_meta or not torch.isfinite(layer.weight).all():
                raise ValueError(f"the weights of {name} are not loaded, or hold NaN or infinity")
            if sum(layer.weight is other.weight for other in self.layers.values()) > 1:
                raise ValueError(f"{name} shares its weight with another layer; untie them first")
            if not 0 <= self.scores.get(name, math.nan) <= 1:
                raise ValueError(f"the score of {name} is {self.scores.get(name)}; expected 0 to 1")

    def step_of(self, t, name):
        """Lines 4 and 6: the pressure (Eq. 10) and the layer's temperature (Eq. 15) at step t."""
        when = t, self.total_steps, self.rho
        tau = temperature(*when, self.tau_init, self.scores[name], self.alpha)
        return Step(pressure(*when), tau, self.group_size, self.codebook)

    def effective(self, t, name):
        """Lines 7 and 8: W_eff of one layer at step t, with its graph to what is trained."""
        return self.method.relax(self.latents[name], self.step_of(t, name))

    @torch.no_grad()
    def hardened(self, name):
        """W-hat of one layer, float32: what is left of W at the end of the schedules."""
        step = self.step_of(self.total_steps, name)
        return self.method.harden(self.latents[name], step).detach().clone()

    @torch.enable_grad()
    def relax(self, t):
        """Lines 5-10: the model now computes with W_eff(t), whose gradients are None."""
        if not 0 <= t < self.total_steps:
            raise ValueError(f"relax({t}): expected a step from 0 to {self.total_steps - 1}")
        self._look(self.shown)
        for name, layer in self.layers.items():
            W_eff = self.graphs[name] = self.effective(t, name).to(layer.weight.dtype)
            layer.weight.data, layer.weight.grad = W_eff.detach(), None
        self.begun = t + 1
        self.shown = self._look({})

    def pull_back(self):
        """Eq. (19): dL/dW = dL/dW_eff * dW_eff/dW, which is 1 - p + p (2 / tau) V for HESTIA."""
        if not self.graphs:
            raise RuntimeError("pull_back() needs this step's W_eff; call relax(t) first")
        self._check_loop()
        for name, layer in self.layers.items():
            W_eff = self.graphs.pop(name)
            self.latents[name].grad = None
            if layer.weight.grad is not None:  # None where the loss left the layer out
                W_eff.backward(layer.weight.grad)
                layer.weight.grad = None

    @torch.inference_mode(False)  # or they could not be trained again
    def harden(self):
        """Line 13: W-hat = Q(W), gamma in bfloat16, in the dtype that the model had."""
        self._look(self.shown)
        self._check_stepped()
        for name, layer in self.layers.items():
            layer.weight = nn.Parameter(self.hardened(name).to(self.dtypes[name]))
        self.graphs, self.shown = {}, {}

    @contextmanager
    def hard(self):
        """Eq. (3): in `with qat.hard():` the model shows Q(W). Afterwards it is as it was."""
        before = {name: layer.weight.data for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.weight.data = self.hardened(name).to(layer.weight.dtype)
            yield self.model
        finally:
            for name, layer in self.layers.items():
                layer.weight.data = before[name]

    @torch.no_grad()
    def codes(self):
        """{name: the code of each weight}, in bfloat16, which holds the three codebooks exactly."""
        found = {}
        for name, w in self.latents.items():
            z, _ = _normalize(w, self.step_of(0, name).group_size, None)
            found[name] = nearest_code(z, self.codebook).bfloat16().view_as(w)
        return found

    def parameters(self):
        """What the optimizer trains: the latents, and all that is not quantized."""
        return [*self.latents.values(), *self.rest]

    def __str__(self):  # what is quantized, and what is not
        count = sum(w.numel() for w in self.latents.values())
        share = count / sum(p.numel() for p in self.model.parameters())
        kinds = ", ".join(sorted({*self.left_out.values()})) or "none"
        return f"{len(self.layers)} layers, {share:.0%} of the weights; matrices left out: {kinds}"

    # Refused: models that were changed behind this object's back, and loops that train nothing
    def _look(self, expected):
        """What relax must find again of the model. RuntimeError where it differs."""
        found = {}
        for name, layer in self.layers.items():
            w = layer.weight
            written = (w._version, w.data_ptr()) if self.begun else float(w.detach().float().sum())
            found[f"{name}.weight"] = {
                "replaced": id(w), "frozen": w.requires_grad, "moved": (w.device, w.dtype),
                "left with a gradient": w.grad is None, "written to": written}
        trained = [id(p) for p in self.model.parameters() if p.requires_grad]
        found["the model"] = {"given other parameters": trained}
        for name, seen in expected.items():
            for what, before in seen.items():
                if found[name][what] != before:
                    raise RuntimeError(f"{name} was {what} since Hestia() or relax(); change the "
                                       "model before, and call pull_back() after backward()")
        return found

    def _check_loop(self):
        if all(layer.weight.grad is None for layer in self.layers.values()):
            raise RuntimeError("pull_back() found no gradient; call it after backward() through "
                               "the model in this Hestia, and before zero_grad()")
        if self.begun == self.last and any(w.grad is not None for w in self.latents.values()):
            raise RuntimeError("pull_back() twice in a step; call it once, after all micro-batches")
        self.pulled, self.last = self.pulled + 1, self.begun
        if self.pulled == 20:
            self._check_stepped()

    def _check_stepped(self):
        if self.pulled > 1 and self._sums() == self.first:
            raise RuntimeError("no latent weight has moved; give the optimizer qat.parameters()")

    def _sums(self):
        return [float(w.detach().flatten()[::2].sum()) for w in self.latents.values()]

    def __getstate__(self):  # a copy has a model of its own, and no graph
        return {**vars(self), "graphs": {}, "shown": {}, "pulled": 0}


# -- The model of section 5.1: Llama 3, with the parameter names of Hugging Face checkpoints -------
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}

@dataclass
class LlamaConfig:
    """The fields of config.json that shape the computation. Llama-3.2-1B's, but for rope_scaling.

    head_dim: None for hidden_size / heads. rope_scaling: None, or a dict with LLAMA3's keys.
    """
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    rms_norm_eps: float | int = 1e-5
    rope_theta: float | int = 500000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        above_0 = lambda x: type(x) in (int, float) and 0 < x < 2**31
        for f in fields(self):
            if f.name == "head_dim" and self.head_dim is None:  # both numbers were looked at
                self.head_dim = self.hidden_size // self.num_attention_heads
            x, number = getattr(self, f.name), f.type not in (bool, dict | None)
            if not isinstance(x, f.type) or (number and not above_0(x)):
                raise ValueError(f"{f.name} is {x!r}; expected {f.default!r} or the like")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, and "
                             f"head_dim even; they are {self}")
        r = self.rope_scaling or LLAMA3
        known = r.get("rope_type") == "llama3" and all(above_0(r.get(k)) for k in [*LLAMA3][1:])
        if not known or r["low_freq_factor"] >= r["high_freq_factor"]:
            raise ValueError(f"rope_scaling is {r}; expected none, or one such as {LLAMA3}")

def rope_frequencies(config, device=None):
    """Radians by which each pair of a head's dimensions turns per position. (head_dim / 2,)

    With llama3 scaling fast pairs stay, slow ones (a wave longer than the original context) turn
    `factor` times slower, and those between go from one to the other.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    if config.rope_scaling:
        factor, low, high, context = (config.rope_scaling[key] for key in [*LLAMA3][1:])
        waves = context * frequency / (2 * math.pi)  # that fit into the context of the pretraining
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / factor
    return frequency

def rotate(x, cos, sin):
    """RoPE, split-half layout: dimension d is paired with d + head_dim / 2."""
    a, b = x.chunk(2, -1)  # x: (B, heads, T, head_dim); a, b: (B, heads, T, head_dim / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, queries, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, keys, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, keys, bias=c.attention_bias)
        self.o_proj = nn.Linear(queries, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        shared = k.shape[1] < q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, nh, T, head_dim) -> (B, T, C)

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """model(ids) -> logits (B, T, V). model(ids, targets) -> mean loss in nats per token."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # the last layer of a branch starts smaller, so that depth does not add up
        small = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=small if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, targets=None):
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos, sin = self.rope(ids.shape[1], ids.device)  # (T, head_dim / 2)
        for block in self.model.layers:
            x = block(x, cos, sin)
        x = self.model.norm(x)
        return self.lm_head(x) if targets is None else self.loss(x, targets)

    def rope(self, T, device):
        position = torch.arange(T, dtype=torch.float32, device=device)
        angle = torch.outer(position, rope_frequencies(self.config, device))  # (T, head_dim / 2)
        return angle.cos(), angle.sin()

    def loss(self, x, targets):
        logits = _at_least_float32(self.lm_head(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def _llama_config(folder):
    """The LlamaConfig of a Hugging Face folder, and its config.json as it stands there."""
    lab = f"python -m notebooks.lab.checkpoints {folder} NEW_FOLDER"
    if odd := [file.name for file in folder.glob("*.[js]*") if not file.is_file()]:
        raise ValueError(f"{folder}: {odd[0]} is a folder, a pipe or a link to nothing, not a file")
    if (folder / "params.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is in Meta's format, which this converts: {lab}")
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = raw.get("model_type"), raw.get("hidden_act", "silu")
    if kind != ("llama", "silu"):
        raise ValueError(f"{folder} has model_type, hidden_act {kind}; expected 'llama', 'silu'")
    if raw.get("quantization_config"):
        raise ValueError(f"{folder} holds packed weights, which this unpacks: {lab}")
    # what config.json may leave out, and what transformers then takes
    found = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6,
             "rope_theta": 10000.0, "tie_word_embeddings": False}
    found |= {key: value for key, value in raw.items() if value is not None}
    # RoPE in the older spelling, or in the newer one: transformers, too, asks in this order
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope |= {k: raw[k] for k in ["original_max_position_embeddings"] if k in raw}
    found["rope_theta"] = rope.pop("rope_theta", found["rope_theta"])
    rope.setdefault("rope_type", rope.pop("type", "default"))
    found["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return LlamaConfig(**{k: found[k] for k in found.keys() & LlamaConfig.__annotations__}), raw

def load_llama(path, dtype=None, device="cpu"):
    """Section 5.1: a Llama from a Hugging Face folder, config.json and safetensors files.

    dtype: of the weights; None for the files', float32 if they have several. Tensors that do not
    fit are named in one error. model.origin is (folder, config.json), for save_llama.
    """
    from safetensors import safe_open  # pip install '.[llama]'
    folder, files, tensors = Path(path), ["model.safetensors"], {}
    config, raw = _llama_config(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({Path(file).name for file in weight_map.values()})
    for file in files:
        with safe_open(folder / file, "pt") as opened:  # mapped, not read. No name may come twice
            tensors |= {name + " again" * (name in tensors): opened.get_tensor(name)
                        for name in [*opened.keys()] if not name.endswith("rotary_emb.inv_freq")}
    if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
        raise ValueError(f"{folder} holds whole numbers, NaN or infinity; expected finite floats")
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{folder} has {len(layers)} layers and says {config.num_hidden_layers}")
    if config.tie_word_embeddings:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
            raise ValueError(f"{folder} has a head that differs from the embedding it is tied to")
    kinds = {t.dtype for t in tensors.values()}
    dtype = dtype or (kinds.pop() if len(kinds) == 1 else torch.float32)
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    for name in tensors:  # one by one, so that memory holds the model and one tensor
        tensors[name] = tensors[name].to(device, dtype, copy=True)
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # the tie, which assigning has cut
    model.origin = folder, raw
    return model

def save_llama(model, path):
    """Write a Hugging Face folder that other software loads, and read it back. Returns the path.

    Tensors go to bfloat16 where that is exact, as linear weights are after harden(), or else to
    float32. Tokenizer files come from where the model was loaded. The folder appears whole or not
    at all; FileExistsError if it holds something already.
    """
    from safetensors.torch import save_file
    path, (source, raw) = Path(path), getattr(model, "origin", (None, {}))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not an empty folder; name another, or remove it")
    tensors = {}
    for name, p in model.named_parameters():  # without a tied head
        w = p.detach().cpu()
        exact = torch.equal(w.bfloat16().to(w.dtype), w)
        tensors[name] = (w.bfloat16() if exact else w.float()).contiguous()
    kinds = {t.dtype for t in tensors.values()}
    raw = {k: v for k, v in raw.items() if k not in ("rope_parameters", "dtype")}  # said below
    config = {"max_position_embeddings": 2048, **raw, **asdict(model.config), "model_type": "llama",
              "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
              "torch_dtype": "bfloat16" if kinds == {torch.bfloat16} else "float32"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as aside:
        (made := Path(aside) / path.name).mkdir()
        kept = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template",
                "generation_")
        for file in source.iterdir() if source else ():
            if file.name.startswith(kept) and file.is_file():
                shutil.copyfile(file, made / file.name)  # not its mode
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(made / "config.json", made / "model.safetensors")  # or none else reads it
        written = dict(load_llama(made, torch.float32).named_parameters())
        for name, p in model.named_parameters():
            if not torch.equal(written[name], p.detach().cpu().float()):
                raise RuntimeError(f"{name} reads back differently; {path} was not made")
        made.replace(path)
    return path


# -- The loop, nanoGPT style: Algorithm 1 with AdamW, warm-up-stable-decay, clipping, accumulation -
class Diverged(RuntimeError):
    """The loss or the gradient is not finite. The weights are those before that step."""

def learning_rate(t, T, peak, warmup=0.05, decay=0.1, final=0.1):
    """Table 5's WSD; ours goes up over 5 % of T steps, and down to a tenth over the last 10 %.

    >>> [round(learning_rate(t, 100, 1.0), 2) for t in (0, 4, 50, 90, 99)]
    [0.2, 1.0, 1.0, 1.0, 0.19]
    """
    up = min(1.0, (t + 1) / max(1.0, warmup * T))
    left = min(1.0, (T - t) / max(1.0, decay * T))
    return peak * up * (final + (1 - final) * left)

def adamw(parameters, lr, weight_decay=0.1):
    """AdamW with weight decay on matrices and none on vectors."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

def batch_at(tokens, step, batch_size, block_size, seed):
    """Line 3: the batch of a step. A function of (seed, step) alone, so all methods see the same.

    tokens: (N,), on the device that gathers the batch. Returns inputs and targets, (batch_size,
    block_size) each, the targets one token further. ValueError if the text is too short.
    """
    whole = torch.is_tensor(tokens) and not tokens.is_floating_point()
    if not whole or tokens.dim() != 1 or len(tokens) <= block_size:
        raise ValueError(f"tokens are {type(tokens).__name__} {(*getattr(tokens, 'shape', ()),)}; "
                         f"expected a torch tensor of more than {block_size} whole numbers, (N,)")
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    start = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    start = start.to(tokens.device, non_blocking=True)
    offsets = torch.arange(block_size + 1, device=tokens.device)
    window = tokens[start + offsets].long()  # (batch_size, block_size + 1)
    return window[:, :-1], window[:, 1:]

def precision(device):
    """bf16 autocast on CUDA, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

@contextmanager
def evaluating(model):
    """Without dropout and the like. Afterwards each module is in the mode that it was in."""
    training = [m for m in model.modules() if m.training]
    try:
        yield model.eval()
    finally:
        for m in training:
            m.training = True

@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size=32):
    """Mean loss in nats per token over disjoint blocks of a text, the last of which may be shorter.

    Every token of a block is predicted but its first. Under `with qat.hard():` or after `harden()`
    this is J(W), Eq. (3). ValueError if there is nothing to predict.
    """
    if tokens.dim() != 1 or min(len(tokens), block_size) < 2:
        raise ValueError(f"blocks of {block_size} in {(*tokens.shape,)} leave none to predict")
    device, losses = next(model.parameters()).device, []  # [(mean loss, targets)]
    whole = len(tokens) // block_size * block_size
    with precision(device), evaluating(model):
        # (<= batch_size, block_size) each, and the rest, (1, < block_size)
        for ids in (*tokens[:whole].view(-1, block_size).split(batch_size), tokens[None, whole:]):
            if ids[:, 1:].numel():
                x, y = ids[:, :-1].to(device).long(), ids[:, 1:].to(device).long()
                losses.append((model(x, y), y.numel()))
    return sum(float(loss) * n for loss, n in losses) / sum(n for _, n in losses)

def backward(model, x, y, micro_batches=1):
    """Eq. (11), a sample of it: a batch's mean loss, and its gradients, by equal micro-batches."""
    loss = 0.0
    for x_, y_ in zip(x.chunk(micro_batches), y.chunk(micro_batches)):  # (B / micro_batches, T)
        with precision(x.device):
            part = model(x_, y_) / micro_batches
        part.backward()
        loss = loss + part.detach()
    return loss

def update(optimizer, loss, norm, clip):
    """Line 11: clip by norm, taken before pull_back, and step. Diverged if loss or norm is NaN."""
    if not torch.isfinite(loss + norm):
        raise Diverged(f"loss {loss:.4g}, gradient norm {norm:.4g}; lower the learning rate")
    # pull_back is linear, so that dividing dL/dW divides dL/dW_eff
    for p in [p for group in optimizer.param_groups for p in group["params"]]:
        if p.grad is not None:
            p.grad /= ((norm + 1e-6) / clip).clamp(min=1.0)
    optimizer.step()

def grad_norm(parameters):
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

def train(model, tokens, *, steps, batch_size, block_size, lr, qat=None, micro_batches=1, clip=1.0,
          seed=0, start=0, optimizer=None, backward=backward, update=update, on_step=None,
          log_every=50):
    """Algorithm 1, lines 2 to 12, and what is around them. Returns the log, a list of records.

    model(x, y) -> mean loss, such as a Llama's. tokens: (N,). qat: a Hestia around this model for
    the same steps, or None. batch_size: sequences per step. clip: bound of the gradient norm, with
    dL/dW_eff in it. on_step(t, record or None): called after each step, to print, save or stop.
    start, optimizer, backward and update: where notebooks/lab puts in resuming, GPUs, a teacher.
    """
    if qat and qat.total_steps != steps:
        raise ValueError(f"{steps} steps, and schedules for {qat.total_steps}; make them equal")
    if qat and {*map(id, model.parameters())} != {*map(id, qat.model.parameters())}:
        raise ValueError("the Hestia is not around this model; make it from the whole of it")
    if batch_size % micro_batches:
        raise ValueError(f"a batch of {batch_size} does not split into {micro_batches} equal parts")
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    if torch.is_tensor(tokens) and len(tokens) and int(tokens.max()) >= vocabulary:
        raise ValueError(f"there is a token {int(tokens.max())}; the model has {vocabulary} tokens")
    device = next(model.parameters()).device
    trained = qat.parameters() if qat else list(model.parameters())
    optimizer = optimizer or adamw(trained, lr)
    log, began = [], time.perf_counter()
    for t in range(start, steps):  # line 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, steps, lr)
        if qat:
            qat.relax(t)  # lines 4-10
        x, y = batch_at(tokens, t, batch_size, block_size, seed)  # line 3
        loss = backward(model, x.to(device), y.to(device), micro_batches)
        norm = grad_norm(model.parameters())  # with dL/dW_eff for the quantized weights
        if qat:
            qat.pull_back()  # Eq. (19)
        recording = t % log_every == 0 or t == steps - 1
        latent_norm = grad_norm(trained) if recording else None  # with dL/dW for them
        update(optimizer, loss, norm, clip)  # line 11
        optimizer.zero_grad()
        record = None
        if recording:
            record = {"step": t, "loss": float(loss), "lr": learning_rate(t, steps, lr),
                      "grad_norm": float(norm), "grad_norm_latent": float(latent_norm),
                      "seconds": time.perf_counter() - began}
            if qat and qat.method.soft:
                taus = [qat.step_of(t, name).tau for name in qat.latents]
                record["p"] = pressure(t, steps, qat.rho)
                record["tau_min"], record["tau_max"] = min(taus), max(taus)
            log.append(record)
        if on_step:
            on_step(t, record)
    return log

@torch.no_grad()
def generate(model, ids, new_tokens, block_size, temperature=0.8, generator=None):
    """Continue ids (B, T), each token from at most block_size others; temperature 0 is greedy."""
    for _ in range(new_tokens):
        with precision(ids.device), evaluating(model):
            logits = model(ids[:, -block_size:])[:, -1].float()  # (B, V)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:  # drawn on the CPU: the same text on every device, up to rounding
            probs = torch.softmax(logits / temperature, -1).cpu()
            new = torch.multinomial(probs, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, new], 1)  # (B, T + 1)
    return ids
