"""The checks of hestia.py and train_tiny.py, each against something independent: numbers worked by hand, plain autograd
in float64, dense matrices, Algorithm 1 written out naively, transformers' Llama.

    python -m pytest                    # all of it, and the worked examples in the docstrings; 1 to 2 minutes
    python -m pytest -k lemma           # one topic

Tests that need transformers or hypothesis are skipped without it (pip install ".[test]" brings them).
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import hestia as h
import plots
import train_tiny

torch.set_num_threads(1)  # these models are so small that a second thread only waits

W = [-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]  # the worked example: mean|w| = 0.583333
G = [1.0, -2.0, 3.0, 0.5, -1.0, 2.0]  # dL/dH for its backward passes
CODEBOOKS = [h.TERNARY, h.BINARY, h.TWO_BIT]
ONE = torch.ones(1, 1, dtype=torch.float64)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# 3.1 scale, quantizer, STE, dead zone


def test_absmean_scale_by_hand():
    assert h.absmean_scale(f64(W), eps=0.0).item() == pytest.approx(3.5 / 6, abs=1e-15)
    assert h.absmean_scale(f64(W), eps=0.5).item() == pytest.approx(3.5 / 6 + 0.5)  # epsilon is added
    w = f64([[1.0, 3.0, 0.0, 0.0], [-2.0, 2.0, 5.0, -7.0]])
    gamma = h.absmean_scale(w, group_size=2)
    torch.testing.assert_close(gamma, f64([[2.0], [0.0], [2.0], [6.0]]), rtol=0, atol=2e-8)
    assert not h.absmean_scale(w.requires_grad_()).requires_grad
    assert h.absmean_scale(w.half()).dtype == torch.float32


def test_quantize_by_hand():
    g = 3.5 / 6
    torch.testing.assert_close(h.quantize(f64(W)), g * f64([-1, -1, -1, 0, 1, 1]), rtol=0, atol=1e-7)
    torch.testing.assert_close(h.quantize(f64(W), codebook=h.BINARY), g * f64([-1, -1, -1, 1, 1, 1]), rtol=0, atol=1e-7)
    expected = g * f64([-1.5, -1.5, -0.5, 0.5, 0.5, 1.5])
    torch.testing.assert_close(h.quantize(f64(W), codebook=h.TWO_BIT), expected, rtol=0, atol=1e-7)


def test_ties_go_to_zero_for_ternary_and_up_elsewhere():
    w = f64([-0.5, 0.5, -1.5, 1.5])
    assert h.quantize(w, scale=ONE).tolist() == [0, 0, -1, 1]
    assert h.quantize(f64([0.0]), codebook=h.BINARY, scale=ONE).tolist() == [1]
    assert h.quantize(f64([-1.0, 0.0, 1.0]), codebook=h.TWO_BIT, scale=ONE).tolist() == [-0.5, 0.5, 1.5]
    for codebook in CODEBOOKS:  # H at tau = 0 settles ties in the same way, whether tau is a float or a tensor
        for tau in (0.0, torch.tensor(0.0)):
            w = f64([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 0.2])
            H = h.soft_quantize(w, tau, codebook=codebook, scale=ONE)
            assert torch.equal(H, h.quantize(w, codebook=codebook, scale=ONE))
            assert torch.equal(h.soft_quantize_jacobian(w, tau, codebook=codebook, scale=ONE), torch.zeros_like(w))
            assert h.assignment_probs(w, tau, codebook=codebook, scale=ONE).sum(-1).tolist() == [1.0] * 8


def test_groups_run_along_the_input_dimension():
    w = randn(6, 8)
    by_hand = torch.cat([h.quantize(w[:, k : k + 4].reshape(6, 4)[r : r + 1]) for r in range(6) for k in (0, 4)])
    torch.testing.assert_close(h.quantize(w, group_size=4).reshape(12, 4), by_hand)


@pytest.mark.parametrize("group_size", [5, 7, 0, -2, 16])
def test_group_size_that_does_not_fit_is_named(group_size):
    with pytest.raises(ValueError, match=rf"group size {group_size} does not divide the input dimension 12; \d+ would"):
        h.quantize(randn(3, 12), group_size=group_size)
    with pytest.raises(ValueError, match="4 would"):
        h.absmean_scale(randn(3, 12), group_size=5)


def test_integers_and_unsorted_codebooks_are_refused():
    for f in (h.quantize, h.absmean_scale, lambda w: h.soft_quantize(w, 0.3), lambda w: h.assignment_probs(w, 0.3)):
        with pytest.raises(TypeError, match=r"weights are torch.int64; expected floating-point"):
            f(torch.tensor([1, 0, -3]))
    with pytest.raises(ValueError, match="in ascending order"):
        h.quantize(torch.ones(3), codebook=(1, 0, -1))


def test_a_scale_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\); expected one row per group, \(3, 1\)"):
        h.soft_quantize(randn(3, 4), 0.3, group_size=4, scale=torch.ones(2, 1))


def test_a_given_scale_is_held_constant():
    w, scale = torch.ones(3, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    for f in (h.quantize, lambda w, **k: h.soft_quantize(w, 0.3, **k), lambda w, **k: h.assignment_probs(w, 0.3, **k)):
        assert torch.autograd.grad(f(w, scale=scale).sum(), scale, allow_unused=True) == (None,)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_ste_has_the_value_of_Q_and_the_gradient_of_identity(codebook):
    w = randn(5, 8, dtype=torch.float32).requires_grad_()
    out = h.quantize_ste(w, group_size=4, codebook=codebook)
    assert torch.equal(out, h.quantize(w, group_size=4, codebook=codebook))  # to the last bit
    g = randn(5, 8, seed=1, dtype=torch.float32)
    out.backward(g)
    assert torch.equal(w.grad, g)


def test_dead_zone_by_hand():
    w, dw = f64([-1.0, 0.25, 0.25, 0.9, 0.1]), f64([0.4, 0.3, 0.2, -0.5, -0.7])  # gamma = 0.5: boundaries at +-0.25
    assert h.dead_zone(w, dw).tolist() == [True, False, False, True, False]  # 0.25 is a tie, hence code 0
    w, dw = torch.tensor([0.498]).bfloat16(), torch.tensor([0.0036]).bfloat16()
    assert h.dead_zone(w, dw, scale=torch.ones(1, 1)).tolist() == [False]  # their sum is rounded in bfloat16, not here
    w = f64([0.0, 1.0, 2.0])  # gamma = 1, and stays that of w, though w + dw has another mean
    assert h.dead_zone(w, f64([0.4, 5.0, 5.0])).tolist() == [True, True, True]


# ----------------------------------------------------------------------------------------------------------------------
# 3.2 the softmax kernel


def test_golden_numbers_of_the_worked_example():
    w = f64(W).requires_grad_()
    H = h.soft_quantize(w, 0.3)
    expected = [-0.583315, -0.566624, -0.305056, 0.052186, 0.452133, 0.582776]
    torch.testing.assert_close(H, f64(expected), rtol=0, atol=1e-6)
    H.backward(f64(G))
    gradient = f64([0.000207, -0.371013, 5.011491, 0.339050, -1.163293, 0.012728])
    torch.testing.assert_close(w.grad, gradient, rtol=0, atol=1e-5)
    J = [0.000207, 0.185507, 1.670497, 0.678100, 1.163293, 0.006364]
    torch.testing.assert_close(h.soft_quantize_jacobian(f64(W), 0.3), f64(J), rtol=0, atol=1e-5)
    for tau, out in {
        0.350886: [-0.583252, -0.555994, -0.302225, 0.065465, 0.432770, 0.581808],
        0.1: [-0.583333, -0.583318, -0.333052, 0.000815, 0.569454, 0.583333],
        0.0: [-0.583333, -0.583333, -0.583333, 0.0, 0.583333, 0.583333],
    }.items():
        torch.testing.assert_close(h.soft_quantize(f64(W), tau), f64(out), rtol=0, atol=1e-6)
    half = [-0.891658, -0.583312, -0.302528, 0.076093, 0.426066, 0.741388]
    torch.testing.assert_close(h.effective_weight(f64(W), 0.3, 0.5), f64(half), rtol=0, atol=1e-6)


def test_the_question_about_w_at_0_3():  # mu = .274, Var = .254, J = 1.015 at tau = 0.5
    pi = h.assignment_probs(f64([0.3]), 0.5, scale=ONE)[0]
    mu = pi[2] - pi[0]
    assert mu.item() == pytest.approx(0.274, abs=5e-4)
    assert (pi[0] + pi[2] - mu**2).item() == pytest.approx(0.254, abs=5e-4)
    assert h.soft_quantize_jacobian(f64([0.3]), 0.5, scale=ONE).item() == pytest.approx(1.015, abs=5e-4)


def plain_H(w, tau, codebook, gamma):
    """Eqs. (7) and (8) as printed, by torch.softmax over a stacked codebook; autograd does the rest."""
    q = f64(codebook)
    pi = torch.softmax(-((w[..., None] / gamma - q) ** 2) / tau, -1)
    return gamma * (pi * q).sum(-1), pi


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("tau", [0.02, 0.3, 2.0])
def test_kernel_and_lemma_4_1_against_the_printed_softmax(tau, codebook):
    w, gamma = (2 * randn(40)).requires_grad_(), 0.7
    H, pi = plain_H(w, tau, codebook, gamma)
    (J,) = torch.autograd.grad(H.sum(), w, create_graph=True)
    (dJ,) = torch.autograd.grad(J.sum(), w)
    ours = h.soft_quantize(w, tau, codebook=codebook, scale=gamma * ONE)
    (ours_J,) = torch.autograd.grad(ours.sum(), w, create_graph=True)
    (ours_dJ,) = torch.autograd.grad(ours_J.sum(), w)
    probs = h.assignment_probs(w, tau, codebook=codebook, scale=gamma * ONE)
    torch.testing.assert_close(probs, pi, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours, H, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours_J, J, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours_dJ, dJ, rtol=1e-7, atol=1e-8)
    q = f64(codebook)
    variance = (pi * q**2).sum(-1) - (pi * q).sum(-1) ** 2  # Eqs. (16) and (17)
    lemma = h.soft_quantize_jacobian(w, tau, codebook=codebook, scale=gamma * ONE)
    torch.testing.assert_close(lemma, 2 / tau * variance, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
def test_closed_forms(tau):
    z = 1.5 * randn(50)
    ternary = torch.sinh(2 * z / tau) / (torch.cosh(2 * z / tau) + 0.5 * math.exp(1 / tau))
    torch.testing.assert_close(h.soft_quantize(z, tau, scale=ONE), ternary, rtol=1e-10, atol=1e-12)
    binary = torch.tanh(2 * z / tau)
    torch.testing.assert_close(h.soft_quantize(z, tau, codebook=h.BINARY, scale=ONE), binary, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.1, 0.5, 2.0])
def test_gradcheck_and_gradgradcheck(tau, codebook):
    # on the boundaries to a fraction of tau, and in general position
    near = [b + c * tau for b in (-1.0, -0.5, 0.0, 0.5, 1.0) for c in (-0.4, 0.1, 0.7)]
    scale = f64([[1.0], [0.8], [1.3], [1.0], [0.9], [1.1]])
    w = (torch.cat([f64(near), 1.2 * randn(9)]).view(6, 4) * scale).view(3, 8).requires_grad_()
    J = h.soft_quantize_jacobian(w.detach(), tau, group_size=4, codebook=codebook, scale=scale)
    assert (tau * J > 0.1).sum() >= 3  # the boundaries are really met

    def H(w):
        return h.soft_quantize(w, tau, group_size=4, codebook=codebook, scale=scale)

    eps = 1e-3 * min(tau, 0.1)  # finite differences have to resolve the width tau
    assert gradcheck(H, (w,), eps=eps, atol=1e-4 / tau, rtol=1e-4)
    assert gradgradcheck(H, (w,), eps=eps, atol=1e-3 / tau**2, rtol=1e-3)

    def W_eff(w):
        return h.effective_weight(w, tau, 0.6, group_size=4, codebook=codebook, scale=scale)

    assert gradcheck(W_eff, (w,), eps=eps, atol=1e-4 / tau, rtol=1e-4)


def test_a_tau_of_one_dimension_zero_is_the_same_as_a_float():
    w = randn(4, 8).requires_grad_()
    for codebook in CODEBOOKS:
        a = h.effective_weight(w, 0.2, 0.7, 4, codebook)
        b = h.effective_weight(w, f64(0.2), f64(0.7), 4, codebook)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a.sum(), w), torch.autograd.grad(b.sum(), w))


def test_only_w_and_its_scales_are_saved_for_backward():
    w = torch.randn(64, 128, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        h.effective_weight(w, 0.3, 0.5, group_size=64)
    assert [t.data_ptr() == w.data_ptr() for t in seen if t.numel() == w.numel()] == [True]
    assert sum(t.numel() for t in seen) == w.numel() + 128


# ----------------------------------------------------------------------------------------------------------------------
# Section 4 and Appendix A


def test_lemma_4_1_by_central_differences():
    w, eps = 1.5 * randn(200), 1e-6
    for tau in (0.05, 0.3, 1.0):
        for codebook in CODEBOOKS:
            H = lambda w, t=tau, c=codebook: h.soft_quantize(w, t, codebook=c, scale=ONE)
            numeric = (H(w + eps) - H(w - eps)) / (2 * eps)
            torch.testing.assert_close(h.soft_quantize_jacobian(w, tau, codebook=codebook, scale=ONE), numeric,
                                       rtol=1e-5, atol=1e-6)  # fmt: skip


def bump(w):
    """A test function: smooth, zero outside (-2, 2), not symmetric."""
    inside = w.abs() < 2
    return torch.where(inside, torch.exp(-1 / (1 - (w / 2).clamp(-0.999999, 0.999999) ** 2)) * (1 + 0.5 * w), 0.0)


def integral(f, x):
    return torch.trapezoid(f, x).item()


def test_lemma_4_2_and_its_rate():
    gamma = 0.8
    w = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    b = f64([-gamma / 2, gamma / 2])  # Eq. (5)
    limit = gamma * bump(b).sum().item()  # Eq. (20)
    eps = 1e-4
    curvature = ((bump(b + eps) - 2 * bump(b) + bump(b - eps)) / eps**2).sum().item()
    errors = []
    for tau in (0.08, 0.04, 0.02, 0.01):
        J = h.soft_quantize_jacobian(w, tau, scale=gamma * ONE)
        errors.append(integral(J * bump(w), w) - limit)
        # near a boundary J is a logistic density of variance (pi gamma tau)^2 / 12, so the error starts with phi''
        assert errors[-1] == pytest.approx(gamma**3 * curvature * math.pi**2 * tau**2 / 24, rel=0.1)
    assert all(3.7 < a / b < 4.3 for a, b in zip(errors, errors[1:]))  # second order in tau
    mass = integral(h.soft_quantize_jacobian(w, 0.01, scale=gamma * ONE), w)
    assert mass == pytest.approx(2 * gamma, rel=1e-6)  # gamma at each boundary


def test_appendix_A1_equations_21_to_27():
    gamma, tau, q = 0.7, 0.4, f64(h.TERNARY)
    w = randn(30).requires_grad_()
    grad = lambda y, x: torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    close(grad(w / gamma, w), torch.full_like(w, 1 / gamma))  # (21)
    z = (w / gamma).detach().requires_grad_()
    a = torch.exp(-((z[:, None] - q) ** 2) / tau)  # (30, 3)
    Z = a.sum(1)
    pi = a / Z[:, None]
    mu, var = (pi * q).sum(1), (pi * q**2).sum(1) - (pi * q).sum(1) ** 2
    for k in range(3):
        close(grad(a[:, k], z), -2 * (z - q[k]) / tau * a[:, k])  # (22)
    close(grad(Z, z), -2 / tau * ((z[:, None] - q) * a).sum(1))  # (23)
    for k in range(3):
        sum_k = ((z[:, None] - q) * pi).sum(1)
        close(grad(pi[:, k], z), -2 / tau * pi[:, k] * (z - q[k]) + 2 / tau * pi[:, k] * sum_k)  # (24)
        close(sum_k, z - mu)
        close(grad(pi[:, k], z), 2 / tau * pi[:, k] * (q[k] - mu))  # (25)
    close(grad(mu, z), 2 / tau * var)  # (26)
    close(grad(h.soft_quantize(w, tau, scale=gamma * ONE), w), 2 / tau * var)  # (27), of our own H


def test_appendix_A2_equations_28_to_36():
    gamma, taus = 0.8, [0.2, 0.05, 0.0125]
    w = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    Q = gamma * ((w > gamma / 2).double() - (w < -gamma / 2).double())  # (28)
    off = (w.abs() - gamma / 2).abs() > 1e-9
    assert torch.equal(h.quantize(w, scale=gamma * ONE)[off], Q[off])
    z = w / gamma
    near = (Q / gamma)[:, None]
    for tau in taus:
        pi = h.assignment_probs(w, tau, scale=gamma * ONE)
        top = torch.where(near == f64(h.TERNARY), pi, 0).sum(1, keepdim=True)
        gap = (z[:, None] - f64(h.TERNARY)) ** 2 - (z[:, None] - near) ** 2
        torch.testing.assert_close((pi / top)[off], torch.exp(-gap / tau)[off], rtol=1e-9, atol=1e-15)  # (29)
    apart = (w.abs() - gamma / 2).abs() > 0.1
    assert (h.soft_quantize(w, 0.005, scale=gamma * ONE) - Q)[apart].abs().max() < 1e-9  # (30), (31)
    phi = bump(w)
    dphi = torch.gradient(phi, spacing=(w,))[0]
    minus_Q = -integral(Q * dphi, w)
    gaps = []
    for tau in taus:
        H = h.soft_quantize(w, tau, scale=gamma * ONE)
        left = integral(h.soft_quantize_jacobian(w, tau, scale=gamma * ONE) * phi, w)
        assert left == pytest.approx(-integral(H * dphi, w), abs=1e-6)  # (32), integration by parts
        assert (H.abs() <= gamma).all()  # the dominating function of (33)
        gaps.append(abs(-integral(H * dphi, w) - minus_Q))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]  # (33), (34): the integrals converge
    left, right = w < -gamma / 2, w > gamma / 2
    parts = -gamma * integral(dphi[left], w[left]) + gamma * integral(dphi[right], w[right])
    b = bump(f64([-gamma / 2, gamma / 2]))
    assert parts == pytest.approx((-gamma * b[0] - gamma * b[1]).item(), abs=1e-4)  # (35)
    assert integral(Q * dphi, w) == pytest.approx((-gamma * b.sum()).item(), abs=1e-4)  # (36)


# ----------------------------------------------------------------------------------------------------------------------
# extremes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_value_and_derivative_stay_finite(dtype, codebook):
    inputs = {
        "zeros": torch.zeros(8),
        "one giant": torch.tensor([3e4] + [1e-3] * 7),
        "all equal": torch.full((8,), 0.25),
        "tiny": torch.full((8,), 6e-8) * torch.tensor([1, -1, 2, 0, 1, 1, -3, 1]),
        "boundaries": torch.tensor([-0.5, 0.5, 0.5, -0.5, 1.0, -1.0, 0.0, 0.0]),
    }
    for name, w in inputs.items():
        for tau in (0.0, 1e-45, 1e-30, 1e-10, 1e-3, 1.0, 1e10, 1e30, math.inf):
            for scale in (None, torch.ones(2, 1)):
                w_ = w.to(dtype).requires_grad_()
                H = h.soft_quantize(w_, tau, group_size=4, codebook=codebook, scale=scale)
                H.sum().backward()
                J = h.soft_quantize_jacobian(w_, tau, group_size=4, codebook=codebook, scale=scale)
                pi = h.assignment_probs(w_, tau, group_size=4, codebook=codebook, scale=scale)
                where = (name, tau, scale is None)
                assert H.dtype == J.dtype == pi.dtype == dtype and w_.grad.dtype == dtype, where
                assert all(torch.isfinite(x).all() for x in (H, J, pi, w_.grad)) and (J >= 0).all(), where
                if tau <= 1e-10 and name != "boundaries" and scale is None:
                    z = w_.detach().double().reshape(2, 4) / h.absmean_scale(w_, 4)
                    distances = (z[..., None] - f64(codebook)).abs().sort().values  # (2, 4, K)
                    clear = (distances[..., 1] - distances[..., 0] > 1e-3).flatten()
                    Q = h.quantize(w_, group_size=4, codebook=codebook)
                    assert ((H - Q)[clear].abs() <= 1e-20).all(), where
                if tau >= 1e10:  # every code equally likely
                    assert H.abs().max() <= 1e-3 * (1 if scale is not None else h.absmean_scale(w_, 4).max()), where


def test_results_in_half_precision_are_the_rounded_float32_ones():
    for dtype in (torch.bfloat16, torch.float16):
        w = randn(4, 32, dtype=torch.float32).to(dtype)
        assert torch.equal(h.quantize(w, 8), h.quantize(w.float(), 8).to(dtype))
        for f in (h.soft_quantize, h.soft_quantize_jacobian):
            assert torch.equal(f(w, 0.3, 8), f(w.float(), 0.3, 8).to(dtype))
        mixed = h.effective_weight(w.float(), 0.3, 0.4, 8)
        assert torch.equal(h.effective_weight(w, 0.3, 0.4, 8), mixed.to(dtype))


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("tau", [0.0, 1e-9, 0.3])
def test_a_tau_in_half_precision_and_a_giant_z(tau, codebook):
    w = torch.tensor([0.5, -0.2, 3e38, -3e38], requires_grad=True)
    H = h.soft_quantize(w, torch.tensor(tau).half(), codebook=codebook, scale=torch.ones(1, 1))
    H.sum().backward()
    pi = h.assignment_probs(w, torch.tensor(tau).half(), codebook=codebook, scale=torch.ones(1, 1))
    assert all(torch.isfinite(x).all() for x in (H, w.grad, pi))
    assert H[2:].tolist() == [max(codebook), min(codebook)]


def test_empty_tensors_and_scalars():
    for shape in ((0,), (0, 8), (3, 0)):
        w = torch.zeros(shape, requires_grad=True)
        assert h.soft_quantize(w, 0.3).shape == h.quantize(w).shape == h.dead_zone(w, w).shape == shape
        h.soft_quantize(w, 0.3).sum().backward()
        assert h.assignment_probs(w, 0.3).shape == (*shape, 3)
    assert h.soft_quantize(torch.zeros(0, 8), 0.3, group_size=4).shape == (0, 8)
    assert h.quantize(torch.tensor(-2.0)).item() == pytest.approx(-2.0)
    with pytest.raises(ValueError, match="group size 2 does not divide the input dimension 1; 1 would"):
        h.quantize(torch.tensor(-2.0), group_size=2)


@pytest.mark.parametrize("tau", [-0.1, -math.inf, math.nan])
def test_a_tau_out_of_range_is_refused(tau):
    for f in (h.soft_quantize, h.soft_quantize_jacobian, h.assignment_probs):
        with pytest.raises(ValueError, match="expected a temperature >= 0"):
            f(torch.ones(2), tau)


# ----------------------------------------------------------------------------------------------------------------------
# schedules and tau_init


def test_schedules_by_hand():
    assert [h.pressure(t, 100, 0.2) for t in (0, 5, 10, 20, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert h.pressure(0, 100, 0.0) == 1.0 and h.pressure(50, 100, 1.0) == 0.5
    tau = lambda t, rho=0.2: h.base_temperature(t, 100, rho, 0.3)
    assert tau(0) == tau(20) == 0.3 and tau(60) == pytest.approx(0.15) and tau(100) == 0.0 == tau(120)
    assert tau(40) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    assert tau(99, 1.0) == 0.3 and tau(100, 1.0) == 0.0  # rho = 1 leaves no annealing
    assert tau(50, 0.0) == pytest.approx(0.15)
    # the last step of Algorithm 1 is t = T - 1: still soft, by about 2.5 tau_init / (T - T_comp)^2
    T = 10_000
    assert h.base_temperature(T - 1, T, 0.2, 0.3) == pytest.approx(math.pi**2 / 4 * 0.3 / (0.8 * T) ** 2, rel=1e-3)
    for s in (0.0, 0.3, 1.0):
        assert h.temperature(30, 100, 0.2, 0.3, s, 0.4) == pytest.approx(tau(30) * math.exp(0.4 * s))
    assert h.temperature(5, 100, 0.2, 0.3, 1.0, 0.4) == pytest.approx(0.3 * math.exp(0.4))  # already while compressing
    curve = [tau(t) for t in range(101)]
    assert all(a >= b for a, b in zip(curve, curve[1:]))


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan])
def test_a_rho_out_of_range_is_refused(rho):
    for f in (lambda: h.pressure(0, 10, rho), lambda: h.base_temperature(0, 10, rho, 0.3)):
        with pytest.raises(ValueError, match="rho between 0 and 1"):
            f()


def test_tau_init_minimises_the_squared_error():
    gaussian = randn(1 << 20, dtype=torch.float32)
    assert h.optimal_tau_init([gaussian]) == pytest.approx(0.3509, abs=0.004)
    weights = [randn(16, 32), 5 * randn(8, 32, seed=1) ** 3]  # in the weights' own units: the second tensor dominates
    for codebook in CODEBOOKS:
        best = h.optimal_tau_init(weights, 8, codebook)
        error = lambda tau, c=codebook: sum((h.soft_quantize(w, tau, 8, c) - w).square().sum() for w in weights).item()
        assert error(best) <= min(error(tau) for tau in np.geomspace(0.011, 9, 200)) * (1 + 1e-6)
    assert h.optimal_tau_init({"a": weights[0]}, 8) == h.optimal_tau_init(weights[0], 8)
    few, many = 3 * randn(2, 8) ** 3, randn(64, 64, seed=1)  # every weight counts alike, not every tensor
    assert h.optimal_tau_init([few, many], 8) == pytest.approx(h.optimal_tau_init(torch.cat([few.view(-1, 8),
                                                                                       many.view(-1, 8)]), 8))
    assert h.optimal_tau_init(f64([1e9, -1e9, 1e9])) < 0.02  # all on the grid already: as cold as the search goes
    assert 0 < h.optimal_tau_init([torch.zeros(4), torch.tensor([0.0, 1.0, 0.4])]) < 1  # some zeros are no harm
    for bad in ([], [torch.zeros(4)], [torch.tensor([1.0, math.nan]), torch.ones(2)]):
        with pytest.raises(ValueError, match="finite weights that are not all zero"):
            h.optimal_tau_init(bad)


# ----------------------------------------------------------------------------------------------------------------------
# 3.1 to 3.3 once more: properties that hold for whatever weights, groups, codebooks and temperatures

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    def for_all(test):
        """Run test(data) on examples that it draws itself, the same ones every time; a failing one is made small."""
        return settings(derandomize=True, deadline=None, database=None, max_examples=100)(given(data=st.data())(test))

except ImportError:
    for_all = pytest.mark.skip(reason='needs hypothesis; pip install ".[test]" brings it')


def some_weights(data, dtype=torch.float64):
    """w (rows, width) at any of 60 orders of magnitude, with zeros and likely ties, and a group size that fits."""
    rows, groups, g = (data.draw(st.integers(1, n)) for n in (3, 3, 6))
    number = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5]) | st.floats(-4, 4, width=32)
    numbers = data.draw(st.lists(number, min_size=rows * groups * g, max_size=rows * groups * g))
    decade = data.draw(st.integers(-4, 4) if dtype == torch.float16 else st.integers(-30, 30))
    w = (f64(numbers) * 10.0**decade).to(dtype).view(rows, groups * g)
    return w, data.draw(st.sampled_from([None, g]))


def some_tau(data, least=0.0):
    extreme = [tau for tau in (0.0, 1e-45, 1e-20, 1e20, math.inf) if tau >= least]
    return data.draw(st.sampled_from(extreme) | st.floats(-6, 2).map(lambda x: 10.0**x))


def one_of(data, *values):
    return data.draw(st.sampled_from(values))


def rows_of(w, group_size):
    """The groups of w as rows."""
    return w.reshape(-1, group_size or w.numel())


@for_all
def test_gamma_is_the_mean_of_absolute_values(data):
    w, g = some_weights(data, one_of(data, torch.float64, torch.float32, torch.bfloat16))
    gamma = h.absmean_scale(w, g)
    by_hand = [[math.fsum(map(abs, row)) / len(row) + 1e-8] for row in rows_of(w.double(), g).tolist()]
    assert gamma.dtype == (torch.float64 if w.dtype == torch.float64 else torch.float32)
    rtol = 1e-14 if gamma.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(gamma.double(), f64(by_hand), rtol=rtol, atol=0)


@for_all
def test_shapes_dtypes_and_bounds(data):
    dtype = one_of(data, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    (w, g), codebook, tau = some_weights(data, dtype), one_of(data, *CODEBOOKS), some_tau(data)
    leaf = w.clone().requires_grad_()
    H, Q, J = (f(leaf, *a, g, codebook) for f, a in
               ((h.soft_quantize, (tau,)), (h.quantize, ()), (h.soft_quantize_jacobian, (tau,))))  # fmt: skip
    pi = h.assignment_probs(leaf, tau, g, codebook)
    (gradient,) = torch.autograd.grad(H, leaf, torch.ones_like(H))
    for x in (H, Q, J, gradient):
        assert x.shape == w.shape and x.dtype == dtype and torch.isfinite(x).all()
    assert pi.shape == (*w.shape, len(codebook)) and pi.dtype == dtype and ((pi >= 0) & (pi <= 1)).all()
    assert ((pi.double().sum(-1) - 1).abs() <= 3 * torch.finfo(dtype).eps).all()
    most = (max(codebook) * h.absmean_scale(w, g)).to(dtype)  # the outer code, in the dtype of the results
    for x in (H, Q):
        assert (rows_of(x, g).abs() <= most).all()
    assert (J >= 0).all() and torch.equal(gradient, J)  # Eq. (19)


@for_all
def test_Q_is_the_nearest_code_and_H_at_tau_0(data):
    (w, g), codebook = some_weights(data), one_of(data, *CODEBOOKS)
    gamma = h.absmean_scale(w, g)
    Q = h.quantize(w, g, codebook)
    distance = (rows_of(w, g)[..., None] - gamma[..., None] * f64(codebook)).abs()  # (n_groups, g, K)
    assert (rows_of(w - Q, g).abs() <= distance.amin(-1) + 1e-15 * (gamma + rows_of(w, g).abs())).all()
    assert torch.equal(h.quantize(Q, g, codebook, scale=gamma), Q)
    for tau in (0.0, 0, torch.tensor(0.0)):
        assert torch.equal(h.soft_quantize(w, tau, g, codebook), Q)
        assert torch.equal(h.soft_quantize_jacobian(w, tau, g, codebook), torch.zeros_like(w))
    nearest = h.assignment_probs(w, 0.0, g, codebook)  # (rows, width, K), one 1 in each
    assert torch.equal(gamma * rows_of((nearest * f64(codebook)).sum(-1), g), rows_of(Q, g))


@for_all
def test_H_and_Q_rise_with_w(data):
    codebook, tau = one_of(data, *CODEBOOKS), some_tau(data)
    gamma = 10.0 ** data.draw(st.integers(-30, 30)) * ONE
    z = f64(sorted(data.draw(st.lists(st.floats(-3, 3), min_size=2, max_size=20))))
    z = torch.cat([z, z.nextafter(f64(9))]).sort().values  # and neighbours, as close as numbers can be
    H = h.soft_quantize(gamma[0] * z, tau, codebook=codebook, scale=gamma) / gamma[0]
    assert (H.diff() >= -1e-14).all()  # up to rounding
    Q = h.quantize(gamma[0] * z, codebook=codebook, scale=gamma) / gamma[0]
    assert (Q.diff() >= 0).all()


@for_all
def test_H_and_Q_are_odd(data):
    (w, g), codebook, tau = some_weights(data), one_of(data, *CODEBOOKS), some_tau(data, least=1e-45)
    gamma = h.absmean_scale(w, g)
    assert torch.equal(h.soft_quantize_jacobian(-w, tau, g), h.soft_quantize_jacobian(w, tau, g))
    for f in (lambda w: h.soft_quantize(w, tau, g), lambda w: h.quantize(w, g)):
        assert torch.equal(f(-w), -f(w))  # ternary: to the last bit, ties included
    z = rows_of(w, g) / gamma
    tie = torch.stack([(z - (a + b) / 2).abs() for a, b in zip(codebook, codebook[1:])]).amin(0) < 1e-9
    for f in (lambda w: h.soft_quantize(w, tau, g, codebook), lambda w: h.quantize(w, g, codebook)):
        odd = rows_of(f(-w) + f(w), g).abs() <= 1e-9 * gamma
        assert (odd | tie).all()


@for_all
def test_groups_know_nothing_of_each_other(data):
    dtype = one_of(data, torch.float64, torch.float32)
    (w, _), codebook, tau = some_weights(data, dtype), one_of(data, *CODEBOOKS), some_tau(data)
    g = w.shape[1]
    order = data.draw(st.permutations(range(len(w))))
    for f in (lambda w: h.quantize(w, g, codebook), lambda w: h.soft_quantize(w, tau, g, codebook),
              lambda w: h.soft_quantize_jacobian(w, tau, g, codebook),
              lambda w: h.assignment_probs(w, tau, g, codebook),
              lambda w: h.effective_weight(w, tau, 0.25, g, codebook),
              lambda w: h.dead_zone(w, w.abs() / 2, g, codebook)):  # fmt: skip
        assert torch.equal(f(w[order]), f(w)[order])  # rows permuted
        assert torch.equal(f(w[:1]), f(w)[:1])  # the others left out
        assert torch.equal(f(w.view(-1)), f(w).view(-1, *f(w).shape[2:]))  # in another shape


@for_all
def test_H_scales_with_w(data):
    (w, g), codebook, tau = some_weights(data), one_of(data, *CODEBOOKS), some_tau(data)
    c = 2.0 ** data.draw(st.integers(-60, 60))  # exact in floating point
    gamma = h.absmean_scale(w, g)
    for f in (h.soft_quantize, lambda w, tau, *a, **k: h.effective_weight(w, tau, 0.75, *a, **k)):
        assert torch.equal(f(c * w, tau, g, codebook, scale=c * gamma), c * f(w, tau, g, codebook, scale=gamma))
    for f in (h.soft_quantize_jacobian, h.assignment_probs):
        assert torch.equal(f(c * w, tau, g, codebook, scale=c * gamma), f(w, tau, g, codebook, scale=gamma))
    assert torch.equal(h.absmean_scale(c * w, g, eps=c * 1e-8), c * gamma)


@for_all
def test_dead_zone_is_where_Q_stays(data):
    (w, g), codebook = some_weights(data), one_of(data, *CODEBOOKS)
    share = f64(data.draw(st.lists(st.floats(-2, 2), min_size=w.numel(), max_size=w.numel()))).view_as(w)
    gamma = h.absmean_scale(w, g)
    dw = (rows_of(share, g) * gamma).view_as(w)
    same = h.quantize(w + dw, g, codebook, scale=gamma) == h.quantize(w, g, codebook, scale=gamma)
    assert torch.equal(h.dead_zone(w, dw, g, codebook), same)
    assert h.dead_zone(w, torch.zeros_like(w), g, codebook).all()
    assert torch.equal(h.quantize_ste(w, g, codebook), h.quantize(w, g, codebook))


@for_all
def test_effective_weight_lies_between_W_and_H(data):
    (w, g), codebook, tau = some_weights(data), one_of(data, *CODEBOOKS), some_tau(data)
    H = h.soft_quantize(w, tau, g, codebook)
    p = data.draw(st.floats(0, 1))
    mixed = h.effective_weight(w, tau, p, g, codebook)
    slack = 1e-15 * (w.abs() + H.abs())
    assert (mixed >= torch.minimum(w, H) - slack).all() and (mixed <= torch.maximum(w, H) + slack).all()
    assert torch.equal(h.effective_weight(w, tau, 0.0, g, codebook), w)
    assert torch.equal(h.effective_weight(w, tau, 1.0, g, codebook), H)
    assert torch.equal(h.effective_weight(w, tau, f64(p), g, codebook), h.effective_weight(w, tau, p, g, codebook))


@for_all
def test_pressure_and_temperature_are_monotone(data):
    T, rho = data.draw(st.integers(1, 10**7)), data.draw(st.floats(0, 1))
    tau_init, alpha = data.draw(st.floats(1e-6, 1e6)), data.draw(st.floats(-50, 50))
    some = sorted({0, T - 1, T, *data.draw(st.lists(st.integers(0, T), max_size=20))})
    p = [h.pressure(t, T, rho) for t in some]
    tau = [h.base_temperature(t, T, rho, tau_init) for t in some]
    assert p == sorted(p) and tau == sorted(tau, reverse=True)
    assert all(0 <= x <= 1 for x in p) and all(0 <= x <= tau_init for x in tau)
    assert p[-1] == 1.0 and tau[-1] == 0.0 and tau[-2] > 0 and tau[0] == tau_init
    for t, p_t, tau_t in zip(some, p, tau):
        assert (p_t == 1.0) == (t >= rho * T)
        assert t > rho * T or t == T or tau_t == tau_init  # no cooling while compressing
        low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
        cool, warm = (h.temperature(t, T, rho, tau_init, s, alpha) for s in (low, high))
        assert cool <= warm if alpha >= 0 else cool >= warm
        assert h.temperature(t, T, rho, tau_init, 0.0, alpha) == tau_t


@for_all
def test_scores_keep_the_order_of_the_traces(data):
    traces = dict(enumerate(data.draw(st.lists(st.floats(-30, 30).map(lambda x: 10.0**x), min_size=1, max_size=8))))
    kappa, c = data.draw(st.floats(0, 10)), 10.0 ** data.draw(st.integers(-30, 30))
    scores = h.sensitivity_scores(traces, kappa)
    assert list(scores) == list(traces) and all(0 <= s <= 1 for s in scores.values())
    order = sorted(traces, key=traces.get)
    assert [scores[k] for k in order] == sorted(scores.values())
    other = h.sensitivity_scores({k: c * x for k, x in reversed(traces.items())}, kappa)  # unit and order do not matter
    assert other == pytest.approx(scores, abs=1e-5)
    if len(traces) > 1:
        assert min(scores.values()) <= 0.5 <= max(scores.values())


def test_tau_init_does_not_depend_on_the_unit_of_the_weights():
    w = randn(64, 64)
    tau = h.optimal_tau_init(w, 8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for decade in (-5, 0, 10, 20, 30):  # below them epsilon is no longer small beside mean|w|
            assert h.optimal_tau_init((w * 10.0**decade).to(dtype), 8) == pytest.approx(tau, rel=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Hutch++ and scores


def symmetric(spectrum, seed=0):
    Q = torch.linalg.qr(randn(len(spectrum), len(spectrum), seed=seed)).Q
    return (Q * f64(spectrum)) @ Q.T


def test_hutchpp_is_exact_when_the_sketch_covers_the_range():
    H = symmetric([5.0, -3.0, 2.0, 0.5] + [0.0] * 46)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        trace = h.hutchpp(lambda V: H @ V, 50, rank=4, generator=generator, dtype=torch.float64)
        assert trace == pytest.approx(4.5, abs=1e-12)
    H = symmetric(np.linspace(-1, 3, 6))
    assert h.hutchpp(lambda V: H @ V, 6, rank=10, samples=1, dtype=torch.float64) == pytest.approx(6.0, abs=1e-12)
    assert h.hutchpp(lambda V: 0 * V, 6) == 0.0


def test_hutchpp_counts_its_products_and_repeats():
    counted, H = [], symmetric(np.linspace(0, 1, 60))
    f = lambda V: counted.append(V.shape[1]) or H @ V
    a = h.hutchpp(f, 60, 10, 20, torch.Generator().manual_seed(3), torch.float64)
    assert sum(counted) == 40
    assert a == h.hutchpp(f, 60, 10, 20, torch.Generator().manual_seed(3), torch.float64)
    with pytest.raises(ValueError, match="samples >= 1"):
        h.hutchpp(f, 60, samples=0)
    with pytest.raises(ValueError, match="rank >= 0"):
        h.hutchpp(f, 60, rank=-1)
    counted.clear()
    assert h.hutchpp(f, 60, rank=0, samples=1, dtype=torch.float64) != 0 and sum(counted) == 1  # Hutchinson's
    counted.clear()
    h.hutchpp(f, 60, dtype=torch.float64)
    assert sum(counted) == 40  # Table 5: 10 + 10 + 20


def test_estimates_say_how_sure_they_are():
    one, several = h._estimate(3.0, f64([3.0]), 7), h._estimate(2.0, f64([1.0, 3.0, 1.0, 3.0]), 4)
    assert one == (3.0, math.inf, True, 7)  # one reading has no spread
    assert several.stderr == pytest.approx((4 / 3 / 4) ** 0.5) and not several.flagged and several.products == 4
    flagged = [h._estimate(x, f64([-1.0, 1.0]), 2).flagged for x in (-2.1, -2.0, 0.0, 2.0, 2.1)]
    assert flagged == [False, True, True, True, False]
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    loss, params = lambda b: w.square().sum(), {"w": w, "unused": unused}
    for estimator in ("hutchpp", "joint"):
        told = []
        found = h.hessian_traces(loss, params, [0], estimator, 0, 1, progress=lambda *now, told=told: told.append(now))
        assert found == {"w": (6.0, math.inf, True, 1), "unused": (0.0, math.inf, True, 1)}
        assert told == ([(1, 2), (2, 2)] if estimator == "hutchpp" else [(1, 1)])
        assert {e.products for e in h.hessian_traces(loss, params, [0], estimator).values()} == (
            {2 * 3 + 20, 2 * 2 + 20} if estimator == "hutchpp" else {40})  # fmt: skip
    told = []
    found = h.fisher_traces(lambda b: torch.stack([w, -w]), params, [0, 1], progress=lambda *now: told.append(now))
    assert found["w"].value > 0 == found["unused"].value and found["w"].products == 20
    assert told == [(k, 40) for k in range(1, 41)]
    assert h.fisher_traces(lambda b: w.view(1, 3), params, [0], 1)["w"].stderr == math.inf


def bias_in_standard_errors(estimate, truth, seeds=3000):
    values = f64([estimate(torch.Generator().manual_seed(s)) for s in range(seeds)])
    return abs((values.mean() - truth) / (values.std() / seeds**0.5)).item()


def test_hutchpp_is_unbiased_and_its_mutants_are_not():
    H = symmetric([3.0 / k * (-1) ** (k % 3 == 0) for k in range(1, 31)])
    truth = H.trace().item()

    def variant(generator, over_m=True, independent=True, projected=True, r=3, m=4):
        sign = lambda k: (2 * torch.randint(0, 2, (30, k), generator=generator) - 1).double()
        S, Gm = sign(r), sign(m)
        if not independent:
            Gm = torch.cat([S, Gm[:, r:]], 1)
        Q = torch.linalg.qr(H @ S).Q
        Gm = Gm - Q @ (Q.T @ Gm) if projected else Gm
        return ((Q * (H @ Q)).sum() + (Gm * (H @ Gm)).sum() / (m if over_m else 1)).item()

    ours = lambda g: h.hutchpp(lambda V: H @ V, 30, 3, 4, g, torch.float64)
    assert bias_in_standard_errors(ours, truth) < 4
    assert bias_in_standard_errors(variant, truth) < 4
    assert bias_in_standard_errors(lambda g: variant(g, over_m=False), truth) > 4  # Eq. (12) to the letter
    assert bias_in_standard_errors(lambda g: variant(g, independent=False), truth) > 4
    assert bias_in_standard_errors(lambda g: variant(g, projected=False), truth) > 4


def test_hutchpp_beats_hutchinson_on_a_decaying_spectrum():
    spectrum = 1 / np.arange(1, 201) ** 2
    H, truth = symmetric(spectrum), spectrum.sum()

    def hutchinson(generator, products=40):
        G_ = (2 * torch.randint(0, 2, (200, products), generator=generator) - 1).double()
        return ((G_ * (H @ G_)).sum() / products).item()

    rms = lambda f: np.sqrt(np.mean([(f(torch.Generator().manual_seed(s)) - truth) ** 2 for s in range(60)]))
    assert 5 * rms(lambda g: h.hutchpp(lambda V: H @ V, 200, 10, 20, g, torch.float64)) < rms(hutchinson)


def slope(f, budgets):
    """Of log error against log products, by least squares; f(products, generator) -> an error."""
    rms = [np.sqrt(np.mean([f(m, torch.Generator().manual_seed(s)) ** 2 for s in range(80)])) for m in budgets]
    return np.polyfit(np.log(budgets), np.log(rms), 1)[0], rms[-1]


def test_hutchpp_converges_faster_than_hutchinson_where_the_spectrum_decays():
    k, budgets, n = np.arange(1, 401), (24, 48, 96, 192), 400
    errors = {}
    signs = np.where(np.random.default_rng(0).random(n) < 0.5, -1.0, 1.0)  # on the identity Hutchinson would be exact
    for name, spectrum in (("k^-1", 1 / k), ("k^-2", 1 / k**2), ("flat", signs)):
        H, truth = symmetric(spectrum), spectrum.sum()
        run = lambda rank, m, g, H=H: h.hutchpp(lambda V: H @ V, n, rank, m - 2 * rank, g, torch.float64)
        errors[name] = slope(lambda m, g, run=run, truth=truth: run(m // 4, m, g) - truth, budgets)
        errors[name, 0] = slope(lambda m, g, run=run, truth=truth: run(0, m, g) - truth, budgets)  # Hutchinson
    assert errors["k^-1"][0] < -1 and errors["k^-2"][0] < -1.6
    assert -0.75 < errors["flat"][0] < -0.25 and -0.75 < errors["k^-2", 0][0] < -0.25
    assert errors["k^-2"][1] < errors["k^-2", 0][1] and errors["flat"][1] > errors["flat", 0][1]  # there it loses


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, rope_theta=10000.0)  # fmt: skip
    model = h.Llama(h.LlamaConfig(**{**shape, **changes})).double()
    for p in model.parameters():  # livelier than the initialisation, so that curvature is everywhere
        p.data = p.data + 0.2 * torch.randn_like(p)
    return model


def test_traces_of_a_tiny_llama_against_the_dense_hessian():
    model = tiny_llama()
    params = h.Hestia(model, 1, method="full", group_size=None).weights
    ids = torch.randint(0, 17, (4, 9), generator=torch.Generator().manual_seed(1))
    batches = [ids[:2], ids[2:]]
    loss_fn = lambda batch: model(batch[:, :-1], batch[:, 1:])
    model.model.norm.weight.grad = marker = torch.ones(8).double()
    traces = h.hessian_traces(loss_fn, params, batches, rank=160, samples=1)  # the sketch covers every block
    few = h.hessian_traces(loss_fn, params, batches, generator=torch.Generator().manual_seed(0))
    assert model.model.norm.weight.grad is marker and all(w.grad is None for w in params.values())
    for name, w in params.items():

        def loss_of(flat, name=name, w=w):
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                out = functional_call(model, {name + ".weight": flat.view_as(w)}, (ids[:, :-1], ids[:, 1:]))
            return out

        exact = torch.autograd.functional.hessian(loss_of, w.detach().flatten()).trace().item()
        assert traces[name].value == pytest.approx(exact, abs=1e-10), name
        assert abs(few[name].value - exact) < 6 * few[name].stderr and few[name].products == 40, name


class Curved:
    """A trained tiny Llama, and the exact Hessian of all its quantized tensors together: unit vectors, float64."""

    def __init__(self):
        text = bytearray(train_tiny.standard_library()[0][:300_000])
        text = torch.frombuffer(text, dtype=torch.uint8).clamp(max=127)
        torch.manual_seed(0)
        self.model = h.Llama(h.LlamaConfig(
            vocab_size=128, hidden_size=12, intermediate_size=18, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, rope_theta=10000.0,
        ))  # fmt: skip
        h.train(self.model, text, steps=400, batch_size=16, block_size=64, lr=1e-2)
        self.model.double()
        self.params = h.Hestia(self.model, 1, method="full", group_size=None).weights
        self.weights, self.sizes = list(self.params.values()), [w.numel() for w in self.params.values()]
        self.batch = h.batch_at(text, 0, 6, 64, seed=99)
        self.loss_fn = lambda batch: self.model(*batch)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            self.grads = h._gradients(self.loss_fn, self.batch, self.weights)
        self.g = torch.cat([g.detach().flatten() for g in self.grads])
        self.H = torch.cat([self.rows(units) for units in torch.eye(len(self.g), dtype=torch.float64).split(16)])
        ends = np.cumsum(self.sizes)
        self.blocks = [self.H[e - n : e, e - n : e].contiguous() for e, n in zip(ends, self.sizes)]
        self.exact = torch.stack([B.trace() for B in self.blocks])

    def rows(self, units):  # (k, N) -> (k, N): torch's own batched backward pass, not the products that are tested
        vectors = [part.view(-1, *w.shape) for part, w in zip(units.split(self.sizes, 1), self.weights)]
        found = torch.autograd.grad(self.grads, self.weights, vectors, retain_graph=True, is_grads_batched=True)
        return torch.cat([Hv.flatten(1) for Hv in found], 1)

    def product(self, v):  # (N,) -> (N,)
        parts = [part.view_as(w) for part, w in zip(v.split(self.sizes), self.weights)]
        return torch.cat([Hv.flatten() for Hv in h._hessian_product(self.grads, self.weights, parts)])

    def joint(self, seeds, products):
        """The joint estimator on g . x + x . H x / 2 at x = 0, whose gradient and Hessian are this model's."""
        x = {name: torch.zeros(n, requires_grad=True) for name, n in zip(self.params, self.sizes)}
        g, H = self.g.float(), self.H.float()
        flat = lambda: torch.cat(list(x.values()))
        loss_fn = lambda _: g @ flat() + 0.5 * flat() @ (H @ flat())
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            yield list(h.hessian_traces(loss_fn, x, [0], "joint", 0, products, generator=generator).values())

    def per_tensor(self, seed, mutant=""):
        generator, out = torch.Generator().manual_seed(seed), []
        for B in self.blocks:
            if not mutant:
                out.append(h._hutchpp(lambda V, B=B: B @ V, len(B), 10, 20, generator, B.dtype, "cpu"))
                continue
            S, Gm = (h._signs((len(B), k), B, generator) for k in (10, 20))
            Q = torch.linalg.qr(B @ S).Q
            Gm = torch.cat([S, Gm[:, 10:]], 1) if mutant == "S in G" else Gm
            Gm = Gm if mutant == "G not projected" else Gm - Q @ (Q.T @ Gm)
            rest = (Gm * (B @ Gm)).sum() / (1 if mutant == "no 1/m" else 20)
            out.append(h.TraceEstimate(((Q * (B @ Q)).sum() + rest).item(), 0.0, False, 40))
        return out

    def worst_bias(self, values):
        """Distance of the mean over seeds from the exact trace in its standard errors, for the worst tensor."""
        return ((values.mean(0) - self.exact) / (values.std(0) / len(values) ** 0.5)).abs().max().item()

    def accuracy(self, values):
        """Root mean square relative error, and the mean Spearman correlation with the exact traces."""
        rank = lambda x: x.argsort().argsort().double().numpy()
        correlation = np.mean([np.corrcoef(rank(v), rank(self.exact))[0, 1] for v in values])
        return ((values - self.exact) / self.exact).square().mean().sqrt().item(), correlation


