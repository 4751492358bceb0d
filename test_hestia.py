"""The checks of hestia.py, train_tiny.py and plots.py, each against something independent: numbers
worked by hand, autograd in float64, dense matrices, a naive Algorithm 1, the Llama of transformers.

    python -m pytest                # all of it, and the worked examples in the docstrings
    python -m pytest -k lemma       # one topic

Tests that need transformers or hypothesis are skipped without it (pip install '.[test]').
"""

import ast
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import hestia as h
import plots
import train_tiny

torch.set_num_threads(1)  # these models are so small that a second thread only waits

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"  # pretrained weights, where someone has put them
W = [-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]  # the worked example: mean|w| = 0.583333
CODEBOOKS = [h.TERNARY, h.BINARY, h.TWO_BIT]
ONE = torch.ones(1, 1, dtype=torch.float64)

f64 = lambda x: torch.tensor(x, dtype=torch.float64)
seeded = lambda seed: torch.Generator().manual_seed(seed)
randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)
close = lambda a, b, rtol=0.0, atol=0.0: torch.testing.assert_close(a, b, rtol=rtol, atol=atol)

# -- The file itself: its size, its independence, its index ----------------------------------------

SIZES = {"hestia.py": 1150, "train_tiny.py": 420, "plots.py": 750, "test_hestia.py": 1500}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    text = (HERE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= SIZES[name]
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    for node in ast.walk(ast.parse(text if name == "hestia.py" else "")):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            said = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert node.end_lineno - node.lineno + 1 - said <= 60, node.name


def test_hestia_imports_alone_in_an_empty_folder(tmp_path):
    source = (HERE / "hestia.py").read_text(encoding="utf-8")
    (tmp_path / "hestia.py").write_text(source, encoding="utf-8")
    others = ["notebooks", "train_tiny", "plots", "safetensors", "transformers", "matplotlib"]
    code = (f"import sys; sys.modules.update(dict.fromkeys({others}))\n"  # none can be imported
            "import hestia; print(hestia.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.strip() == str(tmp_path / "hestia.py"), done.stderr
    roots = set(re.findall(r"^ *(?:import|from) (\w*)", source, re.M))  # in functions too
    assert roots - sys.stdlib_module_names == {"torch", "safetensors"}


def test_the_index_covers_the_paper_and_every_place_exists():
    covered = {kind: set() for kind in ("Equation", "Algorithm 1", "Section", "Table", "Figure")}
    for line in h.__doc__.splitlines():
        cells = re.split(r" {2,}", line.strip())
        if re.fullmatch(r"[\d-]+", cells[0]):
            kind, numbers, places = "Equation", cells[0], cells[2]
        elif match := re.fullmatch(r"(Algorithm 1|Section|Table|Figure)\D+(\d.*)", cells[0]):
            (kind, numbers), places = match.groups(), cells[1]
        else:
            continue
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
            covered[kind] |= set(range(int(first), int(last or first) + 1))
        file, _, names = places.rpartition(": ")
        for name in names.split(", "):
            if not file:
                assert functools.reduce(getattr, name.split("."), h) is not None
            elif (HERE / file).exists():  # a function, or a constant
                source = (HERE / file).read_text(encoding="utf-8")
                assert re.search(rf"^(def |class |){name}\b( =|\(|:)", source, re.M), places
    assert covered["Equation"] == {*range(1, 37)} and covered["Algorithm 1"] == {*range(1, 14)}
    assert covered["Table"] == {1, 2, 3, 4, 5} and covered["Figure"] == {1, 2}


# -- 3.1 Scale, quantizer, straight-through estimator, dead zone -----------------------------------


def test_absmean_scale_by_hand():
    assert h.absmean_scale(f64(W), eps=0.0).item() == pytest.approx(3.5 / 6, abs=1e-15)
    assert h.absmean_scale(f64(W), eps=0.5).item() == pytest.approx(3.5 / 6 + 0.5)  # it is added
    w = f64([[1.0, 3.0, 0.0, 0.0], [-2.0, 2.0, 5.0, -7.0]])
    close(h.absmean_scale(w, group_size=2), f64([[2.0], [0.0], [2.0], [6.0]]), atol=2e-8)
    gamma = h.absmean_scale(w.half().requires_grad_())
    assert gamma.dtype == torch.float32 and not gamma.requires_grad


def test_quantize_by_hand():
    for codebook, codes in {h.TERNARY: [-1, -1, -1, 0, 1, 1], h.BINARY: [-1, -1, -1, 1, 1, 1],
                            h.TWO_BIT: [-1.5, -1.5, -0.5, 0.5, 0.5, 1.5]}.items():
        close(h.quantize(f64(W), codebook=codebook), 3.5 / 6 * f64(codes), atol=1e-7)
    w = randn(6, 8)  # groups run along the last dimension
    by_hand = [h.quantize(w[r, k : k + 4]) for r in range(6) for k in (0, 4)]
    close(h.quantize(w, group_size=4).reshape(12, 4), torch.stack(by_hand), rtol=1e-12)
    # ties go to 0 for TERNARY and up elsewhere, and H at tau = 0 does the same
    w = f64([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 0.2])
    for codebook, codes in {h.TERNARY: [-1, -1, 0, 0, 0, 1, 1, 0],
                            h.BINARY: [-1, -1, -1, 1, 1, 1, 1, 1],
                            h.TWO_BIT: [-1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 1.5, 0.5]}.items():
        options = dict(codebook=codebook, scale=ONE)
        assert h.quantize(w, **options).tolist() == codes
        assert h.soft_quantize(w, 0.0, **options).tolist() == codes
        assert not h.soft_quantize_jacobian(w, 0.0, **options).any()
        assert h.assignment_probs(w, 0.0, **options).sum(-1).tolist() == [1.0] * 8


def test_what_the_kernels_refuse():
    for g, fits in ((5, 4), (7, 6), (0, 1), (-2, 1), (16, 12)):
        with pytest.raises(ValueError, match=f"size {g} does not divide the width 12; {fits} w"):
            h.quantize(randn(3, 12), group_size=g)
    with pytest.raises(TypeError, match=r"weights are torch.int64; expected floating-point"):
        h.quantize(torch.tensor([1, 0, -3]))
    for codebook in ((1, 0, -1), (1.0, 1.0), (1.0,)):
        with pytest.raises(ValueError, match="at least two codes in ascending order"):
            h.quantize(torch.ones(3), codebook=codebook)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\); expected \(3, 1\)"):
        h.soft_quantize(randn(3, 4), 0.3, group_size=4, scale=torch.ones(2, 1))
    for tau in (-0.1, -math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a temperature >= 0"):
            h.soft_quantize(torch.ones(2), tau)


def test_ste_has_the_value_of_Q_and_the_gradient_of_identity():
    for codebook in CODEBOOKS:
        w, g = randn(5, 8).float().requires_grad_(), randn(5, 8, seed=1).float()
        out = h.quantize_ste(w, 4, codebook)
        out.backward(g)
        assert torch.equal(out, h.quantize(w, 4, codebook)) and torch.equal(w.grad, g)  # exactly


def test_dead_zone_by_hand():
    # gamma = 0.5, so the boundaries are +-0.25; 0.25 is a tie, hence code 0
    w, dw = f64([-1.0, 0.25, 0.25, 0.9, 0.1]), f64([0.4, 0.3, 0.2, -0.5, -0.7])
    assert h.dead_zone(w, dw).tolist() == [True, False, False, True, False]
    # in bfloat16 their sum would be rounded to the boundary; in float32 it lies beyond
    w, dw = torch.tensor([0.498]).bfloat16(), torch.tensor([0.0036]).bfloat16()
    assert h.dead_zone(w, dw, scale=torch.ones(1, 1)).tolist() == [False]
    # gamma stays that of w, though w + dw has another mean
    assert h.dead_zone(f64([0.0, 1.0, 2.0]), f64([0.4, 0.0, 9.0])).tolist() == [True, True, True]


# -- 3.2 The softmax kernel ------------------------------------------------------------------------


def test_golden_numbers_of_the_worked_example():
    w = f64(W).requires_grad_()
    for tau, out in {
        0.350886: [-0.583252, -0.555994, -0.302225, 0.065465, 0.432770, 0.581808],
        0.3: [-0.583315, -0.566624, -0.305056, 0.052186, 0.452133, 0.582776],
        0.1: [-0.583333, -0.583318, -0.333052, 0.000815, 0.569454, 0.583333],
        0.0: [-0.583333, -0.583333, -0.583333, 0.0, 0.583333, 0.583333],
    }.items():
        close(h.soft_quantize(w, tau).detach(), f64(out), atol=1e-6)
    h.soft_quantize(w, 0.3).backward(f64([1.0, -2.0, 3.0, 0.5, -1.0, 2.0]))
    gradient = f64([0.000207, -0.371013, 5.011491, 0.339050, -1.163293, 0.012728])
    close(w.grad, gradient, atol=1e-5)
    J = f64([0.000207, 0.185507, 1.670497, 0.678100, 1.163293, 0.006364])
    close(h.soft_quantize_jacobian(f64(W), 0.3), J, atol=1e-5)
    W_eff = f64([-0.891658, -0.583312, -0.302528, 0.076093, 0.426066, 0.741388])
    close(h.effective_weight(f64(W), 0.3, 0.5), W_eff, atol=1e-6)
    # w = 0.3 at tau = 0.5: mu = .274, V = .254, J = 1.015
    mu, V = h.code_moments(f64([[0.3]]), 0.5)
    J = h.soft_quantize_jacobian(f64([0.3]), 0.5, scale=ONE)
    assert [mu.item(), V.item(), J.item()] == pytest.approx([0.274, 0.254, 1.015], abs=5e-4)


def printed_H(w, tau, gamma, codebook=h.TERNARY):
    """Eqs. (7) and (8) as printed, for w (n_groups, g) and gamma (n_groups, 1): H and pi."""
    q = f64(codebook)
    distance = (w[..., None] / gamma[..., None] - q) ** 2  # (n_groups, g, K)
    pi = torch.softmax(-distance / tau, -1)
    return gamma * (pi * q).sum(-1), pi


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("tau", [0.02, 0.3, 2.0])
def test_kernel_and_lemma_4_1_against_the_printed_softmax(tau, codebook):
    w, gamma, q = (2 * randn(10, 4)).requires_grad_(), 0.5 + randn(10, 1).abs(), f64(codebook)
    H, pi = printed_H(w, tau, gamma, codebook)
    (J,) = torch.autograd.grad(H.sum(), w, create_graph=True)
    (dJ,) = torch.autograd.grad(J.sum(), w)
    scale = gamma.clone().requires_grad_()  # to be held constant
    w2, options = w.view(5, 8), dict(group_size=4, codebook=codebook, scale=scale)
    ours = h.soft_quantize(w2, tau, **options)
    assert torch.autograd.grad(ours.sum(), scale, allow_unused=True, retain_graph=True) == (None,)
    (ours_J,) = torch.autograd.grad(ours.sum(), w, create_graph=True)
    (ours_dJ,) = torch.autograd.grad(ours_J.sum(), w)
    close(h.assignment_probs(w2, tau, **options).view_as(pi), pi, 1e-9, 1e-12)
    close(ours.view_as(H), H, 1e-9, 1e-12)
    close(ours_J, J, 1e-8, 1e-10)
    close(ours_dJ, dJ, 1e-7, 1e-8)
    mean = (pi * q).sum(-1)
    variance = (pi * q**2).sum(-1) - mean**2
    mu, V = h.code_moments(w / gamma, tau, codebook)
    close(mu, mean, 1e-9, 1e-12)  # Eq. (16)
    close(V, variance, 1e-8, 1e-12)  # Eq. (17)
    lemma = h.soft_quantize_jacobian(w2, tau, **options).view_as(J)
    close(lemma, 2 / tau * variance, 1e-8, 1e-10)  # Eq. (18)
    W_eff = h.effective_weight(w2, tau, 0.7, **options).view_as(H)
    close(W_eff, 0.3 * w + 0.7 * H, 1e-9, 1e-12)  # Eq. (9)


def test_closed_forms():
    z = 1.5 * randn(50)
    for tau in (0.05, 0.3, 1.0):
        ternary = torch.sinh(2 * z / tau) / (torch.cosh(2 * z / tau) + 0.5 * math.exp(1 / tau))
        close(h.soft_quantize(z, tau, scale=ONE), ternary, 1e-10, 1e-12)
        binary = torch.tanh(2 * z / tau)
        close(h.soft_quantize(z, tau, codebook=h.BINARY, scale=ONE), binary, 1e-10, 1e-12)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.1, 0.5, 2.0])
