"""lab/gguf_file.py against the gguf package, blocks and rotations by hand, and llama.cpp."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoints import random_llama, ternary_llama

import hestia
from notebooks.lab import checkpoints, gguf_file

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
SHARED = Path(hestia.__file__).resolve().parent.parent / "shared"
WIDE = dict(hidden_size=768, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=1)
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
HEADS = {"attn_q": 4, "attn_k": 2}
TEXT = "Once upon a time, there were 12345 cats' dogs!  Two\n\n spaces, an é and 日本."


def by_hand(w, kind):
    """The weights (out, in) that a tensor of a file stands for, by other readers than ours."""
    data = np.asarray(w["data"])
    if kind != "Q2_0":
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(w["shape"])
    block = np.frombuffer(data.tobytes(), [("scale", "<f2"), ("codes", "u1", 16)])
    low, high = np.unpackbits(block["codes"], bitorder="little").reshape(-1, 64, 2).T  # (64, n)
    t = low.astype("f4") + 2 * high - 1
    return (t * block["scale"].astype("f4")).T.reshape(w["shape"])


def contents(path, monkeypatch):
    """{name: {"type", "shape", "data"}} and {key: value}, by gguf's reader, which learns Q2_0."""
    member = int.__new__(gguf.GGMLQuantizationType, 42)
    member._name_, member._value_ = "Q2_0", 42
    monkeypatch.setitem(gguf.GGMLQuantizationType._value2member_map_, 42, member)
    monkeypatch.setitem(gguf.constants.GGML_QUANT_SIZES, member, (64, 18))
    reader = gguf.GGUFReader(path)
    found = {t.name: {"type": t.tensor_type.name, "shape": t.shape[::-1].tolist(), "data": t.data}
             for t in reader.tensors}
    return found, {key: field.contents() for key, field in reader.fields.items()}


def interleaved(w, heads):
    """Rows of each head in pairs: 0, half, 1, half + 1, ... by a loop."""
    rows = []
    for head in w.split(len(w) // heads):
        half = len(head) // 2
        for k in range(half):
            rows += [head[k], head[half + k]]
    return torch.stack(rows)


def test_a_block_of_q2_0_worked_by_hand():
    w = torch.zeros(1, 128)
    w[0, :5] = torch.tensor([0.375, -0.375, 0.0, 0.375, -0.375])
    w[0, 127] = -2.0
    first = [0x00, 0x36, 0b10_01_00_10, 0b01_01_01_00] + 14 * [0b01_01_01_01]  # 0.375 is 0x3600
    second = [0x00, 0x40] + 15 * [0b01_01_01_01] + [0b00_01_01_01]
    data = gguf_file.encode(w, "Q2_0")
    assert data.tolist() == [first + second]
    assert torch.equal(gguf_file.decode(data, "Q2_0", [1, 128]), w)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q2_0", "BF16", "F16", "F32"])
@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": False}, {"rope_scaling": None},
    {"attention_bias": True, "mlp_bias": True}])