@pytest.fixture(scope="module")
def curved():
    return Curved()


def test_one_product_is_symmetric(curved):
    u, v = randn(2, len(curved.g), seed=5)
    assert abs(u @ curved.product(v) - v @ curved.product(u)) < 1e-10
    assert (curved.H - curved.H.T).abs().max() < 1e-12 and torch.allclose(curved.product(u), curved.H @ u, atol=1e-10)


def test_hutchpp_finds_the_traces_of_a_trained_llama_and_its_mutants_do_not(curved):
    estimates = [curved.per_tensor(seed) for seed in range(200)]
    values, errors = (f64([[getattr(e, what) for e in row] for row in estimates]) for what in ("value", "stderr"))
    assert curved.worst_bias(values) < 4
    rms, correlation = curved.accuracy(values)
    assert rms <= 0.05 and correlation >= 0.99 and estimates[0][0].products == 40
    assert 0.5 < ((values - curved.exact) / errors).square().mean() < 2  # the standard error means what it says
    for mutant in ("none", "no 1/m", "S in G", "G not projected"):
        values = f64([[e.value for e in curved.per_tensor(seed, mutant)] for seed in range(200)])
        assert (curved.worst_bias(values) > 4) == (mutant != "none"), mutant


def test_joint_probing_finds_them_with_40_products_in_all(curved):
    estimates = list(curved.joint(range(200), products=10))
    values, errors = (f64([[getattr(e, what) for e in row] for row in estimates]) for what in ("value", "stderr"))
    assert curved.worst_bias(values) < 4
    values40 = values.view(50, 4, -1).mean(1)  # the probes are independent: four times ten are forty
    errors40 = errors.view(50, 4, -1).square().mean(1).sqrt() / 2
    rms, correlation = curved.accuracy(values40)
    assert rms <= 0.15 and correlation >= 0.98
    assert 0.5 < ((values40 - curved.exact) / errors40).square().mean() < 2
    # without the scaling by gradient norms the same products say much less
    G = h._signs((len(curved.H), 2000), curved.H, torch.Generator().manual_seed(0))
    unscaled = torch.stack([t.sum(0) for t in (G * (curved.H @ G)).split(curved.sizes)], 1).view(50, 40, -1).mean(1)
    assert curved.worst_bias(unscaled) < 4 and curved.accuracy(unscaled)[0] > 1.3 * rms


