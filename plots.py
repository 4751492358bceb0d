"""Figures: one function each, data in, matplotlib Axes out. Nothing here trains.

    python plots.py --run out/NAME        # overview.png of a finished run, again
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import hestia

# colour-blind safe (Okabe-Ito), and each with a dash and a marker of its own, so that greyscale still tells them apart
STYLE = {
    "full": {"color": "#000000", "linestyle": "-"},
    "absmean": {"color": "#D55E00", "linestyle": "--"},
    "hestia-no-hessian": {"color": "#56B4E9", "linestyle": "-."},
    "hestia": {"color": "#0072B2", "linestyle": "-"},
}


def quantizer(method):
    """The row of a method, or of a variant such as "hestia:alpha=0.6", whose label says so.

    >>> quantizer("hestia:alpha=0.6,rho=0.3").label
    'HESTIA, alpha 0.6, rho 0.3'
    """
    name, _, settings = method.partition(":")
    row = hestia.QUANTIZERS[name]
    said = "".join(", " + item.replace("=", " ").replace("_", " ") for item in settings.split(",") if item)
    return row._replace(label=row.label + said)


def style(method):
    return {"label": quantizer(method).label, **STYLE.get(method, {})}


def read_log(folder):
    """{(method, seed): [records]} of a run's log.jsonl."""
    runs = {}
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        runs.setdefault((record["method"], record["seed"]), []).append(record)
    return runs


def by_seed(runs, method, key):
    """Steps (n,), and a logged quantity of one method over them, (seeds, n)."""
    logs = [[r for r in log if key in r] for (name, _), log in sorted(runs.items()) if name == method]
    return np.array([r["step"] for r in logs[0]]), np.array([[r[key] for r in log] for log in logs])


def loss_curves(runs, ax, key="loss"):
    """Training loss as each method's forward pass sees it, above that of full precision on the same batches.

    Every method sees the same batches, so the difference is free of their noise. Without a full-precision run: the loss
    itself. Lines are means over seeds, bands reach from the smallest to the largest.
    """
    known = lambda name: " at " not in name and name.partition(":")[0] in hestia.QUANTIZERS  # not a choice of rate
    methods = list(dict.fromkeys(name for name, _ in runs if known(name)))
    paired = "full" in methods
    tops = []
    for method in methods:
        if paired and method == "full":
            continue
        step, values = by_seed(runs, method, key)
        values = values - by_seed(runs, "full", key)[1] if paired else values
        ax.plot(step, values.mean(0), linewidth=1.6, **style(method))
        ax.fill_between(step, values.min(0), values.max(0), color=style(method).get("color"), alpha=0.15, linewidth=0)
        tops.append(np.quantile(values.mean(0), 0.9))
    if paired:
        ax.axhline(0, color=STYLE["full"]["color"], linewidth=1)
        if tops:
            ax.set_ylim(-0.15 * max(tops), 1.5 * max(tops))  # the first steps of a hard quantizer tower above the rest
    ax.set(xlabel="step of quantization-aware training",
           ylabel="nats per byte above full precision" if paired else "nats per byte")  # fmt: skip
    return ax


def schedules(config, scores, ax, tau_init):
    """Pressure and temperature of the least, the middle and the most sensitive tensor (the paper's Fig. 2)."""
    T, rho, alpha = config["steps"], config["rho"], config["alpha"]
    t = np.linspace(0, T, 400)
    ordered = sorted(scores.items(), key=lambda item: item[1])
    watched = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    for (name, s), shade in zip(watched, ("#56B4E9", "#0072B2", "#D55E00")):
        tau = [hestia.temperature(x, T, rho, tau_init, s, alpha) for x in t]
        label = name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "")
        ax.plot(t, tau, color=shade, label=f"{label}: s = {s:.2f}")
    base = [hestia.base_temperature(x, T, rho, tau_init) for x in t]
    ax.plot(t, base, color="#009E73", linestyle="--", label="every tensor, if α = 0")
    ax.set(xlabel="step of quantization-aware training", ylabel="temperature τ, units of γ")
    right = ax.twinx()
    right.plot(t, [hestia.pressure(x, T, rho) for x in t], color="#777777", linestyle=":", linewidth=2)
    right.set(ylabel="pressure p, share of H (dotted)", ylim=(-0.02, 1.05))
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return ax


def overview(folder):
    """One figure of a finished run: loss curves, schedules, and the table's losses. Returns a matplotlib Figure."""
    folder = Path(folder)
    results, runs = json.loads((folder / "results.json").read_text()), read_log(folder)
    config, table = results["config"], results["table"]
    methods = [m for m in config["methods"] if m in table]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")

    loss_curves(runs, left)
    left.legend(fontsize=8, frameon=False)
    left.set_title("What quantization costs along the way", fontsize=11)

    scores = {name: s["score"] for name, s in results["sensitivities"][0]["tensors"].items()}
    soft = next((m for m in methods if quantizer(m).soft), None)
    if soft:
        schedules(config, scores or {"every tensor": 0.0}, middle, table[soft]["tau_init"][0])
        title = "Sensitive tensors (high s) stay warm longer" if scores else "All tensors cool alike"
        middle.set_title(title, fontsize=11)
    else:
        middle.set_axis_off()
        middle.set_title("None of these methods has a temperature", fontsize=11)

    for k, method in enumerate(methods):
        for offset, split, marker, fill, label in (
            (-0.12, "train", "o", "full", "training text"), (0.12, "val", "s", "none", "validation text"),
        ):  # fmt: skip
            mean, spread = table[method][split]
            right.errorbar(mean, k + offset, xerr=spread, marker=marker, color=style(method).get("color", "#777777"),
                           capsize=3, fillstyle=fill, linestyle="none", label=label if k == 0 else None)  # fmt: skip
    right.set_yticks(range(len(methods)), [quantizer(m).label for m in methods])
    right.invert_yaxis()
    right.set_xlabel("nats per byte, hard weights")
    right.legend(fontsize=8, frameon=False)
    quantized = [m for m in methods if m != "full"]
    if quantized:
        best = min(quantized, key=lambda m: table[m]["val"][0])
        right.set_title(f"Closest at the end: {quantizer(best).label}", fontsize=11)
    for ax in (left, middle, right):
        ax.spines["top"].set_visible(False)
        ax.grid(alpha=0.2)
    return fig


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw the overview figure of a finished run.")
    parser.add_argument("--run", required=True, help="a folder that train_tiny.py wrote, such as out/NAME")
    folder = Path(parser.parse_args(arguments).run)
    missing = [name for name in ("results.json", "log.jsonl") if not (folder / name).exists()]
    if missing:
        print(f"plots.py: {folder} holds no finished run (no {missing[0]}); make one with python train_tiny.py",
              file=sys.stderr)  # fmt: skip
        return 2
    overview(folder).savefig(folder / "overview.png", dpi=150)
    print(folder / "overview.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
