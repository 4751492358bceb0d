"""texts.py against the tokenizers package on the whole text, and what it refuses."""

import builtins
import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hestia
from notebooks.lab import options, texts

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: E402
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing  # noqa: E402

ROOT = Path(hestia.__file__).resolve().parent
STORIES = ROOT.parent / "shared" / "checkpoints" / "stories260k" / "tokenizer.json"
BREAKS = {"lf": "\n", "crlf": "\r\n", "blank": "\n\n", "wiki": " \n ", "mixed": "\r\n \t\n\n",
          "none": " ", "not even a space": ","}
KINDS = ("Llama 3", "SmolLM2", "Llama 2", "Llama 2, newer", "stories260K")
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained(kind):
    """A small tokenizer that splits a text as those of Llama 3, SmolLM2 or Llama 2 do."""
    if kind == "stories260K":  # a tokenizer of sentencepiece, with tokens for single bytes
        if not STORIES.exists():
            pytest.skip("needs stories260K beside the repository")
        return Tokenizer.from_file(str(STORIES))
    byte_level = pre_tokenizers.ByteLevel
    tokenizer, alphabet = Tokenizer(models.BPE()), byte_level.alphabet()
    if kind == "Llama 3":
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, byte_level(add_prefix_space=False, use_regex=False)])
    elif kind == "SmolLM2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)])
    else:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = [chr(k) for k in range(32, 127)]
        if kind != "joins words":  # no token of sentencepiece spans words
            tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    source = Path(hestia.__file__).read_text("utf-8")[:30000]
    varied = "".join(f"{source[k : k + 60]}{list(BREAKS.values())[k % 5]}"
                     for k in range(0, len(source), 60))  # so that it merges line breaks, too
    tokenizer.train_from_iterator([source[k : k + 500] for k in range(0, 30000, 500)] + [varied],
                                  trainer)
    if kind.startswith("Llama 2"):  # it splits in training only
        tokenizer.pre_tokenizer = None
    if kind == "Llama 2, newer":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def tokens_of(found, tokenizer):
    return [i for part, extra in found for i in tokenizer.encode(
        part, add_special_tokens=False).ids[extra:]]


def folder_with(tokenizer, path, vocab_size=1000):
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}), "utf-8")
    return path


def sentences(count, line_break):
    rng = random.Random(0)
    endings = (".", "!", "...", "", "?\"", "_", ";", " ")
    line = "the quick brown fox, number {} jumped; it's over and home again{}"
    return line_break.join(line.format(rng.randrange(10**6), rng.choice(endings))
                           for _ in range(count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BREAKS)
def test_pieces_give_the_tokens_of_the_whole(kind, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "PIECE", 500)
    tokenizer, text = trained(kind), sentences(800, BREAKS[name])
    if name == "not even a space":
        text = text.replace(" ", "")
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    found = texts.pieces(text, tokenizer)
    assert max(len(part) for part, _ in found) < 700 < len(text) / 50
    assert any(extra for _, extra in found) == (kind not in ("Llama 3", "SmolLM2"))
    assert tokens_of(found, tokenizer) == whole
    tokens = texts.tokenize({"train": text.encode()}, folder_with(tokenizer, tmp_path))["train"]
    assert tokens.dtype == np.int32 and tokens.tolist() == whole
    assert "the train text: 100 %, 0 s left" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_random_characters(kind, monkeypatch):
    """Blanks, breaks, letters of several scripts, digits, marks and controls next to each other."""
    monkeypatch.setattr(texts, "PIECE", 20)
    tokenizer, rng = trained(kind), random.Random(1)
    trusting = SimpleNamespace(get_vocab=tokenizer.get_vocab,  # the rule alone
                               encode=lambda *_, **__: SimpleNamespace(ids=[]))
    some = "  \n\n\r\t\xa0 ab'sZé中ж09½²_-.,;!\"€\x1c\u0301\u200b🙂"
    cuts = 0
    for _ in range(100):
        text = "".join(rng.choices(some, k=rng.randrange(1, 400)))
        found = texts.pieces(text, trusting if kind in ("Llama 3", "SmolLM2") else tokenizer)
        cuts += len(found) - 1
        ids = tokens_of(found, tokenizer)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert cuts > 300


def test_where_no_cut_is_right_there_is_none(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 100)
    tokenizer = trained("joins words")
    for text in (sentences(50, "\n"), "ab " * 500, "a b, " * 300, "the the " * 300):
        # pairs are joined from the left, so a cut is right or wrong by what is far away
        whole = tokenizer.encode(text).ids
        assert tokens_of(texts.pieces(text, tokenizer), tokenizer) == whole
    assert texts.pieces("", tokenizer) == []
    dense = "中文你好" * 2000  # all letters
    assert texts.pieces(dense, trained("SmolLM2")) == [(dense, 0)]
    marked = "中文。你好，世界" * 2000
    assert len(texts.pieces(marked, trained("SmolLM2"))) > 100
    monkeypatch.setattr(texts, "MOST", 5000)  # more would take much memory
    with pytest.raises(ValueError, match=r"^5,000 characters from 0 on have no place where a word"):
        texts.pieces(dense, trained("SmolLM2"))
    assert texts.pieces(dense[:5000], trained("SmolLM2")) == [(dense[:5000], 0)]


def test_names_of_special_tokens_are_not_cut(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 10)
    for kind in KINDS[:3]:
        tokenizer = trained(kind)
        tokenizer.add_special_tokens(["<|end of text|>", "</s>"])
        text = "one two<|end of text|>three</s>" * 50
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert whole.count(tokenizer.token_to_id("<|end of text|>")) == 50
        assert tokens_of(texts.pieces(text, tokenizer), tokenizer) == whole


def test_settings_for_a_chat_and_an_empty_text(tmp_path):
    tokenizer, text = trained("Llama 3"), "one two three four five six seven\n"
    ids = tokenizer.encode(text).ids
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=1000)
    found = texts.tokenize({"train": text.encode(), "val": b""}, folder_with(tokenizer, tmp_path))
    assert found["train"].tolist() == ids and len(ids) > 7
    assert found["val"].dtype == np.int32 and found["val"].shape == (0,)


