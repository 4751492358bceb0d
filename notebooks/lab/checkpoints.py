"""Other formats in and out: packed and Meta's; what is written is read back and compared.

    python -m notebooks.lab.checkpoints SOURCE TARGET             # to a plain Hugging Face folder
    python -m notebooks.lab.checkpoints SOURCE TARGET --packed    # to two bits per ternary weight
    python -m notebooks.lab.checkpoints SOURCE FILE --gguf        # to a file for llama.cpp

SOURCE is a folder of any of the three formats:

    plain    config.json, model.safetensors            hestia.load_llama and save_llama
    packed   the same, codes in place of weights       load, save_packed
    Meta's   params.json, consolidated.00.pth          load

The packed layout is compressed-tensors' "pack-quantized" with 2 bits, which transformers loads. At
group size 128 it takes 2.125 bits per weight. With 4 bits vLLM loads it, too. --mlx has
mlx-lm's own layout, of 2.25 bits. gguf_file.py has what is said of GGUF. Nothing in a checkpoint is
executed.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
import textwrap
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

import hestia

# --------------------------------------------------------------------------------------------------
# what may be in a folder, and in a file

WITH_TRANSFORMERS = """this makes them: python -c "import transformers as t; \
a, b = '{}', 'NEW_FOLDER'; t.AutoModelForCausalLM.from_pretrained(a).save_pretrained(b); \
t.AutoTokenizer.from_pretrained(a).save_pretrained(b)\""""


