"""Zero-shot tasks, losses on texts and distances to a teacher, of Llamas in Hugging Face folders.

    python -m notebooks.lab.zeroshot FOLDER ... --tasks DIR --texts wiki=wiki.txt --out scores.json

Tasks, wording and scores are those of lm-evaluation-harness: acc, acc_norm (per character of the
answer), each with a standard error, _se. Losses and, with --teacher,
KL(teacher || model) are means in nats per token. DIR holds TASK.jsonl.xz for some of the five
tasks. A line has a query, choices and gold, the index of the right choice; one of winogrande has
context_options, continuation and gold. One machine can tokenize what another scores without the
tokenizers package:

    python -m notebooks.lab.zeroshot FOLDER --tasks DIR --texts wiki=wiki.txt --prepare READY
    python -m notebooks.lab.zeroshot FOLDER ... --tasks READY/tasks.npz --texts wiki=READY/wiki.npy
"""

import argparse
import contextlib
import functools
import itertools
import json
import lzma
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import hestia
import plots
from notebooks.lab import tables

TASKS = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")
PROMPT = "The town lies on a river, and its history begins with"
LOGITS = 2**26  # in memory at once, four bytes each


def wording(task, row):
    r"""The harness' words. Returns [(context, continuation)] and the index of the right one.

    >>> row = {"query": "Question: Hot?", "choices": ["ice", "ice", "fire"], "gold": 2}
    >>> wording("arc_easy", row)
    ([('Question: Hot?\nAnswer:', ' ice'), ('Question: Hot?\nAnswer:', ' fire')], 1)
    """
    if task == "winogrande":  # partial scoring: the end of the sentence, given either beginning
        end = " " + row["continuation"]
        return [(start, end) for start in row["context_options"]], row["gold"]
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if task == "hellaswag":  # the harness capitalizes the sentence that the choices complete
        query = re.sub(r"(?<=[.!?] )[^.!?]+$", lambda match: match[0].capitalize(), query)
    else:
        query = query.removesuffix("\n") + "\nAnswer:"
    if task.startswith("arc"):  # questions with three answers are filled up with a copy of one
        choices = list(dict.fromkeys(choices))
        gold = choices.index(row["choices"][gold])
    return [(query, " " + choice) for choice in choices], gold


def prepare(task, rows, tokenizer):
    """A task as arrays of whole numbers, (sequences,) but for three of them.

    tokens (sum of length,): contexts and continuations; length: tokens of a sequence, of which the
    last `scored` are the continuation's; characters: of an answer; choices, gold (items,).
    The first token is one for the beginning if tokenizer.json says so, as with the harness.
    """
    fields = ("tokens", "length", "scored", "characters", "choices", "gold")
    found = {field: [] for field in fields}
    for row in rows:
        requests, gold = wording(task, row)
        found["choices"].append(len(requests))
        found["gold"].append(gold)
        for context, continuation in requests:
            ids = tokenizer.encode(context + continuation).ids
            found["tokens"] += ids
            found["length"].append(len(ids))
            # spaces at the end of a context count as the continuation's
            found["scored"].append(len(ids) - len(tokenizer.encode(context.rstrip()).ids))
            found["characters"].append(len(continuation) - 1)
    return {field: compact(values) for field, values in found.items()}


def compact(values):
    """Whole numbers (N,) as uint16, or as int32 if one is too large."""
    values = np.array(values, np.int32)
    return values.astype(np.uint16) if values.max(initial=0) < 2**16 else values


