"""Every figure, one function each: numbers, a run's folder or its results in, matplotlib Axes out. Nothing here trains.

    python plots.py                                      # the names of the figures, and what each needs
    python plots.py staircase                            # one of them, as out/staircase.png
    python plots.py all --run out/NAME --save pictures   # all that this run and notebooks/results have the numbers for

In a notebook: `plots.staircase()`, or `plots.felt_curves("out/NAME", ax)`. A function that is given no Axes makes its
own. Titles say what a figure shows, and are put together from the same numbers as the figure.
"""

import argparse
import json
import re
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullFormatter

import hestia

# ----------------------------------------------------------------------------------------------------------------------
# furniture: colours, panels, titles

# colour-blind safe (Okabe-Ito), and each with a dash and a marker of its own, so that greyscale still tells them apart
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
DOTS = (0, (1, 2))
STYLE = {
    "full": {"color": BLACK, "linestyle": "-", "marker": "D"},
    "absmean": {"color": RED, "linestyle": "--", "marker": "s"},
    "hestia-no-hessian": {"color": SKY, "linestyle": "-.", "marker": "^"},
    "hestia": {"color": BLUE, "linestyle": "-", "marker": "o"},
}
DASHES = ("-", "--", "-.", ":", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 3)), (0, (3, 1)))
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


def panels(axes, columns, size, rows=1, **options):
    """The axes that were given, as a flat list, or new ones. size: of the figure, in inches."""
    if axes is None:
        _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    flat = list(np.ravel(axes))
    if len(flat) != rows * columns:
        raise ValueError(f"{len(flat)} Axes were given; this figure has {rows * columns} panels")
    return flat


def curves(ax, x, ys, **options):
    """A line for each {label: y}."""
    for look, (label, y) in zip(LOOKS, ys.items()):
        ax.plot(x, y, label=label, **{**look, "marker": "", **options})


def band(ax, x, values, look):
    """The mean over seeds as a line, from the smallest to the largest as a band. values: (seeds, n)."""
    ax.plot(x, values.mean(0), linewidth=1.8, **{**look, "marker": ""})
    ax.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.15, linewidth=0)


def finish(ax, title, xlabel="", ylabel="", legend=None, inches=None, **legend_options):
    """A title on the left, broken where the panel ends (after `inches`); labels with units; the legend's place."""
    inches = inches or ax.get_position().width * ax.figure.get_figwidth()
    title = re.sub(r"(?<![\d.])-(?=\d)", "−", title)
    title = re.sub(r" (?=[%γT=±>])|(?<=[=±>]) ", "\N{NO-BREAK SPACE}", title)
    width = max(20, int(12.5 * inches))
    lines = textwrap.wrap(title, width)
    while width > 12 and len(narrower := textwrap.wrap(title, width - 1)) == len(lines):  # lines of like length
        width, lines = width - 1, narrower
    ax.set_title("\n".join(lines), fontsize=10.5, loc="left")
    ax.set(**{key: text for key, text in (("xlabel", xlabel), ("ylabel", ylabel)) if text})
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    if legend:
        ax.legend(loc=legend, fontsize=8.5, edgecolor="none", framealpha=0.85, labelspacing=0.3, **legend_options)
    return ax


def z_axis(ax):
    """Label an axis of w / gamma, and mark Eq. (5): where the code changes."""
    ax.set_xlabel("latent weight w / γ")
    for b in (-0.5, 0.5):
        ax.axvline(b, color=GREY, linewidth=0.8, linestyle=DOTS, zorder=0)


def percent(x):
    """A share in words, with one digit more where it is small.

    >>> percent(0.7634), percent(0.0031), percent(0.0), percent(2e-6)
    ('76 %', '0.3 %', '0 %', 'under 0.1 %')
    """
    if 0 < x < 0.0005:
        return "under 0.1 %"
    return f"{100 * x:.0f} %" if x == 0 or abs(x) >= 0.0995 else f"{100 * x:.1f} %"


def tidy(x, form):
    """A number with a proper minus, and no minus at a zero.

    >>> tidy(-0.04, ".1f"), tidy(-0.4, ".1f"), tidy(0.4, "+.1f")
    ('0.0', '−0.4', '+0.4')
    """
    text = format(x, form)
    return format(0.0, form) if float(text) == 0 else text.replace("-", "−")


def signed(mean, half):
    return tidy(mean, "+.4f") + (f" ± {half:.4f}" if half else "")


def short(name):
    """A tensor's name without what all names share: 'model.layers.0.self_attn.q_proj' -> '0.q_proj'."""
    return re.sub(r"^model\.layers\.|self_attn\.|mlp\.", "", name)


CODES = (("−1", ORANGE, "//"), ("0", GREY, ""), ("+1", BLUE, "\\\\"))
UNIT = torch.ones(1, 1, dtype=torch.float64)  # gamma = 1: a weight is its z = w / gamma


def z_line(reach=2.0, points=2001):
    return torch.linspace(-reach, reach, points, dtype=torch.float64)


def gaussian_weights(n=200_000, gamma=1.0):
    """(n,) quantiles of a normal distribution whose mean absolute value is gamma: a weight matrix without chance."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return gamma * (np.pi / 2) ** 0.5 * torch.special.ndtri(share)


# ----------------------------------------------------------------------------------------------------------------------
# reading what train_tiny.py and notebooks/curvature.py wrote

RESULTS = Path(__file__).resolve().parent / "notebooks" / "results"
STUDIES = {
    "curvature.json": "python notebooks/curvature.py",
    "table1.json": "python train_tiny.py --methods all --lrs 1e-3 3e-3 9e-3 --seeds 5, on README's model",
    "ablations.json": "python train_tiny.py --ablate all --lrs 1e-3 3e-3 9e-3 --seeds 5, on README's model",
}


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
    path = Path(path) if Path(path).suffix == ".json" else Path(path) / "results.json"
    results = read_json(path, "python train_tiny.py")
    if not isinstance(results, dict) or not {"config", "table", "per_seed"} <= results.keys():
        raise ValueError(f"{path} holds no results of a run; make some with python train_tiny.py")
    return results


def read_snapshots(folder):
    """{key: array} of a run's snapshots.npz; "hestia/seed0/felt", for example, is (moments,)."""
    try:
        with np.load(Path(folder) / "snapshots.npz") as saved:
            return dict(saved)
    except (OSError, ValueError, zipfile.BadZipFile):
        raise ValueError(f"{folder} has no readable snapshots.npz; make it with python train_tiny.py") from None