def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path, monkeypatch):
    tokenizer = trained("SmolLM2")

    def refused(folder, *words, error=ValueError):
        with pytest.raises(error) as raised:
            texts.tokenize({"train": b"some text"}, folder)
        message = str(raised.value)
        assert all(word in message for word in words) and "\n" not in message, message

    refused(tmp_path / "nowhere", "nowhere does not exist", "expected a folder with config.json")
    refused("org/Llama-2-7b", "does not exist here", "hf download org/Llama-2-7b --local-dir")
    refused(tmp_path, "is empty; expected a config.json")
    folder_with(tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refused(tmp_path, "has no tokenizer.json; copy or download it again")
    (tmp_path / "tokenizer.model").touch()
    refused(tmp_path, "no tokenizer.json; of its tokenizer.model this makes them: python -c",
            f"a, b = '{tmp_path}'")
    folder = folder_with(tokenizer, tmp_path, vocab_size=tokenizer.get_vocab_size() - 1)
    refused(folder, f"has a token {tokenizer.get_vocab_size() - 1}", "expected the tokenizer")
    for file, content in (("config.json", "{}"), ("config.json", "{"), ("tokenizer.json", "{}"),
                          ("tokenizer.json", "\x00"), ("tokenizer.json", "")):
        (folder_with(tokenizer, tmp_path) / file).write_text(content, "utf-8")
        refused(folder, "cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "holds no Llama; expected a config.json")
    folder_with(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"the val text is not UTF-8 \(byte 3\)"):
        texts.tokenize({"train": b"abc", "val": b"abc\xff"}, folder)
    original = builtins.__import__
    missing = lambda name, *a, **k: (_ for _ in ()).throw(ImportError) if name == "tokenizers" \
        else original(name, *a, **k)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        refused(folder, "pip install '.[llama]'", error=ImportError)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_is_the_tokenizers(kind, tmp_path):
    """In Llama 3's it is one of several steps after the merges. Ours had none until it is put."""
    tokenizer = trained(kind)
    if kind != "stories260K":
        assert texts.first_token(folder_with(tokenizer, tmp_path)) is None
        template = TemplateProcessing("<s> $A", special_tokens=[("<s>", 700)])
        steps = [ByteLevel(trim_offsets=False), template]
        tokenizer.post_processor = Sequence(steps) if kind == "Llama 3" else template
    (expected,) = tokenizer.encode("").ids
    assert texts.first_token(folder_with(tokenizer, tmp_path)) == expected
    assert texts.first_token(tmp_path / "nowhere") is None
    (tmp_path / "tokenizer.json").write_text('{"post_processor": {"type": "TemplateProcessing"}}')
    with pytest.raises(ValueError, match="is damaged, or holds no Llama"):
        texts.first_token(tmp_path)


def test_a_llama_that_begins_with_a_token_sees_it_and_its_copies_do(tmp_path):
    torch.manual_seed(0)
    model = hestia.Llama(hestia.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1))
    x, y = torch.randint(2, 16, (2, 3, 5))  # (B, T) each
    begun = torch.cat([torch.ones(3, 1, dtype=torch.long), x[:, 1:]], 1)
    loss = lambda model, x: model(x, y).item()
    expected, plain, kept = loss(model, begun), loss(model, x), x.clone()
    assert loss(texts.begin(model, None), x) == plain != expected
    texts.begin(model, 1)
    for one in (model, copy.deepcopy(model)):
        assert loss(one, x) == expected and torch.equal(x, kept)
    assert loss(hestia.load_llama(hestia.save_llama(model, tmp_path / "a")), x) == plain


def test_a_run_begins_sequences_as_the_tokenizer_does(tmp_path):
    source = STORIES.parent
    if not source.exists():
        pytest.skip("needs stories260K beside the repository")
    ids = torch.randint(3, 512, (1, 9))
    begun, plain = [options.llama(SimpleNamespace(llama=str(source), device="cpu", bos=bos))
                    for bos in (True, False)]
    found, before = begun(ids), plain(ids)
    ids[0, 0] = 1
    assert torch.equal(found, plain(ids)) and not torch.equal(found, before)


def test_a_text_is_a_file(tmp_path):
    """A pipe can be read once: not by --resume, nor by a second process."""
    made = lambda **paths: SimpleNamespace(**{"data": "", "val_data": "", "test_data": "",
                                              "llama": "", **paths})
    text = tmp_path / "text, größer 文"
    text.write_bytes(b"some text\r\n" * 50)
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)  # or a reader may wait for ever
    os.symlink("/dev/zero", tmp_path / "endless.npy")
    for option in ("data", "val_data", "test_data"):
        for name, found in (("pipe", "a pipe or a device"), ("endless.npy", "a pipe or a device"),
                            ("nowhere", "nowhere does not exist"), (".", "is a folder, a pipe")):
            with pytest.raises(ValueError, match=f"{found}.*; expected a file, which can be read"):
                texts.load(made(**{"data": str(text), option: str(tmp_path / name)}))
    os.close(end)
    tokens, facts = texts.load(made(data=str(text)))
    assert len(tokens["train"]) + len(tokens["val"]) == 550 and facts["source"] == str(text)