def test_gradcheck_and_gradgradcheck(tau, codebook):
    # on the boundaries to a fraction of tau, and in general position
    near = [b + c * tau for b in (-1.0, -0.5, 0.0, 0.5, 1.0) for c in (-0.4, 0.1, 0.7)]
    scale = f64([[1.0], [0.8], [1.3], [1.0], [0.9], [1.1]])
    w = torch.cat([f64(near), 1.2 * randn(9)]).view(6, 4) * scale
    w = w.view(3, 8).requires_grad_()
    options = dict(group_size=4, codebook=codebook, scale=scale)
    J = h.soft_quantize_jacobian(w.detach(), tau, **options)
    assert (tau * J > 0.1).sum() >= 3  # the boundaries are really met
    eps = 1e-3 * min(tau, 0.1)  # finite differences have to resolve the width tau
    H = lambda w: h.soft_quantize(w, tau, **options)
    assert gradcheck(H, (w,), eps=eps, atol=1e-4 / tau, rtol=1e-4)
    assert gradgradcheck(H, (w,), eps=eps, atol=1e-3 / tau**2, rtol=1e-3)
    W_eff = lambda w: h.effective_weight(w, tau, 0.6, **options)
    assert gradcheck(W_eff, (w,), eps=eps, atol=1e-4 / tau, rtol=1e-4)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_variance_in_float32_at_any_temperature(codebook):
    z = torch.linspace(-2, 2, 4001)[None]  # every boundary and every code among them
    z = torch.cat([z, z + 1e-4, z - 3e-6])  # (3, 4001)
    for tau in (1e-7, 1e-5, 1e-3, 0.05, 1.0):
        _, V = h.code_moments(z, tau, codebook)
        distance = (z.double()[..., None] - f64(codebook)) ** 2
        pi = torch.softmax(-distance / tau, -1)  # (3, 4001, K)
        mu = (pi * f64(codebook)).sum(-1, keepdim=True)
        exact = (pi * (f64(codebook) - mu) ** 2).sum(-1)
        assert V.dtype == torch.float32 and (V >= 0).all()
        # mu is rounded to float32: no more than the square of that may be added to V
        close(V.double(), exact, rtol=2e-5, atol=1e-13)


def test_only_w_and_its_scales_are_saved_for_backward():
    w, seen = torch.randn(64, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        h.effective_weight(w, 0.3, 0.5, group_size=64)
    assert [t.data_ptr() == w.data_ptr() for t in seen if t.numel() == w.numel()] == [True]
    assert sum(t.numel() for t in seen) == w.numel() + 128


# -- Section 4 and Appendix A; extremes ------------------------------------------------------------


def test_lemma_4_1_by_central_differences():
    w, eps = 1.5 * randn(200), 1e-6
    for tau, codebook in itertools.product((0.05, 0.3, 1.0), CODEBOOKS):
        H = functools.partial(h.soft_quantize, tau=tau, codebook=codebook, scale=ONE)
        numeric = (H(w + eps) - H(w - eps)) / (2 * eps)
        J = h.soft_quantize_jacobian(w, tau, codebook=codebook, scale=ONE)
        close(J, numeric, rtol=1e-5, atol=1e-6)


def bump(w):
    """A test function: smooth, zero outside (-2, 2), not symmetric."""
    inside = (w / 2).clamp(-0.999999, 0.999999)
    return torch.where(w.abs() < 2, torch.exp(-1 / (1 - inside**2)) * (1 + 0.5 * w), 0.0)


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
        # near a boundary J is a logistic density of variance (pi gamma tau)^2 / 12, so the error
        # starts with phi''
        first_term = gamma**3 * curvature * math.pi**2 * tau**2 / 24
        assert errors[-1] == pytest.approx(first_term, rel=0.1)
    assert all(3.7 < a / b < 4.3 for a, b in zip(errors, errors[1:]))  # second order in tau
    mass = integral(h.soft_quantize_jacobian(w, 0.01, scale=gamma * ONE), w)
    assert mass == pytest.approx(2 * gamma, rel=1e-6)  # gamma at each boundary


def test_appendix_A1_equations_21_to_27():
    gamma, tau, q = 0.7, 0.4, f64(h.TERNARY)
    w = randn(30).requires_grad_()
    grad = lambda y, x: torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    same = functools.partial(close, rtol=1e-10, atol=1e-12)
    same(grad(w / gamma, w), torch.full_like(w, 1 / gamma))  # (21)
    z = (w / gamma).detach().requires_grad_()
    a = torch.exp(-((z[:, None] - q) ** 2) / tau)  # (30, 3)
    Z = a.sum(1)
    pi = a / Z[:, None]
    mu, var = (pi * q).sum(1), (pi * q**2).sum(1) - (pi * q).sum(1) ** 2
    for k in range(3):
        same(grad(a[:, k], z), -2 * (z - q[k]) / tau * a[:, k])  # (22)
    same(grad(Z, z), -2 / tau * ((z[:, None] - q) * a).sum(1))  # (23)
    for k in range(3):
        sum_k = ((z[:, None] - q) * pi).sum(1)
        dpi = -2 / tau * pi[:, k] * (z - q[k]) + 2 / tau * pi[:, k] * sum_k
        same(grad(pi[:, k], z), dpi)  # (24)
        same(sum_k, z - mu)
        same(grad(pi[:, k], z), 2 / tau * pi[:, k] * (q[k] - mu))  # (25)
    same(grad(mu, z), 2 / tau * var)  # (26)
    H = h.soft_quantize(w, tau, scale=gamma * ONE)
    same(grad(H, w), 2 / tau * var)  # (27), of our own H


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
        close((pi / top)[off], torch.exp(-gap / tau)[off], rtol=1e-9, atol=1e-15)  # (29)
    apart = (w.abs() - gamma / 2).abs() > 0.1
    H = h.soft_quantize(w, 0.005, scale=gamma * ONE)
    assert (H - Q)[apart].abs().max() < 1e-9  # (30), (31)
    phi = bump(w)
    dphi = torch.gradient(phi, spacing=(w,))[0]
    minus_Q = -integral(Q * dphi, w)
    gaps = []
    for tau in taus:
        H = h.soft_quantize(w, tau, scale=gamma * ONE)
        left = integral(h.soft_quantize_jacobian(w, tau, scale=gamma * ONE) * phi, w)
        assert left == pytest.approx(-integral(H * dphi, w), abs=1e-6)  # (32), by parts
        assert (H.abs() <= gamma).all()  # the dominating function of (33)
        gaps.append(abs(-integral(H * dphi, w) - minus_Q))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]  # (33), (34): the integrals converge
    left, right = w < -gamma / 2, w > gamma / 2
    parts = -gamma * integral(dphi[left], w[left]) + gamma * integral(dphi[right], w[right])
    b = bump(f64([-gamma / 2, gamma / 2]))
    assert parts == pytest.approx((-gamma * b[0] - gamma * b[1]).item(), abs=1e-4)  # (35)
    assert integral(Q * dphi, w) == pytest.approx((-gamma * b.sum()).item(), abs=1e-4)  # (36)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_value_and_derivative_stay_finite(dtype, codebook):
    inputs = {"zeros": [0.0] * 8, "one giant": [3e4] + [1e-3] * 7, "all equal": [0.25] * 8,
              "tiny": [6e-8, -6e-8, 1.2e-7, 0.0, 6e-8, 6e-8, -1.8e-7, 6e-8],
              "boundaries": [-0.5, 0.5, 0.5, -0.5, 1.0, -1.0, 0.0, 0.0]}
    taus = (0.0, 1e-45, 1e-30, 1e-10, 1e-3, 1.0, 1e10, 1e30, math.inf)
    for name, tau, scale in itertools.product(inputs, taus, (None, torch.ones(2, 1))):
        w, where = torch.tensor(inputs[name], dtype=dtype, requires_grad=True), (name, tau, scale)
        options = dict(group_size=4, codebook=codebook, scale=scale)
        H = h.soft_quantize(w, tau, **options)
        H.sum().backward()
        J = h.soft_quantize_jacobian(w, tau, **options)
        pi = h.assignment_probs(w, tau, **options)
        for x in (H, J, pi, w.grad):
            assert x.dtype == dtype and x.shape[:1] == (8,) and torch.isfinite(x).all(), where
        assert (J >= 0).all() and torch.equal(w.grad, J), where  # Eq. (19)
        assert ((pi.double().sum(-1) - 1).abs() <= 3 * torch.finfo(dtype).eps).all(), where
        gamma = h.absmean_scale(w, 4) if scale is None else scale
        assert (H.view(2, 4).abs() <= (codebook[-1] * gamma).to(dtype)).all(), where
        if tau <= 1e-10 and name != "boundaries":
            z = w.detach().double().reshape(2, 4) / gamma
            distances = (z[..., None] - f64(codebook)).abs().sort().values  # (2, 4, K)
            clear = (distances[..., 1] - distances[..., 0] > 1e-3).flatten()
            assert ((H - h.quantize(w, **options))[clear].abs() <= 1e-20).all(), where
        assert tau < 1e10 or H.abs().max() <= 1e-3 * gamma.max(), where  # all equally likely
    w = torch.tensor([0.5, 3e38, -3e38])  # beyond what float32 can square
    for tau in (0.0, 1e-9, 0.3):
        H, J = (f(w, tau, None, codebook, ONE) for f in (h.soft_quantize, h.soft_quantize_jacobian))
        assert torch.isfinite(J).all() and H[1:].tolist() == [codebook[-1], codebook[0]]
    w = randn(4, 32).to(dtype)  # results in half precision are the rounded float32 ones
    for f in (lambda w: h.quantize(w, 8), lambda w: h.effective_weight(w, 0.3, 0.4, 8),
              lambda w: h.soft_quantize_jacobian(w, 0.3, 8)):
        assert dtype == torch.float64 or torch.equal(f(w), f(w.float()).to(dtype))


