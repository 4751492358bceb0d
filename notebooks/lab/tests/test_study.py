"""study.py: which rows, which rates, and a study that is broken off, against one that is not."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import matplotlib.figure
import pytest
import torch

import hestia
import plots
import train_tiny
from notebooks.lab import rivals, study, tables

torch.set_num_threads(1)  # these models are so small that a second thread only waits

ROOT = Path(hestia.__file__).resolve().parent
TINY = shlex.split("--layers 1 --hidden 32 --intermediate 32 --heads 2 --batch-size 2 "
                   "--block-size 8 --eval-tokens 256 --samples 2 --rank 0 --calibration 2 "
                   "--device cpu --group-size 32")
# a row of each ablation; 1e30 diverges
ROWS = ["full", "absmean", "hestia", "absmean:group_size=16", "hestia:scores=shuffled",
        "hestia:alpha=-0.6", "hestia:rho=0.0", "hestia-2bit", "hestia:samples=5"]
ONE_OF_EACH = ["--methods", *ROWS, "--lrs", "3e-3", "1e30", *TINY, "--steps", "3",
               "--pretrain-steps", "4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(hestia.__file__).read_text()[:20000])
    return str(path)


# --------------------------------------------------------------------------------------------------
# by hand


def test_names_say_what_the_lines_change():
    for what, rows in study.ABLATIONS.items():
        for name, line in rows.items():
            base, _, change = name.partition(":")
            if what == "bits":
                assert line == rivals.ROWS[name]
            elif not change:
                assert line == train_tiny.ROWS[name]
            else:
                key, _, value = change.partition("=")
                said = {"group_size=0": None}.get(change, value)
                assert {k: v if v is None else str(v) for k, v in line.items() if k == key} == {
                    key: said}
                assert {k: v for k, v in line.items() if k != key} == train_tiny.ROWS[base]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "results").glob("*.json")))
def test_every_published_row_can_be_asked_for(path):
    found = json.loads(path.read_text())
    if "per_seed" not in found:
        pytest.skip("no rows")
    for rows in found["per_seed"]:
        assert {*rows} <= {*study.ROWS, *study.LINES, "before", "untrained"}


def test_rows_that_are_asked_for():
    rows = lambda command: study.parse(shlex.split(command))[0].methods
    assert rows("") == train_tiny.Config.methods
    assert rows("--methods all") == (*train_tiny.ROWS, *rivals.ROWS)
    assert rows("--methods twn hestia:alpha=0.6 twn") == ("twn", "hestia:alpha=0.6")
    assert rows("--ablate hessian") == ("full", "absmean", "hestia", "hestia-no-hessian",
                                        "hestia:scores=shuffled", "hestia:scores=common",
                                        "hestia:scores=hawq")
    assert rows("--methods twn --ablate rho")[:4] == ("full", "absmean", "twn", "hestia")
    assert rows("--ablate group --group-size 32")[3:] == (
        "absmean:group_size=0", "absmean:group_size=16", "hestia-no-hessian:group_size=0",
        "hestia:group_size=0", "hestia:group_size=16")
    assert len(rows("--ablate all")) == 3 + sum(map(len, study.ABLATIONS.values()))
    config, workers, worker = study.parse(shlex.split("--lrs 1e-3 3e-3 --workers 2 --steps 7"))
    assert (config.lrs, workers, worker, config.steps) == ((1e-3, 3e-3), 2, None, 7)


def test_rows_take_the_rates_of_others():
    line = "--lrs 1 2 --methods absmean twn full leak hestia:rho=0.0 --tune full absmean hestia"
    config, _, _ = study.parse(line.split())
    some = study.Study.__new__(study.Study)
    some.config = config
    chosen = {row: some.chooser(row) for row in config.methods}
    assert chosen == {"absmean": "absmean", "twn": "absmean", "full": "full", "leak": "hestia",
                      "hestia:rho=0.0": "hestia"}
    some.config.tune = ()
    assert [*map(some.chooser, ("twn", "hestia:rho=0.0"))] == ["twn", "hestia"]
    for tune in ("absmean", "absmean magic", "hestia"):
        with pytest.raises(ValueError, match="--tune takes names of rows, with a temperature and"):
            study.parse(f"--methods twn leak --tune {tune}".split())
    with pytest.raises(ValueError, match="--tune takes names"):  # full's rate is for no other
        study.parse(["--methods", "full", "twn", "--tune", "full"])


def test_best_rate_by_hand():
    assert study.best_rate({"0.001": 1.3, "0.003": 1.2, "0.009": 1.25}) == 0.003
    assert study.best_rate({"0.001": None, "0.003": 9.0}) == 0.003
    assert study.best_rate({"0.001": 1.0, "0.003": 1.0}) == 0.001
    with pytest.raises(RuntimeError, match="diverged at all of --lrs"):
        study.best_rate({"0.001": None, "0.003": None})


def test_changed_scores_by_hand():
    scores = {"a": 0.0, "b": 1.0, "c": 0.5}
    assert study.changed_scores(scores, None, 0.4, 0) is scores
    shuffled = study.changed_scores(scores, "shuffled", 0.4, 0)
    assert list(shuffled) == list(scores) and sorted(shuffled.values()) == [0.0, 0.5, 1.0]
    assert shuffled != scores
    common = study.changed_scores(scores, "common", 0.4, 0)
    mean = (1 + math.exp(0.4) + math.exp(0.2)) / 3
    assert math.exp(0.4 * common["a"]) == pytest.approx(mean) and len(set(common.values())) == 1
    for alpha in (0.4, -0.3, 1e-9, 0.0):  # rounding leaves none outside of 0 to 1
        assert 0 <= study.changed_scores(dict.fromkeys("ab", 1.0), "common", alpha, 0)["a"] <= 1


def test_hawq_scores_by_hand():
    some, model = study.Study.__new__(study.Study), torch.nn.ModuleDict()
    some.config = types.SimpleNamespace(group_size=0, kappa=1.0)
    tensors, measure = {}, {}
    for name, w in {"a": [3.0, -3.0, 0.0, 0.0], "b": [1.0, 1.0, 1.0, 3.0]}.items():
        model[name] = torch.nn.Linear(4, 1, bias=False)
        model[name].weight.data = torch.tensor([w])
        tensors[name] = {"value": 2.0, "stderr": 0.0}
        measure[name] = 2.0 * {"a": 4.5 / 4, "b": (3 * 0.5**2 + 1.5**2) / 4}[name]  # gamma is 1.5
    assert some.hawq_scores(model, tensors) == pytest.approx(hestia.sensitivity_scores(measure))


def test_the_end_of_the_text_and_a_seed_of_its_own_choose_the_rate(monkeypatch, tmp_path):
    """No text and no seed of the rows is seen by the choice, or the other way round."""
    config, *_ = study.parse(["--methods", "hestia:alpha=0.6", "--lrs", "1e-3", "3e-3", *TINY,
                              "--out", str(tmp_path), "--seed", "5", "--seeds", "2"])
    tokens = {"train": torch.arange(1000), "val": torch.arange(2000, 2100)}
    seen = []  # (seed, {split: first and last token})

    def begin(config, tokens, seed, folder):
        seen.append((seed, {split: (int(t[0]), int(t[-1])) for split, t in tokens.items()}))
        return None, {"sensitivities": {"tensors": {}}}

    monkeypatch.setattr(train_tiny, "begin", begin)
    starts, tries, rows = study.Study(config, tokens).stages()
    for task in starts.values():
        task()
    front = {"train": (0, 974)}
    both = {**front, "val": (2000, 2099)}
    assert seen == [(5, both), (6, both), (1005, {**front, "end": (975, 999)})]
    stems = lambda stage: [path.stem for path in stage]
    assert stems(tries) == ["hestia-at-0.001-seed1005", "hestia-at-0.003-seed1005"]
    assert stems(rows) == ["hestia-alpha-0.6-seed5", "hestia-alpha-0.6-seed6"]
    config.block_size = 24
    with pytest.raises(ValueError, match=r"2\.5 % of the training text, for --lrs, is 25 tokens"):
        study.Study(config, tokens)


def test_what_a_row_gives_to_train_tiny(monkeypatch, tmp_path):
    """Its rate, its arguments of Hestia, and its scores."""
    config, *_ = study.parse(["--methods", "hestia", "--lrs", "1e-3", "3e-3", *TINY, "--out",
                              str(tmp_path)])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "start-seed0.json").write_text("{}")
    for base, losses in {"hestia": (1.0, 2.0), "absmean": (None, 2.0)}.items():
        for lr, loss in zip((0.001, 0.003), losses):
            path = tmp_path / "runs" / f"{base}-at-{lr}-seed1000.json"
            path.write_text(json.dumps(loss))
    traces = lambda *scores: {"tensors": {n: {"score": s} for n, s in zip("abc", scores)}}
    monkeypatch.setattr(train_tiny, "begin",
                        lambda *_: (None, {"sensitivities": traces(0.1, 0.2, 0.6)}))
    again = lambda config, *_: traces(config.samples, 0, 0)
    monkeypatch.setattr(train_tiny, "sensitivities", again)
    given = []
    monkeypatch.setattr(train_tiny, "run_row", lambda *what: given.append(what))
    tasks = study.Study(config, {"train": torch.arange(1000)})
    for name in ("hestia", "hestia:alpha=0.6", "hestia:scores=common", "hestia:scores=shuffled",
                 "hestia:samples=50", "absmean:group_size=0"):
        tasks.row(name, 0)
    rows = []
    for config, _, _, entry, _, _, _, line in given:
        tensors = entry["sensitivities"]["tensors"].values()
        rows.append((config.lr, line, [h["score"] for h in tensors]))
    ours, scores = dict(method="hestia"), [0.1, 0.2, 0.6]
    common = math.log(sum(math.exp(0.4 * s) for s in scores) / 3) / 0.4
    assert rows[:2] == [(0.001, None, scores), (0.001, {**ours, "alpha": 0.6}, scores)]
    assert rows[2] == (0.001, ours, pytest.approx([common] * 3))
    assert rows[3][:2] == (0.001, ours) and sorted(rows[3][2]) == scores != rows[3][2]
    assert rows[4] == (0.001, ours, [50, 0, 0])
    assert rows[5] == (0.003, dict(method="absmean", group_size=None), scores)


# --------------------------------------------------------------------------------------------------
# whole studies of tiny models


def command(text, out, *more):
    return [*ONE_OF_EACH, "--data", text, "--out", str(out), *more]


def outcome(folder):
    """All that a finished study leaves, but for the time that it took."""
    found = json.loads((folder / "results.json").read_text())
    for timed in [*found["per_seed"][0].values(), *found["sensitivities"]]:
        timed.pop("seconds", None)
    arrays = {row: {key: array.tobytes() for key, array in arrays.items()}
              for row, arrays in plots.read_snapshots(folder).items()}
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        for name, t in train_tiny.load_checkpoint(path).state_dict().items():
            tensors[f"{path.name}/{name}"] = t.numpy().tobytes()
    return [found[key] for key in ("per_seed", "tuning", "sensitivities", "data")], arrays, tensors


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "undisturbed"
    assert study.main(command(text, out)) == 0
    return out


def test_a_row_of_each_ablation(undisturbed, capsys):
    found = json.loads((undisturbed / "results.json").read_text())
    (rows,) = found["per_seed"]
    assert list(rows) == ["before", "untrained", *ROWS] == list(found["table"])
    last = {row: records[-1]["loss"] for (row, _), records in plots.read_log(undisturbed).items()}
    assert last.keys() == {"pretrain", *ROWS} and len(set(last.values())) == len(last)
    assert all(rows[name]["lr"] == 3e-3 for name in ROWS)
    assert list(found["tuning"]) == ["full", "absmean", "hestia", "hestia-2bit"]
    for losses in found["tuning"].values():
        assert losses["1e+30"] is None and 0 < losses["0.003"] < 10
    ternary = math.log2(3)
    bits = {"absmean": ternary + 16 / 32, "absmean:group_size=16": ternary + 1,
            "hestia:rho=0.0": ternary + 16 / 32, "hestia-2bit": 2 + 16 / 32}
    assert {name: rows[name]["bits"] for name in bits} == pytest.approx(bits)
    assert "bits" not in rows["full"] and found["command"].endswith(str(undisturbed))
    assert found["config"]["lrs"] == [3e-3, 1e30] and len(found["commit"]) >= 7
    tables.show(undisturbed / "results.json")
    assert "| HESTIA, alpha -0.6" in capsys.readouterr().out


def wait_for(what, seconds=600):
    began = time.monotonic()
    while not (found := what()):
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return found


def owners(out):
    """The processes that work at a task."""
    found = []
    for lock in out.glob("runs/*.lock"):
        with contextlib.suppress(OSError, IndexError):  # it was removed, or is being written
            found.append(int(lock.read_text().split()[1]))
    return found


def working(out):
    """Some rows are finished, and something is being done."""
    return len(list(out.glob("runs/*-seed0.npz"))) > 3 and owners(out)


@pytest.fixture
def small_figure(monkeypatch):
    """The figure takes longer than all else."""
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    monkeypatch.setattr(train_tiny, "overview", lambda folder: figure)


def test_what_two_workers_began_and_one_process_ends_is_the_same(
        undisturbed, text, tmp_path, capsys, small_figure):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    out = tmp_path / "run"
    interrupt = lambda: (wait_for(lambda: working(out)), os.kill(os.getpid(), signal.SIGINT))
    threading.Thread(target=interrupt).start()
    assert study.main(command(text, out, "--workers", "2")) == 130
    said = capsys.readouterr()
    assert "of 19 tasks ended" in said.out and "the same command goes on" in said.err
    assert list(out.glob("runs/*.lock")) and not (out / "results.json").exists()
    assert study.main(command(text, out)) == 0
    assert not list(out.glob("runs/*.lock")) and outcome(out) == outcome(undisturbed)


@pytest.mark.slow
def test_workers_are_killed_and_so_is_the_first_process(undisturbed, text, tmp_path):
    out = tmp_path / "run"

    def start():
        arguments = command(text, out, "--workers", "2")
        return subprocess.Popen([sys.executable, "-m", "notebooks.lab.study", *arguments], cwd=ROOT,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    first = start()
    wait_for(lambda: owners(out))
    first.kill()
    first.communicate()
    sizes = lambda: [path.stat().st_size for path in out.glob("worker*.log")]
    time.sleep(2)
    before = sizes()
    time.sleep(5)
    assert sizes() == before  # the workers have ended, too

    left, second = owners(out), start()
    (killed, *_) = wait_for(lambda: [pid for pid in owners(out) if pid not in left])
    os.kill(killed, signal.SIGKILL)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 1 and f"failed: process {killed} was ended" in said

    third = start()
    said, _ = third.communicate(timeout=300)
    assert third.returncode == 0 and "19 of 19 tasks ended" in said
    assert outcome(out) == outcome(undisturbed)


def test_a_task_that_fails_is_reported_and_the_others_go_on(
        text, tmp_path, monkeypatch, capsys, small_figure):
    arguments = ["--methods", "full", "absmean", "hestia-no-hessian", "--data", text, *TINY,
                 "--steps", "2", "--pretrain-steps", "1", "--out", str(tmp_path / "run")]
    original = train_tiny.run_row

    def out_of_memory(config, name, *more):
        if name == "absmean":
            raise RuntimeError("out of memory")
        return original(config, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "run_row", out_of_memory)
        assert study.main(arguments) == 1
    assert "absmean-seed0 failed: out of memory" in capsys.readouterr().err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["per_seed"][0]
    assert [*rows] == ["before", "untrained", "full", "hestia-no-hessian"]
    assert study.main(arguments) == 0
    said = capsys.readouterr().out
    assert "AbsMean STE, 2 steps" in said and "full precision, 2 steps" not in said
    assert study.main([*arguments, "--rho", "0.3"]) == 2  # another study
    assert "--rho was 0.2" in capsys.readouterr().err


def test_gpus_are_given_out_in_turn(tmp_path, monkeypatch):
    given = []

    def popen(command, env, **_):
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return types.SimpleNamespace(poll=lambda: 0, terminate=lambda: None, wait=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = types.SimpleNamespace(device="cuda", out=str(tmp_path))
    study.run_workers(4, [], config, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    study.run_workers(3, [], config, [])
    assert given == ["0", "1", "2", "0", "5", "7", "5"]


@pytest.mark.parametrize("more, message", (
    ("--methods magic", "unknown method 'magic'; expected one of hestia-no-hessian, full, absmean"),
    ("--methods hestia:alpha=0.7", "unknown method 'hestia:alpha=0.7'"),
    ("--lrs 1e-3 -1", "--lrs are rates above 0"),
    ("--lrs nan", "--lrs are rates above 0"),
    ("--workers -1", "--workers is a number of processes"),
    ("--methods absmean:group_size=16 --hidden 8 --group-size 8",
     "absmean:group_size=16: group size 16 does not divide the width 8; 8 would"),
    ("--rho 2", "--rho is 2"),
    ("--data nowhere.txt", "nowhere.txt"),
))
def test_what_cannot_work_is_refused_in_a_sentence(more, message, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert study.main(["--data", text, *TINY, "--out", str(out), *more.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not out.exists()


def test_help_and_an_unknown_option(capsys):
    for arguments, status in ((["--help"], 0), (["--ablate", "magic"], 2), (["--magic"], 2)):
        with pytest.raises(SystemExit) as ended:
            study.main(arguments)
        assert ended.value.code == status
    said = capsys.readouterr()
    assert "--workers N" in said.out and "--worker " not in said.out.replace("--worker N", "")
    assert said.err.count("\n") == 2
