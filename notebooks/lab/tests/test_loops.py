"""Loops that people write: each trains and ends ternary, or is refused with what to do."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim import SGD, AdamW, swa_utils
from torch.utils.checkpoint import checkpoint

import hestia
from hestia import adamw
from notebooks.lab import parallel

generator = torch.Generator().manual_seed(1)
X = torch.randn(64, 16, generator=generator)
Y = (X @ torch.randn(16, 4, generator=generator)).tanh()
IDS = torch.randint(0, 4, (200,), generator=generator)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.score = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x, y):
        return {"loss": F.mse_loss(self.score(self.down(self.up(x).relu()).relu()), y)}

class LM(Net):
    """With layers that behave differently in training. reentrant: how `up` is checkpointed."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embed, self.norm, self.dropout = nn.Embedding(4, 16), nn.BatchNorm1d(16), nn.Dropout()
        self.reentrant = reentrant

    def forward(self, x, y=None):
        z, up = self.embed(x), lambda z: self.up(z).tanh()
        z = up(z) if self.reentrant is None else checkpoint(up, z, use_reentrant=self.reentrant)
        z = self.score(self.dropout(self.norm(self.down(z).flatten(0, -2))))
        return z.view(*x.shape, 4) if y is None else F.cross_entropy(z, y.flatten())

def start(model=None, **settings):
    model = Net() if model is None else model
    return model, hestia.Hestia(model, 30, **{"group_size": 8, **settings})

def loss_of(model):
    dtype = next(model.parameters()).dtype
    return model(X.to(dtype), Y.to(dtype))["loss"]

def ternary(layer):
    groups = layer.weight.detach().abs().reshape(-1, 8)
    return all(len(group[group > 0].unique()) <= 1 for group in groups)

def loop(model, qat, optimizer=None, backward=None, pull_back=None, step=None, steps=range(30)):
    """The README's, without harden(). What is None does the usual."""
    optimizer = optimizer or adamw(qat.parameters(), 1e-2)
    for t in steps:
        qat.relax(t)
        backward() if backward else loss_of(model).backward()
        (pull_back or qat.pull_back)()
        (step or optimizer.step)()
        optimizer.zero_grad()

# -- Loops that train ------------------------------------------------------------------------------

def lbfgs(model, qat):
    optimizer = torch.optim.LBFGS(qat.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    for t in range(30):
        def closure(t=t):
            optimizer.zero_grad()
            qat.relax(t)
            loss = loss_of(model)
            loss.backward()
            qat.pull_back()
            return loss
        optimizer.step(closure)

def scaled(model, qat):
    optimizer, scaler = adamw(qat.parameters(), 1e-2), torch.amp.GradScaler("cpu")
    factors, seen = iter([torch.inf] + [1.0] * 29), [qat.latents["up"].clone()]
    backward = lambda: scaler.scale(loss_of(model) * next(factors)).backward()
    loop(model, qat, optimizer, backward, step=lambda: (
        scaler.step(optimizer), scaler.update(), seen.append(qat.latents["up"].clone())))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])  # skipped once

def averaged(model, qat):
    """The average is one of latents. An average of effective weights would not be ternary."""
    optimizer, trained = adamw(qat.parameters(), 1e-2), nn.ParameterList(qat.parameters())
    ema = swa_utils.AveragedModel(trained, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8))
    loop(model, qat, optimizer, step=lambda: (optimizer.step(), ema.update_parameters(trained)))
    trained.load_state_dict(ema.module.state_dict())

def distributed(model, qat):
    with parallel.together(False, init_method=f"file://{qat.folder}/a", rank=0, world_size=1):
        loop(nn.parallel.DistributedDataParallel(model), qat)

def accelerated(model, qat):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, adamw(qat.parameters(), 1e-2))
    loop(model, qat, optimizer, lambda: accelerator.backward(loss_of(prepared)))