# -- Schedules and tau_init ------------------------------------------------------------------------


def test_schedules_by_hand():
    assert [h.pressure(t, 100, 0.2) for t in (0, 5, 10, 20, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert h.pressure(0, 100, 0.0) == 1.0 and h.pressure(50, 100, 1.0) == 0.5
    tau = lambda t, rho=0.2: h.base_temperature(t, 100, rho, 0.3)
    assert tau(0) == tau(20) == 0.3 and tau(60) == pytest.approx(0.15)
    assert tau(40) == pytest.approx(0.15 * (1 + math.cos(math.pi / 4)))
    assert tau(100) == 0.0 == tau(120) and tau(50, 0.0) == pytest.approx(0.15)
    assert tau(99, 1.0) == 0.3 and tau(100, 1.0) == 0.0  # rho = 1 leaves no annealing
    last = math.pi**2 / 4 * 0.3 / 8000**2  # at T - 1, the last step: 2.5 tau_init / (T - T_comp)^2
    assert h.base_temperature(9999, 10_000, 0.2, 0.3) == pytest.approx(last, rel=1e-3)
    for s, t in itertools.product((0.0, 0.3, 1.0), (5, 30)):  # while compressing, and after
        expected = pytest.approx(tau(t) * math.exp(0.4 * s))
        assert h.temperature(t, 100, 0.2, 0.3, s, 0.4) == expected
    for T, rho in ((100, -0.1), (100, 1.1), (100, math.nan), (0, 0.2)):
        with pytest.raises(ValueError, match="expected T > 0 and rho between 0 and 1"):
            h.pressure(0, T, rho)
    lr = [h.learning_rate(t, 1000, 2.0) for t in range(1000)]  # Table 5's warm-up and decay
    assert lr[0] == pytest.approx(0.04) and lr[49] == lr[899] == max(lr) == 2.0
    assert lr[950] == pytest.approx(1.1) and lr[-1] == pytest.approx(0.2, abs=0.02)


def test_tau_init_minimises_the_squared_error():
    gaussian = torch.special.ndtri((torch.arange(8192, dtype=torch.float64) + 0.5) / 8192)
    assert h.optimal_tau_init([gaussian]) == pytest.approx(0.3509, rel=3e-3)
    # in the weights' own units, so that the second tensor dominates
    weights = [randn(16, 32), 5 * randn(8, 32, seed=1) ** 3]
    for c in CODEBOOKS:
        error = lambda tau, c=c: sum(
            (h.soft_quantize(w, tau, 8, c) - w).square().sum().item() for w in weights)
        least = min(error(tau) for tau in np.geomspace(0.011, 9, 100))
        assert error(h.optimal_tau_init(weights, 8, c)) <= least * (1 + 1e-6)
    assert h.optimal_tau_init({"a": weights[0]}, 8) == h.optimal_tau_init([weights[0]], 8)
    few, many = 3 * randn(2, 8) ** 3, randn(64, 64, seed=1)
    together = torch.cat([few.view(-1, 8), many.view(-1, 8)])  # weights count alike, not tensors
    tau = h.optimal_tau_init([together], 8)
    assert h.optimal_tau_init([few, many], 8) == tau
    # the unit of the weights does not matter, as long as epsilon is small in it
    for dtype, decade in ((torch.float32, -5), (torch.float32, 30), (torch.bfloat16, 20)):
        found = h.optimal_tau_init([(together * 10.0**decade).to(dtype)], 8)
        assert found == pytest.approx(tau, rel=5e-3)
    assert h.optimal_tau_init([torch.zeros(4), f64([1e9, -1e9, 1e9])]) < 0.05  # on the grid: cold
    for bad in ([], [torch.zeros(4)], [f64([1.0, math.nan]), torch.ones(2)]):
        with pytest.raises(ValueError, match="finite weights that are not all zero"):
            h.optimal_tau_init(bad)


# -- Properties that hold for whatever weights, groups, codebooks and temperatures -----------------

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    def for_all(test):
        """Run test(data) on examples that it draws, the same every time. A failing one shrinks."""
        options = settings(derandomize=True, deadline=None, database=None, max_examples=60)
        return options(given(data=st.data())(test))

except ImportError:
    for_all = pytest.mark.skip(reason="needs hypothesis; pip install '.[test]' brings it")


def some_case(data):
    """w (rows, width) of any magnitude, with zeros and likely ties; group size, codebook, tau."""
    rows, groups, g = (data.draw(st.integers(1, n)) for n in (3, 3, 6))
    tie = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5])
    size = rows * groups * g
    numbers = data.draw(st.lists(tie | st.floats(-4, 4, width=32), min_size=size, max_size=size))
    w = f64(numbers).view(rows, groups * g) * 10.0 ** data.draw(st.integers(-30, 30))
    extreme = st.sampled_from([0.0, 1e-45, 1e-20, 1e20, math.inf])
    tau = data.draw(extreme | st.floats(-6, 2).map(lambda x: 10.0**x))
    return w, data.draw(st.sampled_from([None, g])), data.draw(st.sampled_from(CODEBOOKS)), tau


rows_of = lambda w, group_size: w.reshape(-1, group_size or w.numel())  # a group in each


@for_all
def test_Q_is_the_nearest_code_and_the_dead_zone_where_it_stays(data):
    w, g, codebook, _ = some_case(data)
    gamma, Q = h.absmean_scale(w, g), h.quantize(w, g, codebook)
    distance = (rows_of(w, g)[..., None] - gamma[..., None] * f64(codebook)).abs()
    rounding = 1e-15 * (gamma + rows_of(w, g).abs())
    assert (rows_of(w - Q, g).abs() <= distance.amin(-1) + rounding).all()
    assert torch.equal(h.quantize(Q, g, codebook, scale=gamma), Q)
    share = data.draw(st.lists(st.floats(-2, 2), min_size=w.numel(), max_size=w.numel()))
    dw = (rows_of(f64(share), g) * gamma).view_as(w)
    same = h.quantize(w + dw, g, codebook, scale=gamma) == Q
    assert torch.equal(h.dead_zone(w, dw, g, codebook), same)


@for_all
def test_H_and_Q_rise_with_w_and_are_odd(data):
    _, _, codebook, tau = some_case(data)
    gamma = 10.0 ** data.draw(st.integers(-30, 30)) * ONE
    z = f64(sorted(data.draw(st.lists(st.floats(-3, 3), min_size=2, max_size=20))))
    z = torch.cat([z, z.nextafter(f64(9))]).sort().values  # and the closest neighbours
    tie = torch.stack([(z - (a + b) / 2).abs() < 1e-9 for a, b in zip(codebook, codebook[1:])])
    H = lambda w: h.soft_quantize(w, tau, codebook=codebook, scale=gamma)
    for f in (H, lambda w: h.quantize(w, codebook=codebook, scale=gamma)):
        y = f(gamma[0] * z) / gamma[0]
        assert (y.diff() >= -1e-14).all()  # up to rounding
        odd = (f(-gamma[0] * z) / gamma[0] + y).abs() < 1e-9
        assert (odd | tie.any(0)).all()


@for_all
def test_groups_know_nothing_of_each_other_nor_of_the_unit(data):
    w, g, codebook, tau = some_case(data)
    width, order = w.shape[1], data.draw(st.permutations(range(len(w))))
    for f in (lambda w: h.soft_quantize_jacobian(w, tau, width, codebook),
              lambda w: h.assignment_probs(w, tau, width, codebook),
              lambda w: h.effective_weight(w, tau, 0.25, width, codebook)):
        whole = f(w)
        close(f(w[order]), whole[order], rtol=1e-12)  # rows permuted
        close(f(w[:1]), whole[:1], rtol=1e-12)  # the others left out
        close(f(w.view(-1)), whole.view(-1, *whole.shape[2:]), rtol=1e-12)  # in another shape
    gamma, c = h.absmean_scale(w, g), 2.0 ** data.draw(st.integers(-60, 60))  # exact
    for f, unit in ((h.soft_quantize, c), (h.soft_quantize_jacobian, 1)):
        scaled = f(c * w, tau, g, codebook, scale=c * gamma)
        assert torch.equal(scaled, unit * f(w, tau, g, codebook, scale=gamma))
    assert torch.equal(h.absmean_scale(c * w, g, eps=c * 1e-8), c * gamma)


