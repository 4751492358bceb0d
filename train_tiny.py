"""Watch a small Llama go from full precision to ternary weights, by HESTIA and by the STE.

    python train_tiny.py                             # four minutes on two CPU cores, no download
    python train_tiny.py --data my.txt --seeds 3     # your own text, three times
    python train_tiny.py --methods full absmean twn hestia              # other methods
    python train_tiny.py --llama Llama-3.2-1B --data my.txt  # a trained Llama in, a ternary one out
    torchrun --nproc-per-node 2 train_tiny.py ...    # the same, every batch shared by two GPUs

For every seed a tiny Llama is trained in full precision on bytes of text, and the sensitivity of
each linear layer is estimated (Hutch++). Each method then starts from the same weights, sees the
same batches, is hardened, saved and measured. out/<name>/ gets config.json, results.json,
overview.png, the checkpoints, and in runs/ each training's log, for the figures and --resume.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import json
import os
import platform
import random
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import hestia
from plots import Watch, label, overview, print_table, run_file, summarize, write, write_json

# -- What can be asked for -------------------------------------------------------------------------


def lab(name):
    """notebooks/lab/<name>.py, for what an option asks for. A default run does without."""
    return importlib.import_module(f"notebooks.lab.{name}")


def option(default, help, least=1, most=10**9):
    """A field of Config, with its line in --help and, for a number, what it may be."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most)})


@dataclasses.dataclass
class Config:
    data: str = option("", "a text file; default: the Python standard library's source")
    val_data: str = option("", "held-out text; default: the last 5 %% of --data")
    test_data: str = option("", "another text, on all of which the models are measured too")
    llama: str = option("", "a Hugging Face folder with a Llama to start from; needs --data")
    methods: tuple = option(("full", "absmean", "hestia-no-hessian", "hestia"), "what to compare")
    seeds: int = option(1, "how many seeds; each has its own weights and batches")
    seed: int = option(0, "the first seed", 0)
    steps: int = option(160, "steps of quantization-aware training, per method (T in the paper)")
    pretrain_steps: int = option(480, "steps of full-precision training before it", 0)
    lr: float = option(1e-3, "peak learning rate of the T steps", 1e-9)
    rho: float = option(0.2, "share of the steps in which the pressure grows (Eq. 10)", 0, 1)
    alpha: float = option(0.4, "how much warmer sensitive tensors stay (Eq. 15)", -50, 50)
    kappa: float = option(1.0, "gain of the sensitivity score (Eq. 13)", 0)
    tau_init: float = option(0.0, "temperature at first, in units of gamma; 0: best fit", 0)
    group_size: int = option(64, "weights that share one scale; 0: one scale per tensor", 0)
    sensitivity: str = option("hutchpp", "Eq. (12); joint: sooner; or fisher, gradnorm, error")
    calibration: int = option(4, "sequences for the traces, with about 512 tokens or more in all")
    rank: int = option(10, "rank r of the Hutch++ sketch", 0)
    samples: int = option(20, "Rademacher samples of Hutch++", 2)
    batch_size: int = option(32, "sequences per step")
    micro_batches: int = option(1, "parts into which a step's batch is cut, to save memory")
    block_size: int = option(128, "tokens per sequence", 2)
    layers: int = option(3, "transformer layers")
    hidden: int = option(128, "width of the model")
    intermediate: int = option(384, "width of the MLP")
    heads: int = option(4, "attention heads; half as many key-value heads", 2)
    clip: float = option(1.0, "largest gradient norm", 1e-9)
    bos: bool = option(True, "with --llama: begin sequences with a token as its tokenizer does")
    distill: float = option(0.0, "weight of the KL to the full-precision model in the loss", 0, 1)
    eval_tokens: int = option(65536, "tokens of each split on which losses are taken; 0: all", 0)
    device: str = option("", "cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    compile: bool = option(False, "compile the model and the passes over the weights")
    packed: bool = option(False, "with --llama: also write two bits per weight")
    gguf: bool = option(False, "with --llama: also write a file for llama.cpp")
    out: str = option("", "folder of this run; default: a new one under out/")
    resume: bool = option(False, "go on with the interrupted run in --out")
    save_minutes: float = option(5.0, "least minutes between saves of a training, for --resume", 0)


PRESETS = {  # what each changes. paper: Table 5; bring more text than the default
    "cpu": {},
    "gpu": dict(layers=4, hidden=192, intermediate=512, heads=6, seeds=3, pretrain_steps=8000,
                steps=2000, lr=2.5e-4, batch_size=64, calibration=16, eval_tokens=524288),
    "paper": dict(layers=4, hidden=256, intermediate=768, heads=8, pretrain_steps=8000, steps=2000,
                  lr=1.5e-3, batch_size=256, micro_batches=64, block_size=1024, tau_init=0.3,
                  group_size=128, calibration=50, eval_tokens=524288),
}

ROWS = {  # a line of the table: arguments of Hestia. notebooks/lab/rivals.py has other methods
    "full": dict(method="full"), "absmean": dict(method="absmean"),
    "hestia-no-hessian": dict(alpha=0.0), "hestia": dict(),
}


def parse(arguments=None):
    """Command line -> Config. The preset's values hold where nothing else is said."""
    parser = argparse.ArgumentParser(prog="train_tiny.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train_tiny.py: {message}\n")
    parser.add_argument("--preset", choices=PRESETS, help="cpu: minutes on two cores; gpu: 1.7 M "
                        "parameters; paper: Table 5 [cpu; with --llama: paper, and joint traces]")
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}}
    for f in dataclasses.fields(Config):
        help = f"{f.metadata['help']} [{f.default}]".removesuffix(" []")
        kind = kinds.get(f.type, {"type": f.type})
        parser.add_argument("--" + f.name.replace("_", "-"), help=help, **kind)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    llama = {"preset": "paper", "sensitivity": "joint"} if given.get("llama") else {}
    given = {"preset": "cpu"} | llama | given
    return Config(**PRESETS[given.pop("preset")] | given)


