"""lab/checkpoints.py against layouts written by hand, transformers, Meta's own, and damage."""

import contextlib
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from test_options import damage

import hestia
import train_tiny
from notebooks.lab import checkpoints

safetensors = pytest.importorskip("safetensors.torch")
META = "consolidated.00.pth"
SHARED = Path(hestia.__file__).resolve().parent.parent / "shared"


def random_llama(**changes):
    """A small Llama-3.2: scaled RoPE whose thresholds lie within reach, uneven attention."""
    shape = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0,
                 rope_scaling={**hestia.LLAMA3, "original_max_position_embeddings": 16})
    torch.manual_seed(0)
    model = hestia.Llama(hestia.LlamaConfig(**{**shape, **changes}))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def ternary_llama(group_size=16, **changes):
    model = random_llama(**changes)
    hestia.Hestia(model, 1, group_size=group_size, tau_init=0.3).harden()
    return model


def same_weights(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k].float(), b[k].float()) for k in a)


# --------------------------------------------------------------------------------------------------
# packed


def test_packing_against_a_layout_written_by_hand():
    w = torch.tensor([[2.0] + [0.0] * 15 + [-2.0] + [0.0] * 2])
    codes, gamma = checkpoints.pack_ternary(w, None)
    assert gamma.tolist() == [[2.0]]
    # sixteen codes of two bits, the first lowest: 3, then 2, 2, ...; then 1, 2, 2 and padding
    by_hand = [0b10101010101010101010101010101011, 0b101001]
    assert [code & 0xFFFFFFFF for code in codes[0].tolist()] == by_hand
    assert torch.equal(checkpoints.unpack_ternary(codes, gamma, 19), w)
    with pytest.raises(ValueError, match="not ternary in groups of 2"):
        checkpoints.pack_ternary(torch.tensor([[0.5, 1.5]]), None)
    with pytest.raises(ValueError, match="group size 4 does not divide the width 19; 1 would"):
        checkpoints.pack_ternary(w, 4)


@pytest.mark.parametrize("group_size", [16, None])
def test_a_packed_folder_is_read_alike_by_us_and_by_transformers(group_size, tmp_path):
    model = ternary_llama(group_size)
    path = checkpoints.save_packed(model, tmp_path / "new" / "packed", group_size)
    again = checkpoints.load(path)
    assert same_weights(again, model) and again.config == model.config
    narrow = checkpoints.load(path, torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    assert [p.name for p in path.parent.iterdir()] == ["packed"]  # nothing is left beside it

    stored = safetensors.load_file(path / "model.safetensors")
    small = [t for name, t in stored.items() if name.endswith(("_packed", "_scale"))]
    bits = 8 * sum(t.numel() * t.element_size() for t in small)
    weights = sum(layer.weight.numel() for layer in hestia.linear_layers(model).values())
    # a scale per row is written once for 32 weights, which divide the widths 32 and 64
    assert bits == 2 * weights + 16 * (weights // (group_size or 32))
    raw = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
    scheme = raw["config_groups"]["group_0"]["weights"]
    assert (scheme["strategy"], scheme["group_size"]) == ("group", group_size or 32)

    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - again(ids)).abs().max() < 2e-4


def test_four_bits_are_read_alike_by_us_and_by_transformers(tmp_path):
    """vLLM has kernels for these."""
    w = torch.tensor([[2.0] + [0.0] * 7 + [-2.0]])
    codes, gamma = checkpoints.pack_ternary(w, None, 4)
    assert [code & 0xFFFFFFFF for code in codes[0].tolist()] == [0x88888889, 0x7]  # padded by 0
    assert torch.equal(checkpoints.unpack_ternary(codes, gamma, 9, 4), w)
    model = ternary_llama()
    path = checkpoints.save_packed(model, tmp_path / "packed", 16, bits=4)
    again = checkpoints.load(path)
    assert same_weights(again, model)
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - again(ids)).abs().max() < 2e-4


@pytest.mark.parametrize("group_size, found", [(256, 128), (64, 64), (32, 32)])
def test_mlx_has_our_weights_and_our_logits(group_size, found, tmp_path):
    model = ternary_llama(group_size, hidden_size=256, intermediate_size=256)
    folder = hestia.save_llama(model, tmp_path / "plain")
    checkpoints.main([str(folder), str(tmp_path / "mlx"), "--packed", "--mlx"])
    stored = safetensors.load_file(tmp_path / "mlx" / "model.safetensors")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text("utf-8"))
    assert config["quantization"] == {"group_size": found, "bits": 2}
    ours = {name: layer.weight for name, layer in hestia.linear_layers(model).items()}
    for name, w in ours.items():  # bits by numpy, scale * code + bias in float32
        bits = np.unpackbits(stored[name + ".weight"].numpy().view(np.uint8), bitorder="little")
        code = (bits[::2] + 2.0 * bits[1::2]).reshape(-1, found)
        scale, bias = (stored[name + end].float().numpy().reshape(-1, 1)
                       for end in (".scales", ".biases"))
        assert np.array_equal((scale * code + bias).reshape(w.shape), w.detach().numpy())
    with pytest.raises(ValueError, match="not ternary in groups of 32"):
        checkpoints.save_packed(ternary_llama(16), tmp_path / "fine", 16, mlx=True)

    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    theirs, _ = utils.load_model(tmp_path / "mlx")
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    logits = theirs(mx.array(ids.numpy())).astype(mx.float32)
    with torch.no_grad():
        assert np.abs(np.array(logits) - model(ids).numpy()).max() < 2e-4


