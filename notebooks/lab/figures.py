"""The figures of studies, and of traces and gradients of a run. plots.py has the simpler ones.

    python -m notebooks.lab.figures                      # lists the figures
    python -m notebooks.lab.figures table1               # draws one, as out/table1.png
    python -m notebooks.lab.figures animation --run out/NAME --save pictures

In a notebook: `figures.gap_recovered(results, "val")`. Forest plots show a row's mean with its
interval, and a small ring for each seed.
"""

import json
import re
import sys
import textwrap
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter

import hestia
import plots
from notebooks.lab import activations, bench, laws, rivals, tables
from notebooks.lab.curvature import spearman
from plots import BLACK, BLUE, DOTS, GREY, LOOKS, RED, SPLITS, STYLE, finish, panels

RESULTS = Path(__file__).resolve().parents[1] / "results"


def read_study(name):
    """A file of notebooks/results, or a sentence that says where its command is."""
    try:
        return json.loads((RESULTS / name).read_text("utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"there is no readable notebooks/results/{name}; the command that makes "
                         "it is in notebooks/lab/RESULTS.md") from None


def style(row, k=0):
    """plots.style, with a label that also knows the names of ablations."""
    return {**plots.style(row, k), "label": tables.label(row)}


def tidy(x, form):
    """A number with a proper minus, and no minus at a zero.

    >>> tidy(-0.04, ".1f"), tidy(-0.4, ".1f"), tidy(0.4, "+.1f")
    ('0.0', '−0.4', '+0.4')
    """
    text = format(x, form)
    return format(0.0, form) if float(text) == 0 else text.replace("-", "−")


def signed(mean, half):
    """A difference in words, with its interval where there is one."""
    return tidy(mean, "+.4f") + (f" ± {half:.4f}" if half else "")


def share(mean, half):
    """A part of the gap in words, both in percent."""
    return tidy(mean, ".1f") + (f" ± {half:.1f} %" if half else " %")


# --------------------------------------------------------------------------------------------------
# slopes of the other methods


def slope(row, w, tau):
    """dW_eff/dW of a row by autograd, (1, n), and whether it depends on tau.

    At pressure 1, with one scale for all of w, and with learned scales where they start.
    """
    layer = torch.nn.Linear(w.numel(), 1, bias=False, dtype=w.dtype)
    layer.weight.data.copy_(w)
    settings = {"group_size": None, "rho": 0.0, "alpha": 0.0, "tau_init": tau}
    qat, _ = rivals.make(row, torch.nn.Sequential(layer), steps=1, lr=0.0, **settings)
    (J,) = torch.autograd.grad(qat.effective(0, "0").sum(), qat.latents["0"])
    return J, qat.method.soft


SLOPES = ("absmean", "hestia", "dge", "dsq", "daq", "lsq", "seq", "dlt", "twn", "tequila")


def jacobians(rows=None, tau=0.35, ax=None):
    """dW_eff/dW of every row on Gaussian weights. Rows whose curves are the same share a line.

    gamma is 0.02, as in a Llama; only DLT's slope depends on it.
    """
    rows = rows or SLOPES
    (ax,) = panels(ax, 1, (8.6, 4.2))
    w = plots.gaussian_weights(20_000, gamma=0.02)[None]  # (1, n): one row, one scale
    z = w / hestia.absmean_scale(w)
    shown = (z >= 0) & (z < 2.4)
    found = []  # [(slope, [labels of the rows that have it])]
    for row in rows:
        J, soft = slope(row, w, tau)
        J = J[shown]
        names = next((names for known, names in found if torch.allclose(known, J)), None)
        if names is None:
            names = []
            found.append((J, names))
        names.append(f"{tables.label(row)}, τ = {tau:g}" if soft else tables.label(row))

    looks = iter(LOOKS[1:])
    for k, (J, names) in enumerate(found):  # thick lines first, so that the later ones hide none
        look = STYLE["hestia"] if f"HESTIA, τ = {tau:g}" in names else next(looks)
        look = {**look, "marker": "", "label": textwrap.fill(", ".join(names), 26)}
        ax.plot(z[shown], J, linewidth=max(1.2, 3.6 - 0.5 * k), **look)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=DOTS)

    pretend = sum(len(names) for J, names in found if (J == 1).all())
    slopes = torch.stack([J for J, _ in found])
    apart = slopes.max(0).values - slopes.min(0).values
    title = f"{pretend} of {len(rows)} methods take{'s' * (pretend == 1)} the slope for 1 "
    title += "everywhere; the methods differ most at |w| = "
    title += f"{float(z[shown][apart.argmax()]):.2f} γ"
    return finish(ax, title, "|w| / γ (the slopes are even)", "dW_eff/dW", "center left",
                  bbox_to_anchor=(1, 0.5))


# --------------------------------------------------------------------------------------------------
# the study of estimators: notebooks/results/curvature.json


