r"""HESTIA in one file: ternary weights by a softmax that cools down, guided by the Hessian.

The paper is "HESTIA: A Hessian-Guided Differentiable Quantization-Aware Training Framework for Extremely
Low-Bit LLMs", arXiv 2601.20745. Read it on the left and this file on the right, top to bottom: sections
stand in the paper's order, each function names its equation, and the table below names the function of each equation.

The method in five lines. Ternary weights are gamma * {-1, 0, +1}. Rounding to them has zero derivative almost
everywhere, and the usual remedy, the straight-through estimator (STE), pretends that it is one. HESTIA instead
replaces each weight by the mean of the three codes under a softmax over their distances, at a temperature tau:
a smooth function with a true derivative. Over training tau falls to zero and the function hardens into rounding;
tensors with a large Hessian trace stay warm for longer.

    paper        here                 shape, unit
    W, w         w                    any shape; latent weights, float32 in training
    gamma        gamma, scale         (n_groups, 1); one scale per group of weights, or one per tensor
    Q = {-1,0,1} codebook             K codes, in units of gamma
    Q(w)         quantize(w)          w's shape; gamma times the nearest code
    z = w/gamma  z                    (n_groups, g); dimensionless
    tau          tau                  float; dimensionless, because it divides a squared distance in units of gamma
    pi_tau(q|w)  assignment_probs     (*w.shape, K)
    H(w; tau)    soft_quantize        w's shape
    p_t, rho     pressure, rho        the share of H in the effective weight; the share of training in which it grows
    h_i, s_i     traces, scores       {tensor's name: float}; trace of the Hessian's block; its place in (0, 1)

    Eq. 1  absmean_scale      Eq. 7  assignment_probs        Eq. 12     hutchpp, hessian_traces
    Eq. 2  quantize           Eq. 8  soft_quantize           Eq. 13     sensitivity_scores
    Eq. 3  evaluate (hard)    Eq. 9  effective_weight        Eq. 14     base_temperature
    Eq. 4  quantize_ste       Eq. 10 pressure                Eq. 15     temperature
    Eq. 5  _nearest           Eq. 11 train (its loss)        Eq. 16-17  _softmax_moments
    Eq. 6  dead_zone          Alg. 1 Hestia, train           Eq. 18-19  soft_quantize_jacobian, _SoftQuantize
    Lemma 4.2 (Eq. 20) and the steps of Appendix A (Eqs. 21-36) are about limits: assertions in test_hestia.py.
    Tables 1-3, a row each: QUANTIZERS. Section 5.1's checkpoints: load_llama, save_llama.

Where the paper leaves something open, this file decides as follows (README has the list with reasons): gamma is
detached and epsilon is added; a tie |z| = 1/2 goes to code 0; Eq. 12 gets the 1/m that it lacks; the Hessian is that
of the ordinary loss at the full-precision weights; traces that are not positive are floored, never made absolute.

Contents: 3.1 quantization | 3.2 softmax kernel | 3.3 sensitivity and schedules | Algorithm 1 | the other rows of the
tables | Llama | checkpoints | the loop
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

TERNARY = (-1.0, 0.0, 1.0)  # codes in units of gamma: the paper's set Q
BINARY = (-1.0, 1.0)
TWO_BIT = (-1.5, -0.5, 0.5, 1.5)

# ----------------------------------------------------------------------------------------------------------------------
# 3.1 Problem definition: scale, hard quantizer, straight-through estimator, dead zone


def _groups(w, group_size):
    """View w as rows that share one scale: (n_groups, g), or (1, w.numel()) for one scale per tensor."""
    if group_size is None:
        return w.reshape(1, w.numel())
    width = w.shape[-1] if w.dim() else 1
    if group_size < 1 or width % group_size:
        fits = next((g for g in range(min(group_size, width), 0, -1) if width % g == 0), 1)
        raise ValueError(f"group size {group_size} does not divide the input dimension {width}; {fits} would")
    return w.reshape(w.numel() // group_size, group_size)


def _at_least_float32(w):
    if not w.is_floating_point():
        raise TypeError(f"weights are {w.dtype}; expected floating-point numbers, such as w.float()")
    return w.to(torch.promote_types(w.dtype, torch.float32))  # float16 would lose epsilon, bf16 would lose codes


def _narrow(x, dtype):
    """Back to w's dtype. float16 ends at 65504, below what a Jacobian at small tau needs: saturate, not overflow."""
    if dtype == torch.float16:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def absmean_scale(w, group_size=None, eps=1e-8):
    """Eq. (1): gamma = mean|w| + epsilon, the unit in which codes and temperatures are measured.

    w: any shape. Returns gamma of shape (n_groups, 1), detached (the paper holds it constant in the backward
    pass), at least float32. group_size=None: one scale for the tensor; g: one for each g consecutive weights of
    the last dimension. A g that does not divide that dimension is a ValueError.

    >>> w = torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9])
    >>> absmean_scale(w)
    tensor([[0.5833]])
    >>> absmean_scale(w, group_size=3)
    tensor([[0.7000],
            [0.4667]])
    """
    z = _groups(_at_least_float32(w.detach()), group_size)  # (n_groups, g)
    return z.abs().sum(1, keepdim=True) / max(1, z.shape[1]) + eps  # (n_groups, 1)


def _normalize(w, group_size, scale):
    """z = w / gamma, shape (n_groups, g), and gamma, shape (n_groups, 1)."""
    gamma = absmean_scale(w, group_size) if scale is None else _at_least_float32(scale.detach())
    z = _groups(_at_least_float32(w), group_size)
    if gamma.shape != (z.shape[0], 1):
        raise ValueError(f"scale has shape {tuple(gamma.shape)}; expected one row per group, {(z.shape[0], 1)}")
    return z / gamma, gamma


def _check_codebook(codebook):
    if list(codebook) != sorted(set(codebook)) or len(codebook) < 2:
        raise ValueError(f"codebook is {codebook}; expected at least two codes, in ascending order")


def _nearest(z, codebook):
    """The code nearest to z. Its jumps are the boundaries of Eq. (5), halfway between codes: +-1/2 for TERNARY."""
    _check_codebook(codebook)
    if tuple(codebook) == TERNARY:
        return z.round().clamp(-1, 1)  # Clip(Round(z), -1, 1); round is half-to-even, so the tie |z| = 1/2 gives 0
    code = torch.full_like(z, codebook[0])
    for low, high in zip(codebook, codebook[1:]):
        code = torch.where(z >= (low + high) / 2, high, code)  # ties go up
    return code


def quantize(w, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (2): Q(w) = gamma * Clip(Round(w / gamma), -1, +1), or gamma times the nearest code of another codebook.

    Returns dequantized weights, w's shape and dtype. scale: gamma (n_groups, 1), held instead of computed.

    >>> quantize(torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]))
    tensor([-0.5833, -0.5833, -0.5833,  0.0000,  0.5833,  0.5833])
    """
    z, gamma = _normalize(w, group_size, scale)
    return _narrow(gamma * _nearest(z, codebook), w.dtype).view_as(w)


def quantize_ste(w, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (4): the value of Q(w) with the gradient of w, the straight-through estimator.

    >>> w = torch.tensor([-1.2, 0.1, 0.4], requires_grad=True)
    >>> quantize_ste(w).sum().backward()
    >>> w.grad
    tensor([1., 1., 1.])
    """
    return quantize(w.detach(), group_size, codebook, scale) + (w - w.detach())  # w - w.detach() is exactly 0


