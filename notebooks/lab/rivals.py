"""Every other row of Tables 1, 2 and 3, and of section 2: ROWS. `make` builds one around a model.
Section 2 also names CO-QAT, a law (laws.py), and HAWQ and QuIP, whose measures are in measures.py.

A method of W alone is a function and a line in hestia.METHODS. One with something beside W is a
subclass of hestia.Hestia. One that changes W after the optimizer's step is an on_step of the loop.
W is (n_out, n_in), its groups are (n_groups, g), and their scale is (n_groups, 1).
"""

import copy
import dataclasses
import math
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

import hestia
import plots
from hestia import TERNARY, TWO_BIT, Method, hard_absmean
from notebooks.lab import fast

# Ternary at the scale 1.5 mean|w|, near the least squares of Gaussian weights, 1.53. In units of
# gamma its codes are these. tau stays in units of gamma, so that it starts 2.25 times as large.
WIDE = (-1.5, 0.0, 1.5)

# -- Methods of W alone: relax(W, Step) -> W_eff ---------------------------------------------------


def groups(w, s):  # as rows that share a scale, (n_groups, g)
    return w.reshape(-1, s.group_size or w.numel())


def through(w, value, slope=1.0):
    """This value, with this derivative in w. All of w's shape. A slope of 1 is the STE."""
    return value + slope * (w - w.detach())