# -- 3.3.1 Hutch++, Hessian traces, scores ---------------------------------------------------------


signs = lambda n, k, generator: 2.0 * torch.randint(0, 2, (n, k), generator=generator).double() - 1


def symmetric(spectrum):
    Q = torch.linalg.qr(randn(len(spectrum), len(spectrum))).Q
    return (Q * f64(spectrum)) @ Q.T


def test_hutchpp_is_exact_when_the_sketch_covers_the_range_and_counts_its_products():
    counted, H = [], symmetric([5.0, -3.0, 2.0, 0.5] + [0.0] * 46)
    matvec = lambda V: counted.append(V.shape[1]) or H @ V
    run = lambda seed, **more: h.hutchpp(matvec, 50, generator=seeded(seed), dtype=H.dtype, **more)
    assert run(0) == run(0) == pytest.approx(4.5, abs=1e-12)
    assert counted == [10, 30] * 2  # Table 5: 10 + 10 + 20 products
    assert [run(seed, rank=4) for seed in range(5)] == pytest.approx([4.5] * 5, abs=1e-12)
    counted.clear()
    assert run(0, rank=0, samples=1) != run(1, rank=0, samples=1)  # Hutchinson's
    assert counted == [1, 1]
    assert h.hutchpp(lambda V: 2 * V, 3, samples=1) == pytest.approx(6.0)  # rank 3, not 10
    for wrong in (dict(samples=0), dict(rank=-1)):
        with pytest.raises(ValueError, match="expected rank >= 0, samples >= 1"):
            run(0, **wrong)


def test_hutchpp_is_unbiased_and_its_mutants_are_not():
    H = symmetric([3.0 / k * (-1) ** (k % 3 == 0) for k in range(1, 31)])

    def variant(generator, over_m=True, independent=True, projected=True, r=3, m=4):
        S, Gm = signs(30, r, generator), signs(30, m, generator)
        Gm = Gm if independent else torch.cat([S, Gm[:, r:]], 1)
        Q = torch.linalg.qr(H @ S).Q
        Gm = Gm - Q @ (Q.T @ Gm) if projected else Gm
        return ((Q * (H @ Q)).sum() + (Gm * (H @ Gm)).sum() / (m if over_m else 1)).item()

    def bias_in_standard_errors(estimate, seeds=2000):
        values = f64([estimate(seeded(s)) for s in range(seeds)])
        return abs((values.mean() - H.trace()) / (values.std() / seeds**0.5)).item()

    ours = lambda g: h.hutchpp(lambda V: H @ V, 30, 3, 4, g, torch.float64)
    assert bias_in_standard_errors(ours) < 4 and bias_in_standard_errors(variant) < 4
    for wrong in ("over_m", "independent", "projected"):  # the first is Eq. (12) to the letter
        assert bias_in_standard_errors(functools.partial(variant, **{wrong: False})) > 4, wrong


def test_hutchpp_converges_faster_than_hutchinson_where_the_spectrum_decays():
    n, budgets, ours, hutchinson = 200, (16, 32, 64, 128), {}, {}

    def rms(H, m, r):
        run = lambda s: h.hutchpp(lambda V: H @ V, n, r, m - 2 * r, seeded(s), torch.float64)
        return np.sqrt(np.mean([(run(s) - H.trace().item()) ** 2 for s in range(60)]))

    k = np.arange(1, n + 1)
    flat = np.where(np.random.default_rng(0).random(n) < 0.5, -1.0, 1.0)  # all 1 is too easy
    for name, spectrum in {"k^-1": 1 / k, "k^-2": 1 / k**2, "flat": flat}.items():
        H = symmetric(spectrum)
        ours[name] = [rms(H, m, m // 4) for m in budgets]
        hutchinson[name] = [rms(H, m, 0) for m in budgets]
    slope = lambda errors: np.polyfit(np.log(budgets), np.log(errors), 1)[0]
    assert slope(ours["k^-1"]) < -1 and slope(ours["k^-2"]) < -1.6
    assert -0.75 < slope(ours["flat"]) < -0.25 and -0.75 < slope(hutchinson["k^-2"]) < -0.25
    assert 5 * ours["k^-2"][-1] < hutchinson["k^-2"][-1]
    assert ours["flat"][-1] > hutchinson["flat"][-1]  # there it loses


def test_estimates_say_how_sure_they_are():
    one, several = h._estimate(3.0, f64([3.0])), h._estimate(2.0, f64([1.0, 3.0, 1.0, 3.0]))
    assert one == (6.0, math.inf) and one.flagged  # one reading has no spread
    assert several == pytest.approx((4.0, (4 / 3 / 4) ** 0.5)) and not several.flagged
    flagged = [h.TraceEstimate(x, 1.0).flagged for x in (-2.1, -2.0, 0.0, 2.0, 2.1)]
    assert flagged == [False, True, True, True, False]


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, rope_theta=10000.0)
    model = h.Llama(h.LlamaConfig(**{**shape, **changes})).double()
    for p in model.parameters():  # livelier than at the start, so that curvature is everywhere
        p.data = p.data + 0.2 * torch.randn_like(p)
    return model


weights_of = lambda model: {name: m.weight for name, m in h.linear_layers(model).items()}


def test_traces_of_a_tiny_llama_against_the_dense_hessian():
    model = tiny_llama(num_hidden_layers=1, intermediate_size=8)
    params = weights_of(model)
    ids = torch.randint(0, 17, (4, 9), generator=seeded(1))
    loss_fn = lambda ids: model(ids[:, :-1], ids[:, 1:])
    model.model.norm.weight.grad = marker = torch.ones(8).double()
    run = lambda *a, **k: h.hessian_traces(loss_fn, params, [ids[:2], ids[2:]], *a, **k)
    whole, told = run(rank=64, samples=1), []  # the sketch covers every block
    few = run(generator=seeded(0), progress=lambda *now: told.append(now))
    joint = run("joint", 0, 150, generator=seeded(0))
    assert told == [(k, 560) for k in range(1, 561)]  # 7 tensors, 2 batches, 40 products
    assert model.model.norm.weight.grad is marker and all(w.grad is None for w in params.values())
    for name, w in params.items():

        def loss_of(flat, name=name, w=w):
            changed = {name + ".weight": flat.view_as(w)}
            with sdpa_kernel(SDPBackend.MATH):
                return functional_call(model, changed, (ids[:, :-1], ids[:, 1:]))

        H = torch.autograd.functional.hessian(loss_of, w.detach().flatten(), vectorize=True)
        exact = H.trace().item()
        assert whole[name].value == pytest.approx(exact, abs=1e-10), name
        assert 0 < abs(few[name].value - exact) < 6 * few[name].stderr, name
        assert abs(joint[name].value - exact) < 4 * joint[name].stderr, name
    a, b, c = (run("joint", 2, 3, generator=seeded(seed)) for seed in (0, 0, 1))
    assert a == b != c


@pytest.fixture(scope="module")
def curved():
    """Of a trained tiny Llama: sizes of the quantized tensors, their gradient, exact Hessian."""
    # text of 200 words, the first the most frequent: Python's own source differs between versions
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(1, 32, (n,), generator=generator) for n in (2, 3, 4, 5, 6) * 40]
    drawn = torch.multinomial(1 / torch.arange(1.0, 201), 10_000, True, generator=generator)
    text = torch.cat([torch.cat([words[k], torch.zeros(1).long()]) for k in drawn.tolist()])
    # in float64, or 250 steps make another model of every rounding that differs between machines
    model = h.Llama(dataclasses.replace(tiny_llama().config, vocab_size=32)).double()
    h.train(model, text, steps=250, batch_size=32, block_size=24, lr=2e-2)
    weights = list(weights_of(model).values())
    sizes = [w.numel() for w in weights]
    x, y = h.batch_at(text, 0, 8, 24, seed=99)
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(model(x, y), weights, create_graph=True)
    g = torch.cat([part.detach().flatten() for part in grads])  # (N,)
    as_weights = lambda v: [p.view(*v.shape[:-1], *w.shape)
                            for p, w in zip(v.split(sizes, -1), weights)]
    rows = []  # by torch's own batched backward pass, not by the products that are tested
    for units in torch.eye(len(g), dtype=torch.float64).split(64):
        Hv = torch.autograd.grad(grads, weights, as_weights(units), retain_graph=True,
                                 is_grads_batched=True)
        rows.append(torch.cat([part.flatten(1) for part in Hv], 1))
    H, v = torch.cat(rows), randn(len(g), seed=5)
    assert (H - H.T).abs().max() < 1e-12
    Hv = h._hessian_product(grads, weights, as_weights(v))
    close(torch.cat([part.flatten() for part in Hv]), H @ v, atol=1e-10)  # one of our products
    return sizes, g, H


def judge(runs, exact):
    """Worst bias in standard errors; rms relative error; mean square of error / claimed error."""
    values, claimed = f64([[tuple(e) for e in run] for run in runs]).unbind(-1)  # (runs, tensors)
    wrong = values - exact
    bias = (wrong.mean(0) / (wrong.std(0) / len(wrong) ** 0.5)).abs().max()
    return bias, (wrong / exact).square().mean().sqrt(), (wrong / claimed).square().mean()


def test_hutchpp_and_joint_probing_find_the_traces_of_a_trained_llama(curved):
    sizes, g, H = curved
    blocks = [H[i][:, i] for i in torch.arange(len(H)).split(sizes)]
    exact = torch.stack([B.trace() for B in blocks])
    per_tensor = lambda generator: [h._estimate(*h._hutchpp(
        lambda V, B=B: B @ V, len(B), 10, 20, generator, B)) for B in blocks]
    bias, rms, claim = judge([per_tensor(seeded(seed)) for seed in range(100)], exact)
    assert bias < 4 and rms <= 0.05 and 0.5 < claim < 2  # the errors mean what they say

    # joint, with 40 products in all: on g . x + x . H x / 2 at x = 0, where g and H are the model's
    x = {k: torch.zeros(n, requires_grad=True) for k, n in enumerate(sizes)}
    g32, H32, flat = g.float(), H.float(), lambda: torch.cat(list(x.values()))
    loss_fn = lambda _: g32 @ flat() + 0.5 * flat() @ (H32 @ flat())
    joint = [h.hessian_traces(loss_fn, x, [0], "joint", generator=seeded(seed)).values()
             for seed in range(60)]
    bias, rms, claim = judge(joint, exact)
    assert bias < 4 and rms <= 0.25 and 0.5 < claim < 2
    # without the scaling by gradient norms the same products say much less
    V = signs(len(H), 1200, seeded(0))
    readings = torch.stack([t.sum(0) for t in (V * (H @ V)).split(sizes)], 1)  # (1200, tensors)
    unscaled = readings.view(30, 40, -1).mean(1)
    assert ((unscaled - exact) / exact).square().mean().sqrt() > 1.3 * rms


