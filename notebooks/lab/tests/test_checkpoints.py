"""lab/checkpoints.py against layouts written by hand, transformers, and Meta's own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import hestia
from notebooks.lab import checkpoints

safetensors = pytest.importorskip("safetensors.torch")
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
    rows = sum(len(layer.weight) for layer in hestia.linear_layers(model).values())
    weights = sum(layer.weight.numel() for layer in hestia.linear_layers(model).values())
    assert bits == 2 * weights + 16 * (weights // 16 if group_size else rows)

    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - again(ids)).abs().max() < 2e-4


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
    (target / "kept").write_text("")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        checkpoints.save_packed(model, target, 16)
    assert [p.name for p in target.iterdir()] == ["kept"]


def test_packed_folders_that_do_not_fit_are_refused(tmp_path):
    good = checkpoints.save_packed(ternary_llama(), tmp_path / "packed", 16)
    weight = "model.layers.0.mlp.up_proj.weight"

    def tensors(ending, value):
        def change(folder):
            file = folder / "model.safetensors"
            found = safetensors.load_file(file) | {weight + ending: value}
            file.unlink()
            safetensors.save_file({name: t for name, t in found.items() if t is not None}, file)

        return change

    def scheme(**changes):
        def change(folder):
            raw = json.loads((folder / "config.json").read_text())
            raw["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
            (folder / "config.json").write_text(json.dumps(raw))

        return change

    otherwise, no_fit = "quantized otherwise than by save_packed", "do not fit each other"
    cases = [
        (scheme(num_bits=4), otherwise), (scheme(symmetric=False), otherwise),
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
    ]
    for number, (damage, message) in enumerate(cases):
        folder = shutil.copytree(good, tmp_path / str(number))
        damage(folder)
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load(folder)
        assert str(folder) in str(error.value) or message.startswith("model.")


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
    for name, w in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            halves = w.view(len(w) // c.head_dim, 2, -1, w.shape[1])  # (heads, 2, head_dim / 2, in)
            w = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = w.clone()
    folder.mkdir()
    torch.save(tensors, folder / "consolidated.00.pth")
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "vocab_size": c.vocab_size,
              "n_heads": c.num_attention_heads, "n_kv_heads": c.num_key_value_heads,
              "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
              "multiple_of": 256, "ffn_dim_multiplier": 1.5}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_metas_format_loads_to_the_same_model(tied, tmp_path):
    model = random_llama(rope_scaling=hestia.LLAMA3, tie_word_embeddings=tied)
    folder = to_meta(model, tmp_path / "meta")
    again = checkpoints.load(folder)
    assert again.config == model.config and same_weights(again, model)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "rope_scaling_factor": 8.0}))
    assert checkpoints.load(folder).config.rope_scaling["factor"] == 8  # Llama-3.1's
    (folder / "params.json").write_text(json.dumps({**params, "n_layers": 3}))
    with pytest.raises(ValueError, match="meta has 2 layers and says 3"):
        checkpoints.load(folder)


def test_what_is_no_llama_in_metas_format_is_refused_and_never_executed(tmp_path):
    folder = to_meta(random_llama(), tmp_path / "meta")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    embedding = "tok_embeddings.weight"
    damaged = [{embedding: Evil()}, {"layers": torch.ones(1)}, {3: torch.ones(1)}, [1],
               {embedding: 5}, {embedding: torch.ones(2, 2).int()}]
    for what in damaged:
        torch.save(what, folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=r"meta holds no Llama in Meta's format") as error:
            checkpoints.load(folder)
        assert "weights_only" not in str(error.value)  # no advice to execute it
    assert not (tmp_path / "executed").exists()
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
    text, story = tokenizer.decode(ids).strip(), (source / "greedy_reference.txt").read_text()
    assert len(text) > 250 and story.strip().startswith(text)


# --------------------------------------------------------------------------------------------------
# the command


def test_the_command_that_load_llama_names_converts_and_round_trips(tmp_path, capsys):
    model = ternary_llama(rope_scaling=hestia.LLAMA3)
    meta = to_meta(model, tmp_path / "meta")
    (meta / "tokenizer.json").write_text("{}")
    for source, target, more in (("meta", "plain", []), ("plain", "packed", ["--packed"]),
                                 ("packed", "again", []), ("meta", "direct", ["--packed"])):
        if source != "plain":  # the others hestia.load_llama refuses, with this command
            with pytest.raises(ValueError, match="NEW_FOLDER") as refused:
                hestia.load_llama(tmp_path / source)
            command = "python -m notebooks.lab.checkpoints " + str(tmp_path / source)
            assert f": {command} NEW_FOLDER" in str(refused.value)
        folders = [str(tmp_path / source), str(tmp_path / target)]
        checkpoints.main([*folders, *more, "--group-size", "16"])
        assert ("RoPE factor 32" in capsys.readouterr().out) == (source == "meta")
        converted = checkpoints.load(tmp_path / target)
        assert same_weights(converted, model) and converted.config == model.config
        assert (tmp_path / target / "tokenizer.json").read_text() == "{}"
    read = lambda folder, file: (tmp_path / folder / file).read_bytes()
    assert read("plain", "config.json") == read("again", "config.json")
    for file in ("config.json", "model.safetensors"):
        assert read("packed", file) == read("direct", file)
    assert json.loads(read("plain", "config.json"))["eos_token_id"] == 128001


def test_bad_input_gets_one_sentence_and_exit_code_2(tmp_path, capsys):
    good = hestia.save_llama(random_llama(), tmp_path / "good")

    def broken(name, config, weights=None):
        folder = shutil.copytree(good, tmp_path / name)
        (folder / "config.json").write_text(config)
        if weights:
            (folder / "model.safetensors").write_text(weights)
        return folder

    raw, target = json.loads((good / "config.json").read_text()), tmp_path / "target"
    config = lambda **changes: json.dumps({**raw, **changes})
    cases = [
        ([tmp_path / "nowhere", target], "nowhere holds no Llama; expected a config.json"),
        ([good, good], "good is not an empty folder; name another"),
        ([good, target, "--packed", "--group-size", "16"], "good: model.layers.0.self_attn.q_proj"),
        ([good, target, "--packed", "--group-size", "24"], "group size 24 does not divide"),
        ([broken("a", "{"), target], "a: JSONDecodeError Expecting"),
        ([broken("b", "[1]"), target], "b: AttributeError"),
        ([broken("c", config(), "damaged"), target], "c: SafetensorError"),
        ([broken("d", config(hidden_size=16)), target], "size mismatch"),
        ([broken("e", config(quantization_config={"bits": 4})), target], "quantized otherwise"),
        ([broken("f", config(vocab_size="big")), target], "f: TypeError"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            checkpoints.main([str(a) for a in arguments])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and message in said and said.count("\n") == 1, said
        assert not target.exists()