def twn_codes(z):
    """TWN drops |w| <= 0.7 mean|w|, and its scale is the mean of the others. z: (n_groups, g)."""
    a = z.detach().abs()
    kept = a > 0.7 * a.mean(1, keepdim=True)
    scale = (a * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    return kept * z.detach().sign(), scale  # (n_groups, g), (n_groups, 1)


def relax_twn(w, s):
    """TWN (arXiv 1605.04711): another threshold and another scale than AbsMean's."""
    codes, scale = twn_codes(groups(w, s))
    return through(w, (scale * codes).view_as(w))


def relax_int2_absmax(w, s):
    """The authors' 2-bit symmetric grid: scale max|w|, codes -2 to 1, of which -2 never occurs."""
    z = groups(w.detach(), s)
    scale = z.abs().amax(1, keepdim=True).clamp_min(1e-5)
    return through(w, (scale * (z / scale).round().clamp(-2, 1)).view_as(w))


def sloped(w, s, slope):
    """Q(W) with the derivative slope(|z|) where z = w / gamma is on the grid, and 0 outside."""
    z = groups(w.detach(), s) / hestia.absmean_scale(w, s.group_size)
    slopes = slope(z.abs().clamp(max=1)) * (z.abs() <= 1)
    return through(w, hestia.quantize(w.detach(), s.group_size), slopes.view_as(w))


def relax_dge(w, s, k=5, cap=3.0):
    """DGE (arXiv 2501.17116): the slope is |2 |z| - 1|^(1/k - 1) / k, and at most cap."""
    away = lambda a: (2 * a - 1).abs().clamp_min(1e-12)  # from the boundary |z| = 1/2
    return sloped(w, s, lambda a: (away(a) ** (1 / k - 1) / k).clamp(max=cap))


def relax_daq(w, s, T=2.0):
    """DAQ (2021): the slope of a soft argmax whose temperature makes it exact rounding."""
    # T / (2 sinh T) (a + b) / (a - b), a = exp(-d), b = exp(-(1 - d) - 1), d from the nearer code
    return sloped(w, s, lambda a: T / (2 * math.sinh(T)) / torch.tanh(1 - torch.minimum(a, 1 - a)))


def relax_dsq(w, s, alpha=0.2):
    """DSQ (arXiv 1908.05033): a tanh between each two codes, stretched; soft to the end."""
    gamma, k = hestia.absmean_scale(w, s.group_size), math.log(2 / alpha - 1)
    z = groups(w, s) / gamma
    side = torch.where(z < 0, -1.0, 1.0)  # not sign(z) and |z|: for autograd they are flat at 0
    soft = torch.tanh(k * (z.clamp(-1, 1) - side / 2)) / math.tanh(k / 2)  # -side at 0, side at +-1
    return (gamma * (soft + side) / 2).view_as(w)


def relax_leak(w, s, leak=0.3):
    """HESTIA's value, and a slope that never ends: (1 - p) + p (leak + (1 - leak) J)."""
    H = hestia.soft_quantize(w, s.tau, s.group_size, s.codebook)
    return (1 - s.p) * w + s.p * ((1 - leak) * H + leak * through(w, H.detach()))


def slope_leak(w, p, tau, codebook, leak=0.3):  # the same for fast.Hestia
    return (1 - leak) * fast.slope_hestia(w, p, tau, codebook) + leak


fast.FUSED[relax_leak] = fast.relax_hestia, slope_leak


def hard_wide(w, s):
    """Q(W), each group's one level rounded to bfloat16: 1.5 gamma has a digit too many."""
    return hard_absmean(w, s).bfloat16().to(w.dtype)


def widely_linear(R):
    """Fairy2i (arXiv 2512.02901): a real matrix as two complex ones of half the sides, exactly.
    With x = [Re; Im], R x is U x + V conj(x)."""
    (a, b), (c, d) = (half.chunk(2, 1) for half in R.chunk(2, 0))
    return torch.complex(a + d, c - b) / 2, torch.complex(a - d, b + c) / 2


def unit_codes(C, tau=0.0):
    """The nearest of 1, i, -1, -i by angle, times one scale for real codes and one for imaginary.
    At tau > 0 the mean of the four under a softmax of minus squared angles over tau. 0 has no angle
    and stays 0. Its slope is 1 at tau > 0, or weights that start at 0 would never move."""
    re, im = C.real, C.imag
    real = re.detach().abs() >= im.detach().abs()  # nearer to 1 or -1 than to i or -i
    scale_re = (re.detach().abs() * real).sum() / real.sum().clamp_min(1)
    scale_im = (im.detach().abs() * ~real).sum() / (~real).sum().clamp_min(1)
    if tau == 0:
        return torch.complex(scale_re * re.sign() * real, scale_im * im.sign() * ~real)
    units = torch.tensor([0.0, 0.5, 1.0, -0.5], device=C.device) * math.pi
    # atan2's derivative divides by |C|^2, which must not be 0, also where it is not used
    none = torch.hypot(re.detach(), im.detach()) < 1e-18
    away = torch.atan2(im, torch.where(none, 1.0, re)).unsqueeze(-1) - units  # (..., 4)
    away = torch.remainder(away + math.pi, 2 * math.pi) - math.pi  # the short way round
    one, i, minus_one, minus_i = torch.softmax(-away.square() / max(tau, 1e-20), -1).unbind(-1)
    soft = torch.complex(scale_re * (one - minus_one), scale_im * (i - minus_i))
    return torch.where(none, C, soft)


def fairy(w, tau=0.0):
    """W from two stages of unit codes of its complex form. The second codes what the first left."""
    U, V = widely_linear(w)
    U1, V1 = unit_codes(U, tau), unit_codes(V, tau)
    U, V = U1 + unit_codes(U - U1, tau), V1 + unit_codes(V - V1, tau)
    upper = torch.cat([V.real + U.real, V.imag - U.imag], 1)  # the way back
    return torch.cat([upper, torch.cat([V.imag + U.imag, U.real - V.real], 1)])


def relax_fairy2i(w, s):
    return through(w, fairy(w.detach()))


def relax_fairy2i_hestia(w, s):
    """Section 5.3: Eq. (9) with a softmax over angles."""
    return (1 - s.p) * w + s.p * fairy(w, s.tau)


# -- Methods with something beside W, and what others bring to hestia.train ------------------------


class OwnLevels(hestia.Hestia):
    """A method whose levels are not gamma times a code. What is left of W is the last W_eff."""
    @torch.no_grad()
    def hardened(self, name):
        return self.effective(self.total_steps, name).bfloat16().float()

    def codes(self):
        """{name: the place of each weight}, in halves of its group's largest hard weight."""
        found = {}
        for name, w in self.latents.items():
            z = groups(self.hardened(name), self.step_of(0, name))
            z = z / z.abs().amax(1, keepdim=True).clamp_min(1e-30)
            found[name] = (2 * z).round().bfloat16().view_as(w)
        return found


class Learned(OwnLevels):
    """A method with numbers for each group, own[layer's name][key], (n_groups,): vectors, so that
    adamw gives them no weight decay. start: (W, Step) -> {key: where it starts}."""

    def __init__(self, model, total_steps, *, start, **settings):
        super().__init__(model, total_steps, **settings)
        self.own = {}
        for name, w in self.latents.items():
            first = start(w.detach(), self.step_of(0, name))
            self.own[name] = {key: nn.Parameter(x) for key, x in first.items()}

    def effective(self, t, name):
        return self.method.relax(self.latents[name], self.step_of(t, name), **self.own[name])

    def parameters(self):
        learned = [x for own in self.own.values() for x in own.values()]
        return [*self.latents.values(), *learned, *self.rest]


def relax_lsq(w, s, scale, n=1.0, edge=1.0):
    """LSQ (arXiv 1902.08153): scale * round(clip(w / scale)), with rounding straight through. SEQ
    (ParetoQ, arXiv 2502.02631) is the same with levels 0 and +-2/3 scale."""
    z, scale = groups(w, s), scale[:, None]
    # the gradient of a scale is divided by sqrt(g), and passes the floor, or it would stay there
    scale = through(scale, scale.detach().clamp_min(1e-5), z.shape[1] ** -0.5)
    u = (z / scale).clamp(-edge, edge)
    return (scale * through(u, (n * u.detach()).round() / n)).view_as(w)


def relax_dlt(w, s, scale, shift):
    """DLT (TernaryLLM, arXiv 2406.07177): TWN's codes, levels shift + scale * {-1, 0, 1}."""
    z, scale = groups(w, s), scale[:, None]
    codes, _ = twn_codes(z)
    slope = torch.where(codes == 0, 1.0, scale.detach())
    return through(z, scale * codes + shift[:, None], slope).view_as(w)


def relax_learned(w, s, k):
    """HESTIA with gamma = e^(k/10) mean|w|. k follows the loss, and moves gamma a tenth as fast as
    the rate says. Where a group is zero its gamma is AbsMean's floor."""
    gamma = hestia.absmean_scale(w, s.group_size) * (k[:, None] / 10).exp()  # (n_groups, 1)
    z = groups(w, s) / gamma
    H = hestia.soft_quantize(z, s.tau, z.shape[1], s.codebook, scale=torch.ones_like(gamma))
    return (1 - s.p) * w + s.p * (gamma * H).view_as(w)


def relax_stochastic(w, s, scale):
    return w  # round_stochastically keeps it on the grid


relax_seq = partial(relax_lsq, n=1.5, edge=0.99)
start_lsq = lambda w, s: {"scale": 2 * groups(w, s).abs().mean(1)}
start_seq = lambda w, s: {"scale": groups(w, s).abs().amax(1)}
start_dlt = lambda w, s: {"scale": twn_codes(groups(w, s))[1][:, 0],
                          "shift": 0 * groups(w, s)[:, 0]}


def start_on_grid(w, s):
    """W itself starts on the grid of a scale that then stays, since W_eff does not depend on it."""
    scale = hestia.absmean_scale(w, s.group_size).bfloat16().to(w.dtype)
    w.copy_(hestia.quantize(w, s.group_size, scale=scale))
    return {"scale": scale.squeeze(1)}


class Snapped(Learned):
    """In the end each scale is the one of least squares for the codes that are there."""
    @torch.no_grad()
    def hardened(self, name):
        z = groups(self.latents[name], self.step_of(0, name))
        codes = super().hardened(name).view_as(z).sign()
        scale = (z * codes).sum(1, keepdim=True) / codes.abs().sum(1, keepdim=True).clamp_min(1)
        return (scale.bfloat16() * codes).view_as(self.latents[name])


def relax_pv(w, s, scale):
    """PV-Tuning (arXiv 2405.14852): scale * code. W stays on the grid, so its code is its sign."""
    return through(w, (scale[:, None] * groups(w.detach(), s).sign()).view_as(w))


def chosen_codes(codes, scale, grad, step, count):
    """The V-step: the `count` codes with the largest |gradient|, ties by index, become the nearest
    to the target scale * code - step * gradient. The others stay. codes, grad: (n_groups, g).

    Of these two codes the first changes. The second wastes its place, as in the authors' code: its
    target lies beyond the end of the grid.

    >>> codes, grad = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[-2.0, 3.0, 0.5]])
    >>> chosen_codes(codes, torch.tensor([[0.5833]]), grad, step=0.2, count=2)
    tensor([[ 0., -1.,  0.]])
    """
    order = grad.abs().flatten().argsort(descending=True, stable=True)
    target = codes - step * grad / scale
    chosen = torch.zeros_like(codes, dtype=torch.bool)
    chosen.view(-1)[order[:count]] = True
    return torch.where(chosen, hestia.nearest_code(target) + 0.0, codes)  # + 0.0: no minus zero


@torch.no_grad()
def pv(qat, optimizer, loss, norm, clip, share=0.01, reach=1e-2 / 3e-4):
    """PV-Tuning's two steps, in place of the optimizer's. P: it moves scales and what is not
    quantized. V: 1 % of each matrix's codes are chosen anew.

    The V-step is reach * lr * ||W|| long. share and reach are the authors' recipe, where codes have
    the rate 1e-2, counted in ||W|| as in LAMB, and scales 3e-4. Our choice: the plain gradient is
    the direction, and what was not enough to change a code is not kept for the next step. At 0.1 M
    parameters (rate 3e-3, one seed) the hard validation loss is 1.967, 1.966, 1.971 and 2.300 at
    reach 0, 10, 30 and 250.
    """
    grads = {name: w.grad for name, w in qat.latents.items()}
    for w in qat.latents.values():
        w.grad = None  # the optimizer leaves W to the V-step
    hestia.update(optimizer, loss, norm, clip)
    length = reach * optimizer.param_groups[0]["lr"]
    for name, w in qat.latents.items():
        scale = qat.own[name]["scale"].clamp_(min=1e-5)[:, None]  # (n_groups, 1)
        codes = w.view(len(scale), -1).sign()
        if grads[name] is not None:
            grad = grads[name].view_as(codes)
            step = length * w.norm() / grad.norm().clamp_min(1e-30)
            codes = chosen_codes(codes, scale, grad, step, math.ceil(share * w.numel()))
        w.copy_((scale * codes).view_as(w))


class PerRow(hestia.Hestia):
    """One scale for each row of W: group_size is None, and step_of says the width."""
    def step_of(self, t, name):
        return super().step_of(t, name)._replace(group_size=self.latents[name].shape[-1])


class Fairy2i(OwnLevels):
    def _check_settings(self, tau_init):
        super()._check_settings(tau_init)
        for name, layer in self.layers.items():
            if any(side % 2 for side in layer.weight.shape):
                raise ValueError(f"{name} has an odd side; choose another row than Fairy2i's")

    def hardened(self, name):
        return fairy(self.latents[name].detach())


def rounding_variance(w, s):
    """The variance of unbiased rounding, gamma^2 d (1 - d), where d is the place of w between its
    two levels. W's shape. 0 on the grid and outside of it, largest halfway between levels.

    >>> step = hestia.Step(p=1.0, tau=0.0, group_size=None, codebook=TERNARY)
    >>> rounding_variance(torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]), step)
    tensor([0.0000, 0.0000, 0.0850, 0.0483, 0.0733, 0.0000])
    """
    gamma = hestia.absmean_scale(w, s.group_size)
    z = (groups(w, s) / gamma).clamp(-1, 1)  # (n_groups, g)
    d = z - z.detach().floor()
    return (gamma**2 * d * (1 - d)).view_as(w)


class Lotion(hestia.Hestia):
    """LOTION (arXiv 2510.08757): the model shows W, and W is rounded at the end. The loss gets the
    penalty strength / 2 * sum of G * rounding_variance(W), with the gradient strength / 2 * G gamma
    (1 - 2 d). G is a running mean of (dL/dW)^2 that forgets by 0.95 a step. It is not Adam's v,
    which would hold the penalty's square too and can run away.

    strength is our choice. The paper's G is the Fisher information, which for a batch of N tokens
    is about N times our G. At 0.1 M parameters (N = 1024, rate 1e-3, one seed) the hard validation
    loss is 2.332, 2.306, 2.279, 2.255 at 1, 4e3, 4e4, 4e5, and at rate 9e-3 it is 2.113, 2.123,
    2.135 at 4e4, 4e5, 4e6. Weights outside of the grid have no penalty and are still rounded.
    """

    def __init__(self, model, total_steps, *, strength=4e4, **settings):
        super().__init__(model, total_steps, **settings)
        self.strength = strength
        self.squares = {name: torch.zeros_like(w) for name, w in self.latents.items()}

    def parameters(self):  # a saved state holds these, and the optimizer leaves them: no gradient
        return [*super().parameters(), *self.squares.values()]

    @torch.enable_grad()
    def pull_back(self):
        super().pull_back()
        share = 0.05 / (1 - 0.95**self.begun)  # so that G is a mean from the first step on
        for name, w in self.latents.items():
            if w.grad is not None:
                G = self.squares[name].lerp_(w.grad.square(), share)
                variance = rounding_variance(w, self.step_of(0, name))
                (self.strength / 2 * (G * variance).sum()).backward()


class Tequila(hestia.Hestia):
    """Tequila (arXiv 2509.23809): AbsMean, and a bias for each row, `strength` times the sum of its
    weights of code 0. They feel it wherever they are. The bias stays in the model."""

    def _check_settings(self, tau_init):
        super()._check_settings(tau_init)
        for name, layer in self.layers.items():
            if layer.bias is not None:
                raise ValueError(f"{name} has a bias, where Tequila needs its own; remove it")

    def __init__(self, model, total_steps, **settings):
        super().__init__(model, total_steps, **settings)
        for layer in self.layers.values():
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))  # (n_out,)
        if dataclasses.is_dataclass(getattr(model, "config", None)):  # what save_llama writes
            model.config = dataclasses.replace(model.config, attention_bias=True, mlp_bias=True)
        self.shown = self._look({})  # with the biases

    def biases(self, strength=1e-3):
        """Pairs of a layer and its bias, (n_out,), with its graph to W."""
        for name, layer in self.layers.items():
            w = self.latents[name]
            dead = hestia.quantize(w.detach(), self.group_size) == 0
            yield layer, strength * (w * dead).sum(1)

    @torch.enable_grad()
    def relax(self, t):
        super().relax(t)
        self.bias_graphs = list(self.biases())
        for layer, bias in self.bias_graphs:
            layer.bias.data, layer.bias.grad = bias.detach().to(layer.bias.dtype), None

    def pull_back(self):
        super().pull_back()
        for layer, bias in self.bias_graphs:
            if layer.bias.grad is not None:  # added to what came through the weight
                bias.backward(layer.bias.grad.to(bias.dtype))
                layer.bias.grad = None

    def __getstate__(self):
        return {**super().__getstate__(), "bias_graphs": []}

    @contextmanager
    def hard(self):
        before = [layer.bias.data for layer in self.layers.values()]
        for layer, bias in self.biases():
            layer.bias.data = bias.detach().to(layer.bias.dtype)
        try:
            with super().hard():
                yield self.model
        finally:
            for layer, data in zip(self.layers.values(), before):
                layer.bias.data = data

    def harden(self):
        super().harden()
        for layer, bias in self.biases():
            layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype))


