"""Watch a small Llama go from full precision to ternary weights, by HESTIA and by the straight-through estimator.

    python train_tiny.py                             # about four minutes on two CPU cores, nothing is downloaded
    python train_tiny.py --preset gpu                # the same at 1.7 M parameters and three seeds, on a GPU
    python train_tiny.py --data my.txt --methods full absmean hestia --seeds 3
    python train_tiny.py --llama Llama-3.2-1B --data my.txt      # a trained Llama in, a ternary one out
    torchrun --nproc-per-node 2 train_tiny.py ...                # the same, every batch shared by two GPUs
    python train_tiny.py --bench --llama 1b                      # what a step costs (section 5.5); see --bench --help

For every seed: a tiny Llama is trained in full precision on bytes of text; the sensitivity of each linear layer is
estimated (Hutch++); then, from the same weights and on the same batches, every method trains for the same number of
steps, is hardened, saved, read back and evaluated. A table and a folder out/<name>/ are left: config.json, log.jsonl
(one record per line), runs/ (what is finished, for --resume), sensitivities.json, results.json, snapshots.npz,
overview.png, the full-precision weights of each seed, and a checkpoint per method and seed. With --llama the weights
come from a folder instead of the first training, the text goes through its tokenizer, the settings are the paper's
unless said otherwise, and the checkpoints are Hugging Face folders.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import hestia
import plots

# ----------------------------------------------------------------------------------------------------------------------
# configuration: one dataclass, whose fields become the command-line options


def option(help, cpu, gpu=None, paper=None):
    gpu = cpu if gpu is None else gpu
    presets = {"cpu": cpu, "gpu": gpu, "paper": gpu if paper is None else paper}
    return field(default=cpu, metadata={"help": help, "presets": presets})


@dataclass
class Config:
    preset: str = option("cpu: minutes on two cores; gpu: 1.7 M parameters; paper: Table 5, for much more text", "cpu")
    data: str = option("a UTF-8 text file, read as bytes; default: the Python standard library's source", "")
    val_data: str = option("held-out text; default: the last 5 % of --data, or files of the default text", "")
    test_data: str = option("another text, on all of which the finished models are measured too", "")
    llama: str = option("a folder with a Llama to start from, Hugging Face's or Meta's; needs --data", "")
    methods: tuple = option(f"what to compare, of: {', '.join(hestia.QUANTIZERS)}; or all",
                            ("full", "absmean", "hestia-no-hessian", "hestia"))  # fmt: skip
    ablate: str = option("compare variants of HESTIA: group, hessian, alpha, rho, bits, samples; or all", "")
    seeds: int = option("how many seeds; each has its own weights and batches, shared by all methods", 1, 3)
    seed: int = option("the first seed", 0)
    steps: int = option("steps of quantization-aware training, per method (T in the paper)", 160, 2000)
    pretrain_steps: int = option("steps of full-precision training before it", 480, 8000)
    lr: float = option("peak learning rate of the T steps; the default is AbsMean STE's best", 1e-3, 2.5e-4, 1.5e-3)
    lrs: tuple = option("choose each method's peak among these, on a seed and text of their own, not by --lr", ())
    pretrain_lr: float = option("peak learning rate of the full-precision training", 3e-3, 2e-3)
    weight_decay: float = option("AdamW's weight decay, on matrices only", 0.1)
    clip: float = option("largest gradient norm", 1.0)
    distill: bool = option("learn the full-precision model's distribution, as llm-qat always does", False)
    clip_at: str = option("the gradient that is clipped: effective (dL/dW_eff) or latent (dL/dW)", "effective")
    rho: float = option("share of the steps in which the pressure grows from 0 to 1 (Eq. 10)", 0.2)
    alpha: float = option("how much warmer sensitive tensors stay, tau * exp(alpha s) (Eq. 15)", 0.4)
    kappa: float = option("gain of the sensitivity score (Eq. 13)", 1.0)
    tau_init: float = option("initial temperature, in units of gamma; 0: by least squares (sec. 5.1)", 0.0, 0.0, 0.3)
    group_size: int = option("weights that share one scale; 0: one scale per tensor", 64, 64, 128)
    calibration: int = option("sequences for the Hessian traces (at least 512 tokens)", 4, 16, 50)
    sensitivity: str = option("what ranks the tensors: Hessian traces by hutchpp (the paper's), joint (all from "
                              "the same products) or fisher (never negative); gradnorm; rounding error", "hutchpp")
    rank: int = option("rank r of the Hutch++ sketch", 10)
    samples: int = option("Rademacher samples of Hutch++; backward passes of fisher", 20)
    batch_size: int = option("sequences per step", 32, 64, 256)
    micro_batches: int = option("parts into which a step's batch is cut, to save memory", 1, 1, 8)
    block_size: int = option("bytes per sequence", 128, 128, 1024)
    layers: int = option("transformer layers", 3, 4)
    hidden: int = option("width of the model", 128, 192, 256)
    intermediate: int = option("width of the MLP", 384, 512, 768)
    heads: int = option("attention heads; half as many key-value heads", 4, 6, 8)
    checkpointing: bool = option("keep one activation per layer, compute the rest twice: less memory", False)
    packed: bool = option("with --llama: also write folders of two bits per weight (compressed-tensors)", False)
    eval_tokens: int = option("tokens of each split on which the table's losses are measured; 0: all", 65536, 524288)
    device: str = option("cpu, cuda, cuda:1, ...; default: a GPU if there is one", "")
    compile: bool = option("compile the model with torch.compile", False, True)
    shard: bool = option("under torchrun: each process keeps only its share of AdamW's state", False)
    show: str = option("only print the tables of this results.json, or bench.json", "")
    out: str = option("folder of this run; default: a new one under out/", "")
    jobs: int = option("runs at once, each in a process of its own, spread over the GPUs if --device is cuda", 1)
    save_minutes: float = option("minutes between saves of a training's state, for --resume; 0: after each step", 5.0)
    strict: bool = option("stop with an error where a line would warn of trouble in a training", False)
    resume: bool = option("go on with the run in --out, which was interrupted, where it was", False)


CHOICES = {
    "clip_at": ("effective", "latent"),
    "sensitivity": ("hutchpp", "joint", "fisher", "gradnorm", "error"),
    "ablate": ("group", "hessian", "alpha", "rho", "bits", "samples", "all"),
}


def ablation(config):
    """The methods of --ablate: Table 4, what the authors' rebuttal adds, and two controls for the Hessian's scores."""
    usual = {"alpha": config.alpha, "rho": config.rho, "samples": config.samples}
    of = lambda setting, *values: ("hestia", *(f"hestia:{setting}={v}" for v in values if v != usual.get(setting)))
    g = config.group_size or math.gcd(config.hidden, config.intermediate)
    sizes = [size for size in dict.fromkeys((0, g, g // 2)) if size != config.group_size]
    variants = {
        "group": (*(f"absmean:group_size={s}" for s in sizes), "hestia", *(f"hestia:group_size={s}" for s in sizes)),
        "hessian": ("hestia-no-hessian", *of("scores", "shuffled", "common")),
        "alpha": of("alpha", 0.6, 0.4, 0.2, 0.0, -0.2, -0.4, -0.6),
        "rho": of("rho", 0.0, 0.1, 0.2, 0.3, 0.5),
        "bits": ("int2", "hestia-binary", "hestia", "hestia-2bit"),
        "samples": of("samples", 5, 20, 50),
    }
    chosen = variants.values() if config.ablate == "all" else [variants[config.ablate]]
    return tuple(dict.fromkeys(["full", "absmean", *(method for methods in chosen for method in methods)]))


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says why and what would do."""


