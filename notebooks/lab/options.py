"""What single options of train_tiny.py need: refusals, a Llama in and out, a run to go on with."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import hestia
import train_tiny
from notebooks.lab import checkpoints

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
    if config.packed and not config.llama:
        raise ValueError("--packed needs --llama; expected the folder of a Llama to start from")
    try:
        torch.zeros(1, device=config.device or "cpu").item()
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device {config.device} cannot be used: {why}") from None
    for name in config.methods if config.packed else ():
        if name != "full":
            check_packed(config, name)
    if config.llama:
        load_once(config.llama)  # now, not after a long text was tokenized


def check_packed(config, name):
    """ValueError unless this method leaves what --packed can write."""
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
            raise ValueError(f"--packed cannot hold what {name} leaves; leave out one of them")


@functools.lru_cache(1)
def load_once(folder):
    with checkpoints.one_sentence(Path(folder)):
        checkpoints.check_folder(Path(folder))
        return hestia.load_llama(folder, torch.float32)


def llama(config):
    """A copy of the Llama in config.llama, which is read once for all seeds and methods."""
    return copy.deepcopy(load_once(config.llama)).to(config.device)


def save(config, model, path):
    """The Llama as a Hugging Face folder and, if it is ternary, as one of two bits per weight."""
    packed = path.with_name(path.name + "-packed")
    for left in (path, packed):
        if left.exists():  # an interrupted run got so far
            shutil.rmtree(left)
    hestia.save_llama(model, path)
    if config.packed and not path.name.startswith("full-"):
        checkpoints.save_packed(model, packed, config.group_size or None)


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