@torch.no_grad()
def cage(qat, lr, t, record, strength=10.0, silence=0.8):
    """CAGE (arXiv 2510.18784): in the last fifth W is pulled to Q(W), more and more strongly. Here
    it is W after the step and not before, a difference of the order of lr squared."""
    ramp = max(0.0, t / qat.total_steps - silence) / (1 - silence)
    share = hestia.learning_rate(t, qat.total_steps, lr) * strength * ramp
    for name, w in qat.latents.items() if ramp else ():
        s = qat.step_of(t, name)
        w -= share * (w - hestia.quantize(w, s.group_size, s.codebook))


@torch.no_grad()
def round_stochastically(qat, lr, t, record):
    """DQT (arXiv 2412.04787): W goes up or down to the grid at random, and its mean is W. The draws
    depend on torch's seed and on t alone, so that a resumed run makes the same."""
    device = next(iter(qat.latents.values())).device
    seed = torch.initial_seed() + 1_000_003 * (t + 1)
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    for name, w in qat.latents.items():
        scale = qat.own[name]["scale"][:, None]
        z = (w.view(len(scale), -1) / scale).clamp(-1, 1)  # (n_groups, g)
        up = torch.rand(z.shape, generator=generator, device=device) < z - z.floor()
        w.copy_((scale * (z.floor() + up)).view_as(w))