def dead_zone(w, dw, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (6): True where the update dw changes no code, Q(w + dw) = Q(w), with gamma that of w. Bool, w's shape.

    >>> dead_zone(torch.tensor([-1.0, 0.25, 0.25]), torch.tensor([0.1, 0.1, -0.1]))
    tensor([ True, False,  True])
    """
    z, gamma = _normalize(w, group_size, scale)
    moved, _ = _normalize(_at_least_float32(w) + dw, group_size, gamma)
    return (_nearest(z, codebook) == _nearest(moved, codebook)).view(w.shape)


# ----------------------------------------------------------------------------------------------------------------------
# 3.2 Differentiable quantization: the softmax kernel and Lemma 4.1

_TAU_MIN = 1e-20  # the kernel has long been a step function; much smaller and 2/tau would overflow float32


def _safe_tau(tau):
    """(tau kept away from zero, whether it is above zero at all). A tensor's sign is not checked: no wait for a GPU."""
    if isinstance(tau, torch.Tensor):
        return _at_least_float32(tau).clamp_min(_TAU_MIN), tau > 0
    if not tau >= 0:
        raise ValueError(f"tau is {tau}; expected a temperature >= 0, in units of gamma")
    return max(float(tau), _TAU_MIN), tau > 0


def _gap(z, near, q):
    """(z - q)^2 - (z - near)^2 >= 0, multiplied out so that nothing cancels, however small the tau it is divided by."""
    return (near - q) * (2 * z.clamp(-1e18, 1e18) - (near + q))


def assignment_probs(w, tau, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (7): pi_tau(q | w) = softmax over q of -(w/gamma - q)^2 / tau. Shape (*w.shape, K).

    tau >= 0 in units of gamma, float or 0-dim tensor. tau = 0 gives 1 to the nearest code.

    >>> assignment_probs(torch.tensor([-0.6, 0.3]), 0.5, scale=torch.ones(1, 1))
    tensor([[0.5958, 0.3993, 0.0049],
            [0.0274, 0.6711, 0.3015]])
    """
    z, _ = _normalize(w, group_size, scale)
    tau, soft = _safe_tau(tau)
    near = _nearest(z, codebook).unsqueeze(-1)  # (n_groups, g, 1)
    q = torch.tensor(codebook, dtype=z.dtype, device=z.device)  # (K,)
    logits = -_gap(z.unsqueeze(-1), near, q) / tau  # (n_groups, g, K); 0 at the nearest code
    pi = torch.where(torch.as_tensor(soft, device=z.device), torch.softmax(logits, -1), (q == near).to(z.dtype))
    return _narrow(pi, w.dtype).view(*w.shape, len(codebook))


def _softmax_moments(z, tau, codebook):
    """The nearest code q*, and E[q - q*] and E[(q - q*)^2] under pi_tau(q | z) of Eq. (7), for any codebook.

    Around q* rather than 0, so that mu = q* + m1 (Eq. 16) and Var = m2 - m1^2 (Eq. 17) lose no digits when the
    assignment is nearly certain. Streams over the codes: no (..., K) tensor exists.
    """
    near, total, m1, m2 = _nearest(z, codebook), 0.0, 0.0, 0.0
    for q in codebook:
        weight, step = torch.exp(_gap(z, near, q) / -tau), q - near  # (n_groups, g); weight in [0, 1]
        total, m1, m2 = total + weight, m1 + weight * step, m2 + weight * step * step
    return near, m1 / total, m2 / total


def _ternary_odds(z, tau):
    """A = pi(-s) / pi(s) and B = pi(0) / pi(s) under Eq. (7) for TERNARY, with s the sign of z.

    With a = |z|: (a - 1)^2 - a^2 = 1 - 2a gives B, and (a - 1)^2 - (a + 1)^2 = -4a gives A = (B e^(-1/tau))^2, so that
    one exponential per weight is enough. It is a power of 2, e^(1/tau) = 2^k, as processors have that and no other. Its
    exponent is cut at 100: that is certainty, yet far from overflow. 1e-18 keeps A from denormal numbers, on which a
    CPU computes a hundred times slower.
    """
    k = 1 / (tau * math.log(2))
    B = torch.exp2(((1 - 2 * z.abs()) * k).clamp(max=100.0))
    A = (B * 2.0**-k + 1e-18).square()
    return A, B


def _code_mean(z, tau, codebook):
    """Eq. (16): mu_tau, so that H = gamma * mu. For TERNARY sinh(2z/tau) / (cosh(2z/tau) + e^(1/tau)/2)."""
    tau, soft = _safe_tau(tau)
    if tuple(codebook) == TERNARY:
        A, B = _ternary_odds(z, tau)
        mu = torch.copysign((1 - A) / (1 + A + B), z)
    else:
        near, m1, _ = _softmax_moments(z, tau, codebook)
        mu = near + m1
    if soft is True:  # a float above 0
        return mu
    hard = mu.round() if tuple(codebook) == TERNARY else near  # tau = 0: Q exactly; mu is a code, or 1/2 at a tie
    return torch.where(torch.as_tensor(soft, device=z.device), mu, hard)


def _jacobian(z, tau, codebook):
    """Lemma 4.1, Eq. (18): dH/dw = (2 / tau) Var_tau(w), for z = w / gamma; 0 at tau = 0."""
    tau, soft = _safe_tau(tau)
    if tuple(codebook) == TERNARY:
        A, B = _ternary_odds(z, tau)
        P = 1 / (1 + A + B)  # pi of the outer code on w's side
        var = (4 * A + B + A * B) * P * P  # Eq. (17) with mu = (1 - A) P put in: no difference is left to cancel
    else:
        _, m1, m2 = _softmax_moments(z, tau, codebook)
        var = m2 - m1 * m1
    return var * (soft * 2 / tau)


class _SoftQuantize(torch.autograd.Function):
    """H(w; tau) with Lemma 4.1 for its backward. Saves w and its few scales, nothing else of w's size."""

    @staticmethod
    def forward(ctx, w, gamma, tau, group_size, codebook):
        ctx.save_for_backward(w, gamma)
        ctx.static = tau, group_size, codebook
        z, gamma = _normalize(w, group_size, gamma)
        return _narrow(gamma * _code_mean(z, tau, codebook), w.dtype).view_as(w)

    @staticmethod
    def backward(ctx, grad):
        (w, gamma), (tau, group_size, codebook) = ctx.saved_tensors, ctx.static
        z, _ = _normalize(w, group_size, gamma)
        J = _jacobian(z, tau, codebook).view_as(w)
        return _narrow(grad * J, w.dtype), None, None, None, None  # Eq. (19); plain torch, so it differentiates again


def soft_quantize(w, tau, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (8): H(w; tau) = gamma * sum over q of q * pi_tau(q | w). w's shape and dtype.

    Differentiable in w once (Lemma 4.1) and twice, with gamma held constant; to compare with finite differences
    (gradcheck), hold it there too: scale=absmean_scale(w). tau = 0 gives Q(w) exactly, with derivative 0.

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
    """Lemma 4.1, Eq. (18): the diagonal of dH/dw, (2 / tau) Var_tau(w). w's shape, >= 0.

    Largest near the boundaries of Eq. (5), where it is 1 / (2 tau) once tau is small. As tau -> 0 it becomes a spike of
    mass gamma at each boundary and zero elsewhere: Lemma 4.2, Eq. (20).

    >>> soft_quantize_jacobian(torch.tensor([0.0, 0.3, 0.5]), 0.5, scale=torch.ones(1, 1))
    tensor([0.8521, 1.0149, 1.0719])
    """
    z, _ = _normalize(w, group_size, scale)
    return _narrow(_jacobian(z, tau, codebook), w.dtype).view_as(w)


def effective_weight(w, tau, p, group_size=None, codebook=TERNARY, scale=None):
    """Eq. (9): W_eff = (1 - p) W + p H(W; tau), what the model computes with at one step. p in [0, 1].

    >>> effective_weight(torch.tensor([-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]), tau=0.3, p=0.5)
    tensor([-0.8917, -0.5833, -0.3025,  0.0761,  0.4261,  0.7414])
    """
    w32 = _at_least_float32(w)
    H = soft_quantize(w32, tau, group_size, codebook, scale)
    W_eff = H if isinstance(p, float) and p == 1 else (1 - p) * w32 + p * H
    return _narrow(W_eff, w.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# 3.3.1 Sensitivity: Hessian traces by Hutch++, and the scores they become


class TraceEstimate(NamedTuple):
    """A trace, its standard error, whether it lies within two of them of zero, and the products per batch it took."""

    value: float
    stderr: float
    flagged: bool
    products: int


def _signs(shape, like, generator):
    """Rademacher's: +1 or -1 with equal chance, drawn where the generator lives, in like's dtype and on its device."""
    device = generator.device if generator else like.device
    return (2 * torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8) - 1).to(like)


def _hutchpp(matvec, dim, rank, samples, generator, dtype, device):
    if rank < 0 or samples < 1:
        raise ValueError(f"rank = {rank} and samples = {samples}; expected rank >= 0 and samples >= 1")
    rank = min(rank, dim)
    like = torch.empty(0, dtype=dtype, device=device)
    S, G = (_signs((dim, k), like, generator) for k in (rank, samples))  # independent: S reused as G biases the trace
    Q = torch.linalg.qr(matvec(S)).Q if rank else S  # (dim, rank), orthonormal basis of the range of H S
    G = G - Q @ (Q.T @ G)  # (I - Q Q^T) G, projected before the product
    HQ, HG = matvec(torch.cat([Q, G], 1)).split([rank, samples], 1)
    sketched = (Q.double() * HQ.double()).sum()  # Tr(Q^T H Q): exact on what the sketch caught
    rest = (G.double() * HG.double()).sum(0)  # (samples,): estimates of what it missed
    value = sketched + rest.mean()  # Eq. (12) prints no 1/m: without it the rest counts m times
    return _estimate(value, rest, 2 * rank + samples)


def hutchpp(matvec, dim, rank=10, samples=20, generator=None, dtype=None, device=None):
    """Eq. (12): the trace of a symmetric linear operator from rank + rank + samples products with it (Hutch++).

    matvec: maps (dim, k) to (dim, k), k columns at once. The range of H times a random sketch is traced exactly,
    what is left outside it by the mean over `samples` Rademacher vectors (Hutchinson). dtype, device: of the
    vectors that matvec is given (torch's defaults). Returns a float, summed in float64.

    >>> H = torch.diag(torch.tensor([42.0, 0.5, 0.1, 0.0]))  # rank 3: a sketch of 3 catches all of it
    >>> round(hutchpp(lambda V: H @ V, dim=4, rank=3), 4)
    42.6
    """
    return _hutchpp(matvec, dim, rank, samples, generator, dtype or torch.get_default_dtype(), device).value


def _gradients(loss_fn, batch, weights):
    """The gradients of one batch's mean loss with the graph behind them, so that they can be differentiated again."""
    loss = loss_fn(batch)
    if not loss.requires_grad:
        raise ValueError("loss_fn returned a number without a graph; expected a loss computed from the tensors")
    return torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)


def _hessian_product(grads, weights, vectors):
    """H v: the gradients of g . v, one backward pass through the backward pass. Vectors have the weights' shapes."""
    live = [(g, v) for g, v in zip(grads, vectors) if g.requires_grad]  # of others the loss is at most linear
    if not live:
        return [torch.zeros_like(w) for w in weights]
    g, v = zip(*live)
    return torch.autograd.grad(g, weights, v, retain_graph=True, materialize_grads=True)


def _estimate(value, readings, products):
    """value: the mean of independent readings, plus what is known without error. Their spread gives the error."""
    stderr = float(readings.std() / len(readings) ** 0.5) if len(readings) > 1 else math.inf
    return TraceEstimate(float(value), stderr, not abs(float(value)) > 2 * stderr, products)


def _joint_traces(loss_fn, params, batches, probes, generator, step):
    """One product for all tensors. Tensor j gets the probe v_j = alpha_j z_j, random signs of its own times a number.
    Tensor i reads t_i = z_i . (H v)_i / alpha_i = sum over j of (alpha_j / alpha_i) z_i . H_ij z_j.

    Signs of different tensors are independent, so terms j != i average to zero: E t_i = Tr H_ii for any fixed alpha.
    What they add is noise, (alpha_j / alpha_i)^2 ||H_ij||^2 each: with all alpha equal, the tensors of large curvature
    drown the others. Relative to the squared traces, the terms (i, j) and (j, i) together are least when alpha_j^2 is
    proportional to 1 / Tr H_jj, whatever H_ij is. Those traces are what we are after; but near them lie Fisher's, which
    are mean squared gradient norms, and the gradient is at hand. So alpha_j = 1 / ||g_j||, fixed before the signs are
    drawn: it costs nothing and makes the error several times smaller (notebooks/curvature.py).
    """
    weights = list(params.values())
    readings = torch.zeros(len(weights), probes, dtype=torch.float64)
    for batch in batches:  # each with signs of its own: the mean over batches then averages their noise as well
        grads = _gradients(loss_fn, batch, weights)
        norms = torch.stack([g.detach().norm() for g in grads])
        share = norms / norms.max() if norms.any() else torch.ones_like(norms)  # only the ratios of the alphas matter
        alpha = 1 / share.clamp_min(1e-3)  # (tensors,); finite where g_j is zero
        for k in range(probes):
            v = [_signs(w.shape, w, generator).mul_(a) for w, a in zip(weights, alpha)]
            Hv = _hessian_product(grads, weights, v)
            t = [(v_i * Hv_i).sum(dtype=torch.float64) / a**2 for v_i, Hv_i, a in zip(v, Hv, alpha)]
            readings[:, k] += torch.stack(t).cpu() / len(batches)
            step()
        del grads, Hv  # and with them this batch's graph, before the next one is built
    return {name: _estimate(t.mean(), t, probes) for name, t in zip(params, readings)}


def hessian_traces(
    loss_fn, params, batches, estimator="hutchpp", rank=10, samples=20, *, generator=None, progress=None
):
    """Section 3.3.1: h_i = Tr(H_i), with H_i the block of the Hessian that belongs to the tensor i alone.

    loss_fn(batch) -> scalar, the mean loss in nats; params: {name: tensor that requires grad}; batches: what loss_fn
    takes, the mean over them is differentiated, one graph at a time. estimator: "hutchpp", the paper's, tensor by
    tensor with 2 rank + samples products each; or "joint", which reads every tensor from each product, 2 rank + samples
    in all (of each batch, with signs of its own). progress(done, total): called after each product of each batch.
    Returns {name: TraceEstimate}, in nats per squared weight. The same generator seed gives the same estimates;
    gradients stay as they were.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = lambda batch: w[0] ** 3 + w[1] ** 2                            # its Hessian is diag(6, 2)
    >>> round(hessian_traces(loss, {"w": w}, [None], rank=2)["w"].value, 4)
    8.0
    >>> round(hessian_traces(loss, {"w": w}, [None], "joint")["w"].value, 4)  # signs are exact where H is diagonal
    8.0
    """
    if estimator not in ("hutchpp", "joint"):
        raise ValueError(f"unknown trace estimator {estimator!r}; expected 'hutchpp' or 'joint'")
    batches, probes = list(batches), 2 * rank + samples
    passes = sum(2 * min(rank, w.numel()) + samples for w in params.values()) if estimator == "hutchpp" else probes
    generator, step = _calibration(params, batches, rank, samples, generator, progress, passes)

    def products(w, V):  # (d, k) -> (d, k): the mean over the batches of H_i V
        HV = torch.zeros(V.shape, dtype=torch.float64, device=V.device)
        for batch in batches:
            grads = _gradients(loss_fn, batch, [w])  # once for all columns of V
            for k in range(V.shape[1]):
                (Hv,) = _hessian_product(grads, [w], [V[:, k].view_as(w)])
                HV[:, k] += Hv.flatten().double() / len(batches)
                step()
            del grads, Hv  # and with them this batch's graph, before the next one is built
        return HV.to(V.dtype)

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only attention that PyTorch can differentiate twice
        if estimator == "joint":
            return _joint_traces(loss_fn, params, batches, probes, generator, step)
        return {name: _hutchpp(lambda V, w=w: products(w, V), w.numel(), rank, samples, generator, w.dtype, w.device)
                for name, w in params.items()}  # fmt: skip


def fisher_traces(logits_fn, params, batches, samples=20, *, generator=None, progress=None):
    """A stand-in for the Hessian's traces that is never negative: those of the Gauss-Newton matrix (Fisher's).

    With labels drawn from the model's own distribution, T ||dL/dW_i||^2 has that trace for its mean, L being the mean
    loss over the batch's T tokens: one backward pass per sample serves all tensors, with any attention.
    logits_fn(batch) -> (..., V). The rest, and what is returned, as in `hessian_traces`; products = samples.

    >>> b = torch.zeros(3, requires_grad=True)            # logits of one token: H = diag(pi) - pi pi^T with pi = 1/3
    >>> round(fisher_traces(lambda batch: b.view(1, 3), {"b": b}, [None], samples=4)["b"].value, 4)
    0.6667
    """
    batches, weights = list(batches), list(params.values())
    generator, step = _calibration(params, batches, 0, samples, generator, progress, samples)
    readings = torch.zeros(len(weights), samples, dtype=torch.float64)
    for batch in batches:
        logits = _at_least_float32(logits_fn(batch)).flatten(0, -2)  # (T, V)
        probs = torch.softmax(logits.detach(), -1)
        for k in range(samples):
            labels = torch.multinomial(probs, 1, generator=generator).squeeze(1)  # (T,)
            loss = F.cross_entropy(logits, labels)
            grads = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            t = [len(labels) * g.square().sum(dtype=torch.float64) for g in grads]
            readings[:, k] += torch.stack(t).cpu() / len(batches)
            step()
        del logits, loss
    return {name: _estimate(t.mean(), t, samples) for name, t in zip(params, readings)}


def _calibration(params, batches, rank, samples, generator, progress, passes):
    """Refuse what cannot work; return a generator where the tensors live, and what to call after each product."""
    if rank < 0 or samples < 1:
        raise ValueError(f"rank = {rank} and samples = {samples}; expected rank >= 0 and samples >= 1")
    if not batches or not params:
        raise ValueError(f"{len(batches)} calibration batches and {len(params)} tensors; a trace needs one of each")
    for name, w in params.items():
        if not w.requires_grad or w.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {w.dtype} with requires_grad = {w.requires_grad}; a trace needs a tensor in "
                             "float32 or float64 that requires grad")  # fmt: skip
    device = next(iter(params.values())).device
    if generator is not None and generator.device != device:  # draw billions of signs where they are needed
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        generator = torch.Generator(device).manual_seed(int(seed))
    done = itertools.count(1)
    return generator, lambda: progress and progress(next(done), passes * len(batches))


def sensitivity_scores(traces, kappa=1.0, eps=1e-8):
    """Eq. (13): s_i = Sigmoid(kappa * (log h_i - mu_h) / (sigma_h + eps)), in (0, 1); 1/2 for an average tensor.

    traces: {name: float or TraceEstimate}. mu_h and sigma_h (population) run over these tensors. A logarithm needs a
    positive trace, and a Hessian may have others: all below half the smallest trustworthy one (positive and not
    flagged) are raised to that half, with a warning that names them; a flagged one above it stays as it is. None
    positive is a ValueError.

    >>> {k: round(s, 4) for k, s in sensitivity_scores({"q": 10.0, "v": 1000.0, "down": 100000.0}).items()}
    {'q': 0.2271, 'v': 0.5, 'down': 0.7729}
    """
    value = {name: float(getattr(h, "value", h)) for name, h in traces.items()}
    broken = [name for name, h in value.items() if not math.isfinite(h)]
    if broken:
        raise ValueError(f"the Hessian trace is not finite for {', '.join(broken)}; check the model's loss")
    positive = {name: h for name, h in value.items() if h > 0}
    if not positive:
        raise ValueError("no Hessian trace is positive, so no score exists; calibrate a trained model on more tokens, "
                         "or use fisher, whose traces are never negative")  # fmt: skip
    trusted = [h for name, h in positive.items() if not getattr(traces[name], "flagged", False)]
    if not trusted:
        warnings.warn("no Hessian trace is two standard errors above zero: the scores mean little; take more samples "
                      "or calibration tokens", stacklevel=2)  # fmt: skip
    floor = 0.5 * min(trusted or positive.values())
    low = [name for name, h in value.items() if h < floor]
    if low:
        warnings.warn(f"Hessian trace not positive, or lost in its error, for {', '.join(low)}: floored at {floor:.3g} "
                      "for the score", stacklevel=2)  # fmt: skip
    logs = {name: math.log(max(h, floor)) for name, h in value.items()}
    mu = sum(logs.values()) / len(logs)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in logs.values()) / len(logs))
    sigmoid = lambda x: 0.5 * (1 + math.tanh(x / 2))  # in this form it cannot overflow
    return {name: sigmoid(kappa * (x - mu) / (sigma + eps)) for name, x in logs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# 3.2 and 3.3.2 Schedules: pressure and temperature


def _check_schedule(T, rho):
    if not (T > 0 and 0 <= rho <= 1):
        raise ValueError(f"T = {T} steps and rho = {rho}; expected T > 0 and rho between 0 and 1")


def pressure(t, T, rho):
    """Eq. (10): p_t, the share of H in the effective weight: grows linearly to 1 over the first rho T steps.

    >>> [pressure(t, T=10, rho=0.4) for t in (0, 1, 4, 10)]
    [0.0, 0.25, 1.0, 1.0]
    """
    _check_schedule(T, rho)
    return 1.0 if rho == 0 else min(1.0, t / (rho * T))


def base_temperature(t, T, rho, tau_init):
    """Eq. (14): tau_init while compressing (t < T_comp = rho T), then half a cosine down to 0 at t = T.

    >>> [round(base_temperature(t, T=10, rho=0.2, tau_init=0.3), 4) for t in (0, 2, 6, 10)]
    [0.3, 0.3, 0.15, 0.0]
    """
    _check_schedule(T, rho)
    if t >= T:
        return 0.0
    T_comp = rho * T
    if t <= T_comp:
        return tau_init
    return tau_init / 2 * (1 + math.cos(math.pi * (t - T_comp) / (T - T_comp)))


def temperature(t, T, rho, tau_init, score, alpha):
    """Eq. (15): tau_i(t) = base_temperature(t) * exp(alpha * s_i). Sensitive tensors stay warmer.

    >>> round(temperature(0, T=10, rho=0.2, tau_init=0.3, score=1.0, alpha=0.4), 4)
    0.4475
    """
    return base_temperature(t, T, rho, tau_init) * math.exp(alpha * score)


@torch.no_grad()
def optimal_tau_init(weights, group_size=None, codebook=TERNARY):
    """Section 5.1: the tau that minimises the mean squared error between all W and H(W; tau).

    The error is in W's own units, so that tensors with larger weights count for more; tau is in units of gamma.
    weights: tensors (a list, a dict, or one tensor). For Gaussian weights 0.3509; Table 5 says 0.3. The minimum is
    flat: the search, between 0.01 and 10, stops at 0.1 %. Beyond 16 million weights it reads every k-th group.

    >>> w = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    >>> round(optimal_tau_init([w]), 2)
    0.35
    """
    weights = list(weights.values()) if isinstance(weights, dict) else weights
    weights = [weights] if isinstance(weights, torch.Tensor) else list(weights)
    if not any(w.any() for w in weights) or not all(torch.isfinite(w).all() for w in weights):
        raise ValueError("tau_init needs finite weights that are not all zero")
    thin = max(1, sum(w.numel() for w in weights) >> 24)  # keep every thin-th row: whole groups, so gamma stays right
    parts = []
    for w in weights:
        z, gamma = _normalize(w.detach(), group_size, None)
        rows = z.view(-1, w.shape[-1]) if group_size is None and w.dim() > 1 else z
        parts.append((rows[::thin], gamma if group_size is None else gamma[::thin]))

    def error(log_tau):
        H_minus_w = (gamma * (_code_mean(z, math.exp(log_tau), codebook) - z) for z, gamma in parts)
        return float(sum(e.double().square().sum() for e in H_minus_w))  # squares beyond 1e19 leave float32

    grid = [math.log(0.01) + k * math.log(1000) / 24 for k in range(25)]
    best = min(range(25), key=lambda k: error(grid[k]))
    low, high = grid[max(0, best - 1)], grid[min(24, best + 1)]
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-3:  # golden-section search
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return math.exp((low + high) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1. Within one optimizer step the latent weights W do not move, so W_eff is computed once per step, written
# into an ordinary model, and dL/dW_eff is pulled back through one vector-Jacobian product.


class Step(NamedTuple):
    """What a quantizer may know when it maps W to W_eff. p and tau are floats, or when compiled float32 tensors: 0-dim,
    or (n_groups, 1), one number per group."""

    p: float
    tau: float
    group_size: int | None
    codebook: tuple


def _hard_absmean(w, s):
    """Q(W) with each gamma rounded to bfloat16, so that a checkpoint holds exactly what was evaluated."""
    z, gamma = _normalize(w, s.group_size, None)
    return (gamma.bfloat16().to(z.dtype) * _nearest(z, s.codebook)).view_as(w)


class Quantizer(NamedTuple):
    """One row of the paper's tables: how training sees W, what is left after it, and which settings the name fixes."""

    label: str
    relax: Callable  # (W, Step, **own) -> W_eff or (W_eff, bias), differentiable in W and own
    harden: Callable | None = None  # likewise, what is kept; None: the last W_eff, rounded to bfloat16
    settings: dict = {}
    soft: bool = False  # whether p and tau act on it
    init: Callable | None = None  # (W, Step) -> own, {name: tensor}: what is learned beside W, such as scales
    extra: str = ""  # what inference needs beside codes and their scales
    after_step: Callable | None = None  # (W, Step, lr, t / T, **own): changes W in place after the optimizer's step


def _relax_ste(w, s):
    return quantize_ste(w, s.group_size, s.codebook)


def _relax_hestia(w, s):
    return effective_weight(w, s.tau, s.p, s.group_size, s.codebook)


_relax_full = lambda w, s: w
SLOPES = {  # dW_eff/dW, where it is a number per weight: pull_back then needs no graph, and nothing of W's size is kept
    _relax_full: lambda w, s: 1.0,
    _relax_ste: lambda w, s: 1.0,  # Eq. (4)
    _relax_hestia: lambda w, s: (1 - s.p) + s.p * soft_quantize_jacobian(w, s.tau, s.group_size, s.codebook),
}

QUANTIZERS = {
    "full": Quantizer("full precision", _relax_full, _relax_full),
    "absmean": Quantizer("AbsMean STE", _relax_ste, _hard_absmean),
    "hestia-no-hessian": Quantizer("HESTIA, alpha = 0", _relax_hestia, _hard_absmean, {"alpha": 0.0}, soft=True),
    "hestia": Quantizer("HESTIA", _relax_hestia, _hard_absmean, soft=True),
    "hestia-binary": Quantizer("HESTIA, binary", _relax_hestia, _hard_absmean, {"codebook": BINARY}, soft=True),
    "hestia-2bit": Quantizer("HESTIA, 2 bit", _relax_hestia, _hard_absmean, {"codebook": TWO_BIT}, soft=True),
}


def _is_target(model):
    """Section 5.1: all linear layers, but not the output head: by name, or because it shares the embedding's weight."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def is_target(name, module):
        head = name.split(".")[-1] in ("lm_head", "output") or id(getattr(module, "weight", None)) in embeddings
        return isinstance(module, nn.Linear) and not head

    return is_target


def _stack(tensors):
    """torch.stack, without a copy where the tensors, all of one shape, lie side by side in memory already."""
    x, size = tensors[0], tensors[0].numel()
    lie = {(w.untyped_storage().data_ptr(), w.storage_offset() - k * size, w.stride()) for k, w in enumerate(tensors)}
    return torch.stack(tensors) if len(lie) > 1 else x.as_strided((len(tensors), *x.shape), (size, *x.stride()))


class Hestia:
    """Algorithm 1 around any model: keeps a float32 latent copy W of every quantized linear weight.

    model: any nn.Module; total_steps: T. method: a name in QUANTIZERS. targets: (module name, module) -> bool, or None
    for every nn.Linear but the output head. scores: {module name: s_i} from `sensitivity_scores`, or None for all 0.
    Wrap the model in DDP after this, not before: changed dtypes and Tequila's biases are new parameters.
    tau_init: None chooses it by `optimal_tau_init`. dtype: of the effective weights, None for the model's own.
    compile: fuse the passes over the weights with torch.compile, which pays on a GPU: one read of W and one write. For
    more than one or two such in a process raise torch._dynamo.config.recompile_limit, as train_tiny.py does.
    ValueError: unknown method, settings out of range, weights that are not finite, a group size that does not fit.

    >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> qat = Hestia(model, total_steps=10, group_size=None)
    >>> optimizer = torch.optim.AdamW(qat.param_groups(weight_decay=0.1), lr=1e-2)
    >>> for t in range(10):
    ...     qat.relax(t)                               # W_eff(t) is in the model now: Algorithm 1, lines 4-10
    ...     model(torch.ones(3, 4)).square().mean().backward()
    ...     qat.pull_back()                            # dL/dW = dL/dW_eff * dW_eff/dW, Eq. (19)
    ...     optimizer.step()                           # line 11; then after_step(t, lr), which HESTIA does not need
    >>> qat.harden()                                   # line 13
    >>> len(model[0].weight.abs().unique()) <= 2       # only 0 and gamma are left
    True
    """

    def __init__(self, model, total_steps, *, method="hestia", group_size=128, rho=0.2, alpha=0.4, tau_init=None,
                 scores=None, codebook=TERNARY, targets=None, dtype=None, compile=False):  # fmt: skip
        if method not in QUANTIZERS:
            raise ValueError(f"unknown method {method!r}; expected one of {', '.join(QUANTIZERS)}")
        _check_schedule(total_steps, rho)
        if rho == 1 and QUANTIZERS[method].soft:
            warnings.warn("rho = 1 compresses to the last step and leaves none to anneal tau", stacklevel=2)
        self.model, self.method, self.quantizer = model, method, QUANTIZERS[method]
        self.total_steps, self.rho = total_steps, rho
        fixed = self.quantizer.settings  # what the method's name says
        self.alpha, self.group_size = fixed.get("alpha", alpha), fixed.get("group_size", group_size)
        self.codebook = tuple(fixed.get("codebook", codebook))
        if self.codebook != tuple(codebook) != TERNARY:
            raise ValueError(f"{method} has the codebook {self.codebook}, not {tuple(codebook)}")
        _check_codebook(self.codebook)
        if not abs(self.alpha) <= 50:
            raise ValueError(f"alpha is {alpha}; expected a number between -50 and 50, 0.4 in the paper")

        chosen, self.owners = targets or _is_target(model), {}  # owners: {parameter's id: the modules that hold it}
        self.weights = {}  # {module's name: the model's own parameter}, which holds W_eff
        for name, module in model.named_modules():
            name = name.replace("_orig_mod.", "").removeprefix("module.")  # wrapped by torch.compile, by DDP
            if chosen(name, module):
                if not isinstance(getattr(module, "weight", None), nn.Parameter):
                    raise ValueError(f"targets chose {name or 'the model'}, which has no weight of its own")
                if id(module.weight) not in self.owners:
                    self.weights[name] = module.weight
                self.owners.setdefault(id(module.weight), []).append(module)
        if not self.weights:
            raise ValueError("nothing to quantize: the model has no nn.Linear other than its output head")
        for name, weight in self.weights.items():
            if not torch.isfinite(weight).all():
                raise ValueError(f"the weights of {name} hold NaN or infinity; quantization needs finite weights")
            try:
                _groups(weight, self._group_size(weight))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self.rest = [p for p in model.parameters() if p.requires_grad and id(p) not in self.owners]
        self.latents = {name: nn.Parameter(_at_least_float32(w.detach()).clone()) for name, w in self.weights.items()}

        self.scores = {name: 0.0 for name in self.weights} if scores is None else dict(scores)
        missing = [name for name in self.weights if name not in self.scores]
        if missing:
            raise ValueError(f"no sensitivity score for {', '.join(missing)}; scores are keyed by module name")
        if not all(0 <= self.scores[name] <= 1 for name in self.weights):
            raise ValueError("a sensitivity score is outside 0 .. 1; expected those of sensitivity_scores")
        if tau_init is None:
            tau_init = 0.0
            if self.quantizer.soft:
                tau_init = optimal_tau_init(self.latents, self.group_size, self.codebook)
        elif not 0 < tau_init < math.inf:
            raise ValueError(f"tau_init is {tau_init}; expected a positive temperature in units of gamma, such as 0.3")
        self.tau_init = tau_init
        self.own = {}  # {module's name: what the method learns beside W}
        for name, w in self.latents.items():
            try:
                own = self.quantizer.init(w, self.step_of(0, name)) if self.quantizer.init else {}
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            self.own[name] = {k: nn.Parameter(x.detach().clone(), "frozen" not in fixed) for k, x in own.items()}
            owners = self.owners[id(self.weights[name])]
            if "bias" in fixed and (len(owners) > 1 or owners[0].bias is not None):
                raise ValueError(f"{method} gives every layer a bias; {name} has one, or shares its weight")
        self.waiting = False  # for after_step, which a method that needs it must not miss
        self.biases = {}  # {module's name: the bias that the method gives it}
        self.compile = compile
        self.slope = SLOPES.get(self.quantizer.relax)
        if compile:  # from Hopper on, a kernel starts as the one before it ends: these are short, and many
            fused = functools.partial(torch.compile, dynamic=False, options={"triton.enable_pdl": True})
            self._relax_some, self._pull_some = fused(self._relax_some), fused(self._pull_some)
            self._relax_stack = fused(self._relax_stack)
        self.relaxed = None  # between relax and pull_back, for each chunk: names, steps, and W_eff if it has a graph
        for name, weight in list(self.weights.items()):
            weight.requires_grad_(True).grad = None
            if "bias" in fixed:
                self.biases[name] = nn.Parameter(weight.new_zeros(len(weight), dtype=dtype or weight.dtype))
                self.owners[id(weight)][0].bias = self.biases[name]
            if dtype not in (None, weight.dtype):
                self._replace(name, weight.detach().to(dtype))

    def _replace(self, name, tensor):
        """A new Parameter in the model: a compiled model would not notice that the old one has another dtype."""
        modules = self.owners.pop(id(self.weights[name]))
        self.weights[name] = nn.Parameter(tensor)
        self.owners[id(self.weights[name])] = modules
        for module in modules:
            module.weight = self.weights[name]

    def step_of(self, t, name):
        """Eqs. (10) and (15): the pressure and the tensor's temperature at step t."""
        tau = temperature(t, self.total_steps, self.rho, self.tau_init, self.scores[name], self.alpha)
        group_size = self._group_size(self.latents[name])
        return Step(pressure(t, self.total_steps, self.rho), tau, group_size, self.codebook)

    def _group_size(self, w):
        return w.shape[-1] if self.group_size == "row" else self.group_size

    def _rows(self, x, w):
        """x, of W's shape, with groups for rows where the map acts on each alone: compiled, that is one pass over W if
        a group is short, and nothing of W's size is written down on the way."""
        return _groups(x, self._group_size(w)) if self.compile and self.slope else x  # (n_groups, g)

    def _chunks(self):
        """Names of tensors that are mapped together: one by one, or compiled, up to eight of a shape, so that few
        programs, which are short, serve a deep model."""
        shapes = {}
        for name, w in self.latents.items():
            key = (self._rows(w, w).shape, w.dtype, self.weights[name].dtype) if self.compile else name
            shapes.setdefault(key, []).append(name)
        return [names[k : k + 8] for names in shapes.values() for k in range(0, len(names), 8)]

    def _relax_stack(self, w, steps, dtype):
        """W_eff of K tensors of one shape in one pass, (K n, g). w: (K, n, g); steps: (K, 8), p and tau in 0 and 4."""
        K, n, g = w.shape
        p, tau = (steps[:, k, None].expand(K, n).reshape(K * n, 1) for k in (0, 4))  # for each group
        return self.quantizer.relax(w.view(K * n, g), Step(p, tau, g, self.codebook)).to(dtype)

    def _relax_some(self, latents, own, dtypes, steps):
        """W_eff of each tensor, then the biases. A function of tensors alone, so that it compiles once."""
        out = [self.quantizer.relax(w, s, **o) for w, o, s in zip(latents, own, steps)]
        weights, biases = [x[0] if self.biases else x for x in out], [x[1] for x in out] if self.biases else []
        return [w.to(dtype) for w, dtype in zip(weights + biases, dtypes + dtypes)]

    def _pull_some(self, latents, grads, steps):
        """Eq. (19) for a method with a slope: dL/dW, written over dL/dW_eff where both are of one dtype."""
        return [grad.to(w.dtype).mul_(self.slope(w, s)) for w, grad, s in zip(latents, grads, steps)]

    def relax(self, t):
        """Algorithm 1, lines 4-10: show the model W_eff(t). Clears the gradients of the weights it writes."""
        if not 0 <= t < self.total_steps:
            raise ValueError(f"relax({t}): expected a step from 0 to {self.total_steps - 1}, as total_steps says")
        self._check_after_step()
        chunks, relaxed = self._chunks(), []
        tables = [None] * len(chunks)
        steps = {name: self.step_of(t, name) for names in chunks for name in names}
        if self.compile:  # as tensors, or new numbers would compile anew; 16 bytes apart, as compiled code wants them
            rows = torch.tensor([[s.p, 0, 0, 0, s.tau, 0, 0, 0] for s in steps.values()], dtype=torch.float32)
            rows = rows.to(next(iter(self.latents.values())).device, non_blocking=True)  # (tensors, 8)
            steps = {name: s._replace(p=row[0], tau=row[4]) for (name, s), row in zip(steps.items(), rows)}
            tables = rows.split([len(names) for names in chunks])
        for names, table in zip(chunks, tables):
            latents, own, shown, now = [[x[n] for n in names] for x in (self.latents, self.own, self.weights, steps)]
            with torch.set_grad_enabled(self.slope is None):
                if self.compile and self.slope:
                    stack = _stack([self._rows(w.detach(), w) for w in latents])  # (K, n_groups, g)
                    for w, part in zip(latents, stack):
                        w.data = part.view_as(w)  # side by side from the first step on: then a stack is no copy
                    effective = self._relax_stack(stack, table, shown[0].dtype).chunk(len(names))
                else:
                    effective = self._relax_some(latents, own, [weight.dtype for weight in shown], now)
            for x, new in zip((*shown, *(self.biases[n] for n in names if self.biases)), effective):
                x.data, x.grad = new.detach().view_as(x), None  # the map's own output: no copy
            relaxed.append((names, now, None if self.slope else effective))
        self.relaxed = relaxed

    def pull_back(self):
        """Eq. (19): dL/dW = dL/dW_eff * dW_eff/dW, from the model's gradients to the latents'. Clears the former."""
        if self.relaxed is None:
            raise RuntimeError("pull_back() needs the effective weights of this step; call relax(t) before the forward")
        relaxed, self.relaxed = self.relaxed, None
        while relaxed:  # each chunk's gradients and graph are freed before the next one's come
            names, steps, effective = relaxed.pop(0)
            shown = [self.weights[n] for n in names] + [self.biases[n] for n in names if self.biases]
            live = [k for k, x in enumerate(shown) if x.grad is not None]  # not a layer that the loss left out
            grads = [shown[k].grad for k in live]
            trained = [self.latents[n] for n in names] + self._learned(names)
            for x in (*shown, *trained):
                x.grad = None
            if self.slope:
                trained = [trained[k] for k in live]
                rows = [[self._rows(x.detach(), w) for x, w in zip(of, trained)] for of in (trained, grads)]
                found = self._pull_some(*rows, [steps[k] for k in live])
            else:
                live = [effective[k] for k in live]
                found = torch.autograd.grad(live, trained, grads, allow_unused=True) if live else []
            for x, grad in zip(trained, found):
                x.grad = grad if grad is None else grad.view_as(x)
            rows = grads = found = grad = None
        self.waiting = self.quantizer.after_step is not None

    def _check_after_step(self):
        if self.waiting:
            raise RuntimeError(f"{self.method} changes W itself: call after_step(t, lr) after optimizer.step()")

    @torch.no_grad()
    def after_step(self, t, lr):
        """What a method does to W itself, after the optimizer's step t; for most, nothing."""
        self.waiting = False
        if self.quantizer.after_step:
            for name, w in self.latents.items():
                self.quantizer.after_step(w, self.step_of(t, name), lr, t / self.total_steps, **self.own[name])

    @torch.no_grad()
    def _hard_weights(self):
        """{name: what is left of W} and {name: the bias that comes with it}, at the end of the schedules."""
        weights, biases = {}, {}
        keep = self.quantizer.harden or self.quantizer.relax
        for name, w in self.latents.items():
            kept = keep(w, self.step_of(self.total_steps, name), **self.own[name])
            kept, biases[name] = kept if self.biases else (kept, None)
            weights[name] = kept if self.quantizer.harden else kept.bfloat16().to(w.dtype)
        return weights, biases

    def _show(self, tensors, biases):
        for name, weight in self.weights.items():
            weight.data = tensors[name].to(weight.dtype)
        for name, bias in self.biases.items():
            bias.data = biases[name].to(bias.dtype)

    @contextlib.contextmanager
    def hard(self):
        """Within `with qat.hard():` the model shows Q(W); afterwards it shows what it showed before."""
        before = [{name: x.data for name, x in shown.items()} for shown in (self.weights, self.biases)]
        self._show(*self._hard_weights())
        try:
            yield self.model
        finally:
            self._show(*before)

    def harden(self):
        """Algorithm 1, line 13: W_hat = Q(W). The model now is ternary, each scale rounded to bfloat16.

        A weight that its dtype cannot hold (1.5 gamma in bfloat16) becomes a float32 parameter.
        """
        self._check_after_step()
        weights, biases = self._hard_weights()
        for name, bias in self.biases.items():
            bias.data = biases[name].to(bias.dtype)
        for name, w in weights.items():
            if torch.equal(w.to(self.weights[name].dtype).to(w.dtype), w):
                self.weights[name].data = w.to(self.weights[name].dtype, copy=True)
            else:
                self._replace(name, w.clone())
        self.relaxed = None

    @torch.no_grad()
    def codes(self):
        """{name: the code of each weight}, in bfloat16, which holds every codebook exactly.

        For methods with a grid other than the AbsMean one: the place in it, in halves of the group's largest weight.
        """
        if self.quantizer.harden is _hard_absmean or self.method == "full":
            code = lambda w: _nearest(_normalize(w, self._group_size(w), None)[0], self.codebook)
            return {name: code(w).bfloat16().view_as(w) for name, w in self.latents.items()}
        rows = {name: _groups(w, self._group_size(w)) for name, w in self._hard_weights()[0].items()}
        halves = lambda z: (2 * z / z.abs().amax(1, keepdim=True).clamp_min(1e-30)).round().bfloat16()
        return {name: halves(z).view_as(self.latents[name]) for name, z in rows.items()}

    def _learned(self, names=None):
        """What a method trains beside the latents, such as scales; of some tensors, or of all."""
        return [x for name in names or self.own for x in self.own[name].values() if x.requires_grad]

    def parameters(self):
        """What the optimizer trains: the latents, what the method learns beside them, and all that is not quantized."""
        return [*self.latents.values(), *self._learned(), *self.rest]

    def param_groups(self, weight_decay):
        """parameters() as groups for AdamW: weight decay on matrices, none on vectors and learned scales."""
        return param_groups([*self.latents.values(), *self.rest], weight_decay, self._learned())

    def state_dict(self):
        """Everything of the method that training changes or that was estimated: latents, tau_init, scores, scales."""
        latents = {name: w.detach() for name, w in self.latents.items()}
        own = {name: {k: x.detach() for k, x in own.items()} for name, own in self.own.items()}
        return {"method": self.method, "tau_init": self.tau_init, "scores": dict(self.scores), "latents": latents,
                "own": own}  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state):
        """Take up a state_dict() of the same method and model. Call relax(t) afterwards to show it in the model."""
        if state["method"] != self.method or state["latents"].keys() != self.latents.keys():
            raise ValueError(f"the state is of method {state['method']!r} or of another model; this is {self.method!r}")
        self.tau_init, self.scores, self.relaxed = state["tau_init"], dict(state["scores"]), None
        for name, w in self.latents.items():
            w.copy_(state["latents"][name])
            for k, x in self.own[name].items():
                x.copy_(state["own"][name][k])


# ----------------------------------------------------------------------------------------------------------------------
# The other rows of Tables 1-3, and what section 2 cites, in the same notation: s.group_size weights share a scale, the
# last W_eff is kept, and `w - w.detach()` is zero with the gradient of w. To add one: a function, and a registry line.


def _through(w, z, value, slope=1.0):
    """value (n_groups, g) as W_eff, with the derivative slope in W: the straight-through estimator where it is 1."""
    return (value + slope * (z - z.detach())).view_as(w)


def _twn_codes(z):
    """Ternary Weight Networks: drop |w| <= 0.7 mean|w|; the scale is the mean of what is kept. Codes and scale."""
    a = z.detach().abs()
    keep = a > 0.7 * a.mean(1, keepdim=True)
    return keep * z.detach().sign(), (a * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp_min(1)


def relax_twn(w, s):
    """TWN (arXiv 1605.04711): AbsMean with another threshold and scale."""
    z = _groups(w, s.group_size)
    codes, alpha = _twn_codes(z)
    return _through(w, z, alpha * codes)


def _gentle(scale, z):
    """A learned scale whose gradient is divided by sqrt(weights that share it), as in LSQ. Adam hardly notices."""
    factor = z.shape[1] ** -0.5
    scale = (1 - factor) * scale.detach() + factor * scale
    return scale + (scale.clamp_min(1e-5) - scale).detach()  # a floor that lets the gradient through, or it would stay


def relax_lsq(w, s, scale):
    """LSQ (arXiv 1902.08153): a learned step. d/dscale is round(w / scale) - w / scale inside the grid, +-1 outside."""
    z = _groups(w, s.group_size)
    scale = _gentle(scale, z)
    u = (z / scale).clamp(-1, 1)
    return (scale * (u + (u.round() - u).detach())).view_as(w)


def relax_seq(w, s, scale):
    """SEQ (ParetoQ, arXiv 2502.02631): levels {0, +-2/3 scale}, a learned scale that starts at max|w|.

    Its derivative is the exact one; ParetoQ's code has 1 in place of the level 2/3 outside. Its 2-bit grid is left out.
    """
    z = _groups(w, s.group_size)
    scale = _gentle(scale, z)
    u = (z / scale).clamp(-0.99, 0.99)
    return (scale * (u + ((1.5 * u).round() / 1.5 - u).detach())).view_as(w)


def relax_dlt(w, s, scale, shift):
    """DLT (TernaryLLM, arXiv 2406.07177): learned scale and shift; levels shift + scale {-1, 0, 1}, not ternary."""
    z = _groups(w, s.group_size)
    codes, _ = _twn_codes(z)
    return _through(w, z, scale * codes + shift, torch.where(codes == 0, 1.0, scale.detach()))


def relax_tequila(w, s, strength=1e-3):
    """Tequila (arXiv 2509.23809): AbsMean, and each dead weight adds strength * w to its row's bias, which moves it."""
    dead = quantize(w.detach(), s.group_size) == 0
    return quantize_ste(w, s.group_size), strength * (w * dead).sum(1)


def relax_int2_absmax(w, s):
    """The authors' "2-bit symmetric": scale max|w|, codes -2 .. 1, of which only -1, 0, 1 are ever reached."""
    z = _groups(w, s.group_size)
    scale = z.detach().abs().amax(1, keepdim=True).clamp_min(1e-5)
    return _through(w, z, scale * (z.detach() / scale).round().clamp(-2, 1))


def widely_linear(R):
    """Fairy2i (arXiv 2512.02901): a real matrix of even sides as two complex ones of half the sides, without loss:
    with x = [Re; Im], R x is U x + V conj(x)."""
    if R.shape[0] % 2 or R.shape[1] % 2:
        raise ValueError(f"a {tuple(R.shape)} matrix has an odd side; the complex form needs even ones")
    (a, b), (c, d) = (rows.chunk(2, 1) for rows in R.chunk(2, 0))
    return torch.complex(a + d, c - b) / 2, torch.complex(a - d, b + c) / 2


def from_widely_linear(U, V):
    """The real matrix again."""
    upper, lower = (V.real + U.real, V.imag - U.imag), (V.imag + U.imag, U.real - V.real)
    return torch.cat([torch.cat(upper, 1), torch.cat(lower, 1)])


def _phases(C, tau):
    """One stage: every entry becomes the nearest of {1, i, -1, -i} by angle, times a scale for real and one for
    imaginary codes; at a temperature tau the mean of the four under a softmax of the squared angles."""
    re, im = C.real, C.imag
    real = re.detach().abs() >= im.detach().abs()
    mean = lambda x, mask: (x.detach().abs() * mask).sum() / mask.sum().clamp_min(1)
    scale_re, scale_im = mean(re, real), mean(im, ~real)
    if tau is None:
        return torch.complex(re.detach().sign() * scale_re * real, im.detach().sign() * scale_im * ~real)
    angle = torch.atan2(im, re).unsqueeze(-1) - torch.tensor([0.0, 0.5, 1.0, -0.5], device=C.device) * math.pi
    away = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi  # wrapped to [-pi, pi)
    pi = torch.softmax(-(away**2) / _safe_tau(tau)[0], -1)  # (..., 4)
    return torch.complex((pi[..., 0] - pi[..., 2]) * scale_re, (pi[..., 1] - pi[..., 3]) * scale_im)


def _fairy(w, tau=None, stages=2):
    parts = []
    for C in widely_linear(w):
        total = 0
        for _ in range(stages):  # each stage quantizes what the ones before it left
            total = total + _phases(C - total, tau)
        parts.append(total)
    return from_widely_linear(*parts)


def relax_fairy2i(w, s):
    """Fairy2i: two residual stages of complex codes per matrix, 2 bits per weight; straight through."""
    return _fairy(w.detach()) + (w - w.detach())


def relax_fairy2i_hestia(w, s):
    """Section 5.3: the same with HESTIA's softmax over the angles."""
    return (1 - s.p) * w + s.p * _fairy(w, s.tau)


def _within(w, s):
    """z = w / gamma and |z| clamped to the ternary grid, where the slopes below live; 1 there and 0 outside."""
    z, gamma = _normalize(w, s.group_size, None)
    a = z.abs().clamp(max=1)
    return z, gamma, a, (z.detach().abs() <= 1).to(z.dtype)


def relax_dge(w, s, k=5, cap=3.0):
    """DGE (arXiv 2501.17116): hard forward; slope |2r - 1|^(1/k - 1) / k at r = |z| in [0, 1], at most 3."""
    z, gamma, a, inside = _within(w, s)
    slope = ((2 * a.detach() - 1).abs().clamp_min(1e-12) ** (1 / k - 1) / k).clamp(max=cap) * inside
    return _through(w, gamma * z, gamma * _nearest(z.detach(), TERNARY), slope)


def relax_dsq(w, s, alpha=0.2):
    """DSQ (arXiv 1908.05033): soft forward, a tanh in every interval, rescaled so that the pieces meet. It stays as
    soft as alpha says to the end, so that what is kept differs from what was trained."""
    z, gamma, a, _ = _within(w, s)
    k = math.log(2 / alpha - 1)
    return (gamma * z.sign() * (torch.tanh(k * (a - 0.5)) / math.tanh(k / 2) + 1) / 2).view_as(w)


def relax_daq(w, s, T=2.0):
    """DAQ (distance-aware quantization, 2021): soft-argmax at a temperature that makes the forward hard; its slope."""
    z, gamma, a, inside = _within(w, s)
    a = a.detach()
    zero, one = torch.exp(-a), torch.exp(a - 1)
    zero, one = zero * torch.where(a <= 0.5, 1.0, math.exp(-1)), one * torch.where(a > 0.5, 1.0, math.exp(-1))
    slope = T / (2 * math.sinh(T)) * (zero + one) / (zero - one).abs() * inside
    return _through(w, gamma * z, gamma * _nearest(z.detach(), TERNARY), slope)


def pull_cage(w, s, lr, progress, strength=10.0, silence=0.8):
    """CAGE (arXiv 2510.18784): in the last fifth, a growing pull of W towards Q(W), decoupled from the gradient.

    Taken at W after the optimizer's step, not before it: a difference of the order of lr squared.
    """
    ramp = max(0.0, progress - silence) / (1 - silence)
    w -= lr * strength * ramp * (w - quantize(w, s.group_size, s.codebook))


def round_stochastically(w, s, lr, progress, scale):
    """DQT (arXiv 2412.04787): no latent weights; after each step W is rounded up or down at random, without bias."""
    z = (_groups(w, s.group_size) / scale).clamp(-1, 1)
    low = z.floor()
    w.copy_((scale * (low + (torch.rand_like(z) < z - low))).view_as(w))


def _start_on_grid(w, s):
    scale = absmean_scale(w, s.group_size).bfloat16().to(w.dtype)
    w.data.copy_(quantize(w.data, s.group_size, scale=scale))
    return {"scale": scale}


def _even_sides(w, s):
    widely_linear(w)
    return {}


def distillation(teacher):
    """LLM-QAT (arXiv 2305.17888): a loss for `train`, KL(teacher || student) in nats per token, in place of the text's.
    Holds the logits of both models: lower the micro-batch where the vocabulary is large.

    >>> loss = distillation(lambda x: torch.tensor([[2.0, 0.0, -1.0]]))
    >>> round(float(loss(lambda x: torch.tensor([[1.0, 0.5, 0.0]]), None, None)), 6)
    0.255111
    """

    def loss(student, x, y):
        with torch.no_grad():
            target = F.log_softmax(_at_least_float32(teacher(x)), -1)
        got = F.log_softmax(_at_least_float32(student(x)), -1)  # (B, T, V)
        return (target.exp() * (target - got)).sum(-1).mean()

    return loss


_scale = lambda factor: lambda w, s: {"scale": factor(_groups(w.detach().abs(), s.group_size))}
_TERNARY = {"codebook": TERNARY}  # the only grid these have
QUANTIZERS |= {
    "twn": Quantizer("TWN", relax_twn, settings=_TERNARY),
    "lsq": Quantizer("LSQ", relax_lsq, settings=_TERNARY, init=_scale(lambda a: 2 * a.mean(1, keepdim=True))),
    "seq": Quantizer("SEQ", relax_seq, settings=_TERNARY, init=_scale(lambda a: a.amax(1, keepdim=True))),
    "dlt": Quantizer("DLT", relax_dlt, settings=_TERNARY, init=lambda w, s: dict(
        scale=(alpha := _twn_codes(_groups(w, s.group_size))[1]), shift=torch.zeros_like(alpha)),
        extra="a shift per group"),
    "tequila": Quantizer("Tequila", relax_tequila, lambda w, s: (_hard_absmean(w, s), relax_tequila(w, s)[1]),
                         {**_TERNARY, "bias": True}, extra="a bias per row"),
    "int2": Quantizer("INT2", _relax_ste, _hard_absmean, {"codebook": TWO_BIT}),
    "int2-absmax": Quantizer("INT2, absmax", relax_int2_absmax, settings=_TERNARY),
    "llm-qat": Quantizer("LLM-QAT", _relax_ste, _hard_absmean,
                         {"codebook": TWO_BIT, "group_size": "row", "distill": True}),
    "bitnet": Quantizer("BitNet, from scratch", _relax_ste, _hard_absmean, {"group_size": None, "scratch": True}),
    "spectra": Quantizer("Spectra, from scratch", _relax_ste, _hard_absmean,
                         {"group_size": None, "scratch": True, "spectra": True}),
    "fairy2i": Quantizer("Fairy2i", relax_fairy2i, lambda w, s: _fairy(w), {"group_size": None},
                         init=_even_sides, extra="complex, two stages"),
    "fairy2i-hestia": Quantizer("Fairy2i-HESTIA", relax_fairy2i_hestia, lambda w, s: _fairy(w),
                                {"group_size": None}, soft=True, init=_even_sides, extra="complex, two stages"),
    "dge": Quantizer("DGE", relax_dge, _hard_absmean, _TERNARY),
    "dsq": Quantizer("DSQ", relax_dsq, _hard_absmean, _TERNARY),
    "daq": Quantizer("DAQ", relax_daq, _hard_absmean, _TERNARY),
    "cage": Quantizer("CAGE", _relax_ste, _hard_absmean, after_step=pull_cage),
    "stochastic": Quantizer("stochastic rounding", lambda w, s, scale: w, settings={**_TERNARY, "frozen": True},
                            init=_start_on_grid, after_step=round_stochastically),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The model of section 5.1: Llama 3, with the parameter names of Hugging Face checkpoints


@dataclass
class LlamaConfig:
    """The fields of a Llama's config.json that shape the computation, named as there. Defaults: Llama-3.2-1B."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3", "factor", "low_freq_factor", ...} or none
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if f.type is int and not (whole and 0 < value < 1 << 31):
                raise ValueError(f"{f.name} is {value!r}; expected a positive whole number")
            if f.type is float and not ((whole or isinstance(value, float)) and 0 < value < math.inf):
                raise ValueError(f"{f.name} is {value!r}; expected a positive number")
            if f.type is bool and not isinstance(value, bool):
                raise ValueError(f"{f.name} is {value!r}; expected true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            heads, shared = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"{heads} attention heads cannot share {shared} key-value heads evenly")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not isinstance(self.head_dim, int) or not 2 <= self.head_dim < 1 << 31 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim!r}; expected an even number, since RoPE turns pairs")
        if self.rope_scaling:
            if not isinstance(self.rope_scaling, dict):
                raise ValueError(f"rope_scaling is {self.rope_scaling!r}; expected names and numbers, or none")
            kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))  # "type" in older checkpoints
            if kind == "default":
                self.rope_scaling = None
            elif kind != "llama3":
                raise ValueError(f"rope_scaling of type {kind!r} is not supported; expected 'llama3' or none")
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                value = self.rope_scaling.get(key) if self.rope_scaling else 1
                if not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ValueError(f"{key} of rope_scaling is {value!r}; expected a positive number")


def rope_frequencies(config, device=None):
    """Radians by which each pair of a head's dimensions turns per position, with llama3 scaling. (head_dim / 2,)

    Fast pairs stay, slow ones (a wave longer than the original context) turn `factor` times slower, others in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponents
    if config.rope_scaling:
        r = config.rope_scaling
        low, high, context = r["low_freq_factor"], r["high_freq_factor"], r["original_max_position_embeddings"]
        waves = context * frequency / (2 * math.pi)  # waves that fit the context of the pretraining
        keep = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / r["factor"]
    return frequency


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x):  # (B, T, C); statistics in float32
        x32 = _at_least_float32(x)
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_heads, T, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_heads, T, head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:  # [keys, values] of the positions before x: (B, n_kv_heads, past, head_dim) each
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache or (k[:, :, :0], v[:, :, :0]), (k, v)))
            cache[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, n_heads, T, head_dim) -> (B, T, C)


