"""lab/fast.py against hestia.py, and against autograd in float64."""

import copy
import functools
import math
import re
import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hestia
from notebooks.lab import fast

CODEBOOKS = {"ternary": hestia.TERNARY, "binary": hestia.BINARY, "2 bit": hestia.TWO_BIT}
needs_compiler = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")),
                                    reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tiny_llama(layers=2, **more):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2,
                 num_key_value_heads=2)
    return hestia.Llama(hestia.LlamaConfig(num_hidden_layers=layers, **{**shape, **more}))


@pytest.fixture
def uncompiled(monkeypatch):
    """The passes as they stand, without torch.compile."""
    monkeypatch.setattr(fast, "compiled", lambda function: function)


@pytest.fixture
def captured(monkeypatch):
    """torch.compile's graphs, run without a C++ compiler."""
    torch._dynamo.reset()
    compile = functools.partial(torch.compile, backend="aot_eager", dynamic=False)
    monkeypatch.setattr(fast, "compiled", functools.cache(compile))
    return compile


# --------------------------------------------------------------------------------------------------
# The maps


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
def test_maps_and_slopes_are_what_autograd_finds_in_the_printed_formulas(codebook):
    w, q = randn(6, 16, seed=1, dtype=torch.float64), torch.tensor(codebook, dtype=torch.float64)
    gamma = w.abs().mean(1, keepdim=True) + 1e-8
    for p, tau in ((0.0, 0.3), (0.4, 0.3), (0.4, 0.02), (1.0, 0.3), (1.0, 1e-3), (1.0, 5.0)):
        x = w.clone().requires_grad_()
        pi = torch.softmax(-((x / gamma).unsqueeze(-1) - q).square() / tau, -1)  # (6, 16, K)
        W_eff = (1 - p) * x + p * gamma * (q * pi).sum(-1)
        (slope,) = torch.autograd.grad(W_eff.sum(), x)
        p, tau = torch.tensor(p, dtype=torch.float64), torch.tensor(tau, dtype=torch.float64)
        found = fast.relax_hestia(w, p, tau, codebook), fast.slope_hestia(w, p, tau, codebook)
        torch.testing.assert_close(found, (W_eff.detach(), slope), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
@pytest.mark.parametrize("tau", [1e-20, 1e-6, 1e-3, 10.0, 1e6])
def test_moments_are_finite_and_the_readable_ones_at_every_temperature(codebook, tau):
    z = torch.tensor([[0.0, -0.0, 0.3, -0.5, 0.5, 0.500001, 1.0, -1.5, 7.0, -1e4, 1e17, 1e30]])
    mu, variance = fast.code_moments(z, torch.tensor(tau), codebook)
    expected = hestia.code_moments(z, tau, codebook)
    # near a boundary, z is known to 1e-7 and the moments to 1e-7 / tau
    torch.testing.assert_close((mu, variance), expected, rtol=1e-5, atol=1e-6)
    assert (variance >= 0).all() and mu.abs().max() <= codebook[-1]


# --------------------------------------------------------------------------------------------------
# relax and pull_back


def both(model, steps=10, **settings):
    """Readable and fused Hestia around copies of a model. Each layer has its own temperature."""
    layers = hestia.linear_layers(model)
    scores = {name: k / len(layers) for k, name in enumerate(layers)}
    settings = {"tau_init": 0.3, "scores": scores, **settings}
    return [kind(copy.deepcopy(model), steps, **settings) for kind in (hestia.Hestia, fast.Hestia)]


def assert_same_step(readable, fused, t, left_out=()):
    """Equal W_eff and equal dL/dW of step t. In float32 W_eff agrees to 1e-6 of gamma; where tau is
    small, a rounding of w / gamma makes up to 1 / (2 tau) of it."""
    for qat in (readable, fused):
        qat.relax(t)
        for k, (name, layer) in enumerate(qat.layers.items()):
            assert layer.weight.grad is None
            if name not in left_out:
                layer.weight.grad = randn(*layer.weight.shape, seed=k, dtype=layer.weight.dtype)
    weights = {name: layer.weight for name, layer in fused.layers.items()}
    for name, expected in readable.layers.items():
        assert weights[name].dtype == expected.weight.dtype
        gamma = float(readable.latents[name].detach().abs().mean())
        steep = max(1.0, 0.5 / max(readable.step_of(t, name).tau, 1e-3))
        narrow = 2**-7 if expected.weight.dtype == torch.bfloat16 else 0.0  # its last digit
        torch.testing.assert_close(weights[name].data, expected.weight.data, rtol=narrow,
                                   atol=1e-6 * gamma * steep)
    readable.pull_back()
    fused.pull_back()
    assert all(weight.grad is None for weight in weights.values())
    for name, w in readable.latents.items():
        found = fused.latents[name].grad
        assert (found is None) == (w.grad is None) == (name in left_out)
        if found is not None:
            assert found.dtype == torch.float32
            steep = max(1.0, 0.5 / max(readable.step_of(t, name).tau, 1e-3)) ** 2
            torch.testing.assert_close(found, w.grad, rtol=1e-5, atol=2e-6 * steep)


SETTINGS = [("full", "ternary"), ("absmean", "ternary"), ("absmean", "2 bit"),
            *(("hestia", codebook) for codebook in CODEBOOKS)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize(("method", "codebook"), SETTINGS)
def test_fused_passes_equal_the_readable_ones(method, codebook, group_size, dtype, uncompiled):
    pair = both(tiny_llama(), method=method, codebook=CODEBOOKS[codebook], group_size=group_size,
                dtype=dtype)
    for t in (0, 1, 6, 9):
        assert_same_step(*pair, t, left_out=["model.layers.0.self_attn.q_proj"] * (t > 1))


@needs_compiler
@pytest.mark.parametrize("group_size", [16, pytest.param(None, marks=pytest.mark.slow)])
def test_compiled_passes_equal_the_readable_ones_wherever_the_latents_lie(group_size):
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(2)))
    pair = readable, fused = both(model, group_size=group_size)
    for t in (1, 5, 8):
        for w, W in zip(fused.latents.values(), readable.latents.values()):
            if t == 8:
                w.data = w.data.clone()  # no longer side by side
            w.data.mul_(1.1)
            W.data.mul_(1.1)
        assert_same_step(*pair, t)
        rows = [w.detach() for w in fused.latents.values()]
        assert fast.side_by_side(rows).data_ptr() == rows[0].data_ptr()  # again side by side