def test_traces_by_real_products(curved):
    curved.weights[0].grad = marker = torch.ones_like(curved.weights[0])
    told = []
    run = lambda estimator, seed, params=curved.params: h.hessian_traces(
        curved.loss_fn, params, [curved.batch], estimator, generator=torch.Generator().manual_seed(seed),
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    joint = [run("joint", seed) for seed in (0, 1, 0)]
    assert joint[0] == joint[2] != joint[1] and told[:40] == [(k, 40) for k in range(1, 41)]
    few = dict(list(curved.params.items())[3:5])
    told.clear()
    hutchpp = run("hutchpp", 0, few)
    assert told == [(k, 80) for k in range(1, 81)] and hutchpp == run("hutchpp", 0, few)
    assert curved.weights[0].grad is marker and all(w.grad is None for w in curved.weights[1:])
    exact = dict(zip(curved.params, curved.exact.tolist()))
    for name, e in [*joint[0].items(), *joint[1].items(), *hutchpp.items()]:
        assert abs(e.value - exact[name]) < 5 * e.stderr and e.products == 40, name
        assert e.flagged == (abs(e.value) < 2 * e.stderr)


def test_a_trace_lost_in_its_error_is_flagged():
    a, b, B = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True), randn(8, 8).float()
    loss = lambda _: a @ B @ b + 50 * b.square().sum()  # no curvature in a, but much noise from b
    runs = [h.hessian_traces(loss, {"a": a, "b": b}, [0], "joint", generator=torch.Generator().manual_seed(s))
            for s in range(40)]  # fmt: skip
    assert sum(r["a"].flagged for r in runs) >= 35 and not any(r["b"].flagged for r in runs)
    assert all(r["a"].stderr > 0 for r in runs)


def test_joint_probing_of_two_batches_against_the_dense_hessian():
    model = tiny_llama()
    params = h.Hestia(model, 1, method="full", group_size=None).weights
    ids = torch.randint(0, 17, (4, 9), generator=torch.Generator().manual_seed(1))
    loss_fn = lambda batch: model(batch[:, :-1], batch[:, 1:])
    exact = h.hessian_traces(loss_fn, params, [ids], rank=160, samples=1)  # the sketch covers every block: dense
    generator = torch.Generator().manual_seed(0)
    joint = h.hessian_traces(loss_fn, params, [ids[:2], ids[2:]], "joint", 0, 400, generator=generator)
    for name in params:
        assert abs(joint[name].value - exact[name].value) < 4 * joint[name].stderr, name


def test_batches_are_averaged_one_graph_at_a_time():
    class Saved:  # what a graph keeps for its backward pass, and lets go when it goes
        def __init__(self, x):
            self.x = x
            saved.add(self)

    w, v = (torch.ones(3, requires_grad=True) for _ in range(2))
    saved, calls = weakref.WeakSet(), []

    def loss_fn(b):  # Hessian of w: diag(6 b^2); of v: 0, and its gradient vanishes too
        assert not saved, "the graph of an earlier batch is still there"
        calls.append(b)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.x):
            return (b**2 * w**3).sum() + (0 * v).sum()

    for estimator in ("hutchpp", "joint"):
        calls.clear()
        traces = h.hessian_traces(loss_fn, {"w": w, "v": v}, iter([1.0, 2.0, 3.0]), estimator)
        assert traces["w"].value == pytest.approx(18 * (1 + 4 + 9) / 3, rel=1e-5) and traces["v"].value == 0
        assert len(calls) == (12 if estimator == "hutchpp" else 3)  # twice per batch and tensor; once per batch


def test_fisher_traces_are_those_of_the_gauss_newton_matrix():
    model = tiny_llama()
    params = h.Hestia(model, 1, method="full", group_size=None).weights
    ids = torch.randint(0, 17, (2, 8), generator=torch.Generator().manual_seed(1))
    logits_fn = lambda ids: model(ids)
    seeded = lambda seed: torch.Generator().manual_seed(seed)
    run = lambda seed: h.fisher_traces(logits_fn, params, ids.split(1), 30, generator=seeded(seed))
    runs = [run(seed) for seed in range(60)]
    assert run(0) == runs[0] != runs[1]
    for name, w in params.items():
        logits_of = lambda w, name=name: functional_call(model, {name + ".weight": w}, (ids,)).flatten(0, 1)
        J = torch.autograd.functional.jacobian(logits_of, w.detach()).flatten(2)  # (T, V, d)
        pi = torch.softmax(model(ids).detach().flatten(0, 1), -1)  # (T, V)
        S = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]
        exact = torch.einsum("tvd,tvu,tud->", J, S, J).item() / len(pi)
        values, errors = f64([r[name].value for r in runs]), f64([r[name].stderr for r in runs])
        assert abs(values.mean() - exact) < 4 * values.std() / 60**0.5, name
        assert (values >= 0).all() and 0.5 < ((values - exact) / errors).square().mean() < 2, name
        assert runs[0][name].products == 30


def test_hessian_traces_refuse_what_they_cannot_do():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="unknown trace estimator 'magic'"):
        h.hessian_traces(lambda b: w.sum(), {"w": w}, [0], estimator="magic")
    with pytest.raises(ValueError, match="0 calibration batches and 1 tensors"):
        h.hessian_traces(lambda b: w.sum(), {"w": w}, [])
    with pytest.raises(ValueError, match=r"w is torch.bfloat16 .* a trace needs a tensor in float32 or float64"):
        h.hessian_traces(lambda b: w.sum(), {"w": w.bfloat16()}, [0])
    for loss in (lambda b: (3 * w).sum(), lambda b: torch.ones(1, requires_grad=True).sum()):
        for estimator in ("hutchpp", "joint"):
            assert h.hessian_traces(loss, {"w": w}, [0], estimator)["w"].value == 0.0  # linear in w, or without it
    with pytest.raises(ValueError, match="samples >= 1"):
        h.hessian_traces(lambda b: w.sum(), {"w": w}, [0], "joint", rank=0, samples=0)
    with pytest.raises(ValueError, match="1 calibration batches and 0 tensors"):
        h.hessian_traces(lambda b: w.sum(), {}, [0], "joint")
    with pytest.raises(ValueError, match="a number without a graph"):
        h.hessian_traces(lambda b: torch.ones(()), {"w": w}, [0])
    told = []  # of 3 weights a sketch of 10 takes 3 columns: the count ends where the work does
    h.hessian_traces(lambda b: w.pow(3).sum(), {"w": w}, [0, 1], progress=lambda *now: told.append(now))
    assert told[-1] == (52, 52)
    for size in (0.0, 1e-21):  # no gradient to speak of: the scaling must not overflow
        tiny = torch.full((3,), size, requires_grad=True)
        with torch.no_grad():
            traces = h.hessian_traces(lambda b, tiny=tiny: tiny.square().sum(), {"w": tiny}, [0], "joint")
        assert traces["w"].value == 6
    a, b = (h.hessian_traces(lambda b: (w * b).pow(2).sum(), {"w": w}, batches, rank=3)["w"].value
            for batches in ([1.0, 3.0], iter([1.0, 3.0])))  # fmt: skip
    assert a == pytest.approx(3 * (2 + 18) / 2, rel=1e-5) and b == pytest.approx(a, rel=1e-5)  # the mean over batches