def hutchpp_error(curvature, ax=None):
    """Error of the traces against products, for each estimator."""
    (ax,) = panels(ax, 1, (6.8, 4.2))
    curve = {}  # {estimator: {products: quantiles of the error}}
    for name, points in curvature["curves"].items():
        curve[name] = {int(n): point["rms"] for n, point in points.items()}
    names = sorted(curve, key=lambda name: not name.startswith("Hutch++"))  # it gets HESTIA's blue
    for look, name in zip(LOOKS, names):
        n = sorted(curve[name])
        median, low, high = ([curve[name][x][key] for x in n] for key in ("median", "q25", "q75"))
        ax.loglog(n, median, label=name, markersize=5, **look)
        ax.fill_between(n, low, high, color=look["color"], alpha=0.2, linewidth=0)
    seeds = curve[name][n[0]]["n"]

    plain, plus = curve["Hutchinson, per tensor"], curve["Hutch++, per tensor"]
    tensors, both = curvature["model"]["tensors"], plain.keys() & plus.keys()
    budget = 40 * tensors  # the paper's 2 * 10 + 20 products for each tensor
    budget = budget if budget in both else max(both)
    ax.axvline(budget, color=GREY, linewidth=0.8, linestyle=DOTS)
    ratio = plain[budget]["median"] / plus[budget]["median"]
    word = f"{ratio:.1f} times less than" if ratio > 1 else f"{1 / ratio:.1f} times more than"
    title = f"At {budget:,} products ({budget // tensors} for each tensor, dotted) Hutch++ errs "
    return finish(ax, f"{title}{word} Hutchinson", "Hessian-vector products, all tensors together",
                  f"relative error, rms over tensors\n(median, quartiles of {seeds} seeds)",
                  "lower left")


def in_words(correlation):
    if correlation > 0.9:
        return "ranks the tensors as the trace does"
    if correlation >= 0.5:
        return "ranks the tensors roughly as the trace does"
    return "says little of the trace" if correlation > -0.5 else "ranks the tensors the other way"


def sensitivity_against(curvature, axes=None):
    """Exact Hessian traces against what else might rank the tensors."""
    axes, exact = panels(axes, 2, (9.4, 4)), np.array(curvature["exact"])
    kinds = np.array([name.rpartition(".")[2] for name in curvature["names"]])
    measures = {"error": "error of rounding to ternary", "gradnorm": "gradient norm"}
    for ax, (key, what) in zip(axes, measures.items()):
        x = np.array(curvature["other"][key])
        for k, kind in enumerate(dict.fromkeys(kinds)):
            look = {**LOOKS[k], "linestyle": "none", "fillstyle": "full" if k % 2 else "none"}
            these = kinds == kind
            ax.plot(x[these], exact[these], label=kind.removesuffix("_proj"), **look)
        ax.set(yscale="log", xscale="log" if key == "gradnorm" else "linear")
        r = spearman(x, exact)
        finish(ax, f"The {what} {in_words(r)}: Spearman {r:.2f}",
               f"relative {what}" if key == "error" else what, "exact Hessian trace")
    axes[1].legend(fontsize=8.5, edgecolor="none", ncols=2)
    return axes[0].figure


# --------------------------------------------------------------------------------------------------
# rows of a table against each other


def differences(results, rows, other, split):
    """{row: (mean, half width of the 95 % interval, [a number per seed])} of a row's loss minus
    another's, seed by seed. Of one seed there is no interval, and the half width is 0."""
    per_seed, found = results["per_seed"], {}
    for row in rows:
        each = [seed[row][split] - seed[other][split] for seed in per_seed]
        half = tables.paired(per_seed, row, other, split)[1] if len(each) > 1 else 0.0
        found[row] = float(np.mean(each)), half, each
    return found


def clear(mean, half, each):
    """Whether zero lies outside the 95 % interval; with one seed there is no way to know."""
    return len(each) > 1 and abs(mean) > half