def read_log(folder):
    """{(method, seed): [records]} of a run's log.jsonl."""
    runs = {}
    try:
        for line in (Path(folder) / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            runs.setdefault((record["method"], record["seed"]), []).append(record)
    except (OSError, ValueError):
        raise ValueError(f"{folder} has no readable log.jsonl; make it with python train_tiny.py") from None
    return runs


def by_seed(runs, method, key):
    """Steps (n,), and a logged quantity of one method over them, (seeds, n)."""
    logs = [[r for r in log if key in r] for (name, _), log in sorted(runs.items()) if name == method]
    return np.array([r["step"] for r in logs[0]]), np.array([[r[key] for r in log] for log in logs])


def along(snapshots, methods, key):
    """{method: (steps (moments,), what was measured at them, (seeds, moments, ...))}, of those that were watched."""
    found = {m: sorted(k for k in snapshots if re.fullmatch(rf"{re.escape(m)}/seed\d+/{key}", k)) for m in methods}
    if not any(found.values()):
        raise ValueError(f"this run watched none of {', '.join(methods)}; python train_tiny.py does")
    return {m: (snapshots[keys[0].replace(f"/{key}", "/step")], np.array([snapshots[k] for k in keys]))
            for m, keys in found.items() if keys}  # fmt: skip


def is_soft(method):
    return method.partition(":")[0] in hestia.QUANTIZERS and quantizer(method).soft


def guidance(results):
    """What `schedules` takes, of a run with a soft method: its configuration, the first seed's scores, tau_init."""
    soft = next((m for m in ("hestia", *results["table"]) if m in results["table"] and is_soft(m)), None)
    if not soft:
        raise ValueError("none of these methods has a temperature; python train_tiny.py --methods absmean hestia does")
    scores = {name: t["score"] for name, t in first_sensitivities(results).items()} or {"every tensor": 0.0}
    return {"config": results["config"], "scores": scores, "tau_init": results["table"][soft]["tau_init"][0]}


def first_sensitivities(results):
    """{tensor: {value, stderr, flagged, score}} of the first seed; {} where no method needed any."""
    return ((results.get("sensitivities") or [None])[0] or {}).get("tensors", {})


def which_traces(results):
    return "Fisher traces" if results["config"].get("sensitivity") == "fisher" else "Hessian traces"


# ----------------------------------------------------------------------------------------------------------------------
# sections 3.1, 3.2 and 4: the quantizer, its relaxation, its slope


def staircase(taus=(1.0, 0.5, 0.2, 0.05), axes=None):
    """The paper's Fig. 1: Q and H(w; tau) over w / gamma, and below them their slopes. Two panels."""
    top, below = panels(axes, 1, (7.6, 5.8), rows=2, sharex=True)
    z, ste = z_line(), {"color": RED, "linestyle": "--", "linewidth": 2.2}
    hard = hestia.quantize(z, scale=UNIT)
    H = {f"H, τ = {tau:g}": hestia.soft_quantize(z, tau, scale=UNIT) for tau in taus}
    slopes = {f"H, τ = {tau:g}": hestia.soft_quantize_jacobian(z, tau, scale=UNIT) for tau in taus}
    for ax, hidden, lines in ((top, hard, H), (below, torch.ones_like(z), slopes)):
        ax.plot(z, hidden, label="STE: rounding; slope 1 pretended", **ste)
        for (label, y), color, dash in zip(lines.items(), (SKY, GREEN, BLUE, BLACK, PINK), (":", "-.", "--", "-", ":")):
            ax.plot(z, y, label=label, color=color, linestyle=dash)
        z_axis(ax)
    away = [float((h - hard).abs().mean()) for h in H.values()]
    peak = [(float(s.max()), abs(float(z[s.argmax()]))) for s in slopes.values()]
    far = [f"{mean:.2f} γ away on average at τ = {tau:g}" for mean, tau in zip(away, taus)]
    title = f"As τ falls, H nears rounding: {far[0]}, {far[-1]}"
    finish(top, title, ylabel="effective weight / γ", legend="upper left")
    said = [f"{most:.1f} at w = {'±' * (at > 0)}{at:g} γ" for most, at in ((m, round(a, 1)) for m, a in peak)]
    finish(below, f"H's largest slope: {said[0]} for τ = {taus[0]:g}, {said[-1]} for τ = {taus[-1]:g}", ylabel="slope")
    top.set_xlabel("")
    below.set_ylim(0, min(1.05 * max(peak)[0], 3.2))
    return top.figure


def pi_curves(taus=(1.0, 0.35, 0.1), axes=None):
    """Eq. (7): the shares pi_tau(q | w) of the three codes over w / gamma. A panel for each tau."""
    axes, z = panels(axes, len(taus), (3.2 * len(taus), 3.5), sharey=True), z_line(1.5)
    for ax, tau in zip(axes, taus):
        pi = hestia.assignment_probs(z, tau, scale=UNIT)
        for share, (code, color, _), dash in zip(pi.T, CODES, ("--", "-", "-.")):
            ax.plot(z, share, label=f"code {code}", color=color, linestyle=dash, linewidth=2)
        z_axis(ax)
        sure = float((pi.max(1).values > 0.95).double().mean())
        finish(ax, f"τ = {tau:g}: the largest π is over 0.95 on {percent(sure)} of this axis")
    axes[0].set_ylabel("share π of a code")
    axes[-1].legend(loc="center left", fontsize=8.5, edgecolor="none")
    return axes[0].figure


def dead_zone_line(dw=0.15, tau=0.35, ax=None):
    """Eq. (6): an update of dw, in units of gamma: where on the line of weights Q notices, and what H does."""
    (ax,) = panels(ax, 1, (8, 3.6))
    z, w, H = z_line(1.75), gaussian_weights(), lambda x: hestia.soft_quantize(x, tau, scale=UNIT)
    moved, dead = H(z + dw) - H(z), hestia.dead_zone(z, dw, scale=UNIT).numpy()
    low, high = min(0.0, dw, float(moved.min())), max(0.0, dw, float(moved.max()))
    ax.fill_between(z, 0, 1, where=~dead, transform=ax.get_xaxis_transform(), color=RED, alpha=0.3, hatch="//",
                    linewidth=0, label="here Q jumps by a whole γ")  # fmt: skip
    ax.plot(z, moved, color=BLUE, linewidth=2, label=f"change of H at τ = {tau:g}")
    ax.axhline(dw, color=BLACK, linestyle=":", label="the update itself")
    z_axis(ax)
    ax.set(xlim=(-1.75, 1.75), ylim=(low - 0.18 * (high - low), high + 0.35 * (high - low)))
    for middle, (code, _, _) in zip((-1.12, 0, 1.12), CODES):
        ax.text(middle, low - 0.09 * (high - low), f"code {code}", ha="center", va="center", fontsize=9)
    alive = 1 - float(hestia.dead_zone(w, dw, scale=UNIT).double().mean())
    felt = float(((H(w + dw) - H(w)).abs() >= 0.05 * abs(dw)).double().mean())
    title = f"An update of {dw:g} γ changes Q for {percent(alive)} of Gaussian weights; "
    title += f"H passes on 5 % of it or more for {percent(felt)}"
    return finish(ax, title, ylabel="change of the output / γ", legend="upper center", ncols=3)


def jacobians(methods=None, tau=0.35, ax=None):
    """dW_eff/dW of every method by autograd, on Gaussian weights with gamma = 0.02 (as in a Llama; only DLT's slope
    depends on it) and with learned scales where they start. Methods whose curves are the same share a line."""
    methods = methods or ("absmean", "hestia", "dge", "dsq", "daq", "lsq", "seq", "dlt", "twn", "tequila")
    (ax,) = panels(ax, 1, (8.6, 4.2))
    w = gaussian_weights(20_000, gamma=0.02)[None]  # (1, n): one row, one scale
    z = w / hestia.absmean_scale(w)
    shown, found = (z >= 0) & (z < 2.4), []  # found: [(slope, [labels])]
    for method in methods:
        row, latent = quantizer(method), w.clone().requires_grad_()
        s = hestia.Step(1.0, tau, None, row.settings.get("codebook", hestia.TERNARY))
        out = row.relax(latent, s, **(row.init(w.clone(), s) if row.init else {}))
        out = out[0] if isinstance(out, tuple) else out  # Tequila's bias aside
        slope = torch.autograd.grad(out.sum(), latent)[0][shown]
        names = next((names for known, names in found if torch.allclose(known, slope)), None)
        if names is None:
            found.append((slope, names := []))
        names.append(f"{row.label}, τ = {tau:g}" if row.soft else row.label)
    looks = iter(LOOKS[1:])
    for k, (slope, names) in enumerate(found):  # the first lines are thick: those above leave them visible
        look = STYLE["hestia"] if f"HESTIA, τ = {tau:g}" in names else next(looks)
        ax.plot(z[shown], slope, label=textwrap.fill(", ".join(names), 26), linewidth=max(1.2, 3.6 - 0.5 * k),
                **{**look, "marker": ""})  # fmt: skip
    slopes = torch.stack([slope for slope, _ in found])
    spread = slopes.max(0).values - slopes.min(0).values
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=DOTS)
    pretend = sum(len(names) for slope, names in found if (slope == 1).all())
    title = f"{pretend} of {len(methods)} methods take{'s' * (pretend == 1)} the slope for 1 on this axis; the "
    title += f"{len(found)} curves are furthest apart at |w| = {float(z[shown][spread.argmax()]):.2f} γ"
    return finish(ax, title, "|w| / γ (the slopes are even)", "dW_eff/dW", "center left", bbox_to_anchor=(1, 0.5))


