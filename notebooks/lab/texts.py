"""Text files as tokens: bytes, or those of a Llama's tokenizer, in pieces that change nothing."""

import hashlib
import itertools
import json
import platform
import re
import time
from pathlib import Path

import numpy as np

import train_tiny

PIECE = 1 << 16  # characters; tokenizers takes about 200 bytes of memory for each
# Byte-level BPE first splits a text by a regular expression. That of Llama 3 and that of GPT-2 and
# SmolLM2 split between a letter or digit and white space, whatever stands further away. Elsewhere
# they may not: punctuation can take the line breaks after it, and a blank line is one token or two.
CUT = re.compile(r"(?<=[^\W_])(?=[ \t\r\n])")


def load(config):
    """What train_tiny.py trains and measures on. Returns ({split: tokens}, what to record).

    The splits are "train" and "val" (--val-data, or the last 5 % of --data) and, with --test-data,
    "test". Tokens are bytes, uint8, or with --llama the Llama's, int32.
    """
    paths = {"train": config.data, "val": config.val_data, "test": config.test_data}
    texts = {split: Path(path).read_bytes() for split, path in paths.items() if path}
    source = config.data or f"standard library of Python {platform.python_version()}"
    if not config.data:
        texts = {**dict(zip(("train", "val"), train_tiny.standard_library())), **texts}
    if config.llama:
        tokens = tokenize(texts, config.llama)
    else:
        tokens = {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}
    if "val" not in tokens:
        cut = round(0.95 * len(tokens["train"]))
        train, val = np.split(tokens["train"], [cut])
        tokens = {**tokens, "train": train, "val": val}
    sha256 = hashlib.sha256(b"\0".join(texts.values())).hexdigest()
    return tokens, {"source": source, "sha256": sha256, "unit": "token" if config.llama else "byte"}


def load_tokenizer(folder):
    """The tokenizer beside a Llama's weights."""
    folder = Path(folder)
    for path in (folder, folder / "tokenizer.json", folder / "config.json"):
        if not path.exists():
            raise ValueError(f"{path} does not exist; expected the Hugging Face folder of a Llama, "
                             "with config.json and tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("--llama needs tokenizers; pip install '.[llama]' brings it") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        last = max(tokenizer.get_vocab(with_added_tokens=True).values())
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error!r}") from None
    if last >= size:
        raise ValueError(f"the tokenizer in {folder} has a token {last}, and the model has {size}; "
                         "expected the tokenizer that the model was trained with")
    tokenizer.no_truncation()  # settings for a chat, which would cut a text or fill it up
    tokenizer.no_padding()
    return tokenizer


def pieces(text, tokenizer):
    """Cut a text. The tokenizer must agree, on 200 characters on either side of each cut.

    One of another kind, such as Llama 2's, never does. It gets the rest of the text in one piece,
    and so does a text without a place to cut in four million characters.
    """
    encode = lambda a, b: tokenizer.encode(text[a:b], add_special_tokens=False).ids
    found, start = [], 0
    while start < len(text):
        end = len(text)
        places = CUT.finditer(text, start + PIECE, start + 4_000_000)
        for k in (place.start() for place in itertools.islice(places, 20)):
            a, b = k - 200, k + 200
            if encode(max(a, 0), k) + encode(k, b) == encode(max(a, 0), b):
                end = k
                break
        found.append(text[start:end])
        start = end
    return found


def tokenize(texts, folder):
    """{split: UTF-8 bytes} -> {split: tokens, int32 array (N,)}, without one for the beginning.

    folder: of a Llama. ValueError or ImportError says in one sentence what cannot be used.
    """
    tokenizer, tokens = load_tokenizer(folder), {}
    for split, text in texts.items():
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the {split} text is not UTF-8 (byte {error.start}); convert it first"
                             ) from None
        parts, ids, began = pieces(text, tokenizer), [], time.perf_counter()
        for k in range(0, len(parts), 8):  # eight at once, which tokenizers spreads over the cores
            for encoded in tokenizer.encode_batch(parts[k : k + 8], add_special_tokens=False):
                ids.append(np.array(encoded.ids, np.int32))
            done = min(1.0, (k + 8) / len(parts))
            left = (time.perf_counter() - began) * (1 - done) / done
            print(f"\r  tokenizing the {split} text: {100 * done:.0f} %, {left:.0f} s left ",
                  end="" if done < 1 else "\n", flush=True)
        tokens[split] = np.concatenate([np.zeros(0, np.int32), *ids])
    return tokens
