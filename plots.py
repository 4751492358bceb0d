"""Every figure, one function each: numbers, a run's folder or its results in, matplotlib Axes out. Nothing here trains.

    python plots.py                                    # the names of the figures, and what each needs
    python plots.py staircase                          # one of them, as a picture under out/
    python plots.py all --run out/NAME --save pictures # all that this run, or a study of ours, has the numbers for

In a notebook: `plots.staircase()`, or `plots.felt_curves("out/NAME", ax)`. A function given no Axes makes its own. A
title says what the figure shows, and is put together from the same numbers as the figure.
"""

import argparse
import json
import os
import re
import sys
import textwrap
import zipfile
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, NullFormatter

import hestia

# ----------------------------------------------------------------------------------------------------------------------
# furniture: colours, panels, titles, a number line

# colour-blind safe (Okabe-Ito), and each with a dash and a marker of its own, so that greyscale still tells them apart
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#777777")  # fmt: skip
STYLE = {
    "full": {"color": BLACK, "linestyle": "-", "marker": "D"},
    "absmean": {"color": RED, "linestyle": "--", "marker": "s"},
    "hestia-no-hessian": {"color": SKY, "linestyle": "-.", "marker": "^"},
    "hestia": {"color": BLUE, "linestyle": "-", "marker": "o"},
}
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 1)), (0, (9, 3)))
LOOKS = [{"color": (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)[k % 7], "linestyle": DASHES[(k + k // 7) % 7],
          "marker": "osD^vPX"[(k + k // 7) % 7]} for k in range(49)]  # fmt: skip


def quantizer(method):
    """The row of a method, or of a variant such as "hestia:alpha=0.6", whose label says so.

    >>> quantizer("hestia:alpha=0.6,rho=0.3").label
    'HESTIA, alpha 0.6, rho 0.3'
    """
    name, _, settings = method.partition(":")
    row = hestia.QUANTIZERS[name]
    said = "".join(", " + item.replace("=", " ").replace("_", " ") for item in settings.split(",") if item)
    return row._replace(label=row.label + said)


def style(method, k=0):
    """How a method is drawn: always the same for the four of a default run, the k-th look for any other."""
    return {"label": quantizer(method).label, **STYLE.get(method, LOOKS[k % len(LOOKS)])}


def line_style(method, k=0):
    return {key: value for key, value in style(method, k).items() if key != "marker"}


def panels(axes, columns, size, **options):
    """The axes that were given, as a flat list, or new ones beside each other. size: of the figure, in inches."""
    if axes is None:
        _, axes = plt.subplots(1, columns, figsize=size, layout="constrained", **options)
    flat = list(np.ravel(axes))
    if len(flat) != columns:
        raise ValueError(f"this figure has {columns} panels, and {len(flat)} Axes were given; expected {columns}")
    return flat


def finish(ax, title, xlabel=None, ylabel=None, legend=None, **legend_options):
    """Title on the left, broken where the panel ends; labels with units; a light frame. legend: where, or None."""
    width = ax.get_position().width * ax.figure.get_figwidth()  # inches
    ax.set_title("\n".join(textwrap.wrap(title, max(20, int(12.5 * width)))), fontsize=10.5, loc="left")
    ax.set(**{key: text for key, text in (("xlabel", xlabel), ("ylabel", ylabel)) if text})
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    if legend:
        ax.legend(loc=legend, **{"fontsize": 8.5, "frameon": False, **legend_options})
    return ax


def boundaries(ax):
    """Eq. (5): where the code changes, on an axis of w / gamma."""
    for b in (-0.5, 0.5):
        ax.axvline(b, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)


def percent(x):
    """A share in words: one digit more where it is small.

    >>> percent(0.7634), percent(0.0031), percent(0.0)
    ('76 %', '0.3 %', '0 %')
    """
    return f"{100 * x:.0f} %" if x == 0 or abs(x) >= 0.0995 else f"{100 * x:.1f} %"


def short(name):
    """A tensor's name without what all names share: 'model.layers.0.self_attn.q_proj' -> '0.q_proj'."""
    return re.sub(r"^model\.layers\.|self_attn\.|mlp\.", "", name)


UNIT = torch.ones(1, 1, dtype=torch.float64)  # gamma = 1: a weight is its z = w / gamma


def z_line(reach=2.0, points=2001):
    return torch.linspace(-reach, reach, points, dtype=torch.float64)


def gaussian_weights(n=20000, gamma=1.0):
    """(n,) quantiles of a normal distribution whose mean absolute value is gamma: a weight matrix without chance."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return gamma * (np.pi / 2) ** 0.5 * torch.special.ndtri(share)


# ----------------------------------------------------------------------------------------------------------------------
# reading what train_tiny.py and notebooks/curvature.py wrote

RESULTS = Path(__file__).resolve().parent / "notebooks" / "results"


def read_json(path, command):
    """A JSON file, or a sentence that says which command makes it."""
    try:
        return json.loads(Path(path).read_text())
    except OSError:
        raise ValueError(f"there is no {path}; make it with {command}") from None
    except ValueError:
        raise ValueError(f"{path} is damaged; make it anew with {command}") from None


def read_results(path):
    """A results.json, given as itself or as the folder of its run."""
    path = Path(path)
    path = path if path.suffix == ".json" else path / "results.json"
    results = read_json(path, "python train_tiny.py")
    if not isinstance(results, dict) or not {"config", "table", "per_seed"} <= results.keys():
        raise ValueError(f"{path} holds no results of a run; make some with python train_tiny.py")
    return results


def read_snapshots(folder):
    """{key: array} of a run's snapshots.npz; "hestia/seed0/felt", for example, is (moments,)."""
    path = Path(folder) / "snapshots.npz"
    try:
        with np.load(path) as saved:
            return dict(saved)
    except (OSError, ValueError, zipfile.BadZipFile):
        raise ValueError(f"there is no readable {path}; make it with python train_tiny.py") from None


def along(snapshots, method, key):
    """Steps (moments,), and what was measured at them, (seeds, moments, ...)."""
    seeds = sorted(name for name in snapshots if name.startswith(f"{method}/seed") and name.endswith(f"/{key}"))
    return snapshots[seeds[0].replace(f"/{key}", "/step")], np.array([snapshots[name] for name in seeds])


def present(snapshots, *wanted):
    """Those of the methods that were watched; none is an error."""
    found = [m for m in wanted if any(name.startswith(f"{m}/seed") for name in snapshots)]
    if not found:
        raise ValueError(f"this run watched none of {', '.join(wanted)}; python train_tiny.py does")
    return found


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


def band(ax, x, values, **line):
    """The mean over seeds as a line, and from the smallest to the largest as a band. values: (seeds, n)."""
    ax.plot(x, values.mean(0), linewidth=1.8, **line)
    ax.fill_between(x, values.min(0), values.max(0), color=line["color"], alpha=0.15, linewidth=0)


def differences(results, methods, other, split):
    """{method: (mean, half width of the 95 % interval, [one number per seed])} of a method's loss minus another's,
    seed by seed: they share their batches. Of one seed there is no interval, and its half width is 0."""
    from train_tiny import paired

    rows = results["per_seed"]
    each = {m: [row[m][split] - row[other][split] for row in rows] for m in methods}
    half = lambda m: paired(rows, m, other, split)[1] if len(rows) > 1 else 0.0
    return {m: (float(np.mean(d)), half(m), d) for m, d in each.items()}


def clear(mean, half, seeds):
    """Whether zero lies outside the 95 % interval; with one seed there is no way to know."""
    return len(seeds) > 1 and abs(mean) > half


def forest(ax, rows, text):
    """A row for each (label, mean, half width, [numbers of the seeds], look): mean and interval, seeds as small rings,
    and the mean in words at the right. What lies far off the others is an arrow at the edge."""
    means = np.array([row[1] for row in rows])
    reach = 5 * np.median(np.abs(means)) if (means != 0).sum() > 2 else np.inf
    for k, (_, mean, half, seeds, look) in enumerate(rows):
        marker = {"color": look["color"], "marker": look["marker"], "markersize": 7}
        if abs(mean) > reach:
            ax.plot(np.sign(mean) * reach, k, **{**marker, "marker": ">" if mean > 0 else "<"}, clip_on=False)
        else:
            ax.errorbar(mean, k, xerr=half or None, capsize=4, linewidth=1.5, **marker)
            ax.plot(seeds, [k + 0.25] * len(seeds), "o", color=look["color"], markersize=3.5, fillstyle="none")
        ax.annotate(text(mean, half), (1.02, k), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    if (abs(means) > reach).any():
        ax.set_xlim(*(side * reach if (side * means > reach).any() else end
                      for side, end in zip((-1, 1), ax.get_xlim())))  # fmt: skip
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)


SPLITS = {"train": "training", "val": "validation"}


# ----------------------------------------------------------------------------------------------------------------------
# sections 3.1 and 3.2: the quantizer and its relaxation


def staircase(taus=(1.0, 0.5, 0.2, 0.05), axes=None):
    """The paper's Fig. 1: Q and H(w; tau) over w / gamma, and their slopes. Two panels."""
    left, right = panels(axes, 2, (9, 3.8))
    z = z_line()
    hard = hestia.quantize(z, scale=UNIT)
    left.plot(z, hard, label="Q: rounding", linewidth=2.2, **{k: STYLE["absmean"][k] for k in ("color", "linestyle")})
    right.axhline(1, label="what the STE pretends", linewidth=2.2,
                  **{k: STYLE["absmean"][k] for k in ("color", "linestyle")})  # fmt: skip
    away, peaks = [], []
    for tau, color, dash in zip(taus, (SKY, GREEN, BLUE, BLACK, PINK, ORANGE), (":", "-.", (0, (7, 2)), "-", "--", ":")):
        H, J = hestia.soft_quantize(z, tau, scale=UNIT), hestia.soft_quantize_jacobian(z, tau, scale=UNIT)
        left.plot(z, H, label=f"H, τ = {tau:g}", color=color, linestyle=dash)
        right.plot(z, J, label=f"H, τ = {tau:g}", color=color, linestyle=dash)
        away.append(float((H - hard).abs().mean()))
        peaks.append(float(J.max()))
    for ax in (left, right):
        boundaries(ax)
    finish(left, f"H hardens into rounding: on average {away[0]:.2f} γ away at τ = {taus[0]:g}, {away[-1]:.2f} γ at "
           f"τ = {taus[-1]:g}", "latent weight w / γ", "effective weight / γ", "upper left")  # fmt: skip
    finish(right, f"H's slope is true: at most {peaks[0]:.1f} at τ = {taus[0]:g}, and {peaks[-1]:.1f} at τ = "
           f"{taus[-1]:g}, at the boundaries", "latent weight w / γ", "slope of the effective weight", "upper right")  # fmt: skip
    right.set_ylim(0, min(1.05 * max(peaks), 4.2))
    return left.figure


def pi_curves(taus=(1.0, 0.35, 0.1), axes=None):
    """Eq. (7): the shares pi_tau(q | w) of the three codes over w / gamma. A panel for each tau."""
    axes = panels(axes, len(taus), (3.2 * len(taus), 3.4), sharey=True)
    z = z_line(1.5)
    for ax, tau in zip(axes, taus):
        pi = hestia.assignment_probs(z, tau, scale=UNIT)
        for q, look in zip(range(3), (LOOKS[1], LOOKS[6], LOOKS[0])):
            ax.plot(z, pi[:, q], color=look["color"], linestyle=("--", "-", "-.")[q], linewidth=1.8,
                    label=f"code {hestia.TERNARY[q]:+.0f}".replace("+0", "0"))  # fmt: skip
        boundaries(ax)
        sure = float((pi.max(1).values > 0.95).double().mean())
        finish(ax, f"τ = {tau:g}: one code has over 95 % on {percent(sure)} of this axis", "latent weight w / γ")
    axes[0].set_ylabel("share π of a code")
    axes[0].legend(loc="center left", fontsize=8.5, frameon=False)
    return axes[0].figure


def dead_zone_line(dw=0.15, tau=0.35, ax=None):
    """Eq. (6): an update of dw, in units of gamma: where on the line of weights Q notices it, and what H makes of it."""
    (ax,) = panels(ax, 1, (8, 3.4))
    z, w = z_line(1.75), gaussian_weights()
    H = lambda x: hestia.soft_quantize(x, tau, scale=UNIT)
    moved = H(z + dw) - H(z)
    dead = hestia.dead_zone(z, dw, scale=UNIT).numpy()
    ax.fill_between(z, 0, 1, where=~dead, transform=ax.get_xaxis_transform(), color=RED, alpha=0.35, hatch="//",
                    linewidth=0, label="Q changes, by a whole γ")  # fmt: skip
    ax.plot(z, moved, color=BLUE, linewidth=2, label=f"H changes by this much (τ = {tau:g})")
    ax.axhline(dw, color=BLACK, linestyle=":", label="the update itself")
    boundaries(ax)
    top = 1.5 * max(float(moved.max()), dw)
    for low, high, code in ((-1.75, -0.5, "−1"), (-0.5, 0.5, "0"), (0.5, 1.75, "+1")):
        ax.text((low + high) / 2, -0.11 * top, f"code {code}", ha="center", va="center", fontsize=9)
    alive = 1 - float(hestia.dead_zone(w, dw, scale=UNIT).double().mean())
    felt = float(((H(w + dw) - H(w)).abs() >= 0.05 * abs(dw)).double().mean())
    ax.set(xlim=(-1.75, 1.75), ylim=(-0.2 * top, top))
    return finish(ax, f"An update of {dw:g} γ changes Q for {percent(alive)} of Gaussian weights; H passes on 5 % of it or "
                  f"more for {percent(felt)}", "latent weight w / γ", "change of the output / γ", "upper center", ncols=3)  # fmt: skip


def jacobians(methods=None, tau=0.35, ax=None):
    """dW_eff/dW of every method by autograd, on Gaussian weights with gamma = 0.02 (as in a Llama; only DLT's slope
    depends on it) and with learned scales where they start. Methods whose curves are the same share a line."""
    methods = methods or ("absmean", "hestia", "dge", "dsq", "daq", "lsq", "seq", "dlt", "twn", "tequila")
    (ax,) = panels(ax, 1, (8.5, 4.4))
    w = gaussian_weights(gamma=0.02)[None]
    z = w / hestia.absmean_scale(w)
    shown = (z >= 0) & (z < 2.4)
    curves = []  # [(slope, [labels])]
    for method in methods:
        row = quantizer(method)
        s = hestia.Step(1.0, tau, None, row.settings.get("codebook", hestia.TERNARY))
        latent = w.clone().requires_grad_()
        out = row.relax(latent, s, **(row.init(w.clone(), s) if row.init else {}))
        (slope,) = torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), latent)
        same = next((names for old, names in curves if torch.allclose(old[shown], slope[shown])), None)
        if same is None:
            curves.append((slope, same := []))
        same.append(row.label if not row.soft else f"{row.label}, τ = {tau:g}")
    soft = STYLE["hestia"] | {"linewidth": 2.6}
    for k, (slope, names) in enumerate(curves):
        look = soft if any(name.startswith("HESTIA") for name in names) else LOOKS[1:][k]
        look = {key: value for key, value in look.items() if key != "marker"}
        ax.plot(z[shown], slope[shown], label=textwrap.fill(", ".join(names), 30), **{"linewidth": 1.6, **look})
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    ones = sum(len(names) for slope, names in curves if torch.allclose(slope[shown], torch.ones_like(slope[shown])))
    return finish(ax, f"{ones} of {len(methods)} methods pretend a slope of 1 on this axis; the others disagree most at the "
                  "boundary, |w| = γ/2", "|w| / γ (the slopes are even)", "dW_eff/dW",
                  "center left", bbox_to_anchor=(1, 0.5))  # fmt: skip


TEST_FUNCTIONS = {  # of w / gamma
    "exp(−w²)": lambda z: torch.exp(-z * z),
    "1/(1+w²)": lambda z: 1 / (1 + z * z),
    "cos 2w": lambda z: torch.cos(2 * z),
}


def lemma_4_2(taus=(0.3, 0.1, 0.03, 0.01), axes=None):
    """Lemma 4.2: the Jacobian becomes two spikes, and its integral against a smooth f becomes gamma (f(-gamma/2) +
    f(gamma/2)); gamma = 1 here. Two panels; the numbers are in the legend."""
    left, right = panels(axes, 2, (9.5, 4))
    z = z_line(8.0, 800001)
    J = {tau: hestia.soft_quantize_jacobian(z, tau, scale=UNIT) for tau in taus}
    near = (z.abs() < 1.25).nonzero().flatten()[::50]
    for k, (tau, slope) in enumerate(J.items()):
        left.plot(z[near], slope[near], label=f"τ = {tau:g}: mass {float(torch.trapezoid(slope, z)):.4f}",
                  color=LOOKS[k]["color"], linestyle=LOOKS[k]["linestyle"])  # fmt: skip
    half = torch.tensor([-0.5, 0.5], dtype=z.dtype)
    worst = 0.0
    for k, (name, f) in enumerate(TEST_FUNCTIONS.items()):
        limit = float(f(half).sum())
        found = [float(torch.trapezoid(slope * f(z), z)) for slope in J.values()]
        right.loglog(taus, [abs(x - limit) for x in found], **LOOKS[k],
                     label=f"f = {name}: {found[0]:.4f} … {found[-1]:.4f}, limit {limit:.4f}")  # fmt: skip
        worst = max(worst, abs(found[-1] - limit) / abs(limit))
    boundaries(left)
    finish(left, f"The slope becomes two spikes, {float(J[taus[-1]].max()):.0f} high at τ = {taus[-1]:g}",
           "latent weight w / γ", "dH/dw (log scale)", "upper right")  # fmt: skip
    left.set(yscale="log", ylim=(0.03, 12 * float(max(slope.max() for slope in J.values()))))
    finish(right, f"At τ = {taus[-1]:g} the integrals are within {100 * worst:.2g} % of f(−½) + f(½)",
           "temperature τ", "|∫ (dH/dw) f dw − f(−½) − f(½)|", "upper left")  # fmt: skip
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    return left.figure


def mse_against_tau(weights=None, ax=None, group_size=None):
    """Section 5.1: the mean squared error between W and H(W; tau), in units of gamma^2, over tau. weights: tensors, as
    `optimal_tau_init` takes them; None: Gaussian ones."""
    (ax,) = panels(ax, 1, (6.4, 3.8))
    what = "Gaussian weights" if weights is None else "these weights"
    weights = gaussian_weights() if weights is None else weights
    weights = list(weights.values()) if isinstance(weights, dict) else weights
    weights = [weights] if isinstance(weights, torch.Tensor) else list(weights)
    weights = [w.detach() for w in weights]
    unit = sum(float(hestia.absmean_scale(w, group_size).square().mean()) * w.numel() for w in weights)
    error = lambda tau: sum(float((hestia.soft_quantize(w, tau, group_size) - w).square().sum()) for w in weights) / unit
    taus, best = np.geomspace(0.05, 2, 41), hestia.optimal_tau_init(weights, group_size)
    ax.semilogx(taus, [error(tau) for tau in taus], color=BLUE, linewidth=2)
    ax.plot(best, error(best), "o", color=BLUE, markersize=9, label=f"least: {error(best):.4f} at τ = {best:.4f}")
    ax.plot(0.3, error(0.3), "s", color=RED, markersize=8, fillstyle="none", markeredgewidth=2,
            label=f"Table 5: {error(0.3):.4f} at τ = 0.3")  # fmt: skip
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    return finish(ax, f"For {what} H is closest to W at τ = {best:.3f}; Table 5's 0.3 has {percent(error(0.3) / error(best) - 1)}"
                  " more error", "temperature τ", "mean (W − H)² / γ²", "upper center")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# section 3.3: schedules and sensitivities


def schedules(config, scores, ax=None, tau_init=0.35):
    """Pressure and temperature of the least, the middle and the most sensitive tensor (the paper's Fig. 2).

    config: steps, rho and alpha; scores: {tensor: s_i}.
    """
    (ax,) = panels(ax, 1, (6.6, 4.2))
    T, rho, alpha = config["steps"], config["rho"], config["alpha"]
    t = np.linspace(0, T, 400)
    ordered = sorted(scores.items(), key=lambda item: item[1])
    watched = dict([ordered[0], ordered[len(ordered) // 2], ordered[-1]])
    for (name, s), color, dash in zip(watched.items(), (SKY, BLUE, RED), ((0, (4, 2)), "-", (0, (8, 2, 2, 2)))):
        tau = [hestia.temperature(x, T, rho, tau_init, s, alpha) for x in t]
        ax.plot(t, tau, color=color, linestyle=dash, linewidth=1.8, label=f"{short(name)}: s = {s:.2f}")
    base = [hestia.base_temperature(x, T, rho, tau_init) for x in t]
    ax.plot(t, base, color=GREEN, linestyle=(0, (1, 1)), label="every tensor, if α = 0")
    warmest = hestia.temperature(0, T, rho, tau_init, max(scores.values()), alpha)
    right = ax.twinx()
    right.plot(t, [hestia.pressure(x, T, rho) for x in t], color=GREY, linestyle=":", linewidth=2)
    right.set(ylabel="pressure p, share of H (dotted)", ylim=(-0.02, 1.2))
    right.spines["top"].set_visible(False)
    ax.axvline(rho * T, color=GREY, linewidth=0.8)
    for x, phase in ((rho * T / 2, "compress"), ((1 + rho) * T / 2, "anneal")):
        ax.text(x, 0.965, phase, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=9, style="italic")
    coldest = hestia.temperature(0, T, rho, tau_init, min(scores.values()), alpha)
    title = (f"The most sensitive tensor is {percent(warmest / coldest - 1)} warmer than the least"
             if warmest > coldest else "All tensors cool alike" if warmest == coldest else
             f"The most sensitive tensor is {percent(1 - warmest / coldest)} colder than the least")  # fmt: skip
    finish(ax, title, "step of quantization-aware training", "temperature τ, units of γ")
    ax.spines["right"].set_visible(True)
    ax.set_ylim(-0.02 * max(warmest, coldest) / 1.2, 1.2 * max(warmest, coldest, tau_init))
    ax.legend(fontsize=8.5, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
    return ax


def alpha_rho_kappa(axes=None):
    """What alpha, rho and kappa each do: to a sensitive tensor's temperature, to all of them, to the scores."""
    left, middle, right = panels(axes, 3, (11, 3.8))
    t, tau_init = np.linspace(0, 1, 301), 0.35
    s = hestia.sensitivity_scores({str(x): 10.0**x for x in range(-2, 3)})["2"]  # the highest of five decades
    start = {}
    for k, alpha in enumerate((0.6, 0.4, 0.2, 0.0, -0.4)):
        tau = [hestia.temperature(x, 1, 0.2, tau_init, s, alpha) for x in t]
        left.plot(t, tau, color=LOOKS[k]["color"], linestyle=LOOKS[k]["linestyle"], label=f"α = {alpha:g}")
        start[alpha] = tau[0] / tau_init
    half = {}
    for k, rho in enumerate((0.0, 0.1, 0.2, 0.3, 0.5)):
        tau = [hestia.base_temperature(x, 1, rho, tau_init) for x in t]
        middle.plot(t, tau, color=LOOKS[k]["color"], linestyle=LOOKS[k]["linestyle"], label=f"ρ = {rho:g}")
        half[rho] = t[np.array(tau) < tau_init / 2][0]
    decades = np.linspace(-2, 2, 81)
    for k, kappa in enumerate((0.25, 0.5, 1.0, 2.0, 4.0)):
        scores = list(hestia.sensitivity_scores({str(x): 10.0**x for x in decades}, kappa).values())
        right.plot(decades / decades.std(), scores, label=f"κ = {kappa:g}", color=LOOKS[k]["color"],
                   linestyle=LOOKS[k]["linestyle"])  # fmt: skip
        span = (scores[0], scores[-1]) if kappa == 1 else span if k > 2 else None
    finish(left, f"α: a tensor with s = {s:.2f} starts {percent(start[0.6] - 1)} warmer at 0.6, "
           f"{percent(1 - start[-0.4])} colder at −0.4", "t / T", "temperature τ, units of γ", "upper right")  # fmt: skip
    finish(middle, f"ρ: τ is halved at {half[0.0]:.2f} T for ρ = 0, at {half[0.5]:.2f} T for 0.5", "t / T",
           "base temperature τ, units of γ", "lower left")  # fmt: skip
    finish(right, f"κ = 1 spreads these scores from {span[0]:.2f} to {span[1]:.2f}; a larger κ sorts into cold and warm",
           "(log h − μ) / σ of the trace h", "sensitivity score s", "upper left")  # fmt: skip
    return left.figure


def spearman(a, b):
    """Rank correlation.

    >>> round(spearman([1, 2, 3], [10, 30, 20]), 9)
    0.5
    """
    rank = lambda x: np.argsort(np.argsort(np.asarray(x)))
    return float(np.corrcoef(rank(a), rank(b))[0, 1])


def hutchpp_error(curvature, ax=None):
    """Error of the traces against Hessian-vector products, for each estimator. curvature: notebooks/results/curvature.json."""
    (ax,) = panels(ax, 1, (6.8, 4.2))
    curves = {name: {int(n): point["rms"] for n, point in curve.items()} for name, curve in curvature["curves"].items()}
    for k, (name, curve) in enumerate(curves.items()):
        n = sorted(curve)
        median, low, high = ([curve[x][key] for x in n] for key in ("median", "q25", "q75"))
        ax.loglog(n, median, label=name, markersize=5, **LOOKS[k])
        ax.fill_between(n, low, high, color=LOOKS[k]["color"], alpha=0.2, linewidth=0)
        seeds = curve[n[0]]["n"]
    by = lambda start: next(curve for name, curve in curves.items() if name.startswith(start))
    plain, plus = by("Hutchinson"), by("Hutch++")
    budget = 40 * curvature["model"]["tensors"]  # the paper's 2 * 10 + 20 products for each tensor
    budget = budget if budget in plain and budget in plus else max(plain.keys() & plus.keys())
    ratio = plain[budget]["median"] / plus[budget]["median"]
    ax.axvline(budget, color=GREY, linewidth=0.8, linestyle=":")
    word = f"errs {ratio:.1f} times less than" if ratio > 1 else f"errs {1 / ratio:.1f} times more than"
    return finish(ax, f"At {budget:,} products (dotted) Hutch++ {word} Hutchinson", "Hessian-vector products, all tensors together",
                  f"relative error, rms over tensors\n(median and quartiles of {seeds} seeds)", "lower left")  # fmt: skip


def with_traces(tensors, key):
    if not tensors or any(key not in t for t in tensors.values()):
        raise ValueError(f"these sensitivities have no {key}; python train_tiny.py --sensitivity hutchpp makes them")
    return tensors


def trace_heatmap(tensors, ax=None):
    """log10 of each tensor's Hessian trace, layer by projection; a trace lost in its error is hatched and marked "?".

    tensors: {name: {value, stderr, flagged, score}}, as in a results.json under "sensitivities".
    """
    tensors = with_traces(tensors, "value")
    place = {name: tuple((re.search(r"(\d+)\.(?:.*\.)?([^.]+)$", name) or [0, "0", name])[k] for k in (1, 2))
             for name in tensors}  # fmt: skip
    rows = sorted({int(layer) for layer, _ in place.values()})
    columns = list(dict.fromkeys(kind for _, kind in place.values()))
    (ax,) = panels(ax, 1, (1.6 + 0.85 * len(columns), 1.7 + 0.42 * len(rows)))
    grid = np.full((len(rows), len(columns)), np.nan)
    spots = {name: (rows.index(int(layer)), columns.index(kind)) for name, (layer, kind) in place.items()}
    for name, spot in spots.items():
        grid[spot] = np.log10(tensors[name]["value"]) if tensors[name]["value"] > 0 else np.nan
    image = ax.imshow(grid, cmap="cividis", aspect="auto")
    middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
    for name, (i, j) in spots.items():
        lost = tensors[name].get("flagged", False)
        text = "≤ 0" if np.isnan(grid[i, j]) else f"{grid[i, j]:.1f}"
        ax.text(j, i, text + (" ?" if lost else ""), ha="center", va="center", fontsize=9,
                color="white" if grid[i, j] < middle else "black")  # fmt: skip
        if lost:
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor=GREY, linewidth=0))
    ax.set_xticks(range(len(columns)), [c.removesuffix("_proj") for c in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(image, ax=ax, label="log10 of the trace")
    positive = {name: t["value"] for name, t in tensors.items() if t["value"] > 0}
    low, high = min(positive, key=positive.get), max(positive, key=positive.get)
    lost = sum(t.get("flagged", False) for t in tensors.values())
    finish(ax, f"Traces span {np.log10(positive[high] / positive[low]):.1f} decades, from {short(low)} to {short(high)}"
           + (f"; {lost} of {len(tensors)} are lost in their error (?)" if lost else ""), "projection", "layer")  # fmt: skip
    ax.grid(False)
    return ax


def score_errors(tensors, kappa=1.0, ax=None):
    """Each score with its standard error: half of what Eq. (13) makes of its trace plus and minus one standard error."""
    tensors = with_traces(tensors, "stderr")
    (ax,) = panels(ax, 1, (6.6, 1.5 + 0.17 * len(tensors)))
    traces = {name: hestia.TraceEstimate(t["value"], t["stderr"], t["flagged"], 0) for name, t in tensors.items()}
    scores, errors = hestia.sensitivity_scores(traces, kappa), {}
    for name, h in traces.items():
        moved = (hestia.sensitivity_scores({**traces, name: h._replace(value=h.value + side * h.stderr)}, kappa)[name]
                 for side in (1, -1))  # fmt: skip
        errors[name] = abs(next(moved) - next(moved)) / 2
    names = sorted(scores, key=scores.get)
    for flagged, marker, color in ((False, "o", BLUE), (True, "x", RED)):
        rows = [k for k, name in enumerate(names) if traces[name].flagged == flagged]
        if rows:
            ax.errorbar([scores[names[k]] for k in rows], rows, xerr=[errors[names[k]] for k in rows], fmt=marker,
                        color=color, capsize=3, markersize=4, label="trace lost in its error" if flagged else None)  # fmt: skip
    overlap = sum(scores[b] - scores[a] < np.hypot(errors[a], errors[b]) for a, b in zip(names, names[1:]))
    ax.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    ax.set_xlim(0, 1)
    return finish(ax, f"The largest error of a score is {max(errors.values()):.3f}, where scores span "
                  f"{scores[names[0]]:.2f} to {scores[names[-1]]:.2f}; {overlap} of {len(names) - 1} neighbours could swap",
                  f"sensitivity score s (κ = {kappa:g}), ± one standard error", None,
                  "lower right" if any(h.flagged for h in traces.values()) else None)  # fmt: skip


def sensitivity_against(curvature, axes=None):
    """Exact Hessian traces against what else might rank the tensors. curvature: notebooks/results/curvature.json."""
    axes = panels(axes, 2, (9, 3.9))
    others = {"error": "relative error of rounding to ternary", "gradnorm": "gradient norm"}
    kinds = dict.fromkeys(re.sub(r".*\.", "", name) for name in curvature["names"])
    for ax, (key, label) in zip(axes, others.items()):
        x, y = np.array(curvature["other"][key]), np.array(curvature["exact"])
        for k, kind in enumerate(kinds):
            these = [name.endswith(kind) for name in curvature["names"]]
            ax.plot(x[these], y[these], linestyle="none", marker=LOOKS[k]["marker"], color=LOOKS[k]["color"],
                    label=kind.removesuffix("_proj"), fillstyle="full" if k % 2 else "none")  # fmt: skip
        ax.set(yscale="log", xscale="log" if key == "gradnorm" else "linear")
        r = spearman(x, y)
        says = "ranks the tensors much as the trace does" if r > 0.9 else "says little about the trace" if r < 0.5 else (
            "ranks the tensors roughly as the trace does")  # fmt: skip
        finish(ax, f"The {label} {says}: Spearman {r:.2f}", label, "exact Hessian trace")
    axes[1].legend(fontsize=8.5, frameon=False, ncols=2)
    return axes[0].figure


# ----------------------------------------------------------------------------------------------------------------------
# along a run


def loss_curves(runs, ax=None, key="loss"):
    """Training loss as each method's forward pass sees it, above that of full precision on the same batches.

    Every method sees the same batches, so the difference is free of their noise. Without a full-precision run: the loss
    itself. Lines are means over seeds, bands reach from the smallest to the largest.
    """
    (ax,) = panels(ax, 1, (6.6, 4))
    known = lambda name: " at " not in name and name.partition(":")[0] in hestia.QUANTIZERS  # not a choice of rate
    methods = list(dict.fromkeys(name for name, _ in runs if known(name)))
    paired = "full" in methods
    tops, late = [], {}
    for k, method in enumerate(methods):
        if paired and method == "full":
            continue
        step, values = by_seed(runs, method, key)
        values = values - by_seed(runs, "full", key)[1] if paired else values
        band(ax, step, values, **line_style(method, k))
        tops.append(np.quantile(values.mean(0), 0.9))
        late[quantizer(method).label] = values[:, step >= 0.75 * step[-1]].mean()
    if paired:
        ax.axhline(0, color=BLACK, linewidth=1)
        if tops:
            ax.set_ylim(-0.15 * max(tops), 1.5 * max(tops))  # the first steps of a hard quantizer tower above the rest
    title = "Nothing here was quantized"
    if late:
        best, worst = min(late, key=late.get), max(late, key=late.get)
        title = f"In the last quarter {best} costs {late[best]:.3f} nats" + (
            f", {worst} {late[worst]:.3f}" if len(late) > 1 else "")  # fmt: skip
    return finish(ax, title, "step of quantization-aware training",
                  "nats per byte above full precision" if paired else "nats per byte", "upper right" if late else None)  # fmt: skip


def felt_curves(run, ax=None):
    """The share of weights whose update the forward pass feels: at least 5 % of it arrives. Means and bands over seeds."""
    snapshots = read_snapshots(run)
    methods = present(snapshots, "full", "absmean", "hestia-no-hessian", "hestia")
    (ax,) = panels(ax, 1, (6.6, 4))
    quarter = {}
    for method in methods:
        step, felt = along(snapshots, method, "felt")
        band(ax, step, 100 * felt, **line_style(method))
        quarter[method] = felt[:, np.argmin(abs(step - 0.25 * step[-1]))].mean()
    said = [f"{percent(quarter[m])} under {quantizer(m).label}" for m in ("absmean", "hestia", "full") if m in methods]
    ax.set_ylim(-3, 112)
    return finish(ax, "A quarter of the way through, the forward pass feels the move of " + ", ".join(said[:2])
                  + (" of the weights"), "step of quantization-aware training", "weights whose update is felt, %",
                  "center right", bbox_to_anchor=(1, 0.62))  # fmt: skip


def near_boundary(hist, bins, width=0.1):
    """Share of a histogram of w / gamma within `width` of a boundary."""
    middle = (bins[1:] + bins[:-1]) / 2
    return float(hist[..., abs(abs(middle) - 0.5) < width].sum(-1).mean())


CODES = ((ORANGE, "//"), (GREY, ""), (BLUE, "\\\\"))  # the three bins of the codes -1, 0, +1


def draw_histogram(ax, hist, bins):
    """Bars of w / gamma, one look for each code's bin. Returns them."""
    middle, bars = (bins[1:] + bins[:-1]) / 2, []
    for code, (color, hatch) in zip((-1, 0, 1), CODES):
        these = np.clip(np.round(middle), -1, 1) == code
        bars += ax.bar(middle[these], 100 * hist[these], width=bins[1] - bins[0], color=color, alpha=0.75, hatch=hatch,
                       edgecolor="white", linewidth=0)  # fmt: skip
    boundaries(ax)
    return bars


def watched_tensor(run, tensor, *wanted):
    """(name, bins, {method: (steps, histograms (moments, bins), mean over seeds)}) of one of the watched tensors."""
    snapshots = read_snapshots(run)
    moments = {}
    for method in present(snapshots, *wanted):
        step, hist = along(snapshots, method, "hist")
        moments[method] = step, hist.mean(0)[:, tensor]
    return str(snapshots[f"{next(iter(moments))}/tensors"][tensor]), snapshots["bins"], moments


def histograms(run, tensor=-1, axes=None):
    """A watched tensor's weights, w / gamma, at the first and at the last moment of training by each method. tensor: which
    of the three that the run watched. A panel for each of AbsMean STE and HESTIA that the run has."""
    name, bins, moments = watched_tensor(run, tensor, "absmean", "hestia")
    axes = panels(axes, len(moments), (4.6 * len(moments), 3.9), sharey=True)
    for ax, (method, (_, hist)) in zip(axes, moments.items()):
        draw_histogram(ax, hist[-1], bins)
        ax.stairs(100 * hist[0], bins, color=BLACK, linewidth=1.2, label="before")
        before, after = near_boundary(hist[0], bins), near_boundary(hist[-1], bins)
        word = "empties" if after < before else "fills"
        finish(ax, f"{quantizer(method).label} {word} the boundaries: {percent(before)} of the weights within 0.1 γ of one "
               f"before, {percent(after)} after", f"latent weight w / γ of {short(name)}", None, "upper right")  # fmt: skip
    axes[0].set_ylabel(f"weights per bin of {bins[1] - bins[0]:.2g} γ, %")
    return axes[0].figure


def gradient_norms(run, axes=None):
    """Norm of the gradient of all that is trained, with dL/dW_eff and with dL/dW for the quantized weights, against the
    base temperature at that step (the STE has none: the same steps). Were weights spread evenly about the boundaries,
    dL/dW would grow like tau^(-1/2): the share within tau of one is tau, and the slope there 1 / (2 tau)."""
    snapshots, results = read_snapshots(run), read_results(run)
    c, tau_init = results["config"], guidance(results)[2]
    methods = present(snapshots, "absmean", "hestia-no-hessian", "hestia")
    axes = panels(axes, 2, (9.5, 4), sharey=True)
    for ax, key in zip(axes, ("grad_norm", "grad_norm_latent")):
        for method in methods:
            step, norm = along(snapshots, method, key)
            tau = np.array([hestia.base_temperature(t, c["steps"], c["rho"], tau_init) for t in step])
            cooling = step > c["rho"] * c["steps"]
            band(ax, tau[cooling], norm[:, cooling], **line_style(method))
            if method == "hestia" or method == methods[-1]:
                slope, _ = np.polyfit(np.log(tau[cooling]), np.log(norm[:, cooling].mean(0)), 1)
                start = norm[:, cooling].mean(0)[0]
                last = method
        x = np.geomspace(tau[cooling].min(), tau[cooling].max(), 50)
        if ax is axes[1]:
            ax.plot(x, start * (x / x[-1]) ** -0.5, color=GREY, linestyle=":", label="τ^(−1/2), for comparison")
        ax.set(xscale="log", yscale="log")
        ax.invert_xaxis()
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        what = ("dL/dW_eff", "dL/dW (latents)")[ax is axes[1]]
        finish(ax, f"{what}: with {quantizer(last).label} the norm goes like τ^({slope:+.2f})".replace("-", "−"),
               "base temperature τ at the step (training goes right)", "gradient norm" if ax is axes[0] else None,
               "upper left")  # fmt: skip
    return axes[0].figure


def guidance(results):
    """(configuration, {tensor: score} of the first seed, tau_init) of a run with a soft method."""
    soft = next((m for m in ("hestia", *results["table"]) if m in results["table"] and is_soft(m)), None)
    if not soft:
        raise ValueError("none of these methods has a temperature; python train_tiny.py --methods absmean hestia does")
    found = (results.get("sensitivities") or [None])[0] or {"tensors": {}}
    scores = {name: t["score"] for name, t in found["tensors"].items()} or {"every tensor": 0.0}
    return results["config"], scores, results["table"][soft]["tau_init"][0]


def is_soft(method):
    return method.partition(":")[0] in hestia.QUANTIZERS and quantizer(method).soft


def animation(run, path, tensor=-1, seconds=6):
    """A GIF: a watched tensor's weights move while the function that the forward pass applies to them hardens, STE beside
    HESTIA. 880 pixels wide; written whole or not at all. Returns the path."""
    from PIL import Image  # comes with matplotlib

    name, bins, moments = watched_tensor(run, tensor, "absmean", "hestia")
    snapshots = read_snapshots(run)
    config, scores, tau_init = guidance(read_results(run))
    T, rho, score = config["steps"], config["rho"], scores.get(name, 0.0)
    frames = 10 * seconds
    fig = plt.figure(figsize=(8.8, 4.6), dpi=100)
    grid = fig.add_gridspec(2, len(moments), height_ratios=(4, 1), hspace=0.5, wspace=0.12, left=0.07, right=0.93,
                            top=0.86, bottom=0.1)  # fmt: skip
    z, top = z_line(2.5, 501), 100 * max(hist.max() for _, hist in moments.values()) * 1.35
    parts = []
    for k, (method, (steps, hist)) in enumerate(moments.items()):
        ax = fig.add_subplot(grid[0, k])
        bars = draw_histogram(ax, hist[0], bins)
        ax.stairs(100 * hist[0], bins, color=BLACK, linewidth=0.8, alpha=0.5)
        ax.set(xlim=(-2.5, 2.5), ylim=(0, top), yticks=[])
        ax.set_xlabel(f"latent weight w / γ of {short(name)}", labelpad=1)
        ax.spines[["top", "right", "left"]].set_visible(False)
        right = ax.twinx()
        right.set(ylim=(-1.35, 1.35), yticks=(-1, 0, 1))
        right.spines[["top", "left"]].set_visible(False)
        right.tick_params(labelsize=9)
        if k == len(moments) - 1:
            right.set_ylabel("what the forward pass sees / γ")
        (curve,) = right.plot(z, z, color=BLACK, linewidth=2.2)
        _, felt = along(snapshots, method, "felt")
        parts.append((ax, bars, curve, method, steps, hist, felt.mean(0)))
    strip, t = fig.add_subplot(grid[1, :]), np.linspace(0, T, 200)
    warm = [hestia.temperature(x, T, rho, tau_init, score, config["alpha"]) for x in t]
    strip.plot(t / T, np.array(warm) / warm[0], color=RED, label=f"temperature τ, from {warm[0]:.2f}")
    strip.plot(t / T, [hestia.pressure(x, T, rho) for x in t], color=GREY, linestyle="--", label="pressure p")
    strip.set(xlim=(0, 1), ylim=(0, 1.1), yticks=(0, 1))
    strip.set_xlabel("share of training done", labelpad=1)
    strip.spines[["top", "right"]].set_visible(False)
    strip.legend(fontsize=8.5, frameon=False, loc="center right")
    now = strip.axvline(0, color=BLACK, linewidth=1.5)
    pictures = []
    for frame in range(frames):
        step = frame / (frames - 1) * (T - 1)
        tau, p = hestia.temperature(step, T, rho, tau_init, score, config["alpha"]), hestia.pressure(step, T, rho)
        now.set_xdata([step / T, step / T])
        for ax, bars, curve, method, steps, hist, felt in parts:
            between = [np.interp(step, steps, column) for column in hist.T]
            for bar, height in zip(bars, between):
                bar.set_height(100 * height)
            soft = is_soft(method)
            curve.set_ydata(hestia.effective_weight(z, tau, p, scale=UNIT) if soft else hestia.quantize(z, scale=UNIT))
            state = f"τ = {tau:.2f}, p = {p:.2f}" if soft else "rounding from the first step"
            ax.set_title(f"{quantizer(method).label}: {state}\n{percent(np.interp(step, steps, felt))} of the weights' "
                         "updates are felt", fontsize=11, loc="left")  # fmt: skip
        fig.canvas.draw()
        rgb = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
        pictures.append(rgb.quantize(64, dither=Image.Dither.NONE))
    plt.close(fig)
    with whole(path) as aside:
        pictures[0].save(aside, format="GIF", save_all=True, append_images=pictures[1:], loop=0, optimize=True,
                         duration=[1000, *[100] * (frames - 2), 2000])  # fmt: skip
    return Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# results: a table's rows against each other


def gap_recovered(results, split="train", ax=None):
    """How much of the way from AbsMean STE back to full precision each method recovers, best first, with the standard
    deviation over seeds. Where that gap makes no sense: the difference from AbsMean STE, with 95 % intervals."""
    table, rows = results["table"], results["per_seed"]
    methods = [m for m in table if m not in ("before", "untrained", "full", "absmean")]
    if "absmean" not in table or not methods:
        raise ValueError("these results have no absmean to compare with; python train_tiny.py --methods full absmean hestia"
                         " makes some")  # fmt: skip
    gap = all(f"gap_{split}" in table[m] for m in methods)
    (ax,) = panels(ax, 1, (7.6, 1.6 + 0.36 * len(methods)))
    if gap:
        found = {m: (100 * table[m][f"gap_{split}"][0], 100 * (table[m][f"gap_{split}"][1] or 0),
                     [100 * row[m][f"gap_{split}"] for row in rows]) for m in methods}  # fmt: skip
    else:
        found = differences(results, methods, "absmean", split)
    order = sorted(methods, key=lambda m: found[m][0], reverse=gap)
    text = (lambda m, h: f"{m:.0f}" + (f" ± {h:.0f} %" if h else " %")) if gap else signed
    forest(ax, [(quantizer(m).label, *found[m], style(m, 0 if m in STYLE else k + 2)) for k, m in enumerate(order)], text)
    best, (mean, half, seeds) = order[0], found[order[0]]
    seeds = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    if gap:
        ax.axvline(100, color=BLACK, linewidth=1)
        title = f"{quantizer(best).label} recovers most of the gap: {text(mean, half)} ({seeds})" if mean > 0 else (
            "No method recovers any of the gap")  # fmt: skip
        label = f"gap recovered on {SPLITS[split]} text, %: 0 is AbsMean STE, 100 is full precision"
    else:
        title = f"{quantizer(best).label} is lowest: {text(mean, half)} ({seeds})" if mean < 0 else (
            "No method is below AbsMean STE")  # fmt: skip
        label = f"{SPLITS[split]} loss minus AbsMean STE's, nats"
    return finish(ax, title, label)


def signed(mean, half):
    return f"{mean:+.4f}".replace("-", "−") + (f" ± {half:.4f}" if half else "")


SETTINGS = {"alpha": "α", "rho": "ρ", "group_size": "group size", "samples": "Hutch++ samples", "lr": "peak learning rate",
            "bits": "codes"}  # fmt: skip


def loss_against(results, setting, split="train", ax=None):
    """The loss with another alpha, rho, group_size, samples or bits minus plain HESTIA's, seed by seed with 95 %
    intervals; for "lr" the losses of the choice of learning rates."""
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}; expected one of {', '.join(SETTINGS)}")
    if setting == "lr":
        return loss_against_lr(results, ax)
    table, config = results["table"], results["config"]
    usual, name, values = config.get(setting), SETTINGS[setting], {}
    value_of = lambda m: float(m.partition("=")[2])
    said = lambda v: "one per tensor" if setting == "group_size" and v == 0 else f"{v:g}"
    if setting == "bits":
        values = {m: quantizer(m).label for m in ("hestia-binary", "hestia", "hestia-2bit", "int2") if m in table}
    else:
        for base in ("absmean", "hestia"):
            known = {m: value_of(m) for m in table if m.startswith(f"{base}:{setting}=") and "," not in m}
            known |= {base: float(usual)} if known and base in table else {}
            if setting == "alpha" and known and 0.0 not in known.values() and "hestia-no-hessian" in table:
                known["hestia-no-hessian"] = 0.0
            prefix = "AbsMean STE, " if base == "absmean" else ""
            values |= {m: f"{prefix}{name} {said(known[m])}" for m in sorted(known, key=known.get)}
    if "hestia" not in values or len(values) < 2:
        ablate = {"group_size": "group"}.get(setting, setting)
        raise ValueError(f"these results vary no {setting}; python train_tiny.py --ablate {ablate} --seeds 3 makes some")
    found = differences(results, values, "hestia", split)
    (ax,) = panels(ax, 1, (7.2, 1.6 + 0.36 * len(values)))
    look = lambda m: STYLE["hestia"] if m == "hestia" else STYLE["absmean"] if m.startswith("absmean") else (
        LOOKS[2])  # fmt: skip
    label = {"hestia": values["hestia"] + (" (plain)" if setting != "bits" else "")}
    forest(ax, [({**values, **label}[m], *found[m], look(m)) for m in values], signed)
    others = [m for m in values if m != "hestia"]
    best = min(others, key=lambda m: found[m][0])
    several = len(results["per_seed"]) > 1
    better = found[best][0] < 0
    title = f"{'Lowest' if better else 'None is below plain HESTIA; closest'}: {values[best]}, {signed(*found[best][:2])}"
    if several:
        differ = sum(clear(*found[m]) for m in others)
        title += f"; {differ} of {len(others)} differ clearly from plain HESTIA"
    return finish(ax, title + ("" if several else " (one seed)"), f"{SPLITS[split]} loss minus plain HESTIA's, nats")


def loss_against_lr(results, ax=None):
    tuning = results.get("tuning")
    if not tuning:
        raise ValueError("these results chose no learning rates; python train_tiny.py --lrs 5e-4 1e-3 2e-3 does")
    (ax,) = panels(ax, 1, (8.6, 4.4))
    losses = {m: {float(lr): x for lr, x in rates.items() if np.isfinite(x)} for m, rates in tuning.items()}
    losses = {m: dict(sorted(rates.items())) for m, rates in losses.items() if rates}
    for k, (method, rates) in enumerate(losses.items()):
        ax.plot(rates.keys(), rates.values(), linewidth=2.4 if method in STYLE else 1, markersize=5,
                **style(method, k))  # fmt: skip
    ends = np.array([min(rates.values()) for rates in losses.values()])
    ax.set_ylim(None, min(ax.get_ylim()[1], ends.min() + 4 * (np.median(ends) - ends.min() + 0.02)))
    rates = sorted({lr for r in losses.values() for lr in r})
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    ax.xaxis.set_minor_formatter(NullFormatter())
    best = {m: min(r, key=r.get) for m, r in losses.items()}
    edge = [m for m in best if best[m] in (rates[0], rates[-1])]
    said = ", ".join(f"{quantizer(m).label} {best[m]:g}" for m in ("absmean", "hestia") if m in best)
    return finish(ax, f"Best rates: {said or 'see the curves'}; {len(edge)} of {len(best)} methods are best at the edge of what was tried",
                  SETTINGS["lr"], "loss of the hard weights, nats (tuning seed)", "center left", bbox_to_anchor=(1, 0.5))  # fmt: skip


def controls(results, split="train", ax=None):
    """Does the ranking of the tensors by their Hessian matter? HESTIA, alpha = 0, and HESTIA with its scores shuffled or made
    equal, minus AbsMean STE, seed by seed with 95 % intervals. The title compares with HESTIA itself."""
    table = results["table"]
    names = {"hestia-no-hessian": "α = 0", "hestia:scores=shuffled": "scores shuffled", "hestia:scores=common": "one common score",
             "hestia": "HESTIA"}  # fmt: skip
    rows = [m for m in names if m in table]
    others = [m for m in rows if m != "hestia"]
    if "hestia" not in rows or not any(":" in m for m in others):
        raise ValueError("these results have no hestia with shuffled or common scores; python train_tiny.py --ablate hessian "
                         "--seeds 3 makes them")  # fmt: skip
    against = "absmean" if "absmean" in table else "hestia"
    (ax,) = panels(ax, 1, (7.6, 1.8 + 0.42 * len(rows)))
    looks = {m: STYLE.get(m, LOOKS[2 + k]) for k, m in enumerate(rows)}
    found = differences(results, rows, against, split)
    forest(ax, [(names[m], *found[m], looks[m]) for m in rows], signed)
    apart = differences(results, others, "hestia", split)
    worse, better = ([names[m] for m in others if clear(*apart[m]) and side * apart[m][0] > 0] for side in (1, -1))
    parts = [f"{', '.join(found)}: clearly {word} than HESTIA" for found, word in ((worse, "worse"), (better, "better")) if found]
    title = "; ".join(parts) or "No control differs clearly from HESTIA: the Hessian's ranking shows nothing"
    if len(results["per_seed"]) < 2:
        title = "One seed: no interval, so nothing can be said about the Hessian's ranking"
    return finish(ax, title, f"{SPLITS[split]} loss minus {quantizer(against).label}'s, nats")


def overview(folder):
    """One figure of a finished run: loss curves, schedules, and the table's losses. Returns a matplotlib Figure."""
    results, runs = read_results(folder), read_log(folder)
    config, table = results["config"], results["table"]
    methods = [m for m in config["methods"] if m in table]
    fig = plt.figure(figsize=(10, 5.2 + 0.35 * len(methods)), layout="constrained")
    grid = fig.add_gridspec(2, 2, height_ratios=(3.6, 0.9 + 0.35 * len(methods)))
    left, right, below = fig.add_subplot(grid[0, 0]), fig.add_subplot(grid[0, 1]), fig.add_subplot(grid[1, :])
    loss_curves(runs, left)
    try:
        schedules(*guidance({**results, "table": {m: table[m] for m in methods}})[:2], right,
                  guidance(results)[2])  # fmt: skip
    except ValueError:
        right.set_axis_off()
        right.set_title("None of these methods has a temperature", fontsize=10.5, loc="left")
    for k, method in enumerate(methods):
        for offset, split, fill, label in ((-0.13, "train", "full", "training text"), (0.13, "val", "none", "validation text")):
            mean, spread = table[method][split]
            below.errorbar(mean, k + offset, xerr=spread, marker="os"[split == "val"], color=style(method, k)["color"],
                           capsize=3, fillstyle=fill, linestyle="none", label=label if k == 0 else None)  # fmt: skip
    below.set_yticks(range(len(methods)), [quantizer(m).label for m in methods])
    below.invert_yaxis()
    quantized = [m for m in methods if m != "full"]
    best = min(quantized, key=lambda m: table[m]["val"][0]) if quantized else None
    finish(below, f"Lowest on validation text among the quantized: {quantizer(best).label}" if best else "Full precision",
           "nats per byte, hard weights", None, "best")  # fmt: skip
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# command line


@contextmanager
def whole(path):
    """Write beside `path`, then rename: the name never holds half a picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class Inputs:
    """What the command line has: a run's folder, and the studies in notebooks/results."""

    def __init__(self, run=None):
        self.given = run

    @property
    def run(self):
        if self.given:
            return Path(self.given)
        finished = sorted(Path("out").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
        if not finished:
            raise ValueError("there is no finished run under out/; make one with python train_tiny.py")
        return finished[-1].parent

    @property
    def results(self):
        return read_results(self.run)

    @property
    def tensors(self):
        return (self.results.get("sensitivities") or [{}])[0].get("tensors")

    def study(self, name):
        return read_json(RESULTS / name, STUDIES[name])

    def ablation(self, draw):
        """From the run if it varies what the figure asks for, else from the study."""
        try:
            return draw(self.results)
        except ValueError:
            if not (RESULTS / "ablations.json").exists():
                raise
        return draw(self.study("ablations.json"))


STUDIES = {
    "curvature.json": "python notebooks/curvature.py",
    "table1.json": "python train_tiny.py --methods all --lrs 5e-4 1e-3 2e-3 --seeds 5, whose results.json it is",
    "ablations.json": "python train_tiny.py --ablate alpha --seeds 3, and so on",
}
RUN, NONE, ABLATIONS = "a run", "nothing", "a run with --ablate {}, or notebooks/results/ablations.json"
FIGURES = {  # name: (figure from what the command line has, one line, what it needs)
    "staircase": (lambda have: staircase(), "Q and H over the latent weight, and their slopes (Fig. 1)", NONE),
    "pi_curves": (lambda have: pi_curves(), "the shares of the three codes at three temperatures (Eq. 7)", NONE),
    "dead_zone_line": (lambda have: dead_zone_line(), "where an update changes Q, and what H makes of it (Eq. 6)", NONE),
    "jacobians": (lambda have: jacobians(), "the slope that each method takes for rounding's", NONE),
    "lemma_4_2": (lambda have: lemma_4_2(), "the Jacobian becomes two spikes of mass gamma", NONE),
    "mse_against_tau": (lambda have: mse_against_tau(), "which temperature keeps H closest to W (sec. 5.1)", NONE),
    "alpha_rho_kappa": (lambda have: alpha_rho_kappa(), "what the three settings do to the schedules", NONE),
    "schedules": (lambda have: schedules(*guidance(have.results)[:2], None, guidance(have.results)[2]),
                  "pressure and temperatures of a run (Fig. 2)", RUN),
    "hutchpp_error": (lambda have: hutchpp_error(have.study("curvature.json")), "error of the trace estimators against products",
                      "notebooks/results/curvature.json"),
    "sensitivity_against": (lambda have: sensitivity_against(have.study("curvature.json")),
                            "traces against rounding error and gradient norm", "notebooks/results/curvature.json"),
    "trace_heatmap": (lambda have: trace_heatmap(have.tensors), "Hessian traces, layer by projection", RUN),
    "score_errors": (lambda have: score_errors(have.tensors, have.results["config"]["kappa"]),
                     "sensitivity scores with their errors", RUN),
    "loss_curves": (lambda have: loss_curves(read_log(have.run)), "training loss above full precision", RUN),
    "felt_curves": (lambda have: felt_curves(have.run), "the share of updates that the forward pass feels", RUN),
    "histograms": (lambda have: histograms(have.run), "weights before and after, STE beside HESTIA", RUN),
    "gradient_norms": (lambda have: gradient_norms(have.run), "gradient norms against temperature", RUN),
    "animation": (lambda have: lambda path: animation(have.run, path), "the weights along a run, as a GIF", RUN),
    "overview": (lambda have: overview(have.run), "loss curves, schedules and final losses of a run", RUN),
    "gap_recovered": (lambda have: gap_recovered(have.results), "the gap to full precision that each method recovers", RUN),
    "table1": (lambda have: gap_recovered(have.study("table1.json")), "the same for the rows of the paper's tables",
               "notebooks/results/table1.json"),
    "controls": (lambda have: have.ablation(controls), "does the Hessian's ranking matter?", ABLATIONS.format("hessian")),
    "loss_against_lr": (lambda have: loss_against(have.study("table1.json"), "lr"), "loss against the learning rate",
                        "notebooks/results/table1.json"),
    **{f"loss_against_{s}": (lambda have, s=s: have.ablation(lambda results: loss_against(results, s)),
                             f"loss against {s}, minus plain HESTIA's", ABLATIONS.format(s.removesuffix("_size")))
       for s in ("alpha", "rho", "group_size", "samples", "bits")},
}  # fmt: skip