def test_batches_are_averaged_one_graph_at_a_time():
    class Saved:  # what a graph keeps for its backward pass, and lets go when it goes
        def __init__(self, x):
            self.x = x
            saved.add(self)

    w, saved, calls = torch.ones(3, requires_grad=True), weakref.WeakSet(), []

    def loss_fn(b):  # its Hessian is diag(6 b^2)
        assert not saved, "the graph of an earlier batch is still there"
        calls.append(b)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.x):
            return (b**2 * w**3).sum()

    for estimator in ("hutchpp", "joint"):
        traces = h.hessian_traces(loss_fn, {"w": w}, iter([1.0, 2.0, 3.0]), estimator)
        assert traces["w"].value == pytest.approx(18 * (1 + 4 + 9) / 3, rel=1e-5)
    assert calls == [1, 2, 3] * 3  # the sketch and the rest; all at once


def test_hessian_traces_refuse_what_they_cannot_do():
    w = torch.ones(3, requires_grad=True)
    loss, run = lambda b: w.pow(3).sum(), h.hessian_traces
    with pytest.raises(ValueError, match="unknown estimator 'magic'"):
        run(loss, {"w": w}, [0], estimator="magic")
    with pytest.raises(ValueError, match="a trace needs a batch, a tensor, rank"):
        run(loss, {"w": w}, [])
    for bad in (w.bfloat16(), w.detach()):
        with pytest.raises(ValueError, match="w: a trace needs float32 or float64 that requires"):
            run(loss, {"w": bad}, [0])
    model = tiny_llama(num_hidden_layers=1)  # tensors of a copy have no part in the model's loss
    params, ids = weights_of(copy.deepcopy(model)), torch.zeros(1, 4, dtype=torch.long)
    for estimator in ("hutchpp", "joint"):
        named = r"\S*q_proj, .*down_proj" if estimator == "joint" else r"\S*q_proj"
        with pytest.raises(ValueError, match=f"does not depend on {named}; are"):
            run(lambda ids: model(ids, ids), params, [ids], estimator)
    for size in (0.0, 1e-21):  # no gradient to speak of: the scaling must not overflow
        w.data.fill_(size)
        with torch.no_grad():
            assert run(lambda b: w.square().sum(), {"w": w}, [0], "joint")["w"].value == 6


def test_scores_by_hand():
    two = {"a": 1.0, "b": 100.0}  # logs standardised to -1 and 1
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    for kappa in (1.0, 2.0, 600.0):
        expected = {"a": sigmoid(-kappa), "b": sigmoid(kappa)}
        assert h.sensitivity_scores(two, kappa) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain numbers are trusted
        for names in ("a", "abc"):  # one, and several that are alike
            scores = h.sensitivity_scores(dict.fromkeys(names, 0.1))
            assert scores == pytest.approx(dict.fromkeys(names, 0.5), abs=1e-6)


def test_traces_that_are_not_positive():
    noise, sure = h.TraceEstimate(1e-6, 1.0), h.TraceEstimate(2.0, 0.1)
    for lost in (-42.5, noise):  # neither 42.5, nor what is positive by luck drags the floor down
        with pytest.warns(UserWarning, match=r"not positive, or lost .* for n: below 1 it"):
            scores = h.sensitivity_scores({"a": sure, "b": 200.0, "n": lost})
        half_the_smallest = {"a": 2.0, "b": 200.0, "n": 1.0}
        assert scores == pytest.approx(h.sensitivity_scores(half_the_smallest))
    with pytest.warns(UserWarning, match="lost in its error, for noise, more"):
        h.sensitivity_scores({"noise": noise, "more": h.TraceEstimate(2.0, 3.0)})
    for bad in ({"a": -1.0, "b": 0.0}, {"a": 1.0, "b": math.nan}, {"a": 1.0, "b": math.inf}):
        with pytest.raises(ValueError, match=r"no Hessian trace is positive, or one is not finite"):
            h.sensitivity_scores(bad)


# -- Algorithm 1 -----------------------------------------------------------------------------------


def naive_algorithm_1(model, batches, scores, tau_init, lrs, clip, group_size):
    """Algorithm 1 as printed: no relax or pull_back, plain autograd through Eqs. (7) to (9)."""
    latents = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    decays = lambda w: {"params": [w], "weight_decay": 0.1 if w.dim() >= 2 else 0.0}
    optimizer = torch.optim.AdamW([decays(w) for w in latents.values()], betas=(0.9, 0.95))
    norm_of = lambda gradients: sum(g.square().sum() for g in gradients).sqrt().item()
    T, log = len(batches), []
    for t, (x, y) in enumerate(batches):
        T_comp, effective = 0.2 * T, dict(latents)
        p = min(1.0, t / T_comp)
        cosine = math.cos(math.pi * (t - T_comp) / (T - T_comp))
        tau_bar = tau_init if t < T_comp else tau_init / 2 * (1 + cosine)
        for name, score in scores.items():
            w = latents[name + ".weight"].reshape(-1, group_size)
            gamma = w.detach().abs().mean(1, keepdim=True) + 1e-8
            H, _ = printed_H(w, tau_bar * math.exp(0.4 * score), gamma)
            effective[name + ".weight"] = ((1 - p) * w + p * H).view_as(latents[name + ".weight"])
        loss = functional_call(model, effective, (x, y))
        upstream = torch.autograd.grad(loss, list(effective.values()), retain_graph=True)
        loss.backward()
        norm = norm_of(upstream)  # with dL/dW_eff, as our loop clips
        log.append((loss.item(), norm, norm_of(w.grad for w in latents.values())))
        for group in optimizer.param_groups:
            group["lr"] = lrs[t]
            group["params"][0].grad *= min(1.0, clip / norm)
        optimizer.step()
        optimizer.zero_grad()
    return f64(log), latents


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_algorithm_1_equals_its_naive_form(micro_batches):
    T, tokens, model = 12, torch.randint(0, 17, (500,), generator=seeded(5)), tiny_llama()
    scores = {name: k / 14 for k, name in enumerate(h.linear_layers(model))}
    batches = [h.batch_at(tokens, t, 4, 8, seed=3) for t in range(T)]
    lrs = [h.learning_rate(t, T, 1e-2) for t in range(T)]
    expected, latents = naive_algorithm_1(copy.deepcopy(model), batches, scores, 0.3, lrs, 0.5, 4)
    assert expected[:, 1].min() > 0.5  # so that clipping matters in every step

    qat = h.Hestia(model, T, group_size=4, scores=scores, tau_init=0.3)
    log = h.train(model, tokens, steps=T, batch_size=4, block_size=8, lr=1e-2, qat=qat, clip=0.5,
                  micro_batches=micro_batches, seed=3, log_every=1)
    found = f64([(r["loss"], r["grad_norm"], r["grad_norm_latent"]) for r in log])
    close(found[:, :2], expected[:, :2], rtol=1e-6)
    close(found[:, 2], expected[:, 2], rtol=1e-5)  # a cold Jacobian magnifies rounding
    trained = dict(model.named_parameters())
    trained |= {name + ".weight": w for name, w in qat.latents.items()}
    assert len(qat.parameters()) == len(trained) == len(latents)
    for name, w in trained.items():
        close(w.detach(), latents[name].detach(), rtol=1e-6, atol=1e-8)
    qat.harden()
    for name, w in weights_of(model).items():
        Q = h.quantize(qat.latents[name].detach(), 4)
        assert torch.equal(w.sign(), Q.sign())  # the codes are Q's
        assert ((w - Q).abs() <= 0.004 * Q.abs()).all()  # so are the scales, to bfloat16


def test_relax_and_pull_back_are_eqs_9_and_19():
    model, x = tiny_llama(), torch.randint(0, 17, (2, 6))
    qat = h.Hestia(model, 10, group_size=8, tau_init=0.2)
    for spoil in (lambda: None, qat.harden):
        spoil()
        with pytest.raises(RuntimeError, match=r"call relax\(t\) first"):
            qat.pull_back()
        qat.relax(1)
    model(x, x).backward()
    shown = {name: (w.detach().clone(), w.grad) for name, w in weights_of(model).items()}
    qat.pull_back()
    for name, w in qat.latents.items():  # at p = 0.5
        close(shown[name][0], h.effective_weight(w.detach(), 0.2, 0.5, 8))
        J = 0.5 + 0.5 * h.soft_quantize_jacobian(w.detach(), 0.2, 8)
        close(w.grad, shown[name][1] * J, rtol=1e-12)
        assert qat.layers[name].weight.grad is None
    qat.relax(2)  # a layer that the loss leaves out gets no gradient
    model.model.layers[0].mlp.up_proj(torch.ones(8).double()).sum().backward()
    qat.pull_back()
    given = [name for name, w in qat.latents.items() if w.grad is not None]
    assert given == ["model.layers.0.mlp.up_proj"]


def test_hard_shows_Q_and_puts_everything_back():
    model, x = tiny_llama(), torch.randint(0, 17, (2, 6))
    qat, weights = h.Hestia(model, 10, group_size=8), weights_of(model)
    qat.relax(3)
    model(x, x).backward()
    before = {name: (w.detach().clone(), w.grad.clone()) for name, w in weights.items()}
    with pytest.raises(KeyError), qat.hard() as shown:
        assert shown is model
        for w in weights.values():
            assert all(len(group.abs().unique()) <= 2 for group in w.detach().reshape(-1, 8))
        with qat.hard():
            pass
        raise KeyError  # what goes wrong inside must not leave the hard weights behind
    for name, w in weights.items():
        assert torch.equal(w.detach(), before[name][0]) and torch.equal(w.grad, before[name][1])
    qat.pull_back()  # still possible: nothing was recomputed
    with qat.hard():
        hard = model(x, x).item()
    qat.harden()
    assert model(x, x).item() == hard