def mixed_loss(got, target, y, weight):
    """LLM-QAT (arXiv 2305.17888): weight * KL(teacher || student) + (1 - weight) * cross-entropy.
    got, target: logits of student and teacher, (B, T, V). y: (B, T)."""
    target, got = torch.log_softmax(target.float(), -1), torch.log_softmax(got.float(), -1)
    counted = y != -100  # nll_loss leaves the others out
    kl = ((target.exp() * (target - got)).sum(-1) * counted).sum() / counted.sum()
    return weight * kl + (1 - weight) * nn.functional.nll_loss(got.flatten(0, 1), y.flatten())


def distilled(teacher, mixed, weight, model, x, y, micro_batches=1, backward=hestia.backward):
    """A `backward` with a teacher. Both models give logits: a large vocabulary takes memory."""
    def loss(x, y):
        with torch.no_grad():
            target = teacher(x)
        return mixed(model(x), target, y, weight)

    loss.no_sync = getattr(model, "no_sync", None)  # what parallel.backward needs
    return backward(loss, x, y, micro_batches)


def spectra(qat, optimizer, loss, norm, clip):
    """Spectra (arXiv 2407.12327): 0.69 of the rate from half way on, no decay after two thirds."""
    t = int(next(iter(optimizer.state.values()), {}).get("step", 0))  # also after a resume
    steps = qat.total_steps
    for group in optimizer.param_groups:
        group["lr"] *= 0.69 if 2 * t >= steps else 1.0  # train sets it anew each step
        group["weight_decay"] *= 0.0 if 3 * t >= 2 * steps else 1.0
    hestia.update(optimizer, loss, norm, clip)