@contextmanager
def one_sentence(folder):
    """ValueError in one line, which begins with the folder, for all that its readers may raise."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a damaged file breaks its reader in many ways
        reason = textwrap.shorten(str(error), 500, placeholder=" ...")
        if type(error) is not ValueError:
            reason = (f"{folder} is damaged, or holds no Llama ({type(error).__name__}: {reason}); "
                      "copy or download it again")
        elif not reason.startswith(str(folder)):
            reason = f"{folder}: {reason}"
        raise ValueError(reason) from None


def check_folder(folder, weights=True):
    """ValueError, one sentence, where no Llama can be: what is there, and what to do about it.

    weights=False: a config.json is enough.
    """
    written = "a GGUF file, which is only written here, from the folder that it was made of"
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            found += f" here; if it is on the Hugging Face Hub: hf download {folder} --local-dir X"
        if folder.is_file() and folder.suffix == ".gguf":
            found = f"is {written}"
        raise ValueError(f"{folder} {found}; expected a folder with config.json, model.safetensors")
    there = {file.name for file in folder.iterdir()}
    for name in sorted(there):
        if name.endswith((".json", ".safetensors", ".pth")):
            check_file(folder / name)
    if not {"config.json", "params.json"} & there:
        found = "holds no Llama" if there else "is empty"
        if any(name.endswith(".gguf") for name in there):
            found = f"holds {written}"
        if any(name.startswith("models--") for name in there):
            found = "is the Hub's cache; a model is in its models--OWNER--NAME/snapshots/"
        if "snapshots" in there:
            found = "is the Hub's cache of a model, which is in its snapshots/"
        if "adapter_config.json" in there:
            found = "is an adapter, which peft's merge_and_unload puts into its model"
        raise ValueError(f"{folder} {found}; expected a config.json or a params.json in it")
    if weights and (lacking := _lacking(folder, there)):
        again = f"copy or download {lacking} again"
        if any(name.startswith("pytorch_model") for name in there):
            again = f"of its pytorch_model.bin {WITH_TRANSFORMERS.format(folder)}"
        raise ValueError(f"{folder} has no {lacking}; {again}")


def _lacking(folder, there):
    """The name of a file with weights that is not among those there, or None."""
    index = "model.safetensors.index.json"
    if "config.json" not in there:
        files = {"consolidated.00.pth"}
    elif index in there and "model.safetensors" not in there:
        try:
            files = {Path(file).name for file in read_json(folder / index)["weight_map"].values()}
        except (LookupError, AttributeError, TypeError):
            raise ValueError(f"{folder / index} has no weight_map with names of files; copy or "
                             "download it again") from None
    else:
        files = {"model.safetensors"}
    return min(files - there, default=None)


def check_file(path):
    """ValueError unless it is a regular file. A pipe is read once, and a device may never end."""
    if not path.is_file():
        found = "is a folder, a pipe or a device" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}; expected a file, which can be read again")
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(f"{path} only says where its content is; get it by: git lfs pull")


def read_json(path):
    """The object in a file. ValueError where there is none."""
    check_file(path)
    try:
        if path.stat().st_size > 2**26:
            raise ValueError("it is larger than 64 MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object ({error}); copy or download it again"
                         ) from None
    return found


def check_zip(path):
    """ValueError unless a file of torch.save is whole, which torch.load does not find out.

    Returns how many bytes of tensors it holds.
    """
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        if len({r.filename for r in records}) < len(records):
            raise ValueError("a record is there twice")
        if any(r.compress_type or r.file_size != r.compress_size for r in records):
            raise ValueError("it is compressed, as torch.save does not do it")
        if file.testzip():
            raise ValueError("its checksums are wrong")
    return sum(r.file_size for r in records if "/data/" in r.filename)


# --------------------------------------------------------------------------------------------------
# packed: two bits per weight


def pack_ternary(w, group_size, bits=2):
    """Ternary weights (out, in) as codes of two bits, or four, and the scales.

    Returns codes, int32 (out, ceil(in / 16)), or in / 8; code t as t + 2, or 8, from the lowest
    bits up; and gamma, (out, groups), such that w = gamma * t. group_size=None: one group per row.
    ValueError where a group holds more than {-gamma, 0, +gamma}.

    >>> w = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.25, 0.0, 0.0, -0.25]])
    >>> codes, gamma = pack_ternary(w, 4)
    >>> gamma, bin(int(codes))  # read from the right: 11 is +1, 01 is -1, 10 is 0
    (tensor([[0.5000, 0.2500]]), '0b110101111100111')
    >>> torch.equal(unpack_ternary(codes, gamma, 8), w)
    True
    """
    out, width = w.shape
    group_size = group_size or width
    groups = hestia._groups(w, group_size).view(out, -1, group_size)  # (out, groups, g)
    gamma, t = groups.abs().amax(-1), groups.sign()  # (out, groups), (out, groups, g)
    if not torch.equal(gamma.unsqueeze(-1) * t, groups):
        raise ValueError(f"not ternary in groups of {group_size}; expected only -gamma, 0, +gamma")
    each, zero = 32 // bits, 2 ** (bits - 1)  # codes in a whole number, and the code of 0
    t = F.pad(t.view(out, width).long() + zero, (0, -width % each)).view(out, -1, each)
    codes = (t << torch.arange(0, 32, bits, device=w.device)).sum(-1)  # (out, ceil(in / each))
    return (codes - (codes >> 31 << 32)).int(), gamma  # the highest bit is int32's sign


def unpack_ternary(codes, gamma, width, bits=2):
    """The weights (out, width) from what pack_ternary returned, exactly, in gamma's dtype.

    ValueError where it cannot have returned these.
    """
    t = (codes.unsqueeze(-1) >> torch.arange(0, 32, bits, device=codes.device)) & (2**bits - 1)
    t = t.flatten(1)[:, :width].reshape(*gamma.shape, -1) - 2 ** (bits - 1)  # (out, groups, g)
    if (t.abs() > 1).any() or not (gamma >= 0).all() or gamma.isinf().any():
        raise ValueError("codes beyond -1 and 1, or scales that are negative or not finite; "
                         "expected codes -1, 0, +1 and scales of 0 or more")
    return (gamma.unsqueeze(-1) * t.to(gamma.dtype)).view(len(codes), width)


def find_group_size(model):
    """The largest number of weights that share a scale in all linear layers. ValueError: no two do.

    It divides all widths. Packed layouts and GGUF have one group size for all layers.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 1))
    >>> model[0].weight.data = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.25, 0.0, 0.0, -0.25]])
    >>> find_group_size(model)
    4
    """
    weights = [layer.weight.detach().float() for layer in hestia.linear_layers(model).values()]
    widest = math.gcd(*(w.shape[1] for w in weights))
    for size in (g for g in range(widest, 1, -1) if widest % g == 0):
        try:
            for w in weights:
                pack_ternary(w, size)
            return size
        except ValueError:
            pass  # a smaller one may do
    raise ValueError("the linear weights are not ternary; expected -gamma, 0, +gamma in groups, as "
                     "harden() leaves them")


def save_packed(model, path, group_size=128, bits=2, mlx=False):
    """Write a folder of two bits per linear weight, read it back and compare. Returns the path.

    group_size: weights that share a scale; None for one scale per row, which is written once for
    as many weights as divide all widths, since llama.cpp's converter reads nothing else. bits: of a
    weight, 2 or 4; vLLM has no kernel for 2. mlx: for mlx-lm instead, in groups of 128, 64 or 32,
    where w = scale * code + bias is gamma * (t + 1) - gamma; load does not read it. All that is not
    a linear weight is as in hestia.save_llama. The folder appears whole or not at all.
    FileExistsError if it holds something; ValueError names a tensor that is not ternary in these
    groups.
    """
    from safetensors.torch import load_file, save_file

    path, packed = Path(path), {}
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not an empty folder; name another, or remove it")
    layers = hestia.linear_layers(model)
    group_size = group_size or math.gcd(*(layer.weight.shape[1] for layer in layers.values()))
    if mlx:  # which has kernels for these groups only
        group_size = next((g for g in (128, 64, 32) if group_size % g == 0), 32)
    for name, layer in layers.items():
        w = layer.weight.detach().cpu().float()
        try:
            codes, gamma = pack_ternary(w, group_size, bits)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        narrow = gamma.bfloat16()  # exact after harden()
        gamma = narrow if torch.equal(narrow.float(), gamma) else gamma
        if mlx:  # each code is one less
            packed |= {name + ".weight": (codes - 0x55555555).view(torch.uint32),
                       name + ".scales": gamma, name + ".biases": -gamma}
            continue
        packed[name + ".weight_packed"] = codes
        packed[name + ".weight_scale"] = gamma
        packed[name + ".weight_shape"] = torch.tensor(w.shape)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as aside:
        plain = hestia.save_llama(model, Path(aside) / "plain")
        made = Path(aside) / path.name
        shutil.copytree(plain, made, ignore=shutil.ignore_patterns("*.safetensors"))
        config = read_json(plain / "config.json")
        if mlx:
            config["quantization"] = {"group_size": group_size, "bits": 2}
        else:
            config["quantization_config"] = _quantization(group_size, bits)
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = load_file(plain / "model.safetensors")
        for name in layers:
            del tensors[name + ".weight"]
        save_file(tensors | packed, made / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(made / "config.json", made / "model.safetensors")  # others may read it
        del tensors, packed
        if mlx:
            written = load_file(made / "model.safetensors")
            for name, layer in layers.items():
                codes = written[name + ".weight"].view(torch.int32) + 0x55555555
                written[name + ".weight"] = unpack_ternary(
                    codes, written[name + ".scales"], layer.weight.shape[1])
        else:
            _, written = _read_packed(made, config)
        for name, p in model.named_parameters():  # without a tied head
            if not torch.equal(written[name].float(), p.detach().cpu().float()):
                raise RuntimeError(f"{name} reads back differently; {path} was not made")
        os.replace(made, path)
    return path


def _quantization(group_size, bits):
    """What config.json says of packed weights, in compressed-tensors' words."""
    scheme = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
              "strategy": "group", "group_size": group_size}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}