def lemma_4_2(taus=(0.3, 0.1, 0.03, 0.01), axes=None):
    """Lemma 4.2: the Jacobian becomes two spikes, and its integral against a smooth phi becomes gamma
    (phi(-gamma/2) + phi(gamma/2)); gamma = 1 here. Two panels; the numbers are in the legends."""
    left, right = panels(axes, 2, (9.6, 4.2))
    z, half = z_line(8.0, 800_001), torch.tensor([-0.5, 0.5], dtype=torch.float64)
    slopes = [hestia.soft_quantize_jacobian(z, tau, scale=UNIT) for tau in taus]
    near = (z.abs() < 1.6).nonzero().flatten()[::50]
    curves(left, z[near], {f"τ = {tau:g}: area {float(torch.trapezoid(slope, z)):.4f}": slope[near]
                           for tau, slope in zip(taus, slopes)})  # fmt: skip
    z_axis(left)
    peak, worst = float(slopes[-1].max()), 0.0
    left.set(yscale="log", xlim=(-1.3, 1.3), ylim=(0.03, 40 * max(float(slope.max()) for slope in slopes)))
    finish(left, f"The slope becomes two spikes, {peak:.0f} high at τ = {taus[-1]:g}", "", "dH/dw (log scale)",
           "upper center", ncols=2)  # fmt: skip
    smooth = {"exp(−w²)": lambda z: torch.exp(-z * z), "1/(1+w²)": lambda z: 1 / (1 + z * z),
              "cos 2w": lambda z: torch.cos(2 * z)}  # fmt: skip
    for look, (name, phi) in zip(LOOKS, smooth.items()):
        limit, found = float(phi(half).sum()), [float(torch.trapezoid(slope * phi(z), z)) for slope in slopes]
        right.loglog(taus, [abs(x - limit) for x in found], **look,
                     label=f"φ = {name}: {found[0]:.4f} … {found[-1]:.4f}, limit {limit:.4f}")  # fmt: skip
        worst = max(worst, abs(found[-1] / limit - 1))
    title = f"At τ = {taus[-1]:g} the integrals are within {100 * worst:.2g} % of φ(−½) + φ(½)"
    finish(right, title, "temperature τ", "|∫ (dH/dw) φ dw − φ(−½) − φ(½)|", "upper left")
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    return left.figure


def mse_against_tau(weights=None, ax=None, group_size=None):
    """Section 5.1: the mean squared error between W and H(W; tau), in units of gamma^2, over tau. weights: tensors, as
    `optimal_tau_init` takes them; None: Gaussian ones."""
    (ax,) = panels(ax, 1, (6.4, 3.8))
    what = "Gaussian weights" if weights is None else "these weights"
    weights = gaussian_weights() if weights is None else weights
    weights = list(weights.values()) if isinstance(weights, dict) else weights
    weights = [w.detach() for w in ([weights] if isinstance(weights, torch.Tensor) else weights)]
    unit = sum(float(hestia.absmean_scale(w, group_size).square().mean()) * w.numel() for w in weights)
    away = lambda w, tau: float((hestia.soft_quantize(w, tau, group_size) - w).square().sum())
    error = lambda tau: sum(away(w, tau) for w in weights) / unit
    taus, best = np.geomspace(0.05, 2, 41), hestia.optimal_tau_init(weights, group_size)
    ax.semilogx(taus, [error(tau) for tau in taus], color=BLUE, linewidth=2)
    for tau, who, look in ((best, "least", {"marker": "o", "color": BLUE}),
                           (0.3, "Table 5", {"marker": "s", "color": RED, "fillstyle": "none"})):  # fmt: skip
        ax.plot(tau, error(tau), linestyle="none", markersize=9, markeredgewidth=2, **look,
                label=f"{who}: {error(tau):.4f} at τ = {tau:.4f}")  # fmt: skip
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    more = percent(error(0.3) / error(best) - 1)
    return finish(ax, f"For {what} H is closest to W at τ = {best:.3f}; at Table 5's 0.3 the error is {more} higher",
                  "temperature τ", "mean (W − H)² / γ²", "upper center")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# section 3.3: schedules and sensitivities