def rotate(x, cos, sin):
    """RoPE, split-half layout: dimension d is paired with d + head_dim / 2. x: (B, heads, T, head_dim)."""
    a, b = x.chunk(2, -1)  # (B, heads, T, head_dim / 2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


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
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c), RMSNorm(c)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """model(ids) -> logits (B, T, V). model(ids, targets) -> mean loss in nats per token; ids and targets (B, T).

    checkpointing = True keeps one activation per layer and computes the rest again: less memory, a third more time.
    cache: a list, empty at first, in which keys and values gather; then ids is a whole prompt or its next token.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:  # a branch's last layer smaller, so that the depth does not add up
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def config_now(self):
        """The configuration, with the biases that a method such as Tequila may have given the layers."""
        attention, mlp = self.model.layers[0].self_attn.q_proj.bias, self.model.layers[0].mlp.up_proj.bias
        return dataclasses.replace(self.config, attention_bias=attention is not None, mlp_bias=mlp is not None)

    def forward(self, ids, targets=None, cache=None):
        if cache == []:
            cache.extend([] for _ in self.model.layers)
        past = cache[0][0].shape[2] if cache and cache[0] else 0
        if past and ids.shape[1] > 1:
            raise ValueError(f"{ids.shape[1]} tokens after a filled cache; expected a whole prompt, then one at a time")
        x = self.model.embed_tokens(ids)  # (B, T, C)
        position = torch.arange(past, past + ids.shape[1], dtype=torch.float32, device=ids.device)
        angle = torch.outer(position, rope_frequencies(self.config, ids.device))  # (T, head_dim / 2)
        # as_strided changes nothing here; without it, compiled code works the cosines out in every layer and head
        cos, sin = (x.as_strided(x.shape, x.stride()) for x in (angle.cos(), angle.sin()))
        for block, kept in zip(self.model.layers, cache or [None] * len(self.model.layers)):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, kept)
        x = self.model.norm(x)
        if targets is None:
            return self.lm_head(x)
        return self.loss(x.flatten(0, 1), targets.flatten())

    def loss(self, x, targets, budget=1 << 24):
        """Mean cross-entropy of (N, C) states. Never holds more than `budget` logits in float32: recomputes them when
        it must. Compiled autocast need not: it saves them in bf16 and has them in float32 only in registers."""

        def nats(x, y):
            return F.cross_entropy(_at_least_float32(self.lm_head(x)), y, reduction="sum")

        rows = max(1, budget // self.config.vocab_size)
        if len(x) <= rows or (torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)):
            return nats(x, targets) / len(x)
        parts = zip(x.split(rows), targets.split(rows))
        return sum(checkpoint(nats, x_, y_, use_reentrant=False) for x_, y_ in parts) / len(x)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a Llama out of a Hugging Face or a Meta folder, and into a folder that other software loads


def _json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _extra(name):
    """An optional package, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"this needs the package {name.split('.')[0]}: pip install '.[llama]'") from None


