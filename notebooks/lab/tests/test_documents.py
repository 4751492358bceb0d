"""README's snippets run, and the notebooks are kept executed, whole and small."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

import hestia
import plots
import train_tiny

ROOT = Path(hestia.__file__).resolve().parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_snippets_of_the_readme_run():
    pytest.importorskip("transformers")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    loop, guidance, method = re.findall(r"```python\n(.*?)```", readme, re.S)
    scope = {}
    torch.manual_seed(0)  # of some models of noise no trace is positive, which is an error
    exec(loop, scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model of noise may have negative traces
        exec(guidance, scope)
    assert scope["scores"].keys() == hestia.linear_layers(scope["model"]).keys()
    exec(method, scope)
    qat = scope["qat"]
    qat.relax(0)
    qat.harden()
    assert hestia.METHODS.pop("half").label == "half of each group"
    for layer in qat.layers.values():
        for group in layer.weight.detach().reshape(-1, 32):
            assert len(group.abs().unique()) <= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_executed_whole_and_small(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 35 and path.stat().st_size <= 500_000
    # once, from top to bottom
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"

    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    modules = {"../hestia.py": hestia, "../train_tiny.py": train_tiny, "../plots.py": plots}
    for label, target in re.findall(r"\[([^]]*)\]\(([^)]*)\)", text):
        file = target.partition("#")[0]
        assert target.startswith("https://") or (path.parent / file).exists(), target
        if target in modules and label.startswith("`") and not label.endswith(".py`"):
            name = re.match(r"`(?:train_tiny\.|plots\.)?(\w+)", label)[1]
            assert hasattr(modules[target], name), f"{label} is not in {target}"