def schedules(config, scores, ax=None, tau_init=0.35):
    """Pressure and temperature of the least, the middle and the most sensitive tensor (the paper's Fig. 2).

    config: steps, rho and alpha; scores: {tensor: s_i}.
    """
    (ax,) = panels(ax, 1, (6.8, 4.2))
    T, rho, alpha = config["steps"], config["rho"], config["alpha"]
    t, ordered = np.linspace(0, T, 400), sorted(scores.items(), key=lambda item: item[1])
    tau = lambda s: [hestia.temperature(x, T, rho, tau_init, s, alpha) for x in t]
    watched = dict([ordered[-1], ordered[len(ordered) // 2], ordered[0]])
    lines = {f"{short(name)}: s = {s:.2f}": tau(s) for name, s in watched.items()}
    curves(ax, t, {**lines, "every tensor, if α = 0": [hestia.base_temperature(x, T, rho, tau_init) for x in t]})
    right = ax.twinx()
    pressed = {"color": GREY, "linewidth": 4, "alpha": 0.45}
    right.plot(t, [hestia.pressure(x, T, rho) for x in t], **pressed)
    ax.plot([], [], label="pressure p (right axis)", **pressed)
    right.set(ylabel="pressure p, share of H", ylim=(-0.024, 1.2), yticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    right.spines["top"].set_visible(False)
    ax.axvline(rho * T, color=GREY, linewidth=0.8)
    for x, phase in ((rho * T / 2, "compress"), ((1 + rho) * T / 2, "anneal")):
        ax.text(x, 0.97, phase, transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=9, style="italic")
    high, low = tau(ordered[-1][1])[0], tau(ordered[0][1])[0]
    title = "All tensors cool alike" if high == low else (
        f"The most sensitive tensor is {percent(abs(high / low - 1))} {'warmer' if high > low else 'colder'} than the "
        "least sensitive")  # fmt: skip
    ax.set_ylim(-0.024 * max(high, low), 1.2 * max(high, low, tau_init))
    finish(ax, title, "step of quantization-aware training", "temperature τ", "upper right",
           bbox_to_anchor=(1, 0.83))  # fmt: skip
    return ax


def alpha_rho_kappa(axes=None):
    """What alpha, rho and kappa each do: to a sensitive tensor's temperature, to every tensor's, to the scores."""
    left, middle, right = panels(axes, 3, (9.6, 3.9))
    t, tau_init, decades = np.linspace(0, 1, 301), 0.35, np.linspace(-2, 2, 81)
    tau = {a: [hestia.temperature(x, 1, 0.2, tau_init, 0.9, a) for x in t] for a in (0.6, 0.4, 0.2, 0.0, -0.4)}
    base = {r: [hestia.base_temperature(x, 1, r, tau_init) for x in t] for r in (0.0, 0.1, 0.2, 0.3, 0.5)}
    score = {k: [*hestia.sensitivity_scores({x: 10.0**x for x in decades}, k).values()] for k in (0.25, 0.5, 1, 2, 4)}
    standard = decades / decades.std()
    for ax, x, symbol, lines in ((left, t, "α", tau), (middle, t, "ρ", base), (right, standard, "κ", score)):
        curves(ax, x, {f"{symbol} = {v:g}".replace("-", "−"): y for v, y in lines.items()})
    halved = {r: t[np.array(y) < tau_init / 2][0] for r, y in base.items()}
    warmer, colder = percent(tau[0.4][0] / tau_init - 1), percent(1 - tau[-0.4][0] / tau_init)
    finish(left, f"α: 0.4 warms a tensor with s = 0.9 by {warmer}, −0.4 cools it by {colder}", "t / T",
           "temperature τ", "upper right")  # fmt: skip
    finish(middle, f"ρ: with 0, τ has halved at {halved[0.0]:.2f} T; with 0.5, at {halved[0.5]:.2f} T", "t / T",
           "base temperature τ", "lower left")  # fmt: skip
    span = {k: f"{s[0]:.2f} to {s[-1]:.2f}" for k, s in score.items()}
    finish(right, f"κ: with 1, these scores span {span[1]}; with 4, {span[4]}", "(log h − μ) / σ of the trace h",
           "sensitivity score s", "upper left")  # fmt: skip
    return left.figure


def hutchpp_error(curvature, ax=None):
    """Error of the traces against products, for each estimator. curvature: of notebooks/results/curvature.json."""
    (ax,) = panels(ax, 1, (6.8, 4.2))
    curve = {name: {int(n): point["rms"] for n, point in points.items()}
             for name, points in curvature["curves"].items()}  # fmt: skip
    first = lambda item: not item[0].startswith("Hutch++")  # HESTIA's own estimator in HESTIA's own blue
    for look, (name, points) in zip(LOOKS, sorted(curve.items(), key=first)):
        n = sorted(points)
        median, low, high = ([points[x][key] for x in n] for key in ("median", "q25", "q75"))
        ax.loglog(n, median, label=name, markersize=5, **look)
        ax.fill_between(n, low, high, color=look["color"], alpha=0.2, linewidth=0)
        seeds = points[n[0]]["n"]
    plain, plus = (next(points for name, points in curve.items() if name.startswith(start))
                   for start in ("Hutchinson", "Hutch++"))  # fmt: skip
    budget = 40 * curvature["model"]["tensors"]  # the paper's 2 * 10 + 20 products for each tensor
    budget = budget if budget in plain.keys() & plus.keys() else max(plain.keys() & plus.keys())
    ratio = plain[budget]["median"] / plus[budget]["median"]
    ax.axvline(budget, color=GREY, linewidth=0.8, linestyle=DOTS)
    word = f"{ratio:.1f} times less than" if ratio > 1 else f"{1 / ratio:.1f} times more than"
    each = f"{budget // curvature['model']['tensors']} for each tensor"
    return finish(ax, f"At {budget:,} products ({each}, dotted) Hutch++ errs {word} Hutchinson",
                  "Hessian-vector products, all tensors together",
                  f"relative error, rms over tensors\n(median, quartiles of {seeds} seeds)", "lower left")  # fmt: skip


def trace_heatmap(tensors, ax=None, what="traces"):
    """log10 of each tensor's Hessian trace, layer by projection; a trace lost in its error is hatched and marked "?".

    tensors: {name: {value, stderr, flagged, score}}, as in a results.json under "sensitivities". what: of which matrix.
    """
    if not tensors or any("value" not in t for t in tensors.values()):
        raise ValueError("no traces are there; python train_tiny.py --methods hestia estimates them")
    layer = lambda name: int((re.search(r"\d+(?=\.)", name) or [0])[0])
    spots = {name: (layer(name), name.rpartition(".")[2]) for name in tensors}
    rows, columns = (list(dict.fromkeys(spot[k] for spot in spots.values())) for k in (0, 1))
    (ax,) = panels(ax, 1, (1.6 + 0.85 * len(columns), 1.7 + 0.42 * len(rows)))
    grid = np.full((len(rows), len(columns)), np.nan)
    positive = {name: t["value"] for name, t in tensors.items() if t["value"] > 0}
    for name, h in positive.items():
        grid[rows.index(spots[name][0]), columns.index(spots[name][1])] = np.log10(h)
    image, middle = ax.imshow(grid, cmap="cividis", aspect="auto"), (np.nanmin(grid) + np.nanmax(grid)) / 2
    for name, (layer, kind) in spots.items():
        i, j, lost = rows.index(layer), columns.index(kind), tensors[name].get("flagged", False)
        text = "≤ 0" if np.isnan(grid[i, j]) else tidy(grid[i, j], ".1f")
        text += " ?" * lost
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if grid[i, j] < middle else "black")
        if lost:
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="///", edgecolor=GREY, linewidth=0))
    ax.set_xticks(range(len(columns)), [kind.removesuffix("_proj") for kind in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.figure.colorbar(image, ax=ax, label=f"log10 of the {what}")
    low, high = min(positive, key=positive.get), max(positive, key=positive.get)
    lost = sum(t.get("flagged", False) for t in tensors.values())
    decades = f"{np.log10(positive[high] / positive[low]):.1f} decades"
    title = f"{what[0].upper() + what[1:]} span {decades}, from {short(low)} to {short(high)}"
    title += f"; {lost} of {len(tensors)} are lost in their error (?)" * (lost > 0)
    finish(ax, title, "projection", "layer")
    ax.grid(False)
    return ax


def score_errors(tensors, kappa=1.0, ax=None):
    """Each score with its standard error: half of what Eq. (13) makes of its trace plus and minus an error."""
    if not tensors or any("stderr" not in t for t in tensors.values()):
        raise ValueError("no sensitivities have an error; python train_tiny.py --sensitivity hutchpp makes them")
    (ax,) = panels(ax, 1, (6.6, 1.5 + 0.17 * len(tensors)))
    traces = {name: hestia.TraceEstimate(t["value"], t["stderr"], t["flagged"], 0) for name, t in tensors.items()}
    moved = lambda name, h: hestia.sensitivity_scores({**traces, name: h}, kappa)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of traces lost in their error, which the figure marks
        scores = hestia.sensitivity_scores(traces, kappa)
        ends = {name: [moved(name, h._replace(value=h.value + side * h.stderr)) for side in (-1, 1)]
                for name, h in traces.items()}  # fmt: skip
    error = {name: abs(high - low) / 2 for name, (low, high) in ends.items()}
    names = sorted(scores, key=scores.get)
    for lost, marker, color in ((False, "o", BLUE), (True, "x", RED)):
        rows = [k for k, name in enumerate(names) if traces[name].flagged == lost]
        ax.errorbar([scores[names[k]] for k in rows], rows, xerr=[error[names[k]] for k in rows], fmt=marker,
                    color=color, capsize=3, markersize=4, label="lost in its error" if lost else None)  # fmt: skip
    overlap = sum(scores[b] - scores[a] < np.hypot(error[a], error[b]) for a, b in zip(names, names[1:]))
    ax.set_yticks(range(len(names)), [short(name) for name in names], fontsize=8)
    ax.set_xlim(0, 1)
    title = f"Scores span {scores[names[0]]:.2f} to {scores[names[-1]]:.2f}, with errors of at most "
    title += f"{max(error.values()):.3f}; {overlap} of {len(names) - 1} neighbouring pairs are closer than their errors"
    return finish(ax, title, f"sensitivity score s (κ = {kappa:g}), ± one standard error",
                  legend="lower right" if any(h.flagged for h in traces.values()) else None)  # fmt: skip


def spearman(a, b):
    """Rank correlation.

    >>> round(spearman([1, 2, 3], [10, 30, 20]), 9)
    0.5
    """
    rank = lambda x: np.argsort(np.argsort(np.asarray(x)))
    return float(np.corrcoef(rank(a), rank(b))[0, 1])


def sensitivity_against(curvature, axes=None):
    """Exact Hessian traces against what else might rank the tensors. curvature: of notebooks/results/curvature.json."""
    axes, exact = panels(axes, 2, (9.4, 4)), np.array(curvature["exact"])
    kinds = [name.rpartition(".")[2] for name in curvature["names"]]
    for ax, key, what in zip(axes, ("error", "gradnorm"), ("error of rounding to ternary", "gradient norm")):
        x = np.array(curvature["other"][key])
        for k, kind in enumerate(dict.fromkeys(kinds)):
            these = np.array(kinds) == kind
            ax.plot(x[these], exact[these], label=kind.removesuffix("_proj"), fillstyle="full" if k % 2 else "none",
                    **{**LOOKS[k], "linestyle": "none"})  # fmt: skip
        ax.set(yscale="log", xscale="log" if key == "gradnorm" else "linear")
        r = spearman(x, exact)
        says = "ranks the tensors as the trace does" if r > 0.9 else "says little of the trace" if abs(r) < 0.5 else (
            "ranks the tensors roughly as the trace does" if r > 0 else "ranks the tensors the other way")  # fmt: skip
        finish(ax, f"The {what} {says}: Spearman {r:.2f}", ("relative " if key == "error" else "") + what,
               "exact Hessian trace")  # fmt: skip
    axes[1].legend(fontsize=8.5, edgecolor="none", ncols=2)
    return axes[0].figure


# ----------------------------------------------------------------------------------------------------------------------
# along a run

STEP = "step of quantization-aware training"


def loss_curves(runs, ax=None, key="loss"):
    """Training loss as each method's forward pass sees it, above that of full precision on the same batches.

    Every method sees the same batches, so the difference is free of their noise. Without a full-precision run: the loss
    itself. Lines are means over seeds, bands reach from the smallest to the largest.
    """
    (ax,) = panels(ax, 1, (6.6, 4))
    known = lambda name: " at " not in name and name.partition(":")[0] in hestia.QUANTIZERS  # not a choice of rate
    methods = list(dict.fromkeys(name for name, _ in runs if known(name)))
    paired, tops, lows, highs, late = "full" in methods, [], [0.0], [], {}
    for k, method in enumerate(methods):
        if paired and method == "full":
            continue
        step, values = by_seed(runs, method, key)
        values = values - by_seed(runs, "full", key)[1] if paired else values
        band(ax, step, values, style(method, k))
        tops.append(np.quantile(values.mean(0), 0.9))
        lows.append(values.min())
        highs.append(values.mean(0).max())
        late[quantizer(method).label] = values[:, step >= 0.75 * step[-1]].mean()
    if paired:
        ax.axhline(0, color=BLACK, linewidth=1)
        if tops:
            top = 1.5 * max(tops)  # the first steps of a hard quantizer tower above the rest
            ax.set_ylim(min(lows) - 0.1 * max(tops), top)
            if max(highs) > top:
                ax.text(0.01, 0.99, f"↑ up to {max(highs):.2f}", transform=ax.transAxes, va="top", fontsize=8.5)
    best, worst = (choose(late, key=late.get, default=None) for choose in (min, max))
    title = f"In the last quarter {best} costs {late[best]:.3f} nats" if late else "Nothing here was quantized"
    title += f", {worst} {late[worst]:.3f}" if len(late) > 1 else ""
    ylabel = "nats per byte above full precision" if paired else "nats per byte"
    return finish(ax, title, STEP, ylabel, "upper right" if late else None)


def felt_curves(run, ax=None):
    """The share of weights whose update the forward pass feels: at least 5 % of it arrives. Bands over seeds."""
    found = along(read_snapshots(run), ("full", "absmean", "hestia-no-hessian", "hestia"), "felt")
    (ax,) = panels(ax, 1, (6.8, 4))
    quarter = {}
    for method, (step, felt) in found.items():
        band(ax, step, 100 * felt, style(method))
        quarter[method] = felt[:, np.argmin(abs(step - 0.25 * step[-1]))].mean()
    said = [f"{percent(quarter[m])} under {quantizer(m).label}" for m in ("absmean", "hestia") if m in found]
    ax.set_ylim(-3, 110)
    return finish(ax, "A quarter of the way, the forward pass feels these shares of the weights move: "
                  + (", ".join(said) or percent(max(quarter.values()))), STEP, "weights whose update is felt, %",
                  "center right", bbox_to_anchor=(1, 0.66))  # fmt: skip


def watched_tensor(run, tensor):
    """(name, bins, {method: (steps, histograms (moments, bins), mean over seeds)}) of one of the watched tensors."""
    snapshots = read_snapshots(run)
    found = {m: (step, hist.mean(0)[:, tensor])
             for m, (step, hist) in along(snapshots, ("absmean", "hestia"), "hist").items()}  # fmt: skip
    return str(snapshots[f"{next(iter(found))}/tensors"][tensor]), snapshots["bins"], found


def draw_histogram(ax, now, start, bins):
    """Bars of w / gamma, each code's bin in a look of its own, and the outline of how it started. Returns the bars."""
    middle, bars = (bins[1:] + bins[:-1]) / 2, []
    for code, color, hatch in CODES:
        these = np.clip(np.round(middle), -1, 1) == float(code.replace("−", "-"))
        bars += ax.bar(middle[these], 100 * now[these], width=bins[1] - bins[0], color=color, alpha=0.75, hatch=hatch,
                       edgecolor="white", linewidth=0, label=f"code {code}")  # fmt: skip
    ax.stairs(100 * start, bins, color=BLACK, linewidth=1, label="before")
    z_axis(ax)
    ax.set_xlim(-2.5, 2.5)
    return bars


def histograms(run, tensor=-1, axes=None):
    """A watched tensor's weights, w / gamma, before and after training by AbsMean STE and by HESTIA.

    tensor: which of the three that the run watched. "Before" is after the first step.
    """
    name, bins, found = watched_tensor(run, tensor)
    axes = panels(axes, len(found), (4.8 * len(found), 4), sharey=True)
    near = abs(abs((bins[1:] + bins[:-1]) / 2) - 0.5) < 0.1
    for ax, (method, (_, hist)) in zip(axes, found.items()):
        draw_histogram(ax, hist[-1], hist[0], bins)
        before, after = hist[0, near].sum(), hist[-1, near].sum()
        change = "empties" if after < 0.85 * before else "fills" if after > before / 0.85 else "keeps its weights at"
        title = f"{quantizer(method).label} {change} the boundaries: within 0.1 γ of one lie {percent(before)} of the "
        title += f"weights before, {percent(after)} after"
        finish(ax, title, f"latent weight w / γ of {short(name)}")
    highest = max(hist[[0, -1]].max() for _, hist in found.values())
    axes[0].set_ylim(0, 118 * highest)  # room for the legend
    axes[0].legend(loc="upper center", fontsize=8.5, edgecolor="none", ncols=4, columnspacing=1, handlelength=1.4)
    axes[0].set_ylabel(f"weights per bin of {bins[1] - bins[0]:.2g} γ, %")
    return axes[0].figure


def gradient_norms(run, axes=None):
    """Norm of the gradient of all that is trained, with dL/dW_eff and with dL/dW for the quantized weights, against the
    base temperature at that step, while it falls (the STE has none: it is drawn at the same steps).

    Were weights spread evenly about the boundaries, dL/dW would grow like tau^(-1/2): of them a share of order tau lies
    within tau of a boundary, where the slope is 1 / (2 tau).
    """
    given = guidance(read_results(run))
    T, rho = given["config"]["steps"], given["config"]["rho"]
    snapshots = read_snapshots(run)
    axes = panels(axes, 2, (9.6, 4.2), sharey=True)
    for ax, key, what in zip(axes, ("grad_norm", "grad_norm_latent"), ("dL/dW_eff", "dL/dW, latents")):
        for method, (step, norm) in along(snapshots, ("absmean", "hestia-no-hessian", "hestia"), key).items():
            cooling = step > rho * T
            tau = np.array([hestia.base_temperature(t, T, rho, given["tau_init"]) for t in step[cooling]])
            look = style(method)
            look["label"] += "" if is_soft(method) else ", at the same steps"
            band(ax, tau, norm[:, cooling], look)
            mean = norm[:, cooling].mean(0)
        early, end = mean[: max(1, len(mean) // 4)].mean(), mean[-1]
        if ax is axes[1]:
            ax.plot(tau, mean[0] * (tau / tau[0]) ** -0.5, color=GREY, linestyle=DOTS, label="τ^(−1/2), to compare")
        ax.set(xscale="log", yscale="log")
        ax.invert_xaxis()
        ax.yaxis.set_minor_formatter(NullFormatter())
        title = f"{what}: {quantizer(method).label}'s norm goes from {early:.2f} (first quarter) to {end:.2f} (end)"
        finish(ax, title, "base temperature τ at the step (training goes right)", "", "upper left")
    axes[0].set_ylabel("gradient norm")
    return axes[0].figure


def animation(run, path, tensor=-1, seconds=6):
    """A GIF, 880 pixels wide: a watched tensor's weights move while the function that the forward pass applies to them
    hardens, STE beside HESTIA. Written whole or not at all. Returns the path."""
    from PIL import Image  # comes with matplotlib

    from train_tiny import whole

    name, bins, found = watched_tensor(run, tensor)
    felt = along(read_snapshots(run), found, "felt")
    config, scores, tau_init = guidance(read_results(run)).values()
    T, rho, frames = config["steps"], config["rho"], max(2, round(10 * seconds))
    tau = lambda t: hestia.temperature(t, T, rho, tau_init, scores.get(name, 0.0), config["alpha"])
    fig = plt.figure(figsize=(8.8, 4.6), dpi=100)
    grid = fig.add_gridspec(2, len(found), height_ratios=(4.4, 1), hspace=0.42, wspace=0.12, left=0.05, right=0.92,
                            top=0.87, bottom=0.1)  # fmt: skip
    z, t, parts = z_line(2.5, 501), np.linspace(0, T, 200), []
    for k, (method, (steps, hist)) in enumerate(found.items()):
        ax = fig.add_subplot(grid[0, k])
        bars = draw_histogram(ax, hist[0], hist[0], bins)
        ax.set(ylim=(0, 135 * max(h.max() for _, h in found.values())), yticks=[], ylabel="" if k else "bars: weights")
        ax.set_xlabel(f"latent weight w / γ of {short(name)}", labelpad=1)
        right = ax.twinx()
        right.set(ylim=(-1.35, 1.35), yticks=(-1, 0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        right.spines[["top", "left"]].set_visible(False)
        (curve,) = right.plot(z, z, color=BLACK, linewidth=2.2)
        parts.append((ax, bars, curve, method, steps, hist))
    right.set_ylabel("line: effective weight / γ")
    strip = fig.add_subplot(grid[1, :])
    strip.plot(t / T, [tau(x) / tau(0) for x in t], color=RED, label=f"temperature τ / {tau(0):.2f}")
    strip.plot(t / T, [hestia.pressure(x, T, rho) for x in t], color=GREY, linestyle="--", label="pressure p")
    strip.set(xlim=(0, 1), ylim=(0, 1.1), yticks=(0, 1))
    strip.set_xlabel("share of training done", labelpad=1)
    strip.spines[["top", "right"]].set_visible(False)
    strip.legend(fontsize=8.5, frameon=False, loc="center right")
    now, pictures = strip.axvline(0, color=BLACK, linewidth=1.5), []
    for step in np.linspace(0, T - 1, frames):
        now.set_xdata([step / T, step / T])
        p = hestia.pressure(step, T, rho)
        for ax, bars, curve, method, steps, hist in parts:
            for bar, heights in zip(bars, hist.T):
                bar.set_height(100 * np.interp(step, steps, heights))
            soft = is_soft(method)
            seen = hestia.effective_weight(z, tau(step), p, scale=UNIT) if soft else hestia.quantize(z, scale=UNIT)
            curve.set_ydata(seen)
            state = f"τ = {tau(step):.2f}, p = {p:.2f}" if soft else "rounding from the first step"
            share = percent(np.interp(step, felt[method][0], felt[method][1].mean(0)))
            title = f"{quantizer(method).label}: {state}\nforward pass feels {share} of the weights move"
            ax.set_title(title, fontsize=11, loc="left")
        fig.canvas.draw()
        rgb = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
        pictures.append(rgb.quantize(64, dither=Image.Dither.NONE))
    plt.close(fig)
    with whole(Path(path)) as aside:
        pictures[0].save(aside, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=[1000, *[100] * (frames - 2), 2000])  # fmt: skip
    return Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# results: a table's rows against each other

SPLITS = {"train": "training", "val": "validation"}


def differences(results, methods, other, split):
    """{method: (mean, half width of the 95 % interval, [one number per seed])} of a method's loss minus another's,
    seed by seed: they share their batches. Of one seed there is no interval, and the half width is 0."""
    from train_tiny import paired

    rows = results["per_seed"]
    each = {m: [row[m][split] - row[other][split] for row in rows] for m in methods}
    half = lambda m: paired(rows, m, other, split)[1] if len(rows) > 1 else 0.0
    return {m: (float(np.mean(d)), half(m), d) for m, d in each.items()}


def clear(mean, half, seeds):
    """Whether zero lies outside the 95 % interval; with one seed there is no way to know."""
    return len(seeds) > 1 and abs(mean) > half


def forest(ax, rows, text, title, xlabel, reach=None, bars="95 % interval"):
    """A line for each {label: (look, mean, half width, [numbers of the seeds])}: mean and interval, seeds as rings, the
    mean in words at the right. What lies beyond `reach` (ten times the median) is an arrow at the edge. bars: what the
    half width is."""
    (ax,) = panels(ax, 1, (8, 1.5 + (0.38 if len(rows) < 12 else 0.27) * len(rows)))
    means = np.array([mean for _, mean, _, _ in rows.values()])
    reach = reach or 10 * np.median([abs(mean) + half for _, mean, half, _ in rows.values()])
    ax.axvline(0, color=GREY, linewidth=1)
    for k, (look, mean, half, seeds) in enumerate(rows.values()):
        look = {**look, "linestyle": "none", "label": None}
        if abs(mean) > reach:
            ax.plot(np.sign(mean) * reach, k, **{**look, "marker": "<>"[mean > 0]}, clip_on=False)
        else:
            ax.errorbar(mean, k, xerr=half or None, capsize=4, markersize=7, elinewidth=1.5, **look)
            rings = seeds if len(seeds) > 1 else []
            ax.plot(rings, [k + 0.27] * len(rings), "o", color=look["color"], markersize=3.5, fillstyle="none")
        words = text(mean, half) if any(seeds) else "reference"
        ax.annotate(words, (1.02, k), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    low, high = ax.get_xlim()
    ax.set_xlim(-reach if means.min() < -reach else low, reach if means.max() > reach else high)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.locator_params("x", nbins=6)  # more labels of four digits would touch
    inches = ax.get_position().width * ax.figure.get_figwidth() / 0.8 - 1.5 - 0.075 * max(map(len, rows))
    several = any(len(seeds) > 1 for _, _, _, seeds in rows.values())
    return finish(ax, title, xlabel + f"\n(bar: {bars}; small ring: one seed)" * several, inches=inches)


def gap_recovered(results, split="train", ax=None):
    """How much of the way from AbsMean STE back to full precision each method recovers, with the standard deviation
    over seeds; the best on training text comes first, on either text. Where that gap makes no sense: the difference
    from AbsMean STE, with 95 % intervals."""
    table, rows = results["table"], results["per_seed"]
    methods = [m for m in table if m not in ("before", "untrained", "full", "absmean")]
    if "absmean" not in table or not methods:
        raise ValueError("no absmean to compare with; python train_tiny.py --methods full absmean hestia runs it")
    has_gap = lambda split: all(f"gap_{split}" in table[m] for m in methods)

    def measure(split):  # {method: (mean, half width, [one number per seed])}
        if not has_gap(split):
            return differences(results, methods, "absmean", split)
        key = f"gap_{split}"
        return {m: (100 * table[m][key][0], 100 * (table[m][key][1] or 0), [100 * r[m][key] for r in rows])
                for m in methods}  # fmt: skip

    gap, found, on_train = has_gap(split), measure(split), measure("train")
    order = sorted(methods, key=lambda m: on_train[m][0], reverse=has_gap("train"))
    share = lambda mean, half: tidy(mean, ".1f") + (f" ± {half:.1f} %" if half else " %")
    text, label = share if gap else signed, lambda m: quantizer(m).label
    best = (max if gap else min)(methods, key=lambda m: found[m][0])
    mean, half, seeds = found[best]
    said = f"{text(mean, half)} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
    every = {1: label(best) + " is", 2: "Both are"}.get(len(methods), f"All {len(methods)} are")
    worse = f"{every} worse than AbsMean STE" + f"; closest is {label(best)}, {said}" * (len(methods) > 1)
    if gap:
        title = f"{label(best)} recovers the largest part of the gap: {said}" if mean > 0 else worse
        axis = f"gap recovered on {SPLITS[split]} text, %: 0 is AbsMean STE, 100 is full precision"
        reach, bars = 110, "± one standard deviation"
    else:
        title = f"{label(best)} is lowest: {said}" if mean < 0 else worse
        axis, reach, bars = f"{SPLITS[split]} loss minus AbsMean STE's, nats", None, "95 % interval"
    drawn = {label(m): (style(m, k + 2), *found[m]) for k, m in enumerate(order)}
    ax = forest(ax, drawn, text, title, axis, reach, bars)
    if gap and ax.get_xlim()[1] > 60:  # else it would squeeze all that is to be seen
        ax.axvline(100, color=BLACK, linewidth=1)
        ax.set_xlim(None, max(105, ax.get_xlim()[1]))
    return ax


SETTINGS = {"alpha": "α = {:g}", "rho": "ρ = {:g}", "group_size": "groups of {:g}", "samples": "{:g} samples"}


def loss_against(results, setting, split="train", ax=None):
    """The loss with another alpha, rho, group_size, samples or bits minus plain HESTIA's, seed by seed with 95 %
    intervals; for "lr" the losses from which the learning rates were chosen."""
    if setting not in (*SETTINGS, "bits", "lr"):
        raise ValueError(f"unknown setting {setting!r}; expected one of {', '.join(SETTINGS)}, bits, lr")
    if setting == "lr":
        return loss_against_lr(results, ax)
    table, usual = results["table"], results["config"].get(setting)
    said = lambda v: "one scale per tensor" if setting == "group_size" and not v else (
        SETTINGS[setting].format(v).replace("-", "−"))  # fmt: skip
    names = {m: quantizer(m).label for m in ("hestia-binary", "hestia", "hestia-2bit", "int2") if m in table}
    if setting != "bits":
        names = {}
        for base, prefix in (("hestia", ""), ("absmean", "AbsMean STE, ")):
            values = {m: float(m.partition("=")[2]) for m in table if re.fullmatch(rf"{base}:{setting}=[^,]+", m)}
            if values and base in table:
                values[base] = float(usual)
            names |= {m: prefix + said(values[m]) for m in sorted(values, key=lambda m: values[m])}
    if "hestia" not in names or len(names) < 2:
        ablate, word = setting.removesuffix("_size"), setting.replace("_", " ")
        raise ValueError(f"no run has another {word}; python train_tiny.py --ablate {ablate} --seeds 3 does some")
    found = differences(results, names, "hestia", split)
    others = [m for m in names if m != "hestia"]
    best = min(others, key=lambda m: found[m][0])
    title = f"{'Lowest' if found[best][0] < 0 else 'None is below plain HESTIA; closest'}: {names[best]}, " + (
        signed(*found[best][:2]))  # fmt: skip
    differ = sum(clear(*found[m]) for m in others)
    title += f"; {differ} of {len(others)} differ clearly" if len(results["per_seed"]) > 1 else " (one seed)"
    look = lambda m: STYLE["hestia"] if m == "hestia" else STYLE["absmean"] if m[:7] == "absmean" else LOOKS[2]
    return forest(ax, {names[m]: (look(m), *found[m]) for m in names}, signed, title,
                  f"{SPLITS[split]} loss minus plain HESTIA's, nats")  # fmt: skip


def loss_against_lr(results, ax=None):
    losses = {m: {float(lr): x for lr, x in rates.items() if np.isfinite(x)}
              for m, rates in results.get("tuning", {}).items()}  # fmt: skip
    losses = {m: dict(sorted(rates.items())) for m, rates in losses.items() if rates}
    if not losses:
        raise ValueError("no learning rates were chosen; python train_tiny.py --lrs 5e-4 1e-3 2e-3 does")
    (ax,) = panels(ax, 1, (8.8, max(4.0, 0.6 + 0.2 * len(losses))))
    for k, (method, rates) in enumerate(losses.items()):
        width = 2.4 if method in STYLE else 1.2
        ax.plot(rates.keys(), rates.values(), markersize=5, linewidth=width, **style(method, k))
    rates, best = sorted({lr for r in losses.values() for lr in r}), {m: min(r, key=r.get) for m, r in losses.items()}
    low, high = np.quantile([x for r in losses.values() for x in r.values()], (0, 0.85))
    if ax.get_ylim()[1] > low + 3 * (high - low):
        ax.set_ylim(None, high + 0.3 * (high - low))  # the rest, far above, is not worth the room
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    ax.xaxis.set_minor_formatter(NullFormatter())
    edge = sum(lr in (rates[0], rates[-1]) for lr in best.values())
    said = ", ".join(f"{quantizer(m).label}\N{NO-BREAK SPACE}{best[m]:g}" for m in ("absmean", "hestia") if m in best)
    return finish(ax, f"Best rates: {said + '; ' if said else ''}at the edge: {edge} of {len(best)} methods",
                  "peak learning rate", "loss of the hard weights, nats (the tuning seed)", "center left", inches=5.2,
                  bbox_to_anchor=(1, 0.5))  # fmt: skip


CONTROLS = {"hestia-no-hessian": "α = 0", "hestia:scores=shuffled": "scores shuffled",
            "hestia:scores=common": "one common score", "hestia": "HESTIA"}  # fmt: skip


def controls(results, split="train", ax=None):
    """Does the ranking of the tensors by their Hessian matter? HESTIA with alpha = 0, and with its scores shuffled or
    made equal, minus HESTIA as it is, seed by seed with 95 % intervals."""
    rows = [m for m in CONTROLS if m in results["table"]]
    if "hestia" not in rows or not any(":" in m for m in rows):
        raise ValueError("no scores were shuffled or made equal; python train_tiny.py --ablate hessian --seeds 3 does")
    found = differences(results, rows, "hestia", split)
    drawn = {CONTROLS[m]: (STYLE.get(m, LOOKS[2 + k]), *found[m]) for k, m in enumerate(rows)}
    said = [f"{CONTROLS[m]} is clearly {'worse' if found[m][0] > 0 else 'better'} than HESTIA ({signed(*found[m][:2])})"
            for m in rows if clear(*found[m])]  # fmt: skip
    title = "; ".join(said) or "No control differs clearly from HESTIA: the Hessian's ranking shows nothing"
    title = title if len(results["per_seed"]) > 1 else "One seed, no interval: it does not show what the ranking does"
    return forest(ax, drawn, signed, title, f"{SPLITS[split]} loss minus HESTIA's, nats")


def overview(folder):
    """One figure of a finished run: loss curves, schedules, and the table's losses. Returns a matplotlib Figure."""
    results, runs = read_results(folder), read_log(folder)
    methods = [m for m in results["config"]["methods"] if m in results["table"]]
    table = {m: results["table"][m] for m in methods}
    fig = plt.figure(figsize=(9.6, 5.2 + 0.35 * len(methods)), layout="constrained")
    grid = fig.add_gridspec(2, 2, height_ratios=(3.6, 0.9 + 0.35 * len(methods)))
    left, right, below = (fig.add_subplot(spot) for spot in (grid[0, 0], grid[0, 1], grid[1, :]))
    loss_curves(runs, left)
    if any(map(is_soft, methods)):
        schedules(ax=right, **guidance({**results, "table": table}))
    else:
        right.set_axis_off()
        right.set_title("None of these methods has a temperature", fontsize=10.5)
    for split, offset, fill in (("train", -0.13, "full"), ("val", 0.13, "none")):
        for k, method in enumerate(methods):
            mean, spread = table[method][split]
            look = {"color": style(method, k)["color"], "marker": "os"[split == "val"], "fillstyle": fill}
            below.errorbar(mean, k + offset, xerr=spread, capsize=3, linestyle="none", **look,
                           label=None if k else f"{SPLITS[split]} text")  # fmt: skip
    below.set_yticks(range(len(methods)), [quantizer(m).label for m in methods])
    below.invert_yaxis()
    best = min((m for m in methods if m != "full"), key=lambda m: table[m]["val"][0], default="full")
    title = f"Lowest on validation text among the quantized: {quantizer(best).label}"
    finish(below, title if best != "full" else "At the end", "nats per byte, hard weights", legend="best")
    return fig


# ----------------------------------------------------------------------------------------------------------------------
# command line


def of_run(draw):
    return lambda run: draw(read_results(run))


def of_study(draw, name):
    return lambda run: draw(read_json(RESULTS / name, STUDIES[name]))


def of_either(draw, name):
    """From the run, if it has what the figure asks for; else from the study."""

    def drawn(run):
        try:
            return draw(read_results(run) if run else {"table": {}, "config": {}, "per_seed": []})
        except ValueError:
            if not (RESULTS / name).exists():
                raise
        return draw(read_results(RESULTS / name))

    return drawn


RUN, CURVATURE, TABLE = "a run", "notebooks/results/curvature.json", "notebooks/results/table1.json"
ABLATED = "a run with --ablate {}, or notebooks/results/ablations.json"
FIGURES = {  # name: (what draws it for a run's folder, a line about it, what it needs)
    "staircase": (lambda run: staircase(), "Q and H over the latent weight, and their slopes (Fig. 1)", ""),
    "pi_curves": (lambda run: pi_curves(), "the shares of the three codes at three temperatures (Eq. 7)", ""),
    "dead_zone_line": (lambda run: dead_zone_line(), "where an update changes Q, and what H makes of it (Eq. 6)", ""),
    "jacobians": (lambda run: jacobians(), "the slope that each method takes for that of rounding", ""),
    "lemma_4_2": (lambda run: lemma_4_2(), "the Jacobian becomes two spikes of area gamma", ""),
    "mse_against_tau": (lambda run: mse_against_tau(), "which temperature keeps H closest to W (sec. 5.1)", ""),
    "alpha_rho_kappa": (lambda run: alpha_rho_kappa(), "what the three settings do to schedules and scores", ""),
    "schedules": (of_run(lambda r: schedules(**guidance(r))), "pressure and temperatures (Fig. 2)", RUN),
    "hutchpp_error": (of_study(hutchpp_error, "curvature.json"), "error of the traces against products", CURVATURE),
    "sensitivity_against": (of_study(sensitivity_against, "curvature.json"), "traces against other signs", CURVATURE),
    "trace_heatmap": (of_run(lambda r: trace_heatmap(first_sensitivities(r), what=which_traces(r))),
                      "traces, layer by projection", RUN),
    "score_errors": (of_run(lambda r: score_errors(first_sensitivities(r), r["config"]["kappa"])),
                     "sensitivity scores with their errors", RUN),
    "loss_curves": (lambda run: loss_curves(read_log(run)), "training loss above full precision", RUN),
    "felt_curves": (felt_curves, "the share of updates that the forward pass feels", RUN),
    "histograms": (histograms, "weights before and after, STE beside HESTIA", RUN),
    "gradient_norms": (gradient_norms, "gradient norms against temperature", RUN),
    "animation": (lambda run: lambda path: animation(run, path), "the weights along a run, as a GIF", RUN),
    "overview": (overview, "loss curves, schedules and final losses of a run", RUN),
    "gap_recovered": (of_run(gap_recovered), "the gap to full precision that each method recovers", RUN),
    "table1": (of_study(gap_recovered, "table1.json"), "the same for every method, after a choice of rates", TABLE),
    "loss_against_lr": (of_either(loss_against_lr, "table1.json"), "loss against the peak learning rate",
                        f"a run with --lrs, or {TABLE}"),
    "controls": (of_either(controls, "ablations.json"), "does the Hessian's ranking matter", ABLATED.format("hessian")),
    **{f"loss_against_{s}": (of_either(lambda r, s=s: loss_against(r, s), "ablations.json"),
                             f"loss with another {s}, minus plain HESTIA's", ABLATED.format(s.removesuffix("_size")))
       for s in (*SETTINGS, "bits")},
}  # fmt: skip


def save(name, run, folder):
    """Draw one figure into a folder, whole or not at all. run: a folder, or None for the newest. Returns its path."""
    from train_tiny import whole

    draw, _, needs = FIGURES[name]
    finished = sorted(Path("out").glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    if needs == RUN and not (run or finished):
        raise ValueError("there is no finished run under out/; make one with python train_tiny.py")
    run = None if "run" not in needs else Path(run) if run else finished[-1].parent if finished else None
    folder = Path(folder or run or "out")
    drawn = draw(run)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name + (".gif" if name == "animation" else ".png"))
    if name == "animation":
        return drawn(path)
    with whole(path) as aside:
        (drawn if isinstance(drawn, plt.Figure) else drawn.figure).savefig(aside, format="png", dpi=120)
    plt.close("all")
    return path


def main(arguments=None):
    line = lambda name, about, needs: f"  {name:24}{about}" + f"; needs {needs}" * bool(needs)
    names = "\n".join(line(name, *row[1:]) for name, row in FIGURES.items())
    parser = argparse.ArgumentParser(description="Draw a figure, or all.", epilog=f"figures:\n{names}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of those below, or all")
    parser.add_argument("--run", help="a folder that train_tiny.py wrote [the newest finished one under out/]")
    parser.add_argument("--save", metavar="DIR", help="where to [the run's folder, or out/ where no run is needed]")
    given = parser.parse_args(arguments)
    if not given.name and not given.run:
        parser.print_help()
        return 0
    try:
        if given.name not in (None, "all", *FIGURES):
            raise ValueError(f"there is no figure {given.name}; expected all, {', '.join(FIGURES)}")
        if given.name != "all":
            print(save(given.name or "overview", given.run, given.save))
            return 0
        if given.run:  # rather nothing than half of the figures of a run that is not there
            read_results(given.run), read_snapshots(given.run), read_log(given.run)
        for name in FIGURES:
            try:
                print(save(name, given.run, given.save))
            except ValueError as error:
                print(f"{name} is left out: {error}")
    except (ValueError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"plots.py: the numbers lack {error}; make them anew with python train_tiny.py", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