def before_head(model, ids):
    """What the output head sees. ids: (B, T). Returns (B, T, C)."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        return model(ids)
    finally:
        model.lm_head = head


def chunks(model, *tensors):
    """Cut tensors of n rows each so that the logits of a piece have at most LOGITS numbers."""
    rows = max(1, LOGITS // model.config.vocab_size)
    return zip(*(tensor.split(rows) for tensor in tensors))


def batch_tokens(model):
    return 16384 if next(model.parameters()).is_cuda else 2048


@torch.no_grad()
def log_likelihoods(model, task, limit=None, name=""):
    """log p(continuation | context) in nats, (sequences,). limit: tokens in a batch."""
    device, limit = next(model.parameters()).device, limit or batch_tokens(model)
    length, scored = task["length"].astype(np.int64), task["scored"].astype(np.int64)
    first, sums = np.cumsum(length) - length, np.zeros(len(length))
    order = np.argsort(-length, kind="stable")  # the longest first: memory runs out now or never
    start, began = 0, time.perf_counter()
    with hestia.precision(device), hestia.evaluating(model):
        while start < len(order):
            batch = order[start : start + max(1, limit // length[order[start]])]
            position = np.arange(length[batch[0]])
            inside = position < length[batch, None]  # (B, T); what follows is padding
            ids = np.zeros(inside.shape, np.int64)
            ids[inside] = np.concatenate([task["tokens"][first[i] :][: length[i]] for i in batch])
            row, column = (inside & (position >= (length - scored)[batch, None])).nonzero()  # (n,)
            ids = torch.from_numpy(ids).to(device)
            x = before_head(model, ids)[row, column - 1]  # (n, C)
            log_p = []
            for x_, y_ in chunks(model, x, ids[row, column]):
                logits = model.lm_head(x_).float()  # (rows of the piece, V)
                log_p.append(logits.gather(1, y_[:, None])[:, 0] - logits.logsumexp(1))
            np.add.at(sums, batch[row], torch.cat(log_p).cpu().double().numpy())
            start += len(batch)
            done = length[order[:start]].sum() / length.sum()
            left = (time.perf_counter() - began) * (1 - done) / done
            print(f"\r  {name}: {100 * done:.0f} %, {left:.0f} s left ", end="", flush=True)
    print()
    return sums


def accuracies(sums, task):
    """Shares of items whose right choice has the largest sum: as it is, or over a length.

    sums: (sequences,), in nats; of equal ones the first counts. task: see prepare.

    >>> task = {"characters": [2, 4], "choices": [2], "gold": [1]}
    >>> [accuracies([-2.0, -3.0], task)[name] for name in ("acc", "acc_norm")]
    [0.0, 1.0]
    """
    n = len(task["gold"])
    scores, ends = {"n": n}, np.cumsum(task["choices"], dtype=np.int64)[:-1]
    for name, length in (("acc", 1), ("acc_norm", task["characters"])):
        values = np.divide(sums, length)
        chosen = np.array([choices.argmax() for choices in np.split(values, ends)])
        p = float((chosen == task["gold"]).mean())
        scores |= {name: p, f"{name}_se": (p * (1 - p) / max(1, n - 1)) ** 0.5}
    return scores


@torch.no_grad()
def divergence(teacher, model, tokens, block_size):
    """Mean KL(teacher || model) in nats per predicted token. tokens (N,): cut as by evaluate."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    whole = len(tokens) // block_size * block_size
    batches = tokens[:whole].view(-1, block_size).split(max(1, batch_tokens(model) // block_size))
    with hestia.precision(device), hestia.evaluating(model), hestia.evaluating(teacher):
        for ids in (*batches, tokens[None, whole:]):
            ids = ids[:, :-1].to(device).long()
            if ids.numel():
                x, y = (before_head(m, ids).flatten(0, 1) for m in (teacher, model))  # (n, C)
                for x_, y_ in chunks(model, x, y):
                    p = teacher.lm_head(x_).float().log_softmax(1)  # (rows of the piece, V)
                    q = model.lm_head(y_).float().log_softmax(1)
                    total += float((p.exp() * (p - q)).sum(1).cpu().double().sum())
                count += ids.numel()
    return total / count


def limited(task, items):
    """The first items of a task."""
    sequences = int(task["choices"][:items].sum())
    ends = {"tokens": None, "choices": items, "gold": items}
    return {field: values[: ends.get(field, sequences)] for field, values in task.items()}


def read(options, tokenizer):
    """{task: arrays}, {text: tokens (N,)} and the tokens of the prompt, from files or tokenizer().

    The prompt is None where it is not needed.
    """
    tasks, texts, prompt, where = {}, {}, None, options.tasks or ""
    for name, _, file in (text.partition("=") for text in options.texts):
        if not file:
            raise ValueError(f"{name} is not NAME=FILE")
        if file.endswith(".npy"):
            texts[name] = np.load(file)
        else:
            text = Path(file).read_bytes().decode("utf-8")
            texts[name] = compact(tokenizer().encode(text, add_special_tokens=False).ids)
    if where.endswith(".npz"):
        arrays = dict(np.load(where))
        prompt = arrays.pop("prompt", None)
        if prompt is None:
            raise ValueError(f"{where} is not a tasks.npz that --prepare has written")
        for key, values in arrays.items():
            task, _, field = key.partition(".")
            tasks.setdefault(task, {})[field] = values
        tasks = {task: limited(arrays, options.limit) for task, arrays in tasks.items()}
    for task in TASKS if where else ():
        path = Path(where, task + ".jsonl.xz")
        if path.exists():
            with lzma.open(path, "rt", encoding="utf-8") as lines:
                rows = map(json.loads, itertools.islice(lines, options.limit))
                tasks[task] = prepare(task, rows, tokenizer())
    if where and not tasks:
        raise ValueError(f"{where} has none of {', '.join(TASKS)} as .jsonl.xz")
    if prompt is None and (options.sample or options.prepare):
        prompt = compact(tokenizer().encode(PROMPT).ids)
    return tasks, texts, prompt


def score(model, teacher, tasks, texts, prompt, options):
    """Everything about one Llama, as it goes into the file."""
    size, row = options.block_size, {"tasks": {}, "loss": {}, "kl": {}}
    tokens = [*texts.values(), *(task["tokens"] for task in tasks.values())]
    largest = max((int(ids.max(initial=0)) for ids in tokens), default=0)
    sizes = {llama.config.vocab_size for llama in (model, teacher or model)}
    if len(sizes) > 1 or largest >= min(sizes):
        raise ValueError(f"tokens up to {largest}, and Llamas of {sorted(sizes)} tokens; all of "
                         "them need the same tokenizer")
    for name, ids in texts.items():
        ids = torch.from_numpy(ids.astype(np.int32))
        row["loss"][name] = hestia.evaluate(model, ids, size, max(1, batch_tokens(model) // size))
        if teacher:
            row["kl"][name] = divergence(teacher, model, ids, size)
    for name, task in tasks.items():
        row["tasks"][name] = accuracies(log_likelihoods(model, task, name=name), task)
    if options.sample:
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(next(model.parameters()).device)
        row["sample"] = hestia.generate(model, ids, options.sample, size, 0)[0].tolist()
    return row


def print_scores(scores):
    """A line for each Llama: losses in nats per token, accuracies in percent."""
    cells = {}  # {folder: {column: text}}
    for folder, row in scores.items():
        cells[folder] = line = {f"{name}, loss": f"{x:.4f}" for name, x in row["loss"].items()}
        line |= {f"{name}, KL": f"{x:.4f}" for name, x in row["kl"].items()}
        for name, task in row["tasks"].items():
            for kind in ("acc", "acc_norm")[: 1 if name == "winogrande" else 2]:
                percent = f"{100 * task[kind]:.2f} ± {100 * task[kind + '_se']:.2f}"
                line[f"{name}, {kind}"] = percent
        if row["tasks"]:
            mean = np.mean([task["acc"] for task in row["tasks"].values()])
            line["mean acc"] = f"{100 * mean:.2f}"
    head = list(dict.fromkeys(column for line in cells.values() for column in line))
    rows = [[folder, *(line.get(c, "") for c in head)] for folder, line in cells.items()]
    tables.print_columns(["", *head], rows)


def run(options):
    @functools.cache
    def tokenizer():
        from notebooks.lab.texts import load_tokenizer  # late: scoring does without

        return load_tokenizer(options.folders[0])

    tasks, texts, prompt = read(options, tokenizer)
    if options.prepare:
        folder = Path(options.prepare)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{task}.{field}": values for task, fields in tasks.items()
                  for field, values in fields.items()} | {"prompt": prompt}
        plots.write(folder / "tasks.npz", lambda half: np.savez_compressed(half, **arrays))
        for name, ids in texts.items():
            plots.write(folder / f"{name}.npy", lambda half, ids=ids: np.save(half, ids))
        return print(f"{folder}: tasks.npz and {len(texts)} texts")
    out, device = Path(options.out), torch.device(options.device)
    settings = {"tasks": [*tasks], "texts": [*texts]}
    for name in ("teacher", "limit", "block_size", "sample"):
        settings[name] = getattr(options, name)
    results = {"settings": settings, "scores": {}}
    if out.exists():
        results = json.loads(out.read_text("utf-8"))
    if results["settings"] != settings:
        raise ValueError(f"{out} is of {results['settings']}; name another --out for {settings}")
    missing = [folder for folder in options.folders if folder not in results["scores"]]
    load = functools.partial(hestia.load_llama, dtype=torch.float32, device=device)
    teacher = load(options.teacher) if options.teacher and missing else None
    for folder in missing:
        print(folder)
        model, began = load(folder), time.perf_counter()
        row = score(model, teacher, tasks, texts, prompt, options)
        results["scores"][folder] = row | {"seconds": round(time.perf_counter() - began, 1)}
        plots.write_json(out, results)
    print_scores(results["scores"])
    for folder, row in results["scores"].items() if options.sample else ():
        with contextlib.suppress(ImportError):  # without tokenizers the tokens are kept alone
            row["text"] = tokenizer().decode(row["sample"])
        said = row.get("text", f"its sample is in {out}, as tokens; install tokenizers to read it")
        print(f"\n{folder}: {said}")
    plots.write_json(out, results)


def main(arguments=None):
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.zeroshot", epilog=rest,
                                     description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="+", help="Llamas that share a tokenizer")
    add("--tasks", metavar="DIR", help="with TASK.jsonl.xz, or a tasks.npz of --prepare")
    add("--texts", metavar="NAME=FILE", nargs="+", default=[], help="UTF-8, or .npy of --prepare")
    add("--teacher", metavar="FOLDER", help="measure KL(teacher || model) on the texts")
    add("--out", metavar="FILE", default="scores.json", help="Llamas in it are not scored again")
    add("--prepare", metavar="DIR", help="only tokenize, with the tokenizer of the first FOLDER")
    add("--sample", metavar="N", type=int, default=0, help="tokens to write after a fixed prompt")
    add("--limit", metavar="N", type=int, help="only the first items of each task")
    add("--block-size", metavar="N", type=int, default=1024, help="of the texts (default: 1024)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    main()
