"""lab/curvature.py against dense matrices in float64, and numbers worked by hand."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hestia
from notebooks.lab import curvature, figures, tables

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
# estimators


def test_fisher_traces_are_those_of_the_gauss_newton_matrix(llama):
    model, params, batches = llama
    logits_fn = lambda batch: model(batch[0])
    runs = []
    for seed in (*range(24), 0):
        draws = seeded(seed)
        runs.append(curvature.fisher_traces(logits_fn, params, batches, 20, generator=draws))
    assert runs.pop() == runs[0] != runs[1]
    ids = torch.cat([x for x, _ in batches])
    pi = torch.softmax(model(ids).detach().flatten(0, 1), -1)  # (T, V)
    S = torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :]  # Hessian of the loss in the logits
    squared_z = []
    for name, w in params.items():
        logits_of = lambda w, name=name: functional_call(model, {name + ".weight": w}, (ids,))
        J = torch.autograd.functional.jacobian(logits_of, w.detach())  # (B, T / B, V, *w.shape)
        J = J.flatten(0, 1).flatten(2)  # (T, V, d)
        exact = torch.einsum("tvd,tvu,tud->", J, S, J).item() / len(pi)
        values = np.array([found[name].value for found in runs])
        errors = np.array([found[name].stderr for found in runs])
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(runs)), name
        assert (values >= 0).all()
        squared_z.append(((values - exact) / errors) ** 2)
    assert 0.5 < np.mean(squared_z) < 2  # the standard error means what it says


def test_fisher_traces_refuse_what_they_cannot_do():
    w, logits = torch.ones(3, requires_grad=True), lambda batch: w.view(1, 3)
    for params, batches, samples in (({"w": w}, [0], 0), ({"w": w}, [], 20), ({}, [0], 20)):
        with pytest.raises(ValueError, match="a trace needs at least one of each"):
            curvature.fisher_traces(logits, params, batches, samples)
    for bad in (w.bfloat16(), w.detach()):
        with pytest.raises(ValueError, match="w: a trace needs float32 or float64 that requires"):
            curvature.fisher_traces(logits, {"w": bad}, [0])


class TwoLayers(torch.nn.Module):
    """use_reentrant: of a checkpoint around the first; None for none."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.use_reentrant = use_reentrant

    def forward(self, ids, targets=None):
        x, first = self.embed(ids), lambda x: torch.tanh(self.a(x))
        if self.use_reentrant is None:
            x = first(x)
        else:
            x = checkpoint(first, x, use_reentrant=self.use_reentrant)
        logits = self.out(torch.tanh(self.b(x)))
        return logits if targets is None else torch.nn.functional.cross_entropy(logits, targets)


def both_estimates(model, weights_of, no_grad=False):
    """Fisher's traces and gradient norms of layers a and b."""
    batch = torch.arange(9), torch.arange(9).flip(0)
    params = {name: weights_of.get_submodule(name).weight for name in "ab"}
    logits, loss = lambda b: model(b[0]), lambda b: model(*b)
    with torch.no_grad() if no_grad else nullcontext():
        return (curvature.fisher_traces(logits, params, [batch], generator=seeded(0)),
                curvature.gradient_norms(loss, params, [batch]))


def test_a_tensor_outside_of_the_graph_is_named_and_never_zero():
    plain = TwoLayers()
    expected = both_estimates(plain, plain)
    assert all(h.value > 0 for h in expected[0].values()) and min(expected[1].values()) > 0
    assert both_estimates(plain, plain, no_grad=True) == expected
    checkpointed = TwoLayers(use_reentrant=False)
    assert both_estimates(checkpointed, checkpointed) == expected
    batch, reentrant, copied = (torch.arange(9),) * 2, TwoLayers(use_reentrant=True), TwoLayers()
    half = {"a": plain.a.weight, "b": copied.b.weight}
    frozen = TwoLayers().requires_grad_(False)  # with it nothing has a graph
    for model, params, names in (
            (reentrant, {n: reentrant.get_submodule(n).weight for n in "ab"}, "a"),
            (plain, {n: copied.get_submodule(n).weight for n in "ab"}, "a, b"),
            (plain, half, "b"), (frozen, half, "a, b")):
        with pytest.raises(ValueError, match=f"the logits do not depend on {names}; give the"):
            curvature.fisher_traces(lambda b, model=model: model(b[0]), params, [batch])
        with pytest.raises(ValueError, match=f"the loss does not depend on {names}; give the"):
            curvature.gradient_norms(lambda b, model=model: model(*b), params, [batch])