def test_the_settings_of_table_5_hold_by_default():
    make = lambda method="hestia", **more: h.Hestia(nn.Linear(256, 2), 10, method=method, **more)
    qat = make()
    assert (qat.group_size, qat.rho, qat.alpha) == (128, 0.2, 0.4)
    assert qat.step_of(1, "") == (0.5, qat.tau_init, 128, h.TERNARY)
    assert qat.tau_init == h.optimal_tau_init(qat.latents, 128) > 0
    tau = make(tau_init=0.3, scores={"": 1.0}).step_of(0, "").tau
    assert tau == pytest.approx(0.3 * math.exp(0.4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make("absmean", rho=1.0).tau_init == 0.0  # has no tau to anneal
    with pytest.warns(UserWarning, match="rho = 1"):
        make(rho=1.0)


def test_which_layers_are_quantized():
    for model in (tiny_llama(), tiny_llama(tie_word_embeddings=False)):
        layers = h.linear_layers(model)
        assert len(layers) == 14 and all(name.startswith("model.layers.") for name in layers)
    up = {name: layer for name, layer in layers.items() if "up_proj" in name}
    qat = h.Hestia(model, 1, layers=up, group_size=4)
    assert list(qat.latents) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert str(qat) == "2 layers, 17% of the weights; matrices left out: Embedding, Linear"
    assert len(qat.left_out) == 14 and qat.left_out["model.embed_tokens.weight"] == "Embedding"
    assert len(qat.rest) == 12 + 5 + 2  # other linear weights; norms; embedding and head
    odd = nn.ModuleDict({"word": nn.Embedding(5, 4), "up": nn.Linear(4, 4), "out": nn.Linear(4, 5)})
    odd["out"].weight = odd["word"].weight  # a head of any name, known by its tie
    assert list(h.linear_layers(odd)) == ["up"]
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.grad = torch.ones(4, 4)
    qat = h.Hestia(layer, 10, method="full", group_size=4)
    assert layer.weight.grad is None and qat.rest == []
    qat.harden()  # leaves no view of the latent weight
    assert torch.equal(layer.weight, qat.latents[""])
    assert layer.weight.data_ptr() != qat.latents[""].data_ptr()


def test_hestia_refuses_bad_input():
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 3))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    bad = lambda model=model, **k: h.Hestia(model, **{"total_steps": 10, "group_size": 4, **k})
    for message, wrong in {
        "unknown method 'magic'; expected one of full, absmean, hestia": dict(method="magic"),
        "group size 5 does not divide the width 12; 4 would": dict(group_size=5),
        "expected T > 0 and rho between 0 and 1": dict(rho=2.0),
        r"codebook is \(1.0, 0.0\); expected at least two codes": dict(codebook=(1.0, 0.0)),
        r"the score of 1 is 1.5; expected 0 to 1": dict(scores={"0": 0.5, "1": 1.5}),
        "the score of 1 is None": dict(scores={"0": 0.5}),
        "tau_init is -0.3; expected a number above 0": dict(tau_init=-0.3),
        "tau_init is nan": dict(tau_init=math.nan),
        "nothing to quantize": dict(model=nn.Sequential(nn.ReLU())),
        "0 shares its weight with another layer": dict(model=shared),
    }.items():
        with pytest.raises(ValueError, match=message):
            bad(**wrong)
    with pytest.raises(ValueError, match=r"relax\(10\): expected a step from 0 to 9"):
        bad().relax(10)
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the weights of 1 are not loaded, or hold NaN"):
        bad()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_dtypes_and_what_hardening_leaves(codebook):
    narrow = tiny_llama().bfloat16()
    wide = copy.deepcopy(narrow).float()
    ends = []
    for model, dtype in ((narrow, None), (wide, None), (copy.deepcopy(wide), torch.bfloat16)):
        before = {name: w.detach().clone() for name, w in weights_of(model).items()}
        qat = h.Hestia(model, 4, group_size=8, codebook=codebook, dtype=dtype)
        qat.relax(0)
        for name, w in weights_of(model).items():
            assert w.dtype == (dtype or before[name].dtype)
            assert torch.equal(qat.latents[name].detach(), before[name].float())
            w.grad = torch.ones_like(w)
        qat.pull_back()
        assert all(w.grad.dtype == torch.float32 for w in qat.latents.values())
        with qat.hard():
            shown = {name: w.detach().clone() for name, w in weights_of(model).items()}
        qat.harden()
        for name, w in weights_of(model).items():
            assert w.dtype == before[name].dtype and w.requires_grad
            assert torch.equal(w.to(shown[name]), shown[name])
            gamma = h.absmean_scale(qat.latents[name], 8).bfloat16().float()
            on_grid = (gamma * qat.codes()[name].float().view(-1, 8)).view_as(w)
            assert torch.equal(w.detach(), on_grid.to(w.dtype))
        ends.append(weights_of(model))
    if codebook == h.TERNARY:  # they leave the same weights
        assert all(torch.equal(ends[0][k].float(), end[k]) for end in ends[1:] for k in end)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_of_the_readme_makes_a_model_of_transformers_ternary(dtype):
    pytest.importorskip("transformers")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    loop = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    made = "LlamaForCausalLM(LlamaConfig(**shape))"
    assert made in loop and "qat.relax(t)" in loop
    exec(loop.replace(made, f"{made}.to(torch.{dtype})"), scope := {})
    model, ids = scope["model"], torch.randint(0, 256, (2, 8))
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert len(weights_of(model)) == 14
    for w in weights_of(model).values():
        assert all(len(group.abs().unique()) <= 2 for group in w.detach().reshape(-1, 32))


def test_hestia_can_be_pickled_and_copied():
    model = tiny_llama()
    qat = h.Hestia(model, 10, group_size=8, scores=dict.fromkeys(h.linear_layers(model), 0.3))
    qat.relax(0)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    qat.pull_back()
    before = copy.deepcopy(model)
    for other in (copy.deepcopy(qat), pickle.loads(pickle.dumps(qat))):
        assert other.scores == qat.scores and other.tau_init == qat.tau_init
        assert {*map(id, other.rest)} < {*map(id, other.model.parameters())}
        other.harden()
        assert all(torch.equal(w, qat.hardened(n)) for n, w in weights_of(other.model).items())
    assert same_weights(model, before)  # it has not moved


# -- The model and the loop ------------------------------------------------------------------------

LLAMA3 = {**h.LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16}


