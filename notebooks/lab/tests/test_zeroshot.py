"""zeroshot.py against loops over tokens, torch's KL, numbers by hand and lm-evaluation-harness."""

import itertools
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hestia
from notebooks.lab import zeroshot

SHARED = Path(hestia.__file__).resolve().parent.parent / "shared"
CONFIG = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2)


def llama(seed, **changes):
    torch.manual_seed(seed)
    model = hestia.Llama(hestia.LlamaConfig(**CONFIG | changes))
    for p in model.parameters():
        p.data *= 4  # far from uniform
    return model


def random_task(seed=0, items=9):
    """What prepare returns, of random tokens. Items have two to four choices."""
    rng = np.random.default_rng(seed)
    choices = rng.integers(2, 5, items)
    length = rng.integers(2, 24, choices.sum())
    scored = [rng.integers(1, n) for n in length]
    task = {"tokens": rng.integers(0, 61, length.sum()), "length": length, "scored": scored,
            "characters": rng.integers(1, 30, len(length)), "choices": choices,
            "gold": rng.integers(0, 2, items)}
    return {field: zeroshot.compact(values) for field, values in task.items()}


# --------------------------------------------------------------------------------------------------
# sums, accuracies, KL


@torch.no_grad()
def test_log_likelihoods_are_those_of_a_loop_over_tokens():
    model, task = llama(0), random_task()
    expected, start = [], 0
    for length, scored in zip(task["length"].tolist(), task["scored"].tolist()):
        ids = torch.from_numpy(task["tokens"][start : start + length].astype(np.int64))
        start += length
        total = 0.0
        for t in range(length - scored, length):
            total += float(model(ids[None, :t])[0, -1].log_softmax(-1)[ids[t]])
        expected.append(total)
    np.testing.assert_allclose(zeroshot.log_likelihoods(model, task), expected, rtol=1e-5)


