"""The figures of the lessons, one function each: numbers or a run's folder in, matplotlib Axes out.

    python plots.py                                      # lists the figures
    python plots.py staircase                            # draws one, as out/staircase.png
    python plots.py all --run out/NAME --save pictures   # draws all of them, these for a run

In a notebook: `plots.staircase()`, or `plots.felt_curves("out/NAME", ax)`. A function that gets no
Axes makes its own. Nothing here trains. Titles are put together from the numbers that are drawn, so
they are true of every run. The figures of studies are in notebooks/lab/figures.py.
"""

import argparse
import json
import os
import re
import sys
import textwrap
import zipfile
from pathlib import Path

if "ipykernel" not in sys.modules and "module:" in os.environ.get("MPLBACKEND", ""):
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's cell that starts a program hands its own on
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter

import hestia

# -- looks: colours, panels, titles ----------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart. Each row also has a dash and a
# marker of its own, for those who print in grey.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
DOTS = (0, (1, 2))
STYLE = {
    "full": dict(label="full precision", color=BLACK, linestyle="-", marker="D"),
    "absmean": dict(label="AbsMean STE", color=RED, linestyle="--", marker="s"),
    "hestia-no-hessian": dict(label="HESTIA, alpha = 0", color=SKY, linestyle="-.", marker="^"),
    "hestia": dict(label="HESTIA", color=BLUE, linestyle="-", marker="o"),
}
# What other rows are called, {row: label}. notebooks/lab/rivals.py adds some.
LABELS = {"before": "full precision, before", "untrained": "ternarized, not trained"}