def _hugging_face_config(raw, path):
    """LlamaConfig of a config.json, in its older and newer spellings, with the defaults that hold there."""
    kind, names = raw.get("model_type"), raw.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or names != ["LlamaForCausalLM"]:
        raise ValueError(f"{path} describes a {kind!r} model, {names}; expected 'llama', ['LlamaForCausalLM']")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path} asks for the activation {raw['hidden_act']!r}; expected 'silu'")
    defaults = {"num_key_value_heads": raw.get("num_attention_heads"), "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
                "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}  # fmt: skip
    fields = {f.name: raw.get(f.name) for f in dataclasses.fields(LlamaConfig)}
    fields = {name: defaults.get(name) if value is None else value for name, value in fields.items()}
    if isinstance(rope := raw.get("rope_parameters"), dict):  # the newer spelling of both
        fields["rope_theta"] = rope.get("rope_theta", fields["rope_theta"])
        fields["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} or None
    return LlamaConfig(**fields)


def _pack_group(raw, path):
    """The group size of packed weights, "row" for a scale per row, None if config.json describes no packed weights."""
    described = raw.get("quantization_config")
    if not described:
        return None
    try:
        schemes = [group["weights"] for group in described["config_groups"].values()]
        (size,) = {scheme.get("group_size") or "row" for scheme in schemes}
        ours = all((w["num_bits"], w["symmetric"], w["type"]) == (2, True, "int") for w in schemes)
        known = ours and described["format"] == "pack-quantized" and (size == "row" or int(size) > 0)
    except (TypeError, KeyError, AttributeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{path} describes quantized weights that are not those of save_llama(packed=True): "
                         "pack-quantized, 2 bits, symmetric")  # fmt: skip
    return size


def _hugging_face_tensors(folder, pack_group=None):
    """{name: (shape, read)} of every tensor in the folder's safetensors files; they are mapped, not read."""
    safe_open, found, kinds = _extra("safetensors").safe_open, {}, {}
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists() and not (folder / files[0]).exists():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files beside it")
        files = sorted(set(files.values()))
    for file in (folder / name for name in files):
        if not file.exists():
            raise ValueError(f"{file} is missing; expected the safetensors file or files of a Llama")
        try:
            opened = safe_open(file, "pt")
            for name in opened.keys():  # noqa: SIM118, it is no dict
                view = opened.get_slice(name)
                if name in found:
                    raise ValueError(f"{name} is there twice")
                found[name] = tuple(view.get_shape()), lambda opened=opened, name=name: opened.get_tensor(name)
                kinds[name] = view.get_dtype()
        except Exception as error:  # whatever a damaged file makes of the reader
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None

    for name in [n.removesuffix("_packed") for n in found if n.endswith(".weight_packed")]:
        parts = [name + end for end in ("_packed", "_scale", "_shape")]
        (codes, read_codes), (gamma, read_gamma), (_, read_shape) = (found.pop(part, ((), None)) for part in parts)
        shape = tuple(read_shape().flatten().tolist()) if read_shape else ()
        out, width = shape if len(shape) == 2 else (0, 0)
        groups = 1 if pack_group == "row" else width // (pack_group or 1)
        if (kinds.pop(parts[0]), kinds.pop(parts[2], None)) != ("I32", "I64") or not pack_group or (
                codes, gamma) != ((out, -(-width // 16)), (out, groups)):  # fmt: skip
            raise ValueError(f"{folder} packs {name} with shapes {codes}, {gamma} and {shape} that do not fit together")
        found[name] = shape, lambda c=read_codes, g=read_gamma, width=width: unpack_ternary(c(), g(), width)
    if not set(kinds.values()) <= {"F32", "F16"} and not set(kinds.values()) <= {"F32", "BF16"}:
        raise ValueError(f"{folder} has tensors of types {sorted(set(kinds.values()))}; expected F32, and BF16 or F16")
    return found


def pack_ternary(w, group_size):
    """Ternary weights (out, in) as compressed-tensors' pack-quantized layout has them: two bits per weight.

    Returns codes, int32 (out, ceil(in / 16)), code t as t + 2 from the lowest bits up; and gamma, (out, groups),
    such that w = gamma * t. ValueError where a group holds more than {-gamma, 0, +gamma}.

    >>> w = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.25, 0.0, 0.0, -0.25]])
    >>> codes, gamma = pack_ternary(w, 4)
    >>> gamma, bin(int(codes))                                        # read from the right: 11 is +1, 01 is -1, 10 is 0
    (tensor([[0.5000, 0.2500]]), '0b110101111100111')
    >>> torch.equal(unpack_ternary(codes, gamma, 8), w)
    True
    """
    out, width = w.shape
    groups = _groups(w, group_size or width).view(out, -1, group_size or width)  # (out, groups, g)
    gamma, t = groups.abs().amax(-1), groups.sign()  # (out, groups), (out, groups, g)
    if not torch.equal(t * gamma.unsqueeze(-1), groups):
        raise ValueError(f"not ternary in groups of {group_size or width}; only {{-gamma, 0, +gamma}} can be packed")
    t = F.pad(t.view(out, width).long() + 2, (0, -width % 16)).view(out, -1, 16)  # 16 codes to an int32
    codes = (t << torch.arange(0, 32, 2, device=w.device)).sum(-1)
    return (codes - (codes >= 1 << 31) * (1 << 32)).int(), gamma


def unpack_ternary(codes, gamma, width):
    """Weights (out, width) from what pack_ternary returned, in gamma's dtype, exactly: W = gamma * t."""
    t = (codes.unsqueeze(-1) >> torch.arange(0, 32, 2, device=codes.device)) & 3  # (out, width / 16, 16)
    t = t.flatten(1)[:, :width].reshape(*gamma.shape, -1) - 2  # (out, groups, g)
    return (t.to(gamma.dtype) * gamma.unsqueeze(-1)).view(len(codes), width)


META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "layers": "model.layers", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def _meta_checkpoint(folder):
    """(LlamaConfig, {name: (shape, read)}, entries for config.json) of params.json and consolidated.00.pth."""
    raw, file = _json(folder / "params.json"), folder / "consolidated.00.pth"
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} is split for several GPUs; expected one consolidated.00.pth")
    try:
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        stored.pop("rope.freqs", None)
        if not all(t.dtype in (torch.float32, torch.float16, torch.bfloat16) for t in stored.values()):
            raise TypeError("expected float32, float16 or bfloat16 tensors")
        embedding, head = stored["tok_embeddings.weight"], stored.get("output.weight")
        width, tied = len(stored["layers.0.feed_forward.w1.weight"]), head is None or torch.equal(head, embedding)
        names = {old: re.sub("|".join(META_NAMES), lambda m: META_NAMES[m[0]], old) for old in stored}
    except Exception as error:  # whatever a damaged file makes of the reader
        raise ValueError(f"{file} is not a readable Llama checkpoint: {error!r}") from None
    names = {old: "model." + new if new.startswith("norm.") else new for old, new in names.items()}
    heads, llama3 = raw.get("n_heads"), bool(raw.get("use_scaled_rope"))
    scaling = {"rope_type": "llama3", "factor": raw.get("rope_scaling_factor") or 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": raw.get("rope_high_freq_factor") or 4.0,
               "original_max_position_embeddings": 8192}  # Llama 3.2's, which the file does not carry
    config = LlamaConfig(
        len(embedding), raw.get("dim"), width, raw.get("n_layers"), heads, raw.get("n_kv_heads") or heads,
        rms_norm_eps=raw.get("norm_eps", 1e-5), rope_theta=raw.get("rope_theta", 10000.0),
        rope_scaling=scaling if llama3 else None, tie_word_embeddings=tied,
    )  # fmt: skip

    def halves(w):  # Meta turns neighbouring rows of a head, Hugging Face rows half a head apart
        return w.view(-1, config.head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    found = {}
    for old, t in stored.items():
        turned = (".wq." in old or ".wk." in old) and t.dim() == 2 and len(t) % config.head_dim == 0
        found[names[old]] = tuple(t.shape), lambda t=t, turned=turned: halves(t) if turned else t
    also = {"max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": 128001}  # Llama 3.2's again
    return config, found, also if llama3 else {}


def load_llama(path, dtype=None, device="cpu"):
    """Section 5.1: a Llama from a folder, Hugging Face's (config.json, safetensors) or Meta's (params.json, .pth).

    dtype: of the weights; None for the file's, the widest if it has several. Tensors are mapped and copied one by one,
    so that the memory needed is the model's. All that is missing, unexpected, misshapen or not finite comes in one
    ValueError; nothing in a checkpoint is executed. Plain and packed folders of `save_llama` are read alike.
    """
    folder = Path(path)
    if (folder / "config.json").exists():
        raw = _json(folder / "config.json")
        config = _hugging_face_config(raw, folder / "config.json")
        found = _hugging_face_tensors(folder, _pack_group(raw, folder / "config.json"))
    elif (folder / "params.json").exists():
        config, found, raw = _meta_checkpoint(folder)
    else:
        raise ValueError(f"{folder} holds no Llama; expected a folder with config.json or params.json")
    layers = len({name.split(".")[2] for name in found if name.startswith("model.layers.")})
    if layers != config.num_hidden_layers:
        raise ValueError(f"{folder} says {config.num_hidden_layers} layers and has tensors for {layers}")
    try:
        with torch.device("meta"):  # shapes without memory
            model = Llama(config)
    except RuntimeError as error:
        raise ValueError(f"{folder} describes an impossible model: {error}") from None
    expected = dict(model.named_parameters())  # without a tied head
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    found = {name: entry for name, entry in found.items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in expected]
    wrong += [f"{name} has shape {found[name][0]} instead of {tuple(p.shape)}" for name, p in expected.items()
              if name in found and found[name][0] != tuple(p.shape)]  # fmt: skip
    for name in expected if not wrong else ():
        tensor = found[name][1]().detach()
        if tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):
            wrong.append(f"{name} holds NaN or infinity")
        module, leaf = name.rsplit(".", 1)
        tensor = tensor.to(device, dtype or tensor.dtype, copy=True)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    if config.tie_word_embeddings and not wrong:
        model.lm_head.weight = model.model.embed_tokens.weight
        if head and not torch.equal(head[1]().to(model.lm_head.weight), model.lm_head.weight):
            wrong.append("lm_head.weight differs from the embedding that config.json ties it to")
    if wrong:
        raise ValueError(f"{folder} does not fit its configuration: " + "; ".join(wrong))
    if len({p.dtype for p in model.parameters()}) > 1:
        model.float()
    model.origin = folder, raw
    return model


def save_llama(model, path, packed=False, group_size=128):
    """Write a Hugging Face folder that other software loads, read it back and compare every weight.

    Linear weights are dequantized, in bfloat16 where that is exact; all else is bfloat16 if it was, or float32. packed:
    two bits per ternary weight and a scale per group (None: per row), in compressed-tensors' pack-quantized layout.
    Tokenizer files come from the folder that the model was loaded from. The new folder appears whole or not at all;
    one that already holds something is refused (FileExistsError).
    """
    path, (source, raw) = Path(path), getattr(model, "origin", (None, {}))
    save_file, targets = _extra("safetensors.torch").save_file, _is_target(model)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists and is not an empty folder; name another, or remove it")
    quantized = {name + ".weight" for name, module in model.named_modules() if targets(name, module)}
    tensors = {}
    for name, p in model.named_parameters():  # without a tied head
        w = p.detach().cpu()
        if name in quantized and packed:
            try:
                codes, gamma = pack_ternary(w.float(), group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            size = torch.tensor(w.shape)
            tensors |= {name + "_packed": codes, name + "_scale": _narrowest(gamma), name + "_shape": size}
        else:
            tensors[name] = _narrowest(w) if name in quantized or w.dtype == torch.bfloat16 else w.float().contiguous()

    kept = {k: v for k, v in raw.items() if k not in ("quantization_config", "rope_parameters", "dtype")}
    wide = any(t.dtype == torch.float32 for t in tensors.values())
    shape = model.config_now()
    config = {"max_position_embeddings": 2048, **kept, **dataclasses.asdict(shape), "model_type": "llama",
              "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
              "torch_dtype": "float32" if wide else "bfloat16"}  # fmt: skip
    if packed:
        scheme = {"num_bits": 2, "type": "int", "symmetric": True, "dynamic": False,
                  "strategy": "group" if group_size else "channel", "group_size": group_size}  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=path.name + ".", suffix=".tmp", dir=path.parent) as aside:
            made = Path(aside) / path.name
            made.mkdir()
            for pattern in ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*",
                            "generation_config.json"):  # fmt: skip
                for file in source.glob(pattern) if source else ():
                    shutil.copy(file, made)
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
            del tensors
            again = _json(made / "config.json")
            same = _hugging_face_config(again, path) == shape
            written = _hugging_face_tensors(made, _pack_group(again, path))
            for name, p in model.named_parameters():
                if not same or not torch.equal(written[name][1]().float(), p.detach().cpu().float()):
                    raise RuntimeError(f"{name} reads back differently from what was written; {path} was not made")
            os.replace(made, path)
    except (RuntimeError, ValueError):
        raise
    except Exception as error:  # a full disk has several names
        raise OSError(f"{path} was not made: {error}") from None
    return path


def _narrowest(w):
    """In bfloat16 if that is exact, else in float32."""
    narrow = w.bfloat16()
    return (narrow if torch.equal(narrow.to(w.dtype), w) else w.float()).contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# The loop, nanoGPT style: Algorithm 1 with AdamW, warm-up-stable-decay, clipping, accumulation, and a log


class Diverged(RuntimeError):
    """The loss or the gradient stopped being finite; the weights are those before the step that the message names."""


def learning_rate(t, T, peak, warmup=0.05, decay=0.1, final=0.1):
    """Warm-up-stable-decay (Table 5): up over the first 5 % of T steps, to a tenth at T over the last 10 %, linearly.

    >>> [round(learning_rate(t, 100, 1.0), 2) for t in (0, 4, 50, 90, 99)]
    [0.2, 1.0, 1.0, 1.0, 0.19]
    """
    up = min(1.0, (t + 1) / max(1.0, warmup * T))
    left = min(1.0, (T - t) / max(1.0, decay * T)) if t >= (1 - decay) * T else 1.0
    return peak * up * (final + (1 - final) * left)


def param_groups(parameters, weight_decay, scales=()):
    """AdamW's two groups: matrices with weight decay, vectors and learned scales without."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [*(p for p in parameters if p.dim() < 2), *scales], "weight_decay": 0.0},
    ]


def batch_at(tokens, step, batch_size, block_size, seed):
    """The batch of a step: a function of (seed, step) alone, so that every method sees the same and a resumed run too.

    tokens: (N,). Returns inputs and targets, (batch_size, block_size) each, the targets one token further.
    """
    if len(tokens) <= block_size:
        raise ValueError(f"the text has {len(tokens)} tokens; a block of {block_size} and its target need one more")
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    start = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
    start = start.to(tokens.device, non_blocking=True)
    window = tokens[start + torch.arange(block_size + 1, device=tokens.device)].long()  # (batch_size, block_size + 1)
    return window[:, :-1], window[:, 1:]


def _precision(device):
    """bf16 autocast on CUDA, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size=32):
    """Eq. (3) on held-out text: mean loss in nats per token over disjoint blocks, each predicting all but its first.

    Under `with qat.hard():` or after `harden()` this is J(W), the loss of the quantized model.
    """
    if block_size < 2:
        raise ValueError(f"a block of {block_size} tokens predicts nothing; expected at least 2")
    device = next(model.parameters()).device
    whole = len(tokens) // block_size * block_size
    pieces = list(tokens[:whole].view(-1, block_size).split(batch_size)) if whole else []  # (<= batch_size, block_size)
    if len(tokens) - whole > 1:
        pieces.append(tokens[None, whole:])  # the shorter last block
    total = count = 0
    for piece in pieces:
        ids = piece.to(device).long()
        with _precision(device):
            total += model(ids[:, :-1], ids[:, 1:]).double() * ids[:, 1:].numel()
        count += ids[:, 1:].numel()
    if not count:
        raise ValueError(f"{len(tokens)} tokens hold no block to evaluate; expected at least 2")
    return float(total / count)


def train(model, tokens, *, steps, batch_size, block_size, lr, qat=None, micro_batches=1, weight_decay=0.1,
          clip=1.0, clip_at="effective", seed=0, log_every=50, val=None, eval_every=0, on_step=None,
          loss_fn=None, name="training", save=None, state=None, shard_optimizer=False):  # fmt: skip
    """Algorithm 1 with everything around it. Returns the log, a list of records (README says how to read one).

    model(x, y) -> mean loss, such as a Llama's. tokens: (N,), on the device that should gather batches. qat: a Hestia
    around this model for the same steps, or None for plain training. batch_size: sequences per step, in micro_batches
    equal parts. clip: bound on the gradient norm, taken with dL/dW_eff (clip_at="effective") or with dL/dW ("latent").
    loss_fn(model, x, y): another loss than model(x, y), such as `distillation(teacher)`.
    val: tokens on which the hard weights are evaluated every eval_every steps. on_step(t, record or None): called after
    each step. name: of the run, for Diverged: a step whose loss or gradient is not finite changes no weight, and it is
    raised before the next one (at once on a CPU; a GPU never waits for the host to look).

    save(t, state): called after each step; state() is all that determines the rest of the run, as a dict of tensors and
    numbers to write before the next step. Such a state goes on from there, to the same bits: state=torch.load(...).

    In several processes (torchrun), wrap the model in DistributedDataParallel after Hestia(...): each takes its share
    of the batch, in micro_batches parts; RuntimeError if they do not start and end with the same bits. shard_optimizer:
    each keeps only its share of AdamW's state (ZeroRedundancyOptimizer).
    """
    several = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    if batch_size % (micro_batches * world):
        parts = micro_batches * world
        raise ValueError(f"a batch of {batch_size} sequences does not split into {parts} equal micro-batches")
    if world > 1 and not hasattr(model, "no_sync"):
        raise ValueError("several processes train one model only if it is wrapped in DistributedDataParallel; wrap it")
    if clip_at not in ("effective", "latent"):
        raise ValueError(f"clip_at is {clip_at!r}; expected 'effective' or 'latent'")
    if qat and qat.total_steps != steps:
        raise ValueError(f"{steps} steps, but the method's schedules are for {qat.total_steps}; make the two the same")
    device = next(model.parameters()).device
    trained = qat.parameters() if qat else list(model.parameters())
    groups = qat.param_groups(weight_decay) if qat else param_groups(trained, weight_decay)
    settings = {"lr": lr, "betas": (0.9, 0.95), "fused": True}
    if shard_optimizer and several:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    _check_alike(trained, qat, world, name)
    pinned = lambda x: x.pin_memory() if device.type == "cuda" != x.device.type else x  # sent without a wait
    norm = lambda parameters: torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    codes, log, rest = qat.codes() if qat else {}, [], qat.rest if qat else trained
    late = None  # the step before, whose loss and gradient norm are on their way to the host

    def check(t, loss, norm):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"{name}: loss {loss}, gradient norm {norm} at step {t} of {steps}; lower the learning rate "
                           "or look at the data")  # fmt: skip

    began = last = warm = time.perf_counter()
    peak, first = torch.zeros((), device=device), 0  # the largest gradient norm since the last record; the first step
    if state:
        first, log, peak = state["step"], list(state["log"]), state["peak"].to(device)
        codes = {k: code.to(device) for k, code in state["codes"].items()}
        optimizer.load_state_dict(state["optimizer"])
        if hasattr(optimizer, "optim"):  # ZeroRedundancyOptimizer leaves the steps on the CPU, and a copy of the rest
            for kept in optimizer.optim.state.values():
                kept["step"] = kept["step"].to(device)
            optimizer.state.clear()
        with torch.no_grad():
            for p, kept in zip(rest, state["rest"]):
                p.copy_(kept)
        if qat:
            qat.load_state_dict(state["qat"])
        _random_state(device, state["random"])
        began -= state["seconds"]
    last_t, start = first - 1, last

    def everything():
        if late:  # a step that diverged must not be forgotten
            late[2].synchronize()
            check(late[0], *late[1].tolist())
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()  # all shares to the first process, which writes them
        kept = optimizer.state_dict() if rank == 0 else None
        return {"step": t + 1, "log": log, "codes": codes, "peak": peak, "optimizer": kept,
                "rest": [p.detach() for p in rest], "qat": qat.state_dict() if qat else None,
                "random": _random_state(device), "seconds": time.perf_counter() - began}  # fmt: skip

    for t in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, steps, lr)
            if qat and qat.quantizer.settings.get("spectra"):  # Spectra's recipe: a lower peak, then no decay
                group["lr"] *= 0.69 if 2 * t >= steps else 1.0
                group["weight_decay"] *= 0.0 if 3 * t >= 2 * steps else 1.0
        if qat:
            qat.relax(t)
        x, y = (pinned(part.chunk(world)[rank]).to(device, non_blocking=True)
                for part in batch_at(tokens, t, batch_size, block_size, seed))  # fmt: skip
        loss = 0.0
        for k, (x_, y_) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches))):
            averaging = world == 1 or k == micro_batches - 1  # the gradients of all processes, once per step
            with contextlib.nullcontext() if averaging else model.no_sync():
                with _precision(device):
                    part = (loss_fn(model, x_, y_) if loss_fn else model(x_, y_)) / micro_batches  # Eq. (11), a sample
                part.backward()
            loss = loss + part.detach()
        if world > 1:
            dist.all_reduce(loss.div_(world))

        effective_norm = norm(model.parameters())  # with dL/dW_eff for the quantized weights
        if qat:
            qat.pull_back()
        clipped_norm = effective_norm if clip_at == "effective" else norm(trained)
        if late:
            late[2].synchronize()  # no wait: the GPU has this step queued behind that one
            check(late[0], *late[1].tolist())
        record = late = None
        peak = torch.maximum(peak, effective_norm)
        evaluating = val is not None and eval_every and ((t + 1) % eval_every == 0 or t == steps - 1)
        recording = evaluating or t % log_every == 0 or t == steps - 1
        if recording or device.type != "cuda" or (qat and qat.quantizer.after_step):
            check(t, float(loss), float(clipped_norm))
        else:
            late = t, torch.stack([loss, clipped_norm]).to("cpu", non_blocking=True), torch.cuda.Event()
            late[2].record()
        if recording:
            record = {"step": t, "loss": float(loss), "lr": optimizer.param_groups[0]["lr"],
                      "grad_norm": float(effective_norm), "grad_norm_max": float(peak),
                      "grad_norm_latent": float(norm(trained))}  # fmt: skip
            peak = torch.zeros_like(peak)
        # clip (pull_back is linear: as well after it) and guard within AdamW's own pass over the gradients: it divides
        # them by grad_scale, and does nothing where found_inf is 1
        fused = getattr(optimizer, "optim", optimizer)  # inside of ZeroRedundancyOptimizer
        fused.grad_scale = ((clipped_norm + 1e-6) / clip).clamp(min=1.0).float()
        fused.found_inf = 1.0 - torch.isfinite(loss + clipped_norm).float()
        optimizer.step()
        optimizer.zero_grad()
        if qat:
            qat.after_step(t, optimizer.param_groups[0]["lr"])

        if record is not None:
            if qat:
                now = qat.codes()
                changed = float(sum((now[k] != codes[k]).sum() for k in now))
                record["flips"], codes = changed / sum(c.numel() for c in now.values()), now
                if qat.quantizer.soft:
                    taus = [qat.step_of(t, k).tau for k in now]
                    record |= {"p": qat.step_of(t, next(iter(now))).p, "tau_min": min(taus), "tau_max": max(taus)}
            clock = time.perf_counter()
            warm = clock if t == first else warm  # that step may have compiled for a minute: no measure of the others
            record["tokens_per_s"] = (t - last_t) * batch_size * block_size / (clock - last)
            record["seconds"] = clock - began
            record["seconds_left"] = (clock - (warm if t > first else start)) / max(t - first, 1) * (steps - t - 1)
            if evaluating:
                with qat.hard() if qat else contextlib.nullcontext():
                    record["val_loss_hard"] = evaluate(model, val, block_size)
            last, last_t = time.perf_counter(), t
            log.append(record)
        if on_step:
            on_step(t, record)
        if save:
            save(t, everything)
    _check_alike(trained, qat, world, name)
    return log