def trainer(model, qat, optimizer=True):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Anneal(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            qat.relax(state.global_step)

        def on_pre_optimizer_step(self, args, state, control, **_):
            qat.pull_back()

    args = transformers.TrainingArguments(
        str(qat.folder), max_steps=30, per_device_train_batch_size=32, use_cpu=True,
        gradient_accumulation_steps=2, max_grad_norm=0.0, lr_scheduler_type="constant",
        report_to=[], save_strategy="no", disable_tqdm=True)
    transformers.Trainer(
        model, args, train_dataset=[{"x": x, "y": y} for x, y in zip(X, Y)], callbacks=[Anneal()],
        optimizers=(adamw(qat.parameters(), 1e-2) if optimizer else None, None)).train()

SAME = {  # in the end it has the weights of the README's loop
    "DDP": distributed, "accelerate": accelerated, "Trainer": trainer,
    "compiled": lambda m, q: loop(torch.compile(m, backend="aot_eager"), q),
    "micro-batches": lambda m, q: loop(m, q, backward=lambda: [
        (m(x, y)["loss"] / 4).backward() for x, y in zip(X.chunk(4), Y.chunk(4))]),
}
LOOPS = SAME | {
    "bfloat16": loop, "LBFGS": lbfgs, "GradScaler": scaled, "average": averaged,
    "SGD": lambda m, q: loop(m, q, SGD(q.parameters(), 0.3, 0.9)),
    "foreach": lambda m, q: loop(m, q, AdamW(q.parameters(), 1e-2, foreach=True)),
}

@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_and_ends_ternary(name, tmp_path):
    torch._dynamo.reset()
    model, qat = start(Net().to(torch.bfloat16 if name == "bfloat16" else torch.float32))
    qat.folder, before = tmp_path, copy.deepcopy(qat.parameters())
    with torch.no_grad(), qat.hard():
        first = loss_of(model)
    LOOPS[name](model, qat)
    assert not any(map(torch.equal, before, qat.parameters()))
    qat.harden()
    assert ternary(model.up) and ternary(model.down) and not ternary(model.score)
    assert loss_of(model) < 0.75 * first
    if name in SAME:
        plain, qat = start()
        loop(plain, qat)
        qat.harden()
        torch.testing.assert_close(loss_of(model), loss_of(plain), rtol=1e-3, atol=0)

def test_an_adapter_is_trained_and_the_frozen_layer_stays_as_it_is():
    model = Net()  # LoRA by hand: a matrix of low rank beside a frozen layer
    model.A, model.B = nn.Parameter(X[:16, :2].clone()), nn.Parameter(torch.zeros(2, 32))
    model.up.requires_grad_(False)
    model.up.register_forward_hook(lambda up, x, out: out + x[0] @ model.A @ model.B)
    before, (_, qat) = copy.deepcopy(model.state_dict()), start(model)
    assert list(qat.latents) == ["down"]
    assert qat.left_out == {"A": "Net", "B": "Net", "up.weight": "Linear, frozen",
                            "score.weight": "Linear"}
    loop(model, qat)
    qat.harden()
    same = [name for name, x in model.state_dict().items() if torch.equal(x, before[name])]
    assert same == ["up.weight", "up.bias"] and not model.up.weight.requires_grad
    assert ternary(model.down)

# -- Loops that train nothing ----------------------------------------------------------------------

def around(model, qat):
    hestia.train(model, IDS, steps=30, batch_size=4, block_size=8, lr=1e-2, qat=qat)

ASK = r"give the optimizer qat\.parameters\(\)"
LOST = r"pull_back\(\) found no gradient; call it after backward\(\) through the model in"
LEFT = r"up\.weight was left with a gradient .* call pull_back\(\) after backward\(\)"
NOTHING = {
    "model.parameters()": (ASK, lambda m, q: loop(m, q, adamw(m.parameters(), 1e-2))),
    "two steps": (ASK, lambda m, q: (loop(m, q, SGD(m.parameters()), steps=(0, 1)), q.harden())),
    "the Trainer's own": (ASK, lambda m, q: trainer(m, q, optimizer=False)),
    "a copy's": (ASK, lambda m, q: loop(m, q, adamw(copy.deepcopy(q).parameters(), 1e-2))),
    "learning rate 0": (ASK, lambda m, q: loop(m, q, adamw(q.parameters(), 0.0))),
    "no pull_back": (LEFT, lambda m, q: loop(m, q, pull_back=lambda: None)),
    "zero_grad": (LOST, lambda m, q: loop(m, q, pull_back=lambda: (m.zero_grad(), q.pull_back()))),
    "another model": (LOST, lambda m, q: loop(Net(), q)),
    "another in train": ("around this model", lambda m, q: around(LM(), q)),
    "no relax": (r"call relax\(t\) first", lambda m, q: (loss_of(m).backward(), q.pull_back())),
    "neither": (LEFT, lambda m, q: (
        loss_of(m).backward(), adamw(q.parameters(), 1e-2).step(), q.harden())),
    "a plain loop": (r"up\.weight was written to", lambda m, q: (
        loss_of(m).backward(), adamw(m.parameters(), 1e-2).step(), m.zero_grad(), q.harden())),
    "a part": ("around this model", lambda m, q: around(
        lm := LM(), start(nn.Sequential(lm.up, lm.down))[1])),  # the head would not be trained
}

@pytest.mark.parametrize("name", NOTHING)
def test_a_loop_that_trains_nothing_is_refused_with_what_to_do(name, tmp_path):
    (message, wrong), (model, qat) = NOTHING[name], start()
    qat.folder = tmp_path
    with pytest.raises((RuntimeError, ValueError), match=message):
        wrong(model, qat)

def test_a_loop_that_pulls_back_each_micro_batch_is_refused():
    model, qat = start()
    with pytest.raises(RuntimeError, match="after all micro-batches"):
        for x, y in zip(X.chunk(4), Y.chunk(4)):
            qat.relax(0)
            (model(x, y)["loss"] / 4).backward()
            qat.pull_back()

def test_weights_that_move_are_not_called_still():
    model, x = nn.Linear(4, 1, bias=False), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for seed in range(20):  # the sum of the weights stays as it is
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
        _, qat = start(model, group_size=4, method="full")
        loop(model, qat, AdamW(qat.parameters(), lr=1e-2, weight_decay=0),
             lambda: (model(x) - 1).square().sum().backward())

# -- Models that change behind Hestia's back -------------------------------------------------------

OTHER = {name: 1.3 * x for name, x in Net().state_dict().items()}
CHANGES = {
    "load": ("written to", lambda m: m.load_state_dict(OTHER)),
    "assign": ("replaced", lambda m: m.load_state_dict(OTHER, assign=True)),
    "weight_norm": ("replaced|written to", lambda m: nn.utils.parametrizations.weight_norm(m.up)),
    "freeze": ("frozen", lambda m: m.requires_grad_(False)),
    "prune": ("replaced", lambda m: prune.l1_unstructured(m.up, "weight", 0.3)),
    "zeros": ("written to", lambda m: m.up.weight.detach().mul_(OTHER["up.weight"].abs() > 0.1)),
    "bfloat16": ("moved|written to", lambda m: m.bfloat16()),
    "float64": ("moved", lambda m: m.double()),
    "one vector": ("written to", lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(OTHER.values()), m.parameters())),
    "other layer": ("given other", lambda m: setattr(m, "up", nn.Linear(16, 32))),
    "other head": ("given other", lambda m: setattr(m, "score", nn.Linear(16, 4))),
}
# before the first step, between two, before harden()
MOMENTS = [f"{name} at {t}" for name in CHANGES for t in (0, 3, 30)]

