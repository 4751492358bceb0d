"""A hardened Llama as one GGUF file, for llama.cpp and what is built on it: exact, or refused.

    python -m notebooks.lab.checkpoints SOURCE FILE --gguf                 # the type that fits best
    python -m notebooks.lab.checkpoints SOURCE FILE --gguf --type TQ1_0    # or this one

    type     one scale per   bits per weight   made for
    TQ2_0    256 weights     2.0625            x86 CPUs, where it is the fastest
    TQ1_0    256 weights     1.6875            x86 CPUs, the smallest file
    Q2_0      64 weights     2.25              ARM and GPUs; on x86 it is slow
    BF16     -               16                everything; for groups that no type above holds
    F32      -               32                what bfloat16 would round

A group of g weights fits a type whose block of weights divides g. The weights decide: a type fits
where every one of its blocks is {-gamma, 0, +gamma} with a gamma that float16 holds. What is
written is read back, and compared bit by bit, before the file gets its name.

Q2_0 is llama.cpp's type 42 with blocks of 64. A fork has the same number for blocks of 128.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import hestia
from notebooks.lab import checkpoints

try:
    import gguf
except ImportError:
    raise ImportError("GGUF files need another package: pip install gguf") from None


class Type(NamedTuple):
    number: int  # of the type in GGML
    file: int  # of a file that is mostly of this type
    block: int  # weights that share a scale; 1: none do
    size: int  # bytes of a block
    why: str


TYPES = {
    "TQ2_0": Type(35, 37, 256, 66, "is the fastest on x86 CPUs; for ARM and GPUs: --type Q2_0"),
    "Q2_0": Type(42, 41, 64, 18, "is made for ARM and GPUs, and slow on x86"),
    "TQ1_0": Type(34, 36, 256, 54, "is the smallest"),
    "BF16": Type(30, 32, 1, 2, "holds all that bfloat16 holds"),
    "F16": Type(1, 1, 1, 2, "holds all that float16 holds"),
    "F32": Type(0, 0, 1, 4, "holds all"),
}
TERNARY = ("TQ2_0", "Q2_0", "TQ1_0")

# --------------------------------------------------------------------------------------------------
# weights


def blocks(w, size):
    """Weights (out, in) as gamma (n, 1) and codes (n, size) of blocks that share a scale, or None.

    None: the width is no multiple of the size, a block is not ternary, or float16 rounds a gamma.

    >>> blocks(torch.tensor([[0.5, -0.5, 0.0, 0.25]]), 2)
    (tensor([[0.5000],
            [0.2500]]), tensor([[ 1., -1.],
            [ 0.,  1.]]))
    >>> blocks(torch.tensor([[0.5, -0.5, 0.0, 0.25]]), 4) is None
    True
    """
    if w.shape[-1] % size:
        return None
    groups = w.cpu().float().reshape(-1, size)
    gamma, t = groups.abs().amax(1, keepdim=True), groups.sign()  # (n, 1), (n, size)
    exact = torch.equal(gamma * t, groups) and torch.equal(gamma.half().float(), gamma)
    return (gamma, t) if exact else None


def fits(w, kind):
    """Whether a type holds these weights exactly."""
    if kind in TERNARY:
        return blocks(w, TYPES[kind].block) is not None
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[kind]
    return torch.equal(w.to(narrow).to(w.dtype), w)


def choose(model, wanted=None):
    """(type's name, why it), for the linear weights. ValueError names the type that would do."""
    layers = hestia.linear_layers(model).items()

    def misfit(kind):
        return next((name for name, layer in layers if not fits(layer.weight.detach(), kind)), None)

    would = wanted if wanted and not misfit(wanted) else next(k for k in TYPES if not misfit(k))
    kind = wanted or (would if would in TERNARY else "Q2_0")
    if kind == would:
        shared = f"each {TYPES[kind].block} weights of a row share a scale, and it "
        return kind, (shared if kind in TERNARY else "it ") + TYPES[kind].why
    why = f"{kind} would round {misfit(kind)}"
    if kind in TERNARY:
        why = f"{misfit(kind)} is no -gamma, 0, +gamma in each {TYPES[kind].block} weights of a row"
        why += f", as {kind} needs"
    advice = "" if would in TERNARY else (
        "; for a small file train with --group-size 256 (TQ2_0, TQ1_0) or 64 (Q2_0)")
    raise ValueError(f"{why}; --type {would} would do{advice}")


def encode(w, kind):
    """Weights (out, in) as the bytes of a type, uint8 (out, in / block * size).

    Q2_0, of 64 weights: gamma in float16, then 16 bytes, each of four codes t + 1 of two bits from
    the lowest up.

    >>> w = torch.tensor([[1.0, 0.0, -1.0, 0.0] + 60 * [0.0]])
    >>> encode(w, "Q2_0").tolist()  # 60, 0: 1.0 in float16; 70: 01 00 01 10; 85: 01 01 01 01
    [[0, 60, 70, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85, 85]]
    """
    if kind != "Q2_0":
        found = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[kind])
        return np.ascontiguousarray(found).view(np.uint8)
    gamma, t = blocks(w, 64)
    codes = (t.to(torch.uint8) + 1).view(-1, 16, 4)  # -1 is 255, which becomes 0
    codes = codes << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    scale = gamma.half().view(torch.uint8)  # (n, 2)
    return torch.cat([scale, codes.sum(-1, dtype=torch.uint8)], 1).view(len(w), -1).numpy()