def check(config):
    """Refuse what options alone show cannot work, in one sentence. Settle methods and device."""
    for f in dataclasses.fields(Config):
        value, (least, most) = getattr(config, f.name), f.metadata["range"]
        if f.type in (int, float) and not least <= value <= most:
            name = f.name.replace("_", "-")
            raise ValueError(f"--{name} is {value}; expected a number from {least:g} to {most:g}")
    rare = config.val_data, config.llama, config.packed, config.gguf, config.device
    if any(rare) or config.sensitivity != "hutchpp" or config.heads % 2 or config.micro_batches > 1:
        lab("options").check(config)
    config.methods = tuple(dict.fromkeys(config.methods))
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")


# -- Text, model, files ----------------------------------------------------------------------------


def standard_library():
    """(train, validation) bytes of Python's own source: files shuffled once, split 95 / 5."""
    root = Path(os.__file__).parent
    skip = {"test", "tests", "idle_test", "encodings", "lib2to3", "site-packages"}
    files = [file.read_bytes() for file in sorted(root.rglob("*.py"))
             if not skip.intersection(file.relative_to(root).parts[:-1])]
    random.Random(0).shuffle(files)
    cut = round(0.95 * len(files))
    return b"".join(files[:cut]), b"".join(files[cut:])


def load_text(config):
    """{"train", "val", perhaps "test": tokens}, and what to record about them."""
    if config.data or config.test_data:
        tokens, facts = lab("texts").load(config)
    else:
        train, val = standard_library()
        tokens = {"train": np.frombuffer(train, np.uint8), "val": np.frombuffer(val, np.uint8)}
        facts = {"source": f"standard library of Python {platform.python_version()}",
                 "sha256": hashlib.sha256(train + b"\0" + val).hexdigest(), "unit": "byte"}
    for split, text in tokens.items():
        tokens[split] = torch.tensor(text, device=config.device)
        facts[f"{split}_{facts['unit']}s"] = len(text)
        if len(text) <= config.block_size + 1:
            raise ValueError(f"the {split} text has {len(text)} {facts['unit']}s; expected more "
                             f"than a block of {config.block_size} and its target")
    return tokens, facts


def save_checkpoint(path, model):
    saved = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    write(path, lambda half: torch.save(saved, half))