@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_model_that_was_changed_is_refused_by_the_tensors_name(moment):
    name, _, t = moment.rpartition(" at ")
    (message, change), (model, qat), t = CHANGES[name], start(), int(t)
    loop(model, qat, steps=range(t))
    change(model)
    what = "the model" if "given" in message else r"up\.weight"
    with pytest.raises(RuntimeError, match=f"{what} was ({message})"):
        qat.relax(t) if t < 30 else qat.harden()

# -- Traces, evaluations, copies -------------------------------------------------------------------

@pytest.mark.parametrize("estimator", ["hutchpp", "joint"])
def test_a_trace_of_what_is_not_in_the_loss_is_refused_and_not_zero(estimator):
    def traces(model, owner, *names):
        params = {name: owner.get_submodule(name).weight for name in names}
        seed = torch.Generator().manual_seed(0)
        return hestia.hessian_traces(lambda x: model(x, x), params, [IDS.view(2, 100)],
                                     estimator, rank=1, samples=2, generator=seed)

    plain, other, wrong = LM().eval(), LM(False).eval(), LM(True).eval()
    assert traces(plain, plain, "up", "down") == traces(other, other, "up", "down")
    for model, owner in ((plain, copy.deepcopy(plain)), (wrong, wrong)):
        with pytest.raises(ValueError, match="does not depend on up; are they the model's own"):
            traces(model, owner, "up")

def test_evaluate_and_generate_change_nothing_and_put_every_mode_back():
    model = LM()
    model.norm.eval()  # as some do by hand
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    assert hestia.evaluate(model, IDS, 16) == hestia.evaluate(model.train(), IDS, 16)
    model.norm.eval()
    assert torch.equal(*(hestia.generate(model, IDS.view(2, 100), 3, 9, 0) for _ in range(2)))
    with pytest.raises(IndexError):  # not even an error leaves another mode
        hestia.evaluate(model, IDS + 4, 16)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_in_mid_training_goes_on_to_the_same_bits(copied):
    model, qat = start()
    optimizer = adamw(qat.parameters(), 1e-2)
    loop(model, qat, optimizer, steps=range(4))
    qat.relax(4)
    other, others_optimizer = copied((qat, optimizer))
    with pytest.raises(RuntimeError, match=r"call relax\(t\) first"):
        other.pull_back()
    for a, b in ((qat, optimizer), (other, others_optimizer)):
        loop(a.model, a, b, steps=range(4, 30))
        a.harden()
    assert other.model is not model
    assert all(map(torch.equal, model.parameters(), other.model.parameters()))