# -- The rows --------------------------------------------------------------------------------------

hestia.METHODS.update({
    "twn": Method("TWN", relax_twn, relax_twn),
    "lsq": Method("LSQ", relax_lsq, relax_lsq),
    "seq": Method("SEQ", relax_seq, relax_seq),
    "dlt": Method("DLT", relax_dlt, relax_dlt),
    "tequila": Method("Tequila", hestia.relax_ste, hard_absmean),
    "int2-absmax": Method("INT2, absmax", relax_int2_absmax, relax_int2_absmax),
    "fairy2i": Method("Fairy2i", relax_fairy2i, relax_fairy2i),
    "fairy2i-hestia": Method("Fairy2i-HESTIA", relax_fairy2i_hestia, relax_fairy2i, soft=True),
    "dge": Method("DGE", relax_dge, hard_absmean),
    "dsq": Method("DSQ", relax_dsq, hard_absmean),
    "daq": Method("DAQ", relax_daq, hard_absmean),
    "absmean-wide": Method("AbsMean STE, 1.5 gamma", hestia.relax_ste, hard_wide),
    "hestia-wide": Method("HESTIA, alpha = 0, 1.5 gamma", hestia.relax_hestia, hard_wide, True),
    "leak": Method("HESTIA, alpha = 0, leak", relax_leak, hard_absmean, soft=True),
    "leak-wide": Method("HESTIA, alpha = 0, leak, 1.5 gamma", relax_leak, hard_wide, soft=True),
    "hestia-learned": Method("HESTIA, alpha = 0, learned gamma", relax_learned, relax_learned,
                             soft=True),
    "stochastic": Method("stochastic rounding", relax_stochastic, hard_absmean),
    "lotion": Method("LOTION", hestia.relax_full, hard_absmean),
    "pv": Method("PV-Tuning", relax_pv, hard_absmean),
})