def test_each_type_read_by_another_reader_has_our_weights(kind, changes, tmp_path, monkeypatch):
    model = ternary_llama(256, **WIDE, **changes)
    path = tmp_path / "new" / "a.gguf"
    assert gguf_file.save_gguf(model, path, kind)[0] == kind
    assert [p.name for p in path.parent.iterdir()] == ["a.gguf"]
    found, keys = contents(path, monkeypatch)
    read = lambda name: torch.tensor(by_hand(found[name], found[name]["type"]))
    ours = dict(model.named_parameters())
    count = 3 + (not model.config.tie_word_embeddings)
    for theirs, name in NAMES.items():
        for ending in ("weight", "bias"):
            w = ours.get(f"model.layers.0.{name}.{ending}")
            if w is None:
                continue
            w = interleaved(w, HEADS[theirs]) if theirs in HEADS else w
            tensor = f"blk.0.{theirs}.{ending}"
            assert torch.equal(read(tensor), w), tensor
            assert found[tensor]["type"] == (kind if ending == "weight" else "F32")
            count += 1
    for theirs, name in {"token_embd": "model.embed_tokens", "output_norm": "model.norm",
                         "blk.0.attn_norm": "model.layers.0.input_layernorm",
                         "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
                         "output": "lm_head"}.items():
        if f"{name}.weight" in ours:
            assert torch.equal(read(f"{theirs}.weight"), ours[f"{name}.weight"])
    if model.config.rope_scaling:
        count += 1
        # waves within the original context: below 1 none, above 4 whole, and between a mixture
        slower, r = [], model.config.rope_scaling
        for k in range(96):
            waves = 16 * 500000.0 ** (-k / 96) / (2 * np.pi)
            smooth = min(1.0, max(0.0, (waves - 1.0) / 3.0))
            slower.append(1 / ((1 - smooth) / r["factor"] + smooth))
        torch.testing.assert_close(read("rope_freqs.weight"), torch.tensor(slower), rtol=1e-4,
                                   atol=0)
    assert len(found) == count + 1
    file_types = {t.name: int(t) for t in gguf.LlamaFileType} | {"MOSTLY_Q2_0": 41}
    expected = file_types["ALL_F32" if kind == "F32" else "MOSTLY_" + kind]
    assert (keys["general.file_type"], keys["general.architecture"]) == (expected, "llama")
    assert (keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"],
            keys["llama.rope.dimension_count"]) == (4, 2, 192)
    assert keys["tokenizer.ggml.model"] == "none"  # this model has no folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", range(16, 385, 16))
def test_every_group_size_is_exact_or_refused(size, tied, tmp_path, monkeypatch):
    width = size * (4 if size <= 192 else 2)
    shape = {**WIDE, "hidden_size": width, "intermediate_size": width}
    model = ternary_llama(size, tie_word_embeddings=tied, **shape)
    ours = dict(model.named_parameters())
    for kind, block in {"TQ2_0": 256, "TQ1_0": 256, "Q2_0": 64, "BF16": 1}.items():
        path = tmp_path / f"{kind}.gguf"
        if size % block:
            with pytest.raises(ValueError, match=r"--type \w+ would do"):
                gguf_file.save_gguf(model, path, kind)
            assert not path.exists()
            continue
        gguf_file.save_gguf(model, path, kind)
        found, _ = contents(path, monkeypatch)
        for theirs, name in NAMES.items():
            w, there = ours[f"model.layers.0.{name}.weight"], found[f"blk.0.{theirs}.weight"]
            w = interleaved(w, HEADS[theirs]) if theirs in HEADS else w
            assert there["type"] == kind and torch.equal(torch.tensor(by_hand(there, kind)), w)
        head = found.get("output.weight", found["token_embd.weight"])
        w = ours["model.embed_tokens.weight" if tied else "lm_head.weight"]
        assert torch.equal(torch.tensor(by_hand(head, head["type"])), w)
        assert ("output.weight" in found) is not tied


