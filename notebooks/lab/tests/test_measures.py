"""lab/measures.py against dense matrices in float64, and numbers worked by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch

import hestia
import train_tiny
from notebooks.lab import curvature, figures, measures, texts

torch.set_num_threads(1)  # these models are so small that a second thread only waits


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def llama():
    """(model, {name: weight}, two batches) of a tiny random Llama, in float64."""
    torch.manual_seed(0)
    model = hestia.Llama(hestia.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, rope_theta=10000.0)).double()
    for p in model.parameters():  # so that curvature is everywhere
        p.data = p.data + 0.2 * torch.randn_like(p)
    ids = torch.randint(0, 17, (2, 9), generator=seeded(1))
    batches = [(row[:, :-1], row[:, 1:]) for row in ids.split(1)]
    return model, curvature.linear_weights(model), batches


# --------------------------------------------------------------------------------------------------
# HAWQ, AdaHessian, QuIP


def dense(model, batch, params):
    """{name: block of the exact Hessian}, and the whole of it."""
    _, H = curvature.gradient_and_hessian(model, batch, params)
    blocks, start = {}, 0
    for name, w in params.items():
        blocks[name] = H[start : start + w.numel(), start : start + w.numel()]
        start += w.numel()
    return blocks, H


def test_power_iteration_against_the_eigenvalues_of_dense_blocks(llama):
    model, params, batches = llama
    few = dict(list(params.items())[3:6])
    blocks, _ = dense(model, batches[0], few)
    change = {name: hestia.quantize(w.detach(), 4) - w.detach() for name, w in few.items()}
    budget = measures.TINY._replace(iterations=300)
    facts = measures.by_blocks(model, few, batches[0], change, budget, seed=0)
    for name, B in blocks.items():
        values = torch.linalg.eigvalsh(B)
        assert facts["eigenvalue"][name] == pytest.approx(float(values[values.abs().argmax()]))
        assert facts["settled"][name] < 1e-6
        d = change[name].flatten()
        assert facts["second"][name] == pytest.approx(float(d @ B @ d))
    # the quotient of each product, and the sign of a negative eigenvalue
    H = torch.tensor([[-5.0, 0.0], [0.0, 2.0]])
    quotients = measures.top_eigenvalue(H.mv, torch.tensor([1.0, 1.0]), 9)
    assert quotients[0] == pytest.approx(-1.5) and quotients[-1] == pytest.approx(-5, rel=1e-5)


def test_adahessians_diagonal_against_dense_blocks(llama):
    model, params, batches = llama
    few = dict(list(params.items())[3:6])
    blocks, H = dense(model, batches[0], few)
    loss_fn = lambda batch: model(*batch)
    found, again = (measures.diagonals(loss_fn, few, batches[:1], 400, generator=seeded(0))
                    for _ in range(2))
    g = torch.autograd.grad(loss_fn(batches[0]), list(few.values()))
    a = torch.cat([torch.full((w.numel(),), 1 / float(g.norm())) for w, g in zip(few.values(), g)])
    noise = (H / a[:, None] * a).square().sum(1) - H.diagonal().square()  # of one reading
    for (name, B), var in zip(blocks.items(), noise.split([len(B) for B in blocks.values()])):
        D, h = found[0][name], found[1][name]
        assert torch.equal(D, again[0][name]) and D.shape == few[name].shape
        assert float(D.sum()) == pytest.approx(h.value)
        assert abs(h.value - float(B.trace())) < 4 * h.stderr
        squared_z = (D.flatten() - B.diagonal()).square() / (var / 400)
        assert 0.6 < float(squared_z.mean()) < 1.6, name
    # of two batches the mean, and progress by products
    told = []
    D, _ = measures.diagonals(loss_fn, few, batches, 2, generator=seeded(0),
                               progress=lambda *x: told.append(x))
    draws = seeded(0)
    each = [measures.diagonals(loss_fn, few, [b], 2, generator=draws)[0] for b in batches]
    for name in few:
        torch.testing.assert_close(D[name], (each[0][name] + each[1][name]) / 2)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_adahessians_readings_by_hand():
    w = torch.zeros(2, requires_grad=True)
    loss = lambda batch: 2 * w[0] ** 2 + w[0] * w[1] + w[1] ** 2  # H = [[4, 1], [1, 2]]
    seen = set()
    for seed in range(20):
        D, _ = measures.diagonals(loss, {"w": w}, [0], 1, generator=seeded(seed))
        seen.add(tuple(D["w"].tolist()))
    assert seen == {(3.0, 1.0), (5.0, 3.0)}  # and their mean is (4, 2), the diagonal
    # a tensor's scale a cancels: the loss of v is curved 10^4 times less, and its diagonal is exact
    v = torch.ones(3, requires_grad=True)
    u = torch.ones(3, requires_grad=True)
    both = lambda batch: 50 * u.square().sum() + 0.005 * v.square().sum()
    D, _ = measures.diagonals(both, {"u": u, "v": v}, [0], 3, generator=seeded(0))
    torch.testing.assert_close(D, {"u": torch.full((3,), 100.0), "v": torch.full((3,), 0.01)})


def test_quips_proxy_is_the_mean_squared_change_of_a_layers_output(llama):
    model, params, batches = llama
    name = list(params)[5]
    layer, inputs = model.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda layer, x: inputs.append(x[0].detach()))
    model(batches[0][0])
    hook.remove()
    x = inputs[0].flatten(0, 1)  # (tokens, in)
    w = layer.weight.detach()
    change = hestia.quantize(w, 4) - w
    H = measures.second_moments(model, [name], batches[0][0])[name]
    mean = (x @ change.T).square().sum(1).mean()
    assert measures.quip_proxy(change, H) == pytest.approx(float(mean))
    assert not layer._forward_pre_hooks  # none stays behind


def test_ldlq_by_hand_and_against_every_rounding():
    H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    for w, plain, best in (((0.4, 0.4), 0.96, 0.56), ((0.6, 0.45), 0.365, 0.365)):
        w = torch.tensor([w], dtype=torch.float64)
        how = dict(codebook=(-1, 0, 1), scale=torch.ones(1, 1, dtype=torch.float64))
        assert measures.quip_proxy(hestia.quantize(w, **how) - w, H) == pytest.approx(plain)
        assert measures.quip_proxy(measures.ldlq(w, H, **how) - w, H) == pytest.approx(best)
        pairs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 2)
        least = min(measures.quip_proxy(pair[None] - w, H) for pair in pairs)
        assert best == pytest.approx(least)


def test_ldlq_on_a_matrix():
    x = torch.randn(200, 24, generator=seeded(0), dtype=torch.float64)
    x = x @ torch.randn(24, 24, generator=seeded(1), dtype=torch.float64)  # correlated inputs
    H, w = x.T @ x / 200, torch.randn(40, 24, generator=seeded(2), dtype=torch.float64)
    rounded = measures.ldlq(w, H, 8)
    gamma = hestia.absmean_scale(w, 8)  # (n_groups, 1), and the codes are ternary
    codes = rounded.view(-1, 8) / gamma
    torch.testing.assert_close(codes, codes.round().clamp(-1, 1))
    plain = hestia.quantize(w, 8)
    assert measures.quip_proxy(rounded - w, H) < 0.9 * measures.quip_proxy(plain - w, H)
    # H = U D U^T by eliminating the columns from the last to the first
    U, D = torch.eye(24, dtype=H.dtype), torch.empty(24, dtype=H.dtype)
    for k in range(24):
        later = torch.linalg.solve(H[k + 1 :, k + 1 :], H[k + 1 :, : k + 1])
        S = H[: k + 1, : k + 1] - H[: k + 1, k + 1 :] @ later
        U[: k + 1, k], D[k] = S[:, k] / S[k, k], S[k, k]
    torch.testing.assert_close(U @ D.diag() @ U.T, H)
    e = (rounded - w) @ U  # each column's error after those before it were made up for
    assert measures.quip_proxy(rounded - w, H) == pytest.approx(float((D * e.square()).sum()))
    torch.testing.assert_close(hestia.quantize(rounded - e, 8, scale=gamma), rounded)
    # uncorrelated inputs leave nothing to make up for
    assert torch.equal(measures.ldlq(w, H.diagonal().diag(), 8), plain)


# --------------------------------------------------------------------------------------------------
# the study of measures


def test_rises_are_those_of_whole_forward_passes(llama):
    model, params, batches = llama
    before, told = float(model(*batches[0]).detach()), []
    found = measures.rises(model, params, batches[0], 4, lambda *x: told.append(x))
    assert list(found) == list(params) and told[-1] == (14, 14)
    for name in params:
        copied = copy.deepcopy(model)
        layer = copied.get_submodule(name)
        layer.weight.data = hestia.quantize(layer.weight.data, 4)
        rise = float(copied(*batches[0]).detach()) - before
        assert found[name] == pytest.approx(rise, rel=1e-9), name
    assert float(model(*batches[0]).detach()) == before  # the model is as it was


def test_measures_of_a_quadratic_loss_by_hand():
    """The worked example of two layers: the curvature and the harm rank them the other way."""
    A, B = torch.tensor([[4.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    for H, d, lam, omega, v2, exact in ((A, (0.05, -0.02), 3 + 2**0.5, 0.0128, 0.0087, 0.0044),
                                        (B, (0.1, 0.2), 1.0, 0.05, 0.0375, 0.015)):
        d = torch.tensor(d)
        x = {"n": 2, "trace": float(H.trace()), "error": float(d.square().sum()), "first": 0.0,
             "eigenvalue": measures.top_eigenvalue(H.mv, torch.tensor([1.0, 0.1]), 40)[-1],
             "second": float(d @ H @ d)}
        found = measures.measured(x)
        assert found["hawq"] == pytest.approx(lam / 2, abs=1e-5)
        assert found["hawq-omega"] == pytest.approx(omega, abs=1e-5)
        assert found["hawq-v2"] == pytest.approx(v2, abs=1e-5)
        assert found["taylor"] == pytest.approx(exact, abs=1e-5)
        assert "fisher" not in found  # what was not estimated is left out


def test_correlations_and_intervals_by_hand():
    n = dict.fromkeys("abc", 1)
    facts = lambda rise: {"n": n, "eigenvalue": {"a": 2.0, "b": 1.0},
                          "gradnorm": dict(zip("abc", (1.0, 2.0, 3.0))),
                          "rise": dict(zip("abc", rise))}
    seeds = [{"facts": facts(rise), "seconds": {}} for rise in ((1, 2, 3), (1, 3, 2), (2, 1, 3))]
    found = measures.compare(seeds)
    row = found["tables"]["3 tensors"]["gradnorm"]
    assert row["each"] == pytest.approx([1.0, 0.5, 0.5])
    assert row["mean"] == pytest.approx(2 / 3)
    assert row["half"] == pytest.approx(4.30 * math.sqrt(1 / 12) / math.sqrt(3))  # t of 2 degrees
    assert "hawq" not in found["tables"]["3 tensors"]  # tensor c has no eigenvalue
    assert found["tables"]["2 tensors"]["hawq"]["each"] == pytest.approx([-1.0, -1.0, 1.0])
    assert found["facts"]["eigenvalue"][0] == [2.0, 1.0, None]


def test_the_study_of_measures_at_a_tiny_size_and_its_readers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curvature, "RESULTS", tmp_path)
    few = dict(seeds=2, sequences=2, others=3, length=16, products=3, samples=2, iterations=2)
    monkeypatch.setattr(measures, "TINY", measures.TINY._replace(**few))
    monkeypatch.setattr(measures, "LOADED", measures.LOADED._replace(**few))
    for name, value in dict(pretrain_steps=2, batch_size=2, eval_tokens=256, layers=1, hidden=64,
                            intermediate=64).items():
        monkeypatch.setitem(train_tiny.PRESETS["cpu"], name, value)
    torch.manual_seed(0)
    other = hestia.Llama(hestia.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, rope_theta=10000.0))
    hestia.save_llama(other, tmp_path / "other")
    np.save("text.npy", np.arange(5000) * 7919 % 256)  # tokens already, so no tokenizer is needed
    monkeypatch.setattr(texts, "load_tokenizer", lambda folder: None)
    measures.main(["--llama", "other", "--data", "text.npy"])
    said = capsys.readouterr().out
    assert "s left" in said and said.count("| HESTIA: Tr H") == 3  # tiny; other, all and some
    found = json.loads((tmp_path / "measures.json").read_text())
    tiny, loaded = found["models"]
    assert list(tiny["tables"]) == ["7 tensors"] and len(tiny["names"]) == 7
    assert list(loaded["tables"]) == ["28 tensors", "21 tensors"]  # of layers 0, 2 and 3
    assert tiny["tables"]["7 tensors"].keys() == measures.MEASURES.keys()
    missing = measures.MEASURES.keys() - loaded["tables"]["28 tensors"].keys()
    assert missing == {"hawq", "hawq-omega", "taylor"}
    assert all(x["ldlq"]["proxy"] < x["plain"]["proxy"] for x in tiny["ldlq"])
    rise, trial = loaded["facts"]["rise"], loaded["facts"]["trial"]
    assert rise[0] == rise[1] and trial[0] != trial[1]  # two texts of calibration, one real rise
    ids, targets = hestia.batch_at(torch.tensor(np.load("text.npy")[:4750]), 2, 3, 16, 10_000)
    found_again = measures.rises(other, curvature.linear_weights(other), (ids, targets), 64)
    assert rise[0] == pytest.approx([found_again[name] for name in loaded["names"]], rel=1e-3)
    # the same command goes on from what is kept, and ends alike
    measures.main(["--llama", "other", "--data", "text.npy"])
    assert "joint products" not in capsys.readouterr().out
    again = json.loads((tmp_path / "measures.json").read_text())
    changing = {"seconds_of_last_session"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in found.items() if k not in changing}
    figures.foretold(found)
    published = json.loads((figures.RESULTS / "measures.json").read_text())
    assert published.keys() == found.keys()
    for mine, theirs in zip(found["models"], published["models"]):
        assert mine.keys() == theirs.keys() and mine["facts"].keys() == theirs["facts"].keys()
