"""figures.py: from made-up results, so that the outcome can be turned around."""

import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import plots
from notebooks.lab import figures

ROWS = ["full", "absmean", "hestia-no-hessian", "hestia", "int2"]
for variant in ("alpha=0.6", "rho=0.5", "group_size=32", "samples=50", "scores=shuffled"):
    ROWS.append(f"hestia:{variant}")


def results(worst="absmean"):
    """Made-up results of three seeds. The row `worst` ends highest."""
    rng, per_seed = np.random.default_rng(0), []
    loss = {row: 1.30 if row == "full" else 1.38 if row == worst else 1.35 for row in ROWS}
    for seed in range(3):
        rows = {}
        for row in ROWS:
            rows[row] = {"tau_init": 0.35 if row.startswith("hestia") else 0.0}
            for split in ("train", "val"):
                rows[row][split] = loss[row] + 0.01 * seed + 0.0003 * rng.normal()
        per_seed.append(rows)
    rates = {row: {"0.001": loss[row], "0.002": 1.4, "0.004": math.inf} for row in ROWS[1:4]}
    config = {"steps": 40, "rho": 0.2, "alpha": 0.4, "kappa": 1.0, "group_size": 64, "samples": 20,
              "seed": 0}
    tensors = {}
    for kind, h, score in (("q", 0.5, 0.2), ("v", 9.0, 0.8), ("k", 5.0, 0.7)):
        name = f"model.layers.1.self_attn.{kind}_proj"
        tensors[name] = {"value": h, "stderr": 0.4, "score": score}
    return {"config": config, "table": plots.summarize(per_seed), "per_seed": per_seed,
            "tuning": rates, "sensitivities": [{"tensors": tensors}]}


def a_run(folder, study):
    """A folder with these results and with snapshots."""
    (folder / "results.json").write_text(json.dumps(study))
    arrays = {"tensors": np.array(["model.layers.1.mlp.down_proj"]),
              "step": np.arange(0, 40, 4), "felt": np.linspace(1, 0, 10),
              "grad_norm": np.linspace(2, 1, 10), "grad_norm_latent": np.linspace(2, 3, 10),
              "hist": np.full((10, 1, 120), 1 / 120)}
    (folder / "runs").mkdir()
    for row in ("absmean", "hestia"):
        np.savez(plots.run_file(folder, row, 0, "npz"), **arrays)
    return folder


def titles(drawn):
    figure = drawn if isinstance(drawn, plots.plt.Figure) else drawn.figure
    plots.plt.close(figure)
    text = " | ".join(ax.get_title(loc="left") for ax in figure.axes)
    return " ".join(text.split())  # whatever space or line break stands there


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_draws_and_says_something(name, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "animation", partial(figures.animation, seconds=0.2))
    draw, about, _ = figures.FIGURES[name]
    run = a_run(tmp_path, results())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "animation":
            path = plots.save(figures.FIGURES, name, run)
            assert path.read_bytes()[:6] == b"GIF89a"
            return
        said = titles(draw(run))
    assert about and len(said) > 20 and "nan" not in said


def test_titles_follow_the_numbers():
    before, after = results(), results(worst="hestia")
    shuffled = "scores shuffled is clearly better than HESTIA"
    assert shuffled in titles(figures.controls(after))
    assert shuffled not in titles(figures.controls(before))
    assert "Lowest: ρ = 0.5, −0.03" in titles(figures.loss_against(after, "rho"))
    assert "recovers the largest part of the gap" in titles(figures.gap_recovered(before))
    for rows in before["per_seed"]:
        rows["full"]["train"] = 1.5  # no gap: full precision is above the STE
    assert "is lowest: −0.03" in titles(figures.gap_recovered(before))
    one = {**after, "per_seed": after["per_seed"][:1]}
    assert "One seed, no interval" in titles(figures.controls(one))
    assert "±" not in titles(figures.loss_against(one, "rho"))

    larger = plots.read_results(figures.RESULTS / "gpu-3-seeds.json")
    said = titles(figures.gap_recovered(larger, "val"))
    assert "Both are worse than AbsMean STE; closest is HESTIA, −41.8" in said
    order = []
    for split in plots.SPLITS:
        ax = figures.gap_recovered(larger, split)
        order.append([text.get_text() for text in ax.get_yticklabels()])
    assert order[0] == order[1]  # the same order for both texts


def test_the_study_of_estimators_in_words():
    study = figures.read_study("curvature.json")
    assert "errs 1.7 times less than Hutchinson" in titles(figures.hutchpp_error(study))
    curves = study["curves"]
    plain, plus = curves["Hutchinson, per tensor"], curves["Hutch++, per tensor"]
    curves |= {"Hutchinson, per tensor": plus, "Hutch++, per tensor": plain}
    assert "errs 1.7 times more than Hutchinson" in titles(figures.hutchpp_error(study))
    study["other"]["gradnorm"] = [1 / x for x in study["exact"]]
    said = titles(figures.sensitivity_against(study))
    assert "ranks the tensors the other way: Spearman −1.00" in said


def test_slopes_in_numbers():
    said = titles(figures.jacobians())
    assert "4 of 10 methods take the slope for 1" in said  # AbsMean STE, SEQ, TWN, Tequila


def test_what_is_missing_gets_one_sentence(tmp_path, monkeypatch):
    nothing = {"config": {}, "table": {}, "per_seed": []}
    with pytest.raises(ValueError, match="no absmean to compare with"):
        figures.gap_recovered(nothing)
    with pytest.raises(ValueError, match="no learning rates were chosen"):
        figures.loss_against(nothing, "lr")
    with pytest.raises(ValueError, match="no row has another group size"):
        figures.loss_against(nothing, "group_size")
    with pytest.raises(ValueError, match="unknown setting 'magic'"):
        figures.loss_against(nothing, "magic")
    with pytest.raises(ValueError, match="no scores were shuffled"):
        figures.controls(nothing)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"no readable notebooks/results/table1\.json"):
        figures.FIGURES["table1"][0](None)


def test_what_the_command_lacks_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in (
        (["felt_curves"], "there is no finished run under out/; make one with"),
        (["felt"], "there is no figure felt; expected all, staircase"),
        (["all", "--run", "nowhere"], "nowhere has no readable results.json; make it with"),
    ):
        assert plots.main([*arguments, "--save", "pictures"]) == 2
        text = capsys.readouterr().err
        assert sentence in text and text.count("\n") == 1
    assert not (tmp_path / "pictures").exists()
    assert plots.main(["staircase", "--save", "pictures"]) == 0
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["staircase.png"]


@pytest.mark.parametrize("inherited", [
    "module://matplotlib_inline.backend_inline", "module://ipykernel.pylab.backend_inline"])
def test_a_program_started_in_a_notebooks_cell_draws_files(inherited, tmp_path):
    """Neither module need be there: a notebook runs in another environment."""
    code = ("import sys; sys.modules['matplotlib_inline'] = None; import plots\n"
            "sys.exit(plots.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "staircase", "--save", tmp_path], text=True,
                          cwd=Path(plots.__file__).parent, capture_output=True,
                          env={**os.environ, "MPLBACKEND": inherited, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and (tmp_path / "staircase.png").exists(), done.stderr