def test_harden_leaves_what_hard_shows_and_it_can_be_trained():
    model, qat = start(Net().bfloat16(), codebook=hestia.TWO_BIT)
    with torch.inference_mode():
        with qat.hard():
            shown = [p.clone() for p in model.parameters()]
        qat.harden()
    loss_of(model).backward()
    assert all(map(torch.equal, shown, model.parameters()))
    assert all(p.dtype == torch.bfloat16 and p.grad.any() for p in model.parameters())

# -- Which layers are quantized, and what is said of input that cannot be used ---------------------

def test_a_head_is_known_by_its_model_or_by_its_name():
    blocks = nn.ModuleList([nn.ModuleDict({"output": nn.Linear(8, 8)})])
    model = nn.ModuleDict({"blocks": blocks, "score": nn.Linear(8, 8), "last": nn.Linear(8, 8)})
    assert list(hestia.linear_layers(model)) == ["blocks.0.output", "last"]
    model.get_output_embeddings = lambda: model["last"]
    assert list(hestia.linear_layers(model)) == ["blocks.0.output", "score"]
    model.get_output_embeddings = lambda: blocks[0]["output"]  # what a model says counts anywhere
    assert list(hestia.linear_layers(model)) == ["score", "last"]
    model.get_output_embeddings = lambda: model["last"]
    assert start(model)[1].left_out == {"last.weight": "Linear"}

def test_matrices_that_are_not_linear_layers_are_left_out_and_named():
    t = pytest.importorskip("transformers")
    gpt2 = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2,
                                          bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match=r"nothing to quantize: no nn\.Linear but the head"):
        start(gpt2)
    _, qat = start(nn.ModuleDict({"gpt2": gpt2, "probe": nn.Linear(16, 16)}))
    assert list(qat.latents) == ["probe"]
    assert qat.left_out["gpt2.transformer.h.0.attn.c_attn.weight"] == "Conv1D"
    _, qat = start(t.MixtralForCausalLM(t.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)))
    assert {name.rpartition(".")[0] for name in qat.latents} == {"model.layers.0.self_attn"}
    assert qat.left_out["model.layers.0.mlp.experts.down_proj"] == "MixtralExperts"

def trained_on(tokens):
    model = hestia.Llama(hestia.LlamaConfig(4, 16, 16, 1, 2, 2))
    hestia.train(model, tokens, steps=1, batch_size=2, block_size=4, lr=1e-3)

PACKED = nn.Linear(8, 8)
PACKED.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
MESSAGES = {
    "packed": ("nothing to quantize: .* or packed", lambda: start(PACKED)),
    "meta": ("weights of .* are not loaded", lambda: start(nn.Linear(8, 8, device="meta"))),
    "lazy": ("uninitialized parameter", lambda: start(nn.LazyLinear(4))),
    "group size 0": ("None: one scale for the tensor", lambda: start(group_size=0)),
    "numpy": (r"ndarray \(200,\); expected a torch", lambda: trained_on(IDS.numpy())),
    "rows": (r"Tensor \(10, 20\); expected a torch", lambda: trained_on(IDS.view(10, 20))),
    "vocabulary": ("there is a token 4; the model has 4 tokens", lambda: trained_on(IDS + 1)),
    "rows for evaluate": (r"\(10, 20\)", lambda: hestia.evaluate(LM(), IDS.view(10, 20), 20)),
}

@pytest.mark.parametrize("name", MESSAGES)
def test_input_that_cannot_be_used_is_refused_in_one_sentence(name):
    message, wrong = MESSAGES[name]
    with pytest.raises(ValueError, match=message):
        wrong()

# -- A device without float64 ----------------------------------------------------------------------

def test_no_float64_is_asked_of_the_device(monkeypatch):
    double, cpu = torch.Tensor.double, torch.Tensor.cpu

    def fetched(x):
        x = cpu(x).view_as(x)
        x.is_fetched = True
        return x

    def widened(x):
        assert hasattr(x, "is_fetched"), "float64 on the device"
        return double(x)

    monkeypatch.setattr(torch.Tensor, "cpu", fetched)
    monkeypatch.setattr(torch.Tensor, "double", widened)
    model, qat = start(LM())
    params = {name: layer.weight for name, layer in qat.layers.items()}
    for estimator in ("hutchpp", "joint"):
        hestia.hessian_traces(lambda x: model(x, x), params, [IDS.view(2, 100)], estimator, 1, 2)
    around(model, qat)
    hestia.evaluate(model, IDS, 16)
    with pytest.raises(AssertionError, match="float64 on the device"):
        IDS.double()

def test_float64_is_named_only_where_a_traces_dtype_is_checked():
    lines = [x for x in inspect.getsource(hestia).splitlines() if "torch.float64" in x]
    assert len(lines) == 1 and "if not w.requires_grad or w.dtype not in" in lines[0]