# {row: arguments of cls, which is hestia.Hestia by default}. Four more are for make: hook, an
# on_step(qat, lr, t, record); update(qat, ...); distill, the weight of the KL to the model as it
# was, between 0 and 1; scratch, whether to start from random weights.
ROWS = {
    "hestia-binary": dict(codebook=hestia.BINARY),
    "hestia-2bit": dict(codebook=TWO_BIT),
    "absmean-wide": dict(method="absmean-wide", codebook=WIDE),
    "hestia-wide": dict(method="hestia-wide", codebook=WIDE, alpha=0.0),
    "leak": dict(method="leak", alpha=0.0),
    "leak-wide": dict(method="leak-wide", codebook=WIDE, alpha=0.0),
    "hestia-learned": dict(method="hestia-learned", cls=Snapped, alpha=0.0, codebook=TERNARY,
                           start=lambda w, s: {"k": 0 * groups(w, s)[:, 0]}),
    "twn": dict(method="twn", cls=OwnLevels, codebook=TERNARY),
    "lsq": dict(method="lsq", cls=Learned, start=start_lsq, codebook=TERNARY),
    "seq": dict(method="seq", cls=Learned, start=start_seq, codebook=TERNARY),
    "dlt": dict(method="dlt", cls=Learned, start=start_dlt, codebook=TERNARY),
    "tequila": dict(method="tequila", cls=Tequila, codebook=TERNARY),
    "int2": dict(method="absmean", codebook=TWO_BIT),
    "int2-absmax": dict(method="int2-absmax", cls=OwnLevels, codebook=TERNARY),
    "llm-qat": dict(method="absmean", cls=PerRow, group_size=None, codebook=TWO_BIT, distill=1.0),
    "bitnet": dict(method="absmean", group_size=None, scratch=True),
    "spectra": dict(method="absmean", group_size=None, scratch=True, update=spectra),
    "fairy2i": dict(method="fairy2i", cls=Fairy2i, group_size=None, codebook=TERNARY),
    "fairy2i-hestia": dict(method="fairy2i-hestia", cls=Fairy2i, group_size=None, codebook=TERNARY),
    "dge": dict(method="dge", codebook=TERNARY),
    "dsq": dict(method="dsq", codebook=TERNARY),
    "daq": dict(method="daq", codebook=TERNARY),
    "cage": dict(method="absmean", hook=cage),
    "stochastic": dict(method="stochastic", cls=Learned, start=start_on_grid, codebook=TERNARY,
                       hook=round_stochastically),
    "lotion": dict(method="lotion", cls=Lotion, codebook=TERNARY),
    "pv": dict(method="pv", cls=Learned, start=start_on_grid, codebook=TERNARY, update=pv),
}
LABELS = {"hestia-binary": "HESTIA, binary", "hestia-2bit": "HESTIA, 2 bit", "int2": "INT2",
          "llm-qat": "LLM-QAT", "bitnet": "BitNet, from scratch", "cage": "CAGE",
          "spectra": "Spectra, from scratch"}