def _read_packed(folder, raw):
    """(config.json, {name: tensor}) of the plain folder that a packed one stands for."""
    from safetensors.torch import load_file

    described = raw["quantization_config"]
    try:
        (group,) = described["config_groups"].values()
        scheme = group["weights"]
        group_size, bits = scheme.get("group_size"), scheme["num_bits"]
        known = described["format"] == "pack-quantized" and scheme["symmetric"]
        known = known and bits in (2, 4) and scheme["type"] == "int"
        known = known and (group_size is None or group_size > 0)
    except (TypeError, KeyError, AttributeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{folder} is quantized otherwise than by save_packed; expected "
                         "pack-quantized weights of 2 or 4 bits, symmetric, with one group size")
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} is packed in several files; expected one model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for name in [n.removesuffix("_packed") for n in tensors if n.endswith(".weight_packed")]:
        codes = tensors.pop(name + "_packed")
        gamma, shape = tensors.pop(name + "_scale", None), tensors.pop(name + "_shape", None)
        if not _fits(codes, gamma, shape, group_size, bits):
            raise ValueError(f"{folder} packs {name} into codes, scales and a shape that do not "
                             f"fit each other and groups of {group_size or 'a row'}")
        if name in tensors:
            raise ValueError(f"{folder} has {name} beside {name}_packed; expected one of them")
        try:
            tensors[name] = unpack_ternary(codes, gamma, int(shape[1]), bits)
        except ValueError as error:
            raise ValueError(f"{folder} packs {name} into {error}") from None
    return {key: raw[key] for key in raw if key != "quantization_config"}, tensors