def load_checkpoint(path):
    """A Llama from a file of this script. Nothing in the file is executed."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = hestia.Llama(hestia.LlamaConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model


# -- The experiment --------------------------------------------------------------------------------


def report(name, steps, r, log):
    """Print a line for the record r. log: those before it."""
    t, usual = r["step"], np.median([old["grad_norm"] for old in log[-20:]] or [np.inf])
    if not np.isfinite(r["loss"] + r["grad_norm"]):  # with --compile nothing else sees the last one
        raise hestia.Diverged(f"{name}: loss {r['loss']} at step {t}; lower --lr")
    left = r["seconds"] / (t + 1) * (steps - t - 1)
    soft = f"  p {r['p']:.2f}  tau {r['tau_min']:.3f}-{r['tau_max']:.3f}" if "p" in r else ""
    print(f"  step {t:5d}/{steps}  loss {r['loss']:.4f}  grad {r['grad_norm']:.2f}{soft}"
          f"  {left:.0f} s left", flush=True)
    if r["grad_norm"] > 100 * usual:
        warnings.warn(f"{name}: the gradient norm jumped from {usual:.3g} to {r['grad_norm']:.3g}; "
                      "lower --lr, or look at the text", stacklevel=2)
    if t == steps - 1 and r.get("tau_max", 0.0) > 0.03:
        warnings.warn(f"{name} was still soft at the end, tau = {r['tau_max']:.2f}; rounding moves "
                      "its weights; take more --steps or a smaller --rho", stacklevel=2)


def train(config, model, tokens, name, seed, folder, steps, lr, qat=None, on_step=None, **more):
    """hestia.train with this run's settings, from a saved state if there is one: (log, Watch)."""
    every, state = max(1, steps // 40), run_file(folder, name, seed, "state")
    log, watch = [], Watch(qat, every) if qat else None
    optimizer = hestia.adamw(qat.parameters() if qat else list(model.parameters()), lr)
    start = lab("resume").restore(state, optimizer, steps, log, watch) if state.exists() else 0
    began, saved = time.perf_counter() - (log[-1]["seconds"] if log else 0), time.monotonic()
    if config.compile or "RANK" in os.environ:
        model, more = lab("fast").faster(config, model, qat, more)

    def after_step(t, record):
        nonlocal saved
        for follow in filter(None, (on_step, watch)):
            follow(t, record)
        if record:
            record["seconds"] = time.perf_counter() - began  # with those before an interruption
            report(name, steps, record, log)
            log.append(record)
            if time.monotonic() - saved >= 60 * config.save_minutes:
                saved = lab("resume").save(state, t + 1, optimizer, steps, log, watch)

    hestia.train(model, tokens, steps=steps, lr=lr, qat=qat, log_every=every, on_step=after_step,
                 start=start, optimizer=optimizer, batch_size=config.batch_size, clip=config.clip,
                 block_size=config.block_size, micro_batches=config.micro_batches,
                 seed=2 * seed + (qat is not None), **more)  # other batches than the pretraining's
    return log, watch


def first_model(config, seed):
    """The model as it comes: loaded, or a small one with random weights."""
    if config.llama:
        return lab("options").llama(config)
    torch.manual_seed(seed)
    return hestia.Llama(hestia.LlamaConfig(
        vocab_size=256, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.heads // 2, rope_theta=10000.0)).to(config.device)


def make(config, name, model, scores, row=None):
    """(Hestia around the model, further arguments of hestia.train), for a line of the table."""
    settings = dict(group_size=config.group_size or None, rho=config.rho, alpha=config.alpha,
                    scores=scores, tau_init=config.tau_init or None,
                    dtype=torch.bfloat16 if "cuda" in config.device else None)  # of W_eff
    row = ROWS.get(name) if row is None else row
    if name not in ROWS or config.compile or config.distill:
        return lab("rivals").make(name, model, config.steps, config.lr, row, distill=config.distill,
                                  compile=config.compile, **settings)
    return hestia.Hestia(model, config.steps, **settings | row), {}


def losses(config, model, tokens):
    """{split: nats per token}, on every k-th block of a split and on all of the test text."""
    found, size = {}, config.block_size
    for split, text in tokens.items():
        if split != "test" and config.eval_tokens:
            blocks = text[: len(text) // size * size].view(-1, size)
            wanted = max(1, config.eval_tokens // size)
            text = blocks[:: max(1, len(blocks) // wanted)][:wanted].flatten()
        found[split] = hestia.evaluate(model, text, size)
    return found


def sensitivities(config, model, tokens, seed):
    """Eqs. (12) and (13) on training text: {"seconds", "tensors": {name: trace and score}}."""
    print(f"[seed {seed}] sensitivity of each tensor, by {config.sensitivity}", flush=True)
    began, length = time.perf_counter(), min(config.block_size, 512)
    size = 512 // length  # sequences in a batch: the graph of a large model has room for no more
    count = (config.calibration + size - 1) // size * size
    x, y = hestia.batch_at(tokens, 0, count, length, seed=10_000 + seed)
    batches = list(zip(x.split(size), y.split(size)))
    params = {name: layer.weight for name, layer in hestia.linear_layers(model).items()}

    def progress(done, total):
        left = (time.perf_counter() - began) / done * (total - done)
        if done % (total // 50 + 1) == 0 or done == total:
            print(f"\r  {done}/{total} products, {left:.0f} s left  ", end="", flush=True)

    how = dict(rank=config.rank, samples=config.samples, progress=progress,
               generator=torch.Generator(config.device).manual_seed(seed))
    if config.sensitivity in ("hutchpp", "joint"):
        loss = lambda batch: model(*batch)
        traces = hestia.hessian_traces(loss, params, batches, config.sensitivity, **how)
    else:
        traces = lab("curvature").sensitivities(config, model, params, batches, **how)
    print()
    scores = hestia.sensitivity_scores(traces, config.kappa)
    tensors = {name: {**h._asdict(), "flagged": h.flagged, "score": scores[name]}
               for name, h in traces.items()}
    if config.kappa and max(scores.values()) - min(scores.values()) < 0.02:
        warnings.warn(f"seed {seed}: all scores are alike; take more --samples", stacklevel=2)
    return {"seconds": time.perf_counter() - began, "tensors": tensors}


def begin(config, tokens, seed, folder):
    """What the methods of a seed share: the pretrained model, its losses and sensitivities."""
    model, kept = first_model(config, seed), folder / f"pretrained-seed{seed}.pt"
    if kept.exists():
        model = load_checkpoint(kept).to(config.device)
    elif not config.llama:
        size, steps = sum(p.numel() for p in model.parameters()), config.pretrain_steps
        print(f"[seed {seed}] full precision: {size:,} parameters, {steps} steps", flush=True)
        lr = 3e-3 * 128 / config.hidden  # a wider model takes smaller steps
        log, _ = train(config, model, tokens["train"], "pretrain", seed, folder, steps, lr)
        write_json(run_file(folder, "pretrain", seed, "json"), {"log": log})
        save_checkpoint(kept, model)
        run_file(folder, "pretrain", seed, "state").unlink(missing_ok=True)
    path = run_file(folder, "start", seed, "json")
    if path.exists():
        return model, json.loads(path.read_text("utf-8"))
    entry = {"before": losses(config, model, tokens), "sensitivities": {"tensors": {}}}
    qat, _ = make(config, "absmean", copy.deepcopy(model), None)
    with qat.hard():
        entry["untrained"] = losses(config, qat.model, tokens)
    if not {"full", "absmean", "hestia-no-hessian"}.issuperset(config.methods):  # need no scores
        entry["sensitivities"] = sensitivities(config, model, tokens["train"], seed)
    write_json(path, entry)
    return model, entry


def run_row(config, name, model, entry, tokens, seed, folder, row=None):
    """A line of the table: a copy of the model is trained, hardened, saved and measured, once."""
    path = run_file(folder, name, seed, "json")
    if path.exists():
        return json.loads(path.read_text("utf-8"))["row"]
    print(f"[seed {seed}] {label(name)}, {config.steps} steps", flush=True)
    torch.manual_seed(seed)  # for rows that draw random numbers
    model = copy.deepcopy(model)
    scores = {tensor: h["score"] for tensor, h in entry["sensitivities"]["tensors"].items()}
    qat, more = make(config, name, model, scores or None, row)
    log, watch = train(config, model, tokens["train"], name, seed, folder, config.steps, config.lr,
                       qat, **more)
    numbers = {"lr": config.lr, "seconds": log[-1]["seconds"], "tau_init": qat.tau_init}
    if qat.method is not hestia.METHODS["full"]:
        numbers["changed_last_tenth"] = watch.changed()
    qat.harden()
    if config.llama:
        numbers |= lab("options").save(config, name, model, folder / path.stem, entry, tokens)
    else:
        numbers |= losses(config, model, tokens)
        save_checkpoint(folder / f"{path.stem}.pt", model)
    write(path.with_suffix(".npz"), lambda half: np.savez_compressed(half, **watch.arrays()))
    write_json(path, {"row": numbers, "log": log})
    path.with_suffix(".state").unlink(missing_ok=True)  # it is large
    return numbers


def finish(about, entries, per_seed, folder):
    """results.json, overview.png and the table."""
    table, traces = summarize(per_seed), [entry["sensitivities"] for entry in entries]
    write_json(folder / "results.json", about | {"table": table, "per_seed": per_seed,
                                                 "sensitivities": traces})
    write(folder / "overview.png", lambda half: overview(folder).savefig(half, dpi=150))
    print_table(table, about["data"]["unit"])


def open_folder(config, facts):
    """The folder of this run, new or to be gone on with, and what results.json says of the run."""
    apart = ("out", "resume", "save_minutes")  # which change no number
    gpu = "cuda" in config.device and torch.cuda.get_device_name(config.device)
    about = {"config": {k: v for k, v in vars(config).items() if k not in apart}, "data": facts,
             "versions": {"python": platform.python_version(), "torch": torch.__version__},
             "hardware": {"device": gpu or platform.machine(), "threads": torch.get_num_threads()}}
    if config.resume:
        lab("options").check_resume(config, about)
    config.out = config.out or f"out/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path(config.out)
    if not config.resume and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise ValueError(f"--out {folder} is not an empty folder; name another, or use --resume")
    (folder / "runs").mkdir(parents=True, exist_ok=config.resume)
    write_json(folder / "config.json", about | {"process": os.getpid()})
    return folder, about


def run(config):
    """The whole experiment."""
    check(config)
    torch.set_flush_denormal(True)  # numbers below 1e-38 would slow a CPU down as tau falls
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for the Hessian products
    tokens, facts = load_text(config)
    for name in config.methods:  # what does not fit is refused now; 0.3: without a search
        qat, _ = make(dataclasses.replace(config, tau_init=0.3), name, first_model(config, 0), None)
    folder, about = open_folder(config, facts)
    print(f"{facts['source']}: {len(tokens['train']):,} {facts['unit']}s; results go to {folder}/")
    print(f"To be quantized: {qat}")
    entries, per_seed = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        model, entry = begin(config, tokens, seed, folder)
        rows = {"before": entry["before"], "untrained": entry["untrained"]}
        for name in config.methods:
            rows[name] = run_row(config, name, model, entry, tokens, seed, folder)
        entries.append(entry)
        per_seed.append(rows)
    finish(about, entries, per_seed, folder)
    for name in () if config.llama else ("pretrained", config.methods[-1]):  # of the last seed
        model = load_checkpoint(folder / run_file(folder, name, seed, "pt").name).to(config.device)
        ids = hestia.generate(model, torch.tensor([[10]], device=config.device), 200,
                              config.block_size, generator=torch.Generator().manual_seed(seed))[0]
        text = re.sub(r"[^\n -~]", "?", bytes(ids.tolist()).decode("latin-1"))
        print(f"\nA sample, {label(name.replace('pretrained', 'before'))}:\n\n{text.strip()}")
    print(f"\nEverything is in {folder}/")


def main(arguments=None):
    config = parse(arguments)
    warnings.showwarning = lambda message, *_: print(f"  note: {message}", flush=True)
    several = lab("parallel").one_of_several if "RANK" in os.environ else contextlib.nullcontext
    try:
        with several(config):
            run(config)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return lab("options").explain(error, "train_tiny.py", config)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(main())