def _random_state(device, state=None):
    """The states of torch's generators, on the CPU and on the GPU in use; or put them back."""
    if state:
        torch.set_rng_state(state[0])
        if len(state) > 1 and device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _check_alike(tensors, qat, world, name):
    """RuntimeError unless all processes hold the same bits, scores and temperature."""
    if world > 1:
        sums = [int(x.detach().flatten().view(torch.int16).sum(dtype=torch.int64)) for x in tensors]
        everywhere, mine = [None] * world, (sums, qat and (qat.scores, qat.tau_init))
        dist.all_gather_object(everywhere, mine)
        if any(other != mine for other in everywhere):
            raise RuntimeError(f"{name}: the processes hold different weights or scores; give all the same seed and "
                               "files")  # fmt: skip


@torch.no_grad()
def generate(model, ids, new_tokens, block_size, temperature=0.8, top_k=None, generator=None):
    """Continue ids (B, T) by new_tokens samples from at most block_size tokens of context. temperature 0: greedy.

    A Llama keeps the keys and values of the context, as long as it grows: each step then computes one token only.
    """
    cache = [] if isinstance(model, Llama) else None
    for n in range(new_tokens):
        growing = cache is not None and ids.shape[1] <= block_size  # a window that slides moves every position
        given = (ids if n == 0 else ids[:, -1:], None, cache) if growing else (ids[:, -block_size:],)
        with _precision(ids.device):
            logits = model(*given)[:, -1].float()  # (B, V)
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -math.inf)
            probs = torch.softmax(logits, -1).cpu()  # drawn on the CPU: the same text on every device, up to rounding
            new = torch.multinomial(probs, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, new], 1)
    return ids
