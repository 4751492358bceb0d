"""Checks of notebooks/lab/rivals.py: worked examples, closed forms, autograd, short trainings."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import hestia
import plots
from notebooks.lab import fast, laws, rivals

W = [-1.2, -0.6, -0.3, 0.1, 0.4, 0.9]  # the worked example: mean|w| = 3.5 / 6
G = [1.0, -2.0, 3.0, 0.5, -1.0, 2.0]  # dL/dW_eff for its gradients
GAMMA = 3.5 / 6
STEP = hestia.Step(p=1.0, tau=0.3, group_size=None, codebook=hestia.TERNARY)


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, rtol=0, atol=atol)


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    return hestia.Llama(hestia.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1))


def made(row, rows=1, group_size=6, steps=10, lr=1e-3, **settings):
    """(W, on_step) of a row around one layer whose rows all hold the worked example."""
    model = nn.Sequential(nn.Linear(6, rows, bias=False))
    model[0].weight.data = torch.tensor([W] * rows)
    line = {**rivals.ROWS[row], "scratch": False}
    qat, more = rivals.make(row, model, steps, lr, line, group_size=group_size, **settings)
    return qat, more.get("on_step")


# -- Methods of W alone, and learned numbers -------------------------------------------------------

ABSMEAN = [-GAMMA, -GAMMA, -GAMMA, 0, GAMMA, GAMMA]
TWO_BIT = [-0.875, -0.875, -0.875 / 3, 0.875 / 3, 0.875 / 3, 0.875]
INSIDE = [0, -2, 3, 0.5, -1, 2]  # G, where the first weight lies outside of the grid
DGE, DAQ = [0, 0, 3, 0.279835, 0.441702, 0], [0, 0, 0.582577, 0.405646, 0.463223, 0]
DSQ = [0, 0, 1.371913, 0.848591, 1.167783, 0]
EXAMPLES = [  # method, what it learns, W_eff, dL/dW, dL/d of what it learns
    ("twn", {}, [-0.9, -0.9, 0, 0, 0, 0.9], G, {}),
    ("int2-absmax", {}, [-1.2, 0, 0, 0, 0, 1.2], G, {}),
    ("tequila", {}, ABSMEAN, G, {}),
    ("dge", {}, ABSMEAN, [g * slope for g, slope in zip(G, DGE)], {}),
    ("daq", {}, ABSMEAN, [g * slope for g, slope in zip(G, DAQ)], {}),
    ("dsq", {}, [-GAMMA, -GAMMA, -0.303107, 0.066313, 0.432695, GAMMA],
     [g * slope for g, slope in zip(G, DSQ)], {}),
    ("lsq", {"scale": 2 * GAMMA}, [-2 * GAMMA, -2 * GAMMA, 0, 0, 0, 2 * GAMMA], INSIDE,
     {"scale": 0.612372}),
    ("lsq", {"scale": GAMMA}, ABSMEAN, [0, 0, 3, 0.5, -1, 0], {"scale": 0.466569}),
    ("lsq", {"scale": 1.2}, [-1.2, 0, 0, 0, 0, 1.2], G, {"scale": 0.221135}),
    ("seq", {"scale": 1.2}, [-0.8, -0.8, 0, 0, 0, 0.8], INSIDE, {"scale": 0.221135}),
    ("seq", {"scale": 0.8}, [-1.6 / 3] * 3 + [0] + [1.6 / 3] * 2, [0, -2, 3, 0.5, -1, 0],
     {"scale": -0.246650}),
    ("dlt", {"scale": 0.9, "shift": 0.05}, [-0.85, -0.85, 0.05, 0.05, 0.05, 0.95],
     [0.9, -1.8, 3, 0.5, -1, 1.8], {"scale": 3.0, "shift": 3.5}),
]


@pytest.mark.parametrize("method, own, value, gradient, slopes", EXAMPLES)
def test_each_method_by_its_worked_example(method, own, value, gradient, slopes):
    w = f64([W]).requires_grad_()
    own = {key: f64([start]).requires_grad_() for key, start in own.items()}
    W_eff = hestia.METHODS[method].relax(w, STEP, **own)
    W_eff.backward(f64([G]))
    assert close(W_eff, f64([value])) and close(w.grad, f64([gradient]))
    assert all(close(own[key].grad, f64([slope])) for key, slope in slopes.items())


@pytest.mark.parametrize("row, value", [("int2", TWO_BIT), ("llm-qat", TWO_BIT), ("cage", ABSMEAN),
                                        ("bitnet", ABSMEAN), ("spectra", ABSMEAN)])
def test_rows_of_the_straight_through_estimator(row, value):
    qat, _ = made(row, rows=2)
    qat.latents["0"].data[1] *= 3
    qat.relax(0)
    weight = qat.model[0].weight
    if row in ("bitnet", "spectra"):  # one scale for both rows, 2 gamma
        value = [-2 * GAMMA, -2 * GAMMA, 0, 0, 0, 2 * GAMMA]
    assert close(weight[0], torch.tensor(value))
    weight.grad = torch.tensor([G, G])
    qat.pull_back()
    assert torch.equal(qat.latents["0"].grad, torch.tensor([G, G]))


def test_learned_numbers_start_where_the_papers_say():
    start = lambda row: made(row, rows=2, group_size=3)[0].own["0"]
    assert start("lsq")["scale"].tolist() == pytest.approx([1.4, 2.8 / 3] * 2)  # 2 mean|w|
    assert start("seq")["scale"].tolist() == pytest.approx([1.2, 0.9] * 2)  # max|w|
    # the threshold 0.7 mean|w| is 0.49, which 1.2 and 0.6 pass, and 0.327, which 0.4 and 0.9 pass
    assert start("dlt")["scale"].tolist() == pytest.approx([0.9, 0.65] * 2)
    assert start("dlt")["shift"].tolist() == [0] * 4


def test_a_learned_scale_that_fell_to_its_floor_can_rise_again():
    for relax in (rivals.relax_lsq, rivals.relax_seq):
        scale = f64([-1e-3]).requires_grad_()
        relax(f64([W]), STEP, scale).backward(f64([G]))
        assert scale.grad.abs() > 0.1


@pytest.mark.parametrize("row, numbers", [("lsq", 1), ("seq", 1), ("dlt", 2)])
def test_learned_numbers_are_trained_without_weight_decay(row, numbers):
    model = tiny_llama()
    qat, _ = rivals.make(row, model, 4, 1e-3, group_size=4)
    matrices, vectors = hestia.adamw(qat.parameters(), 1e-3).param_groups
    own = [x for own in qat.own.values() for x in own.values()]
    assert len(own) == numbers * len(qat.layers) and vectors["weight_decay"] == 0
    assert all(any(x is p for p in vectors["params"]) for x in own)
    assert len(matrices["params"]) == len(qat.layers) + 1  # and the embedding
    before, tokens = copy.deepcopy(own), torch.arange(99) % 17
    hestia.train(model, tokens, steps=4, batch_size=2, block_size=8, lr=1e-3, qat=qat)
    assert not any(torch.equal(x, old) for x, old in zip(own, before))


def test_dsq_has_its_slope_everywhere():
    def dsq(z):  # the paper's formula, for a number
        k = math.log(2 / 0.2 - 1)
        rise = math.tanh(k * (min(abs(z), 1) - 0.5)) / math.tanh(k / 2)
        return math.copysign((rise + 1) / 2, z)

    z = [0.0, -0.0, 0.3, -0.3, 0.9, -0.9, 1.5, -1.5, 2.3, -2.3]  # mean|z| = 1
    w = (0.7 * f64([z])).requires_grad_()  # so that gamma = 0.7
    W_eff = rivals.relax_dsq(w, STEP)
    (slope,) = torch.autograd.grad(W_eff.sum(), w)
    assert close(W_eff, 0.7 * f64([[dsq(x) for x in z]]), 1e-7)
    assert close(slope, f64([[(dsq(x + 1e-6) - dsq(x - 1e-6)) / 2e-6 for x in z]]), 1e-6)
    assert W_eff[0, :2].tolist() == [0, 0] and 0.4 < slope[0, 0] == slope[0, 1]


def test_codes_are_places_in_the_grid_of_the_method():
    for row, codes in {"twn": [-2, -2, 0, 0, 0, 2], "lsq": [-2, -2, 0, 0, 0, 2],
                       "int2-absmax": [-2, 0, 0, 0, 0, 2]}.items():
        assert made(row)[0].codes()["0"].tolist() == [codes], row


# -- LOTION and PV-Tuning -------------------------------------------------------------------------


def test_the_penalty_of_lotion_by_its_worked_example():
    w, step = f64([W]).requires_grad_(), STEP
    penalty = (f64([G]).square() * rivals.rounding_variance(w, step)).sum() / 2
    (gradient,) = torch.autograd.grad(penalty, w)
    expected = f64([[0, 0, 0.075, 0.047917, -0.108333, 0]])
    assert penalty.item() == pytest.approx(0.425208, abs=1e-6) and close(gradient, expected)
    for strength in (1.0, 10.0):  # and in the loop, where G is g^2 after the first step
        qat, _ = made("lotion", strength=strength)
        qat.relax(0)
        assert torch.equal(qat.model[0].weight, torch.tensor([W]))  # the forward pass is exact
        qat.model[0].weight.grad = torch.tensor([G])
        qat.pull_back()
        found = qat.latents["0"].grad - torch.tensor([G])
        assert close(found.double(), strength * expected)


def test_the_variance_of_lotion_is_that_of_stochastic_rounding():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    step, n = STEP._replace(group_size=4), 40_000
    scale = w.view(-1, 4).abs().mean(1).repeat_interleave(4).view_as(w)
    # up with the chance that makes the mean right; what lies outside goes to the end of the grid
    z = (w / scale).clamp(-1, 1)
    up = torch.rand(n, *w.shape, generator=generator, dtype=torch.float64) < z - z.floor()
    drawn = scale * (z.floor() + up)
    assert close(drawn.mean(0), scale * z, 0.02)
    variance = rivals.rounding_variance(w, step)
    # the error of a sample variance is at most the levels' distance squared over 2 sqrt(n)
    assert ((drawn.var(0) - variance).abs() <= 4 * scale.square() / (2 * n**0.5)).all()
    assert (variance > 0).sum() > 8 and (variance == 0).sum() > 4


def test_the_running_square_of_lotion_is_adams():
    p, (qat, _) = nn.Parameter(torch.tensor([W])), made("lotion", strength=1e3)
    adam = torch.optim.Adam([p], betas=(0.9, 0.95))
    for t in range(4):
        gradient = torch.tensor([G]) * (1 + t)
        p.grad = gradient.clone()
        adam.step()
        qat.relax(t)
        qat.model[0].weight.grad = gradient
        qat.pull_back()
        v = adam.state[p]["exp_avg_sq"] / (1 - 0.95 ** (t + 1))
        torch.testing.assert_close(qat.squares["0"], v)  # no penalty in it
        qat.latents["0"].grad = None
    assert any(x is qat.squares["0"] for x in qat.parameters())  # so that a saved state holds it


def test_pv_tuning_by_its_worked_example():
    codes, scale, g = f64([[-1, -1, -1, 0, 1, 1]]), f64([[GAMMA]]), f64([G])
    chosen = lambda step, count: rivals.chosen_codes(codes, scale, g, step, count).tolist()
    assert chosen(0.2, 2) == [[-1, 0, -1, 0, 1, 1]]
    assert chosen(0.3, 1) == codes.tolist()  # the third, which is pushed past the end of the grid
    assert chosen(0.3, 3) == [[-1, 0, -1, 0, 1, 0]] == chosen(0.3, 6)
    for before, slope in ((codes, -1.0), (f64([[-1, 0, -1, 0, 1, 1]]), -3.0)):
        own = f64([GAMMA]).requires_grad_()
        w = (GAMMA * before).requires_grad_()
        W_eff = rivals.relax_pv(w, STEP, own)
        W_eff.backward(g)
        assert torch.equal(W_eff, w) and close(own.grad, f64([slope])) and torch.equal(w.grad, g)


def test_ties_of_pv_tuning_go_by_index():
    codes, scale = torch.zeros(2, 40), torch.ones(2, 1)
    found = rivals.chosen_codes(codes, scale, -torch.ones(2, 40), step=1.0, count=50)
    assert found.flatten().tolist() == [1.0] * 50 + [0.0] * 30


def test_a_step_of_pv_tuning_changes_few_codes_and_ends_on_the_grid():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 20, bias=False))
    qat, more = rivals.make("pv", model, 10, 1e-3, group_size=20)
    optimizer, w, own = hestia.adamw(qat.parameters(), 1e-3), qat.latents["0"], qat.own["0"]
    grad = torch.randn(20, 40)
    for lr, changes in ((1e-3, 0), (1.0, 8)):  # 1 % of 800; a short step reaches no other code
        codes, scale = w.sign(), own["scale"].detach().clone()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        qat.relax(0)
        model[0].weight.grad = grad.clone()
        qat.pull_back()
        slope = (grad * codes).view(40, 20).sum(1)
        torch.testing.assert_close(own["scale"].grad, slope)
        more["update"](optimizer, torch.tensor(1.0), torch.tensor(1.0), 1e9)
        optimizer.zero_grad()
        changed = w.sign() != codes
        assert 0 <= int(changed.sum()) <= changes and (lr < 1 or changed.any())
        largest = grad.abs().flatten().topk(8).indices
        assert set(changed.flatten().nonzero().flatten().tolist()) <= {*largest.tolist()}
        assert not torch.equal(own["scale"], scale)
        expected = own["scale"].detach().repeat_interleave(20).view(20, 40) * w.sign()
        assert torch.equal(w, expected)
    with pytest.raises(hestia.Diverged):
        more["update"](optimizer, torch.tensor(math.nan), torch.tensor(1.0), 1.0)


def test_the_law_of_co_qat_by_its_worked_numbers():
    share = lambda *run: laws.best_share(laws.tokens_per_byte(*run))
    found = [share(10e9, 1e9, 2), share(100e9, 1e9, 2), share(2e12, 134.5e6, 1.58)]
    assert found == pytest.approx([0.161, 0.325, 0.549], abs=5e-4)
    for f in (0.1, 0.5):  # the other way round: ln S = -a / ln f
        assert laws.best_share(math.exp(-6.7297 / math.log(f))) == pytest.approx(f)
    with pytest.raises(ValueError, match=r"0\.617 tokens per byte of weights: the law begins"):
        share(16.4e6, 134.5e6, 1.58)


def test_the_figure_of_the_law_has_both_models_and_our_runs():
    ax = laws.shares()
    one, small, *runs = ax.get_lines()
    at = lambda line, D: np.interp(math.log(D), np.log(line.get_xdata()), line.get_ydata())
    assert at(one, 79e9) == pytest.approx(laws.best_share(400), abs=2e-3)
    assert at(small, 2e12) == pytest.approx(0.549, abs=1e-3) and len(runs) == len(laws.RUNS)
    assert all(abs(line.get_ydata()[0] - at(small, line.get_xdata()[0])) > 0.1 for line in runs)
    plots.plt.close("all")


# -- Tequila ---------------------------------------------------------------------------------------


def test_tequila_moves_dead_weights_through_the_bias():
    qat, _ = made("tequila")
    qat.relax(0)
    y = qat.model(torch.tensor([[1.0, 2.0, -1.0, 0.5, 1.0, -2.0]]))
    assert y.item() == pytest.approx(-1.75 + 1e-4, abs=1e-6)  # the weight 0.1 is dead
    y.backward()
    qat.pull_back()
    assert close(qat.latents["0"].grad, torch.tensor([[1, 2, -1, 0.501, 1, -2]]), 1e-6)
    assert qat.model[0].bias.grad is None and len(qat.parameters()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_of_tequila_is_that_of_the_weights_shown(dtype):
    qat, _ = made("tequila", dtype=dtype)
    layer, bias = qat.model[0], lambda: qat.model[0].bias.item()
    qat.relax(0)
    assert bias() == pytest.approx(1e-4, rel=4e-3) and layer.bias.dtype == dtype
    qat.latents["0"].data.mul_(2)
    with pytest.raises(KeyError), qat.hard():
        assert bias() == pytest.approx(2e-4, rel=4e-3)
        raise KeyError
    assert bias() == pytest.approx(1e-4, rel=4e-3)
    qat.model(torch.ones(1, 6, dtype=dtype)).sum().backward()
    qat.pull_back()
    assert qat.latents["0"].grad[0, 3].item() == pytest.approx(1.001)
    qat.harden()
    assert bias() == pytest.approx(2e-4, rel=1e-6) and layer.bias.dtype == torch.float32


def test_a_llama_with_the_biases_of_tequila_is_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    model, ids = tiny_llama(), torch.arange(9)[None]
    config = model.config
    rivals.make("tequila", model, 2, 1e-3, group_size=4)[0].harden()
    again = hestia.load_llama(hestia.save_llama(model, tmp_path / "tequila"), torch.float32)
    assert torch.equal(again(ids), model(ids)) and again.config.attention_bias
    assert again.model.layers[0].mlp.up_proj.bias.abs().max() > 0
    assert not config.mlp_bias  # which another model may have


# -- Fairy2i ---------------------------------------------------------------------------------------


def test_fairy2i_is_lossless_in_complex_form():
    torch.manual_seed(0)
    R, x = torch.randn(8, 14, dtype=torch.float64), torch.randn(14, dtype=torch.float64)
    U, V = rivals.widely_linear(R)
    z = torch.complex(x[:7], x[7:])
    y = U @ z + V @ z.conj()
    assert close(torch.cat([y.real, y.imag]), R @ x, 1e-12)
    A = f64([[-1.2, -0.6], [-0.3, 0.1]])  # one entry per complex matrix: two stages are exact
    assert close(rivals.fairy(A), A, 1e-12)


def test_unit_codes_by_their_worked_example():
    C = torch.complex(f64([-1.2, -0.3, 0.4]), f64([-0.6, 0.1, 0.9]))
    stages = {0.0: [([-0.75, -0.75, 0], [0, 0, 0.9]), ([-0.75, -0.325, 0.425], [-0.6, 0, 0.9])],
              0.3: [([-0.725048, -0.744198, 0.015701], [-0.029938, 0.006946, 0.881153]),
                    ([-0.840537, -0.330925, 0.429698], [-0.441072, 0.008253, 0.881316])]}
    for tau, expected in stages.items():
        total = torch.zeros_like(C)
        for re, im in expected:
            total = total + rivals.unit_codes(C - total, tau)
            assert close(torch.view_as_real(total), torch.stack([f64(re), f64(im)], -1)), tau
        matrix = lambda C: torch.cat([torch.cat([C.real, -C.imag]), torch.cat([C.imag, C.real])])
        assert close(rivals.fairy(matrix(C).view(2, 6), tau), matrix(total).view(2, 6))  # V = 0


def test_both_rows_of_fairy2i_end_at_sums_of_two_units():
    torch.manual_seed(0)
    w, hard = torch.randn(8, 14), []
    for row in ("fairy2i", "fairy2i-hestia"):
        model = nn.Sequential(nn.Linear(14, 8, bias=False))
        model[0].weight.data = w.clone()
        qat, _ = rivals.make(row, model, 400, 1e-3, tau_init=0.3)
        qat.relax(0)
        assert torch.equal(model[0].weight, w) == (row == "fairy2i-hestia")  # at pressure 0
        model[0].weight.grad = torch.ones(8, 14)
        qat.pull_back()
        assert torch.equal(qat.latents["0"].grad, torch.ones(8, 14))
        late = qat.effective(399, "0")
        qat.harden()
        hard.append(model[0].weight.detach())
        assert (late - hard[-1]).abs().mean() < 1e-3
    assert torch.equal(*hard)
    for C in rivals.widely_linear(hard[0]):  # 28 entries, and 4 x 4 sums at most
        assert 4 < len((torch.view_as_real(C.flatten()) * 1e4).round().unique(dim=0)) <= 16


# -- What rows bring to the loop -------------------------------------------------------------------


def test_cage_is_silent_and_then_pulls():
    qat, on_step = made("cage", steps=20)
    w, before = qat.latents["0"], torch.tensor([W])
    for t in range(17):
        on_step(t, None)
    assert torch.equal(w, before)  # in the first four fifths, and where the ramp begins
    on_step(19, None)  # three quarters of the ramp, and 0.1 + 0.9 / 2 of the rate
    pull = torch.tensor([[0.006167, 0.000167, -0.002833, -0.001, 0.001833, -0.003167]])
    assert close(w - before, 0.75 * 0.55 * pull, 1e-6)


def test_stochastic_rounding_has_the_right_mean():
    qat, on_step = made("stochastic")
    w, scale = qat.latents["0"], torch.tensor(GAMMA).bfloat16().item()
    qat.relax(0)
    assert close(qat.model[0].weight, scale / GAMMA * torch.tensor([ABSMEAN]))  # it starts there
    proposal, mean = torch.tensor([[-0.5333, -0.6833, -0.3833, 0.3, -0.0167, 1.2833]]), 0
    draws = {}
    for t in (*range(2000), 7):  # as in a resumed run, step 7 comes again
        w.data.copy_(proposal)
        on_step(t, None)
        assert set(w.flatten().tolist()) <= {-scale, 0.0, scale}
        assert torch.equal(w, draws.setdefault(t, w.detach().clone()))
        mean = mean + w.detach() / 2001
    assert close(mean, proposal.clamp(-scale, scale), 4 * 0.5 * scale / 2000**0.5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("ignored", [[], [0, 5], [0, 1, 2, 3, 4]])
def test_distillation_counts_the_targets_that_are_not_ignored(ignored, weight):
    generator = torch.Generator().manual_seed(0)
    theirs, ours = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64).float()
    ours.requires_grad_()
    y = torch.randint(0, 9, (6,), generator=generator)
    kept = [k for k in range(6) if k not in ignored]
    q, p = (torch.log_softmax(z[kept], -1) for z in (ours, theirs))
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")  # a mean over the rows
    expected = weight * kl + (1 - weight) * nn.functional.cross_entropy(ours[kept], y[kept])
    (gradient,) = torch.autograd.grad(expected, ours)
    y[ignored] = -100
    teacher, student = (lambda x, z=z: z.view(2, 3, 9) for z in (theirs, ours))
    x, mixed = torch.zeros(2, 3), rivals.mixed_loss
    loss = rivals.distilled(teacher, mixed, weight, student, x, y.view(2, 3))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert close(ours.grad, gradient, 1e-6)


@pytest.mark.parametrize("weight, micro_batches", [(1.0, 1), (1.0, 4), (0.25, 2)])
def test_distillation_by_its_worked_number_and_its_gradient(weight, micro_batches):
    theirs, ours = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    teacher, student = (lambda x, z=z: z.expand(len(x), 1, 3) for z in (theirs, ours))
    x, y = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.long)
    loss = rivals.distilled(teacher, rivals.mixed_loss, weight, student, x, y, micro_batches)
    p, q = torch.softmax(theirs, 0), torch.softmax(ours.detach(), 0)
    expected = weight * 0.255111 - (1 - weight) * math.log(q[1])
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    gradient = weight * (q - p) + (1 - weight) * (q - torch.tensor([0.0, 1.0, 0.0]))
    assert close(ours.grad, gradient, 1e-6)


def test_distillation_learns_from_the_model_as_it_was():
    model, ids = tiny_llama(), torch.arange(10).view(2, 5)
    for p in model.parameters():
        p.data *= 10  # so that it is sure of something
    before = copy.deepcopy(model)
    qat, more = rivals.make("cage", model, 4, 1e-3, group_size=4, distill=0.3)
    qat.relax(0)
    p, q = (torch.log_softmax(m(ids).double(), -1) for m in (before, model))
    kl = nn.functional.kl_div(q, p, log_target=True, reduction="sum") / ids.numel()
    expected = 0.3 * kl + 0.7 * model(ids, ids)
    weight = model.model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(expected, weight)
    assert more["backward"](model, ids, ids, 2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert close(weight.grad, gradient, 1e-4) and weight.grad.abs().max() > 0.1
    assert kl > 0.01 and all(p.grad is None for p in more["backward"].args[0].parameters())
    model.no_sync = nullcontext  # a model in DDP has this, and lab/parallel asks for it
    no_sync = lambda loss, *rest: loss.no_sync()
    rivals.distilled(before, rivals.mixed_loss, 1.0, model, ids, ids, backward=no_sync)


def test_the_schedule_of_spectra():
    p = nn.Parameter(torch.ones(2, 2))
    _, more = rivals.make("spectra", tiny_llama(), 12, 1e-3)
    optimizer, seen = hestia.adamw([p], 1e-3), []
    for t in range(12):
        if t == 7:  # a run is resumed
            state = optimizer.state_dict()
            optimizer = hestia.adamw([p], 1e-3)
            optimizer.load_state_dict(state)
        group = optimizer.param_groups[0]
        group["lr"], p.grad = 1.0, torch.ones(2, 2)
        more["update"](optimizer, torch.tensor(1.0), torch.tensor(2.0), 1.0)
        seen.append((group["lr"], group["weight_decay"]))
    assert seen == [(1.0, 0.1)] * 6 + [(0.69, 0.1)] * 2 + [(0.69, 0.0)] * 4
    with pytest.raises(hestia.Diverged):
        more["update"](optimizer, torch.tensor(math.nan), torch.tensor(2.0), 1.0)


def test_rows_from_scratch_forget_the_weights_they_are_given():
    model, other = tiny_llama(), tiny_llama(seed=1)
    torch.manual_seed(1)
    qat, more = rivals.make("bitnet", model, 4, 1e-3)
    assert not more and all(torch.equal(w, other.get_submodule(name).weight)
                            for name, w in qat.latents.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- All rows --------------------------------------------------------------------------------------


def test_rows_without_a_class_of_their_own_can_be_fast():
    for row, cls in {"hestia": fast.Hestia, "int2": fast.Hestia, "lsq": rivals.Learned}.items():
        settings = dict(group_size=4, tau_init=0.3, compile=True, distill=False)
        qat, more = rivals.make(row, tiny_llama(), 4, 1e-3, **settings)
        assert type(qat) is cls and not more


NAMES = [*dict.fromkeys([*hestia.METHODS, *rivals.ROWS])]


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False)
    return nn.Sequential(*layers).to(dtype)


def around(name, model, **settings):
    """(qat, on_step), for 10 steps, never from scratch: these models have no config."""
    row = {**rivals.ROWS.get(name, {"method": name}), "scratch": False}
    qat, more = rivals.make(name, model, 10, 1e-2, row, group_size=4, tau_init=0.3, **settings)
    return qat, more.get("on_step", lambda t, record: None)


def trained(qat, optimizer, steps, x, on_step=lambda t, record: None):
    """What is trained, after these steps."""
    for t in steps:
        qat.relax(t)
        (qat.model(x) - 1).float().square().mean().backward()
        qat.pull_back()
        optimizer.step()
        optimizer.zero_grad()
        on_step(t, None)
    return [p.detach().clone() for p in qat.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_model_stays_narrow_and_runs(name, dtype):
    model, x = two_layers(dtype), torch.ones(5, 8, dtype=dtype)
    qat, on_step = around(name, model)
    seen = [model(x)]
    trained(qat, hestia.adamw(qat.parameters(), 1e-2), range(3), x, on_step)
    seen.append(model(x))
    with qat.hard():
        hard = [p.detach().clone() for p in model.parameters()]  # with Tequila's biases
        seen.append(model(x))
    qat.harden()
    seen.append(model(x))
    assert all(y.dtype == dtype and torch.isfinite(y).all() for y in seen)
    assert torch.equal(seen[2], seen[3]) and len(hard) == (4 if name == "tequila" else 2)
    for before, after in zip(hard, model.parameters(), strict=True):
        assert before.dtype == after.dtype == dtype and torch.equal(before, after)


@pytest.mark.parametrize("first", [0.0, 1e-20])
@pytest.mark.parametrize("name", NAMES)
def test_weights_that_start_at_zero_are_moved(name, first):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    for rows in ([0, 1, 2, 3], [0, 2]):  # all, or one of each half: complex numbers that are 0
        for t in (0, 1, 5):  # at pressure 0, 1/2 and 1
            model = two_layers()
            model[2].weight.data[rows] = first
            qat, _ = around(name, model)
            qat.relax(t)
            (model(x) - 1).square().mean().backward()
            qat.pull_back()
            gradient = qat.latents["2"].grad[rows]
            assert torch.isfinite(gradient).all() and (gradient != 0).all(), (rows, t)


def test_a_complex_zero_stays_and_has_the_slope_of_the_straight_through_estimator():
    C = torch.complex(f64([0.0, 1e-30, 0.5, -0.4]), f64([0.0, 0.0, 0.1, 0.9])).requires_grad_()
    out = rivals.unit_codes(C, tau=0.3)
    (gradient,) = torch.autograd.grad(torch.view_as_real(out).sum(), C)
    assert torch.equal(out[:2], C[:2]) and rivals.unit_codes(C)[0] == 0  # as the hard codes
    assert gradient[:2].tolist() == [1 + 1j, 1 + 1j] and (gradient[2:] != 1 + 1j).all()


def written_and_read(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda what: pickle.loads(pickle.dumps(what)),
          "torch.save": written_and_read}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", [*NAMES, "fast full", "fast absmean", "fast hestia"])
def test_a_copy_goes_on_like_the_original(name, copied, monkeypatch):
    monkeypatch.setattr(fast, "compiled", lambda function: function)
    fused, name = name.startswith("fast "), name.removeprefix("fast ")
    settings = dict(compile=True) if fused else {}
    for relaxed, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model, x = two_layers(dtype), torch.ones(5, 8, dtype=dtype)
        qat, _ = around(name, model, **settings)
        optimizer = hestia.adamw(qat.parameters(), 1e-2)
        trained(qat, optimizer, range(3), x)
        if relaxed:  # between relax and pull_back
            qat.relax(3)
        again, its_optimizer = copied((qat, optimizer))
        assert type(again) is type(qat) and again.layers["2"] is again.model[2]
        if relaxed:  # a copy has no graph
            with pytest.raises(RuntimeError, match=r"call relax\(t\) first"):
                again.pull_back()
        after = trained(again, its_optimizer, range(3, 6), x)
        expected = trained(qat, optimizer, range(3, 6), x)  # which its copy has not moved
        assert all(map(torch.equal, after, expected))
        with again.hard():
            hard = again.model(x)
        again.harden()
        qat.harden()
        assert torch.equal(qat.model(x), again.model(x)) and torch.equal(again.model(x), hard)
        assert all(map(torch.equal, qat.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_layer_is_neither_refused_nor_touched(name, named):
    torch.manual_seed(0)
    frozen = nn.Linear(4, 3).requires_grad_(False)  # an odd side, and a bias
    model, x = nn.Sequential(*two_layers(), frozen), torch.ones(5, 8)
    before = copy.deepcopy(frozen)
    settings = {"layers": {"0": model[0], "2": model[2], "3": frozen}} if named else {}
    qat, on_step = around(name, model, **settings)
    trained(qat, hestia.adamw(qat.parameters(), 1e-2), range(2), x, on_step)
    qat.harden()
    assert list(qat.layers) == list(qat.latents) == ["0", "2"] and frozen.weight.grad is None
    assert torch.equal(frozen.weight, before.weight) and torch.equal(frozen.bias, before.bias)
    assert not frozen.weight.requires_grad and not frozen.bias.requires_grad


@pytest.mark.parametrize("row, codebook, reason", [
    ("dge", hestia.BINARY, "dge has the codebook"), ("twn", hestia.TWO_BIT, "twn has the codebook"),
    ("tern", hestia.TERNARY, "unknown method 'tern'; expected one of hestia-no-hessian, full"),
    ("fairy2i", hestia.TERNARY, "1 has an odd side"), ("tequila", hestia.TERNARY, "1 has a bias")])
def test_what_rows_refuse(row, codebook, reason):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=reason):
        rivals.make(row, model, 4, 1e-3, group_size=4, codebook=codebook, dtype=torch.bfloat16)
    assert model[0].bias is None and model[0].weight.dtype == torch.float32  # nothing was changed


def test_bits_per_weight_by_hand():
    three, model = math.log2(3), nn.Sequential(nn.Linear(32, 16, bias=False))
    bits = {"hestia-binary": 1 + 1, "int2": 2 + 1, "lsq": three + 1, "dlt": three + 2,
            "tequila": three + 1 + 0.5, "fairy2i": 2 + 1 / 4, "llm-qat": 2 + 0.5,
            "bitnet": three + 1 / 32, "cage": three + 1, "lotion": three + 1, "pv": three + 1}
    for row, expected in bits.items():
        line = {**rivals.ROWS[row], "scratch": False}
        qat, _ = rivals.make(row, copy.deepcopy(model), 4, 1e-3, line, group_size=16)
        assert rivals.bits_per_weight(qat) == pytest.approx(expected), row


@pytest.mark.parametrize("row, lost", [("int2", 1 / 12), ("twn", 6 / 12)])
def test_a_weight_that_is_not_on_the_grid_is_seen(row, lost):
    qat, _ = made(row, rows=2)
    qat.harden()
    assert rivals.on_grid(qat) == 1
    qat.model[0].weight.data[0, 3] = 0.123
    assert rivals.on_grid(qat) == pytest.approx(1 - lost)


@pytest.mark.parametrize("row", rivals.ROWS)
def test_every_row_trains_and_hardens(row):
    model, losses, tokens = tiny_llama(), [], torch.arange(200) % 17
    qat, more = rivals.make(row, model, 6, 3e-3, group_size=4, tau_init=0.3)
    before, hook = copy.deepcopy(qat.latents), more.pop("on_step", lambda t, record: None)

    def on_step(t, record):
        hook(t, record)
        losses.append(record["loss"])

    hestia.train(model, tokens, steps=6, batch_size=4, block_size=8, lr=3e-3, qat=qat, log_every=1,
                 on_step=on_step, **more)
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert row == "llm-qat" or losses[-1] < losses[0]  # its teacher is what it was: it starts at 0
    assert not any(torch.equal(w, before[name]) for name, w in qat.latents.items())
    with qat.hard():
        hard = hestia.evaluate(model, tokens, 16)
    qat.harden()
    assert hestia.evaluate(model, tokens, 16) == pytest.approx(hard, abs=1e-6)
    fairy = "fairy" in row
    assert rivals.on_grid(qat) == (None if fairy else 1) and row in rivals.LABELS
    for name, layer in qat.layers.items():
        size = qat.step_of(0, name).group_size or layer.weight.numel()
        for group in layer.weight.detach().reshape(-1, size):
            assert fairy or len(group.unique()) <= len(qat.codebook)
        narrow = layer.weight.bfloat16().float()  # which holds all levels but 1.5 gamma
        assert fairy or len(qat.codebook) == 4 or torch.equal(layer.weight, narrow)


def test_the_wide_grid_is_the_scale_1_5_mean_w():
    torch.manual_seed(3)
    w = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    scale, wide = 1.5 * hestia.absmean_scale(w, 4), rivals.WIDE
    for tau in (0.0, 0.05, 0.5):  # tau counts in units of gamma: at 1.5 gamma it is 2.25 times less
        expected = hestia.soft_quantize(w, tau / 2.25, 4, scale=scale)
        torch.testing.assert_close(hestia.soft_quantize(w, tau, 4, wide), expected)
    error = lambda tau: float((hestia.soft_quantize(w, tau, 4, scale=scale) - w).square().sum())
    best = hestia.optimal_tau_init([w.detach()], 4, wide) / 2.25
    assert error(best) <= min(map(error, torch.logspace(-2, 1, 200).tolist())) * (1 + 1e-6)
    step = hestia.Step(1.0, 0.0, 4, wide)
    hard = rivals.hard_wide(w.detach().float(), step).view(-1, 4)
    for group in hard:  # one level, which bfloat16 holds
        assert len(group.abs().unique()) <= 2 and torch.equal(group.bfloat16().float(), group)
    assert ((hard - scale.float() * hard.sign()).abs() <= 0.01 * scale).all()


@pytest.mark.parametrize("codebook", [hestia.TERNARY, rivals.WIDE])
def test_the_leak_in_closed_form(codebook):
    torch.manual_seed(4)
    w = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    for p, tau in ((0.0, 0.3), (0.6, 0.3), (1.0, 0.02), (1.0, 0.0)):
        step = hestia.Step(p, tau, 4, codebook)
        W_eff = rivals.relax_leak(w, step)
        torch.testing.assert_close(W_eff, hestia.effective_weight(w, tau, p, 4, codebook))
        (slope,) = torch.autograd.grad(W_eff.sum(), w)
        J = hestia.soft_quantize_jacobian(w.detach(), tau, 4, codebook)
        torch.testing.assert_close(slope, (1 - p) + p * (0.3 + 0.7 * J))
        if tau:  # the fused one
            rows, tau = w.detach().view(-1, 4), torch.tensor(tau)
            fused = rivals.slope_leak(rows, torch.tensor(p), tau, codebook).view_as(w)
            torch.testing.assert_close(fused, slope, rtol=1e-5, atol=1e-6)


def test_a_learned_gamma_and_its_least_squares():
    torch.manual_seed(5)
    w = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(12, dtype=torch.float64, requires_grad=True)
    scale = hestia.absmean_scale(w, 4) * (k.detach()[:, None] / 10).exp()
    for p, tau in ((0.0, 0.3), (0.6, 0.3), (1.0, 0.05)):
        step = hestia.Step(p, tau, 4, hestia.TERNARY)
        W_eff = rivals.relax_learned(w, step, k)
        torch.testing.assert_close(W_eff, hestia.effective_weight(w, tau, p, 4, scale=scale))
        (slope,) = torch.autograd.grad(W_eff.sum(), w)
        J = hestia.soft_quantize_jacobian(w.detach(), tau, 4, scale=scale)
        torch.testing.assert_close(slope, (1 - p) + p * J)
        assert torch.autograd.gradcheck(partial(rivals.relax_learned, w.detach(), step), k)
    qat, _ = made("hestia-learned", rows=2)
    for name, latent in qat.latents.items():
        qat.own[name]["k"].data.fill_(2.0)  # e^(k/10) = 1.22
        z, left = rivals.groups(latent.detach(), qat.step_of(0, name)), qat.hardened(name)
        for row, found in zip(z, left.view_as(z)):
            codes = (row / (row.abs().mean() * math.exp(0.2))).round().clamp(-1, 1)
            best = torch.linalg.lstsq(codes[:, None], row).solution
            torch.testing.assert_close(found, best.bfloat16().float() * codes)