def test_batches_padding_and_pieces_change_nothing(monkeypatch):
    model, task = llama(1), random_task(1)
    whole = zeroshot.log_likelihoods(model, task, 10**6)
    for limit in (1, 30, 100):  # 1: each sequence by itself, without padding
        np.testing.assert_allclose(zeroshot.log_likelihoods(model, task, limit), whole, rtol=1e-5)
    monkeypatch.setattr(zeroshot, "LOGITS", 3 * 61)
    np.testing.assert_allclose(zeroshot.log_likelihoods(model, task, 100), whole, rtol=1e-5)
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_accuracies_by_hand():
    # Three items of 2, 3 and 2 choices. The right ones are the second, the third and the first.
    task = {"choices": np.array([2, 3, 2], np.uint16), "gold": np.array([1, 2, 0], np.uint16),
            "characters": [2, 4, 1, 1, 1, 5, 5]}
    sums = [-2.0, -3.0, -4.0, -5.0, -6.0, -1.0, -1.0]
    # plain:          -2 > -3, wrong; -4 is largest, wrong; equal, so the first: right
    # per character:  -1 < -0.75, right; -4 is largest, wrong; right
    scores = zeroshot.accuracies(sums, task)
    assert [scores[name] for name in ("n", "acc", "acc_norm")] == [3, 1 / 3, 2 / 3]
    assert scores["acc_se"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    right = [0.0, 0.0, 1.0]  # a standard deviation with n - 1, over the root of n
    assert scores["acc_se"] == pytest.approx(np.std(right, ddof=1) / 3**0.5)


@pytest.mark.parametrize("n", [16, 75, 7])  # whole blocks, a rest, less than a block
def test_divergence_is_torchs_kl_div(monkeypatch, n):
    teacher, model = llama(2), llama(3)
    tokens = torch.randint(61, (n,), generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in tokens.split(16):
            p, q = (m(ids[None, :-1])[0].double().log_softmax(-1) for m in (teacher, model))
            total += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
            count += len(ids) - 1
    monkeypatch.setattr(zeroshot, "LOGITS", 7 * 61)
    assert zeroshot.divergence(teacher, model, tokens, 16) == pytest.approx(total / count, rel=1e-5)
    assert zeroshot.divergence(model, model, tokens, 16) == 0


# --------------------------------------------------------------------------------------------------
# wording and tokens


def test_wording():
    row = {"query": "Golf: A man stands. He swings. the ball", "choices": ["flies.", "melts."],
           "gold": 0}
    context = "Golf: A man stands. He swings. The ball"
    assert zeroshot.wording("hellaswag", row) == ([(context, " flies."), (context, " melts.")], 0)
    whole = {**row, "query": "Health: How to sleep. Lie down."}
    assert zeroshot.wording("hellaswag", whole)[0][0][0] == whole["query"]
    row = {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 1}
    assert zeroshot.wording("piqa", row)[0][1] == ("Question: dresser\nAnswer:", " b")
    row = {"context_options": ["so Ann", "so Bob"], "continuation": "left.", "gold": 1}
    assert zeroshot.wording("winogrande", row) == ([("so Ann", " left."), ("so Bob", " left.")], 1)


def small_tokenizer(beginning):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([Path(hestia.__file__).read_text()[:20000]], trainer)
    if beginning:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.mark.parametrize("beginning", [False, True])
def test_continuations_are_what_follows_the_contexts_own_tokens(beginning):
    tokenizer = small_tokenizer(beginning)
    rows = [{"context_options": ["the weight ", "ü"], "continuation": "trains é.", "gold": 0}]
    task = zeroshot.prepare("winogrande", rows, tokenizer)
    ends = np.cumsum(task["length"])
    for ids, scored, text in zip(np.split(task["tokens"], ends), task["scored"].tolist(),
                                 ["the weight  trains é.", "ü trains é."]):
        assert (ids[0] == 0) == beginning
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.decode(ids[-scored:].tolist()) in ("  trains é.", " trains é.")
    assert task["characters"].tolist() == [9, 9]
    assert all(values.dtype == np.uint16 for values in task.values())
    assert zeroshot.compact([70000]).dtype == np.int32


# --------------------------------------------------------------------------------------------------
# the program


@pytest.fixture
def folders(tmp_path):
    pytest.importorskip("safetensors")
    return [str(hestia.save_llama(llama(seed, vocab_size=500), tmp_path / name))
            for seed, name in ((5, "one"), (6, "two"))]


def test_prepared_here_and_scored_without_tokenizers(folders, tmp_path, monkeypatch, capsys):
    small_tokenizer(True).save(folders[0] + "/tokenizer.json")
    tasks, text, ready = tmp_path / "tasks", tmp_path / "a.txt", tmp_path / "ready"
    tasks.mkdir()
    rows = [{"query": f"Question: {k}?", "choices": ["one", "two", "a hundred"], "gold": k % 3}
            for k in range(5)]
    with lzma.open(tasks / "arc_easy.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text.write_text("a text about weights " * 40)
    data = ["--tasks", str(tasks), "--texts", f"a={text}"]
    zeroshot.main([*folders, *data, "--prepare", str(ready)])
    common = ["--teacher", folders[0], "--limit", "4", "--block-size", "32", "--sample", "5"]
    common += ["--device", "cpu"]
    zeroshot.main([*folders, *data, *common, "--out", str(tmp_path / "a.json")])
    data = ["--tasks", str(ready / "tasks.npz"), "--texts", f"a={ready / 'a.npy'}"]
    out = ["--out", str(tmp_path / "b.json")]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    zeroshot.main([folders[0], *data, *common, *out])
    zeroshot.main([*folders, *data, *common, *out])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in "ab")
    for row in (*one.values(), *two.values()):
        del row["seconds"]
    assert all(row.pop("text") for row in one.values())  # without the package there are only tokens
    assert one == two
    row = one[folders[0]]
    assert row["tasks"]["arc_easy"]["n"] == 4
    assert row["kl"]["a"] == 0 < one[folders[1]]["kl"]["a"]
    tokens = torch.from_numpy(np.load(ready / "a.npy").astype(np.int32))
    assert row["loss"]["a"] == hestia.evaluate(hestia.load_llama(folders[0]), tokens, 32)
    assert "| a, loss | a, KL |" in " ".join(capsys.readouterr().out.split())

    monkeypatch.setattr(zeroshot, "score", None)  # nothing is left to score
    zeroshot.main([*folders, *data, *common, *out])
    with pytest.raises(SystemExit):
        zeroshot.main([*folders, *data, *common, *out, "--limit", "3"])
    assert "name another --out" in capsys.readouterr().err


def test_one_sentence_for_bad_input(folders, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([1, 500]))
    np.savez(tmp_path / "a.npz", a=np.array([1]))
    (tmp_path / "empty").mkdir()
    other = str(hestia.save_llama(llama(7, vocab_size=600), tmp_path / "other"))
    small = ["--texts", f"a={tmp_path / 'a.npy'}", "--out", str(tmp_path / "s.json")]
    for arguments, message in (
        ([folders[0], *small], "tokens up to 500"),
        ([other, *small, "--teacher", folders[0]], "Llamas of [500, 600] tokens"),
        ([folders[0], "--tasks", str(tmp_path / "empty")], "has none of arc_challenge"),
        ([folders[0], "--tasks", str(tmp_path / "a.npz")], "is not a tasks.npz"),
        ([folders[0], "--texts", "b"], "b is not NAME=FILE"),
        ([folders[0], "--texts", "b=none"], "No such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            zeroshot.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# lm-evaluation-harness, its own task files and its own model


def in_the_harness_form(name, row):
    """A row as the data set on the hub has it."""
    if name == "winogrande":
        a, b = row["context_options"]
        shared = [x == y for x, y in zip(a, b)]
        prefix = a[: shared.index(False) if False in shared else len(shared)]
        first, second = a.removeprefix(prefix), b.removeprefix(prefix)
        return {"sentence": f"{prefix}_ {row['continuation']}", "option1": first,
                "option2": second, "answer": str(row["gold"] + 1)}
    choices, query = row["choices"], row["query"].removeprefix("Question: ")
    if name == "piqa":
        return {"goal": query.removesuffix("\n"), "sol1": choices[0], "sol2": choices[1],
                "label": row["gold"]}
    if name == "hellaswag":
        label, _, context = query.partition(": ")
        a, _, b = context.rpartition(". ")
        a, b = (context, "") if context.endswith(".") else (a + ".", b)
        return {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": choices,
                "label": str(row["gold"])}
    letters = dict(zip(dict.fromkeys(choices), "ABCD"))  # without the copies
    return {"question": query, "choices": {"text": [*letters], "label": [*letters.values()]},
            "answerKey": letters[choices[row["gold"]]]}


@pytest.mark.parametrize("name", zeroshot.TASKS)
def test_lm_evaluation_harness_agrees(name):
    """ZEROSHOT_LLAMA=FOLDER and ZEROSHOT_ITEMS=N take another Llama, and more items."""
    lm_eval = pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    from notebooks.lab.texts import load_tokenizer

    folder = Path(os.environ.get("ZEROSHOT_LLAMA", SHARED / "checkpoints" / "stories260k"))
    items = int(os.environ.get("ZEROSHOT_ITEMS", 12))
    path = SHARED / "eval" / f"{name}.jsonl.xz"
    if not path.exists() or not folder.exists():
        pytest.skip("without the tasks, or without a Llama")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, items)]
    task = zeroshot.prepare(name, rows, load_tokenizer(folder))
    model = hestia.load_llama(folder, torch.float32)
    sums = zeroshot.log_likelihoods(model, task, name=name)
    scores = zeroshot.accuracies(sums, task)

    file = {"arc": f"arc/{name}.yaml", "winogrande": "winogrande/default.yaml"}
    file = file.get(name.partition("_")[0], f"{name}/{name}.yaml")
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    docs = datasets.Dataset.from_list([in_the_harness_form(name, row) for row in rows])
    splits = dict.fromkeys(("train", "validation", "test"), docs)
    config["custom_dataset"] = lambda **_: splits
    harness = lm_eval.simple_evaluate(
        HFLM(str(folder), dtype="float32", device="cpu", batch_size=8),
        tasks=[ConfigurableTask(config=config)], bootstrap_iters=2)
    samples = sorted(harness["samples"][name], key=lambda sample: sample["doc_id"])
    theirs = np.array([float(answer[0][0]) for sample in samples for answer in sample["resps"]])
    print(f"{name}: {len(sums)} sums differ by at most {np.abs(sums - theirs).max():.1e} nats")
    np.testing.assert_allclose(sums, theirs, atol=2e-3, rtol=1e-5)
    for kind in ("acc", "acc_norm")[: 1 if name == "winogrande" else 2]:
        result = harness["results"][name]
        assert scores[kind] == pytest.approx(result[f"{kind},none"])
        assert zeroshot.accuracies(theirs, task)[kind] == scores[kind]
        assert scores[kind + "_se"] == pytest.approx(result[f"{kind}_stderr,none"], abs=1e-9)