def test_the_group_size_is_found_in_the_weights():
    for group_size, found in [(4, 4), (16, 16), (32, 32), (None, 32)]:
        assert checkpoints.find_group_size(ternary_llama(group_size)) == found
    with pytest.raises(ValueError, match="weights are not ternary; expected -gamma, 0, "):
        checkpoints.find_group_size(random_llama())


def test_save_packed_refuses_and_leaves_nothing_behind(tmp_path, monkeypatch):
    model, target = ternary_llama(), tmp_path / "target"
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: not ternary in groups of 16"):
        checkpoints.save_packed(random_llama(), target, 16)
    original = safetensors.save_file

    def full_disk(tensors, file, **more):
        if any(name.endswith("_packed") for name in tensors):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, file, **more)

    def one_bit_off(tensors, file, **more):
        codes = tensors.get("model.layers.1.mlp.up_proj.weight_packed")
        if codes is not None:
            codes[5, 1] ^= 2
        original(tensors, file, **more)

    monkeypatch.setattr(safetensors, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_packed(model, target, 16)
    monkeypatch.setattr(safetensors, "save_file", one_bit_off)
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.up_proj.weight reads back differently"):
        checkpoints.save_packed(model, target, 16)
    assert not list(tmp_path.iterdir())
    target.mkdir()
    (target / "kept").write_text("", "utf-8")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        checkpoints.save_packed(model, target, 16)
    assert [p.name for p in target.iterdir()] == ["kept"]


def test_packed_folders_that_do_not_fit_are_refused(tmp_path):
    good = checkpoints.save_packed(ternary_llama(), tmp_path / "packed", 16)
    weight = "model.layers.0.mlp.up_proj.weight"

    def tensors(ending, value):
        def change(folder):
            file = folder / "model.safetensors"
            found = safetensors.load_file(file)
            found[weight + ending] = value(found[weight + ending]) if callable(value) else value
            file.unlink()
            safetensors.save_file({name: t for name, t in found.items() if t is not None}, file)

        return change

    def scheme(**changes):
        def change(folder):
            raw = json.loads((folder / "config.json").read_text("utf-8"))
            raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
            (folder / "config.json").write_text(json.dumps(raw), "utf-8")

        return change

    def element(value):
        def change(t):
            t[3, 1] = value
            return t

        return change

    otherwise, no_fit = "quantized otherwise than by save_packed", "do not fit each other"
    no_code = "up_proj.weight into codes beyond -1 and 1, or scales that are negative or not finite"
    cases = [
        (scheme(num_bits=8), otherwise), (scheme(symmetric=False), otherwise),
        (scheme(num_bits=4), no_fit),  # of two bits
        (scheme(group_size="16"), otherwise), (scheme(group_size=-1), otherwise),
        (scheme(group_size=8), no_fit), (scheme(group_size=None), no_fit),
        (scheme(group_size=15), no_fit),
        (tensors("_packed", torch.zeros(64, 4).int()), no_fit),
        (tensors("_packed", torch.zeros(64, 2)), no_fit),
        (tensors("_scale", torch.ones(64, 1)), no_fit), (tensors("_scale", None), no_fit),
        (tensors("_scale", torch.ones(64)), no_fit),
        (tensors("_scale", torch.ones(64, 2).int()), no_fit),
        (tensors("_shape", torch.tensor(64)), no_fit),
        (tensors("_shape", torch.tensor([64, 16])), no_fit),
        (tensors("_shape", torch.tensor([64, 31])), no_fit),
        (tensors("_zero", torch.ones(1)), "model.layers.0.mlp.up_proj.weight_zero"),
        (tensors("", torch.ones(64, 32)), f"has {weight} beside {weight}_packed; expected one"),
        (tensors("_packed", element(0)), no_code), (tensors("_packed", element(-2)), None),
        (tensors("_packed", element(0x7FFFFFFC)), no_code),  # the first of sixteen
        (tensors("_scale", element(-1.0)), no_code), (tensors("_scale", element(0.0)), None),
        (tensors("_scale", element(math.inf)), no_code),
        (tensors("_scale", element(math.nan)), no_code),
    ]
    for number, (change, message) in enumerate(cases):
        folder = shutil.copytree(good, tmp_path / str(number))
        change(folder)
        if message is None:  # another ternary file
            assert checkpoints.load(folder)
            continue
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load(folder)
        assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Meta's


def to_meta(model, folder):
    """The same Llama in Meta's format: neighbouring rows of q and k turn together."""
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
             "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "model.layers": "layers",
             "model.norm": "norm", "model.embed_tokens": "tok_embeddings", "lm_head": "output"}
    c, tensors = model.config, {"rope.freqs": torch.ones(4)}
    tensors["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(4)  # as in Llama 1
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            halves = w.view(len(w) // c.head_dim, 2, -1, w.shape[1])  # (heads, 2, head_dim / 2, in)
            w = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = w.clone()
    folder.mkdir()
    torch.save(tensors, folder / META)
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "vocab_size": c.vocab_size,
              "n_heads": c.num_attention_heads, "n_kv_heads": c.num_key_value_heads,
              "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
              "rope_scaling_factor": 32.0, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
    (folder / "params.json").write_text(json.dumps(params), "utf-8")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_metas_format_loads_to_the_same_model(tied, tmp_path):
    model = random_llama(rope_scaling=hestia.LLAMA3, tie_word_embeddings=tied)
    folder = to_meta(model, tmp_path / "meta")
    again = checkpoints.load(folder)
    assert again.config == model.config and same_weights(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    params = json.loads((folder / "params.json").read_text("utf-8"))
    (folder / "params.json").write_text(json.dumps({**params, "rope_scaling_factor": 8.0}), "utf-8")
    assert checkpoints.load(folder).config.rope_scaling["factor"] == 8  # Llama-3.1's
    (folder / "params.json").write_text(json.dumps({**params, "n_layers": 3}), "utf-8")
    with pytest.raises(ValueError, match="meta has 2 layers and says 3"):
        checkpoints.load(folder)


def shaped(folder, width, tied, **changes):
    """A folder in Meta's format of one layer of this width."""
    names = {"tok_embeddings": (8, width), "norm": (width,), "layers.0.attention_norm": (width,),
             "layers.0.ffn_norm": (width,), "layers.0.attention.wq": (width, width),
             "layers.0.attention.wk": (64, width), "layers.0.attention.wv": (64, width),
             "layers.0.attention.wo": (width, width), "layers.0.feed_forward.w1": (8, width),
             "layers.0.feed_forward.w2": (width, 8), "layers.0.feed_forward.w3": (8, width)}
    tensors = {f"{name}.weight": torch.ones(*shape).bfloat16() for name, shape in names.items()}
    tensors["output.weight"] = tensors["tok_embeddings.weight"] * (1 if tied else 2)
    folder.mkdir()
    torch.save(tensors, folder / META)
    params = {"dim": width, "n_layers": 1, "n_heads": width // 64, "n_kv_heads": 1,
              "vocab_size": 8, "rope_theta": 500000.0, "use_scaled_rope": True, **changes}
    (folder / "params.json").write_text(json.dumps(params), "utf-8")
    return folder


def test_the_rope_factor_of_a_release_is_told_by_its_shape_or_asked_for(tmp_path):
    """Their params.json have the same keys, none of them with the factor."""
    assert checkpoints.ROPE_FACTORS == {(2048, True): 32, (3072, True): 32, (4096, False): 8,
                                        (8192, False): 8, (16384, False): 8}
    cases = [(2048, True, {}, 32), (4096, False, {}, 8), (4096, False, {"dim": 4096}, 8),
             (2048, False, {"rope_scaling_factor": None}, None), (4096, True, {}, None),
             (128, False, {}, None), (128, True, {}, None),
             (128, True, {"rope_scaling_factor": 16.0, "rope_high_freq_factor": 1.5}, 16),
             (128, True, {"use_scaled_rope": False}, "unscaled")]
    for number, (width, tied, changes, factor) in enumerate(cases):
        folder = shaped(tmp_path / str(number), width, tied, **changes)
        if factor is None:
            with pytest.raises(ValueError, match=r'to params.json: "rope_scaling_factor": 32.0 as'):
                checkpoints.load(folder)
            continue
        checkpoints.main([str(folder), str(tmp_path / f"{number} plain")])
        raw = json.loads((tmp_path / f"{number} plain" / "config.json").read_text("utf-8"))
        assert (raw["rope_scaling"] or {"factor": "unscaled"})["factor"] == factor
        if "rope_high_freq_factor" in changes:
            assert raw["rope_scaling"]["high_freq_factor"] == 1.5
    folder = shaped(tmp_path / "text", 128, True, use_scaled_rope="false")
    with pytest.raises(ValueError, match=r"use_scaled_rope is 'false'; expected true or false"):
        checkpoints.load(folder)


class Twice(dict):
    """What is written as a dict that has a name twice, as no dict has."""

    def __reduce__(self):
        return OrderedDict, (), None, None, iter([*self.items(), *self.again])


def test_what_is_no_llama_in_metas_format_is_refused_and_never_executed(tmp_path):
    folder = to_meta(random_llama(), tmp_path / "meta")
    good = torch.load(folder / META, weights_only=True)
    embedding, norm = good["tok_embeddings.weight"], good["norm.weight"]
    twice = Twice(good)
    twice.again = [("norm.weight", norm + 1)]

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    large = torch.ones(1).expand(10**9)
    cases = [
        ({"tok_embeddings.weight": Evil()}, ""), ({"layers": torch.ones(1)}, "KeyError"),
        ({3: torch.ones(1)}, ""), ([1], ""), ({"tok_embeddings.weight": 5}, ""),
        ({"tok_embeddings.weight": torch.ones(2, 2).int()}, "KeyError"),
        ({**good, "norm.weight": norm.int()}, None),
        # a name twice: the last of them would win
        (twice, "a name is there twice"),
        ({**good, "lm_head.weight": embedding + 1}, "lm_head.weight is there under another"),
        ({**good, "model.norm.weight": norm + 1}, "model.norm.weight is there under another"),
        ({**good, "layers.1.attention.wq.weight": large}, "larger than the file"),
        ({**good, **{f"layers.{k}.attention.wq.weight": embedding for k in range(99)}}, "larger"),
    ]
    for what, message in cases:
        torch.save(what, folder / META)
        words = "meta holds no Llama in Meta's format: "
        if message is None:
            words = message = "holds whole numbers"
        with pytest.raises(ValueError, match=words) as error:
            checkpoints.load(folder)
        assert message in str(error.value) and str(error.value).startswith(str(folder))
        assert "weights_only" not in str(error.value)  # no advice to execute it
    assert not (tmp_path / "executed").exists()

    torch.save(good, folder / META)
    whole = (folder / META).read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(norm.numpy().tobytes()) + 1] ^= 1  # torch itself does not look at checksums
    (folder / META).write_bytes(damaged)
    with pytest.raises(ValueError, match="its checksums are wrong"):
        checkpoints.load(folder)
    for how, words in (({"compression": zipfile.ZIP_DEFLATED}, "it is compressed"),
                       ({"twice": "/data/1"}, "a record is there twice")):
        again = how.pop("twice", None)
        (folder / META).write_bytes(whole)
        with (zipfile.ZipFile(folder / META) as old,
              zipfile.ZipFile(folder / "new", "w", **how) as new):
            for name in old.namelist():
                new.writestr(name, old.read(name))
                if again and name.endswith(again):
                    with pytest.warns(UserWarning, match="Duplicate"):
                        new.writestr(name, old.read(name)[::-1])
        (folder / "new").rename(folder / META)
        with pytest.raises(ValueError, match=words):
            checkpoints.load(folder)
    (folder / "consolidated.01.pth").touch()
    with pytest.raises(ValueError, match=r"split for several GPUs; expected one consolidated.00"):
        checkpoints.load(folder)


@pytest.mark.skipif(not SHARED.exists(), reason="needs stories260K beside the repository")
def test_stories260k_in_metas_layout_tells_its_story():
    tokenizers = pytest.importorskip("tokenizers")
    source = SHARED / "checkpoints" / "stories260k"
    model = checkpoints.load(source / "meta")
    ids = hestia.generate(model, torch.tensor([[1]]), 150, 512, temperature=0)[0].tolist()
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    text, story = tokenizer.decode(ids).strip(), source / "greedy_reference.txt"
    story = story.read_text("utf-8")
    assert len(text) > 250 and story.strip().startswith(text)


# --------------------------------------------------------------------------------------------------
# config.json, as transformers reads it


@pytest.fixture
def plain(tmp_path):
    return hestia.save_llama(random_llama(), tmp_path / "plain")


def changed(folder, **changes):
    """Change a folder's config.json. ...: the key goes."""
    raw = json.loads((folder / "config.json").read_text("utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(raw), "utf-8")
    return folder


SHORT = {**hestia.LLAMA3, "original_max_position_embeddings": 16}
NEWER = {**SHORT, "factor": 2.0, "rope_theta": 1000.0}
SPELLINGS = [
    {}, {"rope_scaling": None, "rope_parameters": NEWER}, {"rope_parameters": NEWER},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    {"rope_scaling": {}, "rope_parameters": NEWER}, {"rope_scaling": {**SHORT, "rope_theta": 77.0}},
    {"rope_scaling": ..., "rope_parameters": NEWER, "rope_theta": 10.0},
    {"rope_scaling": {**SHORT, "type": "linear"}}, {"rope_theta": ...},
    {"rope_scaling": {**SHORT, "rope_type": "default", "type": "llama3"}},
    {"rope_scaling": {"type" if key == "rope_type" else key: x for key, x in SHORT.items()}},
    {"original_max_position_embeddings": 64}, {"rope_theta": 500000}, {"rms_norm_eps": ...},
    {"original_max_position_embeddings": 64, "rope_scaling": ..., "rope_parameters": NEWER},
    {"rope_scaling": {"rope_type": "default", "factor": 8.0}}, {"head_dim": None},
]


@pytest.mark.parametrize("changes", SPELLINGS)
def test_spellings_of_rope_give_the_logits_of_transformers(changes, plain):
    transformers = pytest.importorskip("transformers")
    changed(plain, **changes)
    ours = checkpoints.load(plain)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
        again = checkpoints.load(hestia.save_llama(ours, plain.parent / "again"))
        assert torch.equal(again(ids), ours(ids))  # in one spelling


REFUSED = [
    {"rope_scaling": {**SHORT, "low_freq_factor": 8.0}}, {"rope_scaling": {**SHORT, "factor": "8"}},
    {"rope_scaling": {**SHORT, "low_freq_factor": 4.0}},
    {"rope_scaling": {**SHORT, "factor": True}},
    {"rope_scaling": {**SHORT, "rope_theta": None}}, {"rope_scaling": {**SHORT, "factor": 0}},
    {"rope_scaling": {**SHORT, "original_max_position_embeddings": None}},
    {"rope_scaling": {**SHORT, "factor": math.inf}},
    {"rope_scaling": {**SHORT, "factor": math.nan}},
    {"vocab_size": True}, {"vocab_size": 96.0}, {"num_hidden_layers": True}, {"rope_theta": "1e4"},
    {"tie_word_embeddings": "true"}, {"attention_bias": 0}, {"mlp_bias": "false"},
    {"num_attention_heads": 0, "head_dim": ...}, {"hidden_size": "32", "head_dim": ...},
    {"rms_norm_eps": math.nan}, {"hidden_size": [32]}, {"num_key_value_heads": -1},
]


@pytest.mark.parametrize("changes", REFUSED)
def test_values_of_another_kind_are_refused_in_a_sentence(changes, plain):
    (key, *_), (value, *_) = changes, changes.values()
    with pytest.raises(ValueError) as error:
        checkpoints.load(changed(plain, **changes))
    said = str(error.value)
    key = "rope_theta" if value == {**SHORT, "rope_theta": None} else key
    assert said.startswith(f"{plain}: {key} is ") and "; expected " in said and "\n" not in said


def test_valid_tensors_that_are_not_all_of_one_kind(plain):
    """Llama 1 stored its rotary frequencies. BF16 may stand beside F16."""
    transformers = pytest.importorskip("transformers")
    file = plain / "model.safetensors"
    tensors = {name: t.half() if "mlp" in name else t.bfloat16()
               for name, t in safetensors.load_file(file).items()}
    for k in range(2):
        tensors[f"model.layers.{k}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    file.unlink()
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    ours = checkpoints.load(plain)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    narrow = checkpoints.load(plain, torch.float16)
    assert {p.dtype for p in narrow.parameters()} == {torch.float16}
    for bad in (math.nan, math.inf):
        tensors["model.norm.weight"][3] = bad
        safetensors.save_file(tensors, file)
        with pytest.raises(ValueError, match="plain holds whole numbers, NaN or infinity"):
            checkpoints.load(plain)


# --------------------------------------------------------------------------------------------------
# folders, as people keep them


def hub_cache(source, root):
    """The same files as the Hub's cache has them: links into a folder of blobs."""
    model = root / "models--some--Llama"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for k, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, model / "blobs" / f"blob{k}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob{k}"))
    return snapshot


def test_folders_as_people_keep_them_load_as_in_transformers(plain, tmp_path):
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoModelForCausalLM.from_pretrained
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in names:
        (plain / name).write_text("{}", "utf-8")
    sharded, model = tmp_path / "sharded", checkpoints.load(plain)
    read(plain, dtype=torch.float32).save_pretrained(sharded, max_shard_size="20KB")
    assert len([*sharded.glob("model-*.safetensors")]) > 2
    spaces = shutil.copytree(plain, tmp_path / "mit Leerzeichen, 日本語 und ü")
    (spaces / "tokenizer_files").mkdir()  # not a file of the tokenizer
    fixed = shutil.copytree(plain, tmp_path / "fixed")
    for path in (*fixed.iterdir(), fixed):
        path.chmod(0o555 if path.is_dir() else 0o444)
    cache = hub_cache(plain, tmp_path)
    ids = torch.randint(0, 96, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for k, folder in enumerate((sharded, spaces, fixed, cache)):
            ours, theirs = checkpoints.load(folder), read(folder, dtype=torch.float32)
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5, folder
            target = tmp_path / f"neu {k} 日本語"
            checkpoints.main([str(folder), str(target)])
            assert same_weights(checkpoints.load(target), model)
            kept = {path.name for path in target.iterdir() if path.name.startswith(("t", "sp"))}
            assert kept == (set() if folder == sharded else {*names})
            assert not any(path.is_symlink() for path in target.iterdir())
    fixed.chmod(0o755)


def emptied(folder, *names):
    for name in names:
        (folder / name).unlink()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n"
SENTENCES = {  # what the sentence says: what is done to a plain folder
    "plain does not exist; expected a folder with config.json, model.safetensors": shutil.rmtree,
    "plain is no folder; expected a folder with config.json, ":
        lambda p: (shutil.rmtree(p), p.write_text("a model", "utf-8")),
    "plain is empty; expected a config.json or a params.json in it":
        lambda p: emptied(p, "config.json", "model.safetensors"),
    "plain holds no Llama; expected a config.json or a params.json": lambda p: (
        emptied(p, "config.json", "model.safetensors"), (p / "tokenizer.model").touch()),
    "plain is the Hub's cache of a model, which is in its snapshots/": lambda p: (
        emptied(p, "config.json", "model.safetensors"), (p / "snapshots").mkdir()),
    "plain is the Hub's cache; a model is in its models--OWNER--NAME/snapshots/": lambda p: (
        emptied(p, "config.json", "model.safetensors"), (p / "models--org--Some-1B").mkdir()),
    "plain holds a GGUF file, which is only written here, from the folder that it was": lambda p: (
        emptied(p, "config.json", "model.safetensors"), (p / "a.gguf").touch()),
    "plain is an adapter, which peft's merge_and_unload puts into its model; expected": lambda p: (
        emptied(p, "config.json", "model.safetensors"), (p / "adapter_config.json").touch()),
    "plain has no model.safetensors; copy or download model.safetensors again":
        lambda p: emptied(p, "model.safetensors"),
    "plain has no model.safetensors; of its pytorch_model.bin this makes them: python -c":
        lambda p: (emptied(p, "model.safetensors"), (p / "pytorch_model.bin").touch()),
    "plain has no b.safetensors; copy or download b.safetensors again": lambda p: (
        (p / "model.safetensors").rename(p / "a.safetensors"), (p / INDEX).write_text(
            '{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}', "utf-8")),
    "index.json has no weight_map with names of files; copy or download": lambda p: (
        emptied(p, "model.safetensors"), (p / INDEX).write_text('{"weight_map": [5]}', "utf-8")),
    "plain has no consolidated.00.pth; copy or download consolidated.00.pth again":
        lambda p: (p / "config.json").rename(p / "params.json"),
    "safetensors only says where its content is; get it by: git lfs pull":
        lambda p: (p / "model.safetensors").write_text(LFS, "utf-8"),
    "config.json holds no JSON object (it is a list); copy or download":
        lambda p: (p / "config.json").write_text("[1]", "utf-8"),
    "config.json holds no JSON object (Expecting ": lambda p: os.truncate(p / "config.json", 100),
    "config.json holds no JSON object ('utf-8' codec": lambda p: (p / "config.json").write_bytes(
        (p / "config.json").read_text("utf-8").encode("utf-16")),
    "config.json holds no JSON object (it is larger than 64 MiB)":
        lambda p: os.truncate(p / "config.json", 2**40),
}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("said", SENTENCES)
def test_each_wrong_folder_gets_its_own_sentence(said, plain):
    SENTENCES[said](plain)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        checkpoints.load(plain)
    assert str(error.value).startswith(str(plain)) and "\n" not in str(error.value)


def test_names_on_the_hub_are_not_taken_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.gguf").touch()
    with pytest.raises(ValueError, match=r"^a.gguf is a GGUF file, which is only written here, f"):
        checkpoints.load("a.gguf")
    with pytest.raises(ValueError, match=r"Hub: hf download org/Some-1.5B --local-dir X"):
        checkpoints.load("org/Some-1.5B")
    with pytest.raises(ValueError, match=r"^org/Some/Llama does not exist; expected a folder"):
        checkpoints.load("org/Some/Llama")


@pytest.mark.skipif(not SHARED.exists(), reason="needs stories260K beside the repository")
def test_the_command_for_pytorch_model_bin_makes_what_is_read_here(tmp_path):
    pytest.importorskip("transformers")
    pickled = tmp_path / "a pickle"
    shutil.copytree(SHARED / "checkpoints" / "stories260k", pickled, copy_function=shutil.copyfile)
    tensors = safetensors.load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin") as error:
        checkpoints.load(pickled)
    command = shlex.split(str(error.value).partition("this makes them: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    made = checkpoints.load(tmp_path / "NEW_FOLDER")
    assert torch.equal(made.model.norm.weight, tensors["model.norm.weight"])
    assert (tmp_path / "NEW_FOLDER" / "tokenizer.json").exists()


class Late(BaseException):
    """No `except Exception` catches it."""


@contextlib.contextmanager
def within(seconds, more_bytes):
    """Late after that time, MemoryError beyond so much more memory than there is now."""

    def late(*_):
        raise Late

    size = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size) + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "broken link"])
def test_only_regular_files_are_read(kind, plain, tmp_path):
    meta = to_meta(random_llama(), tmp_path / "meta")
    sharded = shutil.copytree(plain, tmp_path / "sharded")
    (sharded / "model.safetensors").rename(sharded / "a.safetensors")
    (sharded / INDEX).write_text('{"weight_map": {"w": "a.safetensors"}}', "utf-8")
    files = [plain / "config.json", plain / "model.safetensors", meta / "params.json", meta / META,
             sharded / INDEX, sharded / "a.safetensors"]
    ends = []
    for file in files:
        content = file.read_bytes()
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
            ends.append(os.open(file, os.O_RDWR))  # or a reader may wait where no signal ends it
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero" if kind == "endless" else "nowhere")
        for load in (checkpoints.load, hestia.load_llama):
            if load is hestia.load_llama and meta in file.parents:
                continue
            with within(10, 2**28), pytest.raises(ValueError) as error:
                load(file.parent)
            assert file.name in str(error.value) and str(file.parent) in str(error.value)
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_bytes(content)
        assert checkpoints.load(file.parent)
    for end in ends:
        os.close(end)


def test_a_tensor_in_two_shards_is_refused(plain):
    tensors = safetensors.load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    safetensors.save_file(tensors, plain / "a.safetensors")
    safetensors.save_file({"model.norm.weight": torch.ones(32)}, plain / "b.safetensors")
    named = {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}
    (plain / INDEX).write_text(json.dumps({"weight_map": named}), "utf-8")
    with pytest.raises(ValueError, match=r'Unexpected key.* "model.norm.weight again"'):
        checkpoints.load(plain)


# --------------------------------------------------------------------------------------------------
# damage

JUNK = [None, True, "x", "", -1, 0, 3, 1.5, 2**40, 10**400, math.inf, math.nan, [], {}, "../x"]
TARGETS = ("header", "payload", "index", "config.json", "params.json", "pth")


def edit_header(file, rng):
    """Change what a safetensors file says of its tensors."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    name, other = rng.sample([key for key in header if key != "__metadata__"], 2)
    kind = rng.choice(["dtype", "shape", "offsets", "name", "gone", "junk", "twice", "length"])
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "F64", "F8_E4M3", "BOOL", "F99", 5])
    elif kind == "shape":
        header[name]["shape"] = rng.choice([[2**62], [], [-1], [0], [1, 2**31, 2**31], "x", [1.5]])
    elif kind == "offsets":
        header[name]["data_offsets"] = rng.choice([[0, 4], [-4, 0], [0, 2**62], [8, 0], []])
    elif kind == "name":
        header[rng.choice([other, name + "x", "model.layers.7.x", ""])] = header.pop(name)
    elif kind == "gone":
        del header[name]
    elif kind == "junk":
        header[rng.choice([name, "__metadata__", "more"])] = rng.choice(JUNK)
    text = json.dumps(header)
    if kind == "twice":
        text = text.replace(f'"{name}"', f'"{other}"')
    length = rng.choice([0, 1, 2**63, 2**40, 10**8]) if kind == "length" else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text.encode() + rest)


def edit_json(file, rng):
    """Put something else at a random place of a JSON file."""
    found = json.loads(file.read_text("utf-8"))
    inner = rng.choice([found, *(x for x in found.values() if isinstance(x, dict) and x)])
    key = rng.choice([*inner])
    kind = rng.choice(["junk", "junk", "gone", "deep", "long"])
    if kind == "gone":
        del inner[key]
    else:
        inner[key] = rng.choice(JUNK)
    text = json.dumps(found)
    if kind == "deep":
        text = "[" * 10**5
    elif kind == "long":
        text = text[:-1] + " " * 10**7
    file.write_text(text, "utf-8")


def edit_pth(file, rng, marker):
    """Change what a .pth holds: names, kinds, sizes, or something to execute."""

    class Evil:
        def __reduce__(self):
            return rng.choice([(os.mkdir, (marker,)), (exec, (f"open({marker!r}, 'w')",))])

    stored = torch.load(file, weights_only=True)
    name = rng.choice([key for key in stored if key != "rope.freqs"])
    kind = rng.choice(["evil", "twice", "name", "gone", "dtype", "large", "shape", "junk", "zip"])
    if kind == "evil":
        stored[rng.choice([name, "more"])] = Evil()
    elif kind == "twice":
        again = [(name, torch.ones_like(stored[name]))]
        stored = Twice(stored)
        stored.again = again
    elif kind == "name":
        stored[rng.choice([name + "x", "layers.5." + name, "norm"])] = stored.pop(name)
    elif kind == "gone":
        del stored[name]
    elif kind == "dtype":
        stored[name] = stored[name].to(rng.choice([torch.int32, torch.bool, torch.complex64]))
    elif kind == "large":
        stored[name] = torch.ones(1).expand(10**rng.choice([6, 9, 12]))
    elif kind == "shape":
        stored[name] = stored[name][..., :-1].clone()
    elif kind == "junk":
        stored[rng.choice([name, "more"])] = rng.choice(JUNK)
    torch.save(stored, file)
    if kind == "zip":  # a record that unpacks to a thousand times its size
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as more:
            more.writestr("archive/data/99", bytes(10**8))


def corrupt(root, n, rng):
    """One corruption of a folder. Returns the folder, and whether other weights may come of it."""
    target = TARGETS[n % len(TARGETS)]
    source = {"index": "sharded", "params.json": "meta", "pth": "meta"}.get(target, "plain")
    folder = shutil.copytree(root / source, root / "broken")
    names = {"header": "model.safetensors", "payload": "model.safetensors", "pth": META,
             "index": INDEX}
    file = folder / names.get(target, target)
    edit = {"header": edit_header, "index": edit_json, "config.json": edit_json,
            "params.json": edit_json, "pth": lambda *a: edit_pth(*a, str(root / "executed"))}
    if target == "payload":
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        for _ in range(rng.choice([1, 1, 100])):
            content[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif target == "header" and rng.random() < 0.3:
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        content[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
    elif rng.random() < 0.4 and target != "header":
        damage(file, rng)
    else:
        edit[target](file, rng)
    return folder, target == "payload"


def try_corruptions(count, seed, root):
    """Load that many damaged folders, in little memory and time. Returns how many were refused."""
    root, refused = Path(root), 0
    model = random_llama(tie_word_embeddings=False)
    plain = hestia.save_llama(model, root / "plain")
    to_meta(model, root / "meta")
    sharded = shutil.copytree(plain, root / "sharded")
    tensors = safetensors.load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    named = {name: f"{k % 3}.safetensors" for k, name in enumerate(tensors)}
    for file in {*named.values()}:
        safetensors.save_file({name: t for name, t in tensors.items() if named[name] == file},
                              sharded / file)
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}), "utf-8")
    for folder in ("plain", "meta", "sharded"):
        assert same_weights(checkpoints.load(root / folder), model)
    for n in range(count):
        folder, free = corrupt(root, n, random.Random(f"{seed} {n}"))
        try:
            with within(10, 2**28):
                found = checkpoints.load(folder)
            weights = [*found.parameters()]
            same = same_weights(found, model)
            assert same or (free and all(w.isfinite().all() for w in weights))
        except ValueError as error:
            said, refused = str(error), refused + 1
            assert said.startswith(str(folder)) and "\n" not in said and len(said) < 1000, (n, said)
        except BaseException as error:
            raise AssertionError(f"corruption {n} of seed {seed}") from error
        assert not (root / "executed").exists(), n
        shutil.rmtree(folder)
    return refused


def corruptions_in_a_process(count, seed, root):
    """Of its own, whose memory is limited."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoints as t; "
            f"print('refused', t.try_corruptions({count}, {seed}, {str(root)!r}))")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], text=True,
                          capture_output=True, cwd=Path(hestia.__file__).parent, timeout=60 + count)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"{count} corruptions in {time.perf_counter() - began:.0f} s: {done.stdout}")
    return int(done.stdout.split("refused ")[1])