def test_frozen_layers_are_not_among_the_weights_that_are_quantized():
    model = TwoLayers()
    model.b.requires_grad_(False)
    assert list(curvature.linear_weights(model)) == ["out", "a"]


def test_gradient_norms_and_rounding_errors_by_hand(llama):
    model, params, batches = llama
    x, y = (torch.cat(part) for part in zip(*batches))  # equal batches: their mean is that of all
    grads = torch.autograd.grad(model(x, y), list(params.values()))
    found = curvature.gradient_norms(lambda batch: model(*batch), params, batches)
    assert list(found.values()) == pytest.approx([g.square().sum().sqrt().item() for g in grads])
    # gamma is 1 and 2: the errors are (0.2, 0, 0, 0.2) and none
    w = torch.tensor([[1.2, -1.0, 1.0, 0.8], [2.0, -2.0, 2.0, -2.0]])
    error = math.sqrt(0.08 / (4.08 + 16))
    assert curvature.rounding_errors({"w": w}, 4)["w"] == pytest.approx(error)
    # one scale of 1.5 for all: the errors are 0.3, 0.5, 0.5, 0.7 and four times 0.5
    error = math.sqrt((0.09 + 0.25 + 0.25 + 0.49 + 4 * 0.25) / (4.08 + 16))
    assert curvature.rounding_errors({"w": w})["w"] == pytest.approx(error)


def test_sensitivities_call_each_estimator_by_its_name(llama):
    model, params, batches = llama
    few = dict(list(params.items())[:2])
    loss_fn, logits_fn, told = lambda b: model(*b), lambda b: model(b[0]), []
    run = lambda kind: curvature.sensitivities(
        SimpleNamespace(sensitivity=kind, group_size=4), model, few, batches, rank=2, samples=3,
        generator=seeded(5), progress=lambda done, total: told.append((done, total)))
    exact = lambda found: {name: hestia.TraceEstimate(x, 0.0) for name, x in found.items()}
    assert run("fisher") == curvature.fisher_traces(logits_fn, few, batches, 3, generator=seeded(5))
    assert told == [(k, 6) for k in range(1, 7)]  # three samples of two batches
    assert run("gradnorm") == exact(curvature.gradient_norms(loss_fn, few, batches))
    assert curvature.rounding_errors(few, 4) != curvature.rounding_errors(few)
    assert run("error") == exact(curvature.rounding_errors(few, 4))
    with pytest.raises(ValueError, match="unknown sensitivity 'magic'; expected fisher, gradnorm"):
        run("magic")


# --------------------------------------------------------------------------------------------------
# the study


def test_gradient_and_hessian_against_torchs_own(llama):
    model, params, batches = llama
    (a, wa), (b, wb) = list(params.items())[4:6]

    def loss_of(flat):
        parts = flat.split([wa.numel(), wb.numel()])
        weights = {a + ".weight": parts[0].view_as(wa), b + ".weight": parts[1].view_as(wb)}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, weights, batches[0])

    flat = torch.cat([wa.detach().flatten(), wb.detach().flatten()])
    g, H = curvature.gradient_and_hessian(model, batches[0], {"a": wa, "b": wb})
    torch.testing.assert_close(g, torch.autograd.functional.jacobian(loss_of, flat))
    torch.testing.assert_close(H, torch.autograd.functional.hessian(loss_of, flat))