def test_scores_by_hand():
    scores = h.sensitivity_scores({"a": 1.0, "b": 100.0})  # logs -+ln 10 around their mean: standardised to -+1
    assert scores["a"] == pytest.approx(1 / (1 + math.e)) and scores["b"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert h.sensitivity_scores({"a": 1.0, "b": 100.0}, kappa=2.0)["b"] == pytest.approx(1 / (1 + math.exp(-2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain numbers are trusted
        assert h.sensitivity_scores({"a": 3.0}) == {"a": 0.5}
    assert h.sensitivity_scores({"a": 1.0, "b": 100.0}, kappa=1e4) == {"a": 0.0, "b": 1.0}
    assert h.sensitivity_scores({"a": 0.1, "b": 0.1, "c": 0.1}) == pytest.approx(dict.fromkeys("abc", 0.5), abs=1e-6)


def test_traces_that_are_not_positive():
    with pytest.warns(UserWarning, match=r"not positive, or lost in its error, for n: floored at 1\b"):
        scores = h.sensitivity_scores({"a": 2.0, "b": 200.0, "n": -42.5})
    half_the_smallest = {"a": 2.0, "b": 200.0, "n": 1.0}  # and not 42.5
    assert scores == pytest.approx(h.sensitivity_scores(half_the_smallest))
    noise = h.TraceEstimate(1e-6, 1.0, True, 40)  # positive by luck: does not drag the floor down
    with pytest.warns(UserWarning, match="for noise: floored at 1 "):
        floored = h.sensitivity_scores({"a": h.TraceEstimate(2.0, 0.1, False, 40), "b": 200.0, "noise": noise})
    assert floored == pytest.approx(h.sensitivity_scores({"a": 2.0, "b": 200.0, "noise": 1.0}))
    with pytest.warns(UserWarning, match="no Hessian trace is two standard errors above zero"):
        h.sensitivity_scores({"noise": noise, "more": h.TraceEstimate(2.0, 3.0, True, 40)})
    with pytest.raises(ValueError, match=r"no Hessian trace is positive.* more tokens, or use fisher"):
        h.sensitivity_scores({"a": -1.0, "b": 0.0})
    with pytest.raises(ValueError, match="not finite for b"):
        h.sensitivity_scores({"a": 1.0, "b": math.nan})


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def stacked_H(w, tau, gamma):
    """Eq. (8) for groups: w (n_groups, g), gamma (n_groups, 1)."""
    q = f64(h.TERNARY)
    pi = torch.softmax(-((w[..., None] / gamma[..., None] - q) ** 2) / tau, -1)  # (n_groups, g, 3)
    return gamma * (pi * q).sum(-1)


def naive_algorithm_1(model, batches, T, alpha, scores, tau_init, lr, group_size, micro_batches):
    """Algorithm 1 as printed: a forward per micro-batch through Eqs. (7)-(9), plain autograd, no relax or pull_back."""
    latents = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    quantized = {n + ".weight" for n in scores}
    optimizer = torch.optim.AdamW(h.param_groups(latents.values(), 0.1), lr=lr, betas=(0.9, 0.95))
    losses, gradients = [], []
    for t in range(T):
        T_comp = 0.2 * T
        p = min(1.0, t / T_comp)
        base = tau_init if t < T_comp else tau_init / 2 * (1 + math.cos(math.pi * (t - T_comp) / (T - T_comp)))
        total = 0.0
        for x, y in zip(batches[t][0].chunk(micro_batches), batches[t][1].chunk(micro_batches)):
            effective = {}
            for name, w in latents.items():
                if name in quantized:
                    tau = base * math.exp(alpha * scores[name.removesuffix(".weight")])
                    gamma = w.detach().reshape(-1, group_size).abs().mean(1, keepdim=True) + 1e-8
                    H = stacked_H(w.reshape(-1, group_size), tau, gamma)
                    effective[name] = (1 - p) * w + p * H.view_as(w)
                else:
                    effective[name] = w
            loss = functional_call(model, effective, (x, y)) / micro_batches
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append({name: w.grad.clone() for name, w in latents.items()})
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, latents


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_algorithm_1_equals_its_naive_form(micro_batches):
    T, group_size = 12, 4
    model = tiny_llama()
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 17, (T, 4, 9), generator=generator)
    batches = [(b[:, :-1], b[:, 1:]) for b in ids]
    names = list(h.Hestia(model, 1, method="full", group_size=None).weights)
    scores = {name: k / len(names) for k, name in enumerate(names)}
    expected, gradients, latents = naive_algorithm_1(
        copy.deepcopy(model), batches, T, 0.4, scores, 0.3, 1e-2, group_size, micro_batches
    )

    qat = h.Hestia(model, T, group_size=group_size, scores=scores, tau_init=0.3)
    optimizer = torch.optim.AdamW(qat.param_groups(0.1), lr=1e-2, betas=(0.9, 0.95))
    trained = dict(model.named_parameters()) | {name + ".weight": w for name, w in qat.latents.items()}
    assert len(qat.parameters()) == len(trained) == len(latents)
    losses = []
    for t in range(T):
        qat.relax(t)
        total = 0.0
        for x, y in zip(batches[t][0].chunk(micro_batches), batches[t][1].chunk(micro_batches)):
            loss = model(x, y) / micro_batches
            loss.backward()
            total += loss.item()
        qat.pull_back()
        for name, w in trained.items():
            torch.testing.assert_close(w.grad, gradients[t][name], rtol=1e-8, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses == pytest.approx(expected, abs=1e-11)
    for name, w in trained.items():
        torch.testing.assert_close(w.detach(), latents[name].detach(), rtol=1e-8, atol=1e-10)
    qat.harden()
    for name, w in qat.weights.items():
        Q = h.quantize(qat.latents[name].detach(), group_size)
        assert torch.equal(w.sign(), Q.sign())  # the codes are Q's
        assert ((w - Q).abs() <= 0.004 * Q.abs()).all()  # the scales are Q's, rounded to bfloat16
        assert torch.equal(w, w.bfloat16().double())


def test_relax_and_pull_back_gradients_are_those_of_eq_19():
    model = tiny_llama()
    qat = h.Hestia(model, 10, group_size=8, tau_init=0.2, method="hestia-no-hessian")
    x = torch.randint(0, 17, (2, 6))
    qat.relax(1)
    weights = {name: w.detach().clone() for name, w in qat.weights.items()}
    model(x, x).backward()
    upstream = {name: w.grad.clone() for name, w in qat.weights.items()}
    qat.pull_back()
    for name, w in qat.latents.items():
        tau, p = h.temperature(1, 10, 0.2, 0.2, 0.0, 0.0), h.pressure(1, 10, 0.2)
        torch.testing.assert_close(weights[name], h.effective_weight(w.detach(), tau, p, 8))
        J = (1 - p) + p * h.soft_quantize_jacobian(w.detach(), tau, 8)
        torch.testing.assert_close(w.grad, upstream[name] * J)
        assert qat.weights[name].grad is None
    with pytest.raises(RuntimeError, match=r"call relax\(t\)"):
        qat.pull_back()


def test_hard_shows_Q_and_puts_everything_back():
    model = tiny_llama()
    qat = h.Hestia(model, 10, group_size=8)
    qat.relax(3)
    x = torch.randint(0, 17, (2, 6))
    model(x, x).backward()
    before = {name: (w.detach().clone(), w.grad.clone()) for name, w in qat.weights.items()}
    with pytest.raises(KeyError), qat.hard() as shown:
        assert shown is model
        for w in qat.weights.values():
            assert all(len(group.abs().unique()) <= 2 for group in w.detach().reshape(-1, 8))
        with qat.hard():
            pass
        raise KeyError  # what goes wrong inside must not leave the hard weights behind
    for name, w in qat.weights.items():
        assert torch.equal(w.detach(), before[name][0]) and torch.equal(w.grad, before[name][1])
    qat.pull_back()  # still possible: nothing was recomputed
    with qat.hard():
        hard = model(x, x).item()
    qat.harden()
    assert model(x, x).item() == hard


def test_what_the_name_of_a_method_fixes_and_what_else_holds_by_default():
    make = lambda method, **more: h.Hestia(nn.Linear(256, 2), 10, **{"method": method, "tau_init": 0.3, **more})
    tau = lambda method, scores: make(method, scores=scores).step_of(0, "").tau
    assert tau("hestia-no-hessian", {"": 1.0}) == 0.3 == tau("hestia", None)
    assert tau("hestia", {"": 1.0}) == pytest.approx(0.3 * math.exp(0.4))
    for method, codebook in {"hestia": h.TERNARY, "hestia-no-hessian": h.TERNARY, "hestia-binary": h.BINARY,
                             "hestia-2bit": h.TWO_BIT}.items():  # fmt: skip
        qat = make(method, tau_init=None)
        assert qat.codebook == codebook and qat.tau_init == h.optimal_tau_init(qat.latents, 128, codebook) > 0
        assert qat.step_of(0, "").group_size == 128 and qat.step_of(1, "").p == 0.5  # Table 5: groups of 128, rho = 0.2
        assert qat.latents[""].data_ptr() != qat.weights[""].data_ptr()  # a copy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make("absmean", rho=1.0, tau_init=None).tau_init == 0.0  # has no tau to anneal
        assert make("hestia", alpha=-50.0).alpha == -50.0
    with pytest.raises(ValueError, match=r"alpha is 50\.5; expected a number between -50 and 50"):
        make("hestia", alpha=50.5)
    with pytest.raises(ValueError, match=r"a sensitivity score is outside 0 \.\. 1"):
        make("hestia", scores={"": 1.01})
    with pytest.raises(ValueError, match="in ascending order"):
        make("hestia", codebook=(1.0, 0.0))
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    with pytest.raises(ValueError, match="tequila gives every layer a bias; 0 has one, or shares its weight"):
        h.Hestia(nn.Sequential(a, b), 10, method="tequila", group_size=4)


def test_codes_by_hand():
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data = torch.tensor([W, [0.0] * 6])
    codes = lambda method, **own: codes_of(h.Hestia(layer, 10, method=method, group_size=6, tau_init=0.3), own)

    def codes_of(qat, own):
        for name, value in own.items():
            qat.own[""][name].data.fill_(value)
        (code,) = qat.codes().values()
        assert code.dtype == torch.bfloat16 and code[1].unique().numel() == 1  # a group of zeros is no trouble
        return code[0].tolist()

    for method in ("absmean", "hestia", "full"):
        assert codes(method) == [-1, -1, -1, 0, 1, 1]
    assert codes("hestia-2bit") == [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5]
    # other grids: in halves of the group's largest. TWN keeps |w| > 0.408, so DLT's levels here are -0.7, 0.3 and 1.3
    assert codes("twn") == [-2, -2, 0, 0, 0, 2]
    assert codes("dlt", scale=1.0, shift=0.3) == [-1, -1, 0, 0, 0, 2]
    assert codes("dlt", scale=1.0, shift=-0.3) == [-2, -2, 0, 0, 0, 1]


def test_relax_comes_before_pull_back_and_frozen_weights_are_trained():
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer.weight.grad = torch.ones(4, 4)
    qat = h.Hestia(layer, 10, group_size=4)
    assert layer.weight.requires_grad and layer.weight.grad is None
    for spoil in (lambda: None, qat.harden, lambda: qat.load_state_dict(qat.state_dict())):
        spoil()
        with pytest.raises(RuntimeError, match=r"call relax\(t\)"):
            qat.pull_back()
        qat.relax(0)
    layer(torch.ones(4)).sum().backward()
    qat.pull_back()
    assert qat.latents[""].grad is not None and not qat.state_dict()["latents"][""].requires_grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hardened_weights_are_no_view_of_the_latents(dtype):
    layer = nn.Linear(4, 4, bias=False)
    qat = h.Hestia(layer, 10, method="full", group_size=4, dtype=dtype)
    qat.harden()
    assert torch.equal(layer.weight, qat.latents[""]) and layer.weight.data_ptr() != qat.latents[""].data_ptr()


def test_which_layers_are_quantized():
    tied, untied = tiny_llama(), tiny_llama(tie_word_embeddings=False)
    for model in (tied, untied):
        names = list(h.Hestia(model, 1, method="full", group_size=None).weights)
        assert len(names) == 14 and not any("lm_head" in name or "embed" in name for name in names)
    only = h.Hestia(tied, 1, targets=lambda name, module: name.endswith("up_proj"), group_size=4)
    assert list(only.weights) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight  # two layers, one weight: one latent
    shared = h.Hestia(nn.Sequential(a, b), 1, group_size=4, dtype=torch.bfloat16)
    assert len(shared.latents) == 1 and a.weight is b.weight and a.weight.dtype == torch.bfloat16
    assert len(shared.parameters()) == 3  # one latent, two biases
    decayed, free = shared.param_groups(0.1)
    assert len(decayed["params"]) == 1 and len(free["params"]) == 2 and free["weight_decay"] == 0


def test_latents_are_float32_and_effective_weights_in_the_chosen_dtype():
    model = tiny_llama().float()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    qat = h.Hestia(model, 10, group_size=4, dtype=torch.bfloat16)
    for name, w in qat.latents.items():
        assert torch.equal(w.detach(), original[name + ".weight"]) and qat.weights[name].dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32
    qat.relax(0)
    for w in qat.weights.values():
        w.grad = torch.ones_like(w)
    qat.pull_back()
    assert all(w.grad.dtype == torch.float32 for w in qat.latents.values())


def test_hestia_refuses_bad_input():
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 3))
    bad = lambda **k: h.Hestia(model, **{"total_steps": 10, "group_size": 4, **k})
    with pytest.raises(ValueError, match="unknown method 'magic'; expected one of full, absmean"):
        bad(method="magic")
    with pytest.raises(ValueError, match="0: group size 5 does not divide the input dimension 12; 4 would"):
        bad(group_size=5)
    with pytest.raises(ValueError, match="rho between 0 and 1"):
        bad(rho=2.0)
    with pytest.raises(ValueError, match="expected T > 0"):
        bad(total_steps=0)
    with pytest.raises(ValueError, match=r"codebook is \(1.0, 0.0\); expected at least two codes, in ascending order"):
        bad(codebook=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"a sensitivity score is outside 0 \.\. 1"):
        bad(scores={"0": 0.5, "1": 1e9})
    with pytest.raises(ValueError, match="targets chose the model, which has no weight"):
        bad(targets=lambda name, module: True)
    with pytest.raises(ValueError, match=r"relax\(10\): expected a step from 0 to 9"):
        bad().relax(10)
    for tau in (-0.3, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive temperature"):
            bad(tau_init=tau)
    with pytest.raises(ValueError, match="alpha is nan"):
        bad(alpha=math.nan)
    with pytest.raises(ValueError, match="no sensitivity score for 1;"):
        bad(scores={"0": 0.5})
    with pytest.raises(ValueError, match="nothing to quantize"):
        h.Hestia(nn.Sequential(nn.ReLU()), 10)
    with pytest.warns(UserWarning, match="rho = 1"):
        bad(rho=1.0)
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the weights of 1 hold NaN"):
        bad()


@pytest.mark.parametrize("method", ["absmean", "hestia", "hestia-binary", "hestia-2bit"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hardened_weights_are_exactly_on_their_grid(method, dtype):
    model = tiny_llama().float()
    qat = h.Hestia(model, 4, method=method, group_size=8, dtype=dtype)
    qat.harden()
    assert train_tiny.on_grid(qat) == 1.0
    for name, w in qat.weights.items():
        assert model.get_submodule(name).weight is w
        gamma = h.absmean_scale(qat.latents[name], 8).bfloat16().float()
        ratio = w.detach().float().reshape(-1, 8) / gamma
        assert set(ratio.unique().tolist()) <= set(qat.codebook)


def test_names_of_wrapped_models():
    class Wrapped(nn.Module):  # as DDP does
        def __init__(self, module):
            super().__init__()
            self.module = module

    plain = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(plain)
    for model in (plain, Wrapped(plain), compiled, torch.compile(Wrapped(plain)), Wrapped(compiled)):
        assert list(h.Hestia(model, 4, group_size=4).weights) == ["0"]


def test_state_dict_round_trip():
    model = tiny_llama()
    qat = h.Hestia(model, 10, group_size=8, scores={n: 0.3 for n in h.Hestia(model, 1, group_size=8).weights})
    with torch.no_grad():
        for w in qat.latents.values():
            w.add_(1.0)
    other = h.Hestia(tiny_llama(seed=1), 10, group_size=8)
    other.load_state_dict(qat.state_dict())
    assert other.scores == qat.scores and other.tau_init == qat.tau_init
    assert all(torch.equal(other.latents[n], w) for n, w in qat.latents.items())
    with pytest.raises(ValueError, match="of method 'hestia'"):
        h.Hestia(tiny_llama(), 10, group_size=8, method="absmean").load_state_dict(qat.state_dict())


needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++ compiler")


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("group_size", [None, 8, "row"])
def test_slopes_are_what_autograd_finds_in_the_printed_formulas(codebook, group_size):
    w, G = randn(6, 16, seed=1), randn(6, 16, seed=2)
    g = w.shape[-1] if group_size == "row" else group_size
    gamma, q = h.absmean_scale(w, g), f64(codebook)
    for p, tau in ((0.0, 0.3), (0.4, 0.3), (0.4, 0.02), (1.0, 0.3), (1.0, 1e-3)):
        x = w.clone().requires_grad_()
        z = (h._groups(x, g) / gamma).unsqueeze(-1)  # (n_groups, g, 1)
        H = gamma * (torch.softmax(-((z - q) ** 2) / tau, -1) * q).sum(-1)
        W_eff = (1 - p) * x + p * H.view_as(x)
        expected = torch.autograd.grad(W_eff, x, G)[0]
        for numbers in ((p, tau), (f64(p), f64(tau))):
            s = h.Step(*numbers, g, codebook)
            torch.testing.assert_close(h._relax_hestia(w, s), W_eff.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(h.SLOPES[h._relax_hestia](w, s) * G, expected, rtol=1e-7, atol=1e-10)
            narrow = h.SLOPES[h._relax_hestia](w.float(), s) * G.float()
            torch.testing.assert_close(narrow.double(), expected, rtol=1e-3, atol=1e-3)
    for tau in (0.0, f64(0.0)):  # hard: dH/dw is 0, and the slope what is left of the identity
        s = h.Step(0.4, tau, g, codebook)
        assert torch.equal(h._relax_hestia(w, s), 0.6 * w + 0.4 * h.quantize(w, g, codebook))
        assert (h.SLOPES[h._relax_hestia](w, s) == 0.6).all()


@pytest.mark.parametrize("method", ["full", "absmean", "hestia", "hestia-2bit"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_closed_form_passes_equal_those_through_a_graph(method, dtype, monkeypatch):
    found = []
    for slopes in (h.SLOPES, {}):  # without its slope a method goes through autograd
        monkeypatch.setattr(h, "SLOPES", slopes)
        model = tiny_llama().float()
        qat = h.Hestia(model, 10, method=method, group_size=8, dtype=dtype)
        for t in (1, 7):
            qat.relax(t)
            assert all(effective is None for _, _, effective in qat.relaxed) == bool(slopes)
            for k, w in enumerate(list(qat.weights.values())[1:]):  # one that the loss does not reach
                w.grad = randn(*w.shape, seed=k).to(w.dtype)
            qat.pull_back()
            found.append([(w.detach().clone(), qat.latents[name].grad) for name, w in qat.weights.items()])
            assert qat.latents[next(iter(qat.weights))].grad is None
            assert all(w.grad is None for w in qat.weights.values())
    for closed, graph in zip(found[:2], found[2:]):
        torch.testing.assert_close(closed, graph)


def test_compiled_passes_equal_the_readable_ones_and_nothing_compiles_after_the_first_step(monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain_compile = torch.compile  # graphs are captured as for the default back end, and run without a C++ compiler
    monkeypatch.setattr(torch, "compile", lambda f, **kind: plain_compile(f, backend="aot_eager", **kind))
    config = h.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(0)
    model = h.Llama(config)
    twin, tokens, seen, steps = copy.deepcopy(model), torch.randint(0, 64, (2000,)), [], 8
    scores = {name: k / 14 for k, name in enumerate(h.Hestia(model, 1, group_size=16).weights)}

    def on_step(t, record):  # p, tau and the learning rate are others at every step
        seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))

    logs = []
    for module, compile in ((model, True), (twin, False)):
        qat = h.Hestia(module, steps, group_size=16, scores=scores, tau_init=0.3, compile=compile)
        fast = torch.compile(module) if compile else module
        logs.append(h.train(fast, tokens, steps=steps, batch_size=4, block_size=16, lr=1e-2, qat=qat, log_every=1,
                            micro_batches=2, on_step=on_step if compile else None))  # fmt: skip
    # the model, relax and pull_back for eight tensors of a shape, and for the six that remain: no graph after step 0
    assert seen[0] == (5, 0) and set(seen) == {seen[0]}
    for key in ("loss", "grad_norm", "grad_norm_latent", "tau_max"):
        assert [r[key] for r in logs[0]] == pytest.approx([r[key] for r in logs[1]], rel=1e-3)


@needs_compiler
def test_the_compiled_passes_keep_nothing_of_ws_size():
    from torch._inductor.utils import run_and_get_code

    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False), torch.nn.Linear(128, 256, bias=False))
    qat = h.Hestia(model, 4, group_size=64, tau_init=0.3, dtype=torch.bfloat16, compile=True)
    for work, result in ((lambda: qat.relax(1), ["bfloat16"]), (qat.pull_back, ["float32"] * 2)):
        _, codes = run_and_get_code(work)
        buffers = re.findall(r"empty_strided\w*\(\((.*?)\), .*?torch\.(\w+)\)", "".join(codes))
        large = [dtype for shape, dtype in buffers if math.prod(int(n) for n in shape.split(",") if n.strip()) > 1024]
        assert large == result  # one for both, and one each; the rest are scalars and one number per group
        for w in qat.weights.values():
            w.grad = torch.ones_like(w)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_that_starts_early_reads_nothing_early():
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))).cuda()
    plain = h.Hestia(copy.deepcopy(model), 40, tau_init=0.3)
    qat = h.Hestia(model, 40, tau_init=0.3, dtype=torch.bfloat16, compile=True)
    for t in range(40):
        found = []
        for own in (qat, plain):
            with torch.no_grad():
                torch._foreach_mul_(list(own.latents.values()), 0.9)
            own.relax(t)
            for w in own.weights.values():
                w.grad = w.detach()  # what pull_back reads at once is what relax's kernel, the one before, has written
            own.pull_back()
            found.append([w.grad for w in own.latents.values()])
        torch.testing.assert_close(*found, rtol=2e-2, atol=1e-5)


def test_stack_copies_only_what_does_not_lie_side_by_side():
    whole = randn(3, 4, 4)
    rows = list(whole)
    for tensors, same in ((rows, True), (rows[1:], True), (rows[1:2], True), (rows[::-1], False), (rows[::2], False),
                          ([rows[0], rows[1].clone()], False), ([rows[0], rows[0]], False),
                          ([rows[0], rows[1].T], False)):  # fmt: skip
        stack = h._stack(tensors)
        assert torch.equal(stack, torch.stack(tensors))
        assert (stack.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) == same


@needs_compiler
@pytest.mark.parametrize("group_size", [16, "row", None])
def test_compiled_passes_whatever_the_groups_and_wherever_the_latents_lie(group_size):
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(3)))
    scores = {"0": 0.0, "1": 0.5, "2": 1.0}
    plain = h.Hestia(copy.deepcopy(model), 9, group_size=group_size, tau_init=0.3, scores=scores)
    qat = h.Hestia(model, 9, group_size=group_size, tau_init=0.3, scores=scores, compile=True)
    for t in (1, 5, 8):
        for w, W in zip(qat.latents.values(), plain.latents.values()):
            if t == 8:  # no longer side by side
                w.data = W.data.clone()
            w.data.mul_(1.1)
            W.data.mul_(1.1)
        for own in (qat, plain):
            own.relax(t)
            for k, w in enumerate(own.weights.values()):
                w.grad = randn(32, 32, seed=k, dtype=torch.float32)
        torch.testing.assert_close([*qat.weights.values()], [*plain.weights.values()], rtol=1e-4, atol=1e-6)
        qat.pull_back()
        plain.pull_back()
        found = [[w.grad for w in own.latents.values()] for own in (qat, plain)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
        first = qat.latents["0"]  # side by side, or again so: the next relax copies nothing
        assert h._stack([w.detach() for w in qat.latents.values()]).data_ptr() == first.data_ptr()


@needs_compiler
def test_compiled_slopes():
    w, G = randn(6, 16, seed=1, dtype=torch.float32), randn(6, 16, seed=2, dtype=torch.float32)

    def both(p, tau):
        steps = [h.Step(p, tau, g, codebook) for g, codebook in ((None, h.TERNARY), (8, h.TERNARY), (8, h.TWO_BIT))]
        return [x for s in steps for x in (h._relax_hestia(w, s), G * h.SLOPES[h._relax_hestia](w, s))]

    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    for p, tau in ((0.0, 0.3), (0.4, 0.02), (1.0, 0.3), (1.0, 0.0)):
        with torch.no_grad():
            found = compiled(torch.tensor(p), torch.tensor(tau))
            torch.testing.assert_close(found, both(p, tau), rtol=1e-3, atol=1e-5)


@needs_compiler
def test_a_compiled_model_sees_the_effective_weights_and_a_changed_dtype():
    model = h.Llama(h.LlamaConfig(vocab_size=17, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    compiled, x = torch.compile(model), torch.randint(0, 17, (2, 8))
    compiled(x, x).backward()  # compiled for float32 weights first
    qat = h.Hestia(model, 4, group_size=16, dtype=torch.bfloat16, compile=True)
    plain = h.Hestia(copy.deepcopy(model), 4, group_size=16, tau_init=qat.tau_init)
    for t in range(3):
        qat.relax(t)
        plain.load_state_dict(qat.state_dict())
        plain.relax(t)
        for name, w in qat.weights.items():
            torch.testing.assert_close(w, plain.weights[name], rtol=1e-2, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(x, x)
            assert loss.item() == pytest.approx(model(x, x).item(), abs=0.02)
        loss.backward()
        qat.pull_back()
        with torch.no_grad():
            for w in qat.parameters():
                w -= 2 * w.grad


# ----------------------------------------------------------------------------------------------------------------------
# The other rows of the tables: the worked examples of each method's formula, forward and gradient

GAMMA = 3.5 / 6
ABSMEAN = [-GAMMA, -GAMMA, -GAMMA, 0, GAMMA, GAMMA]
ROWS = {  # method: (W_eff, dL/dW, {own: (start, dL/d own)}) at W with dL/dW_eff = G; None: not asked
    "absmean": (ABSMEAN, G, {}),
    "twn": ([-0.9, -0.9, 0, 0, 0, 0.9], G, {}),
    "lsq": ([-2 * GAMMA, -2 * GAMMA, 0, 0, 0, 2 * GAMMA], [0, -2, 3, 0.5, -1, 2], {"scale": (2 * GAMMA, 0.612372)}),
    "seq": ([-0.8, -0.8, 0, 0, 0, 0.8], [0, -2, 3, 0.5, -1, 2], {"scale": (1.2, 0.221135)}),
    "dlt": ([-0.85, -0.85, 0.05, 0.05, 0.05, 0.95], [0.9, -1.8, 3, 0.5, -1, 1.8],
            {"scale": (0.9, 3.0), "shift": (0.05, 3.5)}),
    "tequila": (ABSMEAN, G, {}),
    "int2": ([-0.875, -0.875, -0.875 / 3, 0.875 / 3, 0.875 / 3, 0.875], G, {}),
    "int2-absmax": ([-1.2, 0, 0, 0, 0, 1.2], G, {}),
    "llm-qat": ([-0.875, -0.875, -0.875 / 3, 0.875 / 3, 0.875 / 3, 0.875], G, {}),
    "bitnet": (ABSMEAN, G, {}),
    "dge": (ABSMEAN, [g * f for g, f in zip(G, [0, 0, 3, 0.279835, 0.441702, 0])], {}),
    "dsq": ([-GAMMA, -GAMMA, -0.303107, 0.066313, 0.432695, GAMMA],
            [g * f for g, f in zip(G, [0, 0, 1.371913, 0.848591, 1.167783, 0])], {}),
    "daq": (ABSMEAN, [g * f for g, f in zip(G, [0, 0, 0.582577, 0.405646, 0.463223, 0])], {}),
    "hestia": ([-0.583315, -0.566624, -0.305056, 0.052186, 0.452133, 0.582776],
               [0.000207, -0.371013, 5.011491, 0.339050, -1.163293, 0.012728], {}),
}  # fmt: skip


def step(method, tau=0.3, p=1.0):
    return h.Step(p, tau, None, h.QUANTIZERS[method].settings.get("codebook", h.TERNARY))


@pytest.mark.parametrize("method", ROWS)
def test_each_row_by_its_worked_example(method):
    value, gradient, own = ROWS[method]
    w = f64([W]).requires_grad_()
    learned = {k: torch.full((1, 1), start, dtype=torch.float64, requires_grad=True) for k, (start, _) in own.items()}
    out = h.QUANTIZERS[method].relax(w, step(method), **learned)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(f64([G]))
    assert torch.allclose(out, f64([value]), atol=1e-5) and torch.allclose(w.grad, f64([gradient]), atol=1e-5)
    for k, (_, expected) in own.items():
        assert learned[k].grad.item() == pytest.approx(expected, abs=1e-5), k


def test_other_starts_of_lsq_and_seq():
    for relax, scale, value, gradient, own in (
        (h.relax_lsq, GAMMA, ABSMEAN, [0, 0, 3, 0.5, -1, 0], 0.466569),
        (h.relax_lsq, 1.2, [-1.2, 0, 0, 0, 0, 1.2], G, 0.221135),
        (h.relax_seq, 0.8, [-1.6 / 3] * 3 + [0] + [1.6 / 3] * 2, [0, -2, 3, 0.5, -1, 0], -0.246650),
    ):
        w, s = f64([W]).requires_grad_(), f64([[scale]]).requires_grad_()
        out = relax(w, step("lsq"), s)
        out.backward(f64([G]))
        assert torch.allclose(out, f64([value]), atol=1e-5) and torch.allclose(w.grad, f64([gradient]), atol=1e-5)
        assert s.grad.item() == pytest.approx(own, abs=1e-5)


def test_scales_start_where_the_papers_say():
    w = f64([W])
    starts = {m: h.QUANTIZERS[m].init(w, step(m)) for m in ("lsq", "seq", "dlt")}
    assert starts["lsq"]["scale"].item() == pytest.approx(2 * GAMMA) and starts["seq"]["scale"].item() == 1.2
    assert starts["dlt"]["scale"].item() == pytest.approx(0.9) and starts["dlt"]["shift"].item() == 0


def test_tequila_moves_dead_weights_through_the_bias():
    w, x = f64([W]).requires_grad_(), f64([1.0, 2.0, -1.0, 0.5, 1.0, -2.0])
    weight, bias = h.relax_tequila(w, step("tequila"), strength=1e-3)  # the dead set is {0.1}
    y = weight @ x + bias
    assert y.item() == pytest.approx(-1.75 + 1e-4)
    y.backward()
    assert torch.allclose(w.grad, f64([[1, 2, -1, 0.501, 1, -2]]))


def test_fairy2i_is_lossless_in_complex_form_and_its_codes_are_units():
    for seed in range(5):
        R = randn(8, 14, seed=seed)
        assert torch.allclose(h.from_widely_linear(*h.widely_linear(R)), R, atol=1e-12)
        x = randn(14, seed=seed + 9)
        U, V = h.widely_linear(R)
        z = torch.complex(x[:7], x[7:])
        y = U @ z + V @ z.conj()
        assert torch.allclose(torch.cat([y.real, y.imag]), R @ x, atol=1e-12)
        C = h._phases(U, None)
        assert ((C.real == 0) != (C.imag == 0)).all()
        assert len(C.real.abs().unique()) == len(C.imag.abs().unique()) == 2  # zero, and one scale for each
    with pytest.raises(ValueError, match="odd side"):
        h.widely_linear(randn(3, 4))
    C = torch.complex(f64([-1.2, -0.3, 0.4]), f64([-0.6, 0.1, 0.9]))
    stages = {None: [([-0.75, -0.75, 0], [0, 0, 0.9]), ([-0.75, -0.325, 0.425], [-0.6, 0, 0.9])],
              0.3: [([-0.725048, -0.744198, 0.015701], [-0.029938, 0.006946, 0.881153]),
                    ([-0.840537, -0.330925, 0.429698], [-0.441072, 0.008253, 0.881316])]}  # fmt: skip
    for tau, expected in stages.items():
        total = torch.zeros_like(C)
        for real, imag in expected:
            total = total + h._phases(C - total, tau)
            assert torch.allclose(total, torch.complex(f64(real), f64(imag)), atol=1e-5), tau
    A = f64([[-1.2, -0.6], [-0.3, 0.1]])
    assert torch.allclose(h._fairy(A, None, 1), f64([[-1.2, 0], [0, 0.1]])) and torch.allclose(h._fairy(A, None, 2), A)


def test_cage_pulls_and_stochastic_rounding_has_the_right_mean():
    w = f64([W])
    h.pull_cage(w, step("cage"), 1e-3, 0.5)
    assert torch.equal(w, f64([W]))  # silent in the first four fifths
    h.pull_cage(w, step("cage"), 1e-3, 1.0)
    pull = [0.006167, 0.000167, -0.002833, -0.001, 0.001833, -0.003167]
    assert torch.allclose(w - f64([W]), f64([pull]), atol=1e-6)
    torch.manual_seed(0)
    proposal, mean = f64([[-0.5333, -0.6833, -0.3833, 0.3, -0.0167, 1.2833]]), 0
    for _ in range(4000):
        w = proposal.clone()
        h.round_stochastically(w, step("stochastic"), 0.0, 0.0, scale=f64([[GAMMA]]))
        assert all(min(abs(x - c * GAMMA) for c in (-1, 0, 1)) < 1e-9 for x in w[0].tolist())
        mean = mean + w / 4000
    expected = f64([[-0.5333, -GAMMA, -0.3833, 0.3, -0.0167, GAMMA]])
    assert (mean - expected).abs().max() < 4 * 0.5 * GAMMA / 4000**0.5


def test_learned_scales_have_no_weight_decay_and_are_kept_with_the_state():
    model = tiny_llama().float()
    qat = h.Hestia(model, 4, method="dlt", group_size=4)
    decayed, free = qat.param_groups(0.1)
    learned = {id(x) for own in qat.own.values() for x in own.values()}
    assert learned and learned <= {id(p) for p in free["params"]} and free["weight_decay"] == 0
    assert {id(p) for p in qat.parameters()} == {id(p) for group in (decayed, free) for p in group["params"]}
    qat.own["model.layers.0.mlp.up_proj"]["shift"].data += 1
    again = h.Hestia(tiny_llama().float(), 4, method="dlt", group_size=4)
    again.load_state_dict(qat.state_dict())
    assert (again.own["model.layers.0.mlp.up_proj"]["shift"] == 1).all()
    with pytest.raises(ValueError, match="tequila gives every layer a bias"):
        h.Hestia(tiny_llama(attention_bias=True).float(), 4, method="tequila", group_size=4)


def test_a_learned_scale_that_fell_to_its_floor_can_rise_again():
    for relax in (h.relax_lsq, h.relax_seq):
        scale = f64([[-1e-3]]).requires_grad_()
        relax(f64([W]), step("lsq"), scale).backward(f64([G]))
        assert scale.grad.abs() > 0.1


def test_methods_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match=r"dge has the codebook \(-1.0, 0.0, 1.0\), not \(-1.0, 1.0\)"):
        h.Hestia(tiny_llama(), 4, method="dge", group_size=4, codebook=h.BINARY)
    with pytest.raises(ValueError, match=r"0: a \(3, 4\) matrix has an odd side"):
        h.Hestia(nn.Sequential(nn.Linear(4, 3)), 4, method="fairy2i")
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="tequila gives every layer a bias; 1 has one"):
        h.Hestia(model, 4, method="tequila", group_size=4)
    assert model[0].bias is None  # nothing was changed on the way
    qat = h.Hestia(nn.Sequential(nn.Linear(4, 4)), 4, method="cage", group_size=4)
    qat.relax(0)
    qat.model(torch.ones(1, 4)).sum().backward()
    qat.pull_back()
    for act in (lambda: qat.relax(1), qat.harden):
        with pytest.raises(RuntimeError, match=r"call after_step\(t, lr\)"):
            act()
    qat.after_step(0, 1e-3)
    qat.relax(1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bias_of_tequila_is_that_of_the_weights_shown(dtype):
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.tensor([W])
    qat = h.Hestia(layer, 2, method="tequila", group_size=6, dtype=dtype)
    assert layer.bias is qat.biases[""] and layer.bias.dtype == layer.weight.dtype == (dtype or torch.float32)
    qat.relax(0)
    assert layer.bias.item() == pytest.approx(1e-4, rel=4e-3)
    qat.latents[""].data.mul_(2)
    with qat.hard():
        assert layer.bias.item() == pytest.approx(2e-4, rel=4e-3)
    assert layer.bias.item() == pytest.approx(1e-4, rel=4e-3)
    qat.harden()
    assert layer.bias.item() == pytest.approx(2e-4, rel=4e-3)


def test_tequila_in_bfloat16():
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    qat = h.Hestia(model, 2, method="tequila", group_size=4)
    qat.relax(0)
    model(torch.ones(1, 8).bfloat16()).sum().backward()
    qat.pull_back()
    assert qat.latents["0"].grad.dtype == torch.float32
    qat.harden()
    assert model(torch.ones(1, 8).bfloat16()).isfinite().all()


def test_recipes_and_distillation_do_what_they_say():
    logs = {m: {r["step"]: r for r in small_run(m, steps=20)[0]} for m in ("spectra", "bitnet", "absmean", "cage")}
    for t, r in logs["spectra"].items():
        assert r["lr"] == pytest.approx(logs["bitnet"][t]["lr"] * (0.69 if t >= 10 else 1))
    losses = {t: logs["cage"][t]["loss"] - logs["absmean"][t]["loss"] for t in (15, 17, 19)}
    assert losses[15] == losses[17] == 0 != losses[19]  # the pull begins after four fifths
    model = tiny_llama().float()
    ids = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = h.distillation(copy.deepcopy(model))
    assert loss(model, ids, None).abs() < 1e-6
    model.model.norm.weight.data *= 2
    assert loss(model, ids, None) > 0.01


def test_every_method_trains_hardens_and_reads_back(text, tmp_path):
    out, methods = tmp_path / "run", list(h.QUANTIZERS)
    arguments = ["--data", text, "--out", str(out), "--methods", "all", *TINY, "--steps", "6"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_tiny.main(arguments) == 0  # compares the loss before saving with the one after reading back
    table = json.loads((out / "results.json").read_text())["table"]
    assert len(methods) >= 20 and all(math.isfinite(table[m]["val"][0]) for m in methods)
    assert all(table[m]["on_grid"][0] == 1 for m in methods if m != "full" and not m.startswith("fairy2i"))
    bias = train_tiny.load_checkpoint(out / "tequila-seed0.pt").model.layers[0].mlp.up_proj.bias
    assert bias.abs().max() > 0


# ----------------------------------------------------------------------------------------------------------------------
# the model and the loop

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_those_of_transformers(tied, scaling, kv_heads):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=kv_heads, tie_word_embeddings=tied, rms_norm_eps=1e-5, head_dim=16)  # fmt: skip
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **shape, max_position_embeddings=256,
        rope_parameters={"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})},
    ))  # fmt: skip
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ours = h.Llama(h.LlamaConfig(**shape, rope_theta=500000.0, rope_scaling=scaling))
    ours.load_state_dict(theirs.state_dict())  # the same names, all of them
    ids = torch.randint(0, 50, (2, 200))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=2e-4)
        loss = theirs(ids, labels=ids).loss
        torch.testing.assert_close(ours(ids[:, :-1], ids[:, 1:]), loss, rtol=1e-5, atol=1e-5)
        if scaling:  # and the scaling matters here
            ours.config.rope_scaling = None
            assert (ours(ids) - theirs(ids).logits).abs().max() > 0.05


def test_rope_frequencies_of_llama_3_2_by_hand():
    config = h.LlamaConfig(rope_scaling={**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192})
    f = h.rope_frequencies(config)
    assert f.shape == (32,) and f[0] == 1.0 and f[-1] == pytest.approx(500000 ** (-62 / 64) / 32)
    plain = h.rope_frequencies(h.LlamaConfig())
    wavelength = 2 * math.pi / plain
    assert torch.equal(f[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(f[wavelength > 8192], plain[wavelength > 8192] / 32)
    between = (wavelength >= 2048) & (wavelength <= 8192)
    assert between.any() and ((f < plain) & (f > plain / 32))[between].all()


def test_llama_config_refuses_what_it_cannot_compute():
    for key in ("rope_type", "type"):  # new spelling, old spelling
        with pytest.raises(ValueError, match="rope_scaling of type 'yarn'"):
            h.LlamaConfig(rope_scaling={key: "yarn"})
    assert h.LlamaConfig(rope_scaling={"rope_type": "default"}).rope_scaling is None
    with pytest.raises(ValueError, match="cannot share 5 key-value heads"):
        h.LlamaConfig(num_key_value_heads=5)


def test_the_loss_in_pieces_equals_the_loss_at_once():
    model = tiny_llama()
    x = torch.randn(60, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 17, (60,))
    whole = model.loss(x, y)
    pieces = model.loss(x, y, budget=17 * 7)
    torch.testing.assert_close(whole, pieces)
    parameters = [x, model.lm_head.weight]
    torch.testing.assert_close(torch.autograd.grad(whole, parameters), torch.autograd.grad(pieces, parameters))
    expected = nn.functional.cross_entropy(model.lm_head(x), y)
    torch.testing.assert_close(whole.float(), expected.float())


def test_learning_rate_by_hand():
    lr = [h.learning_rate(t, 1000, 2.0) for t in range(1000)]
    assert lr[0] == pytest.approx(0.04) and lr[49] == 2.0 and lr[899] == 2.0 and lr[950] == pytest.approx(1.1)
    assert max(lr) == 2.0 and lr[-1] == pytest.approx(0.2, abs=0.02)


def test_evaluate_predicts_every_token_of_each_block_but_the_first():
    model = tiny_llama()
    tokens = torch.randint(0, 17, (43,), dtype=torch.uint8)
    total = count = 0
    for block in tokens.long().split(10):  # the last block has 3 tokens
        logits = model(block[None, :-1])[0]
        total += nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
        count += len(block) - 1
    assert count == 38
    assert h.evaluate(model, tokens, 10, batch_size=3) == pytest.approx(total / count, rel=1e-6)
    with pytest.raises(ValueError, match="1 tokens hold no block"):
        h.evaluate(model, tokens[:1], 10)


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000) % 251
    x, y = h.batch_at(tokens.to(torch.uint8), 7, 4, 16, seed=3)
    assert x.shape == y.shape == (4, 16) and torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == torch.int64
    assert torch.equal(x, h.batch_at(tokens.to(torch.uint8), 7, 4, 16, seed=3)[0])
    assert not torch.equal(x, h.batch_at(tokens.to(torch.uint8), 8, 4, 16, seed=3)[0])
    with pytest.raises(ValueError, match="need one more"):
        h.batch_at(tokens[:16], 0, 4, 16, seed=0)


def small_run(method, micro_batches=1, seed=0, steps=12, **settings):
    torch.manual_seed(seed)
    model = h.Llama(h.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
    tokens = torch.randint(0, 64, (2000,), generator=torch.Generator().manual_seed(seed))
    qat = h.Hestia(model, steps, method=method, group_size=16)
    log = h.train(model, tokens, steps=steps, batch_size=8, block_size=16, lr=1e-2, qat=qat, log_every=3,
                  val=tokens[:200], eval_every=6, micro_batches=micro_batches, **settings)  # fmt: skip
    qat.harden()
    return log, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_same_seed_gives_the_same_bits():
    (log_a, a), (log_b, b) = small_run("hestia"), small_run("hestia")
    timing = {"seconds", "seconds_left", "tokens_per_s"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in log_a] == [
        {k: v for k, v in r.items() if k not in timing} for r in log_b
    ]
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], p) for name, p in small_run("hestia", seed=1)[1].items())