def test_forty_corruptions(tmp_path):
    assert corruptions_in_a_process(40, 0, tmp_path) > 20


@pytest.mark.slow
def test_469_corruptions(tmp_path):
    assert corruptions_in_a_process(469, 1, tmp_path) > 250


# --------------------------------------------------------------------------------------------------
# the command


def test_the_command_that_load_llama_names_converts_and_round_trips(tmp_path):
    model = ternary_llama(rope_scaling=hestia.LLAMA3)
    meta = to_meta(model, tmp_path / "meta")
    (meta / "tokenizer.json").write_text("{}", "utf-8")
    for source, target, more in (("meta", "plain", []), ("plain", "packed", ["--packed"]),
                                 ("packed", "again", []), ("meta", "direct", ["--packed"])):
        if source != "plain":  # the others hestia.load_llama refuses, with this command
            with pytest.raises(ValueError, match="NEW_FOLDER") as refused:
                hestia.load_llama(tmp_path / source)
            command = "python -m notebooks.lab.checkpoints " + str(tmp_path / source)
            assert f": {command} NEW_FOLDER" in str(refused.value)
        folders = [str(tmp_path / source), str(tmp_path / target)]
        checkpoints.main([*folders, *more, "--group-size", "16"])
        converted = checkpoints.load(tmp_path / target)
        assert same_weights(converted, model) and converted.config == model.config
        assert (tmp_path / target / "tokenizer.json").read_text("utf-8") == "{}"
    read = lambda folder, file: (tmp_path / folder / file).read_bytes()
    assert read("plain", "config.json") == read("again", "config.json")
    for file in ("config.json", "model.safetensors"):
        assert read("packed", file) == read("direct", file)
    assert json.loads(read("plain", "config.json"))["eos_token_id"] == 128001