def test_the_studys_own_estimators_on_a_dense_matrix():
    B = torch.randn(90, 90, generator=seeded(0), dtype=torch.float64)
    H, sizes = B + B.T, [50, 40]
    blocks = [H[:50, :50], H[50:, 50:]]
    exact = torch.stack([block.trace() for block in blocks])
    # what the tensors read is right whatever the factors, and exact where H is diagonal
    for a in (torch.ones(2), torch.tensor([0.3, 2.0])):
        t = curvature.joint_readings(H, sizes, a.double(), 20_000, seed=1)  # (2, 20000)
        assert ((t.mean(1) - exact).abs() < 4 * t.std(1) / math.sqrt(20_000)).all()
        t = curvature.joint_readings(H.diag().diag(), sizes, a.double(), 3, seed=1)
        torch.testing.assert_close(t, exact[:, None].expand(2, 3))
    # without a mistake the misreadings are Hutch++, number for number
    right, plus = curvature.misread(blocks, 10, 20, 3, ""), curvature.per_tensor(blocks, 10, 20, 3)
    np.testing.assert_allclose(right, plus)
    for mistake in ("no 1/m", "S reused in G", "G not projected"):
        assert (abs(curvature.misread(blocks, 10, 20, 3, mistake) - plus) > 1e-3).all()


def test_judged_by_hand():
    # tensors of traces 1 and 10, two seeds: relative errors 0.3, -0.4 and 0.3, 0.4
    found = curvature.judged(np.array([[1.3, 6.0], [1.3, 14.0]]), np.array([1.0, 10.0]))
    rms = math.sqrt((0.09 + 0.16) / 2)
    assert found["rms"] == {"median": pytest.approx(rms), "q25": pytest.approx(rms),
                            "q75": pytest.approx(rms), "n": 2}
    assert found["rms_over_all"] == pytest.approx(rms)
    assert found["worst_tensor"] == pytest.approx(0.4)
    assert found["rms_of_median_tensor"] == pytest.approx(0.35)
    assert found["spearman"] == pytest.approx(1)
    # of two different traces the scores are always the same, so they cannot differ
    assert found["score_difference"] == pytest.approx(0, abs=1e-6)


def test_the_study_at_a_tiny_size_and_its_readers(tmp_path, monkeypatch, capsys):
    text = bytearray(Path(hestia.__file__).read_bytes())
    tokens = torch.frombuffer(text, dtype=torch.uint8).clamp(max=127)
    size = curvature.Size(1, 4, 8, steps=24, seeds=3, products=(8, 40))
    result = curvature.study(tokens, size)
    monkeypatch.setattr(curvature, "RESULTS", tmp_path / "results")
    path = curvature.save({"command": "here", **result}, "curvature.json")
    assert [p.name for p in path.parent.iterdir()] == ["curvature.json"]
    result = json.loads(path.read_text())
    published = json.loads((figures.RESULTS / "curvature.json").read_text())

    def keys(x, depth):
        if not isinstance(x, dict) or depth == 0:
            return None
        return {key: keys(value, depth - 1) for key, value in x.items()}

    assert keys(result, 1) == keys(published, 1)
    assert keys(result["curves"], 1) == keys(published["curves"], 1)
    assert keys(result["curves"]["joint"]["40"], 2) == keys(published["curves"]["joint"]["40"], 2)
    for part in ("mutants", "samples", "fisher", "other", "model", "versions"):
        assert keys(result[part], 3) == keys(published[part], 3), part
    assert len(result["exact"]) == len(result["names"]) == result["model"]["tensors"] == 7
    assert [row["of"] for row in result["negatives"]] == [7] * 6
    last = result["negatives"][-1]  # the same batch, tensor by tensor and all together
    assert last["traces"] == pytest.approx(result["exact"])
    # eight products of rank 2 are few, forty of rank 10 catch these small blocks whole
    errors = {n: row["rms_over_all"] for n, row in result["curves"]["Hutch++, per tensor"].items()}
    assert errors["280"] < 0.1 * errors["56"]

    for draw in (figures.hutchpp_error, figures.sensitivity_against):
        draw(result)
    capsys.readouterr()
    tables.show(path)
    curvature.print_study(result)
    assert capsys.readouterr().out.count("joint, unscaled") == 2 * 3  # 8, 40 and 80 products


def test_the_cost_of_a_tiny_shape(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curvature, "RESULTS", tmp_path)
    curvature.cost("tiny", length=16)
    found = json.loads((tmp_path / "curvature-cost-tiny.json").read_text())
    published = json.loads((figures.RESULTS / "curvature-cost-1b.json").read_text())
    assert found.keys() == published.keys()
    assert [row.keys() for row in found["rows"]] == [row.keys() for row in published["rows"]]
    assert found["tensors"] == 7 and len(found["hutchpp_measured_on"]) == 2