@pytest.mark.parametrize("clip_at", ["effective", "latent"])
def test_gradient_accumulation_changes_nothing_but_rounding(clip_at):
    log_a, log_b = (small_run("hestia", m, clip_at=clip_at, clip=0.1)[0] for m in (1, 4))
    assert [r["loss"] for r in log_a] == pytest.approx([r["loss"] for r in log_b], abs=1e-3)
    with pytest.raises(ValueError, match="does not split into 3"):
        small_run("hestia", 3)
    with pytest.raises(ValueError, match="clip_at is 'nowhere'"):
        small_run("hestia", clip_at="nowhere")


def test_the_logged_norms_are_those_before_clipping():
    norms = [[(r["grad_norm"], r["grad_norm_latent"]) for r in small_run("hestia", clip=c, clip_at=at, steps=1)[0]]
             for c, at in ((1e9, "effective"), (1e-3, "effective"), (1e-3, "latent"))]  # fmt: skip
    assert norms[0] == norms[1] == norms[2] and norms[0][0][0] > 0.1


def test_a_loop_of_another_length_than_the_schedules_is_refused():
    model = tiny_llama().float()
    qat = h.Hestia(model, 10, group_size=4)
    with pytest.raises(ValueError, match="5 steps, but the method's schedules are for 10"):
        h.train(model, torch.zeros(100), steps=5, batch_size=1, block_size=4, lr=1, qat=qat)


def test_the_log_says_what_happened():
    log, _ = small_run("hestia")
    assert [r["step"] for r in log] == [0, 3, 5, 6, 9, 11]
    assert [r["p"] for r in log][:2] == [0.0, 1.0] and log[-1]["tau_max"] < log[0]["tau_max"]
    assert all(0 <= r["flips"] <= 1 and r["tokens_per_s"] > 0 for r in log)
    assert [r["step"] for r in log if "val_loss_hard" in r] == [5, 11]
    assert "p" not in small_run("absmean")[0][0]


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = tiny_llama().float()
    tokens = torch.randint(0, 17, (200,))
    qat = h.Hestia(model, 10, method="absmean", group_size=4)
    good = {}

    def poison(t, record):
        if t == 4:
            good.update({name: w.detach().clone() for name, w in qat.latents.items()})
            model.model.norm.weight.data.fill_(math.inf)

    with pytest.raises(h.Diverged, match=r"absmean run: loss nan.* at step 5 of 10"):
        h.train(model, tokens, steps=10, batch_size=2, block_size=8, lr=1e-3, qat=qat, on_step=poison,
                name="absmean run")  # fmt: skip
    assert all(torch.equal(w, good[name]) for name, w in qat.latents.items())


def test_a_step_that_is_not_finite_changes_nothing_even_if_nobody_looks(monkeypatch):
    monkeypatch.setattr(h.math, "isfinite", lambda x: True)  # as on a GPU, where the host looks one step later
    model = tiny_llama().float()
    tokens = torch.randint(0, 17, (200,))
    qat, kept = h.Hestia(model, 6, method="absmean", group_size=4), {}

    def poison(t, record):
        kept[t] = {name: w.detach().clone() for name, w in qat.latents.items()}
        model.model.norm.weight.data.fill_(math.inf if t in (1, 2) else 1.0)

    log = h.train(model, tokens, steps=6, batch_size=2, block_size=8, lr=1e-3, qat=qat, on_step=poison, log_every=1)
    assert [t for t, r in enumerate(log) if r["loss"] != r["loss"]] == [2, 3]
    same = [all(torch.equal(kept[t][n], kept[t - 1][n]) for n in kept[t]) for t in range(1, 6)]
    assert same == [False, True, True, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [None, "full", "absmean", "hestia"])
def test_no_step_waits_for_the_gpu_and_divergence_is_still_seen(method):
    model = h.Llama(h.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1)).cuda()  # fmt: skip
    qat = method and h.Hestia(model, 12, method=method, group_size=16, dtype=torch.bfloat16, compile=True)
    trained = qat.latents if qat else {k: p for k, p in model.named_parameters() if "norm" not in k}
    tokens, kept = torch.randint(0, 64, (2000,)), {}

    def on_step(t, record):
        torch.cuda.set_sync_debug_mode("error" if t < 9 else "default")  # what waits between here and there raises
        if t == 6:
            kept.update({name: p.detach().clone() for name, p in trained.items()})
            model.model.norm.weight.data.fill_(math.inf)

    try:
        with pytest.raises(h.Diverged, match="at step 7 of 12"):
            h.train(torch.compile(model), tokens, steps=12, batch_size=8, block_size=16, lr=1e-3, qat=qat,
                    micro_batches=2, log_every=12, on_step=on_step)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, kept[name]) for name, p in trained.items())


DDP_RUN = """
import json, pathlib, sys, torch
import hestia as h, train_tiny

def run():
    config = h.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1)
    tokens = torch.randint(0, 64, (2000,), generator=torch.Generator().manual_seed(0))
    logs = []
    for method, shard in (("hestia", False), ("lsq", True)):
        torch.manual_seed(0)
        model = h.Llama(config)
        qat = h.Hestia(model, 50, method=method, group_size=16)
        fast = torch.nn.parallel.DistributedDataParallel(model)
        logs.append(h.train(fast, tokens, steps=50, batch_size=8, block_size=16, lr=1e-2, qat=qat, log_every=1,
                            micro_batches=2, shard_optimizer=shard))
    with torch.no_grad():
        next(iter(qat.latents.values())).add_(torch.distributed.get_rank())
    try:
        h.train(fast, tokens, steps=50, batch_size=8, block_size=16, lr=1e-2, qat=qat, name="uneven")
    except RuntimeError as error:
        logs.append(str(error))
    if torch.distributed.get_rank() == 0:
        open(sys.argv[1], "w").write(json.dumps(logs))

with train_tiny.together(cuda=False):
    run()
if sys.platform == "linux":
    threads = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in threads), threads  # one may abort the process as it ends
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path):
    script, out = tmp_path / "ddp_run.py", tmp_path / "logs.json"
    script.write_text(DDP_RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(script), str(out)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    *logs, error = json.loads(out.read_text())
    assert error == "uneven: the processes hold different weights or scores; give all the same seed and files"
    for method, log in zip(("hestia", "lsq"), logs):
        torch.manual_seed(0)
        model = h.Llama(h.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=1))  # fmt: skip
        tokens = torch.randint(0, 64, (2000,), generator=torch.Generator().manual_seed(0))
        qat = h.Hestia(model, 50, method=method, group_size=16)
        alone = h.train(model, tokens, steps=50, batch_size=8, block_size=16, lr=1e-2, qat=qat, log_every=1,
                        micro_batches=4)  # fmt: skip
        assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in alone], abs=1e-5)


def test_generate():
    model, ids = tiny_llama().float(), torch.zeros(1, 1, dtype=torch.long)
    greedy = h.generate(model, ids, 6, 4, temperature=0)
    assert greedy.shape == (1, 7)
    for k in range(1, 7):
        assert model(greedy[:, max(0, k - 4) : k])[0, -1].argmax() == greedy[0, k]
    sampled = [h.generate(model, ids, 20, 8, 1.0, 3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*sampled)
    assert torch.equal(h.generate(model, ids, 6, 4, 1.0, top_k=1), greedy)


def test_generation_with_cached_keys_and_values_is_generation_without():
    model = tiny_llama(num_key_value_heads=1)
    ids = torch.randint(0, 17, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model(ids), []
        parts = [model(ids[:, :2], None, cache), *(model(ids[:, t : t + 1], None, cache) for t in range(2, 5))]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12) and cache[1][0].shape == (3, 1, 5, 4)
    with pytest.raises(ValueError, match="2 tokens after a filled cache"):
        model(ids[:, :2], None, cache)
    assert h.generate(model, ids, 2, 9, top_k=1000).shape == (3, 7)  # more than there are
    for block_size in (30, 8):  # within the window, and beyond it
        slow = ids
        for _ in range(12):
            with torch.no_grad():
                slow = torch.cat([slow, model(slow[:, -block_size:])[:, -1:].argmax(-1)], 1)
        assert torch.equal(h.generate(model, ids, 12, block_size, temperature=0), slow)


def test_checkpointing_changes_no_gradient():
    model = tiny_llama()
    ids = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for model.checkpointing in (False, True):
        grads.append(torch.autograd.grad(model(ids[:, :-1], ids[:, 1:]), list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

SHARED = Path(__file__).resolve().parent.parent / "shared"


def random_llama(**changes):
    """A small Llama-3.2: scaled RoPE whose thresholds lie within reach, attention far from uniform."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, rope_theta=500000.0, tie_word_embeddings=True,
                 rope_scaling={**LLAMA3, "original_max_position_embeddings": 16})  # fmt: skip
    torch.manual_seed(0)
    model = h.Llama(h.LlamaConfig(**{**shape, **changes}))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def same_weights(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


@pytest.fixture
def folder(tmp_path):
    """A saved small Llama, ternary in groups of 16."""
    pytest.importorskip("safetensors")
    model = random_llama()
    h.Hestia(model, 1, group_size=16).harden()
    return h.save_llama(model, tmp_path / "llama"), model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True},
                                     {"rope_scaling": None, "head_dim": 16}])  # fmt: skip