def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, capsys):
    good = hestia.save_llama(random_llama(), tmp_path / "good")

    def broken(name, config, weights=None):
        folder = shutil.copytree(good, tmp_path / name)
        (folder / "config.json").write_text(config, "utf-8")
        if weights:
            (folder / "model.safetensors").write_text(weights, "utf-8")
        return folder

    raw, target = json.loads((good / "config.json").read_text("utf-8")), tmp_path / "target"
    config = lambda **changes: json.dumps({**raw, **changes})
    cases = [
        ([tmp_path / "nowhere", target], "nowhere does not exist; expected a folder"),
        ([good, good], "good is not an empty folder; name another"),
        ([good, target, "--packed", "--group-size", "16"], "target was not made: model"),
        ([good, target, "--packed", "--group-size", "24"], "group size 24 does not divide"),
        ([broken("a", "{"), target], "config.json holds no JSON object (Expecting"),
        ([broken("b", "[1]"), target], "b/config.json holds no JSON object (it is a list"),
        ([broken("c", config(), "damaged"), target], "c is damaged, or holds no Llama (Saf"),
        ([broken("d", config(hidden_size=16)), target], "size mismatch"),
        ([broken("e", config(quantization_config={"bits": 4})), target], "quantized otherwise"),
        ([broken("f", config(vocab_size="big")), target], "f: vocab_size is 'big'; expected"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            checkpoints.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and message in said and said.count("\n") == 1, said
        assert not target.exists()


# --------------------------------------------------------------------------------------------------
# what a run leaves


def test_a_run_leaves_folders_to_publish_whose_losses_are_those_it_says(tmp_path, monkeypatch):
    for package in ("gguf", "tokenizers"):
        pytest.importorskip(package)
    from test_gguf_file import a_tokenizer

    narrow = random_llama(vocab_size=512, hidden_size=64).bfloat16()
    source = hestia.save_llama(narrow, tmp_path / "models--org--Some-1B" / "snapshots" / "0a")
    a_tokenizer(source, "gpt-2")
    (source / "README.md").write_text("---\nlicense: mit\n---\nTheirs.\nlicense: x", "utf-8")
    for name in ("LICENSE.txt", "USE_POLICY.md", "added_tokens.json", "generation_config.json"):
        (source / name).write_text("{}", "utf-8")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}", "utf-8")
    text, out = tmp_path / "secret" / "text.txt", tmp_path / "out"
    text.parent.mkdir()
    text.write_text(Path(hestia.__file__).read_text("utf-8")[:20000], "utf-8")
    arguments = ["--llama", source, "--data", text, "--out", out, "--preset", "cpu", "--methods",
                 "full", "absmean", "--steps", 3, "--batch-size", 2, "--block-size", 32,
                 "--group-size", 64, "--eval-tokens", 512, "--packed", "--gguf", "--device", "cpu"]
    old = os.umask(0o022)
    try:
        assert train_tiny.main([str(a) for a in arguments]) == 0
    finally:
        os.umask(old)
    made = {path.name for path in out.iterdir() if "seed0" in path.name}
    assert made == {"full-seed0", "absmean-seed0", "absmean-seed0-packed", "absmean-seed0.gguf"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.rglob("*") if path.is_file())

    results = json.loads((out / "results.json").read_text("utf-8"))
    config = train_tiny.parse([str(a) for a in arguments])
    train_tiny.check(config)
    tokens, _ = train_tiny.load_text(config)
    for name in ("full-seed0", "absmean-seed0", "absmean-seed0-packed"):
        row = results["per_seed"][0][name.split("-")[0]]
        model = checkpoints.load(out / name, torch.float32)
        assert train_tiny.losses(config, model, tokens) == {k: row[k] for k in ("train", "val")}
        stored = safetensors.load_file(out / name / "model.safetensors")
        kinds = {key: t.dtype for key, t in stored.items() if "proj" not in key}
        assert len(kinds) == 6 and {*kinds.values()} == {torch.bfloat16}
        moved = stored["model.embed_tokens.weight"] != narrow.model.embed_tokens.weight
        assert moved.any()  # it was trained, in float32

        card = (out / name / "README.md").read_text("utf-8")
        front, _, rest = card.removeprefix("---\n").partition("---\n")
        assert front.splitlines() == [
            'base_model: "org/Some-1B"', "license: mit", "library_name: transformers",
            "tags: [ternary, quantization-aware-training, hestia]"]
        assert results["data"]["sha256"] in rest and "| text | text.txt |" in rest
        before = results["per_seed"][0]["before"]
        assert f"| val | {before['val']:.4f} | {row['val']:.4f} |" in rest
        assert "secret" not in card and "Theirs" not in card
        assert ("one scale per 64 weights" in rest) == (name != "full-seed0")
        for file in ("LICENSE.txt", "USE_POLICY.md", "added_tokens.json", "generation_config.json",
                     "tokenizer.json", "additional_chat_templates/tool.jinja"):
            assert (out / name / file).is_file(), file


def test_gguf_is_refused_before_a_training_that_it_cannot_hold(tmp_path):
    source = str(hestia.save_llama(random_llama(hidden_size=64), tmp_path / "source"))
    check = lambda **more: train_tiny.check(train_tiny.Config(device="cpu", gguf=True, **more))
    with pytest.raises(ValueError, match="--gguf needs --llama; expected the folder"):
        check()
    with pytest.raises(ValueError, match=r"groups of 32 weights \(model.layers.0.*64"):
        check(data="x", llama=source, group_size=32)
    with pytest.raises(ValueError, match="--gguf cannot hold what int2 leaves"):
        check(data="x", llama=source, methods=("int2",))
    check(data="x", llama=source, group_size=0)