def decode(data, kind, shape):
    """The weights, float32 of this shape, from what encode returned."""
    if kind != "Q2_0":
        number = gguf.GGMLQuantizationType[kind]
        data = data.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
        return torch.tensor(gguf.quants.dequantize(data, number)).view(shape)
    data = torch.tensor(data).view(-1, 18)  # (n, 2 + 16)
    gamma = data[:, :2].contiguous().view(torch.float16).float()  # (n, 1)
    codes = data[:, 2:, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3  # (n, 16, 4)
    return (gamma * (codes.flatten(1).float() - 1)).view(shape)


def tensors(model):
    """(name in the file, is a linear weight, weight in llama.cpp's order of rows), float32.

    RoPE turns rows half a head apart here, and neighbouring rows there. llama3 scaling is a factor
    for each pair: how much slower it turns.
    """
    c, linear = model.config, hestia.linear_layers(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, p in model.named_parameters():  # without a tied head
        w, (layer, _, ending) = p.detach().cpu().float(), name.rpartition(".")
        if n := heads.get(layer.rpartition(".")[2]):
            halves = w.view(n, 2, c.head_dim // 2, *w.shape[1:])  # (heads, 2, head_dim / 2, in)
            w = halves.transpose(1, 2).reshape(w.shape)
        yield names.get_name(name, (".weight", ".bias")), layer in linear and ending == "weight", w
    if c.rope_scaling:
        plain = hestia.LlamaConfig(**{**vars(c), "rope_scaling": None})
        slower = hestia.rope_frequencies(plain) / hestia.rope_frequencies(c)  # (head_dim / 2,)
        yield "rope_freqs.weight", False, slower


# --------------------------------------------------------------------------------------------------
# tokenizer

# How a text is cut before pairs are merged: the regular expression, or the kinds of steps, in
# tokenizer.json; and llama.cpp's name for it
CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",  # Llama 3
    "Digits ByteLevel": "smollm",
    "ByteLevel": "gpt-2",
}
NORMAL, _, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def add_tokenizer(writer, folder, size):
    """Tokens, merges, special tokens and chat template of a folder with a tokenizer.json.

    size: rows of the embedding. A folder without a tokenizer leaves a file that takes token ids.
    """
    if not folder or not (folder / "tokenizer.json").exists():
        if folder and (folder / "tokenizer.model").exists():
            raise ValueError(f"{folder} has a tokenizer.model and no tokenizer.json, which "
                             "transformers' AutoTokenizer writes by save_pretrained")
        writer.add_tokenizer_model("none")
        return
    found = checkpoints.read_json(folder / "tokenizer.json")
    bpe, added = found["model"], found["added_tokens"]
    if bpe["type"] != "BPE" or max([*bpe["vocab"].values(), *(t["id"] for t in added)]) >= size:
        raise ValueError(f"{folder} has a tokenizer of another kind than BPE, or with more tokens "
                         f"than the embedding's {size}; expected the model's own")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, i in bpe["vocab"].items():
        byte = bpe["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[i], types[i] = text, BYTE if byte else NORMAL
    for token in added:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind

    if bpe["byte_fallback"]:  # as SentencePiece has it: a token's score is the rank of its merge
        scores = [0.0] * size
        for rank, pair in reversed([*enumerate(bpe["merges"])]):  # the first to a token counts
            pair = pair.split(" ") if isinstance(pair, str) else pair
            scores[bpe["vocab"]["".join(pair)]] = -float(rank)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        rules = str([found["normalizer"], found["pre_tokenizer"]])
        writer.add_add_space_prefix(bool(re.search("'Prepend'|'first'|'always'", rules)))
    else:
        pre = found["pre_tokenizer"] or {}
        steps = pre.get("pretokenizers", [pre])
        cut = " ".join(step.get("type", "none") for step in steps)
        if cut == "Split ByteLevel":
            cut = steps[0]["pattern"].get("Regex")
        plain = not found["normalizer"] and not any(step.get("add_prefix_space") for step in steps)
        if cut not in CUTS or not plain:
            raise ValueError(f"{folder} has a tokenizer that cuts text in a way not known here "
                             f"({cut}); expected Llama 3's, SmolLM's or GPT-2's. llama.cpp's "
                             "convert_hf_to_gguf.py --outtype bf16 may know it")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(CUTS[cut])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not bpe["byte_fallback"], n_vocab=size)
    special.add_to_gguf(writer, quiet=True)


# --------------------------------------------------------------------------------------------------
# the file


def save_gguf(model, path, kind=None, folder=None):
    """Write one GGUF file, read it back and compare. Returns (type's name, why it).

    kind: a name in TYPES; None for the best of the ternary ones that fits. folder: where tokenizer,
    model card and licence are; None for where the model was loaded. The file appears whole or not
    at all. FileExistsError if it is there; ValueError says what does not fit, and what would.
    """
    path, c, (origin, raw) = Path(path), model.config, getattr(model, "origin", (None, {}))
    if path.exists():
        raise FileExistsError(f"{path} is there already; name another file, or remove it")
    folder = folder or origin
    kind, why = choose(model, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(suffix=".tmp", dir=path.parent) as aside:
        made = Path(aside) / path.name
        writer = gguf.GGUFWriter(made, "llama")
        count = sum(p.numel() for p in model.parameters())
        card = gguf.Metadata.load(model_path=folder, total_params=count)
        card.name = card.name or path.stem
        card.set_gguf_meta_model(writer)  # with licence and source, where README.md says them
        settings = {
            "context_length": raw.get("max_position_embeddings", 2048), "vocab_size": c.vocab_size,
            "embedding_length": c.hidden_size, "block_count": c.num_hidden_layers,
            "feed_forward_length": c.intermediate_size, "head_count": c.num_attention_heads,
            "head_count_kv": c.num_key_value_heads, "key_length": c.head_dim,
            "value_length": c.head_dim, "rope_dimension_count": c.head_dim,
            "rope_freq_base": c.rope_theta, "layer_norm_rms_eps": c.rms_norm_eps,
            "file_type": TYPES[kind].file, "quantization_version": 2, "type": gguf.GGUFType.MODEL}
        for key, value in settings.items():
            getattr(writer, "add_" + key)(value)
        with checkpoints.one_sentence(folder):
            add_tokenizer(writer, folder, c.vocab_size)
        for name, linear, w in tensors(model):
            # the narrowest that is exact, and float32 for norms, biases and RoPE, as engines expect
            narrow = "F32" if w.dim() < 2 else next(k for k in ("F16", "BF16", "F32") if fits(w, k))
            used = kind if linear else narrow
            data = encode(w, used).view(np.int8)  # of uint8 the writer would take another shape
            writer.add_tensor(name, data, raw_shape=tuple(w.shape), raw_dtype=TYPES[used].number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        for (name, _, w), (found, _, again) in zip(tensors(model), read_tensors(made), strict=True):
            if name != found or not torch.equal(again, w):
                raise RuntimeError(f"{name} reads back differently; {path} was not made")
        os.replace(made, path)
    return kind, why


def read_tensors(path):
    """(name, type's name, weight in float32) of each tensor in a file of save_gguf."""
    class Reader(gguf.GGUFReader):
        """gguf's own would refuse Q2_0."""

        def _build_tensors(self, start, fields):
            self.start, self.found = start, fields

    reader, kinds = Reader(path), {t.number: kind for kind, t in TYPES.items()}
    for field in reader.found:
        _, name, _, shape, number, offset = field.parts
        kind, shape = kinds[int(number[0])], shape[::-1].tolist()
        begin = int(reader.start + offset[0])
        end = begin + int(np.prod(shape)) // TYPES[kind].block * TYPES[kind].size
        data = np.array(reader.data[begin:end]).reshape(*shape[:-1], -1)
        yield bytes(name).decode(), kind, decode(data, kind, shape)