@pytest.mark.parametrize("dtype, shard", [("float32", "1GB"), ("bfloat16", "20KB"), ("float16", "1GB")])
def test_checkpoints_of_transformers_load_with_its_logits(changes, dtype, shard, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.asdict(random_llama(**changes).config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, max_position_embeddings=256))
    for p in theirs.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (shard == "20KB") == (tmp_path / "model.safetensors.index.json").exists()
    ours = h.load_llama(tmp_path)
    assert {str(p.dtype) for p in ours.parameters()} == {f"torch.{dtype}"}
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(0))  # past the RoPE's thresholds
    with torch.no_grad():
        difference = h.load_llama(tmp_path, torch.float32)(ids) - theirs(ids).logits
    assert difference.abs().max() < 2e-4
    raw = json.loads((tmp_path / "config.json").read_text())
    new = raw.pop("rope_parameters", None)
    if new:  # the older spelling of the same
        scaling = {k: v for k, v in new.items() if k != "rope_theta"} if new["rope_type"] != "default" else None
        old = {**raw, "rope_theta": new["rope_theta"], "rope_scaling": scaling}
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert h.load_llama(tmp_path).config == ours.config


def to_meta(model, path):
    """The same Llama in Meta's format: neighbouring rows of q and k turn together."""
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "model.layers": "layers", "model.norm": "norm",
             "model.embed_tokens": "tok_embeddings", "lm_head": "output"}  # fmt: skip
    c, tensors = model.config, {}
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = len(w) // c.head_dim
            w = torch.stack([w.view(heads, 2, -1, w.shape[1])[:, half] for half in (0, 1)], 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = w.clone()
    path.mkdir()
    torch.save(tensors, path / "consolidated.00.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
              "n_kv_heads": c.num_key_value_heads, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
              "vocab_size": c.vocab_size, "multiple_of": 256, "ffn_dim_multiplier": 1.5}  # fmt: skip
    (path / "params.json").write_text(json.dumps(params))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_metas_format_loads_to_the_same_model(tied, tmp_path):
    scaling = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}  # Meta's file does not say it
    model = random_llama(rope_scaling=scaling, tie_word_embeddings=tied)
    again = h.load_llama(to_meta(model, tmp_path / "meta"))
    assert again.config == model.config and same_weights(again, model)
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))
    torch.save({"tok_embeddings.weight": Evil()}, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match="not a readable Llama checkpoint"):
        h.load_llama(tmp_path / "meta")
    assert not (tmp_path / "executed").exists()
    for what in ({"layers": torch.ones(1)}, {3: torch.ones(1)}, {"tok_embeddings.weight": 5}, [1],
                 {"tok_embeddings.weight": torch.ones(2, 2).int()}):  # fmt: skip
        torch.save(what, tmp_path / "meta" / "consolidated.00.pth")
        with pytest.raises(ValueError, match="not a readable Llama checkpoint"):
            h.load_llama(tmp_path / "meta")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the pretrained stories260K beside the repository")
@pytest.mark.parametrize("layout", ["", "meta"])
def test_stories260k_tells_its_story(layout):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    source = SHARED / "checkpoints" / "stories260k"
    model = h.load_llama(source / layout)
    ids = h.generate(model, torch.tensor([[1]]), 200, 512, temperature=0)[0].tolist()
    text = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).decode(ids).strip()
    assert len(text) > 300 and (source / "greedy_reference.txt").read_text().strip().startswith(text[:500])


@pytest.mark.parametrize("packed", [False, True])
def test_save_llama_is_read_alike_by_us_and_by_transformers(folder, packed, tmp_path):
    path, model = folder
    if packed:
        path = h.save_llama(model, tmp_path / "packed", packed=True, group_size=16)
    again = h.load_llama(path)
    assert same_weights(again, model) and again.config == model.config
    tokens = torch.randint(0, 96, (500,), generator=torch.Generator().manual_seed(0))
    assert h.evaluate(again, tokens, 64) == h.evaluate(model, tokens, 64)
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    for name in (n for n in stored if n.endswith("proj.weight")):
        assert stored[name].dtype == torch.bfloat16 and "lm_head.weight" not in stored
        for group in stored[name].float().view(-1, 16):
            assert set((group / group.abs().max().clamp_min(1e-30)).tolist()) <= {-1.0, 0.0, 1.0}
    if packed:
        bits = sum(8 * t.numel() * t.element_size() for n, t in stored.items() if n.endswith(("_packed", "_scale")))
        assert bits / sum(p.numel() for n, p in model.named_parameters() if "proj" in n) == 2 + 16 / 16
        pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokens[None, :100]
    with torch.no_grad():
        assert (theirs(ids).logits - again(ids)).abs().max() < 2e-4


def test_packing_against_a_layout_written_by_hand():
    codes, gamma = h.pack_ternary(torch.tensor([[2.0] + [0.0] * 15 + [-2.0] + [0.0] * 2]), None)
    assert gamma.tolist() == [[2.0]]
    # sixteen codes of two bits, the first lowest: 3, then 2, 2, ...; then 1, 2, 2 and zeros as padding
    assert [c & 0xFFFFFFFF for c in codes[0].tolist()] == [0b10101010101010101010101010101011, 0b101001]
    with pytest.raises(ValueError, match="not ternary"):
        h.pack_ternary(torch.tensor([[0.5, 1.5]]), None)


def test_save_llama_refuses_and_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    path, model = folder
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(FileExistsError, match="already exists and is not an empty folder"):
        h.save_llama(model, path)
    wide = random_llama()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight: not ternary in groups of 16"):
        h.save_llama(wide, tmp_path / "x", packed=True, group_size=16)
    h.Hestia(wide, 1, method="hestia-2bit", group_size=16).harden()
    assert same_weights(h.load_llama(h.save_llama(wide, tmp_path / "two bit")), wide)  # 1.5 gamma, in float32

    import safetensors.torch

    def full_disk(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full_disk)
        with pytest.raises(OSError, match=r"x was not made: .*No space left"):
            h.save_llama(model, tmp_path / "x")
    original = safetensors.torch.save_file

    def one_bit_off(tensors, file, **more):
        w = tensors["model.layers.1.mlp.up_proj.weight"]
        w.view(torch.uint8)[5, 5] ^= 1
        original(tensors, file, **more)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", one_bit_off)
        with pytest.raises(RuntimeError, match=r"layers.1.mlp.up_proj.weight reads back differently"):
            h.save_llama(model, tmp_path / "x")
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            h.save_llama(model, tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "two bit"]
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_dtypes_are_saved_without_loss(dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = random_llama().to(dtype)
    if dtype == torch.float64:
        model.float().double()  # what float32 holds
    assert same_weights(h.load_llama(h.save_llama(model, tmp_path / "a")), model)
    h.Hestia(model, 1, group_size=16).harden()
    again = h.load_llama(h.save_llama(model, tmp_path / "b"))
    assert same_weights(again, model)
    stored = json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"]
    assert stored == ("bfloat16" if dtype == torch.bfloat16 else "float32")


def test_packed_folders_that_do_not_fit_are_refused(folder, tmp_path):
    _, model = folder
    good = h.save_llama(model, tmp_path / "packed", packed=True, group_size=16)
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.mlp.up_proj.weight"

    def tensors(**changes):
        return lambda p: save_file({**load_file(p / "model.safetensors"), **changes}, p / "model.safetensors")

    def scheme(**changes):
        def change(p):
            raw = json.loads((p / "config.json").read_text())
            raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
            (p / "config.json").write_text(json.dumps(raw))

        return change

    cases = [
        (scheme(num_bits=4), "not those of save_llama"), (scheme(symmetric=False), "not those of save_llama"),
        (scheme(group_size=8), "do not fit together"), (scheme(group_size=None), "do not fit together"),
        (lambda p: edit_config(p, quantization_config=None), "do not fit together"),
        (tensors(**{name + "_packed": torch.zeros(64, 4).int()}), "do not fit together"),
        (tensors(**{name + "_packed": torch.zeros(64, 2)}), "do not fit together"),
        (tensors(**{name + "_scale": torch.ones(64, 1).bfloat16()}), "do not fit together"),
        (tensors(**{name + "_scale": torch.ones(64).bfloat16()}), "do not fit together"),
        (tensors(**{name + "_shape": torch.tensor(64)}), "do not fit together"),
        (tensors(**{name + "_shape": torch.tensor([64, 16])}), "do not fit together"),
    ]  # fmt: skip
    for n, (damage, message) in enumerate(cases):
        path = shutil.copytree(good, tmp_path / str(n))
        damage(path)
        with pytest.raises(ValueError, match=message):
            h.load_llama(path)


def edit_config(path, **changes):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**raw, **changes}))


def with_header(path, change):
    """Rewrite the JSON header of a safetensors file, its length included."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def test_broken_checkpoints_get_one_sentence(folder, tmp_path):
    good, _ = folder
    q = "model.layers.0.self_attn.q_proj.weight"

    def header(change):
        def apply(entries):
            change(entries)
            return entries

        return lambda p: with_header(p / "model.safetensors", apply)

    cases = {
        "holds no Llama; expected a folder with config.json": lambda p: (p / "config.json").unlink(),
        "config.json cannot be read": lambda p: (p / "config.json").write_text("{"),
        "holds no JSON object": lambda p: (p / "config.json").write_text("[1]"),
        "model.safetensors is missing": lambda p: (p / "model.safetensors").unlink(),
        "describes a 'bert' model, ['Bert']": lambda p: edit_config(p, model_type="bert", architectures=["Bert"]),
        "asks for the activation 'gelu'": lambda p: edit_config(p, hidden_act="gelu"),
        "quantized weights that are not those of save_llama": lambda p: edit_config(p, quantization_config={"bits": 4}),
        "quantized weights that are not those": lambda p: edit_config(p, quantization_config="gptq"),
        "cannot be read: maximum recursion": lambda p: (p / "config.json").write_text("[" * 100_000),
        "head_dim is 4611686018427387904": lambda p: edit_config(p, head_dim=1 << 62),
        "describes an impossible model": lambda p: edit_config(p, vocab_size=(1 << 31) - 1, hidden_size=(1 << 31) - 1,
                                                               head_dim=8),
        "rope_scaling of type 'yarn' is not supported": lambda p: edit_config(p, rope_scaling={"rope_type": "yarn"}),
        "factor of rope_scaling is '8'": lambda p: edit_config(p, rope_scaling={"rope_type": "llama3", "factor": "8"}),
        "vocab_size is 'big'; expected a positive whole number": lambda p: edit_config(p, vocab_size="big"),
        "says 3 layers and has tensors for 2": lambda p: edit_config(p, num_hidden_layers=3),
        "says 2000000000 layers": lambda p: edit_config(p, num_hidden_layers=2_000_000_000),
        "has shape (64, 32) instead of (128, 32)": lambda p: edit_config(p, intermediate_size=128),
        "head_dim is 7; expected an even number": lambda p: edit_config(p, head_dim=7),
        "not a readable safetensors file": lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 100),
        "readable safetensors file: Error": lambda p: (p / "model.safetensors").write_bytes(
            (p / "model.safetensors").read_bytes()[:5000]),
        f"{q} is missing; model.surprise is unexpected": header(lambda h: h.update({"model.surprise": h.pop(q)})),
        f"{q} has shape (16, 64) instead of (32, 32)": header(lambda h: h[q].update(shape=[16, 64])),
        "has tensors of types ['BF16', 'F16', 'F32']": header(lambda h: h[q].update(dtype="F16")),
        "is not a readable safetensors file: Error while deserializing": header(lambda h: h[q].update(dtype="F7")),
        "is not a readable safetensors file: Error while des": header(lambda h: h[q].update(data_offsets=[0, 1 << 40])),
    }  # fmt: skip
    for n, (message, damage) in enumerate(cases.items()):
        path = shutil.copytree(good, tmp_path / str(n))
        damage(path)
        with pytest.raises(ValueError) as error:
            h.load_llama(path)
        assert message in str(error.value) and "\n" not in str(error.value), (message, str(error.value))
    model = random_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    from safetensors.torch import save_file

    save_file(dict(model.named_parameters()), good / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        h.load_llama(good)
    (good / "model.safetensors").rename(good / "a.safetensors")
    for name, message in (("../x", "no weight_map from tensors to files"), ("b.st", "b.st is missing")):
        index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": name}}
        (good / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            h.load_llama(good)


def test_two_hundred_random_corruptions_load_to_the_same_weights_or_fail_with_a_sentence(folder, tmp_path):
    """Of header, offsets, sizes, dtypes, length, index and config. None crashes, hangs, or loads something else."""
    plain, model = folder
    packed = h.save_llama(model, tmp_path / "packed", packed=True, group_size=16)
    index = {"weight_map": dict.fromkeys(dict(model.named_parameters()), "one.safetensors")}
    random_ = np.random.default_rng(0)
    fates = {"same": 0, "refused": 0}
    for n in range(200):
        path = shutil.copytree(packed if n % 8 >= 6 or n % 8 == 0 else plain, tmp_path / "broken")
        if n % 4 == 1:
            (path / "model.safetensors").rename(path / "one.safetensors")
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        target = path / ("config.json", "model.safetensors.index.json", "model.safetensors", "model.safetensors")[n % 4]
        data = bytearray(target.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little") if target.suffix == ".safetensors" else len(data)
        for _ in range(int(random_.integers(1, 4))):
            at, kind = int(random_.integers(0, header)), random_.integers(0, 4)
            if kind == 0:
                data[at] = int(random_.integers(0, 256))
            elif kind == 1:  # a digit becomes another
                digits = [i for i in range(header) if 48 <= data[i] < 58]
                data[digits[int(random_.integers(0, len(digits)))] if digits else at] = int(random_.integers(48, 58))
            elif kind == 2:
                data = data[: int(random_.integers(0, len(data)))] if random_.random() < 0.3 else data
            else:
                del data[at : at + int(random_.integers(1, 20))]
            header = min(header, len(data)) or 1
            data = data or bytearray(b" ")
        target.write_bytes(data)
        try:
            again = h.load_llama(path)
            assert same_weights(again, model), n
            fates["same"] += 1
        except ValueError as error:
            assert 20 < len(str(error)) < 20_000
            fates["refused"] += 1
        shutil.rmtree(path)
    assert fates["refused"] > 100 and fates["same"] > 5, fates


# ----------------------------------------------------------------------------------------------------------------------
# train_tiny.py, plots.py, README

TINY = shlex.split("--hidden 32 --heads 2 --layers 1 --intermediate 64 --group-size 32 --steps 20 --pretrain-steps 20 "
                   "--batch-size 4 --block-size 32 --eval-tokens 512 --calibration 4 --device cpu --rank 2 --samples 2")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"line {n}: the quick brown fox, {n * n} times\n" for n in range(600)))
    return str(path)


@pytest.fixture(scope="module")
def finished_run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_tiny.main(["--data", text, "--out", str(out), "--seeds", "2", *TINY]) == 0
    return out


def test_a_run_leaves_everything_it_promises(finished_run):
    names = {p.name for p in finished_run.iterdir()}
    checkpoints = {f"{m}-seed{s}.pt" for m in ("full", "absmean", "hestia-no-hessian", "hestia") for s in (0, 1)}
    assert names == {"config.json", "log.jsonl", "results.json", "snapshots.npz", "overview.png",
                     "sensitivities.json", "runs"} | checkpoints | {f"pretrained-seed{s}.pt" for s in (0, 1)}
    results = json.loads((finished_run / "results.json").read_text())
    table = results["table"]
    assert list(table) == ["before", "untrained", "full", "absmean", "hestia-no-hessian", "hestia"]
    assert table["absmean"]["gap_val"][0] == 0 and table["full"]["gap_val"][0] == 1
    assert table["hestia"]["on_grid"][0] == 1.0 and 0 <= table["hestia"]["changed_last_tenth"][0] <= 1
    assert results["config"]["steps"] == 20 and len(results["data"]["sha256"]) == 64
    with np.load(finished_run / "snapshots.npz") as snapshots:
        hist = snapshots["hestia/seed0/hist"]  # (moments, tensors, bins)
        assert hist.shape[1:] == (3, 120) and np.allclose(hist.sum(-1), 1)
        assert ((snapshots["absmean/seed1/dead"] >= 0) & (snapshots["absmean/seed1/dead"] <= 1)).all()
        assert len(snapshots["hestia/seed0/grad_norm_latent"]) == len(hist) == 20
    # paired: every method starts from the same loss on the same batch, as far as its forward pass allows
    runs = plots.read_log(finished_run)
    first = {name: log[0]["loss"] for (name, seed), log in runs.items() if seed == 0}
    assert first["full"] == pytest.approx(first["hestia"], rel=1e-5) and first["full"] != first["absmean"]


def test_the_checkpoint_is_ternary_and_reads_back(finished_run):
    saved = torch.load(finished_run / "hestia-seed0.pt", weights_only=True)
    for name, w in saved["model"].items():
        if "_proj" in name:
            assert w.dtype == torch.bfloat16
            assert all(len(group.abs().unique()) <= 2 for group in w.float().reshape(-1, 32))
    model = train_tiny.load_checkpoint(finished_run / "hestia-seed0.pt")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wide = torch.load(finished_run / "full-seed0.pt", weights_only=True)["model"]["model.layers.0.mlp.up_proj.weight"]
    assert wide.dtype == torch.float32


def test_a_folder_that_holds_a_run_is_left_alone(finished_run, text, capsys):
    before = {p.name: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    assert train_tiny.main(["--data", text, "--out", str(finished_run), *TINY]) == 2
    assert "already exists and is not an empty folder" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}


def test_no_gap_is_reported_where_the_ste_is_not_above_full_precision():
    rows = {"full": (2.0, 3.0), "absmean": (2.5, 2.9), "hestia": (2.25, 2.95)}
    rows = {name: {"train": train, "val": val} for name, (train, val) in rows.items()}
    table = train_tiny.summarize(train_tiny.parse([]), [rows])
    assert table["hestia"]["gap_train"] == [0.5, None] and "gap_val" not in table["hestia"]


def test_plots_from_a_run(finished_run, tmp_path, capsys):
    assert plots.main(["--run", str(finished_run)]) == 0
    run = shutil.copytree(finished_run, tmp_path / "hard only")
    results = json.loads((run / "results.json").read_text())
    results["config"]["methods"] = ["full", "absmean"]
    (run / "results.json").write_text(json.dumps(results))
    middle = plots.overview(run).axes[1]
    assert not middle.lines and "None of these methods" in middle.get_title()  # no schedule that nothing followed
    assert plots.main(["--run", str(tmp_path)]) == 2
    assert "results.json; make it with python train_tiny.py" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# figures: from a made-up run, so that the outcome can be turned around


def a_run(folder, worst="absmean", spread=0.0003):
    """A folder with made-up results of three seeds: each method's loss, the log, snapshots. `worst` ends highest."""
    rng, steps, bins = np.random.default_rng(0), np.arange(0, 40, 4), train_tiny.BINS
    config = {**dataclasses.asdict(train_tiny.parse([])), "steps": 40, "seeds": 3}
    varied = ("alpha=0.6", "rho=0.5", "group_size=32", "samples=50", "scores=shuffled", "scores=common")
    methods = ["full", "absmean", "hestia-no-hessian", "hestia", "int2", *(f"hestia:{v}" for v in varied)]
    loss = {m: 1.30 if m == "full" else 1.38 if m == worst else 1.35 for m in methods}
    rows = [{m: {k: loss[m] + 0.01 * seed + spread * rng.normal() for k in ("train", "val")} | {"tau_init": 0.35}
             for m in methods} for seed in range(3)]  # fmt: skip
    table = train_tiny.summarize(train_tiny.parse([]), rows)
    trace = lambda value, score: {"value": value, "stderr": 0.4, "flagged": value < 1, "score": score}
    tensors = {f"model.layers.{i}.self_attn.{kind}_proj": trace(h * 10.0**i, score)
               for i in (0, 1) for kind, h, score in (("q", 0.5, 0.2), ("v", 9.0, 0.8))}  # fmt: skip
    tuning = {m: {"0.001": loss[m], "0.002": loss[m] + 0.01, "0.004": math.inf} for m in ("absmean", "hestia")}
    train_tiny.save_json(folder / "results.json", {
        "config": {**config, "methods": methods}, "table": table, "per_seed": rows, "tuning": tuning,
        "sensitivities": 3 * [{"tensors": tensors}]})  # fmt: skip
    middle, arrays, log = abs(abs((bins[1:] + bins[:-1]) / 2) - 0.5), {"bins": bins}, []
    for method, seed in ((m, s) for m in ("full", "absmean", "hestia-no-hessian", "hestia") for s in range(3)):
        emptied = [np.where(middle < 0.1, 1 - t / 50 if method != worst else 1 + t / 50, 1.0) for t in steps]
        arrays |= {f"{method}/seed{seed}/{key}": value for key, value in {
            "step": steps, "felt": np.linspace(1, 0, 10), "hist": np.array([3 * [h / h.sum()] for h in emptied]),
            "grad_norm": 1 + rng.random(10), "grad_norm_latent": 1 + rng.random(10)}.items()}  # fmt: skip
        arrays[f"{method}/tensors"] = np.array([*list(tensors)[:2], "model.layers.1.mlp.down_proj"])
        log += [{"method": method, "seed": seed, "step": int(t), "loss": loss[method]} for t in steps]
    np.savez(folder / "snapshots.npz", **arrays)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def titles(drawn):
    figure = drawn if isinstance(drawn, plots.plt.Figure) else drawn.figure
    said = " | ".join(ax.get_title(loc="left") for ax in figure.axes)
    plots.plt.close(figure)
    return " ".join(said.split())  # whatever space or line break stands there


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    (run := tmp_path / "run").mkdir()
    shutil.copytree(plots.RESULTS, tmp_path / "results")
    for name in ("table1.json", "ablations.json"):
        (tmp_path / "results" / name).unlink(missing_ok=True)
    monkeypatch.setattr(plots, "RESULTS", tmp_path / "results")
    return a_run(run)


