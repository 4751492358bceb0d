"""tables.py: what the published files print, and what is no results file."""

import re
from pathlib import Path

import pytest

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
    text = "".join(page.read_text() for page in pages if page.exists())
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
        path.write_text(content)
    assert tables.main([str(path)]) == 2
    said = capsys.readouterr()
    assert "holds no results that can be shown" in said.err and said.err.count("\n") == 1
    assert not said.out