def test_the_weights_choose_the_type_and_a_refusal_names_another(tmp_path):
    cases = {16: None, 32: None, 48: None, 64: "Q2_0", 96: None, 128: "Q2_0", 192: "Q2_0",
             256: "TQ2_0", 384: "Q2_0", 768: "TQ2_0", None: "TQ2_0"}
    for size, best in cases.items():
        model = ternary_llama(size, **WIDE)
        assert checkpoints.find_group_size(model) == (size or 768)
        if best:
            assert gguf_file.choose(model)[0] == best
        else:
            with pytest.raises(ValueError, match=r"as Q2_0 needs; --type BF16 would do; .* 256"):
                gguf_file.choose(model)
        if best != "TQ2_0":
            other = "Q2_0" if best else "BF16"
            with pytest.raises(ValueError, match=f"in each 256 .*TQ1_0 needs; --type {other} wo"):
                gguf_file.save_gguf(model, tmp_path / "a.gguf", "TQ1_0")
    with pytest.raises(ValueError, match=r"BF16 would round .*q_proj; --type F32 would do"):
        gguf_file.choose(random_llama(), "BF16")
    narrow = ternary_llama(64, hidden_size=64)  # no multiple of 256, with one scale per matrix too
    assert gguf_file.choose(narrow)[0] == "Q2_0"
    layer = model.model.layers[0].mlp.up_proj.weight
    layer.data *= 2.0**-30
    assert gguf_file.choose(model, "BF16")  # float16 would take these scales for 0
    with pytest.raises(ValueError, match="up_proj is no -gamma"):
        gguf_file.choose(model)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_that_is_not_whole(tmp_path, monkeypatch):
    model, path = ternary_llama(256, **WIDE), tmp_path / "a.gguf"
    good = gguf_file.encode

    def one_bit_off(w, kind):
        data = good(w, kind).copy()
        if kind == "Q2_0":
            data[-1, -1] ^= 16
        return data

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "encode", one_bit_off)
        with pytest.raises(RuntimeError, match=r"blk.0.* reads back differently"):
            gguf_file.save_gguf(model, path, "Q2_0")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            gguf_file.save_gguf(model, path)
    assert not list(tmp_path.iterdir())
    path.touch()
    with pytest.raises(FileExistsError, match="is there already"):
        gguf_file.save_gguf(model, path)
    path.unlink()
    old = os.umask(0o022)
    try:
        gguf_file.save_gguf(model, path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


# --------------------------------------------------------------------------------------------------
# tokenizers and what else a folder holds


def a_tokenizer(folder, cut):
    """A small byte-level BPE whose text is cut as in Llama 3, SmolLM or GPT-2, in a folder."""
    pre = tokenizers.pre_tokenizers
    whole = pre.ByteLevel(add_prefix_space=False, use_regex=cut != "llama-bpe")
    llama3 = next(regex for regex, name in gguf_file.CUTS.items() if name == "llama-bpe")
    steps = {"llama-bpe": [pre.Split(tokenizers.Regex(llama3), "isolated"), whole],
             "smollm": [pre.Digits(individual_digits=True), whole], "gpt-2": [whole]}[cut]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=cut == "llama-bpe"))
    made.pre_tokenizer = pre.Sequence(steps) if len(steps) > 1 else whole
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet())
    made.train_from_iterator([Path(hestia.__file__).read_text("utf-8")], trainer)
    made.add_tokens(["<tool>"])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return made


def a_folder(tmp_path, cut="llama-bpe", group_size=256, **changes):
    """A ternary Llama with a tokenizer, a licence and a card."""
    model = ternary_llama(group_size, **{**WIDE, "vocab_size": 512, **changes})
    folder = hestia.save_llama(model, tmp_path / "source")
    tokenizer = a_tokenizer(folder, cut)
    (folder / "LICENSE").write_text("Of the owner.", "utf-8")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nbase_model: org/Some-1B\n---\n# A card\n", "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}", "utf-8")
    return model, folder, tokenizer


@pytest.mark.parametrize("cut", ["llama-bpe", "smollm", "gpt-2"])
def test_tokens_licence_and_templates_are_in_the_file(cut, tmp_path, monkeypatch, capsys):
    _, folder, tokenizer = a_folder(tmp_path, cut)
    path = tmp_path / "a.gguf"
    checkpoints.main([str(folder), "--gguf", str(path)])
    assert "TQ2_0: each 256 weights of a row share a scale" in capsys.readouterr().out
    _, keys = contents(path, monkeypatch)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    vocabulary = tokenizer.get_vocab()
    assert len(tokens) == 512 and all(tokens[i] == text for text, i in vocabulary.items())
    assert types[0] == types[1] == 3 and types[vocabulary["<tool>"]] == 4  # control, user-defined
    assert types[2:500] == 498 * [1] and types[len(vocabulary) :] == (512 - len(vocabulary)) * [5]
    merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert keys["tokenizer.ggml.pre"] == cut and keys["tokenizer.chat_template"]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/org/Some-1B"


def test_other_tokenizers_are_refused(tmp_path, capsys):
    _, folder, _ = a_folder(tmp_path)
    file = folder / "tokenizer.json"
    good = json.loads(file.read_text("utf-8"))
    other = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\w+"}}, {"type": "ByteLevel"}]}
    for change, said in [({"pre_tokenizer": other}, r"in a way not known here (\w+); expected"),
                         ({"normalizer": {"type": "NFC"}}, "in a way not known here"),
                         ({"model": {**good["model"], "type": "Unigram"}}, "another kind than BPE"),
                         ({"model": 5}, "TypeError"), (None, "no tokenizer.json")]:
        if change:
            file.write_text(json.dumps({**good, **change}), "utf-8")
        else:
            file.rename(folder / "tokenizer.model")
        with pytest.raises(SystemExit) as stopped:
            checkpoints.main([str(folder), str(tmp_path / "a.gguf"), "--gguf"])
        found = capsys.readouterr().err
        assert stopped.value.code == 2 and said in found and found.count("\n") == 1, found
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# --------------------------------------------------------------------------------------------------
# llama.cpp, where node-llama-cpp is installed: NODE_LLAMA_CPP=the folder with its node_modules