def first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments):
    """Command line -> Config: the preset's values, where nothing else is said."""
    description, _, rest = __doc__.partition("\n\n")
    parser = Parser(description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        values = f.metadata["presets"]
        shown = {k: " ".join(v) if isinstance(v, tuple) else v for k, v in values.items()}
        default = shown["cpu"] if len(set(shown.values())) == 1 else ", ".join(f"{k} {v}" for k, v in shown.items())
        help = f.metadata["help"].replace("%", "%%") + (f" [{default}]" if default != "" else "")
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.name == "preset":
            kind = {"choices": list(values)}
        elif f.name in CHOICES:
            kind = {"choices": CHOICES[f.name]}
        elif f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif f.type is tuple:
            kind = {"nargs": "+", "metavar": "NAME"}
            kind |= {"metavar": "RATE", "type": float} if f.name == "lrs" else {}
        parser.add_argument("--" + f.name.replace("_", "-"), default=None, help=help, **kind)
    given = {k: v for k, v in vars(parser.parse_args(arguments)).items() if v is not None}
    preset = given.get("preset", "paper" if given.get("llama") else "cpu")
    defaults = {f.name: f.metadata["presets"][preset] for f in dataclasses.fields(Config)}
    if given.get("llama"):  # a trained Llama is given: traces of all tensors at once, one run, memory first
        defaults |= {"sensitivity": "joint", "seeds": 1, "checkpointing": True}
    return Config(**{**defaults, "preset": preset, **given})


VARIED = {"alpha": float, "rho": float, "group_size": int, "samples": int, "scores": str}


def variant(config, name):
    """The configuration that a method such as "hestia:alpha=0.6,rho=0.3" has, and what becomes of its scores."""
    settings = dict(item.partition("=")[::2] for item in name.partition(":")[2].split(",") if item)
    try:
        values = {key: VARIED[key](value) for key, value in settings.items()}
    except (KeyError, ValueError):
        raise InputError(f"method {name}: expected settings such as alpha=0.6, of {', '.join(VARIED)}") from None
    scores = values.pop("scores", "")
    samples, size = values.get("samples", 2), values.get("group_size", 0)
    if scores not in ("", "shuffled", "common") or not (2 <= samples < 2**31 and size >= 0):
        raise InputError(f"method {name}: expected scores=shuffled or common, samples from 2, group_size from 0")
    row = plots.quantizer(name)
    idle = [key for key in settings if key in row.settings or (key != "group_size" and not row.soft)
            or (key == "samples" and config.sensitivity in ("gradnorm", "error"))]  # fmt: skip
    if idle:
        raise InputError(f"method {name}: {', '.join(idle)} changes nothing there")
    return dataclasses.replace(config, **values), scores


def changed_scores(scores, how, alpha, seed):
    """The scores themselves, shuffled among the tensors, or one common score: that whose temperature is the mean."""
    if not scores or not how:
        return scores
    if how == "shuffled":
        values = list(scores.values())
        random.Random(seed).shuffle(values)
        return dict(zip(scores, values))
    mean = sum(math.exp(alpha * s) for s in scores.values()) / len(scores)
    return dict.fromkeys(scores, math.log(mean) / alpha if alpha else 0.0)


def check(config):
    """Refuse what cannot work before anything is computed or written."""
    names = [name for given in config.methods for name in ([given] if ":" in given else given.split(",")) if name]
    config.methods = tuple(hestia.QUANTIZERS) if names == ["all"] else tuple(dict.fromkeys(names))
    if config.ablate:
        chosen = () if config.methods == Config.methods else config.methods
        config.methods = names = tuple(dict.fromkeys([*chosen, *ablation(config)]))
    unknown = [name for name in config.methods if name.partition(":")[0] not in hestia.QUANTIZERS]
    for name in (name for name in config.methods if ":" in name and not unknown):
        changed, _ = variant(config, name)
        if not (0 <= changed.rho <= 1 and abs(changed.alpha) <= 50):
            raise InputError(f"method {name}: expected rho from 0 to 1, and alpha from -50 to 50")
        if not config.llama:
            check_groups(changed, config.hidden, config.intermediate)
    if unknown or not names:
        raise InputError(f"unknown method {', '.join(unknown) or '(none)'}; expected {', '.join(hestia.QUANTIZERS)}")
    for f in dataclasses.fields(config):
        if f.type is int and getattr(config, f.name) >= 2**31:  # what torch takes for a size or a seed
            raise InputError(f"--{f.name.replace('_', '-')} is {getattr(config, f.name)}; expected less than {2**31}")
    for name in ("seeds", "steps", "pretrain_steps", "batch_size", "micro_batches", "block_size", "layers", "hidden",
                 "intermediate", "heads", "calibration", "jobs"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected at least 1")
    if config.samples < 2:
        raise InputError(f"--samples is {config.samples}; expected at least 2, for a standard error")
    config.lrs = tuple(dict.fromkeys(config.lrs))
    if not all(0 < lr < math.inf for lr in config.lrs):
        raise InputError(f"--lrs are {', '.join(map(str, config.lrs))}; expected positive numbers")
    if config.resume and not (config.out and (Path(config.out) / "config.json").exists()):
        raise InputError(f"--resume needs --out with the folder of an interrupted run, not {config.out or 'none'}")
    for name in ("lr", "pretrain_lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected a positive number")
    if config.block_size < 2:
        raise InputError(f"--block-size is {config.block_size}; expected at least 2, a token and the next one")
    for name in ("save_minutes", "weight_decay", "kappa", "tau_init", "group_size", "rank", "eval_tokens", "seed"):
        if not 0 <= getattr(config, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected 0 or more")
    if not 0 <= config.rho <= 1:
        raise InputError(f"--rho is {config.rho}; expected a share of the training between 0 and 1, such as 0.2")
    if not abs(config.alpha) <= 50:
        raise InputError(f"--alpha is {config.alpha}; expected a number between -50 and 50, such as 0.4")
    if config.batch_size % config.micro_batches:
        raise InputError(f"--batch-size {config.batch_size} does not split into {config.micro_batches} micro-batches")
    if config.llama and not config.data:
        raise InputError("--llama needs --data, a text file to train on")
    if config.val_data and not config.data:
        raise InputError("--val-data needs --data: the default text has its own held-out part")
    if config.jobs > 1 and "RANK" in os.environ:
        raise InputError("--jobs has processes of its own; expected one of --jobs and torchrun")
    if config.packed and not config.llama:
        raise InputError("--packed needs --llama: only its folders can be packed")
    other = [m for m in config.methods if plots.quantizer(m).settings.get("codebook", hestia.BINARY) == hestia.TWO_BIT
             or m in ("dlt", "fairy2i", "fairy2i-hestia")]  # fmt: skip
    if config.packed and other:
        raise InputError(f"--packed holds ternary weights, not those of {', '.join(other)}")
    if config.hidden % (2 * config.heads) or config.heads % 2:
        raise InputError(f"--hidden {config.hidden} does not split into {config.heads} heads; expected an even number "
                         "of heads, and of dimensions for each")  # fmt: skip
    if not config.llama:
        check_groups(config, config.hidden, config.intermediate)
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=config.device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {config.device} cannot be used: {first_line(error)}") from None
    return config


def check_groups(config, *widths):
    for width in widths:
        if config.group_size and width % config.group_size:
            fits = math.gcd(*widths)
            fits = next(g for g in range(min(fits, config.group_size), 0, -1) if fits % g == 0)
            raise InputError(f"--group-size {config.group_size} does not divide the model's width {width}; "
                             f"{fits} would")  # fmt: skip


def model_config(config):
    return hestia.LlamaConfig(
        vocab_size=256, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads // 2,
        rope_theta=10000.0,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# data: bytes of text, or tokens of a Llama's own tokenizer


def standard_library():
    """(train, validation) bytes of the standard library's source: files shuffled once, split 95 / 5."""
    skip = {"test", "tests", "idle_test", "encodings", "lib2to3", "site-packages"}
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if not skip.intersection(f.relative_to(root).parts[:-1]))
    random.Random(0).shuffle(files)
    texts = [f.read_bytes() for f in files]
    cut = round(0.95 * len(texts))
    return b"".join(texts[:cut]), b"".join(texts[cut:])


def read_text(option, path):
    """The bytes of a UTF-8 text file."""
    try:
        text = Path(path).read_bytes()
        text.decode("utf-8")
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {path} is not UTF-8 text (byte {error.start}); convert it first") from None
    return text


def load_text(config, tokenizer=None):
    """(train, validation, test or nothing) as tensors of tokens, and what to record about them."""
    held_out = None
    if config.data:
        train, source = read_text("--data", config.data), Path(config.data).name
        if config.val_data:
            held_out = read_text("--val-data", config.val_data)
            source += " and " + Path(config.val_data).name
    else:
        train, held_out = standard_library()
        source = f"standard library of Python {platform.python_version()}"
    test = read_text("--test-data", config.test_data) if config.test_data else b""
    facts = {"source": source, "sha256": hashlib.sha256(train + (held_out or b"")).hexdigest()}
    if tokenizer is None:
        as_tokens = lambda text: torch.from_numpy(np.frombuffer(bytearray(text), dtype=np.uint8))
    else:
        as_tokens = lambda text: tokenized(text, tokenizer, config)
    train = as_tokens(train)
    if held_out is None:
        cut = round(0.95 * len(train))
        train, val = train[:cut], train[cut:]
    else:
        val = as_tokens(held_out)
    unit = "bytes" if tokenizer is None else "tokens"
    shortest = round(0.025 * len(train)) if len(config.lrs) > 1 else len(train)  # a part is kept for choosing rates
    if min(shortest, len(val)) <= config.block_size + 1:
        raise InputError(f"{source} has {len(train)} {unit} to train on and {len(val)} held out; expected more than "
                         f"{config.block_size + 1} of each for blocks of {config.block_size}")  # fmt: skip
    facts |= {"unit": unit, f"train_{unit}": len(train), f"val_{unit}": len(val)}
    if config.test_data:
        facts |= {"test_sha256": hashlib.sha256(test).hexdigest(), "test_source": Path(config.test_data).name}
        test = as_tokens(test)
        facts[f"test_{unit}"] = len(test)
        if len(test) < 2:
            raise InputError(f"--test-data {config.test_data} has {len(test)} {unit}; expected at least 2")
    if tokenizer is None:
        train, val = train.to(config.device), val.to(config.device)
    return train, val, test, facts


def load_tokenizer(config):
    """The tokenizer beside a Llama's weights."""
    path = Path(config.llama) / "tokenizer.json"
    tokenizers = hestia._extra("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{path} is not a readable tokenizer: {error}") from None
    tokenizer.no_truncation()  # what is set there for a chat would cut a text, or fill it up
    tokenizer.no_padding()
    return tokenizer


def check_tokenizer(tokenizer, model, path):
    last = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if last >= model.config.vocab_size:
        raise InputError(f"{path} has a tokenizer with token {last} and the model has {model.config.vocab_size}; "
                         "expected the tokenizer that the model was trained with")  # fmt: skip


def tokenized(text, tokenizer, config):
    """Token ids of a text, int32, from a memory-mapped file that is written once per text and tokenizer.

    Long texts are cut before tokenizing: at a single line break between other characters, every 256 kB or so.
    """
    key = hashlib.sha256(tokenizer.to_str().encode() + b"\0" + text).hexdigest()[:24]
    path = (Path(config.out).parent if config.out else Path("out")) / "tokens" / f"{key}.npy"
    if not path.exists():
        line, cuts = re.compile(rb"(?<=\S)\n(?=\S)"), [0]
        while found := line.search(text, cuts[-1] + (1 << 18)):
            cuts.append(found.start() + 1)
        pieces = [text[a:b].decode("utf-8") for a, b in zip(cuts, [*cuts[1:], len(text)])]
        ids, began = [], time.perf_counter()
        for k in range(0, len(pieces), 8):
            encoded = tokenizer.encode_batch(pieces[k : k + 8], add_special_tokens=False)
            ids += [np.array(e.ids, dtype=np.int32) for e in encoded]
            done = min(len(pieces), k + 8) / len(pieces)
            left = (time.perf_counter() - began) * (1 - done) / done
            print(f"\r  tokenizing: {100 * done:.0f} %, {left:.0f} s left ", end="" if done < 1 else "\n", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as aside, open(aside, "wb") as file:
            np.save(file, np.concatenate(ids) if ids else np.zeros(0, np.int32))
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # "c": nothing is read before it is used, or written


def excerpt(tokens, config):
    """eval_tokens of a split, as blocks evenly spread over it."""
    blocks = tokens[: len(tokens) // config.block_size * config.block_size].view(-1, config.block_size)
    wanted = max(1, config.eval_tokens // config.block_size) if config.eval_tokens else len(blocks)
    return blocks[:: max(1, len(blocks) // wanted)][:wanted].flatten()


# ----------------------------------------------------------------------------------------------------------------------
# files: whole or not at all


@contextmanager
def whole(path):
    """Write beside `path`, then rename: the name never holds half a file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of its own, where several processes write
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def save_json(path, what):
    with whole(path) as aside:
        aside.write_text(json.dumps(what, indent=1) + "\n")


def fingerprint(what):
    """A hash of what JSON can hold; the same after it was written and read."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def save_checkpoint(path, model, quantized=()):
    """The model as a torch file of plain tensors: quantized weights in bfloat16 if that is exact, the rest as it is."""
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    tensors |= {name + ".weight": hestia._narrowest(tensors[name + ".weight"]) for name in quantized}
    with whole(path) as aside:
        torch.save({"config": dataclasses.asdict(model.config_now()), "model": tensors}, aside)


def load_checkpoint(path):
    """A Llama from a file that save_checkpoint wrote. Nothing in the file is executed (weights_only)."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = hestia.Llama(hestia.LlamaConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model


def check_out(config):
    folder = Path(config.out)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise InputError(f"--out {folder} cannot be used: {error.strerror}") from None
    if config.out and not config.resume and taken:
        raise InputError(f"--out {folder} already exists and is not an empty folder; name another, or remove it")


def run_folder(config):
    """A new folder for this run; one that already holds something is refused, unless it is to be resumed."""
    check_out(config)
    if config.resume:
        return Path(config.out)
    if config.out:
        folder = Path(config.out)
    else:
        stem = Path("out") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{config.preset}"
        folder = next(f for n in range(1000) if not (f := stem if n == 0 else Path(f"{stem}-{n}")).exists())
    try:
        folder.mkdir(parents=True, exist_ok=bool(config.out))  # of two runs in one second only one gets the name
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# measurements along a run

BINS = np.linspace(-3, 3, 121)  # of w / gamma


class Snapshots:
    """About 40 moments of a run. For the update of that one step: `dead`, the share of weights in the dead zone of
    Eq. (6), and `felt`, the share whose move changes the forward pass by at least 5 % of what it would in full
    precision. `hist`: histograms of w / gamma for three tensors. The gradient norms of the log."""

    def __init__(self, qat, log_every):
        names = list(qat.latents)
        self.watched = [names[0], names[len(names) // 2], names[-1]]
        self.qat, self.log_every, self.rows = qat, log_every, []
        self.codes_before_end = None  # those at nine tenths of the steps
        self.keep()

    def keep(self):
        self.before = {name: w.detach().clone() for name, w in self.qat.latents.items()}

    @torch.no_grad()
    def __call__(self, t, record):
        qat = self.qat
        if t + 1 == max(1, round(0.9 * qat.total_steps)):
            self.codes_before_end = qat.codes()
        if record is not None and (t % self.log_every == 0 or t + 1 == qat.total_steps):  # weights before it were kept
            dead, felt, total = [], [], 0  # counts stay on the device until the end: no wait for each tensor
            for name, old in self.before.items():
                s = qat.step_of(t, name)
                same = hestia.dead_zone(old, qat.latents[name] - old, s.group_size, s.codebook)
                J = torch.ones_like(old) if qat.method == "full" else 1.0 - same.float()  # STE: only a change of code
                if qat.quantizer.harden not in (hestia._hard_absmean, hestia.QUANTIZERS["full"].harden):
                    same, J = torch.full_like(old, math.nan), torch.full_like(old, math.nan)  # another grid: not asked
                elif qat.quantizer.soft:
                    J = (1 - s.p) + s.p * hestia.soft_quantize_jacobian(old, s.tau, s.group_size, s.codebook)
                dead.append(same.sum())
                felt.append((J >= 0.05).sum() + 0 * J.sum())
                total += old.numel()
            dead, felt = float(sum(dead)), float(sum(felt))
            hist = []
            for name in self.watched:
                w = qat.latents[name]
                size = qat.step_of(t, name).group_size
                z = (w.reshape(-1, size or w.numel()) / hestia.absmean_scale(w, size)).flatten()
                hist.append(torch.histc(z.clamp(-3, 3).float(), len(BINS) - 1, -3, 3).cpu().numpy() / z.numel())
            norms = {key: record[key] for key in ("grad_norm", "grad_norm_latent")}
            self.rows.append({"step": t, "dead": dead / total, "felt": felt / total, "hist": hist, **norms})
        if (t + 1) % self.log_every == 0 or t + 1 == qat.total_steps - 1:
            self.keep()

    def state(self):
        """All of it, in tensors and numbers, to be saved; `take` puts it back."""
        rows = [{**row, "hist": torch.from_numpy(np.array(row["hist"]))} for row in self.rows]
        return {"rows": rows, "before": self.before, "codes": self.codes_before_end}

    def take(self, state):
        device = next(iter(self.before.values())).device
        here = lambda tensors: tensors and {name: t.to(device) for name, t in tensors.items()}
        self.rows = [{**row, "hist": list(row["hist"].numpy())} for row in state["rows"]]
        self.before, self.codes_before_end = here(state["before"]), here(state["codes"])

    def changed_since(self):
        now = self.qat.codes()
        changed = sum(int((now[name] != old).sum()) for name, old in self.codes_before_end.items())
        return changed / sum(old.numel() for old in now.values())

    def arrays(self, prefix):
        return {f"{prefix}/{key}": np.array([row[key] for row in self.rows], dtype=np.float32) for key in self.rows[0]}


# ----------------------------------------------------------------------------------------------------------------------
# the experiment


class Reporter:
    """Prints the log lines of one run and writes them to its file in folder/runs/ as they come."""

    def __init__(self, study, name, seed):
        self.study, self.about = study, {"seed": seed, "method": name}
        self.file = open(study.runs / f"{file_name(name, seed)}.jsonl", "w")  # noqa: SIM115, closed at the run's end

    def write(self, r):
        self.file.write(json.dumps({**self.about, **r}) + "\n")
        self.file.flush()

    def line(self, r, total):
        self.write(r)
        if self.study.config.jobs > 1:  # lines of several runs would mix
            return
        text = f"  step {r['step']:5d}/{total}  loss {r['loss']:.4f}  lr {r['lr']:.1e}  grad {r['grad_norm']:.2f}"
        if "p" in r:
            text += f"  p {r['p']:.2f}  tau {r['tau_min']:.3f}-{r['tau_max']:.3f}"
        if "flips" in r:
            text += f"  flips {100 * r['flips']:.2f} %"
        if "val_loss_hard" in r:
            text += f"  val {r['val_loss_hard']:.4f}"
        left = f"  {r['seconds_left']:.0f} s left" if r["step"] else ""  # the first step may have compiled for a minute
        print(f"{text}  {r['tokens_per_s'] / 1e3:.1f} k tok/s{left}", flush=True)
        if self.study.steps_ahead and total / 10 < r["step"] < total - 1:
            minutes = r["seconds_left"] / (total - r["step"] - 1) * self.study.steps_ahead / 60
            print(f"  (all runs together: about {minutes:.0f} min)")
            self.study.steps_ahead = 0  # said once


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (SIGINT) or SIGTERM; its argument is the signal's number."""


class Signals:
    """What Ctrl-C and SIGTERM do: end the program, or, while a run trains, do so after the step, when its state is
    saved. A second one ends it at once."""

    training, asked, worker, working, before = False, None, False, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def ignored(self):
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)
        yield
        for number in self.before:
            signal.signal(number, self)

    def __call__(self, number, frame):
        if self.worker and not self.working:
            os._exit(128 + number)  # it has nothing to save, and the first process says what there is to say
        if not self.training or (self.asked and not self.worker):  # a worker hears of one Ctrl-C more than once
            self.asked = None
            raise Interrupted(number)
        self.asked = number
        if not self.worker:
            os.write(2, b"\nstopping after this step; once more to stop at once\n")


signals = Signals()


class Saved:
    """The state of one training on disk: folder/runs/NAME-last.pt, written aside, checked and renamed every
    --save-minutes and when the program is told to stop, and gone when the training is finished. NAME-best.pt: the
    weights (W, not rounded) whose hard loss on the validation text was lowest, if those at the end were not."""

    def __init__(self, study, name, seed):
        self.last = study.runs / f"{file_name(name, seed)}-last.pt"
        self.best = study.runs / f"{file_name(name, seed)}-best.pt"
        self.every, self.clock, self.loss = 60 * study.config.save_minutes, time.monotonic(), math.inf

    def read(self):
        """The newest state, or None."""
        if not self.last.exists():
            return None
        try:
            state = torch.load(self.last, map_location="cpu", weights_only=True)
            self.loss = state["best"]
            return state
        except Exception as error:  # whatever a damaged file may raise
            print(f"  note: {self.last} cannot be read ({first_line(error)}); this training starts anew")
            return None

    def write(self, path, state):
        with whole(path) as aside:
            torch.save(state, aside)
            try:
                with zipfile.ZipFile(aside) as written:
                    sound = written.testzip() is None  # its checksums
            except zipfile.BadZipFile:
                sound = False
            if not sound:
                raise OSError(f"{path} reads back differently from what was written; is the disk sound?")

    def __call__(self, t, state):
        """After each step: save if it is time, stop if that was asked for."""
        asked, due = signals.asked or 0, time.monotonic() - self.clock >= self.every
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several:  # all at the same step, which takes a message: every tenth
            if t % 10 < 9:
                return
            said = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(said, (asked, due))
            asked, due = max(a for a, _ in said), any(d for _, d in said)
        if asked or due:
            now = {**state(), "best": self.loss}  # of which every process has a share
            if not several or torch.distributed.get_rank() == 0:
                self.write(self.last, now)
            self.clock = time.monotonic()
        if asked:
            signals.asked = None
            raise Interrupted(asked)

    def offer(self, loss, weights, finished):
        """Keep weights() if no hard loss was lower; the end's own weights are kept elsewhere."""
        if not loss < self.loss:
            return
        self.loss = loss
        if finished:
            self.best.unlink(missing_ok=True)
        else:
            self.write(self.best, weights())


def train(study, model, seed, *, steps, lr, name, qat=None, val=None, loss_fn=None):
    """One run: hestia.train with this experiment's settings, about 40 log lines, and snapshots if it has latents.
    It goes on from its saved state, if there is one. Returns the snapshots, and the seconds of all its sessions."""
    config, log_every, reporter = study.config, max(1, steps // 40), Reporter(study, name, seed)
    snapshots, saved = Snapshots(qat, log_every) if qat else None, Saved(study, name, seed)
    plain = getattr(model, "_orig_mod", model)  # under torch.compile
    state = saved.read()
    if state:
        print(f"  {name} goes on from step {state['step']} of {steps}", flush=True)
        for record in state["log"]:
            reporter.write(record)
        if snapshots:
            snapshots.take(state["snapshots"])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        model = in_parallel(model, qat)

    def trained(t):
        """Copies of what is trained: the model's tensors, with the latents in the place of the effective weights."""
        latents = {name + ".weight": w for name, w in qat.latents.items()} if qat else {}
        copies = {}  # by address, so that a tied head is copied once
        for x in (tensors := {**plain.state_dict(), **latents}).values():
            if x.data_ptr() not in copies:
                copies[x.data_ptr()] = x.detach().to("cpu", copy=True)
        tensors = {name: copies[x.data_ptr()] for name, x in tensors.items()}
        return {"step": t, "config": dataclasses.asdict(plain.config_now()), "model": tensors}

    if state:  # so that what follows sees it; hestia.train does the same
        if qat:
            qat.load_state_dict(state["qat"])
        with torch.no_grad():
            for x, kept in zip(qat.rest if qat else model.parameters(), state["rest"]):
                x.copy_(kept)
    good, newest = trained(state["step"] if state else 0), None  # weights whose loss was finite; of a later log line
    norms = [record["grad_norm"] for record in state["log"]] if state else []

    def on_step(t, record):
        nonlocal good, newest
        if record is not None:
            good = newest or good  # this step's loss was finite, and came of the weights kept at an earlier one
            newest = trained(t + 1) if t % (5 * log_every) == 0 else None
            reporter.line(record, steps)
            usual = float(np.median(norms)) if len(norms) >= 5 else math.inf
            if record["grad_norm_max"] > 100 * usual:
                warn(f"{name}: a gradient norm of {record['grad_norm_max']:.3g} by step {t}, where {usual:.3g} is "
                     "usual: a spike in the data, or a learning rate too high")  # fmt: skip
            norms.append(record["grad_norm"])
            if "val_loss_hard" in record:
                saved.offer(record["val_loss_hard"], lambda: trained(t + 1), finished=t == steps - 1)
        if snapshots:
            snapshots(t, record)

    def save(t, state):
        saved(t, lambda: {**state(), "snapshots": snapshots and snapshots.state()})

    signals.training = True
    try:
        log = hestia.train(
            model, study.train_text, steps=steps, lr=lr, qat=qat, name=name,
            seed=2 * seed + (qat is not None),  # other batches than in the training before it
            batch_size=config.batch_size, block_size=config.block_size, micro_batches=config.micro_batches,
            weight_decay=config.weight_decay, clip=config.clip, clip_at=config.clip_at, log_every=log_every,
            val=val, eval_every=-(-steps // 5), on_step=on_step, loss_fn=loss_fn, save=save, state=state,
            shard_optimizer=config.shard,
        )  # fmt: skip
    except hestia.Diverged as error:
        path = study.folder / f"last-good-{file_name(name, seed)}.pt"
        with whole(path) as aside:
            torch.save(good, aside)
        saved.last.unlink(missing_ok=True)  # it would only diverge again
        raise hestia.Diverged(f"{error}; the weights of step {good['step']} are in {path}") from None
    finally:
        signals.training = False
        reporter.file.close()
    if qat:
        check_hardness(study, name, qat)
    return snapshots, log[-1]["seconds"]


class Trouble(UserWarning):
    """A training that may have gone wrong; an error with --strict."""


def warn(message):
    warnings.warn(message, Trouble, stacklevel=2)


@torch.no_grad()
def check_hardness(study, name, qat):
    """At the end of a training: do the hard weights do what the soft ones did?"""
    if qat.quantizer.harden is None or qat.biases:
        return
    qat.relax(qat.total_steps - 1)
    soft = {tensor: w.detach().clone() for tensor, w in qat.weights.items()}
    hard, _ = qat._hard_weights()
    away = {tensor: float((soft[tensor].float() - w).norm() / w.norm().clamp_min(1e-30)) for tensor, w in hard.items()}
    far = max(away, key=away.get)
    if qat.quantizer.soft and away[far] > 0.1:
        warn(f"{name}: tau has not reached hard at the end: the last soft weights of {far} are {100 * away[far]:.0f} % "
             "away from the ternary ones; train for more steps, or with a smaller rho")  # fmt: skip
    text = study.samples["val"][: 4 * study.config.block_size]
    loss = lambda: hestia.evaluate(qat.model, text, study.config.block_size)
    before, costs = loss(), {}
    with qat.hard():
        gap = loss() - before
    if gap > 0.05:  # which tensor is it? harden one at a time
        for tensor, weight in qat.weights.items():
            weight.data = hard[tensor].to(weight.dtype)
            costs[tensor] = loss() - before
            weight.data = soft[tensor]
        worst = max(costs, key=costs.get)
        warn(f"{name}: the hard weights lose {gap:.3f} nats against the last soft ones, {worst} alone "
             f"{costs[worst]:.3f}: it hardened too early, or not at all")  # fmt: skip


def sensitivities(config, model, tokens, seed, folder):
    """What --sensitivity asks for, at the full-precision weights and on calibration text of the training split.

    Returns an entry of sensitivities.json, {"settings", "seconds", "tensors"}, and its key. If this run, or one in a
    folder beside it, has found it before for the same weights, text and settings, it is taken from there.
    """
    length = min(config.block_size, 512) if config.llama else config.block_size
    sequences = max(config.calibration, -(-512 // length))
    ids, targets = (t.to(config.device) for t in hestia.batch_at(tokens, 0, sequences, length, seed=10_000 + seed))
    # equal parts, so that the mean over them is the mean; one sequence for a large model, whose graph fills the memory
    size = 1 if config.llama else max(n for n in range(1, 17) if sequences % n == 0)
    batches = list(zip(ids.split(size), targets.split(size)))
    params = hestia.Hestia(model, 1, method="full", group_size=None).weights

    settings = {"sensitivity": config.sensitivity, "rank": config.rank, "samples": config.samples, "seed": seed,
                "group_size": config.group_size if config.sensitivity == "error" else None, "batch": size,
                "device": torch.device(config.device).type, "model": dataclasses.asdict(model.config)}  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in {**model.state_dict(), "ids": ids, "targets": targets}.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    key = digest.hexdigest()
    for other in (folder, *sorted(folder.resolve().parent.glob("*"), reverse=True)):
        entry = read_sensitivities(other).get(key)
        if entry and entry["tensors"].keys() == params.keys():
            print(f"  taken from {other.name}/sensitivities.json: the same weights, text and settings", flush=True)
            break
    else:
        clock = time.perf_counter()
        found = measure_sensitivities(config, model, batches, params, seed)
        found = {name: h._asdict() if isinstance(h, tuple) else {"value": h} for name, h in found.items()}
        entry = {"settings": settings, "seconds": time.perf_counter() - clock, "tensors": found}
    return key, entry


def as_estimate(h):
    """An entry of sensitivities.json, without its score, as hestia.py gave it."""
    value = {k: v for k, v in h.items() if k != "score"}
    return hestia.TraceEstimate(**value) if len(value) > 1 else float(h["value"])


def read_sensitivities(folder):
    """{key: entry} of a run's sensitivities.json; {} if there is none, or none that makes sense."""
    try:
        known = json.loads((folder / "sensitivities.json").read_text())
        for entry in known.values():
            list(map(as_estimate, [*entry["tensors"].values(), {"value": entry["seconds"]}]))
        return known
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def measure_sensitivities(config, model, batches, params, seed):
    began, shown = time.perf_counter(), 0.0

    def progress(done, total):
        nonlocal shown
        clock = time.perf_counter()
        if done == total or (config.jobs == 1 and clock - shown > 0.5):
            left, shown = (clock - began) / done * (total - done), clock
            print(f"\r  {done}/{total} products, {left:.0f} s left ", end="" if done < total else "\n", flush=True)

    if config.sensitivity == "error":  # the relative error of rounding to ternary
        rounded = {name: hestia.quantize(w.detach(), config.group_size or None) for name, w in params.items()}
        return {name: float((w.detach() - rounded[name]).norm() / w.detach().norm()) for name, w in params.items()}
    if config.sensitivity == "gradnorm":
        grads = [torch.autograd.grad(model(*batch), list(params.values())) for batch in batches]
        return {name: float(sum(parts).norm()) / len(batches) for name, parts in zip(params, zip(*grads))}
    settings = {"generator": torch.Generator().manual_seed(seed), "progress": progress, "samples": config.samples}
    if config.sensitivity == "fisher":
        return hestia.fisher_traces(lambda batch: model(batch[0]), params, batches, **settings)
    loss_fn = lambda batch: model(*batch)
    return hestia.hessian_traces(loss_fn, params, batches, config.sensitivity, config.rank, **settings)


def describe_sensitivities(found):
    """One line: the extremes, and how many values mean nothing."""
    value = {name: getattr(h, "value", h) for name, h in found.items()}
    error = {name: f" ± {h.stderr:.1g}" if isinstance(h, hestia.TraceEstimate) else "" for name, h in found.items()}
    low, high = min(value, key=value.get), max(value, key=value.get)
    lost = [name for name, h in found.items() if getattr(h, "flagged", False)]
    print(f"  from {value[low]:.3g}{error[low]} ({low}) to {value[high]:.3g}{error[high]} ({high})"
          + (f"; {len(lost)} of {len(found)} within two standard errors of zero" if lost else ""), flush=True)


def restore(model, weights):
    """Give the model these weights as new float32 parameters, whatever dtype or biases a method gave it."""
    device = next(model.parameters()).device
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.bias" not in weights:
            module.bias = None
    model.load_state_dict({name: t.clone().to(device) for name, t in weights.items()}, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # the tie, which assigning has cut


class Study:
    """A run's folder, with its text and its model. Everything that is finished has a file of its own in folder/runs/:
    --resume goes on from there, and several processes can share the work."""

    def __init__(self, config):
        self.config, self.pool = config, None
        self.tokenizer = load_tokenizer(config) if config.llama else None
        self.start = self.model = None
        if config.llama:
            self.model = hestia.load_llama(config.llama, torch.float32)  # on the CPU, where the first weights stay
            self.model.checkpointing = config.checkpointing
            self.start = {name: t.detach() for name, t in self.model.state_dict().items()}

    def read(self):
        """The text. The model, and the excerpts on which losses are measured, go where they will be used."""
        config = self.config
        self.train_text, self.val_text, test, self.facts = load_text(config, self.tokenizer)
        parts = {"train": self.train_text, "val": self.val_text}
        if len(config.lrs) > 1:  # the end of the text is kept for choosing rates
            self.train_text, parts["tuning"] = self.train_text.tensor_split([round(0.975 * len(self.train_text))])
            parts["train"] = self.train_text
        self.model = self.model or hestia.Llama(model_config(config))
        if config.jobs > 1 and not signals.worker:
            return  # the other processes have it
        self.model = self.model.to(config.device)
        self.samples = {k: excerpt(text, config).to(config.device) for k, text in parts.items()}
        if config.test_data:
            self.samples["test"] = test.to(config.device)
        self.steps_ahead = 0  # of all that is left to train, until the estimate has been said

    def open(self, folder):
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir(exist_ok=True)

    def losses(self, tuning=False):
        """Nats per token of the model as it is: {split: loss}."""
        splits = [k for k in self.samples if (k == "tuning") == tuning]
        return {k: hestia.evaluate(self.model, self.samples[k], self.config.block_size) for k in splits}

    def known(self, name, seed):
        """What is kept of a finished run; None if it is not finished."""
        path = self.runs / f"{file_name(name, seed)}.json"
        if not path.exists():
            return None
        try:
            entry = json.loads(path.read_text())
            if not isinstance(entry, dict) or entry.pop("sha256", None) != fingerprint(entry):
                raise ValueError("it is not what a run left there")
            return entry
        except (OSError, ValueError) as error:
            raise InputError(f"--resume: {path} cannot be read ({error}); remove it to run that again") from None

    def keep(self, name, seed, entry, arrays=None):
        """A run is finished: what it measured along the way, then its row, whose file says that all is there."""
        if arrays:
            with whole(self.runs / f"{file_name(name, seed)}.npz") as aside, open(aside, "wb") as file:
                np.savez_compressed(file, **arrays)
        save_json(self.runs / f"{file_name(name, seed)}.json", {**entry, "sha256": fingerprint(entry)})
        for done in (name, *(["pretrain"] if name == "start" else [])):
            (self.runs / f"{file_name(done, seed)}-last.pt").unlink(missing_ok=True)

    def gather(self, runs):
        """log.jsonl and snapshots.npz of the whole study, from those of its (name, seed) runs, in that order."""
        logs = [self.runs / f"{file_name(*run)}.jsonl" for run in runs]
        with whole(self.folder / "log.jsonl") as aside:
            aside.write_text("".join(path.read_text() for path in logs if path.exists()))
        arrays = {"bins": BINS}
        for path in (log.with_suffix(".npz") for log in logs):
            if path.exists():
                try:
                    with np.load(path) as saved:
                        arrays |= dict(saved)
                except (ValueError, EOFError, zipfile.BadZipFile) as error:
                    raise InputError(f"{path} cannot be read ({error}); remove it and the .json beside it") from None
        with whole(self.folder / "snapshots.npz") as aside, open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)


def file_name(name, seed):
    """Of a run, in folder/runs/ and for its checkpoint.

    >>> file_name("hestia:alpha=0.6", 0)
    'hestia-alpha-0.6-seed0'
    """
    return re.sub("[:=, ]+", "-", name) + f"-seed{seed}"


_study = None  # of this process, where several share the work; or why there is none


@contextmanager
def processes(study):
    """The processes among which for_each shares the work, as study.pool; none with --jobs 1."""
    if study.config.jobs == 1:
        yield
        return
    context = multiprocessing.get_context("spawn")
    about = study.config, study.folder, context.Value("i", 0)
    with ProcessPoolExecutor(study.config.jobs, context, _begin_work, about) as study.pool:
        try:
            yield
        except BaseException:
            children = multiprocessing.active_children()
            try:
                for child in children:
                    child.terminate()  # after its step, when it has saved its state
                print("  waiting for the other processes to save what they have", flush=True)
                study.pool.shutdown(wait=True, cancel_futures=True)
            except KeyboardInterrupt:
                for child in children:
                    child.kill()
            raise


def for_each(study, function, tasks):
    """function(study, *task) for every task. In --jobs processes an error is raised when all others are done."""
    if study.pool is None:
        for task in tasks:
            function(study, *task)
        return
    size = -(-len(tasks) // study.config.jobs) or 1  # neighbours have the same method, which is compiled once in each
    with signals.ignored():  # by processes that are starting, which would say much and save nothing
        parts = [study.pool.submit(_work, function, tasks[k : k + size]) for k in range(0, len(tasks), size)]
    began, done, failed = time.perf_counter(), 0, []
    for part in as_completed(parts):
        errors = part.result()
        failed += [error for error in errors if error]
        done += len(errors)
        left = (time.perf_counter() - began) / done * (len(tasks) - done)
        print(f"  ({done} of {len(tasks)} ended, about {left / 60:.0f} min left)", flush=True)
    for error in failed[:-1]:
        print(f"  {error}", flush=True)
    if failed:
        raise failed[-1]


def _begin_work(config, folder, counter):
    """In a process of its own: what `run` has set up in the first one."""
    global _study
    signals.worker = True
    signals.__enter__()
    leave = lambda: (multiprocessing.parent_process().join(), os.kill(os.getpid(), signal.SIGTERM))
    threading.Thread(target=leave, daemon=True).start()  # when the first process was killed
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if config.device == "cuda":
        config.device = f"cuda:{number % torch.cuda.device_count()}"
        torch.cuda.set_device(config.device)
    torch.set_num_threads(max(1, torch.get_num_threads() // config.jobs))
    settle(config)
    try:
        _study = Study(config)
        _study.read()
        _study.open(folder)
    except (RuntimeError, ValueError, OSError) as error:
        _study = error


def _work(function, tasks):
    """The error, or None, of each task."""
    errors, signals.working = [], True
    for task in tasks:
        try:
            if isinstance(_study, Exception):
                raise _study
            function(_study, *task)
            errors.append(None)
        except (RuntimeError, ValueError, OSError) as error:
            errors.append(error)
        except Interrupted as error:  # its state is saved; more work may be queued for this process
            os._exit(128 + error.args[0])
    signals.working = False
    return errors


def scores_needed(config):
    """The numbers of samples for which the methods need sensitivities: --samples, and those of variants."""
    guided = [m for m in config.methods if plots.quantizer(m).soft and "alpha" not in plots.quantizer(m).settings]
    return list(dict.fromkeys(variant(config, m)[0].samples for m in guided))


def prepare(study, seed):
    """What all methods of a seed share: full-precision weights in a file, their losses, and the sensitivities, in
    runs/start-seedN.json."""
    config, model = study.config, study.model
    begin = lambda what: print(f"[seed {seed}] {what}", flush=True)
    torch.manual_seed(seed)
    seconds = 0.0
    if study.start:
        begin(f"full precision: as it is in {config.llama}")
        restore(model, study.start)
    elif (path := study.folder / f"pretrained-seed{seed}.pt").exists():
        restore(model, read_pretrained(path))
        log = (study.runs / f"{file_name('pretrain', seed)}.jsonl").read_text().splitlines()
        seconds = json.loads(log[-1])["seconds"]
    else:
        restore(model, hestia.Llama(model.config).state_dict())
        size = sum(p.numel() for p in model.parameters())
        begin(f"full precision: {size:,} parameters, {config.pretrain_steps} steps")
        fast = torch.compile(model) if config.compile else model
        _, seconds = train(study, fast, seed, steps=config.pretrain_steps, lr=config.pretrain_lr, name="pretrain")
        save_checkpoint(path, model)
    entry = {"before": {"seconds": seconds, **study.losses()}}
    begin("full precision: " + ", ".join(f"{k} {entry['before'][k]:.4f}" for k in ("train", "val")))
    with hestia.Hestia(model, 1, method="absmean", group_size=config.group_size or None).hard():
        entry["untrained"] = study.losses()
    entry["sensitivities"] = {
        str(samples): guidance(dataclasses.replace(config, samples=samples), seed, study, begin)
        for samples in scores_needed(config)
    }
    study.keep("start", seed, entry)


def guidance(config, seed, study, begin):
    """The sensitivities at the weights that the model has, with the scores, as sensitivities.json has them."""
    what = {"hutchpp": f"Hessian traces by Hutch++, {2 * config.rank + config.samples} products per tensor",
            "joint": f"Hessian traces, {2 * config.rank + config.samples} products for all tensors together",
            "fisher": f"traces of the Fisher matrix, {config.samples} backward passes",
            "gradnorm": "norms of the gradient", "error": "relative errors of rounding to ternary"}  # fmt: skip
    begin(f"sensitivities: {what[config.sensitivity]}")
    key, entry = sensitivities(config, study.model, study.train_text, seed, study.folder)
    found = {name: as_estimate(h) for name, h in entry["tensors"].items()}
    describe_sensitivities(found)
    scores = hestia.sensitivity_scores(found, config.kappa)
    if config.kappa and max(scores.values()) - min(scores.values()) < 0.02:
        warn("the sensitivity scores are all alike, so they guide nothing: the traces were not told apart; more "
             "--calibration sequences or --samples")  # fmt: skip
    tensors = {name: {**h, "score": scores[name]} for name, h in entry["tensors"].items()}
    return {"key": key, **entry, "tensors": tensors}


def read_pretrained(path):
    try:
        return load_checkpoint(path).state_dict()
    except Exception as error:  # whatever a damaged file may raise
        why = first_line(error)
        raise InputError(f"{path} cannot be read ({why}); start anew with another --out") from None


def starting_point(study, seed):
    """The weights that every method of a seed starts from, and what runs/start-seedN.json says."""
    weights = study.start
    if not weights:
        weights = read_pretrained(study.folder / f"pretrained-seed{seed}.pt")
    return weights, study.known("start", seed)


def run_method(study, seed, method, lr, name=None):
    """One method from a seed's weights: trained, hardened, evaluated, written and kept. name: of a choice of rate."""
    row, plain, model, fixed = {"lr": lr}, study.config, study.model, plots.quantizer(method).settings
    weights, start = starting_point(study, seed)
    config, how = variant(plain, method)
    if plain.jobs == 1:
        which = "choosing a rate" if name else f"{plain.methods.index(method) + 1}/{len(plain.methods)}"
        rate = f" at {lr:g}" if name else ""
        print(f"[seed {seed}] {which}: {plots.quantizer(method).label}, {config.steps} steps{rate}", flush=True)
    tensors = start["sensitivities"].get(str(config.samples), {"tensors": {}})["tensors"]
    scores = {tensor: h["score"] for tensor, h in tensors.items()} or None
    scores = changed_scores(scores, how, config.alpha, seed)
    torch.manual_seed(seed)
    fast, loss_fn, cuda = torch.compile(model) if config.compile else model, None, config.device.startswith("cuda")
    restore(model, weights)
    if config.distill or "distill" in fixed:
        loss_fn = hestia.distillation(copy.deepcopy(model).requires_grad_(False))
    if "scratch" in fixed:
        restore(model, hestia.Llama(model.config).state_dict())
    if cuda:
        torch.cuda.reset_peak_memory_stats(config.device)
    qat = hestia.Hestia(
        model, config.steps, method=method.partition(":")[0], group_size=config.group_size or None, rho=config.rho,
        alpha=config.alpha, tau_init=config.tau_init or None, scores=scores,
        dtype=torch.bfloat16 if cuda else None, compile=config.compile,
    )  # fmt: skip
    val = None if name else study.samples["val"][: 16 * config.block_size]
    try:
        watched, seconds = train(study, fast, seed, steps=config.steps, lr=lr, name=name or method, qat=qat, val=val,
                                 loss_fn=loss_fn)  # fmt: skip
    except hestia.Diverged as error:
        if not name:
            raise
        print(f"  {error}", flush=True)
        return study.keep(name, seed, {**row, "tuning": None})
    qat.harden()
    row |= {"seconds": seconds, "tau_init": qat.tau_init}
    row |= study.losses(tuning=bool(name))
    if cuda:
        row["gpu_GiB"] = torch.cuda.max_memory_allocated(config.device) / 2**30
    if method != "full":
        row |= {"changed_last_tenth": watched.changed_since(), "on_grid": on_grid(qat), "bits": bits_per_weight(qat)}
    arrays = watched.arrays(f"{method}/seed{seed}") | {f"{method}/tensors": np.array(watched.watched)}
    names = [] if method == "full" else list(qat.weights)
    del qat, watched, loss_fn  # the memory of the method, before the model is read once more
    if config.compile:
        gc.collect()  # a compiled method refers to itself
    for path in () if name else export(config, model, study.folder / file_name(method, seed), names):
        again = hestia.evaluate(reload(config, path), study.samples["val"], config.block_size)
        if again != row["val"]:
            raise RuntimeError(f"{path} reads back to a loss of {again}, not {row['val']}; it is wrong")
    study.keep(name or method, seed, row, None if name else arrays)
    if plain.jobs > 1:
        found = ", ".join(f"{k} {row[k]:.4f}" for k in ("tuning", "train", "val", "test") if k in row)
        print(f"[seed {seed}] {name or method}: {found} after {row['seconds']:.0f} s", flush=True)


def rate_name(method, lr):
    return f"{method} at {lr}"  # in full: rates that differ a little are two


def chosen_rates(study, tuning):
    """{method: the best of --lrs}, by the loss of the hard weights on the end of the training text, which no run here
    trains on, and with a seed that is not reported. tuning: {method: {rate: that loss, or None if it diverged}}."""
    config = study.config
    if len(config.lrs) < 2:
        return dict.fromkeys(config.methods, (config.lrs or (config.lr,))[0])
    loss = lambda m, lr: math.inf if tuning[m][str(lr)] is None else tuning[m][str(lr)]
    best = {m: min(config.lrs, key=lambda lr, m=m: loss(m, lr)) for m in tuning}
    hopeless = [m for m, lr in best.items() if loss(m, lr) == math.inf]
    if hopeless:
        raise InputError(f"--lrs: {', '.join(hopeless)} diverged at every rate; expected smaller ones")
    edge = lambda lr: " (at the edge of --lrs)" if lr in (min(config.lrs), max(config.lrs)) else ""
    print("learning rates: " + ", ".join(f"{m} {lr:g}{edge(lr)}" for m, lr in best.items()), flush=True)
    return {m: best[m.partition(":")[0]] for m in config.methods}


def run_all(study):
    """Everything of a study that is not finished. Returns {method: {rate: loss}} of the choice of rates."""
    config = study.config
    seeds, tuning_seed = range(config.seed, config.seed + config.seeds), config.seed + 1000
    plain = dict.fromkeys(m.partition(":")[0] for m in config.methods)  # a variant has the rate of what it varies
    tried = [(tuning_seed, m, lr, rate_name(m, lr)) for m in plain for lr in config.lrs if len(config.lrs) > 1]
    started = [*seeds, *([tuning_seed] if tried else [])]
    order = [("pretrain", seed) for seed in started] + [(name, seed) for seed, *_, name in tried]
    order += [(method, seed) for seed in seeds for method in config.methods]
    missing = [(seed,) for seed in started if not study.known("start", seed)]
    untried = [task for task in tried if not study.known(task[-1], tuning_seed)]
    if config.jobs == 1:  # for the estimate of the time
        left = len(untried) + sum(not study.known(m, seed) for seed in seeds for m in config.methods)
        study.steps_ahead = left * config.steps + (0 if study.start else len(missing) * config.pretrain_steps)
    try:
        with processes(study):
            for_each(study, prepare, missing)
            found = [s for seed in started for s in study.known("start", seed)["sensitivities"].values()]
            if found:
                save_json(study.folder / "sensitivities.json", {s.pop("key"): s for s in found})
            for_each(study, run_method, untried)
            tuning = {}
            for _, method, lr, name in tried:
                tuning.setdefault(method, {})[str(lr)] = study.known(name, tuning_seed)["tuning"]
            rates = chosen_rates(study, tuning)
            # one process goes seed by seed; several take a method's seeds together, since it must be compiled in each
            tasks = [(seed, m, rates[m]) for seed in seeds for m in config.methods if not study.known(m, seed)]
            for_each(study, run_method, tasks if config.jobs == 1 else sorted(tasks, key=lambda task: task[1]))
    finally:
        study.gather(order)
    return tuning


def export(config, model, path, quantized):
    """Write the hardened model; yields what was written: a torch file, or the folders that other software loads."""
    if not config.llama:
        save_checkpoint(file := path.with_name(path.name + ".pt"), model, quantized)
        yield file
    elif quantized:
        packed = path.with_name(path.name + "-packed")
        for left in (path, packed) if config.resume else ():  # of a run that ended before it had compared them
            shutil.rmtree(left, ignore_errors=True)
        hestia.save_llama(model, path)
        yield path
        if config.packed:
            hestia.save_llama(model, packed, packed=True, group_size=config.group_size or None)
            yield packed


def reload(config, path):
    if path.is_dir():
        return hestia.load_llama(path, torch.float32, config.device)
    return load_checkpoint(path).to(config.device)


def expected_memory(config, model):
    """One line: what a run on this model will need at its peak, from its sizes, before the device holds anything."""
    cuda, c = config.device.startswith("cuda"), model.config
    target = hestia._is_target(model)
    n = sum(module.weight.numel() for name, module in model.named_modules() if target(name, module))
    rest = sum(p.numel() for p in model.parameters()) - n
    narrow = 2 if cuda else 4  # bytes of an effective weight and of its gradient
    # what a method's graph keeps of each weight from relax to pull_back, in bytes, where it was measured
    world = int(os.environ.get("WORLD_SIZE", 1))  # processes under torchrun
    graph = max(0 if plots.quantizer(m).relax in hestia.SLOPES else 52 if m == "fairy2i-hestia" else 20
                for m in config.methods)  # fmt: skip
    adam = 8 / world if config.shard else 8
    weights = n * (4 + adam + 4 + 4 + 4 + graph) + n * 2 * narrow + (8 + adam) * rest  # latents, gradients, codes, last
    tokens = config.batch_size // config.micro_batches // world * config.block_size
    layer = tokens * narrow * (8 * c.hidden_size + 5 * c.intermediate_size)
    kept = tokens * narrow * c.hidden_size * c.num_hidden_layers + layer if config.checkpointing else (
        layer * c.num_hidden_layers)  # fmt: skip
    logits = 2 * 2 * tokens * c.vocab_size if cuda and config.compile else 3 * 4 * min(1 << 24, tokens * c.vocab_size)
    gib = (weights + kept + logits) / 2**30
    have = torch.cuda.get_device_properties(config.device).total_memory / 2**30 if cuda else math.inf
    if gib > have:
        raise InputError(f"this run would take about {gib:.0f} GiB and the GPU has {have:.0f}; more --micro-batches, a "
                         "smaller --batch-size or --checkpointing would need less")  # fmt: skip
    return f"this run will take about {gib:.1f} GiB" + (f" of the GPU's {have:.0f} GiB" if cuda else " of memory")


def bits_per_weight(qat):
    """What a weight takes: its code, and its share of 16-bit scales, shifts and biases."""
    total = 0.0
    for name, w in qat.latents.items():
        groups = w.numel() / (qat.step_of(0, name).group_size or w.numel())
        if qat.method.startswith("fairy2i"):  # two stages, each one of four units for two real numbers; 8 scales
            total += 2 * w.numel() + 16 * 8
        else:
            shifts, biases = groups * ("shift" in qat.own[name]), len(w) * bool(qat.biases)
            total += math.log2(len(qat.codebook)) * w.numel() + 16 * (groups + shifts + biases)
    return total / sum(w.numel() for w in qat.latents.values())


def on_grid(qat):
    """Share of the quantized weights that lie in {codes} * gamma of their group. 1 after harden(). For methods with
    other levels: in groups that hold no more values than there are codes; None for sums of codes (Fairy2i)."""
    good = 0
    if qat.method.startswith("fairy2i"):
        return None
    for name, weight in qat.weights.items():
        size = qat.step_of(0, name).group_size
        w = weight.detach().float().reshape(-1, size or weight.numel())  # (n_groups, g)
        if qat.quantizer.harden is None:
            values = w.sort(1).values
            good += int(((values[:, 1:] != values[:, :-1]).sum(1) < len(qat.codebook)).sum()) * w.shape[1]
            continue
        unit = max(qat.codebook)
        gamma = w.abs().amax(1, keepdim=True) / unit
        near = hestia.quantize(w, group_size=w.shape[1], codebook=qat.codebook, scale=gamma.clamp_min(1e-30))
        good += int((near == w).sum())
    return good / sum(w.numel() for w in qat.weights.values())


# ----------------------------------------------------------------------------------------------------------------------
# results


def summarize(config, per_seed):
    """{row: {column: [mean, standard deviation over seeds or None]}}, with the gap recovered computed seed by seed."""
    for rows in per_seed:
        for split in ("train", "val"):
            if "absmean" in rows and "full" in rows:
                ste, full = rows["absmean"][split], rows["full"][split]
                for row in rows.values():
                    row[f"gap_{split}"] = (ste - row[split]) / (ste - full) if ste > full else None  # else no gap
    table = {}
    for row in per_seed[0]:
        table[row] = {}
        for column in per_seed[0][row]:
            values = [rows[row][column] for rows in per_seed]
            if None not in values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                table[row][column] = [float(np.mean(values)), spread]
    return table


def print_columns(head, rows):
    """A table whose lines are Markdown's too. Columns that say nothing are left out."""
    kept = [i for i, cells in enumerate(zip(*rows)) if i == 0 or any(cells)]
    lines = [head, *rows] = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = (t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths)))
        print("| " + " | ".join(cells) + " |")
        if line is head:
            print("|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|")


def print_table(config, table):
    """Hard weights' losses of every row of {row: {column: [mean, spread]}}, and what each method took."""
    labels = {"before": "full precision, before", "untrained": "ternarized, not trained"}
    splits = [split for split in ("train", "val", "test") if split in table["before"]]
    name = {"train": "train", "val": "validation", "test": "test"}

    def cell(row, column, digits, scale=1.0, spread=True, unit=""):
        mean, deviation = table[row].get(column, (None, None))
        if mean is None:
            return ""
        several = spread and config.seeds > 1 and deviation is not None
        return f"{scale * mean:.{digits}f}" + (f" ± {scale * deviation:.{digits}f}" if several else "") + unit

    head = ["", *(name[s] for s in splits), *(f"gap recovered, {name[s]}" for s in ("train", "val"))]
    head += ["changed in last tenth", "bits per weight", *["learning rate"] * (len(config.lrs) > 1), "seconds"]
    head += [f"perplexity, {name[s]}" for s in splits[1:]] if config.llama else []
    rows = []
    for row in table:
        label = labels.get(row) or plots.quantizer(row).label + (", continued" if row == "full" else "")
        line = [label, *(cell(row, split, 4) for split in splits)]
        line += ["" if row in labels else cell(row, f"gap_{s}", 0, 100, unit=" %") for s in ("train", "val")]
        line += [cell(row, "changed_last_tenth", 2, 100, unit=" %"), cell(row, "bits", 2, spread=False)]
        line += [f"{table[row]['lr'][0]:g}" if "lr" in table[row] else ""] * (len(config.lrs) > 1)
        line += [cell(row, "seconds", 0)]
        line += [f"{math.exp(min(99.0, table[row][s][0])):.2f}" for s in splits[1:]] if config.llama else []
        rows.append(line)
    print_columns(head, rows)
    extra = {m: plots.quantizer(m) for m in table if m not in labels and plots.quantizer(m).extra}
    if extra:
        print("\nInference also needs: " + "; ".join(f"{q.extra} ({q.label})" for q in extra.values()) + ".")


T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, two-sided, for 1 to 10 degrees


def t_95(degrees):
    """Beyond ten degrees 1.96 + 2.4 / degrees + 3 / degrees^2, which is good to 0.01.

    >>> [round(t_95(d), 2) for d in (4, 11, 30)]
    [2.78, 2.2, 2.04]
    """
    return T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.4 / degrees + 3 / degrees**2


def paired(per_seed, method, other, split):
    """(mean, half width of its 95 % interval, standard deviation) of method minus other, seed by seed: the batches are
    shared, so their noise cancels.

    >>> rows = [{"a": {"val": 1.0 + d}, "b": {"val": 2.0}} for d in (0.1, 0.2, 0.3)]
    >>> [round(x, 3) for x in paired(rows, "a", "b", "val")]
    [-0.8, 0.248, 0.1]
    """
    gaps = [rows[method][split] - rows[other][split] for rows in per_seed]
    spread = float(np.std(gaps, ddof=1))
    half = t_95(len(gaps) - 1) * spread / len(gaps) ** 0.5
    return float(np.mean(gaps)), half, spread


def print_paired(config, per_seed):
    """Each method minus AbsMean STE and minus HESTIA, seed by seed; in brackets where the interval holds zero."""
    others = [other for other in ("absmean", "hestia") if other in per_seed[0]]
    methods = [m for m in config.methods if m != "full"]
    if len(per_seed) < 2 or not others or len(methods) < 2:
        return
    head, rows = ["difference, seed by seed, ± 95 %"], []
    head += [f"{s} − {plots.quantizer(other).label}" for other in others for s in ("train", "validation")]
    for method in methods:
        line = [plots.quantizer(method).label]
        for other in others:
            for split in ("train", "val"):
                mean, half, _ = paired(per_seed, method, other, split)
                text = f"{mean:+.4f} ± {half:.4f}"
                line.append("" if method == other else text if abs(mean) > half else f"({text})")
        rows.append(line)
    print_columns(head, rows)
    print("\nIn brackets where the interval holds zero: no difference was seen.")


def show(path):
    """The tables of a results.json, as the run printed them, or the one of a bench.json."""
    try:
        results = json.loads(Path(path).read_text())
        if isinstance(results, list):
            return print_bench(results)
        fields = {f.name for f in dataclasses.fields(Config)}
        config = Config(**{k: v for k, v in results["config"].items() if k in fields})
        print_table(config, summarize(config, results["per_seed"]))
        print()
        print_paired(config, results["per_seed"])
    except BrokenPipeError:  # who reads the output has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for what Python itself still writes at its end
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--show {path}: not the results.json of a finished run, nor a bench.json ({error})") from None


def write_something(config, model, seed, tokenizer=None, prompt=None):
    """A few lines by the ternary model: after a line break, or after the first tokens of the held-out text."""
    start = torch.tensor([list(b"\n")]) if prompt is None else prompt[None].long()
    generator = torch.Generator().manual_seed(seed)
    ids = hestia.generate(model, start.to(config.device), 240 if tokenizer is None else 60, config.block_size,
                          generator=generator)[0].tolist()  # fmt: skip
    text = tokenizer.decode(ids) if tokenizer else bytes(ids).decode("utf-8", errors="replace").strip("\n")
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def settle(config):
    """What holds for a whole process."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a model writes may not fit the terminal's encoding
    torch.set_flush_denormal(True)  # gradients fade as tau falls; denormal numbers would slow the last steps down
    warnings.showwarning = lambda message, *_: print(f"  note: {message}", flush=True)
    warnings.filterwarnings("error" if config.strict else "always", category=Trouble)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what is not in bf16: the Hessian products
    if config.compile:  # every method is another graph, and torch would stop compiling one piece of code after eight
        from torch._dynamo import config as dynamo  # loads much, so only here

        dynamo.recompile_limit, dynamo.accumulated_recompile_limit = 1000, 10000


def run(config):
    """The whole experiment. Returns the run's folder."""
    check(config)
    settle(config)
    check_out(config)
    if config.llama:  # refuse what can be refused before the weights are read
        for name in ("data", "val_data", "test_data"):
            if path := getattr(config, name):
                read_text("--" + name.replace("_", "-"), path)
    study = Study(config)
    if config.llama:
        c = study.model.config
        for method in config.methods:
            widths = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
            check_groups(variant(config, method)[0], *widths)
        check_tokenizer(study.tokenizer, study.model, config.llama)
        print(expected_memory(config, study.model), flush=True)
    study.read()
    facts = study.facts
    passing = ("resume", "jobs", "show", "strict", "save_minutes", "shard")  # they change nothing of the result
    about = {"config": {k: v for k, v in dataclasses.asdict(config).items() if k not in passing}, "data": facts}
    sessions = same_as_before(config, about) if config.resume else []
    folder = run_folder(config)
    for left in (*folder.glob("*.tmp"), *folder.glob("runs/*.tmp")):  # by a process that was killed while it wrote
        left.unlink()
    began = time.perf_counter()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    cuda = config.device.startswith("cuda")
    hardware = torch.cuda.get_device_name(config.device) if cuda else platform.processor() or "cpu"
    about |= {"versions": versions, "commit": commit(),
              "hardware": {"device": hardware, "threads": torch.get_num_threads(), "jobs": config.jobs}}  # fmt: skip
    sessions.append({key: about[key] for key in ("versions", "commit", "hardware")})
    if sessions[0] != sessions[-1]:
        print("  note: this session's versions, commit or hardware differ from the first one's; results.json has both")
    save_json(folder / "config.json", {**about, "sessions": sessions})
    study.open(folder)
    unit = facts["unit"]
    size = f"{facts[f'train_{unit}']:,} + {facts[f'val_{unit}']:,} {unit}"
    print(f"{facts['source']}: {size}, sha256 {facts['sha256'][:12]}")
    print(f"this run's folder: {folder}/")
    steps = config.steps + (0 if config.llama else config.pretrain_steps)
    passes = steps * config.batch_size * config.block_size / len(study.train_text)
    print(f"{steps} steps read the text {passes:.2f} times"
          + ("; expect overfitting, and bring more text with --data" if passes > 3 else ""))  # fmt: skip

    tuning = run_all(study)
    seeds = range(config.seed, config.seed + config.seeds)
    starts = {seed: study.known("start", seed) for seed in seeds}
    first = lambda seed: {row: starts[seed][row] for row in ("before", "untrained")}
    per_seed = [{**first(seed), **{m: study.known(m, seed) for m in config.methods}} for seed in seeds]
    table = summarize(config, per_seed)
    nothing = {"seconds": 0.0, "tensors": {}}
    gpu = [row["gpu_GiB"] for rows in per_seed for row in rows.values() if "gpu_GiB" in row]
    save_json(folder / "results.json", {
        **about, "sessions": sessions, "table": table, "per_seed": per_seed,
        "sensitivities": [s["sensitivities"].get(str(config.samples), nothing) for s in starts.values()],
        "tuning": tuning, "seconds_of_last_session": time.perf_counter() - began, "gpu_GiB": max(gpu, default=None),
    })  # fmt: skip
    with whole(folder / "overview.png") as aside:
        plots.overview(folder).savefig(aside, format="png", dpi=150)

    spread = ", mean ± standard deviation over seeds" if config.seeds > 1 else ""
    print(f"\nHard weights, nats per {facts['unit'][:-1]}{spread}:\n")
    print_table(config, table)
    print()
    print_paired(config, per_seed)
    quantized = [m for m in config.methods if m != "full"]
    if quantized:
        last = "hestia" if "hestia" in quantized else quantized[-1]
        path = folder / (file_name(last, config.seed) + ("" if config.llama else ".pt"))
        prompt = study.val_text[:16] if config.llama else None
        text = write_something(config, reload(config, path), config.seed, study.tokenizer, prompt)
        grid = [rows[last]["on_grid"] for rows in per_seed]
        if None not in grid:
            print(f"{100 * min(grid):g} % of {plots.quantizer(last).label}'s weights lie on their group's grid.")
        print(f"What {path} writes:\n\n{text}\n")
    if gpu:
        print(f"At most {max(gpu):.1f} GiB of GPU memory were in use.")
    print(f"Everything is in {folder}/ after {(time.perf_counter() - began) / 60:.1f} minutes.")
    return folder


def same_as_before(config, about):
    """The sessions that an interrupted run had; refuses to go on with other settings or another text."""
    path = Path(config.out) / "config.json"
    try:
        before = json.loads(path.read_text())
        was, text, sessions = {**before["config"], "out": config.out}, before["data"], [*before["sessions"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"--resume: {path} cannot be read ({error}); start anew with another --out") from None
    now = json.loads(json.dumps(about))
    changed = [key for key in now["config"] if now["config"][key] != was.get(key)]
    changed += [] if now["data"] == text else ["the text"]
    if changed:
        raise InputError(f"--resume: {', '.join(changed)} differ from the run in {config.out}; expected the same")
    return sessions


def commit():
    """The commit of this code, if it is a clone; "+" where files differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True,
                                        text=True, check=True).stdout.strip()  # fmt: skip
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# data parallel: torchrun starts this script once per GPU; all do the same, and share every training batch


@contextmanager
def together(cuda, **options):
    """Join the other processes, and leave them when all have come here. What holds the group must be gone by then: a
    thread of gloo that is still there when the interpreter ends may abort it."""
    import torch.distributed.optim  # later it is needed, and imported after the next line it would keep the group

    torch.distributed.init_process_group("nccl" if cuda else "gloo", **options)
    try:
        yield
        torch.distributed.barrier()  # none leaves while another still listens to it
    finally:
        gc.collect()  # the wrapped models, which hold the group, if they are in a cycle
        torch.distributed.destroy_process_group()


@contextmanager
def one_of_several(config):
    """Under torchrun: join the other processes. All but the first are silent and write to a folder that is removed."""
    if "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available() and not config.device.startswith("cpu")
    if cuda:
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.device)
    screen, patience = sys.stdout, datetime.timedelta(hours=12)  # one may tokenize a long text while the others wait
    with (tempfile.TemporaryDirectory() as aside, open(os.devnull, "w") as nowhere,
          together(cuda, timeout=patience)):  # fmt: skip
        if torch.distributed.get_rank():
            if config.resume and (Path(config.out) / "runs").is_dir():
                shutil.copytree(Path(config.out) / "runs", Path(aside) / "run" / "runs")
                for path in (*Path(config.out).glob("*.json"), *Path(config.out).glob("pretrained-*")):
                    shutil.copy(path, Path(aside) / "run")
            config.out, sys.stdout = str(Path(aside) / "run"), nowhere
        torch.distributed.barrier()  # the first process changes nothing before all have copied what it has
        try:
            yield
        finally:
            sys.stdout = screen


def in_parallel(model, qat):
    """The model wrapped in DDP; the first process's scores and temperature for all, as estimates differ by rounding."""
    if qat:
        settings = [qat.tau_init, qat.scores]
        torch.distributed.broadcast_object_list(settings)
        qat.tau_init, qat.scores = settings
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


# ----------------------------------------------------------------------------------------------------------------------
# section 5.5 as a command: what a step costs, every mode in processes of its own, which take turns

MODES = {"full": "full precision, narrow copy once per step", "absmean": "AbsMean STE", "hestia": "HESTIA",
         "naive": "HESTIA, softmax in every forward", "plain": "float32 weights, autocast on a GPU",
         "passes": "relax and pull_back alone", "products": "matrix products alone"}  # fmt: skip
WARM_UP = 6  # steps that are not timed: five at first, and the last, which is logged
SHAPES = {"1b": {}, "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}}


def bench_options(arguments):
    cuda = torch.cuda.is_available()
    parser = Parser(prog="train_tiny.py --bench", description="Section 5.5: what a training step costs.")
    for name, default, help in (
        ("llama", "", "1b or 3b (random weights), or a folder; default: the tiny model"),
        ("modes", list(MODES), "of " + ", ".join(MODES)), ("micro", 8 if cuda else 32, "sequences per micro-batch"),
        ("accumulate", [1, 4], "micro-batches per step and process"), ("group-size", 128 if cuda else 64, "per scale"),
        ("block-size", 1024 if cuda else 128, "tokens per sequence"), ("rounds", 3, "how often the modes take turns"),
        ("steps", 20 if cuda else 8, "steps that are timed, after five others"), ("gpus", 1, "that share every batch"),
        ("tau", 0.3, "HESTIA's temperature at first; 0.001 shows what the last steps of a training cost"),
        ("shard", False, "with --gpus: AdamW's state in shares"), ("checkpointing", False, "of activations, by layer"),
        ("compile", cuda, "torch.compile"), ("out", "bench.json", "results are added to those that are there"),
        ("worker", "", argparse.SUPPRESS),
    ):  # fmt: skip
        several, flag = isinstance(default, list), isinstance(default, bool)
        kind = {"type": type(default[0] if several else default), "nargs": "+" if several else None}
        kind = {"action": argparse.BooleanOptionalAction} if flag else kind
        parser.add_argument("--" + name, default=default, help=help, **kind)
    return parser.parse_args(arguments)


def bench(arguments):
    """Runs every mode `rounds` times; --out gets what each measured, the screen a table of all that is there."""
    args, failed = bench_options(arguments), 0
    if args.worker:
        return bench_worker(args)
    if unknown := set(args.modes) - set(MODES):
        raise InputError(f"--modes: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(MODES)}")
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and not 0 < number < math.inf:
                raise InputError(f"--{name.replace('_', '-')} is {number}; expected a number above 0")
    rows = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else []
    first = 1 + max((row["round"] for row in rows), default=-1)
    for turn in range(first, first + args.rounds):
        for mode in args.modes:
            many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus}"] * (args.gpus > 1)
            command = [sys.executable, *many, __file__, *arguments, "--bench", "--worker", mode]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("result ")]
            print(f"round {turn}, {mode}:", *(f"{row['ms']:.2f} ms" for row in found), flush=True)
            if done.returncode:
                failed, said = 1, done.stderr.splitlines()
                why = next((line for line in said if "Error:" in line or "Signal" in line), "".join(said[-1:]))
                print(f"train_tiny.py: {mode} failed: {why}", file=sys.stderr, flush=True)
            rows += [{"round": turn, **row} for row in found]
            save_json(Path(args.out), rows)
    print_bench(rows)
    return failed


def print_bench(rows):
    """Medians over the rounds [least, largest]; a ratio compares two runs of one round."""
    spread = lambda x, form: f" [{min(x):{form}}, {max(x):{form}}]" if len(x) > 1 else ""
    cell = lambda x, form: f"{np.median(x):{form}}{spread(x, form)}" if x else "-"
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        full, ours = ({row["round"]: row["ms"] for row in here if row["mode"] == mode} for mode in ("full", "hestia"))
        print(f"\n{setting}\n\n| | ms | over full precision | tokens/s | model TFLOP/s | of the matrix rate | of the "
              "copy rate | GiB |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for mode in dict.fromkeys(row["mode"] for row in here):
            of = lambda key, mode=mode, here=here: [row[key] for row in here if row["mode"] == mode and key in row]
            ratio = [r["ms"] / full[r["round"]] for r in here if r["mode"] == mode and r["round"] in full]
            cells = [cell(of(key), form) for key, form in (("tokens_per_s", ".0f"), ("tflops", ".4g"),
                     ("of_matrix_rate", ".1%"), ("of_copy_rate", ".1%"), ("GiB", ".2f"))]  # fmt: skip
            print("|", " | ".join([MODES.get(mode, mode), cell(of("ms"), ".2f"), cell(ratio, ".3f"), *cells]), "|")
        ratios = {mode: [ours[r["round"]] / r["ms"] for r in here if r["mode"] == mode and r["round"] in ours]
                  for mode in dict.fromkeys(row["mode"] for row in here if row["mode"] != "hestia")}  # fmt: skip
        if any(ratios.values()):
            over = [f"{cell(ratio, '.3f')} times {MODES.get(mode, mode)}" for mode, ratio in ratios.items() if ratio]
            print("\nHESTIA's step takes " + "; ".join(over))


def clock(device):
    """Now, on the device's own clock, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a, b):
    """Milliseconds from one clock() to another."""
    if isinstance(a, float):
        return 1e3 * (b - a)
    b.synchronize()
    return a.elapsed_time(b)


def timed(device, *works, repeat=13):
    """Median milliseconds of each work, done in turns; the first three turns are left out."""
    turns = []
    for _ in range(repeat):
        turns.append([clock(device)])
        for work in works:
            work()
            turns[-1].append(clock(device))
    return [float(np.median([between(t[k], t[k + 1]) for t in turns[3:]])) for k in range(len(works))]


def ceilings(device, square):
    """TFLOP/s of a product of matrices like `square`, and GB/s of a copy, read and written bytes together."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    product, copying = timed(device, lambda: square @ square.T, lambda: target.copy_(source))
    return 2e-9 * len(square) ** 3 / product, 8e-6 * len(source) / copying


def softmax_per_forward(w, p, tau, q, group_size):
    """Eqs. (7)-(9) as printed, by a softmax over a stacked codebook."""
    gamma = hestia.absmean_scale(w, group_size)  # (n_groups, 1)
    z = (w.view(-1, group_size) / gamma).unsqueeze(-1)  # (n_groups, g, 1)
    pi = torch.softmax(-((z - q) ** 2) / tau, -1)  # (n_groups, g, 3)
    return (1 - p) * w + p * (gamma * (pi * q).sum(-1)).view_as(w)


class NaiveLinear(torch.nn.Linear):
    def forward(self, x):
        w = softmax_per_forward(self.weight, self.now[0], self.now[1], self.now[2:], self.group_size)
        return torch.nn.functional.linear(x, w)


def bench_passes(qat, device, square, now, copy_rate):
    """relax and pull_back alone: W and the gradient read once, what they give written once, over time; and autograd
    through a softmax over a stacked codebook, in eager mode."""
    weights, latents = list(qat.weights.values()), list(qat.latents.values())
    grads = [torch.randn_like(w) for w in weights]

    queue = 20 if device.type == "cuda" else 0  # of products: the host is ahead of a GPU then, as it is in training
    ahead = lambda: [square @ square for _ in range(queue)]
    def give(to, grads):
        for w, grad in zip(to, grads):
            w.grad = grad

    def stacked():
        for w, grad in zip(latents, grads):
            softmax_per_forward(w, now[0], now[1], now[2:], qat.group_size).to(grad.dtype).backward(grad)

    _, relax, _, pull = timed(device, ahead, lambda: qat.relax(1), lambda: give(weights, grads), qat.pull_back)
    _, naive = timed(device, lambda: give(latents, [None] * len(latents)), stacked, repeat=6)
    n, narrow = sum(w.numel() for w in latents), weights[0].element_size()
    share = lambda size, ms: {"ms": ms, "of_copy_rate": 1e-6 * n * size / ms / copy_rate}
    return [{"mode": "relax alone", **share(4 + narrow, relax)}, {"mode": "pull_back alone", **share(8 + narrow, pull)},
            {"mode": "both by a stacked softmax, eager", **share(12 + 2 * narrow, naive)}]  # fmt: skip


def bench_products(qat, device):
    """A batch times the largest W, and a gradient times it, with W as it is and as the methods show it. At its power
    limit a GPU multiplies faster what takes less power."""
    w, dtype = max((w.detach() for w in qat.latents.values()), key=torch.numel), next(iter(qat.weights.values())).dtype
    soft = lambda tau: hestia.soft_quantize(w, tau, qat.group_size)
    shown = {"W": w, "H(W; 0.3)": soft(0.3), "H(W; 0.05)": soft(0.05), "Q(W)": hestia.quantize(w, qat.group_size)}
    tokens, pairs = (8192, 300) if device.type == "cuda" else (256, 1)
    x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (w.shape[1], w.shape[0]))

    def multiply(v):
        for _ in range(pairs):
            x @ v.T, dy @ v

    works = [functools.partial(multiply, v.to(dtype)) for v in shown.values()]
    works = [work for work in works for _ in range(2)]  # twice each: the first time, the power settles
    each = [ms / pairs for ms in timed(device, *works, repeat=9)[1::2]]
    return [{"mode": f"products with {name}", "ms": ms, "tflops": 4e-9 * tokens * w.numel() / ms}
            for name, ms in zip(shown, each)]  # fmt: skip


def bench_worker(args):
    """One mode in this process: prints a line "result {...}" for every accumulation. Random weights and tokens."""
    cuda, mode, rank = torch.cuda.is_available(), args.worker, int(os.environ.get("RANK", 0))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.cuda.set_device(device) if cuda else torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) if cuda else torch.randn(1024, 1024)
    matrix_rate, copy_rate = ceilings(device, square)
    if args.llama and args.llama not in SHAPES:
        model = hestia.load_llama(args.llama, torch.float32, device)
    else:
        with device:
            model = hestia.Llama(hestia.LlamaConfig(**SHAPES[args.llama]) if args.llama else model_config(parse([])))
    model.checkpointing, c, is_target = args.checkpointing, model.config, hestia._is_target(model)
    linears = [module for name, module in model.named_modules() if is_target(name, module)]
    flops = 6 * sum(m.weight.numel() for m in (*linears, model.lm_head))
    flops += 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * args.block_size  # causal attention
    steps, qat = args.steps + WARM_UP, None
    now = torch.tensor([0.5, 0.3, *hestia.TERNARY], device=device)  # p, tau and the codes
    if mode == "naive":
        for module in linears:
            module.__class__, module.now, module.group_size = NaiveLinear, now, args.group_size
    elif mode != "plain":
        method, narrow = mode if mode in hestia.QUANTIZERS else "hestia", torch.bfloat16 if cuda else None
        qat = hestia.Hestia(model, steps, method=method, group_size=args.group_size, tau_init=args.tau,
                            dtype=narrow, compile=args.compile)  # fmt: skip
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    setting = (f"{args.gpus} x {name}, torch {torch.__version__}, {args.llama or 'tiny'}{', compiled' * args.compile}"
               f"{', checkpointing' * args.checkpointing}{', shards' * args.shard}"
               f"{f', tau {args.tau:g}' * (args.tau != 0.3)}")  # fmt: skip
    about = {"mode": mode, "setting": setting, "matrix_tflops": matrix_rate, "copy_gb_per_s": copy_rate}
    if mode in ("passes", "products"):
        alone = bench_passes(qat, device, square, now, copy_rate) if mode == "passes" else bench_products(qat, device)
        for row in alone if rank == 0 else ():
            print("result " + json.dumps({**about, **row}))
        return 0
    fast = torch.compile(model) if args.compile else model
    tokens = torch.randint(c.vocab_size, (1 << 20,), dtype=torch.int32)  # on the host, where a long text would be
    with together(cuda) if args.gpus > 1 else nullcontext():
        bench_steps(args, in_parallel(fast, qat) if args.gpus > 1 else fast, qat, tokens, now, flops, about)
    return 0


def bench_steps(args, model, qat, tokens, now, flops, about):
    """Train for some steps, once for every accumulation, and print what one took. flops: of the model, for a token."""
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    device, cuda, steps = now.device, now.is_cuda, args.steps + WARM_UP
    for accumulate in args.accumulate:
        marks, peak = [], 0.0

        def on_step(t, record, marks=marks):
            nonlocal peak
            marks.append(clock(device))
            p, tau = hestia.pressure(t, steps, 0.2), hestia.temperature(t, steps, 0.2, args.tau, 0.0, 0.0)
            now[:2].copy_(torch.tensor([p, tau]), non_blocking=True)
            if cuda and t == 4:
                torch.cuda.reset_peak_memory_stats()
            if t == steps - 2:
                peak = (torch.cuda.max_memory_allocated() if cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss) / 2**30

        batch = args.micro * accumulate * args.gpus
        hestia.train(
            model, tokens, steps=steps, batch_size=batch, block_size=args.block_size, lr=1e-4, qat=qat,
            on_step=on_step, micro_batches=accumulate, log_every=steps, shard_optimizer=args.shard,
        )  # fmt: skip
        laps = [between(a, b) for a, b in zip(marks[4:-1], marks[5:-1])]
        ms = float(np.median(laps))
        rate = 1e3 * batch * args.block_size / ms
        setting = f"{about['setting']}, {args.micro} x {args.block_size} tokens x {accumulate}"
        row = {**about, "setting": setting, "ms": ms, "laps": laps, "tokens_per_s": rate, "GiB": peak,
               "tflops": 1e-12 * rate * flops,
               "of_matrix_rate": 1e-12 * rate * flops / args.gpus / about["matrix_tflops"]}  # fmt: skip
        if int(os.environ.get("RANK", 0)) == 0:
            print("result " + json.dumps(row), flush=True)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with signals, warnings.catch_warnings():
            if "--bench" in arguments:
                return bench([word for word in arguments if word != "--bench"])
            config = parse(arguments)
            if config.show:
                show(config.show)
                return 0
            with one_of_several(config):
                run(config)
    except Trouble as error:
        print(f"train_tiny.py: {error} (an error because of --strict)", file=sys.stderr)
        return 1
    except (ValueError, ImportError) as error:  # bad input, found by us or by hestia.py; a missing package
        print(f"train_tiny.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ArithmeticError, MemoryError) as error:
        print(f"train_tiny.py: the run failed: {str(error) or 'out of memory'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        more = "; the same command with --out and the folder's name and --resume goes on where it was"
        print("\ntrain_tiny.py: interrupted" + more * ("--bench" not in arguments), file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
