"""tables.py: what published files print, what is no results file, what consoles can show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hestia
import plots
from notebooks.lab import tables

ROOT = Path(tables.__file__).resolve().parents[2]


def test_labels_of_rows_and_of_ablations():
    assert tables.label("absmean") == "AbsMean STE"
    assert tables.label("hestia-no-hessian") == "HESTIA, alpha = 0"
    assert tables.label("twn") == "TWN"
    assert tables.label("hestia:scores=shuffled") == "HESTIA, scores shuffled"
    assert tables.label("hestia:alpha=-0.6") == "HESTIA, alpha -0.6"
    assert tables.label("nobody knows") == "nobody knows"


def test_a_table_of_two_seeds_by_hand(capsys):
    """Means 1.0, 1.5, 1.25; standard deviations 0.1414; gaps recovered 50 % of each seed."""
    seeds = []
    for offset in (-0.1, 0.1):
        losses = {"full": 1.0 + offset, "absmean": 1.5 + offset, "hestia": 1.25 + offset}
        seeds.append({row: {"train": loss, "val": loss} for row, loss in losses.items()})
    seeds[1]["hestia"]["train"] += 0.02
    tables.print_table({"config": {}, "per_seed": seeds})
    cells = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    head, _, full, ste, ours = [[cell.strip() for cell in line] for line in cells]
    assert head[-2:] == ["gap recovered, train", "gap recovered, validation"]
    assert full == ["full precision, continued", *2 * ["1.0000 ± 0.1414"], *2 * ["100 ± 0 %"]]
    assert ste[-1] == "0 ± 0 %" and ours[-2:] == ["48 ± 3 %", "50 ± 0 %"]
    tables.print_paired(seeds)
    assert "(-0.2400 ± 0.1271)" not in (text := capsys.readouterr().out)
    assert "-0.2400 ± 0.1271 |" in text  # t(1) is 12.71; the deviation 0.0141, over sqrt(2)


def test_no_gap_where_the_ste_is_not_above_full_precision():
    rows = {"full": (2.0, 3.0), "absmean": (2.5, 2.9), "hestia": (2.25, 2.95)}
    rows = {name: {"train": train, "val": val} for name, (train, val) in rows.items()}
    table = plots.summarize([rows])
    assert table["hestia"]["gap_train"] == [0.5, None] and "gap_val" not in table["hestia"]
    assert "gap_train" not in rows["hestia"]  # the rows themselves stay as they are


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "results").glob("*.json")))
def test_every_published_file_has_tables(path, capsys):
    assert tables.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n|") > 2 and "nan" not in printed


def test_the_published_tables_are_what_the_files_print(capsys):
    """A comment with the command stands above each of them."""
    pages = [ROOT / "README.md", ROOT / "notebooks" / "lab" / "RESULTS.md"]
    text = "".join(page.read_text("utf-8") for page in pages if page.exists())
    command = r"<!-- python (?:-m notebooks\.lab\.tables|train_tiny\.py --show) (\S+) -->"
    _, *parts = re.split(command, text)
    assert len(parts) >= 14  # a path and what follows it, seven times
    for path, below in zip(parts[::2], parts[1::2]):
        assert tables.main([str(ROOT / path)]) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
        shown = [line for line in below.splitlines() if line[:1] == "|"]
        assert shown[: len(printed)] == printed, path


@pytest.mark.parametrize("content", ["", "{}", "[1]", '"text"', "3", '{"per_seed": []}'])
def test_what_holds_no_results_is_refused_in_one_sentence(content, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content:
        path.write_text(content, "utf-8")
    assert tables.main([str(path)]) == 2
    said = capsys.readouterr()
    assert "holds no results that can be shown" in said.err and said.err.count("\n") == 1
    assert not said.out


# What a program may inherit: a console and files in ASCII, and a notebook's way to draw
POOR = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
        "MPLBACKEND": "module://a.notebook", "PYTHONWARNDEFAULTENCODING": "1"}
TINY = """--layers 1 --hidden 8 --intermediate 8 --heads 2 --group-size 8 --batch-size 2 --rank 1
--samples 2 --calibration 1 --block-size 8 --eval-tokens 64 --pretrain-steps 2 --steps 2 --seeds 2
--methods full absmean hestia --data text-ü.txt"""
ENTRIES = {  # in this order: some show what others made
    "train_tiny.py": f"{TINY} --out run-文", "plots.py": "overview --run run-文 --save figures-é",
    "-m notebooks.lab.tables": "run-文/results.json", "-m notebooks.lab.curvature": "--help",
    "-m notebooks.lab.checkpoints": "llama-文 copy-文",
}
SLOW = {
    "-m notebooks.lab.study": f"{TINY} --out study-文 --workers 1",
    "-m notebooks.lab.figures": "all --run run-文 --save figures-é",
    "-m notebooks.lab.bench": "--llama tiny --steps 4 --rounds 1 --micro 2 --accumulate 1 "
                              "--modes full hestia --out bench-é.json",
}


def called(entry, arguments, folder, **environment):
    command = [str(ROOT / entry)] if entry.endswith(".py") else entry.split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command, *arguments.split()], cwd=folder,
                          env=environment, capture_output=True)
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


def try_entries(folder, entries):
    """Neither changes how files are read and written: each open of a text says its encoding."""
    pytest.importorskip("safetensors")
    (folder / "text-ü.txt").write_bytes((ROOT / "hestia.py").read_bytes()[:4000])
    hestia.save_llama(hestia.Llama(hestia.LlamaConfig(64, 16, 32, 1, 2, 1)), folder / "llama-文")
    for entry, arguments in entries.items():
        code, printed, said = called(entry, arguments, folder, **POOR)
        assert code == 0 and printed, (entry, said)
        assert "can't encode" not in printed + said and "is left out" not in printed, entry
        warned = [line for line in said.splitlines() if "EncodingWarning" in line]
        assert not [line for line in warned if str(ROOT) in line], (entry, warned)


def test_programs_run_with_a_poor_console_and_a_notebooks_settings(tmp_path):
    try_entries(tmp_path, ENTRIES)
    for name in ("run-文/overview.png", "figures-é/overview.png", "copy-文/config.json"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.slow
def test_other_programs_run_with_a_poor_console_and_a_notebooks_settings(tmp_path):
    try_entries(tmp_path, {"train_tiny.py": ENTRIES["train_tiny.py"], **SLOW})
    for name in ("study-文/results.json", "bench-é.json"):
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii", "utf-8"])
def test_tables_on_consoles_that_lack_some_signs(encoding):
    code, printed, said = called("-m notebooks.lab.tables", "notebooks/results/table1.json", ROOT,
                                 PYTHONIOENCODING=encoding)
    assert code == 0 and not said and printed.count("\n") > 10
    assert ("?" in printed) == (encoding != "utf-8")  # the minus sign, at least
    code, printed, said = called("-m notebooks.lab.tables", "größer.json", ROOT,
                                 PYTHONIOENCODING=encoding)
    assert code == 2 and said.count("\n") == 1 and "holds no results" in said


def test_what_each_part_is_worth_by_hand(tmp_path, capsys):
    """Two files of two seeds. The relaxation is worth 0.1 in both, the teacher 0.2."""
    files = []
    for distill in (0.0, 0.5):
        seeds = []
        for noise in (0.0, 0.01):
            ste = {"train": 1.0 + noise, "val": 2.0 - 0.4 * distill}
            ours = {"train": ste["train"] - 0.1, "val": ste["val"] - 0.1 - noise}
            seeds.append({"before": ste, "absmean": ste, "hestia-no-hessian": ours})
        files.append({"config": {"distill": distill}, "per_seed": seeds,
                      "data": {"sha256": "a", "unit": "byte"}})
    found = tables.worth(files, "val")
    assert list(found) == ["relaxation, alpha = 0", "teacher, STE", "teacher, HESTIA, alpha = 0"]
    assert found["teacher, STE"][0] is None
    assert [x[0] for x in found["relaxation, alpha = 0"]] == pytest.approx([-0.105, -0.105])
    assert found["teacher, STE"][1] == pytest.approx((-0.2, 0.0, 0.0))
    half = 12.71 * 0.01 / 2**0.5 / 2**0.5  # t(1), the deviation, the root of two seeds
    assert found["relaxation, alpha = 0"][0][1] == pytest.approx(half, rel=1e-3)
    paths = [tmp_path / "ce.json", tmp_path / "teacher.json"]
    for path, file in zip(paths, files):
        plots.write_json(path, file)
    assert tables.main([*map(str, paths)]) == 0
    head, _, relaxation, *_ = capsys.readouterr().out.splitlines()
    assert head.count("cross-entropy") == head.count("teacher 0.5") == 2
    assert relaxation.count("-0.1000 ± 0.0000") == 2 and "-0.1050 ± 0.0636" in relaxation
    files[1]["data"]["sha256"] = "b"
    plots.write_json(paths[1], files[1])
    assert tables.main([*map(str, paths)]) == 2
    assert "the files are of different texts" in capsys.readouterr().err
