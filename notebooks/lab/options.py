"""What single options of train_tiny.py need: refusals, a Llama in and out, a run to go on with."""

import copy
import dataclasses
import functools
import json
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
    try:
        return hestia.load_llama(folder, torch.float32)
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged folder makes of those that read it
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--llama {folder} cannot be loaded ({why}); expected a Hugging Face "
                         "folder of a Llama") from None


def llama(config):
    """A copy of the Llama in config.llama, which is read once for all seeds and methods."""
    return copy.deepcopy(load_once(config.llama)).to(config.device)


def save(config, model, path):
    """The hardened Llama as a Hugging Face folder, and as one of two bits per weight."""
    packed = path.with_name(path.name + "-packed")
    for left in (path, packed):
        if left.exists():  # an interrupted run got so far
            shutil.rmtree(left)
    hestia.save_llama(model, path)
    if config.packed:
        checkpoints.save_packed(model, packed, config.group_size or None)


def check_resume(config, about):
    """ValueError unless config.out holds a run with these settings and this text, all readable."""
    if not config.out:
        raise ValueError("--resume needs --out; expected the folder of the interrupted run")
    folder, now = Path(config.out), json.loads(json.dumps(about))
    try:
        then = json.loads((folder / "config.json").read_text())
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
    readers = {".json": read_kept, ".npz": read_npz, ".pt": train_tiny.load_checkpoint}
    for path in sorted([*folder.glob("runs/*"), *folder.glob("*.pt")]):
        if path.suffix in readers and not path.name.startswith("half-"):  # as train_tiny.write has
            try:
                readers[path.suffix](path)
            except Exception:  # whatever a damaged file may raise
                raise ValueError(f"{path} is damaged; remove what bears its name and seed, in "
                                 f"{folder} and in its runs/, to have it made anew") from None


def read_kept(path):
    """What train_tiny.py keeps of a finished row, of the pretraining, or of a seed's start."""
    kept = json.loads(path.read_text())
    if "-at-" in path.name:  # a study's loss at one rate
        return
    whole = kept.keys() >= {"log"} and isinstance(kept["log"], list)
    if path.name.startswith("start-"):
        whole = kept.keys() >= {"before", "untrained", "sensitivities"}
    elif not path.name.startswith("pretrain-"):
        whole = whole and {"seconds", "train", "val"} <= kept["row"].keys()
        whole = whole and all(isinstance(x, int | float) for x in kept["row"].values())
    if not whole:
        raise ValueError("it lacks what a run leaves there")


def read_npz(path):
    with np.load(path) as arrays:
        return dict(arrays)


def explain(error, program, config):
    """Say in one sentence why a script ends, on stderr. Returns its exit code; raises faults."""
    code, why = 2, str(error)  # ValueError, OSError, ImportError: what a user gave
    if isinstance(error, KeyboardInterrupt):
        code, why = 130, "interrupted before anything was written"
        if config.out:
            why = f"interrupted; to go on, say the same with --resume --out {config.out}"
    elif isinstance(error, OSError) and error.filename:
        why = f"{error.filename} cannot be used: {error.strerror}"
    elif isinstance(error, RuntimeError | MemoryError):
        code, why = 1, f"the run failed: {error}"
    elif not isinstance(error, ValueError | OSError | ImportError):
        raise error
    print(f"{program}: {why}", file=sys.stderr)
    return code