LABELS |= {name: hestia.METHODS[name].label for name in ROWS if name in hestia.METHODS}
plots.LABELS.update(LABELS)
EXTRA = {"dlt": "a shift per group", "tequila": "a bias per row",  # at inference, beside the scales
         "fairy2i": "complex, two stages", "fairy2i-hestia": "complex, two stages"}


def make(name, model, steps, lr, row=None, compile=False, **settings):
    """(qat, more): a row around a model, and more arguments for hestia.train: some of on_step (call
    it in your own), backward and update. ValueError says what the row cannot do.

    name: in ROWS or METHODS. row: in place of ROWS[name]. settings: what the row may override.

    >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> qat, more = make("lsq", model, steps=10, lr=1e-2, group_size=2)
    >>> qat.own["0"]["scale"].shape, more
    (torch.Size([4]), {})
    """
    known, more = {name: {"method": name} for name in hestia.METHODS} | ROWS, {}
    if row is None and name not in known:
        names = ", ".join(["hestia-no-hessian", *known])
        raise ValueError(f"unknown method {name!r}; expected one of {names}")
    row = known[name] if row is None else row
    asked = tuple(settings.get("codebook", TERNARY))  # TERNARY: perhaps nobody asked
    if asked not in (TERNARY, row.get("codebook", asked)):
        raise ValueError(f"{name} has the codebook {row['codebook']}, not {asked}; leave it out")
    arguments = {"cls": fast.Hestia if compile else hestia.Hestia, **settings, **row}
    keys = "cls", "hook", "update", "distill", "scratch"
    cls, hook, update, distill, scratch = (arguments.pop(key, None) for key in keys)
    if distill:
        teacher = copy.deepcopy(model).requires_grad_(False).eval()
        mixed = mixed_loss
        if compile:
            teacher, mixed = torch.compile(fast.llama(teacher)), fast.compiled(mixed_loss)
        more["backward"] = partial(distilled, teacher, mixed, float(distill))
    if scratch:
        model.load_state_dict(hestia.Llama(model.config).state_dict())
    qat = cls(model, steps, **arguments)
    if hook:
        more["on_step"] = partial(hook, qat, lr)
    if update:
        more["update"] = partial(update, qat)
    return qat, more