@needs_compiler
def test_the_compiled_passes_write_nothing_of_ws_size_but_their_results():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(256, 128, bias=False), nn.Linear(128, 256, bias=False))
    qat = fast.Hestia(model, 4, group_size=64, tau_init=0.3, dtype=torch.bfloat16)
    for work, results in ((lambda: qat.relax(1), ["bfloat16"]), (qat.pull_back, ["float32"] * 2)):
        _, codes = run_and_get_code(work)
        buffers = re.findall(r"empty_strided\w*\(\((.*?)\), .*?torch\.(\w+)\)", "".join(codes))
        large = [dtype for shape, dtype in buffers
                 if math.prod(int(n) for n in shape.split(",") if n.strip()) > 1024]
        assert large == results  # one for both layers, and one each
        # what is kept until pull_back: four numbers per layer, and no graph
        assert sum(table.numel() for table in qat.graphs.values()) in (8, 0)
        for layer in qat.layers.values():
            assert layer.weight.grad_fn is None
            layer.weight.grad = torch.ones_like(layer.weight)


def test_a_stack_copies_only_what_does_not_lie_side_by_side():
    whole = randn(3, 4, 4)
    rows = list(whole)
    near = [rows, rows[1:], rows[1:2]]
    apart = [rows[::-1], rows[::2], [rows[0], rows[1].clone()], [rows[0], rows[0]],
             [rows[0], rows[1].T]]
    for tensors in near + apart:
        stack = fast.side_by_side(tensors)
        assert torch.equal(stack, torch.stack(tensors))
        shared = stack.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert shared == any(tensors is some for some in near)


