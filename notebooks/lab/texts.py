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
from notebooks.lab import checkpoints

PIECE, MOST = 1 << 16, 1 << 22  # characters; tokenizers takes about 200 bytes of memory for each
# Byte-level BPE first splits a text by a regular expression. That of Llama 3 and that of GPT-2 and
# SmolLM2 split where letters or digits end before another sign, whatever stands further away.
# Elsewhere they may not: punctuation can take the line breaks after it.
CUT = re.compile(r"(?<=[^\W_])(?=[^\w])")


def load(config):
    """What train_tiny.py trains and measures on. Returns ({split: tokens}, what to record).

    The splits are "train" and "val" (--val-data, or the last 5 % of --data) and, with --test-data,
    "test". Tokens are bytes, uint8, or with --llama the Llama's, int32. A file NAME.npy holds
    tokens that were made before.
    """
    paths = {"train": config.data, "val": config.val_data, "test": config.test_data}
    for path in filter(None, paths.values()):
        checkpoints.check_file(Path(path))
    made = {split: load_tokens(path) for split, path in paths.items() if path.endswith(".npy")}
    texts = {split: Path(path).read_bytes() for split, path in paths.items()
             if path and split not in made}
    source = config.data or f"standard library of Python {platform.python_version()}"
    if not config.data:
        texts = {**dict(zip(("train", "val"), train_tiny.standard_library())), **texts}
    if config.llama:
        tokens = tokenize(texts, config.llama)
    else:
        tokens = {split: np.frombuffer(text, np.uint8) for split, text in texts.items()}
    tokens |= made
    if "val" not in tokens:
        cut = round(0.95 * len(tokens["train"]))
        train, val = np.split(tokens["train"], [cut])
        tokens = {**tokens, "train": train, "val": val}
    content = [*texts.values(), *(array.tobytes() for array in made.values())]
    sha256 = hashlib.sha256(b"\0".join(content)).hexdigest()
    return tokens, {"source": source, "sha256": sha256, "unit": "token" if config.llama else "byte"}


def load_tokens(path):
    """Tokens that np.save wrote, (N,)."""
    try:  # mapped into memory: a file that claims more than it holds takes none
        tokens = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # whatever a damaged file may raise
        raise ValueError(f"{path} holds no array of numpy ({error})") from None
    whole = tokens.ndim == 1 and tokens.dtype.kind in "iu"
    if not whole or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31):
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}; expected whole "
                         "numbers from 0 on, one after the other")
    return tokens.astype(np.int32)


def load_tokenizer(folder):
    """The tokenizer beside a Llama's weights."""
    folder = Path(folder)
    checkpoints.check_folder(folder, weights=False)
    for name in ("tokenizer.json", "config.json"):
        if not (folder / name).exists():
            advice = "copy or download it again"
            if name == "tokenizer.json" and (folder / "tokenizer.model").exists():
                advice = "of its tokenizer.model " + checkpoints.WITH_TRANSFORMERS.format(folder)
            raise ValueError(f"{folder} has no {name}; {advice}")
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


def first_token(folder):
    """The token that a tokenizer.json puts before each text, such as Llama 3's, or None."""
    file = Path(folder) / "tokenizer.json"
    with checkpoints.one_sentence(folder):
        after = file.exists() and checkpoints.read_json(file).get("post_processor")
        for step in after.get("processors", [after]) if after else ():
            first = step["single"][0] if step["type"] == "TemplateProcessing" else {}
            if "SpecialToken" in first:
                return step["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]


def begin(model, token):
    """Let a Llama see this token in place of each sequence's first, if it is not None. Returns it.

    A text is cut anywhere, and engines begin each with this token: so should the sequences of a
    training. Targets stay. It is a hook, which copies of the model keep and folders do not.

    >>> import torch
    >>> begin(torch.nn.Identity(), 1)(torch.tensor([[5, 6, 7], [8, 9, 8]]))
    tensor([[1, 6, 7],
            [1, 9, 8]])
    """
    def put(_, inputs):
        ids = inputs[0].clone()  # (B, T)
        ids[:, 0] = token
        return ids, *inputs[1:]

    if token is not None:
        model.register_forward_pre_hook(put)
    return model


def pieces(text, tokenizer):
    """Cut a text. Returns [(a piece, how many of its first tokens do not belong to the text)].

    A tokenizer such as Llama 2's splits nothing before its merges, but no merge spans a cut if no
    token holds the two characters beside it. It also puts a blank before each piece, except after
    a line break, so such pieces begin with a line break more. At each cut the tokenizer must give
    the tokens of the whole, for 200 characters on either side. ValueError where there is no cut in
    four million characters.
    """
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    joined = {token[k : k + 2].replace("▁", " ")
              for token in tokenizer.get_vocab() for k in range(len(token) - 1)}
    extra = {lead: len(encode(lead)) for lead in ("", "\n")}
    found, start, lead = [], 0, ""
    while start < len(text):
        end, following = len(text), ""
        places = (place.start() for place in CUT.finditer(text, start + PIECE, start + MOST))
        places = (k for k in places if text[k - 1 : k + 1] not in joined)
        for k, other in itertools.product(itertools.islice(places, 200), extra):
            before, after = text[max(k - 200, 0) : k], text[k : k + 200]
            if encode(before) + encode(other + after)[extra[other] :] == encode(before + after):
                end, following = k, other
                break
        if end - start > MOST:
            raise ValueError(f"{MOST:,} characters from {start:,} on have no place where a word "
                             "ends and the text can be cut; expected spaces or line breaks")
        found.append((lead + text[start:end], extra[lead]))
        start, lead = end, following
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
            some, extra = zip(*parts[k : k + 8])
            for encoded, n in zip(tokenizer.encode_batch(some, add_special_tokens=False), extra):
                ids.append(np.array(encoded.ids[n:], np.int32))
            done = min(1.0, (k + 8) / len(parts))
            left = (time.perf_counter() - began) * (1 - done) / done
            print(f"\r  tokenizing the {split} text: {100 * done:.0f} %, {left:.0f} s left ",
                  end="" if done < 1 else "\n", flush=True)
        tokens[split] = np.concatenate([np.zeros(0, np.int32), *ids])
    return tokens