ENGINE = """
import fs from "fs";
const [where, file, asked, answer] = process.argv.slice(2);
const {getLlama} = await import(where);
const {ids, text} = JSON.parse(asked);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const sequence = (await model.createContext({contextSize: 256, threads: 1})).getSequence();
const found = await sequence.controlledEvaluate(
  ids.map(id => [id, {generateNext: {probabilities: true}}]));
fs.writeFileSync(answer, JSON.stringify({tokens: model.tokenize(text, false),
  probs: found.map(x => [...x.next.probabilities.entries()])}));
process.exit(0);
"""


def engine(path, ids):
    """(log-probabilities (T, V), the tokens of TEXT) by llama.cpp."""
    root = Path(os.environ.get("NODE_LLAMA_CPP", Path(hestia.__file__).parent)).resolve()
    module = root / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    if not shutil.which("node") or not module.exists():
        pytest.skip("needs npm install node-llama-cpp, and NODE_LLAMA_CPP, the folder of it")
    asked = json.dumps({"ids": ids, "text": TEXT})
    script = path.with_suffix(".mjs")
    script.write_text(ENGINE, "utf-8")
    answer = path.with_suffix(".json")
    done = subprocess.run(["node", str(script), str(module), str(path), asked, str(answer)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(answer.read_text("utf-8"))
    probs = torch.zeros(len(ids), 1 + max(token for token, _ in found["probs"][0]))
    for position, pairs in enumerate(found["probs"]):
        for token, p in pairs:
            probs[position, token] = p
    return probs.clamp(min=1e-12).log(), found["tokens"]


def same_as_in_llama_cpp(model, path, tokenizer, most):
    ids = torch.randint(3, 500, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids)[0].log_softmax(-1)
    theirs, tokens = engine(path, ids[0].tolist())
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean()
    print(f"{path.name}: mean KL {kl:.1e}")
    assert kl < most and tokens == tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert (ours.exp().amax(-1) > 2 / 512).any()  # these logits are not all alike


@pytest.mark.parametrize("kind, cut, changes", [
    ("TQ2_0", "llama-bpe", {}), ("TQ1_0", "smollm", {"tie_word_embeddings": False}),
    ("Q2_0", "gpt-2", {"rope_scaling": None}), ("BF16", "llama-bpe", {}), ("F32", "smollm", {})])
def test_llama_cpp_gives_our_logits_and_tokens(kind, cut, changes, tmp_path):
    model, folder, tokenizer = a_folder(tmp_path, cut, **changes)
    gguf_file.save_gguf(checkpoints.load(folder), tmp_path / "a.gguf", kind)
    most = {"F32": 1e-5, "BF16": 1e-3}.get(kind, 1e-2)
    same_as_in_llama_cpp(model, tmp_path / "a.gguf", tokenizer, most)


@pytest.mark.skipif(not SHARED.exists(), reason="needs stories260K beside the repository")
def test_llama_cpp_reads_stories260k_with_its_sentencepiece(tmp_path):
    source = SHARED / "checkpoints" / "stories260k"
    model = checkpoints.load(source)
    hestia.Hestia(model, 1, group_size=None, tau_init=0.3).harden()
    gguf_file.save_gguf(model, tmp_path / "a.gguf", "BF16")
    tokenizer = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    same_as_in_llama_cpp(model, tmp_path / "a.gguf", tokenizer, 1e-3)


def test_checkpoints_does_without_gguf():
    code = ("import sys; sys.modules['gguf'] = None; from notebooks.lab import checkpoints; "
            "checkpoints.main(['-h'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(hestia.__file__).parent)
    assert done.returncode == 0 and re.search("--gguf", done.stdout)