def _fits(codes, gamma, shape, group_size, bits):
    """Whether codes, int32 (out, ceil(in * bits / 32)), gamma, (out, groups), and shape fit."""
    if gamma is None or shape is None or shape.shape != (2,) or shape.dtype != torch.int64:
        return False
    out, width = shape.tolist()
    groups = width // (group_size or width or 1)
    return (codes.dtype == torch.int32 and gamma.is_floating_point()
            and codes.shape == (out, -(-width * bits // 32)) and gamma.shape == (out, groups)
            and groups * (group_size or width) == width)


# --------------------------------------------------------------------------------------------------
# Meta's own format

META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "layers": "model.layers", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


# That RoPE is scaled is all that params.json says of it. {(width, tied head): factor} of Llama 3.2,
# 3.1 and 3.3
ROPE_FACTORS = {(2048, True): 32.0, (3072, True): 32.0, (4096, False): 8.0, (8192, False): 8.0,
                (16384, False): 8.0}


def _read_meta(folder):
    """(config.json, {name: tensor}) of the plain folder that one in Meta's format stands for."""
    file = folder / "consolidated.00.pth"
    params, tensors = read_json(folder / "params.json"), {}
    if (folder / "consolidated.01.pth").exists():
        raise ValueError(f"{folder} is split for several GPUs; expected one consolidated.00.pth")
    try:
        stored_bytes = check_zip(file)
        stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        storages = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
                    for w in stored.values()}
        if sum(storages.values()) != stored_bytes:  # the first of two is lost
            raise ValueError("a name is there twice")
        if sum(w.nbytes for w in stored.values()) > 2 * stored_bytes:  # a tied head may be a copy
            raise ValueError("its tensors are larger than the file")
        for old, w in stored.items():
            if old.endswith("rope.freqs"):  # computed anew
                continue
            name = re.sub("|".join(META_NAMES), lambda found: META_NAMES[found[0]], old)
            if name.startswith("norm."):
                name = "model." + name
            if name in tensors:
                raise ValueError(f"{old} is there under another name, too")
            tensors[name] = w
        embedding = tensors["model.embed_tokens.weight"]
        tied = torch.equal(tensors["lm_head.weight"], embedding)
        heads, width = params["n_heads"], params["dim"]
        config = {
            "model_type": "llama", "vocab_size": len(embedding), "hidden_size": width,
            "intermediate_size": len(tensors["model.layers.0.mlp.gate_proj.weight"]),
            "num_hidden_layers": params["n_layers"], "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads, "head_dim": width // heads,
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "rope_theta": params.get("rope_theta", 10000.0), "tie_word_embeddings": tied,
        }
        if tied:
            del tensors["lm_head.weight"]
        for name, w in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                # Meta turns neighbouring rows of a head, Hugging Face rows half a head apart
                pairs = w.view(-1, width // heads // 2, 2, width)
                w = pairs.transpose(1, 2).reshape(w.shape)
            tensors[name] = w.contiguous()
    except Exception as error:  # a damaged file breaks its reader in many ways
        # the first sentence. In later ones torch advises to execute the file
        kind = "" if type(error) is ValueError else type(error).__name__ + " "
        reason = f"{kind}{error}".split(". ")[0]
        raise ValueError(f"{folder} holds no Llama in Meta's format: {reason}; copy or download it "
                         "again") from None
    scaled, factor = params.get("use_scaled_rope", False), params.get("rope_scaling_factor")
    if not isinstance(scaled, bool):
        raise ValueError(f"{folder}: use_scaled_rope is {scaled!r}; expected true or false")
    if scaled:
        factor = ROPE_FACTORS.get((width, tied)) if factor is None else factor
        if factor is None:
            raise ValueError(
                f"{folder} has scaled RoPE without a factor, and no known Llama has width {width} "
                f"and {'a' if tied else 'no'} tied head; add it to params.json: "
                '"rope_scaling_factor": 32.0 as in Llama 3.2, or 8.0 as in Llama 3.1 and 3.3')
        config["rope_scaling"] = {**hestia.LLAMA3, "factor": factor}
        if params.get("rope_high_freq_factor") is not None:
            config["rope_scaling"]["high_freq_factor"] = params["rope_high_freq_factor"]
        config |= {"max_position_embeddings": 131072, "bos_token_id": 128000,
                   "eos_token_id": 128001}
    return config, tensors


# --------------------------------------------------------------------------------------------------
# any of them


def load(path, dtype=None, device="cpu"):
    """A Llama from a plain folder, a packed one, or one in Meta's format.

    What is not plain is written as a plain folder to the system's temporary folder, and is loaded
    from there by hestia.load_llama. dtype, device and model.origin are as there. ValueError says
    in one sentence what does not fit.
    """
    folder = Path(path)
    with one_sentence(folder):
        check_folder(folder)
        return _load(folder, dtype, device)


def _load(folder, dtype, device):
    if (folder / "config.json").exists():
        raw = read_json(folder / "config.json")
        if not raw.get("quantization_config"):
            return hestia.load_llama(folder, dtype, device)
        config, tensors = _read_packed(folder, raw)
    else:
        config, tensors = _read_meta(folder)
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as aside:
        (Path(aside) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, Path(aside) / "model.safetensors")
        del tensors
        try:
            model = hestia.load_llama(aside, dtype, device)
        except (ValueError, RuntimeError) as error:
            raise ValueError(str(error).replace(aside, str(folder))) from None
    model.origin = folder, config
    return model


def add_papers(folder, source, card=None):
    """Licence, further files of the tokenizer and a model card, into a folder that was written.

    card: what README.md says; None for the source's own.
    """
    wanted = r"(?i)licen[cs]e|notice|use_policy|added_tokens" + "|readme.md" * (card is None)
    for path in Path(source).iterdir():
        if path.is_file() and re.match(wanted, path.name):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "additional_chat_templates":
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def main(arguments=None):
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.checkpoints", epilog=rest,
                                     description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder with a Llama")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder or file to make")
    parser.add_argument("--packed", action="store_true", help="two bits per ternary weight")
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4), help="with --packed: of a "
                        "weight; 4 for vLLM (default: 2)")
    parser.add_argument("--mlx", action="store_true", help="with --packed: for mlx-lm")
    parser.add_argument("--group-size", type=int, metavar="G", help="with --packed: weights that "
                        "share a scale; 0: a scale per row (default: as the weights have it)")
    parser.add_argument("--gguf", action="store_true", help="one file for llama.cpp")
    parser.add_argument("--type", choices=("TQ2_0", "TQ1_0", "Q2_0", "BF16", "F16", "F32"),
                        help="with --gguf: of the linear weights (default: the best that fits)")
    options = parser.parse_args(arguments)
    try:
        model = load(options.source)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{error}\n")
    chosen = ""
    try:
        if options.gguf:
            from notebooks.lab import gguf_file

            kind, why = gguf_file.save_gguf(model, options.target, options.type)
            chosen = f", {kind}: {why}"
        elif options.packed:
            size = options.group_size
            size = find_group_size(model) if size is None else size or None
            save_packed(model, options.target, size, options.bits, options.mlx)
            chosen = f", {options.bits} bits each in groups of {size or 'a row'}"
        else:
            hestia.save_llama(model, options.target)
        if not options.gguf:
            add_papers(options.target, options.source)
    except Exception as error:  # what a full disk may raise, too
        parser.exit(2, f"{options.target} was not made: {textwrap.shorten(str(error), 500)}\n")
    print(f"{options.target}: {sum(p.numel() for p in model.parameters()):,} weights{chosen}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    main()