def test_tokens_that_were_made_before_are_looked_at(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(70000, dtype=np.uint32))
    assert texts.load_tokens(path).tolist() == [*range(70000)]
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:1000], b"PK\x03\x04", whole.replace(b"<u4", b"|O8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no array of numpy"):
            texts.load_tokens(path)
    for array in (np.ones((2, 2), int), np.ones(5), np.array([1, -1]), np.array([2**31]), ["a"]):
        np.save(path, array)
        with pytest.raises(ValueError, match="expected whole numbers from 0 on"):
            texts.load_tokens(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [*(("Llama 2", name) for name in BREAKS),
                                        *((kind, "none") for kind in KINDS if kind != "Llama 2")])
def test_memory_stays_bounded(kind, name, tmp_path):
    """In one piece a text takes 170 bytes of memory for each of its own: here 700 MB."""
    folder = folder_with(trained(kind), tmp_path)
    (tmp_path / "text").write_bytes(sentences(60_000, BREAKS[name]).encode())
    code = ("import sys, pathlib, resource; from notebooks.lab import texts\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\n"
            "text = (pathlib.Path(sys.argv[1]) / 'text').read_bytes(); before = peak()\n"
            "texts.tokenize({'train': text}, sys.argv[1])\n"
            "print(f'MB {peak() - before} {len(text) / 1e6}')")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    megabytes, text = map(float, done.stdout.split("MB ")[-1].split())
    print(megabytes, text)
    assert text > 4 and megabytes < 300