# Everything else gets the k-th of these 49 looks.
COLORS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 3)), (0, (3, 1)))
LOOKS = [{"color": COLORS[k % 7], "linestyle": DASHES[(k + k // 7) % 7],
          "marker": "osD^vPX"[(k + k // 7) % 7]} for k in range(49)]


def label(row):
    """What a row of the table is called in a figure: its name, if nobody gave it a label."""
    return STYLE[row]["label"] if row in STYLE else LABELS.get(row, row)


def style(row, k=0):
    """How a row is drawn: always the same for the four of a default run, else the k-th look."""
    return {**LOOKS[k % len(LOOKS)], "label": label(row), **STYLE.get(row, {})}


def panels(axes, columns, size, rows=1, **options):
    """The axes that were given, as a flat list, or new ones. size: of the figure, in inches."""
    if axes is None:
        _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    flat = list(np.ravel(axes))
    if len(flat) != rows * columns:
        raise ValueError(f"{len(flat)} Axes were given; this figure has {rows * columns} panels")
    return flat


def curves(ax, x, lines):
    """A line for each {label: y}."""
    for look, (name, y) in zip(LOOKS, lines.items()):
        ax.plot(x, y, label=name, **{**look, "marker": ""})


def band(ax, x, values, look):
    """The mean over seeds as a line, the smallest to the largest as a band. values: (seeds, n)."""
    ax.plot(x, values.mean(0), linewidth=1.8, **{**look, "marker": ""})
    ax.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)


def finish(ax, title, xlabel="", ylabel="", legend=None, inches=None, **legend_options):
    """Set title and labels. The title is broken into lines as wide as the panel, or as `inches`."""
    inches = inches or ax.get_position().width * ax.figure.get_figwidth()
    title = re.sub(r"(?<![\d.])-(?=\d)", "−", title)  # a minus sign, but no other hyphen
    title = re.sub(r" (?=[%γT=±>])|(?<=[=±>]) ", "\N{NO-BREAK SPACE}", title)  # keeps "τ = 1"
    width = max(20, int(12.5 * inches))
    lines = len(textwrap.wrap(title, width))
    while width > 12 and len(textwrap.wrap(title, width - 1)) == lines:  # make them equally long
        width -= 1
    ax.set_title(textwrap.fill(title, width), fontsize=10.5, loc="left")
    ax.set(xlabel=xlabel or ax.get_xlabel(), ylabel=ylabel or ax.get_ylabel())
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    if legend:
        look = {"fontsize": 8.5, "edgecolor": "none", "framealpha": 0.85, "labelspacing": 0.3}
        ax.legend(loc=legend, **look, **legend_options)
    return ax


def z_axis(ax):
    """Label an axis of w / gamma, and mark Eq. (5): where the code changes."""
    ax.set_xlabel("latent weight w / γ")
    for boundary in (-0.5, 0.5):
        ax.axvline(boundary, color=GREY, linewidth=0.8, linestyle=DOTS, zorder=0)


def percent(x):
    """A share in words, with one digit more where it is small.

    >>> percent(0.7634), percent(0.0031), percent(0.0), percent(2e-6)
    ('76 %', '0.3 %', '0 %', 'under 0.1 %')
    """
    if 0 < x < 0.0005:
        return "under 0.1 %"
    return f"{100 * x:.0f} %" if x == 0 or abs(x) >= 0.0995 else f"{100 * x:.1f} %"


def short(name):
    """A tensor's name without what all share: 'model.layers.0.self_attn.q_proj' -> '0.q_proj'."""
    return re.sub(r"^model\.layers\.|self_attn\.|mlp\.", "", name)


CODES = {-1: ("−1", ORANGE, "//"), 0: ("0", GREY, ""), 1: ("+1", BLUE, "\\\\")}
UNIT = torch.ones(1, 1, dtype=torch.float64)  # gamma = 1: a weight is its z = w / gamma


def z_line(reach=2.0, points=2001):
    return torch.linspace(-reach, reach, points, dtype=torch.float64)


def gaussian_weights(n=200_000, gamma=1.0):
    """(n,) quantiles of a normal distribution with mean absolute value gamma: nothing random."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return gamma * (np.pi / 2) ** 0.5 * torch.special.ndtri(share)


# -- what train_tiny.py puts into files, and reading it --------------------------------------------

SPLITS = {"train": "training", "val": "validation"}
STEP = "step of quantization-aware training"


class Watch:
    """About 40 moments of a training, for these figures: an on_step of hestia.train.

    dead: the share of weights whose update changes no code (Eq. 6). felt: the breadth, the share
    that passes on 5 % or more of its update. hist: histograms of w / gamma of three tensors.
    """

    bins = np.linspace(-3, 3, 121)

    def __init__(self, qat, every):
        names = list(qat.latents)
        self.tensors = [names[0], names[len(names) // 2], names[-1]]
        self.qat, self.every, self.rows, self.late = qat, every, [], None
        self.keep()

    def keep(self):
        self.before = {name: w.detach().clone() for name, w in self.qat.latents.items()}

    @torch.no_grad()
    def __call__(self, t, record):
        qat, T, dead, felt, total, hist = self.qat, self.qat.total_steps, 0, 0, 0, []
        for name, old in self.before.items() if record else ():
            s, w = qat.step_of(t, name), qat.latents[name]
            same = hestia.dead_zone(old, w - old, s.group_size, s.codebook)
            feels = ~same  # an STE feels a weight move when its code changes
            if qat.method.soft:
                J = hestia.soft_quantize_jacobian(old, s.tau, s.group_size, s.codebook)
                feels = (1 - s.p) + s.p * J >= 0.05
            elif qat.method is hestia.METHODS["full"]:
                feels = torch.ones_like(same)
            dead, felt, total = dead + int(same.sum()), felt + int(feels.sum()), total + w.numel()
            if name in self.tensors:
                gamma = hestia.absmean_scale(w, s.group_size)  # (n_groups, 1)
                z = (w.reshape(len(gamma), -1) / gamma).clamp(-3, 3).cpu()
                hist.append(np.histogram(z, self.bins)[0] / w.numel())
        if record:
            shares = {"dead": dead / total, "felt": felt / total, "hist": hist}
            self.rows.append({"step": t, **shares, **record})
        if (t + 1) % self.every == 0 or t + 1 == T - 1:
            self.keep()  # the weights before a step that is watched
        if t + 1 == max(1, round(0.9 * T)):
            self.late = qat.codes()  # to see what the last tenth changes

    def changed(self):
        """The share of codes that the last tenth of the steps changed."""
        now = self.qat.codes()
        changed = sum(int((now[name] != old).sum()) for name, old in self.late.items())
        return changed / sum(codes.numel() for codes in now.values())

    def arrays(self):
        """What `read_snapshots` reads again."""
        found = {"tensors": np.array(self.tensors)}
        for key in ("step", "hist", "dead", "felt", "grad_norm", "grad_norm_latent"):
            found[key] = np.array([moment[key] for moment in self.rows], np.float32)
        return found


def write(path, save):
    """save(path), under another name first: this name never holds half a file."""
    half = path.with_name("half-" + path.name)
    save(half)
    half.replace(path)


def write_json(path, what):
    write(path, lambda half: half.write_text(json.dumps(what, indent=1, allow_nan=False), "utf-8"))


def run_file(folder, row, seed, ending):
    """Where a run keeps a training. An ablation's name has signs that a file's should not."""
    return Path(folder) / "runs" / (re.sub("[:=, ]+", "-", row) + f"-seed{seed}.{ending}")


def with_gaps(per_seed):
    """A copy of the rows with gap_train and gap_val, the share of the STE's gap to full precision
    that a row recovers. None where the STE is not above full precision, or nothing was trained.

    >>> rows = {"full": (2.0, 3.0), "absmean": (2.5, 2.9), "hestia": (2.25, 2.95)}
    >>> rows = {name: {"train": train, "val": val} for name, (train, val) in rows.items()}
    >>> with_gaps([rows])[0]["hestia"]
    {'train': 2.25, 'val': 2.95, 'gap_train': 0.5, 'gap_val': None}
    """
    copies = []
    for rows in per_seed:
        rows = {name: dict(row) for name, row in rows.items()}
        for split in ("train", "val") if {"absmean", "full"} <= rows.keys() else ():
            ste, full = rows["absmean"][split], rows["full"][split]
            for name, row in rows.items():
                gap = ste > full and name not in ("before", "untrained")
                row[f"gap_{split}"] = (ste - row[split]) / (ste - full) if gap else None
        copies.append(rows)
    return copies


def summarize(per_seed):
    """{row: {column: [mean, standard deviation over seeds or None]}}, of the rows of each seed."""
    per_seed, table = with_gaps(per_seed), {}
    for name, first in per_seed[0].items():
        table[name] = {}
        for column in first:
            values = [rows[name].get(column) for rows in per_seed]
            if all(isinstance(value, int | float) for value in values):
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                table[name][column] = [float(np.mean(values)), spread]
    return table


def print_table(table, unit):
    """Losses of the hard weights, and the share of the STE's gap to full precision recovered.
    table: what `summarize` returns."""
    columns = {"train": ("train", ".4f"), "val": ("validation", ".4f"), "test": ("test", ".4f"),
               "gap_train": ("gap recovered, train", ".0%"),
               "gap_val": ("gap recovered, validation", ".0%"),
               "changed_last_tenth": ("changed in last tenth", ".2%"),
               "seconds": ("seconds", ".0f")}
    shown = [key for key in columns if any(key in row for row in table.values())]
    titles = " | ".join(columns[key][0] for key in shown)
    print(f"\nHard weights, nats per {unit}; with several seeds, mean ± standard deviation\n")
    print(f"| | {titles} |\n|---|" + "---:|" * len(shown))
    for name, row in table.items():
        cells = [label(name) + ", continued" * (name == "full")]
        for key in shown:
            mean, spread = row.get(key, (None, None))
            cells.append("" if mean is None else f"{mean:{columns[key][1]}}")
            cells[-1] += "" if spread is None else f" ± {spread:{columns[key][1]}}"
        print("|", " | ".join(cells), "|")


def read(path, decode):
    """A file of a run, or a sentence that says how to get one."""
    try:
        return decode(path)
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        what = f"{path.parent} has no readable {path.name}"
        raise ValueError(f"{what}; make it with python train_tiny.py") from None


def read_results(path):
    """A results.json, given as itself or as the folder of its run."""
    path = Path(path) if Path(path).suffix == ".json" else Path(path) / "results.json"
    results = read(path, lambda path: json.loads(path.read_text("utf-8")))
    if not isinstance(results, dict) or not {"config", "table", "per_seed"} <= results.keys():
        raise ValueError(f"{path} holds no results of a run; make it with python train_tiny.py")
    return results


def read_runs(folder, ending, decode):
    """{(row, seed): what is kept of its training}, for the rows of a run's table."""
    results, found = read_results(folder), {}
    for row in ("pretrain", *results["table"]):
        for k in range(len(results["per_seed"])):
            seed = results["config"]["seed"] + k
            if (path := run_file(folder, row, seed, ending)).exists():
                found[row, seed] = read(path, decode)
    return found


def read_snapshots(folder):
    """{(row, seed): {key: array}}; that of "felt", for example, is (moments,)."""
    return read_runs(folder, "npz", lambda path: dict(np.load(path)))


def read_log(folder):
    """{(row, seed): [records]}"""
    return read_runs(folder, "json", lambda path: json.loads(path.read_text("utf-8"))["log"])


def by_seed(runs, row, key):
    """Steps (n,), and a logged quantity of one row over them, (seeds, n)."""
    logs = [log for (name, _), log in sorted(runs.items()) if name == row]
    logs = [[record for record in log if key in record] for log in logs]
    steps = np.array([record["step"] for record in logs[0]])
    return steps, np.array([[record[key] for record in log] for log in logs])


def along(snapshots, rows, key):
    """{row: (steps (moments,), values (seeds, moments, ...))}, of those that were watched."""
    found = {}
    for row in rows:
        if seeds := [arrays for (name, _), arrays in snapshots.items() if name == row]:
            found[row] = seeds[0]["step"], np.array([arrays[key] for arrays in seeds])
    if not found:
        raise ValueError(f"this run watched none of {', '.join(rows)}; python train_tiny.py does")
    return found


def is_soft(row, table):
    """Whether a row of results["table"] has a temperature."""
    known = hestia.METHODS.get(row)
    return known.soft if known else table[row].get("tau_init", [0.0])[0] > 0


def guidance(results):
    """What `schedules` takes: a run's configuration, the first seed's scores, and tau_init."""
    table = results["table"]
    soft = [row for row in table if is_soft(row, table)]
    if not soft:
        raise ValueError("no row of this run has a temperature; --methods hestia adds one")
    row = "hestia" if "hestia" in soft else soft[0]
    scores = {name: tensor["score"] for name, tensor in first_sensitivities(results).items()}
    return {"config": results["config"], "scores": scores or {"every tensor": 0.0},
            "tau_init": table[row]["tau_init"][0]}


def first_sensitivities(results):
    """{tensor: {value, stderr, score, ...}} of the first seed; {} where no row needed any."""
    first = (results.get("sensitivities") or [None])[0]
    return first["tensors"] if first else {}


# -- sections 3.1, 3.2 and 4: the quantizer, its relaxation, its slope -----------------------------


def staircase(taus=(1.0, 0.5, 0.2, 0.05), axes=None):
    """The paper's Fig. 1: Q and H(w; tau) over w / gamma, and their slopes below. Two panels."""
    top, below = panels(axes, 1, (7.6, 5.8), rows=2, sharex=True)
    z = z_line()
    hard = hestia.quantize(z, scale=UNIT)
    ste = {"color": RED, "linestyle": "--", "linewidth": 2.2}
    top.plot(z, hard, label="STE: rounding; slope 1 pretended", **ste)
    below.plot(z, torch.ones_like(z), **ste)
    looks = zip((SKY, GREEN, BLUE, BLACK, PINK), (":", "-.", "--", "-", ":"))
    distances, peaks, highest = [], [], 0.0
    for tau, (color, dash) in zip(taus, looks):
        H = hestia.soft_quantize(z, tau, scale=UNIT)
        slope = hestia.soft_quantize_jacobian(z, tau, scale=UNIT)
        top.plot(z, H, label=f"H, τ = {tau:g}", color=color, linestyle=dash)
        below.plot(z, slope, color=color, linestyle=dash)
        away, peak = float((H - hard).abs().mean()), float(slope.max())
        at = round(abs(float(z[slope.argmax()])), 1)
        distances.append(f"{away:.2f} γ away on average at τ = {tau:g}")
        peaks.append(f"{peak:.1f} at w = {'±' if at else ''}{at:g} γ for τ = {tau:g}")
        highest = max(highest, peak)
    z_axis(top)
    z_axis(below)
    top.set_xlabel("")
    below.set_ylim(0, min(1.05 * highest, 3.2))
    finish(top, f"As τ falls, H nears rounding: {distances[0]}, {distances[-1]}", "",
           "effective weight / γ", "upper left")
    finish(below, f"H's largest slope: {peaks[0]}, {peaks[-1]}", ylabel="slope")
    return top.figure


def pi_curves(taus=(1.0, 0.35, 0.1), axes=None):
    """Eq. (7): the shares pi_tau(q | w) of the three codes over w / gamma. A panel for each tau."""
    axes = panels(axes, len(taus), (3.2 * len(taus), 3.5), sharey=True)
    z = z_line(1.5)
    for ax, tau in zip(axes, taus):
        pi = hestia.assignment_probs(z, tau, scale=UNIT)  # (points, 3)
        for share, (code, color, _), dash in zip(pi.T, CODES.values(), ("--", "-", "-.")):
            ax.plot(z, share, label=f"code {code}", color=color, linestyle=dash, linewidth=2)
        z_axis(ax)
        at = float(pi[(z - 0.3).abs().argmin(), 1])
        finish(ax, f"τ = {tau:g}: at w = 0.3 γ the code 0 has {percent(at)}")
    axes[0].set_ylabel("share π of a code")
    axes[-1].legend(loc="center left", fontsize=8.5, edgecolor="none")
    return axes[0].figure


def dead_zone_line(dw=0.15, tau=0.35, ax=None):
    """Eq. (6): for which weights Q notices an update of dw gamma, and what H makes of it."""
    (ax,) = panels(ax, 1, (8, 3.6))
    H = lambda x: hestia.soft_quantize(x, tau, scale=UNIT)
    z = z_line(1.75)
    moved, dead = H(z + dw) - H(z), hestia.dead_zone(z, dw, scale=UNIT).numpy()
    ax.fill_between(z, 0, 1, where=~dead, transform=ax.get_xaxis_transform(), color=RED, alpha=0.3,
                    hatch="//", linewidth=0, label="here Q jumps by a whole γ")
    ax.plot(z, moved, color=BLUE, linewidth=2, label=f"change of H at τ = {tau:g}")
    ax.axhline(dw, color=BLACK, linestyle=":", label="the update itself")
    z_axis(ax)
    low, high = min(0.0, dw, float(moved.min())), max(0.0, dw, float(moved.max()))
    room = high - low  # for the codes' names below, and the legend above
    ax.set(xlim=(-1.75, 1.75), ylim=(low - 0.18 * room, high + 0.35 * room))
    for middle, (code, _, _) in zip((-1.12, 0, 1.12), CODES.values()):
        ax.text(middle, low - 0.09 * room, f"code {code}", ha="center", va="center", fontsize=9)
    w, Q = gaussian_weights(), lambda x: hestia.quantize(x, scale=UNIT)
    (alive, hard), (felt, soft) = ((percent(float((c >= 0.05).double().mean())), float(c.mean()))
                                   for c in ((f(w + dw) - f(w)) / dw for f in (Q, H)))
    title = f"An update of {dw:g} γ changes Q for {alive} of Gaussian weights, H for {felt}; "
    title += f"the mean response is {hard:.2f} and {soft:.2f} of the update"
    return finish(ax, title, ylabel="change of the output / γ", legend="upper center", ncols=3)


def lemma_4_2(taus=(0.3, 0.1, 0.03, 0.01), axes=None):
    """Lemma 4.2: the Jacobian becomes two spikes, and its integral against a smooth phi becomes
    gamma (phi(-gamma/2) + phi(gamma/2)); gamma = 1 here. Two panels, numbers in the legends."""
    left, right = panels(axes, 2, (9.6, 4.2))
    z = z_line(8.0, 800_001)
    slopes = [hestia.soft_quantize_jacobian(z, tau, scale=UNIT) for tau in taus]
    integral = lambda y: float(torch.trapezoid(y, z))
    near = (z.abs() < 1.6).nonzero().flatten()[::50]
    lines = {f"τ = {tau:g}: area {integral(s):.4f}": s[near] for tau, s in zip(taus, slopes)}
    curves(left, z[near], lines)
    z_axis(left)
    peaks = [float(slope.max()) for slope in slopes]
    left.set(yscale="log", xlim=(-1.3, 1.3), ylim=(0.03, 40 * max(peaks)))
    finish(left, f"The slope becomes two spikes, {peaks[-1]:.0f} high at τ = {taus[-1]:g}", "",
           "dH/dw (log scale)", "upper center", ncols=2)
    smooth = {"exp(−w²)": lambda z: torch.exp(-z * z), "1/(1+w²)": lambda z: 1 / (1 + z * z),
              "cos 2w": lambda z: torch.cos(2 * z)}
    half, worst = torch.tensor([-0.5, 0.5], dtype=torch.float64), 0.0  # the boundaries
    for look, (name, phi) in zip(LOOKS, smooth.items()):
        limit, found = float(phi(half).sum()), [integral(slope * phi(z)) for slope in slopes]
        text = f"φ = {name}: {found[0]:.4f} … {found[-1]:.4f}, limit {limit:.4f}"
        right.loglog(taus, [abs(x - limit) for x in found], label=text, **look)
        worst = max(worst, abs(found[-1] / limit - 1))
    title = f"At τ = {taus[-1]:g} the integrals are within {100 * worst:.2g} % of φ(−½) + φ(½)"
    finish(right, title, "temperature τ", "|∫ (dH/dw) φ dw − φ(−½) − φ(½)|", "upper left")
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    return left.figure


def mse_against_tau(weights=None, ax=None, group_size=None):
    """Section 5.1: the mean squared error between W and H(W; tau), in units of gamma^2, over tau.
    weights: a list of tensors; None: Gaussian ones."""
    (ax,) = panels(ax, 1, (6.4, 3.8))
    what = "Gaussian weights" if weights is None else "these weights"
    weights = [gaussian_weights()] if weights is None else [w.detach() for w in weights]
    square = lambda w: float(hestia.absmean_scale(w, group_size).square().mean()) * w.numel()
    away = lambda w, tau: float((hestia.soft_quantize(w, tau, group_size) - w).square().sum())
    unit = sum(square(w) for w in weights)
    error = lambda tau: sum(away(w, tau) for w in weights) / unit
    taus, best = np.geomspace(0.05, 2, 41), hestia.optimal_tau_init(weights, group_size)
    ax.semilogx(taus, [error(tau) for tau in taus], color=BLUE, linewidth=2)
    large = {"linestyle": "none", "markersize": 9, "markeredgewidth": 2}
    ax.plot(best, error(best), marker="o", color=BLUE, **large,
            label=f"least: {error(best):.4f} at τ = {best:.4f}")
    ax.plot(0.3, error(0.3), marker="s", color=RED, fillstyle="none", **large,
            label=f"Table 5: {error(0.3):.4f} at τ = 0.3000")
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    title = f"For {what} H is closest to W at τ = {best:.3f}; at Table 5's 0.3 the error is "
    title += f"{percent(error(0.3) / error(best) - 1)} higher"
    return finish(ax, title, "temperature τ", "mean (W − H)² / γ²", "upper center")


# -- section 3.3: schedules and sensitivities ------------------------------------------------------


def schedules(config, scores, ax=None, tau_init=0.35):
    """Pressure, and temperature of the least, the middle and the most sensitive tensor (Fig. 2).
    config: steps, rho and alpha; scores: {tensor: s_i}."""
    (ax,) = panels(ax, 1, (6.8, 4.2))
    T, rho, alpha = config["steps"], config["rho"], config["alpha"]
    t = np.linspace(0, T, 400)
    tau = lambda s: [hestia.temperature(x, T, rho, tau_init, s, alpha) for x in t]
    ordered = sorted(scores, key=scores.get)
    most, middle, least = ordered[-1], ordered[len(ordered) // 2], ordered[0]
    lines = {f"{short(name)}: s = {scores[name]:.2f}": tau(scores[name])
             for name in (most, middle, least)}
    lines["every tensor, if α = 0"] = [hestia.base_temperature(x, T, rho, tau_init) for x in t]
    curves(ax, t, lines)
    right = ax.twinx()
    wide = {"color": GREY, "linewidth": 4, "alpha": 0.45}
    right.plot(t, [hestia.pressure(x, T, rho) for x in t], **wide)
    ax.plot([], [], label="pressure p (right axis)", **wide)  # for the legend
    right.set(ylabel="pressure p, share of H", ylim=(-0.024, 1.2), yticks=np.arange(6) / 5)
    right.spines["top"].set_visible(False)
    ax.axvline(rho * T, color=GREY, linewidth=0.8)
    there = dict(transform=ax.get_xaxis_transform(), ha="center", va="top")
    ax.text(rho * T / 2, 0.97, "compress", fontsize=9, style="italic", **there)
    ax.text((1 + rho) * T / 2, 0.97, "anneal", fontsize=9, style="italic", **there)
    high, low = tau(scores[most])[0], tau(scores[least])[0]
    ax.set_ylim(-0.024 * max(high, low), 1.2 * max(high, low, tau_init))
    title = "All tensors cool alike"
    if high != low:
        change = percent(abs(high / low - 1)) + (" warmer" if high > low else " colder")
        title = f"The most sensitive tensor is {change} than the least sensitive"
    return finish(ax, title, STEP, "temperature τ", "upper right", bbox_to_anchor=(1, 0.83))


def alpha_rho_kappa(axes=None):
    """What alpha, rho and kappa do: to a sensitive tensor's tau, to every tensor's, to scores."""
    left, middle, right = panels(axes, 3, (9.6, 3.9))
    t, tau_init = np.linspace(0, 1, 301), 0.35
    tau = {alpha: [hestia.temperature(x, 1, 0.2, tau_init, 0.9, alpha) for x in t]
           for alpha in (0.6, 0.4, 0.2, 0.0, -0.4)}
    curves(left, t, {f"α = {alpha:g}".replace("-", "−"): y for alpha, y in tau.items()})
    warmer, colder = percent(tau[0.4][0] / tau_init - 1), percent(1 - tau[-0.4][0] / tau_init)
    finish(left, f"α = 0.4 warms a tensor with s = 0.9 by {warmer}, −0.4 cools it by {colder}",
           "t / T", "temperature τ", "upper right")
    base = {rho: np.array([hestia.base_temperature(x, 1, rho, tau_init) for x in t])
            for rho in (0.0, 0.1, 0.2, 0.3, 0.5)}
    curves(middle, t, {f"ρ = {rho:g}": y for rho, y in base.items()})
    halved = {rho: t[y < tau_init / 2][0] for rho, y in base.items()}
    title = f"τ has halved at {halved[0.0]:.2f} T with ρ = 0, at {halved[0.5]:.2f} T with ρ = 0.5"
    finish(middle, title, "t / T", "base temperature τ", "lower left")
    decades = np.linspace(-2, 2, 81)  # log10 of 81 made-up traces
    traces, score = {x: 10.0**x for x in decades}, {}
    for kappa in (0.25, 0.5, 1, 2, 4):
        score[kappa] = list(hestia.sensitivity_scores(traces, kappa).values())
    curves(right, decades / decades.std(), {f"κ = {kappa:g}": y for kappa, y in score.items()})
    span = {kappa: f"{s[0]:.2f} to {s[-1]:.2f}" for kappa, s in score.items()}
    finish(right, f"κ pulls scores apart: {span[1]} with κ = 1, {span[4]} with 4",
           "(log h − μ) / σ of the trace h", "sensitivity score s", "upper left")
    return left.figure


# -- along a run -----------------------------------------------------------------------------------


def loss_curves(runs, ax=None, key="loss"):
    """Training loss as each row's forward pass sees it, minus full precision's: all rows see the
    same batches, so their noise cancels. Without a row in full precision: the loss itself. Lines
    are means over seeds, bands reach from least to largest."""
    (ax,) = panels(ax, 1, (6.6, 4))
    rows = [name for name in dict.fromkeys(name for name, _ in runs) if name != "pretrain"]
    paired = "full" in rows
    reference = by_seed(runs, "full", key)[1] if paired else 0.0
    found, late = {}, {}
    for k, row in enumerate(rows):
        if row != "full" or not paired:
            step, values = by_seed(runs, row, key)
            found[row] = values - reference
            band(ax, step, found[row], style(row, k))
            late[label(row)] = found[row][:, step >= 0.75 * step[-1]].mean()
    if paired:
        ax.axhline(0, color=BLACK, linewidth=1)
    if paired and found:  # the first steps of a hard quantizer tower above the rest: cut them off
        usual = max(np.quantile(values.mean(0), 0.9) for values in found.values())
        low = min(0.0, min(values.min() for values in found.values()))
        high = max(values.mean(0).max() for values in found.values())
        ax.set_ylim(low - 0.1 * usual, 1.5 * usual)
        text = f"↑ up to {high:.2f}" if high > 1.5 * usual else ""
        ax.text(0.01, 0.99, text, transform=ax.transAxes, va="top", fontsize=8.5)
    title = "Nothing here was quantized"
    if late:
        best, worst = min(late, key=late.get), max(late, key=late.get)
        title = f"In the last quarter {best} costs {late[best]:.3f} nats"
        title += f", {worst} {late[worst]:.3f}" if len(late) > 1 else ""
    ylabel = "nats per token above full precision" if paired else "nats per token"
    return finish(ax, title, STEP, ylabel, "upper right" if late else None)


def felt_curves(run, ax=None):
    """The breadth of the response: the share of weights that pass on 5 % or more of their update.
    It says over how many weights the response is spread, not how large it is in the mean."""
    found = along(read_snapshots(run), STYLE, "felt")
    (ax,) = panels(ax, 1, (6.8, 4))
    quarter = {}
    for row, (step, felt) in found.items():
        band(ax, step, 100 * felt, style(row))
        quarter[row] = felt[:, np.argmin(abs(step - 0.25 * step[-1]))].mean()
    rows = [row for row in ("absmean", "hestia") if row in found] or list(found)
    shares = [f"{percent(quarter[row])} of the weights under {label(row)}" for row in rows]
    title = f"A quarter of the way, the response is spread over {', '.join(shares)}"
    ax.set_ylim(-3, 110)
    return finish(ax, title, STEP, "breadth: weights that respond, %", "center right",
                  bbox_to_anchor=(1, 0.66))


def watched_tensor(run, tensor):
    """A watched tensor's name, the bins, and {row: (steps, histograms (moments, bins))} of STE and
    HESTIA: means over seeds."""
    snapshots = read_snapshots(run)
    found = along(snapshots, ("absmean", "hestia"), "hist")
    (name, *_) = (arrays["tensors"][tensor] for arrays in snapshots.values())
    histograms = {row: (step, hist.mean(0)[:, tensor]) for row, (step, hist) in found.items()}
    return str(name), Watch.bins, histograms


def draw_histogram(ax, now, start, bins):
    """Bars of w / gamma in their codes' looks, and an outline of the start. Returns the bars."""
    middle, bars = (bins[1:] + bins[:-1]) / 2, []
    for code, (text, color, hatch) in CODES.items():
        these = np.clip(np.round(middle), -1, 1) == code
        look = dict(color=color, alpha=0.75, hatch=hatch, edgecolor="white", linewidth=0)
        look |= dict(width=bins[1] - bins[0], label=f"code {text}")
        bars += ax.bar(middle[these], 100 * now[these], **look)
    ax.stairs(100 * start, bins, color=BLACK, linewidth=1, label="before")
    z_axis(ax)
    ax.set_xlim(-2.5, 2.5)
    return bars


def histograms(run, tensor=-1, axes=None):
    """A watched tensor's weights, w / gamma, before and after training by AbsMean STE and HESTIA.
    tensor: which of the three that the run watched. "Before" is after the first step."""
    name, bins, found = watched_tensor(run, tensor)
    axes = panels(axes, len(found), (4.8 * len(found), 4), sharey=True)
    near, highest = abs(abs((bins[1:] + bins[:-1]) / 2) - 0.5) < 0.1, 0.0
    for ax, (row, (_, hist)) in zip(axes, found.items()):
        draw_histogram(ax, hist[-1], hist[0], bins)
        highest = max(highest, hist[0].max(), hist[-1].max())
        before, after = hist[0, near].sum(), hist[-1, near].sum()
        change = "fills" if after > before / 0.85 else "keeps its weights at"
        change = "empties" if after < 0.85 * before else change
        title = f"{label(row)} {change} the boundaries: within 0.1 γ of one lie {percent(before)} "
        title += f"of the weights before, {percent(after)} after"
        finish(ax, title, f"latent weight w / γ of {short(name)}")
    axes[0].set_ylim(0, 118 * highest)  # room for the legend
    legend = {"fontsize": 8.5, "edgecolor": "none", "columnspacing": 1, "handlelength": 1.4}
    axes[0].legend(loc="upper center", ncols=4, **legend)
    axes[0].set_ylabel(f"weights per bin of {bins[1] - bins[0]:.2g} γ, %")
    return axes[0].figure


def overview(folder):
    """One figure of a finished run: loss curves, schedules and the table's losses. A Figure."""
    results, runs = read_results(folder), read_log(folder)
    rows = [row for row in results["config"]["methods"] if row in results["table"]]
    table = {row: results["table"][row] for row in rows}
    fig, axes = plt.subplot_mosaic(
        [["left", "right"], ["below", "below"]], height_ratios=(3.6, 0.9 + 0.35 * len(rows)),
        figsize=(9.6, 5.2 + 0.35 * len(rows)), layout="constrained",
    )
    left, right, below = axes.values()
    loss_curves(runs, left)
    if any(is_soft(row, table) for row in rows):
        schedules(ax=right, **guidance({**results, "table": table}))
    else:
        right.set_axis_off()
        right.set_title("None of these methods has a temperature", fontsize=10.5)
    for split, offset, marker, fill in (("train", -0.13, "o", "full"), ("val", 0.13, "s", "none")):
        for k, row in enumerate(rows):
            mean, spread = table[row][split]
            below.errorbar(mean, k + offset, xerr=spread, capsize=3, linestyle="none",
                           color=style(row, k)["color"], marker=marker, fillstyle=fill,
                           label=None if k else f"{SPLITS[split]} text")
    below.set_yticks(range(len(rows)), [label(row) for row in rows])
    below.invert_yaxis()
    losses = {label(row): table[row]["val"][0] for row in rows if row != "full"}
    title = "At the end"
    if losses:
        title = f"Lowest on validation text among the quantized: {min(losses, key=losses.get)}"
    finish(below, title, "nats per token, hard weights", legend="best")
    return fig


# -- command line ----------------------------------------------------------------------------------

RUN = "a run"
FIGURES = {  # name: (what draws it for a run's folder, a line about it, what it needs)
    "staircase": (lambda run: staircase(), "Q and H over the weight, and their slopes", ""),
    "pi_curves": (lambda run: pi_curves(), "the shares of the codes at three temperatures", ""),
    "dead_zone_line": (lambda run: dead_zone_line(), "where an update changes Q", ""),
    "lemma_4_2": (lambda run: lemma_4_2(), "the Jacobian becomes two spikes of area gamma", ""),
    "mse_against_tau": (lambda run: mse_against_tau(), "which tau keeps H closest to W", ""),
    "alpha_rho_kappa": (lambda run: alpha_rho_kappa(), "what the three settings do", ""),
    "schedules": (lambda run: schedules(**guidance(read_results(run))), "pressure and tau", RUN),
    "loss_curves": (lambda run: loss_curves(read_log(run)), "loss above full precision", RUN),
    "felt_curves": (felt_curves, "the breadth: how many weights respond to their update", RUN),
    "histograms": (histograms, "weights before and after, STE beside HESTIA", RUN),
    "overview": (overview, "loss curves, schedules and final losses of a run", RUN),
}


def save(figures, name, run=None, folder=None):
    """Draw one figure into a folder and return its path. run: a folder, or None for the newest."""
    draw, _, needs = figures[name]
    if RUN not in needs:
        run = None
    elif not run:
        finished = sorted(Path("out").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
        run = finished[-1].parent if finished else None
    if needs == RUN and not run:
        raise ValueError("there is no finished run under out/; make one with python train_tiny.py")
    drawn = draw(run)
    animated = callable(drawn)  # an animation writes itself
    folder = Path(folder or run or "out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{'gif' if animated else 'png'}"
    figure = drawn if animated or isinstance(drawn, plt.Figure) else drawn.figure
    write(path, drawn if animated else lambda half: figure.savefig(half, dpi=120))
    plt.close("all")
    return path


def main(arguments=None, figures=FIGURES, program="plots.py"):
    listed = "figures:"
    for name, (_, about, needs) in figures.items():
        listed += f"\n  {name:26}{about}" + (f"; needs {needs}" if needs else "")
    parser = argparse.ArgumentParser(prog=program, epilog=listed,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of those below, or all")
    parser.add_argument("--run", help="a folder that train_tiny.py wrote [the newest under out/]")
    parser.add_argument("--save", metavar="DIR", help="where to [the run's folder, else out/]")
    given = parser.parse_args(arguments)
    if not given.name:
        parser.print_help()
        return 0
    try:
        if given.name not in ("all", *figures):
            raise ValueError(f"there is no figure {given.name}; expected all, {', '.join(figures)}")
        if given.run:
            read_results(given.run)  # a wrong folder is one error, not one for each figure
        for name in figures if given.name == "all" else [given.name]:
            try:
                print(save(figures, name, given.run, given.save))
            except ValueError as error:
                if given.name != "all":
                    raise
                print(f"{name} is left out: {error}")
    except (ValueError, OSError, KeyError) as error:
        lacking = "the numbers lack " if isinstance(error, KeyError) else ""
        print(f"{program}: {lacking}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(main())
