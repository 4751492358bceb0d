"""What single options of train_tiny.py need: refusals, a Llama in and out, a run to go on with."""

import copy
import dataclasses
import functools
import importlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import hestia
import train_tiny
from notebooks.lab import checkpoints, texts

SENSITIVITIES = "hutchpp", "joint", "fisher", "gradnorm", "error"


def check(config):
    """ValueError, one sentence, for what does not exist or lacks another option."""
    if config.sensitivity not in SENSITIVITIES:
        raise ValueError(f"--sensitivity is {config.sensitivity!r}; expected one of "
                         f"{', '.join(SENSITIVITIES)}")
    for option in ("llama", "val_data"):
        if getattr(config, option) and not config.data:
            raise ValueError(f"--{option.replace('_', '-')} needs --data, a text to train on")
    if config.batch_size % config.micro_batches:
        raise ValueError(f"--batch-size {config.batch_size} is no multiple of --micro-batches "
                         f"{config.micro_batches}; expected equal parts")
    if config.heads % 2 and not config.llama:
        raise ValueError(f"--heads is {config.heads}; expected an even number, since half as many "
                         "are key-value heads")
    for option in ("packed", "gguf"):
        if getattr(config, option) and not config.llama:
            raise ValueError(f"--{option} needs --llama; expected the folder of a Llama to start "
                             "from")
    try:
        torch.zeros(1, device=config.device or "cpu").item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device {config.device} cannot be used: {why}") from None
    for name in config.methods if config.packed or config.gguf else ():
        if name != "full":
            check_packed(config, name)
    if config.llama:
        source = load_once(config.llama)  # now, not after a long text was tokenized
        if config.gguf:
            importlib.import_module("notebooks.lab.gguf_file")  # or say what to install
        for name, layer in hestia.linear_layers(source).items() if config.gguf else ():
            size = config.group_size or layer.weight.shape[1]
            if size % 64:
                raise ValueError(f"--gguf has no type for groups of {size} weights ({name}); "
                                 "expected --group-size 256 (x86) or another multiple of 64")


def check_packed(config, name):
    """ValueError unless this method leaves what --packed and --gguf can write."""
    width = config.group_size or 8
    small = hestia.Llama(hestia.LlamaConfig(
        vocab_size=2, hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=2 * width))
    settings = dataclasses.replace(config, device="cpu", distill=0.0, compile=False, tau_init=0.3)
    qat, _ = train_tiny.make(settings, name, small, None)
    qat.harden()
    for layer in qat.layers.values():
        try:
            checkpoints.pack_ternary(layer.weight.detach().float(), config.group_size or None)
        except ValueError:
            layer.bias = layer.weight  # as those that add a bias
        if layer.bias is not None:
            option = "packed" if config.packed else "gguf"
            raise ValueError(f"--{option} cannot hold what {name} leaves; leave out one of them")


@functools.lru_cache(1)
def load_once(folder):
    with checkpoints.one_sentence(Path(folder)):
        checkpoints.check_folder(Path(folder))
        return hestia.load_llama(folder, torch.float32)


def llama(config):
    """A copy of the Llama in config.llama, which is read once for all seeds and methods."""
    model = copy.deepcopy(load_once(config.llama)).to(config.device)
    return texts.begin(model, texts.first_token(config.llama) if config.bos else None)


def save(config, name, model, path, entry, tokens):
    """The trained Llama as a folder, and what else was asked for. Returns {split: loss} of it.

    What bfloat16 held in the source (embedding, norms) is rounded to it first, so that the losses
    are those of the folder. entry: what the methods of a seed share.
    """
    packed, file = (path.with_name(path.name + ending) for ending in ("-packed", ".gguf"))
    for left in (path, packed):
        if left.exists():  # an interrupted run got so far
            shutil.rmtree(left)
    file.unlink(missing_ok=True)
    round_rest(model, load_once(config.llama))
    losses = train_tiny.losses(config, model, tokens)
    text = card(config, name, path, entry["before"], losses)
    hestia.save_llama(model, path)
    checkpoints.add_papers(path, config.llama, text)
    if config.packed and name != "full":
        checkpoints.save_packed(model, packed, config.group_size or None)
        checkpoints.add_papers(packed, config.llama, text)
    if config.gguf and name != "full":
        from notebooks.lab import gguf_file

        kind, why = gguf_file.save_gguf(model, file, folder=path)
        print(f"{file} is {kind}: {why}", flush=True)
    return losses


@torch.no_grad()
def round_rest(model, source):
    """Round to bfloat16 what is no linear weight, and what bfloat16 held in the source."""
    before = dict(source.named_parameters())
    linear = {f"{name}.weight" for name in hestia.linear_layers(model)}
    for name, p in model.named_parameters():  # without a tied head
        w = before[name]
        if name not in linear and torch.equal(w.bfloat16().to(w.dtype), w):
            p.copy_(p.bfloat16())