def test_passes_out_of_turn_are_the_cores_errors(uncompiled):
    qat = fast.Hestia(tiny_llama(), 10, group_size=8)
    with pytest.raises(RuntimeError, match=r"call relax\(t\) first"):
        qat.pull_back()
    with pytest.raises(ValueError, match="expected a step from 0 to 9"):
        qat.relax(10)
    qat.relax(3)
    with pytest.raises(RuntimeError, match="found no gradient; call it after backward"):
        qat.pull_back()
    some = next(iter(qat.layers.values())).weight
    some.grad = torch.ones_like(some)
    with pytest.raises(RuntimeError, match=r"q_proj.weight was left with a gradient"):
        qat.relax(4)
    qat.pull_back()
    with pytest.raises(RuntimeError, match=r"call relax\(t\) first"):
        qat.pull_back()
    some.data = some.data.clone()
    with torch.no_grad():
        some.add_(1)
    with pytest.raises(RuntimeError, match=r"q_proj.weight was written to"):
        qat.relax(5)


def test_other_methods_take_the_readable_passes(uncompiled, monkeypatch):
    halved = hestia.Method("half", lambda w, s: 0.5 * w, hestia.hard_absmean)
    monkeypatch.setitem(hestia.METHODS, "half", halved)
    readable, fused = both(tiny_llama(), method="half", group_size=8)
    assert_same_step(readable, fused, 3)
    for w, W in zip(fused.latents.values(), fused.layers.values()):
        assert torch.equal(W.weight, 0.5 * w)


def test_hard_weights_are_inherited(uncompiled):
    readable, fused = both(tiny_llama(), group_size=8, dtype=torch.bfloat16)
    fused.relax(4)
    soft = {name: layer.weight.detach().clone() for name, layer in fused.layers.items()}
    with fused.hard():
        assert not torch.equal(next(iter(fused.layers.values())).weight, next(iter(soft.values())))
    assert all(torch.equal(layer.weight, soft[name]) for name, layer in fused.layers.items())
    readable.harden()
    fused.harden()
    for name, layer in fused.layers.items():
        assert torch.equal(layer.weight, readable.layers[name].weight)


# --------------------------------------------------------------------------------------------------
# A training


def test_a_training_is_the_readable_one_and_nothing_compiles_after_its_first_step(captured):
    from torch._dynamo.utils import counters

    counters.clear()
    tokens, seen = torch.arange(2000) ** 2 % 61, []
    readable, fused = both(tiny_llama(), 20, group_size=16)

    def on_step(t, record):  # p, tau and the learning rate are others at every step
        seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))

    settings = dict(steps=20, batch_size=4, block_size=16, lr=1e-2, micro_batches=2, log_every=1)
    expected = hestia.train(readable.model, tokens, qat=readable, **settings)
    found = hestia.train(captured(fast.llama(fused.model)), tokens, qat=fused, on_step=on_step,
                         update=fast.Update(), **settings)
    # the model; relax and pull_back for eight layers of a shape, and for the six that remain
    assert seen[0] == (5, 0) and set(seen) == {seen[0]}
    losses = [r["loss"] for r in expected]
    assert [r["loss"] for r in found] == pytest.approx(losses, abs=1e-5)
    assert losses[0] - losses[-1] > 0.5  # something was learned


def quadratic(update, losses, norms, clip=0.5):
    """One parameter after each step of AdamW, with gradients of these norms."""
    x = nn.Parameter(torch.ones(2, 2))
    optimizer, seen = hestia.adamw([x], 0.1), []
    for loss, norm in zip(losses, norms):
        x.grad = torch.full_like(x, 0.5 * norm)
        update(optimizer, torch.tensor(loss), torch.tensor(norm), clip)
        seen.append(x.detach().clone())
    return seen


def test_an_update_clips_as_the_readable_one_does():
    losses, norms = [1.0] * 6, [0.1, 3.0, 0.4, 100.0, 0.5, 0.2]
    found = quadratic(fast.Update(), losses, norms)
    expected = quadratic(hestia.update, losses, norms)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found[-1], quadratic(hestia.update, losses, norms, clip=9.0)[-1])


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_refused_step_changes_nothing_and_is_named(loss, norm):
    update, x = fast.Update(start=40), nn.Parameter(torch.ones(2, 2))
    optimizer = hestia.adamw([x], 0.1)
    for step, (loss_now, norm_now) in enumerate([(1.0, 1.0), (1.0, 1.0), (loss, norm)]):
        before, x.grad = x.detach().clone(), torch.full_like(x, norm_now)
        numbers = torch.tensor(loss_now), torch.tensor(norm_now)
        if step < 2:
            update(optimizer, *numbers, 1.0)
            assert not torch.equal(x, before)
    with pytest.raises(hestia.Diverged, match="step 42: loss "):
        update(optimizer, *numbers, 1.0)
    assert torch.equal(x, before)


