"""activations.py against the dense softmax and autograd; the rows train, harden and read back."""

import copy
import math

import pytest
import torch

import hestia
import plots
import train_tiny
from notebooks.lab import activations, rivals
from notebooks.lab.activations import ROWS, SoftRound, on_grid, two_neighbours, window


def dense(x, q, tau):
    """The softmax over all 2q + 1 levels of every token, as it is written. x: (tokens, n_in)."""
    s = x.detach().abs().amax(-1, keepdim=True) / q
    k = torch.arange(-q, q + 1, dtype=x.dtype)
    pi = torch.softmax(-((x / s).unsqueeze(-1) - k).square() / tau, -1)  # (tokens, n_in, 2q + 1)
    return s * (pi * k).sum(-1)


@pytest.mark.parametrize("tau, values, slopes", [
    (1.0, [0.9, -1.3416, 0.2499, 0.5501], [1.0020, 0.4674, 1.0, 1.0]),
    (0.3, [0.9, -1.3931, 0.2305, 0.5695], [1.6836, 0.2218, 0.9368, 0.9368]),
    (0.1, [0.9, -1.4, 0.2013, 0.5987], [5.0, 0.0009, 0.1330, 0.1330])])
def test_the_worked_example(tau, values, slopes):
    x = torch.tensor([0.9, -1.4, 0.25, 0.55], dtype=torch.float64, requires_grad=True)
    H = on_grid(x, q=7, tau=tau)
    H.sum().backward()
    for found, expected in ((H, values), (x.grad, slopes)):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=6e-5)


@pytest.mark.parametrize("q", [3, 7, 127])
@pytest.mark.parametrize("tau", [2.0, 0.35, 0.3, 0.1, 0.01])
def test_the_window_is_the_softmax_over_all_levels(tau, q):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] = torch.linspace(-1, 1, 64)  # every other token has both ends of the grid, or one
    x.requires_grad_()
    expected = dense(x, q, tau)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    y = x.detach().requires_grad_()
    H = on_grid(y, q, tau)
    (found,) = torch.autograd.grad(H.sum(), y)
    s = x.detach().abs().amax(-1, keepdim=True) / q  # errors count in steps of the grid
    assert ((H - expected).abs() / s).max() < 2e-7  # what is left out is below float32's precision
    assert (found - slope).abs().max() < 2e-6 / tau
    narrow = on_grid(x.detach().float(), q, tau)
    assert ((narrow - expected).abs() / s).max() < 2e-7 * q * max(1, 1 / (2 * tau))
    assert window(tau) < 7


@pytest.mark.parametrize("tau, jump", [(0.3, 0.069), (1.0, 0.538)])
def test_two_neighbours_jump_where_all_levels_do_not(tau, jump):
    level = torch.arange(-5.0, 6.0, dtype=torch.float64)
    below, above = level - 1e-9, level + 1e-9
    found = two_neighbours(above, tau) - two_neighbours(below, tau)
    assert torch.allclose(found, torch.full_like(found, 2 / (1 + math.exp(1 / tau))), atol=1e-6)
    assert found[0].item() == pytest.approx(jump, abs=5e-4)
    # as z passes levels and the middles between them, where the window moves on
    z = torch.linspace(-130, 130, 260_001, dtype=torch.float64)
    all_levels = SoftRound.apply(z, tau, 127, window(tau))
    steepest = 1.02 / (2 * tau) if tau < 0.5 else 1.01
    assert all_levels.diff().min() >= 0 and all_levels.diff().max() < 1e-3 * steepest + 1e-6


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_hard_inputs_round_each_token_and_pass_the_gradient_on(bits):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    x.data *= torch.tensor([[1.0], [10.0], [1e-3], [1.0], [0.0]])
    y, q = on_grid(x, 2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    y.sum().backward()
    s = x.detach().abs().amax(1, keepdim=True) / q
    codes = y[:4].detach() / s[:4]
    assert torch.allclose(codes, codes.round(), atol=1e-4) and codes.abs().max().round() == q
    assert ((y - x).abs() <= s / 2 + 1e-6).all() and torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(y[4], x[4])
    late = on_grid(x, q, tau=1e-4)
    away = (x / s - (x / s).floor() - 0.5).abs()[:4]
    assert torch.allclose(late[:4][away > 0.01], y[:4][away > 0.01], rtol=1e-5)
    assert torch.equal(on_grid(x, q, tau=0.3, p=0.0), x)
    assert on_grid(x.bfloat16(), q, tau=0.3).dtype == torch.bfloat16


def tiny_llama():
    torch.manual_seed(0)
    return hestia.Llama(hestia.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1))