def card(config, name, path, before, after):
    """README.md of a folder, for whoever finds it: front matter, method, settings and losses."""
    source = Path(config.llama).resolve()
    hub = re.search(r"models--([^/]+)--([^/]+)/snapshots", source.as_posix())
    base, licence = "/".join(hub.groups()) if hub else source.name, ""
    if (source / "README.md").is_file():  # only its owner can say the licence
        front = (source / "README.md").read_text("utf-8", errors="replace").split("\n---")[0]
        licence = "".join(re.findall(r"^license.*\n", front + "\n", re.M))
    about = checkpoints.read_json(path.parent / "config.json")["data"]
    share = f"{config.group_size} weights" if config.group_size else "matrix"
    weights = "in full precision"
    if name != "full":
        weights = f"quantized, one scale per {share}, stored dequantized"
    settings = {"method": name, "linear weights": weights, "text": Path(about["source"]).name,
                "its SHA-256": about["sha256"], "seed": path.name.rpartition("-seed")[2]}
    settings |= {key: getattr(config, key) for key in (
        "steps", "lr", "batch_size", "block_size", "rho", "alpha", "kappa", "sensitivity",
        "distill")}
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in settings.items()]
    losses = [f"| {split} | {before[split]:.4f} | {after[split]:.4f} |" for split in after]
    return "\n".join([
        "---", f"base_model: {json.dumps(base)}", f"{licence}library_name: transformers",
        "tags: [ternary, quantization-aware-training, hestia]", "---", "", f"# {base}, {name}", "",
        "Trained by train_tiny.py of HESTIA (arXiv 2601.20745) from the base model.", "",
        "| | |", "|---|---|", *rows, "",
        f"Loss in nats per {about['unit']}:", "", "| text | before | after |", "|---|---|---|",
        *losses, ""])


def check_resume(config, about):
    """ValueError unless config.out holds a run with these settings and this text, all readable."""
    if not config.out:
        raise ValueError("--resume needs --out; expected the folder of the interrupted run")
    folder, now = Path(config.out), json.loads(json.dumps(about))
    try:
        then = checkpoints.read_json(folder / "config.json")
        settings, text = dict(then["config"]), then["data"]["sha256"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"--resume: {folder} has no readable config.json; expected the folder of "
                         "an interrupted run") from None
    for name, value in now["config"].items():
        if settings.get(name) != value:
            raise ValueError(f"--resume: --{name.replace('_', '-')} was {settings.get(name)} in "
                             f"{folder} and is {value} now; give the same settings")
    if text != now["data"]["sha256"]:
        raise ValueError(f"--resume: the text is not the one of {folder}; give the same")
    if then.get("process") != os.getpid() and is_run(then.get("process")):
        raise ValueError(f"process {then['process']}, which began it, is at work in {folder}; wait "
                         "for its end, or name another --out")
    own(folder)
    readers = {".json": read_kept, ".npz": read_npz, ".pt": read_model}
    for path in sorted([*folder.glob("runs/*"), *folder.glob("*.pt")]):
        if path.suffix in readers and not path.name.startswith("half-"):  # as plots.write has
            try:
                checkpoints.check_file(path)
                is_row = readers[path.suffix](path)
            except Exception:  # whatever a damaged file may raise
                raise ValueError(f"{path} is damaged; remove what bears its name and seed, in "
                                 f"{folder} and in its runs/, to have it made anew") from None
            beside = [path.with_suffix(".npz"), folder / f"{path.stem}.pt"] if is_row else []
            for other in beside[: 1 if config.llama else 2]:
                if not other.exists():
                    raise ValueError(f"{other} is gone; remove {path} to have both made anew")


def is_run(process):
    """Whether a process of this number is a run. Only Linux tells."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"train_tiny" in command or b"notebooks.lab.study" in command


HELD = []  # the descriptor of the folder that this process owns


def own(folder):
    """Keep other runs out of a folder while this process lives. ValueError: one is in it."""
    while HELD:
        os.close(HELD.pop())
    try:
        import fcntl
    except ImportError:  # Windows has other locks
        return
    HELD.append(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(HELD[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is at work in {folder}; wait for its end, or name another "
                         "--out") from None
    except OSError:  # a file system without locks
        pass


def read_kept(path):
    """Whether it is a finished row, and not the pretraining, a seed's start or a study's try.

    An exception says that the file is not as train_tiny.py left it.
    """
    kept = json.loads(path.read_text(encoding="utf-8"), parse_constant=int)  # int refuses NaN
    if "-at-" in path.name:
        if kept is not None:
            check_numbers({"loss": kept})
        return False
    if path.name.startswith("start-"):
        check_numbers(kept["before"], "train")  # a study's seed for trying rates has no "val"
        check_numbers(kept["untrained"], "train")
        for trace in kept["sensitivities"]["tensors"].values():
            check_numbers({**trace, "flagged": 0}, "value", "stderr", "score")
        return False
    for record in [*kept["log"]]:
        check_numbers(record, "step", "loss", "grad_norm", "seconds")
    if path.name.startswith("pretrain-"):
        return False
    check_numbers(kept["row"], "seconds", "train", "val")
    return bool(kept["log"][-1])


def check_numbers(found, *keys):
    if not found.keys() >= {*keys} or any(type(x) is bool or not math.isfinite(x)
                                          for x in found.values()):
        raise ValueError("a number is missing")


def read_npz(path):
    with np.load(path) as arrays:  # it looks at checksums
        found = dict(arrays)
    for key in ("tensors", "step", "hist", "dead", "felt", "grad_norm", "grad_norm_latent"):
        len(found[key])


def read_model(path):
    checkpoints.check_zip(path)
    train_tiny.load_checkpoint(path)


def explain(error, program, config):
    """Say in one sentence why a script ends, on stderr. Returns its exit code; raises faults."""
    code, why = 2, str(error)  # ValueError, OSError, ImportError: what a user gave
    if isinstance(error, KeyboardInterrupt):
        code, why = 130, "interrupted before anything was written"
        if config.out:
            why = f"interrupted; to go on, say the same with --resume --out {config.out}"
    elif isinstance(error, FileExistsError) and error.filename:
        why = f"{error.filename} was made by another run just now; name another --out"
    elif isinstance(error, OSError) and error.filename:
        why = f"{error.filename} cannot be used: {error.strerror}"
    elif isinstance(error, RuntimeError | MemoryError):
        code, why = 1, f"the run failed: {error}"
    elif not isinstance(error, ValueError | OSError | ImportError):
        raise error
    print(f"{program}: {' '.join(why.split())}", file=sys.stderr)
    return code
