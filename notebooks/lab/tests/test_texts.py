"""texts.py against the tokenizers package on the whole text, and what it refuses."""

import builtins
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import hestia
from notebooks.lab import texts

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers  # noqa: E402

ROOT = Path(hestia.__file__).resolve().parent
BREAKS = {"lf": "\n", "crlf": "\r\n", "blank": "\n\n", "wiki": " \n ", "mixed": "\r\n \t\n\n"}
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained(kind):
    """A small tokenizer that splits a text as those of Llama 3, SmolLM2 or Llama 2 do."""
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
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet)
    source = Path(hestia.__file__).read_text()[:30000]
    varied = "".join(f"{source[k : k + 60]}{list(BREAKS.values())[k % 5]}"
                     for k in range(0, len(source), 60))  # so that it merges line breaks, too
    tokenizer.train_from_iterator([source[k : k + 500] for k in range(0, 30000, 500)] + [varied],
                                  trainer)
    return tokenizer


def folder_with(tokenizer, path, vocab_size=1000):
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return path


def sentences(count, line_break):
    rng = random.Random(0)
    endings = (".", "!", "...", "", "?\"", "_", ";", " ")
    line = "the quick brown fox, number {} jumped; it's over and home again{}"
    return line_break.join(line.format(rng.randrange(10**6), rng.choice(endings))
                           for _ in range(count))


@pytest.mark.parametrize("kind", ("Llama 3", "SmolLM2"))
@pytest.mark.parametrize("name", BREAKS)
def test_pieces_give_the_tokens_of_the_whole(kind, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "PIECE", 500)
    tokenizer, text = trained(kind), sentences(800, BREAKS[name])
    found = texts.pieces(text, tokenizer)
    assert "".join(found) == text and max(map(len, found)) < 600 < len(text) / 50
    tokens = texts.tokenize({"train": text.encode()}, folder_with(tokenizer, tmp_path))["train"]
    assert tokens.dtype == np.int32 and tokens.tolist() == tokenizer.encode(text).ids
    assert "the train text: 100 %, 0 s left" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ("Llama 3", "SmolLM2"))
def test_random_characters(kind, monkeypatch):
    """Blanks, breaks, letters of several scripts, digits, marks and controls next to each other."""
    monkeypatch.setattr(texts, "PIECE", 20)
    agreeing = SimpleNamespace(encode=lambda *_, **__: SimpleNamespace(ids=[]))  # the rule alone
    tokenizer, rng = trained(kind), random.Random(1)
    some = "  \n\n\r\t\xa0 ab'sZé中ж09½²_-.,;!\"€\x1c\u0301\u200b🙂"
    cuts = 0
    for _ in range(100):
        text = "".join(rng.choices(some, k=rng.randrange(1, 400)))
        found = texts.pieces(text, agreeing)
        cuts += len(found) - 1
        ids = [i for part in found for i in tokenizer.encode(part).ids]
        assert "".join(found) == text and ids == tokenizer.encode(text).ids
    assert cuts > 300


def test_where_no_cut_is_right_there_is_none(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 500)
    tokenizer, text = trained("Llama 2"), sentences(100, "\n")
    whole = tokenizer.encode(text).ids
    halves = [tokenizer.encode(part).ids for part in (text[:1000], text[1000:])]
    assert halves[0] + halves[1] != whole  # each begins with a blank of its own
    assert texts.pieces(text, tokenizer) == [text]
    dense = "中文。" * 2000  # no white space at all
    assert texts.pieces(dense, trained("SmolLM2")) == [dense]
    assert texts.pieces("", tokenizer) == []


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

    refused(tmp_path / "nowhere", "nowhere does not exist", "expected the Hugging Face folder")
    refused(tmp_path, "tokenizer.json does not exist")
    folder = folder_with(tokenizer, tmp_path, vocab_size=tokenizer.get_vocab_size() - 1)
    refused(folder, f"has a token {tokenizer.get_vocab_size() - 1}", "expected the tokenizer")
    for file, content in (("config.json", "{}"), ("config.json", "{"), ("tokenizer.json", "{}"),
                          ("tokenizer.json", "\x00"), ("tokenizer.json", "")):
        (folder_with(tokenizer, tmp_path) / file).write_text(content)
        refused(folder, "cannot be read")
    (folder / "config.json").unlink()
    refused(folder, "config.json does not exist")
    folder_with(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"the val text is not UTF-8 \(byte 3\)"):
        texts.tokenize({"train": b"abc", "val": b"abc\xff"}, folder)
    original = builtins.__import__
    missing = lambda name, *a, **k: (_ for _ in ()).throw(ImportError) if name == "tokenizers" \
        else original(name, *a, **k)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        refused(folder, "pip install '.[llama]'", error=ImportError)


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_memory_stays_bounded(name, tmp_path):
    """In one piece a text takes 170 bytes of memory for each of its own: here 700 MB."""
    folder = folder_with(trained("Llama 3"), tmp_path)
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