@pytest.mark.parametrize("row", ROWS)
def test_each_row_trains_hardens_and_reads_back_to_the_same_loss(row, tmp_path):
    model, tokens, seen = tiny_llama(), torch.arange(200) % 17, []
    for p in model.parameters():
        p.data *= 10  # or the grid changes next to nothing
    bits = ROWS[row]["bits"]
    qat, more = rivals.make(row, model, 20, 3e-3, ROWS[row], group_size=4, tau_init=0.3)

    def on_step(t, record):
        seen.append((qat.inputs.p, qat.inputs.tau, record["loss"]))

    hestia.train(model, tokens, steps=20, batch_size=4, block_size=8, lr=3e-3, qat=qat, log_every=1,
                 on_step=on_step, **more)
    assert seen[-1][2] < seen[0][2]
    if "inputs=HESTIA" in row:  # the weights' schedules: p grows over 4 steps, tau then falls
        assert [p for p, _, _ in seen[:6]] == [0, 0.25, 0.5, 0.75, 1, 1]
        assert seen[4][1] == 0.35 > seen[12][1] > seen[19][1] > 0
        assert seen[12][1] == pytest.approx(0.35 / 2)
    else:
        assert {(p, tau) for p, tau, _ in seen} == {(1, 0)}
    with qat.hard():
        hard = hestia.evaluate(model, tokens, 16)
    assert qat.inputs.tau == seen[-1][1]  # it is as it was
    qat.harden()
    assert hestia.evaluate(model, tokens, 16) == pytest.approx(hard, abs=1e-6)

    inputs = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda layer, args, y: inputs.append(args[0]))
    model(tokens[None, :8])
    levels = inputs[0] / inputs[0].abs().amax(-1, keepdim=True) * (2 ** (bits - 1) - 1)
    assert torch.allclose(levels, levels.round(), atol=1e-3)

    train_tiny.save_checkpoint(tmp_path / "model.pt", model)
    again = train_tiny.load_checkpoint(tmp_path / "model.pt")
    without = hestia.evaluate(again, tokens, 16)
    activations.hard_inputs(hestia.linear_layers(again).values(), bits)
    assert hestia.evaluate(again, tokens, 16) == pytest.approx(hard, abs=1e-6) != without


def test_a_copy_has_a_grid_of_its_own():
    model, x = tiny_llama(), torch.arange(8)[None]
    row = "hestia-no-hessian:bits=3,inputs=HESTIA"
    qat, _ = rivals.make(row, model, 10, 1e-3, ROWS[row], group_size=4, tau_init=0.3)
    qat.relax(5)
    again, before = copy.deepcopy(qat), model(x)
    qat.inputs.tau = 2.0
    assert torch.equal(again.model(x), before) and not torch.equal(model(x), before)


def test_the_figure_says_the_jumps():
    titles = [" ".join(ax.get_title("left").split()) for ax in activations.jumps().axes]
    plots.plt.close("all")
    assert "by 0.54 steps" in titles[0] and "by 0.07 steps" in titles[1]


def test_the_differences_are_taken_seed_by_seed(tmp_path, capsys):
    per_seed = []
    for seed, noise in enumerate((-0.01, 0.0, 0.01)):
        losses = {"absmean": 1.0, "hestia-no-hessian": 0.9}
        for k, row in enumerate(ROWS):
            losses[row] = losses[row.partition(":")[0]] + 0.1 + (k % 2) * (0.02 + noise / 10)
        per_seed.append({row: {"val": loss + seed} for row, loss in losses.items()})
    plots.write_json(tmp_path / "results.json", {"per_seed": per_seed})
    activations.show(tmp_path / "results.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "HESTIA, alpha = 0, bits 8" in lines[5]
    for line in lines[2:]:  # 0.001 * 4.30 / sqrt(3)
        assert "| +0.1000 ± 0.0000 | +0.1200 ± 0.0025 | +0.0200 ± 0.0025 |" in line