def forest(ax, rows, text, title, xlabel, reach=None, bars="95 % interval"):
    """A line for each {label: (look, mean, half width, [numbers of the seeds])}, and the mean in
    words at the right. What lies beyond `reach` (ten times the median) is an arrow at the edge.
    bars: what the half width is."""
    (ax,) = panels(ax, 1, (8, 1.5 + (0.38 if len(rows) < 12 else 0.27) * len(rows)))
    means = [mean for _, mean, _, _ in rows.values()]
    reach = reach or 10 * np.median([abs(mean) + half for _, mean, half, _ in rows.values()])
    ax.axvline(0, color=GREY, linewidth=1)
    for k, (look, mean, half, each) in enumerate(rows.values()):
        look = {**look, "linestyle": "none", "label": None}
        if abs(mean) > reach:
            arrow = {**look, "marker": ">" if mean > 0 else "<"}
            ax.plot(np.sign(mean) * reach, k, clip_on=False, **arrow)
        else:
            ax.errorbar(mean, k, xerr=half or None, capsize=4, markersize=7, elinewidth=1.5, **look)
        if abs(mean) <= reach and len(each) > 1:
            rings = {"color": look["color"], "markersize": 3.5, "fillstyle": "none"}
            ax.plot(each, [k + 0.27] * len(each), "o", **rings)
        words = text(mean, half) if any(each) else "reference"
        ax.annotate(words, (1.02, k), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    low, high = ax.get_xlim()
    low, high = -reach if min(means) < -reach else low, reach if max(means) > reach else high
    ax.set_xlim(low, high)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.locator_params("x", nbins=6)  # more labels of four digits would touch
    inches = ax.get_position().width * ax.figure.get_figwidth() / 0.8  # with the words at the right
    inches -= 1.5 + 0.075 * max(map(len, rows))
    if any(len(each) > 1 for _, _, _, each in rows.values()):
        xlabel += f"\n(bar: {bars}; small ring: one seed)"
    return finish(ax, title, xlabel, inches=inches)


def gap_recovered(results, split="train", ax=None):
    """How much of the way from AbsMean STE back to full precision each row recovers, with standard
    deviations over seeds; the best on training text comes first, on either text. Where there is no
    gap: the difference from AbsMean STE, with 95 % intervals."""
    per_seed = plots.with_gaps(results["per_seed"])
    names = per_seed[0] if per_seed else {}
    rows = [row for row in names if row not in ("before", "untrained", "full", "absmean")]
    if "absmean" not in names or not rows:
        raise ValueError("no absmean to compare with; python train_tiny.py --methods full absmean "
                         "hestia runs it")

    def has_gap(split):
        gaps = [seed[row].get(f"gap_{split}") for seed in per_seed for row in rows]
        return None not in gaps

    def measure(split):
        """{row: (mean, half width, [a number per seed])}"""
        if not has_gap(split):
            return differences(results, rows, "absmean", split)
        found = {}
        for row in rows:
            each = [100 * seed[row][f"gap_{split}"] for seed in per_seed]
            found[row] = np.mean(each), np.std(each, ddof=1) if len(each) > 1 else 0.0, each
        return found

    gap, found, on_train = has_gap(split), measure(split), measure("train")
    order = sorted(rows, key=lambda row: on_train[row][0], reverse=has_gap("train"))
    text = share if gap else signed
    best = (max if gap else min)(rows, key=lambda row: found[row][0])
    mean, half, each = found[best]
    name = tables.label(best)
    said = f"{text(mean, half)} ({len(each)} seed{'s' * (len(each) > 1)})"
    every = {1: f"{name} is", 2: "Both are"}.get(len(rows), f"All {len(rows)} are")
    title = f"{every} worse than AbsMean STE"
    if gap and mean > 0:
        title = f"{name} recovers the largest part of the gap: {said}"
    elif not gap and mean < 0:
        title = f"{name} is lowest: {said}"
    elif len(rows) > 1:
        title += f"; closest is {name}, {said}"

    drawn = {tables.label(row): (style(row, k + 2), *found[row]) for k, row in enumerate(order)}
    if not gap:
        xlabel = f"{SPLITS[split]} loss minus AbsMean STE's, nats"
        return forest(ax, drawn, text, title, xlabel)
    xlabel = f"gap recovered on {SPLITS[split]} text, %: 0 is AbsMean STE, 100 is full precision"
    ax = forest(ax, drawn, text, title, xlabel, reach=110, bars="± one standard deviation")
    if ax.get_xlim()[1] > 60:  # else 100 would squeeze all that is to be seen
        ax.axvline(100, color=BLACK, linewidth=1)
        ax.set_xlim(None, max(105, ax.get_xlim()[1]))
    return ax


SETTINGS = {
    "alpha": "α = {:g}",
    "rho": "ρ = {:g}",
    "group_size": "groups of {:g}",
    "samples": "{:g} samples",
}


def setting_label(setting, value):
    if setting == "group_size" and value == 0:
        return "one scale per tensor"
    return SETTINGS[setting].format(value).replace("-", "−")


def loss_against(results, setting, split="train", ax=None):
    """The loss with another alpha, rho, group_size, samples or bits minus plain HESTIA's, seed by
    seed with 95 % intervals. For "lr": the losses from which the learning rates were chosen."""
    if setting == "lr":
        return loss_against_lr(results, ax)
    if setting not in (*SETTINGS, "bits"):
        known = ", ".join(SETTINGS)
        raise ValueError(f"unknown setting {setting!r}; expected one of {known}, bits, lr")
    table, names = results["table"], {}
    if setting == "bits":
        rows = [row for row in ("hestia-binary", "hestia", "hestia-2bit", "int2") if row in table]
        names = {row: tables.label(row) for row in rows}
    else:
        for base, prefix in (("hestia", ""), ("absmean", "AbsMean STE, ")):
            start = f"{base}:{setting}="
            values = {row: float(row.removeprefix(start)) for row in table
                      if row.startswith(start) and "," not in row}
            if values and base in table:
                values[base] = float(results["config"][setting])
            for row in sorted(values, key=values.get):
                names[row] = prefix + setting_label(setting, values[row])
    if "hestia" not in names or len(names) < 2:
        word = setting.replace("_", " ")
        raise ValueError(f"no row has another {word}; notebooks/lab/study.py has ablations")

    found = differences(results, names, "hestia", split)
    others = [row for row in names if row != "hestia"]
    best = min(others, key=lambda row: found[row][0])
    title = "Lowest" if found[best][0] < 0 else "None is below plain HESTIA; closest"
    title += f": {names[best]}, {signed(*found[best][:2])}"
    if len(results["per_seed"]) > 1:
        title += f"; {sum(clear(*found[row]) for row in others)} of {len(others)} differ clearly"
    else:
        title += " (one seed)"
    drawn = {}
    for row, name in names.items():
        base = row.partition(":")[0]
        look = STYLE[row] if row == "hestia" else STYLE[base] if base == "absmean" else LOOKS[2]
        drawn[name] = (look, *found[row])
    return forest(ax, drawn, signed, title, f"{SPLITS[split]} loss minus plain HESTIA's, nats")


def loss_against_lr(results, ax=None):
    """The losses from which the learning rates were chosen, a line for each row."""
    losses = {}  # {row: {rate: loss}}, without those that diverged
    for row, rates in results.get("tuning", {}).items():
        finite = {float(lr): loss for lr, loss in rates.items() if loss and np.isfinite(loss)}
        if finite:
            losses[row] = dict(sorted(finite.items()))
    if not losses:
        raise ValueError("no learning rates were chosen; notebooks/lab/study.py chooses them")
    (ax,) = panels(ax, 1, (8.8, max(4.0, 0.6 + 0.2 * len(losses))))
    for k, (row, rates) in enumerate(losses.items()):
        width = 2.4 if row in STYLE else 1.2
        ax.plot(rates.keys(), rates.values(), markersize=5, linewidth=width, **style(row, k))

    best = {row: min(rates, key=rates.get) for row, rates in losses.items()}
    tried = sorted({lr for rates in losses.values() for lr in rates})
    low, high = np.quantile([x for rates in losses.values() for x in rates.values()], (0, 0.85))
    if ax.get_ylim()[1] > low + 3 * (high - low):
        ax.set_ylim(None, high + 0.3 * (high - low))  # what lies far above is not worth the room
    ax.set_xscale("log")
    ax.set_xticks(tried, [f"{lr:g}" for lr in tried])
    ax.xaxis.set_minor_formatter(NullFormatter())
    edge = sum(lr in (tried[0], tried[-1]) for lr in best.values())
    shown = [row for row in ("absmean", "hestia") if row in best]
    said = ", ".join(f"{tables.label(row)}\N{NO-BREAK SPACE}{best[row]:g}" for row in shown)
    title = f"Best rates: {said + '; ' if said else ''}at the edge: {edge} of {len(best)} methods"
    ylabel = "loss of the hard weights, nats (the tuning seed)"
    return finish(ax, title, "peak learning rate", ylabel, "center left", inches=5.2,
                  bbox_to_anchor=(1, 0.5))


CONTROLS = {
    "hestia-no-hessian": "α = 0",
    "hestia:scores=shuffled": "scores shuffled",
    "hestia:scores=common": "one common score",
    "hestia": "HESTIA",
}


def controls(results, split="train", ax=None):
    """Does it matter which tensor has which score? HESTIA with alpha = 0, and with its scores
    shuffled or made equal, minus HESTIA as it is, seed by seed with 95 % intervals."""
    rows = [row for row in CONTROLS if row in results["table"]]
    if "hestia" not in rows or not any(":" in row for row in rows):
        raise ValueError("no scores were shuffled or made equal; notebooks/lab/study.py does that")
    found = differences(results, rows, "hestia", split)
    drawn, said = {}, []
    for k, row in enumerate(rows):
        name = CONTROLS[row]
        drawn[name] = (STYLE.get(row, LOOKS[2 + k]), *found[row])
        if clear(*found[row]):
            word = "worse" if found[row][0] > 0 else "better"
            said.append(f"{name} is clearly {word} than HESTIA ({signed(*found[row][:2])})")
    title = "; ".join(said)
    if len(results["per_seed"]) < 2:
        title = "One seed, no interval: it does not show what the ranking does"
    elif not said:
        title = "No control differs clearly from HESTIA: the Hessian's ranking shows nothing"
    return forest(ax, drawn, signed, title, f"{SPLITS[split]} loss minus HESTIA's, nats")


def parts(first, teacher, split="val", ax=None):
    """What each part adds to the loss, without a teacher and with one: tables.worth as a picture.
    first, teacher: contents of results.json, of the same seeds and texts."""
    looks, drawn = (STYLE["absmean"], STYLE["hestia"]), {}
    found = tables.worth([first, teacher], split)
    for part, each in found.items():
        for look, name, numbers in zip(looks, ("", ", with a teacher"), each):
            if numbers and not part.startswith("all"):
                name = part if part.startswith("teacher") else part + name
                drawn[name] = look, *numbers[:2], numbers[:1]
    seeds = len(first["per_seed"])
    best = min(drawn, key=lambda name: drawn[name][1])
    guidance = found["guidance, against a common score"][0]
    title = f"Worth most: {best}, {signed(*drawn[best][1:3])}; guidance: {signed(*guidance[:2])}"
    xlabel = f"what it adds to the {SPLITS[split]} loss, nats (bar: 95 % interval of {seeds} seeds)"
    return forest(ax, drawn, signed, title, xlabel)


def loss_against_tau(results, split="val", ax=None):
    """The loss with another tau_init minus that with the best fit's, at alpha = 0, seed by seed,
    with 95 % intervals; and the temperatures that Eq. (15) would give the layers instead."""
    base, prefix = "hestia-no-hessian", "hestia-no-hessian:tau_init="
    taus = {row: float(row.removeprefix(prefix)) for row in results["table"] if prefix in row}
    if not taus or base not in results["table"]:
        raise ValueError("no row has another tau_init; notebooks/lab/study.py has them as --ablate "
                         "tau")
    taus[base] = results["table"][base]["tau_init"][0]
    rows = sorted(taus, key=taus.get)
    found = differences(results, rows, base, split)
    x, mean = [taus[row] for row in rows], [found[row][0] for row in rows]
    (ax,) = panels(ax, 1, (7, 3.8))
    scores = [h["score"] for h in results["sensitivities"][0]["tensors"].values()]
    warmed = taus[base] * np.exp(results["config"]["alpha"] * np.array(scores))
    reach = np.interp(np.linspace(warmed.min(), warmed.max(), 50), x, mean)
    label = f"where Eq. (15) puts the layers, α = {results['config']['alpha']:g}"
    ax.axvspan(warmed.min(), warmed.max(), color=GREY, alpha=0.25, label=label)
    ax.axhline(0, color=GREY, linewidth=1)
    ax.errorbar(x, mean, yerr=[found[row][1] for row in rows], capsize=4, **{
        **STYLE[base], "label": "one temperature for all layers, ± 95 %"})
    for row in rows:
        ax.plot([taus[row]] * len(found[row][2]), found[row][2], "o", color=BLACK, markersize=3.5,
                fillstyle="none")
    title = (f"Where guidance puts the layers, τ = {warmed.min():.2f} to {warmed.max():.2f},\n"
             f"moving all of them together changes the loss by {np.ptp(reach):.3f}")
    return finish(ax, title, "τ_init, in units of γ (small ring: one seed)",
                  f"{SPLITS[split]} loss minus that of the best fit\n(τ = {taus[base]:.2f}), nats",
                  legend="upper left")


# --------------------------------------------------------------------------------------------------
# the traces, the scores and the gradients of a run


def trace_heatmap(tensors, ax=None, what="traces"):
    """log10 of each tensor's Hessian trace, layer by projection; hatched where lost in its error.
    tensors: {name: {value, stderr, ...}}, as in a results.json. what: which traces they are."""
    if not tensors or any("value" not in tensor for tensor in tensors.values()):
        raise ValueError("no traces are there; train_tiny.py --methods hestia estimates them")
    rows, columns = {}, {}  # {layer: row of the picture}, {projection: column}
    spots, positive, lost = {}, {}, []  # {tensor: (row, column)}, {tensor: trace}, tensors
    for name, tensor in tensors.items():
        layer, kind = (re.search(r"\d+(?=\.)", name) or ["0"])[0], name.rpartition(".")[2]
        spots[name] = rows.setdefault(layer, len(rows)), columns.setdefault(kind, len(columns))
        if tensor["value"] > 0:
            positive[name] = tensor["value"]
        if hestia.TraceEstimate(tensor["value"], tensor.get("stderr", 0.0)).flagged:
            lost.append(name)
    (ax,) = panels(ax, 1, (1.6 + 0.85 * len(columns), 1.7 + 0.42 * len(rows)))
    grid = np.full((len(rows), len(columns)), np.nan)
    for name, h in positive.items():
        grid[spots[name]] = np.log10(h)
    image = ax.imshow(grid, cmap="cividis", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for name, (i, j) in spots.items():
        text = f"{round(grid[i, j], 1) + 0:.1f}".replace("-", "−") if name in positive else "≤ 0"
        color = "white" if grid[i, j] < middle else "black"
        if name in lost:
            text += " ?"
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///",
                                       edgecolor=GREY, linewidth=0))
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color=color)
    ax.set_xticks(range(len(columns)), [kind.removesuffix("_proj") for kind in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(image, ax=ax, label=f"log10 of the {what}")
    low, high = min(positive, key=positive.get), max(positive, key=positive.get)
    title = f"{what[0].upper() + what[1:]} span {np.log10(positive[high] / positive[low]):.1f} "
    title += f"decades, from {plots.short(low)} to {plots.short(high)}"
    title += f"; {len(lost)} of {len(tensors)} are lost in their error (?)" if lost else ""
    finish(ax, title, "projection", "layer").grid(False)
    return ax


def score_errors(tensors, kappa=1.0, ax=None):
    """Each score with its standard error: Eq. (13) of the trace plus and minus its own error."""
    if not tensors or any("stderr" not in tensor for tensor in tensors.values()):
        raise ValueError("no errors are there; train_tiny.py --sensitivity hutchpp estimates them")
    (ax,) = panels(ax, 1, (6.6, 1.5 + 0.17 * len(tensors)))
    traces = {name: hestia.TraceEstimate(t["value"], t["stderr"]) for name, t in tensors.items()}
    error = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traces lost in their error, which are marked below
        scores = hestia.sensitivity_scores(traces, kappa)
        for name, h in traces.items():
            moved = [h._replace(value=h.value + side * h.stderr) for side in (-1, 1)]
            low, high = (hestia.sensitivity_scores({**traces, name: h}, kappa)[name] for h in moved)
            error[name] = abs(high - low) / 2
    names, close = sorted(scores, key=scores.get), 0
    for k, name in enumerate(names):
        marker, color = ("x", RED) if traces[name].flagged else ("o", BLUE)
        ax.errorbar(scores[name], k, None, error[name], marker, color=color, capsize=3, ms=4)
    for a, b in zip(names, names[1:]):
        close += scores[b] - scores[a] < np.hypot(error[a], error[b])
    ax.set_yticks(range(len(names)), [plots.short(name) for name in names], fontsize=8)
    ax.set_xlim(0, 1)
    apart = len(names) - 1 - close
    title = f"The scores are known to {max(error.values()):.3f} or better; "
    title += f"{apart} of {len(names) - 1} neighbouring pairs can be told apart"
    lost = any(h.flagged for h in traces.values())
    if lost:
        ax.plot([], [], "x", color=RED, markersize=4, label="lost in its error")  # for the legend
    return finish(ax, title, f"sensitivity score s (κ = {kappa:g}), ± one standard error",
                  legend="lower right" if lost else None)


def gradient_norms(run, axes=None):
    """Norm of the gradient of all that is trained, with dL/dW_eff and with dL/dW for the quantized
    weights, over the base temperature while it falls.

    Were weights spread evenly about the boundaries, dL/dW would grow like tau^(-1/2): a share of
    order tau of them lies within tau of a boundary, where the slope is 1 / (2 tau).
    """
    results, snapshots = plots.read_results(run), plots.read_snapshots(run)
    T, rho = results["config"]["steps"], results["config"]["rho"]
    tau_init = plots.guidance(results)["tau_init"]
    axes = panels(axes, 2, (9.6, 4.2), sharey=True)
    rows = [row for row in STYLE if row != "full"]
    for ax, key in zip(axes, ("grad_norm", "grad_norm_latent")):
        for row, (step, norm) in plots.along(snapshots, rows, key).items():
            cooling = step > rho * T
            tau = [hestia.base_temperature(t, T, rho, tau_init) for t in step[cooling]]
            look = style(row)
            if not plots.is_soft(row, results["table"]):
                look["label"] += ", at the same steps"
            plots.band(ax, tau, norm[:, cooling], look)
            mean = norm[:, cooling].mean(0)
        if key == "grad_norm_latent":
            compared = mean[0] * (np.array(tau) / tau[0]) ** -0.5
            ax.plot(tau, compared, color=GREY, linestyle=DOTS, label="τ^(−1/2), to compare")
        ax.set(xscale="log", yscale="log")
        ax.invert_xaxis()
        ax.yaxis.set_minor_formatter(NullFormatter())
        what = "dL/dW_eff" if key == "grad_norm" else "dL/dW, latents"
        early = mean[: max(1, len(mean) // 4)].mean()  # of the last row, HESTIA
        title = f"{tables.label(row)}'s {what}: {early:.2f} when warm (first quarter), "
        title += f"{mean[-1]:.2f} at the end"
        finish(ax, title, "base temperature τ at the step (training goes right)", "", "upper left")
    axes[0].set_ylabel("gradient norm")
    return axes[0].figure


# --------------------------------------------------------------------------------------------------
# a run as an animation


def animation(run, tensor=-1, seconds=6):
    """Frames of 880 pixels' width: a watched tensor's weights move while the function that the
    forward pass applies to them hardens, STE beside HESTIA. `write_gif` writes them."""
    from PIL import Image  # comes with matplotlib

    name, bins, found = plots.watched_tensor(run, tensor)
    felt = plots.along(plots.read_snapshots(run), found, "felt")
    results = plots.read_results(run)
    config, scores, tau_init = plots.guidance(results).values()
    T, rho, alpha = config["steps"], config["rho"], config["alpha"]
    tau = lambda t: hestia.temperature(t, T, rho, tau_init, scores.get(name, 0.0), alpha)

    # What stays: the axes, the strip with the schedules.
    fig = plt.figure(figsize=(8.8, 4.6), dpi=100)
    grid = fig.add_gridspec(2, len(found), height_ratios=(4.4, 1), hspace=0.42, wspace=0.12,
                            left=0.05, right=0.92, top=0.87, bottom=0.1)
    highest = max(hist.max() for _, hist in found.values())
    z, parts = plots.z_line(2.5, 501), []
    for k, (row, (steps, hist)) in enumerate(found.items()):
        ax = fig.add_subplot(grid[0, k])
        bars = plots.draw_histogram(ax, hist[0], hist[0], bins)
        ax.set(ylim=(0, 135 * highest), yticks=[], ylabel="" if k else "bars: weights")
        ax.set_xlabel(f"latent weight w / γ of {plots.short(name)}", labelpad=1)
        ax.spines[["top", "right"]].set_visible(False)
        right = ax.twinx()
        right.set(ylim=(-1.35, 1.35), yticks=(-1, 0, 1))
        right.spines[["top", "left"]].set_visible(False)
        (curve,) = right.plot(z, z, color=BLACK, linewidth=2.2)
        parts.append((ax, bars, curve, row, steps, hist))
    right.set_ylabel("line: effective weight / γ")
    strip, t = fig.add_subplot(grid[1, :]), np.linspace(0, T, 200)
    cooling, pressure = [tau(x) / tau(0) for x in t], [hestia.pressure(x, T, rho) for x in t]
    strip.plot(t / T, cooling, color=RED, label=f"temperature τ / {tau(0):.2f}")
    strip.plot(t / T, pressure, color=GREY, linestyle="--", label="pressure p")
    strip.set(xlim=(0, 1), ylim=(0, 1.1), yticks=(0, 1))
    strip.set_xlabel("share of training done", labelpad=1)
    strip.spines[["top", "right"]].set_visible(False)
    strip.legend(fontsize=8.5, frameon=False, loc="center right")
    now = strip.axvline(0, color=BLACK, linewidth=1.5)

    # What moves: the bars, the curve, the titles.
    frames = []
    for step in np.linspace(0, T - 1, max(2, round(10 * seconds))):
        now.set_xdata([step / T, step / T])
        p = hestia.pressure(step, T, rho)
        for ax, bars, curve, row, steps, hist in parts:
            for bar, heights in zip(bars, hist.T):
                bar.set_height(100 * np.interp(step, steps, heights))
            state, seen = "rounding from the first step", hestia.quantize(z, scale=plots.UNIT)
            if plots.is_soft(row, results["table"]):
                state = f"τ = {tau(step):.2f}, p = {p:.2f}"
                seen = hestia.effective_weight(z, tau(step), p, scale=plots.UNIT)
            curve.set_ydata(seen)
            moments, shares = felt[row]
            feels = plots.percent(np.interp(step, moments, shares.mean(0)))
            title = f"{tables.label(row)}: {state}\n{feels} of the weights share the response"
            ax.set_title(title, fontsize=11, loc="left")
        fig.canvas.draw()
        picture = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
        frames.append(picture.quantize(64, dither=Image.Dither.NONE))
    plt.close(fig)
    return frames


def write_gif(frames, path):
    """Ten frames a second; the first stays for one second and the last for two."""
    durations = [1000, *[100] * (len(frames) - 2), 2000]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=durations)


# --------------------------------------------------------------------------------------------------
# command line


def of_study(draw, name):
    return lambda run: draw(read_study(name))


def of_either(draw, name):
    """From the run, if there is one that has what the figure needs; else from the study."""

    def drawn(run):
        if run:
            with suppress(ValueError):
                return draw(plots.read_results(run))
        return draw(read_study(name))

    return drawn


def of_traces(draw, *settings):
    """From a run's traces and these settings of it."""

    def drawn(run):
        results = plots.read_results(run)
        return draw(plots.first_sensitivities(results), *(results["config"][s] for s in settings))

    return drawn


def animated(run):
    return partial(write_gif, animation(run))


RUN = plots.RUN
STUDIES = "parts-smollm2.json", "parts-smollm2-teacher.json"
CURVATURE, TABLE = "notebooks/results/curvature.json", "notebooks/results/table1.json"
FIGURES = {  # name: (what draws it for a run's folder, a line about it, what it needs)
    "jacobians": (lambda run: jacobians(), "the slope that each method takes for rounding's", ""),
    "hutchpp_error": (of_study(hutchpp_error, "curvature.json"),
                      "error of the traces against products", CURVATURE),
    "sensitivity_against": (of_study(sensitivity_against, "curvature.json"),
                            "traces against other signs", CURVATURE),
    "trace_heatmap": (of_traces(trace_heatmap), "traces, layer by projection", RUN),
    "score_errors": (of_traces(score_errors, "kappa"), "scores with their errors", RUN),
    "gradient_norms": (gradient_norms, "gradient norms against temperature", RUN),
    "animation": (animated, "the weights along a run, as a GIF", RUN),
    "gap_recovered": (lambda run: gap_recovered(plots.read_results(run)),
                      "the gap that each row recovers", RUN),
    "table1": (of_study(gap_recovered, "table1.json"), "the same for every method", TABLE),
    "loss_against_lr": (of_either(loss_against_lr, "table1.json"),
                        "loss against the peak learning rate", f"{RUN}, or {TABLE}"),
}
FIGURES["parts"] = (lambda run: parts(*map(read_study, STUDIES)), "what each part is worth",
                    " and ".join(f"notebooks/results/{name}" for name in STUDIES))
FIGURES["loss_against_tau"] = (of_either(loss_against_tau, "parts-smollm2.json"),
                               "loss against the temperature at first",
                               f"{RUN}, or notebooks/results/parts-smollm2.json")
ABLATED = f"{RUN}, or notebooks/results/ablations.json"
FIGURES["controls"] = (of_either(controls, "ablations.json"), "does the ranking matter", ABLATED)
for setting in (*SETTINGS, "bits"):
    draw = partial(loss_against, setting=setting)
    about = f"loss with another {setting}, minus plain HESTIA's"
    FIGURES[f"loss_against_{setting}"] = of_either(draw, "ablations.json"), about, ABLATED


# --------------------------------------------------------------------------------------------------
# the study of measures: notebooks/results/measures.json


def foretold(results, ax=None):
    """How well each measure ranks the tensors by the real rise of the loss when one is rounded:
    Spearman's correlation for each model, its mean over seeds, and from three on its interval."""
    lines = {}  # {"model, tensors": {measure: its row}}
    for entry in results["models"]:
        for which, table in entry["tables"].items():
            lines[f"{entry['model']}, {which}"] = table
    first = next(iter(lines.values()))
    names = sorted(first, key=lambda name: first[name]["mean"])  # the best ends on top
    (ax,) = panels(ax, 1, (9.6, 1.8 + 0.42 * len(names)))
    for k, (what, table) in enumerate(lines.items()):
        look = {**LOOKS[k], "linestyle": "none", "fillstyle": "none" if k % 2 else "full"}
        for i, name in enumerate(names):
            if name in table:
                row, y = table[name], i + 0.24 - 0.24 * k
                half = row["half"] if len(row["each"]) > 2 else None
                label = textwrap.fill(what, 18) if name == "trace" else None
                ax.errorbar(row["mean"], y, xerr=half, capsize=2, elinewidth=1, markersize=6,
                            label=label, **look)
                rings = {"color": look["color"], "markersize": 3, "fillstyle": "none"}
                ax.plot(row["each"], [y] * len(row["each"]), "o", **rings)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set(xlim=(None, 1.03), ylim=(-0.6, len(names) - 0.4))
    ax.set_yticks(range(len(names)), [first[name]["label"] for name in names])
    tables_ = [next(iter(entry["tables"].values())) for entry in results["models"]]
    words = [f"{first[name]['label'].partition(':')[2].strip() or first[name]['label']} "
             + " and ".join(f"{table[name]['mean']:.2f}" for table in tables_)
             for name in ("trace", "gradnorm")]
    xlabel = "Spearman's correlation with the rise of the loss when a tensor is rounded\n"
    xlabel += "(large: mean; small ring: one seed or text; bar: 95 % interval by Student's t)"
    names = " and ".join(entry["model"] for entry in results["models"])
    title = f"Which tensor will rounding hurt? On {names}: {'; '.join(words)}"
    return finish(ax, title, xlabel, legend="center left", inches=6, bbox_to_anchor=(1, 0.5))


def step_growth(rows, ax=None):
    """Milliseconds of a training step against the weights in linear layers, of bench.py's small
    shapes: medians of the rounds, with the least and the largest."""
    (ax,) = panels(ax, 1, (7, 3.8))
    found, size = {}, {}
    for row in rows:
        shape = next((shape for shape in bench.SHAPES if f", {shape}," in row["setting"]), None)
        if shape and row["mode"] in ("full", "absmean", "hestia"):
            found.setdefault(row["mode"], {}).setdefault(shape, []).append(row["ms"])
    for shape in found["full"]:
        model = hestia.Llama(hestia.LlamaConfig(**bench.SHAPES[shape]))
        size[shape] = sum(layer.weight.numel() for layer in hestia.linear_layers(model).values())
    x = sorted(size.values())
    for mode, shapes in found.items():
        each = [np.array(shapes[shape]) for shape in sorted(shapes, key=size.get)]
        middle = np.array([np.median(ms) for ms in each])
        ends = [[m - ms.min(), ms.max() - m] for m, ms in zip(middle, each)]
        ax.errorbar(x, middle, yerr=np.transpose(ends), capsize=4, **STYLE[mode])
    over = [np.median(np.divide(found["hestia"][shape], found["full"][shape])) for shape in size]
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(x, [f"{n / 1e6:.1f} M" for n in x])
    ax.xaxis.set_minor_formatter(NullFormatter())
    title = (f"On a CPU HESTIA's step takes {min(over):.2f} to {max(over):.2f} of full "
             f"precision's, from {x[0] / 1e6:.1f} M to {x[-1] / 1e6:.1f} M weights")
    return finish(ax, title, "weights in linear layers (bar: least and largest of the rounds)",
                  "ms a step of 4,096 tokens", legend="upper left")


FIGURES["step_growth"] = (of_study(step_growth, "bench-cpu.json"),
                          "what a step costs on a CPU, by size", "notebooks/results/bench-cpu.json")
FIGURES["best_share"] = lambda run: laws.shares(), "CO-QAT's share of quantized training", ""
FIGURES["jumps"] = (lambda run: activations.jumps(),
                    "activations: all levels, and what two neighbours would do", "")
FIGURES["foretold"] = (of_study(foretold, "measures.json"), "which measure foretells the rise",
                       "notebooks/results/measures.json")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(plots.main(None, FIGURES, "python -m notebooks.lab.figures"))