def test_every_figure_draws_and_says_something(made_up):
    shutil.copy(made_up / "results.json", plots.RESULTS / "table1.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (draw, about, _) in plots.FIGURES.items():
            if name == "animation":
                path = plots.animation(made_up, made_up / "a.gif", seconds=0.2)
                assert path.read_bytes()[:6] == b"GIF89a"
                continue
            said = titles(draw(made_up))
            assert about and len(said) > 20 and "nan" not in said, (name, said)
    ax = plots.plt.figure().add_subplot()
    assert plots.felt_curves(made_up, ax) is ax  # a notebook's own Axes
    with pytest.raises(ValueError, match="1 Axes were given; this figure has 2 panels"):
        plots.staircase(axes=[ax])
    plots.plt.close("all")


def test_titles_follow_the_numbers(made_up, tmp_path):
    (tmp_path / "turned").mkdir()
    turned = a_run(tmp_path / "turned", worst="hestia")
    before, after = plots.read_results(made_up), plots.read_results(turned)
    assert "HESTIA empties the boundaries" in titles(plots.histograms(made_up))
    assert "HESTIA fills the boundaries" in titles(plots.histograms(turned))
    assert "AbsMean STE 0.080" in titles(plots.loss_curves(plots.read_log(made_up)))
    assert "HESTIA 0.080" in titles(plots.loss_curves(plots.read_log(turned)))
    shuffled = "scores shuffled is clearly better than HESTIA"
    assert shuffled in titles(plots.controls(after)) and shuffled not in titles(plots.controls(before))
    assert "5 differ clearly" not in titles(plots.loss_against(before, "rho"))
    assert "Lowest: ρ = 0.5, −0.03" in titles(plots.loss_against(after, "rho"))
    for rows in before["per_seed"]:
        rows["full"]["train"] = 1.5  # no gap: full precision is above the STE
    before["table"] = train_tiny.summarize(train_tiny.parse([]), before["per_seed"])
    assert "is lowest: −0.03" in titles(plots.gap_recovered(before))
    assert "recovers the largest part of the gap" in titles(plots.gap_recovered(plots.read_results(made_up)))
    larger = plots.read_results(plots.RESULTS / "gpu-3-seeds.json")
    assert "Both are worse than AbsMean STE; closest is HESTIA, −41.8" in titles(plots.gap_recovered(larger, "val"))
    rows = [[t.get_text() for t in plots.gap_recovered(larger, split).get_yticklabels()] for split in plots.SPLITS]
    assert rows[0] == rows[1]  # the same order for both texts
    one = {**after, "per_seed": after["per_seed"][:1]}
    assert "One seed, no interval" in titles(plots.controls(one)) and "±" not in titles(plots.loss_against(one, "rho"))

    config, scores = {"steps": 10, "rho": 0.2, "alpha": 0.4}, {"q": 0.2, "v": 0.8}
    assert "warmer than the least sensitive" in titles(plots.schedules(config, scores))
    assert "colder than the least sensitive" in titles(plots.schedules({**config, "alpha": -0.4}, scores))
    study = plots.read_json(plots.RESULTS / "curvature.json", "")
    assert "errs 1.7 times less than Hutchinson" in titles(plots.hutchpp_error(study))
    curves = study["curves"]
    curves["Hutch++, per tensor"], curves["Hutchinson, per tensor"] = (
        curves["Hutchinson, per tensor"], curves["Hutch++, per tensor"])  # fmt: skip
    assert "errs 1.7 times more than Hutchinson" in titles(plots.hutchpp_error(study))
    study["other"]["gradnorm"] = [1 / x for x in study["exact"]]
    assert "ranks the tensors the other way: Spearman −1.00" in titles(plots.sensitivity_against(study))


def test_figures_in_numbers():
    """What a title claims of a formula, against numbers worked elsewhere."""
    assert "4 of 10 methods take the slope for 1" in titles(plots.jacobians())  # AbsMean, SEQ, TWN, Tequila
    assert "closest to W at τ = 0.351; at Table 5's 0.3 the error is 0.2 % higher" in titles(plots.mse_against_tau())
    w = [torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) * 10.0**s for s in (0, 1)]
    assert f"at τ = {h.optimal_tau_init(w, 32):.3f}" in titles(plots.mse_against_tau(w, group_size=32))
    assert "changes Q for 8.8 % of Gaussian weights" in titles(plots.dead_zone_line())  # by the normal distribution:
    cdf = torch.special.ndtr(f64([-0.65, -0.5, 0.35, 0.5]) * (2 / math.pi) ** 0.5)
    assert float(cdf[1] - cdf[0] + cdf[3] - cdf[2]) == pytest.approx(0.088, abs=5e-4)
    drawn = plots.lemma_4_2()
    assert all(text.get_text().endswith(": area 2.0000") for text in drawn.axes[0].get_legend().texts)
    assert "within 0.016 % of" in titles(drawn)


def test_what_is_missing_gets_one_sentence(made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def says(arguments, code):
        assert plots.main(arguments) == code
        return "".join(capsys.readouterr())

    assert says([], 0).count("\n  ") >= len(plots.FIGURES)
    assert "there is no finished run under out/; make one with python train_tiny.py" in says(["felt_curves"], 2)
    assert "there is no figure felt; expected all, staircase" in says(["felt"], 2)
    for arguments in (["all", "--run", "nowhere"], ["overview", "--run", "nowhere"]):
        said = says(arguments, 2)
        assert "nowhere/results.json; make it with python train_tiny.py" in said and said.count("\n") == 1
    assert "table1.json; make it with python train_tiny.py --methods all --lrs" in says(["table1"], 2)
    results = plots.read_results(made_up)
    results["table"] = {m: results["table"][m] for m in ("full", "absmean", "int2")}
    train_tiny.save_json(made_up / "results.json", results)
    run = ["--run", str(made_up), "--save", "pictures"]
    assert "python train_tiny.py --ablate hessian" in says(["controls", *run], 2)
    assert "none of these methods has a temperature" in says(["schedules", *run], 2)
    (made_up / "snapshots.npz").write_bytes(b"PK damaged")
    assert "has no readable snapshots.npz; make it with" in says(["histograms", *run], 2)
    assert not (tmp_path / "pictures").exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(plots, "FIGURES", {k: plots.FIGURES[k] for k in ("staircase", "table1")})
    a_run(made_up)
    assert "table1 is left out: there is no" in says(["all", *run], 0)
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["staircase.png"]


# ----------------------------------------------------------------------------------------------------------------------
# train_tiny.py again: what it refuses, what it survives


@pytest.mark.parametrize("arguments, message", [
    (["--methods", "magic"], "unknown method magic; expected full, absmean"),
    (["--group-size", "48"], "--group-size 48 does not divide the model's width 128; 32 would"),
    (["--data", "no-such-file.txt"], "no-such-file.txt cannot be read"),
    (["--data", "EMPTY"], "has 0 bytes"),
    (["--data", "LATIN"], "is not UTF-8 text (byte 2)"),
    (["--data", "SHORT"], "expected more than"),
    (["--data", "."], "cannot be read"),
    (["--rho", "1.5"], "--rho is 1.5; expected a share"),
    (["--rho", "nan"], "--rho is nan"),
    (["--tau-init", "-0.3"], "--tau-init is -0.3"),
    (["--alpha", "inf"], "--alpha is inf"),
    (["--steps", "0"], "--steps is 0; expected at least 1"),
    (["--lr", "0"], "--lr is 0.0; expected a positive number"),
    (["--block-size", "1"], "--block-size is 1; expected at least 2"),
    (["--alpha", "2000"], "--alpha is 2000.0; expected a number between -50 and 50"),
    (["--heads", "3"], "does not split into 3 heads"),
    (["--micro-batches", "3"], "does not split into 3 micro-batches"),
    (["--device", "abacus"], "--device abacus cannot be used"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--samples", "1"], "--samples is 1; expected at least 2, for a standard error"),
    (["--lrs", "1e-3", "0"], "--lrs are 0.001, 0.0; expected positive numbers"),
    (["--methods", "hestia:beta=1"], "method hestia:beta=1: expected settings such as alpha=0.6"),
    (["--methods", "hestia:scores=sorted"], "expected scores=shuffled or common"),
    (["--methods", "absmean:alpha=0.6"], "method absmean:alpha=0.6: alpha changes nothing there"),
    (["--methods", "hestia-no-hessian:alpha=0.6"], "alpha changes nothing there"),
    (["--methods", "hestia:rho=2"], "method hestia:rho=2: expected rho from 0 to 1"),
    (["--methods", "hestia:group_size=48"], "--group-size 48 does not divide"),
    (["--ablate", "everything"], "argument --ablate: invalid choice"),
    (["--val-data", "x"], "--val-data needs --data"),
    (["--packed"], "--packed needs --llama"),
    (["--sensitivity", "guess"], "argument --sensitivity: invalid choice: 'guess'"),
    (["--preset", "huge"], "argument --preset: invalid choice"),
    (["--colour"], "unrecognized arguments: --colour"),
])  # fmt: skip
def test_bad_input_gets_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"EMPTY": b"", "LATIN": b"ab\xe9cd" * 1000, "SHORT": b"too short"}
    for name, content in files.items():
        if name in arguments:
            (tmp_path / name).write_bytes(content)
    try:
        code = train_tiny.main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_says_so_and_leaves_its_last_good_state(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert train_tiny.main(["--data", text, "--out", str(out), "--methods", "absmean", *TINY, "--lr", "1e30"]) == 1
    assert re.search(r"the run failed: absmean: loss \S+, gradient norm \S+ at step \d+ of 20", capsys.readouterr().err)
    assert not (out / "results.json").exists()
    saved = torch.load(out / "last-good-absmean-seed0.pt", weights_only=True)
    model = train_tiny.load_checkpoint(out / "last-good-absmean-seed0.pt")
    tokens = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8)[:2000]
    before = plots.read_log(out)["pretrain", 0][-1]["loss"]
    assert saved["step"] == 0 and h.evaluate(model, tokens, 32) == pytest.approx(before, abs=0.3)


def test_no_positive_trace_is_one_sentence(text, tmp_path, monkeypatch, capsys):
    negative = lambda loss_fn, params, *_, **__: dict.fromkeys(params, h.TraceEstimate(-1.0, 0.1, False, 6))
    monkeypatch.setattr(h, "hessian_traces", negative)
    assert train_tiny.main(["--data", text, "--out", str(tmp_path / "run"), "--methods", "hestia", *TINY]) == 2
    assert "no Hessian trace is positive, so no score exists; calibrate" in capsys.readouterr().err


def test_sensitivities_are_estimated_once_for_the_same_weights_text_and_settings(text, tmp_path, monkeypatch, capsys):
    calls, original = [], train_tiny.measure_sensitivities
    monkeypatch.setattr(train_tiny, "measure_sensitivities", lambda *a: calls.append(a) or original(*a))

    def run(name, *more):
        arguments = ["--data", text, "--out", str(tmp_path / name), "--methods", "hestia", *TINY, "--steps", "2", *more]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert train_tiny.main(arguments) == 0
        return json.loads((tmp_path / name / "sensitivities.json").read_text()), capsys.readouterr().out

    (first, _), (second, said) = run("a"), run("b", "--lr", "1e-4")
    assert len(calls) == 1 and first == second and "taken from a/sensitivities.json" in said
    for n, more in enumerate(("--samples 3", "--pretrain-steps 21", "--calibration 20", "--seed 1")):
        assert run(f"other{n}", *more.split())[0].keys() != first.keys()
    assert len(calls) == 5
    for n, broken in enumerate(("{", "[]", '{"x": {}}', '{"x": {"tensors": {"a": {}}}}')):
        (tmp_path / f"broken{n}").mkdir()
        (tmp_path / f"broken{n}" / "sensitivities.json").write_text(broken)
    for kind in ("joint", "fisher", "gradnorm", "error"):
        (entry,) = run(kind, "--sensitivity", kind)[0].values()
        values = [t["value"] for t in entry["tensors"].values()]
        assert len(values) == 7 and all(map(math.isfinite, values))
        assert min(values) > 0 or kind == "joint"
        assert ("stderr" in entry["tensors"]["model.layers.0.mlp.up_proj"]) == (kind in ("joint", "fisher"))


def small_tokenizer(path, size=96):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = Path(h.__file__).read_text()[:20000]
    tokenizer.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["?"],
                                                                         show_progress=False))  # fmt: skip
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def test_a_trained_llama_in_a_ternary_one_out(folder, text, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    model = random_llama(vocab_size=160)
    source = h.save_llama(model, tmp_path / "source")
    arguments = shlex.split(f"--llama {source} --data {text} --out {tmp_path}/run --group-size 16 --steps 4 --packed "
                            "--batch-size 4 --micro-batches 2 --block-size 16 --eval-tokens 512 --calibration 2 "
                            "--no-compile --device cpu --checkpointing --rank 0 --samples 4")  # fmt: skip
    assert train_tiny.main(arguments) == 2 and "tokenizer.json is not a readable tokenizer" in capsys.readouterr().err
    small_tokenizer(source, 300)
    assert train_tiny.main(arguments) == 2 and "token 299 and the model has 160" in capsys.readouterr().err
    tokenizer = small_tokenizer(source, 150)
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=1000)
    tokenizer.save(str(source / "tokenizer.json"))  # settings for a chat, not for a text
    for more, message in (("--methods hestia-2bit", "--packed holds ternary weights, not those of hestia-2bit"),
                          ("--group-size 48", "--group-size 48 does not divide the model's width"),
                          ("--val-data nowhere.txt", "--val-data nowhere.txt cannot be read"),
                          (f"--out {source}", "already exists and is not an empty folder")):  # fmt: skip
        assert train_tiny.main([*arguments, *more.split()]) == 2 and message in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_tiny.main(arguments) == 0
    said = capsys.readouterr().out
    assert "this run will take about" in said and "perplexity" in said and "nats per token" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["sensitivity"] == "joint" and results["config"]["preset"] == "paper"
    assert results["data"]["unit"] == "tokens" and results["table"]["hestia"]["on_grid"][0] == 1
    for name in ("hestia-seed0", "hestia-seed0-packed"):
        again = h.load_llama(tmp_path / "run" / name)
        assert (tmp_path / "run" / name / "tokenizer.json").exists()
        w = again.model.layers[0].mlp.up_proj.weight
        assert all(len(g.abs().unique()) <= 2 for g in w.float().reshape(-1, 16))
    assert results["data"]["train_tokens"] > 2000
    (cache,) = (tmp_path / "tokens").iterdir()
    stamp = cache.stat().st_mtime_ns
    assert train_tiny.main([*arguments, "--out", str(tmp_path / "again"), "--methods", "absmean"]) == 0
    assert cache.stat().st_mtime_ns == stamp and "tokenizing" not in capsys.readouterr().out
    assert train_tiny.main([*arguments[:2], "--device", "cpu"]) == 2
    assert "--llama needs --data" in capsys.readouterr().err


def test_long_text_is_tokenized_in_pieces_as_in_one(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = Path(h.__file__).read_text() * 12
    text = text[: (1 << 18) - 1] + "x\n\n\nx" + text[1 << 18 :]  # line breaks where the first cut would be
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text[:30000]], trainer)
    config = train_tiny.parse(["--out", str(tmp_path / "run")])
    ids = train_tiny.tokenized(text.encode(), tokenizer, config)
    assert ids.dtype == torch.int32 and ids.tolist() == tokenizer.encode(text).ids
    assert "100 %" in capsys.readouterr().out and train_tiny.tokenized(text.encode(), tokenizer, config).equal(ids)


def test_a_study_that_is_interrupted_goes_on_and_ends_the_same(text, tmp_path, monkeypatch, capsys):
    methods = ["full", "absmean", "fairy2i"]
    arguments = ["--data", text, "--methods", *methods, "--lrs", "1e-3", "4e-3", "--seeds", "2", *TINY, "--steps", "5",
                 "--out"]  # fmt: skip

    def run(*more):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train_tiny.main([*arguments, *more])

    assert run(str(tmp_path / "undisturbed")) == 0
    original, calls = train_tiny.Study.keep, []

    def interrupted(self, name, seed, *a):
        if name != "start":
            calls.append(name)
            if len(calls) in (3, 9):
                raise KeyboardInterrupt  # its records are in the log, its result nowhere
        return original(self, name, seed, *a)

    monkeypatch.setattr(train_tiny.Study, "keep", interrupted)
    out = str(tmp_path / "other" / "interrupted")
    assert run(out) == 130 and "--resume goes on" in capsys.readouterr().err
    assert run(out, "--resume") == 130 and run(out, "--resume") == 0
    assert len(calls) == 2 * 3 + 2 * 3 + 2  # tuning, seeds, and the two that were repeated
    a, b = (json.loads((Path(p) / "results.json").read_text()) for p in (tmp_path / "undisturbed", out))
    for rows in (*a["per_seed"], *b["per_seed"]):
        for row in rows.values():
            row.pop("seconds", None)
    assert a["per_seed"] == b["per_seed"] and a["tuning"] == b["tuning"]
    assert {row["lr"] for rows in a["per_seed"] for m, row in rows.items() if m in calls} <= {1e-3, 4e-3}
    logs = [[json.loads(line) for line in (Path(p) / "log.jsonl").read_text().splitlines()]
            for p in (tmp_path / "undisturbed", out)]  # fmt: skip
    timing = ("seconds", "seconds_left", "tokens_per_s")
    assert [{k: v for k, v in r.items() if k not in timing} for r in logs[0]] == [
        {k: v for k, v in r.items() if k not in timing} for r in logs[1]]  # fmt: skip
    with np.load(tmp_path / "undisturbed" / "snapshots.npz") as x, np.load(Path(out) / "snapshots.npz") as y:
        assert set(x) == set(y)
        for k in x:
            np.testing.assert_array_equal(x[k], y[k])  # with NaN equal to NaN
    capsys.readouterr()
    assert run(out, "--resume", "--rho", "0.3", "--lrs", "1e-3") == 2
    assert "--resume: lrs, rho differ from the run in" in capsys.readouterr().err
    assert run(str(tmp_path / "nothing"), "--resume") == 2 and "--resume needs --out" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run("other/../other/interrupted", "--resume") == 0  # the same folder by another name
    for broken in ("{", "[]", "{}", '{"lr": 1}', '{"tuning": "low"}'):
        (Path(out) / "runs" / "absmean-seed1.json").write_text(broken)
        assert run(out, "--resume") == 2 and "absmean-seed1.json cannot be read" in capsys.readouterr().err
    for broken in ("{", "[]", '{"config": {}}', '{"config": {}, "data": {}, "sessions": 3}'):
        (Path(out) / "config.json").write_text(broken)
        assert run(out, "--resume") == 2 and "config.json cannot be read" in capsys.readouterr().err


def run_quietly(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tiny.main([*map(str, arguments)])


def outcome(folder):
    """All that a finished run says and leaves, but for the time that it took."""
    results = json.loads((folder / "results.json").read_text())
    rows = [{k: v for k, v in row.items() if k != "seconds"} for seed in results["per_seed"] for row in seed.values()]
    timing = ("seconds", "seconds_left", "tokens_per_s")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in r.items() if k not in timing} for r in log]
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        saved = torch.load(path, weights_only=True)["model"]
        tensors |= {f"{path.name}/{k}": t.view(torch.int16).numpy().tobytes() for k, t in saved.items()}
    with np.load(folder / "snapshots.npz") as z:
        arrays = {k: z[k].tobytes() for k in z}
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    return {"rows": rows, "log": log, "tensors": tensors, "arrays": arrays, "files": files}


# tequila has state beside W, cage acts on W, stochastic draws random numbers
SURVIVOR = ["--methods", "absmean", "hestia", "tequila", "stochastic", *TINY, "--steps", "12", "--pretrain-steps", "12"]


def killed_until_done(arguments, folder, seconds, seed):
    """Run in processes that are killed at random moments, and resumed, until one ends. Returns how many were killed."""
    context, rng, kills = multiprocessing.get_context("forkserver"), random.Random(seed), 0
    context.set_forkserver_preload(["train_tiny"])
    while not (folder / "overview.png").exists():  # the last file
        resume = ["--resume"] if (folder / "config.json").exists() else []
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # killed before it had begun
        child = context.Process(target=train_tiny.main, args=([*arguments, "--out", str(folder), *resume],))
        child.start()
        child.join(rng.uniform(0, seconds))
        kills += child.is_alive()
        child.kill()
        child.join()
    return kills


def compare_killed(text, tmp_path, runs):
    torch.set_num_threads(1)
    arguments = ["--data", text, *SURVIVOR, "--save-minutes", "0"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_tiny"])
    child = context.Process(target=train_tiny.main, args=([*arguments, "--out", str(tmp_path / "undisturbed")],))
    began = time.perf_counter()
    child.start()
    child.join()
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "undisturbed")
    kills = []
    for n in range(runs):
        kills.append(killed_until_done(arguments, tmp_path / str(n), seconds, n))
        got = outcome(tmp_path / str(n))
        left = {name for name in got["files"] if name.endswith(".tmp")}  # of a process killed while it wrote
        assert {**got, "files": got["files"] - left} == expected
        shutil.rmtree(tmp_path / str(n))
    print(f"{runs} runs, killed {sum(kills)} times ({min(kills)} to {max(kills)} each), all ended with the same bits")