def random_llama(**changes):
    """A small Llama-3.2: RoPE's thresholds lie within reach, attention is far from uniform."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, rope_scaling=LLAMA3)
    torch.manual_seed(0)
    model = h.Llama(h.LlamaConfig(**{**shape, **changes}))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def llama_of_transformers(config):
    transformers = pytest.importorskip("transformers")
    shape = dataclasses.asdict(config) | {"max_position_embeddings": 256}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("changes", [
    dict(num_key_value_heads=1, head_dim=16), dict(tie_word_embeddings=False),
    dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)])
def test_logits_and_loss_equal_those_of_transformers(changes, scaling):
    ours = random_llama(rope_scaling=scaling, **changes)
    theirs = llama_of_transformers(ours.config)
    theirs.load_state_dict(ours.state_dict())  # the same names, all of them
    ids = torch.randint(0, 96, (2, 200))
    with torch.no_grad():
        expected = theirs(ids).logits
        close(ours(ids), expected, atol=2e-4)
        close(ours(ids[:, :-1], ids[:, 1:]), theirs(ids, labels=ids).loss, rtol=1e-5)
        if scaling:  # and the scaling matters here
            ours.config.rope_scaling = None
            assert (ours(ids) - expected).abs().max() > 0.05


def test_rope_of_llama_3_2_by_hand():
    f = h.rope_frequencies(h.LlamaConfig(rope_scaling=h.LLAMA3))
    assert f.shape == (32,) and f[0] == 1.0 and f[-1] == pytest.approx(500000 ** (-62 / 64) / 32)
    plain = h.rope_frequencies(h.LlamaConfig())
    wavelength = 2 * math.pi / plain
    assert torch.equal(f[wavelength < 2048], plain[wavelength < 2048])
    close(f[wavelength > 8192], plain[wavelength > 8192] / 32, rtol=1e-6)
    between = (wavelength >= 2048) & (wavelength <= 8192)
    assert between.any() and ((f < plain) & (f > plain / 32))[between].all()
    cos, sin = f64([0.0, 0.6]), f64([1.0, 0.8])  # a quarter turn, and one of 53 degrees
    assert h.rotate(f64([1.0, 1.0, 0.0, 0.0]), cos, sin).tolist() == [0.0, 0.6, 1.0, 0.8]


def test_generate():
    model, ids = tiny_llama().float(), torch.zeros(1, 1, dtype=torch.long)
    greedy = h.generate(model, ids, 6, 4, temperature=0)
    assert greedy.shape == (1, 7)
    for k in range(1, 7):
        assert model(greedy[:, max(0, k - 4) : k])[0, -1].argmax() == greedy[0, k]
    assert torch.equal(*(h.generate(model, ids, 20, 8, 1.0, seeded(1)) for _ in range(2)))
    many = h.generate(model, ids.expand(4000, 1), 1, 8, 0.5, seeded(0))[:, 1]
    share = torch.bincount(many, minlength=17) / 4000
    expected = torch.softmax(model(ids)[0, -1].detach() / 0.5, 0)
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_batches_depend_on_seed_and_step_alone():
    tokens = (torch.arange(1000) % 251).to(torch.uint8)
    x, y = h.batch_at(tokens, 7, 4, 16, seed=3)
    assert x.shape == (4, 16) and x.dtype == torch.int64 and torch.equal((x + 1) % 251, y)
    assert torch.equal(x[:, 1:], y[:, :-1])
    for step, seed in ((7, 3), (8, 3), (7, 4)):
        again = torch.equal(x, h.batch_at(tokens, step, 4, 16, seed=seed)[0])
        assert again == ((step, seed) == (7, 3))
    ends = h.batch_at(tokens[:18], 0, 100, 16, seed=0)[1][:, -1]
    assert set(ends.tolist()) == {16, 17}  # the last token too is a target
    with pytest.raises(ValueError, match=r"tokens are Tensor \(16,\); expected a torch tensor"):
        h.batch_at(tokens[:16], 0, 4, 16, seed=0)


def test_evaluate_predicts_every_token_of_each_block_but_the_first():
    model = tiny_llama()
    tokens = torch.randint(0, 17, (43,), dtype=torch.uint8)
    losses = []
    for block in tokens.long().split(10):  # the last block has 3 tokens
        log_probs = model(block[None, :-1])[0].log_softmax(-1)
        losses += (-log_probs[range(len(block) - 1), block[1:]]).tolist()
    loss = h.evaluate(model, tokens, 10, batch_size=3)
    assert len(losses) == 38 and loss == pytest.approx(sum(losses) / 38, rel=1e-6)
    for few, block_size in ((tokens[:1], 10), (tokens, 1)):
        with pytest.raises(ValueError, match="leave none to predict"):
            h.evaluate(model, few, block_size)


def small_run(method="hestia", schedules=12, seed=0, micro_batches=1, watch=None):
    model = tiny_llama(seed).float()
    tokens = torch.randint(0, 17, (2000,), generator=seeded(seed))
    qat = method and h.Hestia(model, schedules, method=method, group_size=8)
    on_step = watch and (lambda *now: watch(qat, *now))
    log = h.train(model, tokens, steps=12, batch_size=8, block_size=16, lr=1e-2, qat=qat, seed=seed,
                  micro_batches=micro_batches, log_every=3, on_step=on_step)
    if qat:
        qat.harden()
    return log, list(model.parameters())


def test_the_same_seed_gives_the_same_bits_and_the_log_says_what_happened():
    steps, codes = [], []

    def watch(qat, t, record):
        steps.append(t)
        if record:
            codes.append(torch.cat([c.flatten() for c in qat.codes().values()]))

    (log_a, a), (log_b, b) = small_run(watch=watch), small_run()
    for r in log_a + log_b:
        assert r.pop("seconds") > 0
    same = lambda a, b: all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert log_a == log_b and same(a, b) and not same(a, small_run(seed=1)[1])
    assert same(small_run("full")[1], small_run(None)[1])  # Hestia adds nothing of its own
    assert steps == [*range(12)] and [r["step"] for r in log_a] == [0, 3, 6, 9, 11]
    flips = [(x != y).double().mean().item() for x, y in itertools.pairwise(codes)]
    assert max(flips) > 0
    assert [r["p"] for r in log_a] == [0, 1, 1, 1, 1]
    assert [r["lr"] for r in log_a] == [h.learning_rate(r["step"], 12, 1e-2) for r in log_a]
    assert log_a[-1]["tau_max"] < log_a[0]["tau_max"] == log_a[0]["tau_min"]
    keys = {"step", "loss", "lr", "grad_norm", "grad_norm_latent"}
    assert small_run("absmean")[0][0].keys() == keys | {"seconds"}
    assert log_a[0].keys() == keys | {"p", "tau_min", "tau_max"}


def test_a_run_can_be_taken_up_again_and_its_parts_replaced():
    def stop(t, record):
        if t == 4:
            raise KeyboardInterrupt

    model, called = tiny_llama().float(), []
    other, tokens = copy.deepcopy(model), torch.randint(0, 17, (300,), generator=seeded(0))
    straight, broken = (h.Hestia(m, 8, group_size=8) for m in (model, other))
    options = dict(steps=8, batch_size=4, block_size=8, lr=1e-2, micro_batches=2)
    h.train(model, tokens, qat=straight, **options)
    options |= dict(qat=broken, optimizer=h.adamw(broken.parameters(), lr=1.0))
    with pytest.raises(KeyboardInterrupt):
        h.train(other, tokens, on_step=stop, **options)
    backward = lambda *args: called.append("backward") or h.backward(*args)
    update = lambda *args: called.append("update") or h.update(*args)
    h.train(other, tokens, start=5, backward=backward, update=update, **options)
    assert called == ["backward", "update"] * 3
    assert all(torch.equal(*pair) for pair in zip(straight.parameters(), broken.parameters()))


def test_what_the_loop_refuses():
    with pytest.raises(ValueError, match="a batch of 8 does not split into 3 equal parts"):
        small_run(micro_batches=3)
    with pytest.raises(ValueError, match="12 steps, and schedules for 6; make them equal"):
        small_run(schedules=6)
    pairs = []

    def poison(qat, t, record):
        if t == 4:
            qat.model.model.norm.weight.data.fill_(math.inf)
            pairs.extend((p, p.detach().clone()) for p in qat.parameters())

    # a loss that is not finite stops it before the step
    with pytest.raises(h.Diverged, match=r"loss nan, gradient norm nan; lower the learning rate"):
        small_run("absmean", watch=poison)
    assert pairs and all(torch.equal(*pair) for pair in pairs)


# -- Checkpoints -----------------------------------------------------------------------------------


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


@pytest.fixture
def folder(tmp_path):
    """A saved small Llama, ternary in groups of 16."""
    pytest.importorskip("safetensors")
    h.Hestia(model := random_llama(), 1, group_size=16).harden()
    return h.save_llama(model, tmp_path / "llama"), model


@pytest.mark.parametrize("dtype, shard, changes", [
    ("float32", "1GB", {}), ("bfloat16", "20KB", {}),
    ("float16", "1GB", {"tie_word_embeddings": False}),
    ("bfloat16", "20KB", {"attention_bias": True, "mlp_bias": True}),
    ("float32", "20KB", {"rope_scaling": None, "head_dim": 16})])
def test_folders_of_transformers_load(dtype, shard, changes, tmp_path):
    config = random_llama(**changes).config
    theirs = llama_of_transformers(config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (shard == "20KB") == (tmp_path / "model.safetensors.index.json").exists()
    ours = h.load_llama(tmp_path)
    assert ours.config == config and same_weights(ours, theirs)
    assert {str(p.dtype) for p in ours.parameters()} == {f"torch.{dtype}"}
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")  # the newer spelling; now the older one of the same
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (tmp_path / "config.json").write_text(json.dumps(raw))
    again = h.load_llama(tmp_path, torch.float32)
    assert again.config == config and {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.skipif(not SHARED.exists(), reason="needs stories260K beside the repository")
def test_stories260k_tells_its_story(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    source, copied = SHARED / "checkpoints" / "stories260k", tmp_path / "copy"
    model = h.load_llama(source)
    ids = h.generate(model, torch.tensor([[1]]), 150, 512, temperature=0)[0].tolist()
    text = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).decode(ids).strip()
    assert len(text) > 250 and (source / "greedy_reference.txt").read_text().startswith(text[:400])
    assert same_weights(model, h.load_llama(h.save_llama(model, copied)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copied / name).read_bytes() == (source / name).read_bytes()


def test_save_llama_is_read_alike_by_us_and_by_transformers(folder):
    path, model = folder
    again = h.load_llama(path)
    assert same_weights(again, model) and again.config == model.config
    tokens = torch.randint(0, 96, (500,), generator=seeded(0))
    assert h.evaluate(again, tokens, 64) == h.evaluate(model, tokens, 64)
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    from safetensors.torch import load_file

    stored = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in stored and stored["model.norm.weight"].dtype == torch.float32
    for name in weights_of(model):
        assert stored[name + ".weight"].dtype == torch.bfloat16
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        close(again(tokens[None, :100]), theirs(tokens[None, :100]).logits, atol=2e-4)


def test_save_llama_refuses_and_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    path, model = folder
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        h.save_llama(model, path)
    import safetensors.torch

    original = safetensors.torch.save_file

    def full_disk(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def one_bit_off(tensors, file, **more):
        tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[5, 5] ^= 1
        original(tensors, file, **more)

    for fault, error in ((full_disk, OSError), (one_bit_off, RuntimeError)):
        monkeypatch.setattr(safetensors.torch, "save_file", fault)
        with pytest.raises(error) as raised:
            h.save_llama(model, tmp_path / "x")
    assert "layers.1.mlp.up_proj.weight reads back differently" in str(raised.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]
    assert before == {p.name: p.read_bytes() for p in path.iterdir()}
    (tmp_path / "empty").mkdir()
    assert same_weights(h.load_llama(h.save_llama(model, tmp_path / "empty")), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_dtypes_are_saved_without_loss(dtype, tmp_path):
    pytest.importorskip("safetensors")
    model = random_llama().to(dtype)
    if dtype == torch.float64:
        model.float().double()  # what float32 holds
    assert same_weights(h.load_llama(h.save_llama(model, tmp_path / "a")), model)
    for codebook in (h.TWO_BIT, h.TERNARY):  # 1.5 gamma is not bfloat16
        h.Hestia(model, 1, group_size=16, codebook=codebook).harden()
        path = h.save_llama(model, tmp_path / str(len(codebook)))
        assert same_weights(h.load_llama(path), model)
    stored = json.loads((path / "config.json").read_text())["torch_dtype"]
    assert stored == ("bfloat16" if dtype == torch.bfloat16 else "float32")


def point_outside(path):
    (path / "model.safetensors").rename(path.parent / "x")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')


Q = "model.layers.0.self_attn.q_proj.weight"
FILES = {  # what the exception says: what was done to the folder
    "No such file.*config.json": lambda p: (p / "config.json").unlink(),
    "No such file.*model.safetensors": lambda p: (p / "model.safetensors").unlink(),
    "No such file.*llama/x": point_outside,  # an index names files of its own folder only
    "Expecting property name": lambda p: (p / "config.json").write_text("{"),
    "Meta's format.*notebooks.lab.check": lambda p: (p / "config.json").rename(p / "params.json"),
    "deserializing": lambda p: os.truncate(p / "model.safetensors", 5000),
}
CONFIGS = {  # what was changed in config.json
    r"has model_type, hidden_act \('bert', 'silu'\)": {"model_type": "bert"},
    r"\('llama', 'gelu'\); expected 'llama', 'silu'": {"hidden_act": "gelu"},
    "this unpacks: python -m notebooks.lab.checkpoints": {"quantization_config": {"bits": 4}},
    "rope_scaling is {'rope_type': 'yarn'}": {"rope_scaling": {"type": "yarn"}},
    "rope_scaling is {'rope_type': 'llama3'": {"rope_scaling": {**h.LLAMA3, "factor": 0}},
    "hidden_size is 0; expected 2048 or the like": {"hidden_size": 0},
    "rms_norm_eps is nan": {"rms_norm_eps": math.nan},
    "and head_dim even; they are .*head_dim=7": {"head_dim": 7},
    "must be a multiple of .*num_key_value_heads=3": {"num_key_value_heads": 3},
    "has 2 layers and says 2000000000": {"num_hidden_layers": 2_000_000_000},
    r"mlp.up_proj.weight: .*\[64, 32\].*\[128, 32\]": {"intermediate_size": 128},
}
TENSORS = {  # what was changed in model.safetensors
    f"Missing .*{Q}(.|\n)*Unexpected .*model.more": lambda f: {"model.more": f.pop(Q)},
    rf"{Q}: .*\[16, 64\].*\[32, 32\]": lambda f: {Q: f[Q].reshape(16, 64)},
    "holds whole numbers, NaN or infinity": lambda f: {Q: f[Q].int()},
    "a head that differs from the embedding": lambda f: {"lm_head.weight": torch.ones(96, 32)},
}


@pytest.mark.parametrize("message", [*FILES, *CONFIGS, *TENSORS])
def test_broken_checkpoints_are_refused_with_what_is_wrong(message, folder):
    from safetensors.torch import load_file, save_file

    config, weights = (folder[0] / name for name in ("config.json", "model.safetensors"))
    FILES.get(message, lambda path: None)(folder[0])
    if message in CONFIGS:
        config.write_text(json.dumps(json.loads(config.read_text()) | CONFIGS[message]))
    if message in TENSORS:
        tensors = load_file(weights)
        save_file(tensors | TENSORS[message](tensors), weights)
    with pytest.raises(Exception, match=message):  # ours, or that of json, safetensors, torch
        h.load_llama(folder[0])


# -- train_tiny.py and plots.py --------------------------------------------------------------------

def titles(drawn):
    figure = drawn if isinstance(drawn, plots.plt.Figure) else drawn.figure
    plots.plt.close(figure)
    text = " | ".join(ax.get_title(loc="left") + ax.get_title() for ax in figure.axes)
    return " ".join(text.split())  # whatever space or line break stands there


def test_every_figure_draws_and_says_something(tmp_path):
    assert train_tiny.main([*TINY.split(), "--out", str(tmp_path / "run")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (draw, about, _) in plots.FIGURES.items():
            text = titles(draw(tmp_path / "run"))
            assert about and len(text) > 20 and "nan" not in text, (name, text)
    ax = plots.plt.figure().add_subplot()
    with pytest.raises(ValueError, match="1 Axes were given; this figure has 2 panels"):
        plots.staircase(axes=[ax])


def test_figures_in_numbers():
    """What a title claims of a formula, against numbers worked elsewhere."""
    said = titles(plots.mse_against_tau())
    assert "closest to W at τ = 0.351; at Table 5's 0.3 the error is 0.2 % higher" in said
    assert "changes Q for 8.8 % of Gaussian weights" in titles(plots.dead_zone_line())
    cdf = torch.special.ndtr(f64([-0.65, -0.5, 0.35, 0.5]) * (2 / math.pi) ** 0.5)
    assert float(cdf[1] - cdf[0] + cdf[3] - cdf[2]) == pytest.approx(0.088, abs=5e-4)
    drawn = plots.lemma_4_2()
    assert all(": area 2.0000" in text.get_text() for text in drawn.axes[0].get_legend().texts)
    assert "within 0.016 % of" in titles(drawn)


TINY = """--layers 1 --hidden 32 --intermediate 64 --heads 2 --group-size 32 --batch-size 4 --rank 2
--samples 2 --block-size 32 --eval-tokens 2048 --pretrain-steps 8 --steps 8"""
FOUR = ["full", "absmean", "hestia-no-hessian", "hestia"]


def test_a_small_run_leaves_all_that_it_promises(tmp_path):
    folder = tmp_path / "run"
    code = ("import sys, train_tiny; assert train_tiny.main(sys.argv[1:]) == 0\n"
            "print('of the lab:', [name for name in sys.modules if name.startswith('notebooks')])")
    done = subprocess.run([sys.executable, "-c", code, *TINY.split(), "--out", folder], cwd=HERE,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "of the lab: []" in done.stdout, done.stderr
    files = ["config.json", "overview.png", "results.json", "runs"]
    files += [f"{name}-seed0.pt" for name in ("pretrained", *FOUR)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    read = functools.partial(json.loads, parse_constant=pytest.fail)  # of NaN and Infinity
    results = read((folder / "results.json").read_text())
    keys = "config", "data", "versions", "hardware", "table", "per_seed", "sensitivities"
    assert tuple(results) == keys
    (rows,), (traces,) = results["per_seed"], results["sensitivities"]
    assert list(rows) == list(results["table"]) == ["before", "untrained", *FOUR]
    assert rows["full"].keys() == {"lr", "seconds", "tau_init", "train", "val"}
    assert rows["hestia"].keys() - rows["full"].keys() == {"changed_last_tenth"}
    for trace in traces["tensors"].values():
        assert tuple(trace) == ("value", "stderr", "flagged", "score") and 0 < trace["score"] < 1
    log = plots.read_log(folder)
    assert list(log) == [(name, 0) for name in ("pretrain", *FOUR)]
    plain = {"step", "loss", "lr", "grad_norm", "grad_norm_latent", "seconds"}
    for (name, _), records in log.items():
        soft = {"p", "tau_min", "tau_max"} if "hestia" in name else set()
        for t, record in enumerate(records):
            assert record["step"] == t and record.keys() == plain | soft
        assert name == "pretrain" or records[-1]["seconds"] == rows[name]["seconds"]
    arrays = plots.read_snapshots(folder)["absmean", 0]
    assert np.allclose(arrays["hist"].sum(-1), np.ones((8, 3)))
    # an STE feels a weight move where its code changes: outside the dead zone
    assert np.allclose(arrays["felt"] + arrays["dead"], 1)

    model = train_tiny.load_checkpoint(folder / "hestia-seed0.pt")
    for layer in h.linear_layers(model).values():
        w = layer.weight.detach().view(-1, 32)
        assert ((w == 0) | (w.abs() == w.abs().amax(1, keepdim=True))).all()
    config = train_tiny.Config(**results["config"])
    tokens, facts = train_tiny.load_text(config)
    assert facts == results["data"] and len(tokens["val"]) == facts["val_bytes"]
    found = train_tiny.losses(config, model, tokens)
    assert found == pytest.approx({key: rows["hestia"][key] for key in found}, abs=1e-5)
    assert f"\n| HESTIA | {found['train']:.4f} | {found['val']:.4f} |" in done.stdout


BAD = """--steps 0|--steps x|--rho 1.5|--rho nan|--lr inf|--samples 1|--seeds 0|--distill 2|--magic
--batch-size 5 --micro-batches 2|--group-size 33|--heads 3|--hidden 31|--preset big|--methods magic
--data nowhere.txt|--data .|--test-data short.txt|--val-data text.txt --data=|--packed|--device tpu9
--llama nowhere --preset cpu|--sensitivity magic|--resume|--out full|--out short.txt"""


@pytest.mark.parametrize("arguments", BAD.replace("\n", "|").split("|"))
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes((HERE / "LICENSE").read_bytes())
    Path("short.txt").write_text("too short")
    Path("full/folder").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^2$"):  # argparse raises it too
        sys.exit(train_tiny.main([*TINY.split(), "--data", "text.txt", *arguments.split()]))
    said = capsys.readouterr().err
    assert said.startswith("train_tiny.py: ") and said.count("\n") == 1, said
    assert len(list(Path().rglob("*"))) == 4  # what was there before


def test_warnings_and_divergence_are_said_in_plain_words(tmp_path, capsys):
    few = f"{TINY} --data {HERE / 'LICENSE'} --pretrain-steps 0 --methods hestia".split()
    soft = [*few, "--steps", "3", "--kappa", "0.001", "--out", str(tmp_path / "soft")]
    assert train_tiny.main(soft) == 0
    said = capsys.readouterr().out
    for note in ("seed 0: all scores are alike", "hestia was still soft at the end"):
        assert f"note: {note}" in said
    assert train_tiny.main([*few, "--lr", "1e8", "--out", str(tmp_path / "lr")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("train_tiny.py: the run failed: loss ") and said.count("\n") == 1
    log = []
    for t, norm in enumerate((1.0, 99.0, 5100.0)):
        log.append({"step": t, "loss": 1.0, "grad_norm": norm, "seconds": 1.0})
        train_tiny.report("hestia", 10, log[-1], log[:-1])
    (note,) = (x for x in capsys.readouterr().out.splitlines() if "note" in x)
    assert "hestia: the gradient norm jumped from 50 to 5.1e+03; lower --lr" in note


def test_presets_and_the_text():
    assert train_tiny.parse([]) == train_tiny.Config()
    gpu, llama = (train_tiny.parse(x.split()) for x in ("--preset gpu --seeds 1", "--llama folder"))
    assert (gpu.steps, gpu.seeds, gpu.sensitivity) == (2000, 1, "hutchpp")
    assert (llama.lr, llama.batch_size, llama.sensitivity) == (1.5e-3, 256, "joint")  # Table 5
    train, val = train_tiny.standard_library()
    assert (train, val) == train_tiny.standard_library() and 0.02 < len(val) / len(train) < 0.1
    assert Path(ast.__file__).read_bytes() in train + val


def test_the_table_by_hand(capsys):
    """Means 1.0, 1.5, 1.25 on training text. On validation text the STE is below full precision."""
    losses, seeds = {"before": 2.0, "full": 1.0, "absmean": 1.5, "hestia": 1.25}, []
    for off in (-0.1, 0.1):
        seeds.append({name: {"train": x + off, "val": -x} for name, x in losses.items()})
    table = plots.summarize(seeds)
    assert table["hestia"]["gap_train"] == [pytest.approx(0.5), pytest.approx(0, abs=1e-9)]
    assert "gap_val" not in table["hestia"] and "gap_train" not in table["before"]
    plots.print_table(table, "byte")
    plots.print_table(plots.summarize(seeds[:1]), "byte")
    said = capsys.readouterr().out
    assert "| full precision, continued | 1.0000 ± 0.1414 | -1.0000 ± 0.0000 | 100% ± 0% |" in said
    assert "| HESTIA | 1.1500 | -1.2500 | 50% |" in said