class OnGPU(torch.Tensor):
    """A number that claims to lie on a GPU, so that an update reads it one step later."""

    is_cuda = True


def test_on_a_gpu_divergence_is_read_one_step_later(monkeypatch):
    waits = []

    class Event:
        def record(self):
            waits.append("record")

        def synchronize(self):
            waits.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    update, x = fast.Update(), nn.Parameter(torch.ones(2, 2))
    optimizer, seen = hestia.adamw([x], 0.1), []
    with pytest.raises(hestia.Diverged, match="step 1: loss nan"):
        for loss in (1.0, math.nan, 1.0):
            x.grad = torch.ones_like(x)
            update(optimizer, torch.tensor(loss).as_subclass(OnGPU), torch.tensor(1.0), 1.0)
            seen.append(x.detach().clone())
    assert len(seen) == 2 and torch.equal(*seen)  # refused, and seen in the call after it
    assert waits == ["record", "synchronize", "record", "synchronize"]
    update(optimizer, torch.tensor(math.inf).as_subclass(OnGPU), torch.tensor(1.0), 1.0)
    with pytest.raises(hestia.Diverged, match="step 2: loss inf"):
        update.flush()  # the last step of a training
    update.flush()  # it is told once


def test_a_diverging_training_says_where_and_keeps_the_weights(uncompiled):
    model, kept = fast.llama(tiny_llama()), {}
    qat = fast.Hestia(model, 9, group_size=8)

    def poison(t, record):
        if t == 4:
            kept.update({name: w.detach().clone() for name, w in qat.latents.items()})
            model.model.norm.weight.data.fill_(math.inf)

    with pytest.raises(hestia.Diverged, match="step 5"):
        hestia.train(model, torch.randint(0, 64, (500,)), steps=9, batch_size=2, block_size=8,
                     lr=1e-3, qat=qat, on_step=poison, update=fast.Update())
    assert all(torch.equal(w, kept[name]) for name, w in qat.latents.items())


# --------------------------------------------------------------------------------------------------
# The model