def test_a_killed_run_goes_on_to_the_same_bits(text, tmp_path):
    compare_killed(text, tmp_path, 1)


@pytest.mark.slow
def test_fifty_killed_runs_go_on_to_the_same_bits(text, tmp_path):
    compare_killed(text, tmp_path, 50)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_the_step_saves_and_exits(number, text, tmp_path, monkeypatch, capfd):
    arguments = ["--data", text, *SURVIVOR]
    assert run_quietly(*arguments, "--out", tmp_path / "undisturbed") == 0
    original = train_tiny.Reporter.line

    def line(self, r, total):
        original(self, r, total)
        if self.about["method"] == "hestia" and r["step"] == 5:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train_tiny.Reporter, "line", line)
    assert run_quietly(*arguments, "--out", tmp_path / "stopped") == 128 + number
    assert (tmp_path / "stopped" / "runs" / "hestia-seed0-last.pt").exists()
    assert "stopping after this step" in capfd.readouterr().err
    monkeypatch.setattr(train_tiny.Reporter, "line", original)
    assert run_quietly(*arguments, "--out", tmp_path / "stopped", "--resume") == 0
    assert "hestia goes on from step 6 of 12" in capfd.readouterr().out
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("stride", (3, pytest.param(1, marks=pytest.mark.slow)))  # 1: every write
@pytest.mark.parametrize("how", ("before", "half", "at the end"))
def test_a_write_that_fails_leaves_a_run_that_goes_on(how, stride, text, tmp_path, monkeypatch, capsys):
    arguments = ["--data", text, "--methods", "hestia", *TINY, "--steps", "3", "--pretrain-steps", "2",
                 "--save-minutes", "0", "--out"]  # fmt: skip
    monkeypatch.setattr(plots, "overview", lambda folder: plots.plt.figure(figsize=(1, 1)))  # the figure takes longest
    assert run_quietly(*arguments, tmp_path / "undisturbed") == 0
    expected, original, count, broken = outcome(tmp_path / "undisturbed"), train_tiny.whole, itertools.count(), None

    @contextlib.contextmanager
    def whole(path):
        fails = next(count) == broken
        if fails and how == "before":
            raise PermissionError(13, "Permission denied", str(path))
        with original(path) as aside:
            yield aside
            if fails:
                if how == "half":
                    aside.write_bytes(aside.read_bytes()[: aside.stat().st_size // 2])
                raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(train_tiny, "whole", whole)
    assert run_quietly(*arguments, tmp_path / "counted") == 0
    writes = next(count)
    assert writes > 12
    for broken in range({"before": 0, "half": 1, "at the end": 2}[how] % stride, writes, stride):
        count, folder = itertools.count(), tmp_path / str(broken)
        assert run_quietly(*arguments, folder) == 1
        assert "the run failed" in capsys.readouterr().err and not list(folder.rglob("*.tmp"))
        count, broken = itertools.count(), None
        begun = (folder / "config.json").exists()
        assert run_quietly(*arguments, folder, *(["--resume"] if begun else [])) == 0
        got = outcome(folder)
        assert got["files"] == expected["files"] and got["log"] == expected["log"]
        assert got == expected


def test_a_log_that_cannot_be_written_leaves_a_run_that_goes_on(text, tmp_path, monkeypatch):
    arguments = ["--data", text, "--methods", "hestia", *TINY, "--steps", "4", "--pretrain-steps", "4",
                 "--save-minutes", "0", "--out"]  # fmt: skip
    monkeypatch.setattr(plots, "overview", lambda folder: plots.plt.figure(figsize=(1, 1)))
    assert run_quietly(*arguments, tmp_path / "undisturbed") == 0
    original, count = train_tiny.Reporter.write, itertools.count()

    def write(self, record):
        if next(count) in (2, 9):
            self.file.write('{"seed": 0, "met')
            raise OSError(28, "No space left on device")
        original(self, record)

    monkeypatch.setattr(train_tiny.Reporter, "write", write)
    codes = [run_quietly(*arguments, tmp_path / "run", *(["--resume"] if n else [])) for n in range(3)]
    assert codes == [1, 1, 0] and outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_a_damaged_state_is_said_and_that_training_starts_anew(text, tmp_path, monkeypatch, capsys):
    arguments = ["--data", text, "--methods", "absmean", *TINY, "--steps", "4", "--save-minutes", "0", "--out"]
    assert run_quietly(*arguments, tmp_path / "undisturbed") == 0
    with monkeypatch.context() as m:
        m.setattr(train_tiny.Study, "keep", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_quietly(*arguments, tmp_path / "run") == 130
    (state,) = (tmp_path / "run" / "runs").glob("*-last.pt")
    (tmp_path / "run" / "pretrained-seed0.pt").unlink()
    state.write_bytes(state.read_bytes()[:1000])
    assert run_quietly(*arguments, tmp_path / "run", "--resume") == 0
    assert "cannot be read" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")


def test_trouble_is_said_in_a_line_and_is_an_error_with_strict(text, tmp_path, capsys):
    soft = ["--data", text, "--methods", "hestia-no-hessian", *TINY, "--steps", "2", "--rho", "1", "--out"]
    with warnings.catch_warnings():
        assert train_tiny.main([*soft, str(tmp_path / "warned")]) == 0
    assert "tau has not reached hard at the end" in capsys.readouterr().out
    assert train_tiny.main([*soft, str(tmp_path / "strict"), "--strict"]) == 1
    assert "an error because of --strict" in capsys.readouterr().err
    alike = ["--data", text, "--methods", "hestia", *TINY, "--steps", "2", "--kappa", "0.001", "--strict", "--out"]
    assert train_tiny.main([*alike, str(tmp_path / "alike")]) == 1
    assert "the sensitivity scores are all alike" in capsys.readouterr().err


def test_a_spike_of_the_gradient_is_said(text, tmp_path, monkeypatch, capsys):
    original = h.Llama.forward

    def forward(self, ids, targets=None, *more):
        out = original(self, ids, targets, *more)
        forward.calls += targets is not None and torch.is_grad_enabled()
        return 1e5 * out if forward.calls == 30 else out

    forward.calls = 0
    monkeypatch.setattr(h.Llama, "forward", forward)
    arguments = ["--data", text, "--methods", "full", *TINY, "--lr", "1e-5", "--out", str(tmp_path / "run")]
    assert train_tiny.main(arguments) == 0
    assert "a gradient norm of" in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_find_what_one_finds(text, tmp_path):
    more = ["--methods", "absmean", "hestia:alpha=0.6", "--lrs", "1e-3", "2e-3", *TINY, "--steps", "4"]
    results = []
    for jobs in ("1", "2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = tmp_path / jobs
            assert train_tiny.main(["--data", text, "--jobs", jobs, "--out", str(out), *more]) == 0
        results.append(json.loads((out / "results.json").read_text()))
        for row in results[-1]["per_seed"][0].values():
            row.pop("seconds", None)
    for key in ("per_seed", "tuning", "data"):
        assert results[0][key] == results[1][key]
    assert {p.name for p in (tmp_path / "1").rglob("*")} == {p.name for p in (tmp_path / "2").rglob("*")}


def test_the_readme_has_the_tables_that_the_results_print(capsys):
    readme = (Path(h.__file__).parent / "README.md").read_text()
    paths = re.findall(r"<!-- python train_tiny.py --show (\S+) -->", readme)
    assert len(paths) == 7
    for path, below in zip(paths, readme.split("<!-- python train_tiny.py --show ")[1:]):
        assert train_tiny.main(["--show", str(Path(h.__file__).parent / path)]) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert [line for line in below.splitlines() if line.startswith("|")][: len(printed)] == printed


some = ("all", *(pytest.param(what, marks=pytest.mark.slow) for what in train_tiny.CHOICES["ablate"] if what != "all"))


@pytest.mark.parametrize("what", some)
def test_ablations(what, text, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = ["--ablate", what, *TINY, "--steps", "4", "--out", str(tmp_path / "run")]
        assert train_tiny.main(["--data", text, *more]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["per_seed"][0]
    assert list(rows)[2:] == results["config"]["methods"] and len(rows) >= 7 and "commit" in results
    assert "hestia" in rows and "absmean" in rows
    losses = [row["val"] for name, row in rows.items() if name.startswith("hestia")]
    assert len(set(losses)) == len(losses) or what in ("samples", "all")  # every variant did something else


def test_changed_scores_by_hand():
    scores = {"a": 0.0, "b": 1.0, "c": 0.5}
    assert train_tiny.changed_scores(scores, "", 0.4, 0) is scores
    shuffled = train_tiny.changed_scores(scores, "shuffled", 0.4, 0)
    assert shuffled.keys() == scores.keys() and sorted(shuffled.values()) == [0.0, 0.5, 1.0] and shuffled != scores
    common = train_tiny.changed_scores(scores, "common", 0.4, 0)
    assert math.exp(0.4 * common["a"]) == pytest.approx((1 + math.exp(0.4) + math.exp(0.2)) / 3)
    assert len(set(common.values())) == 1


def test_two_bit_and_binary_runs_save_and_read_back(text, tmp_path):
    out = tmp_path / "run"
    arguments = ["--data", text, "--out", str(out), "--methods", "hestia-2bit,hestia-binary", "full", *TINY]
    assert train_tiny.main(arguments) == 0  # it compares the loss before saving with the one after reading back
    table = json.loads((out / "results.json").read_text())["table"]
    assert table["hestia-2bit"]["on_grid"] == table["hestia-binary"]["on_grid"] == [1.0, None]


@pytest.mark.slow
def test_the_bench_measures_every_mode(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = shlex.split("--bench --rounds 1 --steps 1 --micro 1 --accumulate 1 --block-size 16 --no-compile")
    assert train_tiny.main([*arguments, "--out", str(out), "--modes", "full"]) == 0
    assert len(json.loads(out.read_text())) == 1 and "| full precision" in capsys.readouterr().out
    for mode in ("absmean", "hestia", "naive", "plain", "passes", "products"):  # what it does in processes of their own
        assert train_tiny.main([*arguments, "--worker", mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row["mode"]: row for row in (json.loads(line.removeprefix("result ")) for line in lines)}
    assert len(rows) == 4 + 3 + 4 and all(row["ms"] > 0 for row in rows.values())
    assert all(0 < rows[m]["of_matrix_rate"] < 1 for m in ("absmean", "hestia", "naive", "plain"))
    for bad in ("--modes magic", "--steps 0", "--accumulate 4 -1", "--tau nan"):
        assert train_tiny.main(["--bench", *bad.split()]) == 2 and bad.split()[0] in capsys.readouterr().err


def test_the_naive_forward_of_the_bench_is_hestias():
    linear = nn.Linear(16, 4, bias=False)
    linear.__class__, linear.group_size = train_tiny.NaiveLinear, 8
    linear.now = torch.tensor([0.4, 0.3, *h.TERNARY])
    torch.testing.assert_close(linear(torch.eye(16)), h.effective_weight(linear.weight, 0.3, 0.4, 8).T)


@pytest.mark.slow
def test_torchrun_shares_the_batches_and_changes_nothing_else(text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(train_tiny.__file__).resolve())
    arguments = ["--data", text, *TINY, "--methods", "hestia"]
    done = subprocess.run([*command, script, *arguments, "--out", str(tmp_path / "two"), "--shard"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_tiny.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    tables = [json.loads((tmp_path / run / "results.json").read_text())["table"]["hestia"] for run in ("one", "two")]
    assert tables[0]["val"][0] == pytest.approx(tables[1]["val"][0], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.parametrize("kill", (os.kill, os.killpg), ids=("first", "all"))  # Ctrl-C in a terminal goes to all
def test_a_signal_to_the_first_process_ends_them_all(kill, number, text, tmp_path):
    arguments = [sys.executable, train_tiny.__file__, "--data", text, *TINY, "--methods", "absmean", "llm-qat",
                 "--seeds", "3", "--jobs", "2", "--steps", "4000", "--out", str(tmp_path / "run")]  # fmt: skip
    run = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                           start_new_session=True)  # fmt: skip
    while len(list((tmp_path / "run").glob("runs/*-seed?.jsonl"))) < 5:  # three of full precision, and two methods
        time.sleep(0.1)
    time.sleep(1)
    kill(run.pid, number)
    assert run.wait(60) == 128 + number
    said = run.stderr.read()
    assert "--resume goes on" in said and "Traceback" not in said
    assert len(list((tmp_path / "run").glob("runs/*-last.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("more", ([], ["--shard"]), ids=("whole", "shard"))
def test_two_processes_that_are_killed_go_on(more, text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(Path(train_tiny.__file__).resolve()), "--data", text, *TINY, "--methods", "hestia", "--steps", "60",
               "--save-minutes", "0", *more, "--out"]  # fmt: skip
    assert subprocess.run([*command, str(tmp_path / "undisturbed")], capture_output=True).returncode == 0
    run = subprocess.Popen([*command, str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "runs" / "hestia-seed0-last.pt").exists():
        time.sleep(0.01)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "run")], check=True)  # torchrun, and what it has started
    run.wait()
    done = subprocess.run([*command, str(tmp_path / "run"), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hestia goes on from step" in done.stdout
    got, expected = outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed")
    assert {**got, "files": 0} == {**expected, "files": 0}


def test_without_out_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = train_tiny.parse([])
    assert len({train_tiny.run_folder(config) for _ in range(3)}) == 3


def test_files_are_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), train_tiny.whole(tmp_path / "a.json") as aside:
        aside.write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# random command lines, valid and not: a result or one sentence, never a traceback

SMALLEST = shlex.split("--hidden 8 --heads 2 --layers 1 --intermediate 8 --group-size 4 --steps 2 --pretrain-steps 1 "
                       "--batch-size 2 --block-size 8 --eval-tokens 64 --calibration 1 --samples 2 --rank 1 "
                       "--device cpu --no-compile --methods absmean")  # fmt: skip
NUMBERS = {
    int: [*shlex.split("-1 0 1 2 3 4 12 1_6 ' 4' 1000000000000 9999999999999999999999 1e3 many ² ''"), "1" * 5000],
    float: shlex.split("-1 0 0.2 0.5 1 3 49 1e-30 1e-3 1e30 1e308 1e999 -1e-320 nan inf -inf 0,5 much ''"),
}
METHODS = [*h.QUANTIZERS, *shlex.split("""full,absmean hestia:alpha=0.6 hestia:rho=0,scores=shuffled magic HESTIA : , ''
    hestia:scores=common,alpha=0 hestia:group_size=0 absmean:group_size=8 hestia:samples=3 hestia:alpha=0.1,alpha=0.2
    hestia:group_size=-1 hestia:group_size=5 hestia:samples=2.5 hestia:samples=1 hestia:samples=9999999999999999999999
    hestia:alpha=1e999 hestia:rho=nan hestia: hestia:alpha hestia:= twn:alpha=1 lsq:group_size=0 'a\nb'""")]


def damaged(random, content):
    """A JSON file cut off, with another byte somewhere, or with a value of another kind in it or one left out."""
    where, how = random.randrange(len(content)), random.randrange(4)
    if how == 0:
        return content[:where]
    if how == 1:
        return content[:where] + bytes([random.randrange(256)]) + content[where + 1 :]
    whole = inner = json.loads(content)
    while True:
        key = random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not (isinstance(inner[key], dict | list) and inner[key] and random.random() < 0.7):
            break
        inner = inner[key]
    inner[key] = random.choice([None, [], {}, "x", -1, 0, 1e999, 10**30, True, [[]], {"": 0}])
    if how == 2:
        del inner[key]
    return json.dumps(whole).encode()


def random_value(random, field, files, outs):
    """Words to follow an option: some make sense, some do not. None of them makes a run long."""
    if field.name in ("data", "val_data", "test_data", "llama", "show"):
        return [random.choice(files)]
    if field.name == "out":
        return [random.choice(outs)]
    if field.name == "device":
        return [random.choice(["cpu", "cpu:0", "cpu:7", "CPU", "cuda:99", "meta", "mps", "hpu", "abacus", ":", ""])]
    if field.name in ("preset", *train_tiny.CHOICES):
        return [random.choice([*train_tiny.CHOICES.get(field.name, ["cpu", "gpu", "paper"]), "other", ""])]
    if field.type is tuple:
        return random.choices(METHODS if field.name == "methods" else NUMBERS[float], k=random.randrange(4))
    return [random.choice(NUMBERS[field.type][:3] if field.name == "jobs" else NUMBERS[field.type])]


def random_command(random, folder, finished):
    """Arguments of train_tiny.py: the smallest job with up to three options more; sometimes its folder is damaged."""
    out, text = str(folder / "run"), str(finished.parent / "text.txt")
    files = [text, *(str(folder / name) for name in ("empty", "latin", "binary", "missing", "")), f"{text}/below", "",
             "x" * 300, "\N{SNOWMAN}", "/dev/null", "/proc/self/mem", "--"]  # fmt: skip
    outs = [out, str(folder), text, f"{text}/below", "/proc/nothing", "x" * 300, "", "a/b/c", "/dev/null"]
    arguments = ["--data", text, *SMALLEST, "--out", out]
    for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3])):
        field = random.choice(dataclasses.fields(train_tiny.Config))
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            arguments.append(name if field.name != "compile" and random.random() < 0.7 else "--no-" + name[2:])
        else:
            values = random_value(random, field, files, outs)
            arguments += [f"{name}={values[0]}"] if len(values) == 1 and random.random() < 0.3 else [name, *values]
    odd = random.random()
    if odd < 0.04:
        stray = random.choice(["--colour", "stray", "-h", "--", "--l", "-1", "--met", "--data", "--bench=1"])
        arguments.insert(random.randrange(len(arguments)), stray)
    elif odd < 0.06:
        arguments.pop(random.randrange(len(arguments)))
    elif odd < 0.12:
        (folder / "results.json").write_bytes(damaged(random, (finished / "results.json").read_bytes()))
        arguments = ["--show", str(folder / "results.json")]
    elif odd < 0.22:
        shutil.copytree(finished, out)
        path = random.choice([Path(out) / "config.json", *sorted(Path(out).glob("runs/*.json"))])
        path.write_bytes(damaged(random, path.read_bytes()))
        arguments.append("--resume")
    return arguments


@pytest.fixture(scope="module")
def smallest_run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "text.txt").write_text(Path(text).read_text()[:8000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train_tiny.main(["--data", str(folder / "text.txt"), *SMALLEST, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize("numbers", [range(25), pytest.param(range(25, 500), marks=pytest.mark.slow)], ids=str)
def test_random_command_lines_end_with_a_result_or_one_sentence(numbers, smallest_run, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for number in numbers:
        rng, folder = random.Random(number), tmp_path / str(number)
        folder.mkdir()
        for name, content in {"empty": b"", "latin": b"ab\xe9cd" * 1000, "binary": bytes(range(256)) * 20}.items():
            (folder / name).write_bytes(content)
        arguments = random_command(rng, folder, smallest_run)
        about = f"number {number}: {shlex.join(arguments)}"
        with monkeypatch.context() as patch, warnings.catch_warnings():
            patch.chdir(folder)
            if rng.random() < 0.04:
                patch.setattr(h, "train", interrupted)
            warnings.simplefilter("ignore")
            try:
                code = train_tiny.main(arguments)
            except SystemExit as stop:  # argparse's
                code = stop.code
            except BaseException as error:
                pytest.fail(f"{about}: {error!r}")
        said, error = capsys.readouterr()
        assert code in (0, 1, 2, 130), about
        assert error.strip().count("\n") == 0 and bool(error) == bool(code) and "Traceback" not in said, (about, error)
        shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------------------------
# presets, text, README


def test_presets():
    paper = train_tiny.parse(["--preset", "paper"])  # Table 5
    table_5 = dict(batch_size=256, lr=1.5e-3, weight_decay=0.1, rho=0.2, alpha=0.4, tau_init=0.3, group_size=128,
                   calibration=50, rank=10, samples=20, kappa=1.0)  # fmt: skip
    assert {name: getattr(paper, name) for name in table_5} == table_5
    for preset in ("cpu", "gpu", "paper"):
        train_tiny.check(train_tiny.parse(["--preset", preset, "--device", "cpu"]))
    assert train_tiny.parse(["--preset", "gpu", "--lr", "0.5"]).lr == 0.5


def test_the_standard_library_is_read_the_same_way_twice():
    a, b = train_tiny.standard_library(), train_tiny.standard_library()
    assert a == b and len(a[0]) > 5_000_000 and 0.01 < len(a[1]) / len(a[0]) < 0.12


def test_the_transformers_loop_in_the_readme_runs():
    pytest.importorskip("transformers")
    readme = Path(__file__).with_name("README.md").read_text()
    loop, guidance, method, _ = re.findall(r"```python\n(.*?)```", readme, re.S)
    scope = {}
    torch.manual_seed(0)  # of some models of noise no trace is positive, which is an error
    exec(loop, scope)
    for name, w in scope["qat"].weights.items():
        assert all(len(group.abs().unique()) <= 2 for group in w.detach().reshape(-1, 32)), name
    scope = {"torch": torch, "model": scope["model"].float(), **vars(h)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model of noise may have negative traces
        exec(guidance, scope)
    assert scope["scores"].keys() == h.Hestia(scope["model"], 1, group_size=32).weights.keys()
    exec(method, scope)
    qat = scope["qat"]
    qat.relax(0)
    qat.harden()
    assert h.QUANTIZERS.pop("half").label == "half of each group"
    for w in qat.weights.values():
        assert all(len(group.abs().unique()) <= 2 for group in w.detach().reshape(-1, 32))


# ----------------------------------------------------------------------------------------------------------------------
# notebooks

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_executed_whole_and_small(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 25 and path.stat().st_size <= 500_000
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))  # once, from top to bottom
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error" and output.get("name") != "stderr"

    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for label, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
        module = {"../hestia.py": h, "../train_tiny.py": train_tiny, "../plots.py": plots}.get(target)
        if module and label.startswith("`") and not label.endswith(".py`"):
            name = re.match(r"`(?:train_tiny\.|plots\.)?(\w+)", label)[1]
            assert hasattr(module, name), f"{path.name} links to {label}, which is not in {target}"