def bits_per_weight(qat):
    """What a weight takes: its code, and its share of 16-bit scales, shifts and biases."""
    total = 0.0
    for name, w in qat.latents.items():
        code, beside = math.log2(len(qat.codebook)), len(groups(w, qat.step_of(0, name)))
        if isinstance(qat, Fairy2i):  # a unit of two bits for two reals, twice; 8 scales
            code, beside = 2, 8
        elif isinstance(qat, Learned):
            beside = sum(len(x) for x in qat.own[name].values())
        elif isinstance(qat, Tequila):
            beside += len(w)
        total += code * w.numel() + 16 * beside
    return total / sum(w.numel() for w in qat.latents.values())


def on_grid(qat):
    """Share of the model's quantized weights that are gamma times a code: 1 after harden(). For own
    levels, of those in groups of no more values than codes. None for Fairy2i's sums of codes."""
    if isinstance(qat, Fairy2i):
        return None
    good = 0
    for name, layer in qat.layers.items():
        w = groups(layer.weight.detach().float(), qat.step_of(0, name))  # (n_groups, g)
        if isinstance(qat, OwnLevels):
            values = 1 + (w.sort(1).values.diff(dim=1) != 0).sum(1)  # (n_groups,)
            good += int((values <= len(qat.codebook)).sum()) * w.shape[1]
        else:
            gamma = w.abs().amax(1, keepdim=True).clamp_min(1e-30) / max(qat.codebook)
            good += int((hestia.quantize(w, w.shape[1], qat.codebook, gamma) == w).sum())
    return good / sum(w.numel() for w in qat.latents.values())