class Logits(TorchDispatchMode):
    """The most that went through one softmax."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._log_softmax.default:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fast_llama_has_the_plain_ones_loss_and_gradients(tied, checkpointing, monkeypatch):
    plain = tiny_llama(vocab_size=67, tie_word_embeddings=tied).double()
    quick = fast.llama(copy.deepcopy(plain), checkpointing)
    assert list(quick.state_dict()) == list(plain.state_dict())
    x, y = torch.randint(0, 67, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quick(x), plain(x))
    expected = plain(x, y)
    expected.backward()
    in_parts = functools.partialmethod(fast.Llama.loss, budget=5 * 67)  # parts of 5 tokens
    for loss, most in ((fast.Llama.loss, 33 * 67), (in_parts, 5 * 67)):
        monkeypatch.setattr(fast.Llama, "loss", loss)
        quick.zero_grad()
        with Logits() as seen:
            found = quick(x, y)
            found.backward()
        assert seen.most == most
        torch.testing.assert_close(found, expected)
        for a, b in zip(quick.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


IGNORED = {"some": [0, 3, 4, 20], "a part": range(5, 10), "the last part": [0, 30, 31, 32],
           "all but one": range(1, 33), "all": range(33)}


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_a_loss_in_parts_counts_the_targets_that_are_not_ignored(ignored):
    plain = tiny_llama(vocab_size=67).double()
    quick = fast.llama(copy.deepcopy(plain))
    x, y = torch.randint(0, 67, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    y.view(-1)[list(ignored)] = -100
    hidden = randn(3, 11, 32, seed=1, dtype=torch.float64)
    expected, found = plain(x, y), quick(x, y)
    torch.testing.assert_close(found, expected, equal_nan=True)  # in one part
    for budget in (5 * 67, 67, 1):  # in parts of 5 tokens, and of one
        quick.zero_grad()
        plain.zero_grad()
        a, b = (hidden.clone().requires_grad_() for _ in range(2))
        found, expected = quick.loss(a, y, budget), plain.loss(b, y)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan() == (len(ignored) == 33)
        found.backward()
        expected.backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(quick.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-9,
                                   atol=1e-12, equal_nan=True)


class InParts(fast.Llama):
    def loss(self, x, targets):
        return super().loss(x, targets, budget=5 * 64)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_loss_comes_in_parts_only_without_autocast(autocast):
    torch._dynamo.reset()
    model, codes = fast.llama(tiny_llama()), []
    model.__class__ = InParts

    def backend(graph, inputs):
        codes.append(graph.code)
        return graph

    ids = torch.randint(0, 64, (2, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = torch.compile(model, backend=backend, fullgraph=True)(ids, ids)
        assert loss.item() == pytest.approx(model(ids, ids).item(), abs=1e-2)
    assert ("checkpoint" in codes[0]) == (not autocast)


def test_checkpointing_keeps_one_activation_per_layer():
    kept, x = [], torch.randint(0, 64, (2, 8))
    for checkpointing in (False, True):
        model, sizes = fast.llama(tiny_llama(4), checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(x, x)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    assert not any(isinstance(b, fast.Checkpointed) for b in fast.llama(model).model.layers)


@needs_compiler
@pytest.mark.slow
def test_compiled_cosines_are_worked_out_once_per_step():
    from torch._inductor.utils import run_and_get_code

    ids, cosines = torch.randint(0, 64, (2, 16)), []
    for model in (tiny_llama(), fast.llama(tiny_llama())):
        torch._dynamo.reset()
        with torch.no_grad():
            _, codes = run_and_get_code(torch.compile(model), ids, ids)
        cosines.append("".join(codes).count("cos()"))
    assert cosines[0] > cosines[1] == 1


# --------------------------------------------------------------------------------------------------
# On a GPU


@needs_gpu
@pytest.mark.parametrize("method", [None, "full", "absmean", "hestia"])
def test_no_step_waits_for_the_gpu_and_divergence_is_still_seen(method):
    fast.settle()
    model = fast.llama(tiny_llama(hidden_size=64, intermediate_size=64)).cuda()
    qat = method and fast.Hestia(model, 12, method=method, group_size=16, dtype=torch.bfloat16)
    trained = qat.latents if qat else {k: p for k, p in model.named_parameters() if "norm" not in k}
    tokens, kept = torch.randint(0, 64, (2000,)).cuda(), {}

    def on_step(t, record):  # what waits between steps 0 and 9 raises another error
        torch.cuda.set_sync_debug_mode("error" if t < 9 else "default")
        if t == 6:
            kept.update({name: p.detach().clone() for name, p in trained.items()})
            model.model.norm.weight.data.fill_(math.inf)

    try:
        with pytest.raises(hestia.Diverged, match="step 7: "):
            hestia.train(torch.compile(model), tokens, steps=12, batch_size=8, block_size=16,
                         lr=1e-3, qat=qat, micro_batches=2, log_every=12, on_step=on_step,
                         update=fast.Update())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, kept[name]) for name, p in trained.items())


@needs_gpu
def test_a_kernel_that_starts_early_reads_nothing_early():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))).cuda()
    plain = hestia.Hestia(copy.deepcopy(model), 40, tau_init=0.3)
    quick = fast.Hestia(model, 40, tau_init=0.3, dtype=torch.bfloat16)
    for t in range(40):
        found = []
        for qat in (quick, plain):
            with torch.no_grad():
                torch._foreach_mul_(list(qat.latents.values()), 0.9)
            qat.relax(t)
            for layer in qat.layers.values():
                # pull_back at once reads what the kernel before it, relax's, has written
                layer.weight.grad = layer.weight.detach()
            qat.pull_back()
            found.append([w.grad for w in qat.latents.values()])
        torch.testing.assert_close(*found, rtol=2e-2, atol=1e-5)
