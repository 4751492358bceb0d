"""Tables of results: intervals, the gap recovered, Markdown.

    python -m notebooks.lab.tables notebooks/results/table1.json   # prints the tables of this file
    python -m notebooks.lab.tables ce.json teacher.json            # what each part is worth

A file is a results.json (of train_tiny.py or of a study), a bench.json, scores of zeroshot.py, or
what the studies of estimators and of measures wrote. Several are studies of the same seeds and
texts, of which all but the first had a teacher. Losses are in nats per token, of hard weights.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

import plots
from notebooks.lab import rivals

SPLITS = {"train": "train", "val": "validation", "test": "test"}
MODES = {  # of lab/bench.py
    "full": "full precision, narrow copy once per step",
    "absmean": "AbsMean STE",
    "hestia": "HESTIA",
    "naive": "HESTIA, softmax in every forward",
    "plain": "float32 weights, autocast on a GPU",
    "passes": "relax and pull_back alone",
    "products": "matrix products alone",
}


def label(name):
    """What a row is called. Names of ablations say which setting differs.

    >>> label("hestia:alpha=0.6,rho=0.3"), label("absmean:group_size=0")
    ('HESTIA, alpha 0.6, rho 0.3', 'AbsMean STE, group size 0')
    """
    row, _, settings = name.partition(":")
    changed = settings.replace("=", " ").replace("_", " ").split(",") if settings else []
    return ", ".join([plots.label(row), *changed])


# --------------------------------------------------------------------------------------------------
# numbers


T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # for 1 to 10 degrees


def t_95(degrees):
    """Student's t, two-sided. Beyond ten degrees a formula that is good to 0.01.

    >>> [round(t_95(d), 2) for d in (4, 11, 30)]
    [2.78, 2.2, 2.04]
    """
    return T_95[degrees - 1] if degrees <= 10 else 1.96 + 2.4 / degrees + 3 / degrees**2


def paired(per_seed, row, other, split):
    """(mean, half width of its 95 % interval, standard deviation) of row minus other, seed by seed.
    Both saw the same batches, so that their noise cancels.

    >>> rows = [{"a": {"val": 1.0 + d}, "b": {"val": 2.0}} for d in (0.1, 0.2, 0.3)]
    >>> [round(x, 3) for x in paired(rows, "a", "b", "val")]
    [-0.8, 0.248, 0.1]
    """
    differences = [rows[row][split] - rows[other][split] for rows in per_seed]
    spread = float(np.std(differences, ddof=1))
    half = t_95(len(differences) - 1) * spread / len(differences) ** 0.5
    return float(np.mean(differences)), half, spread


# What a part is worth: rows with it and without it. Of several files, the first has no teacher.
PARTS = {
    "relaxation, alpha = 0": ("hestia-no-hessian", "absmean"),
    "relaxation, at 1.5 mean|w|": ("hestia-wide", "absmean-wide"),
    "the scale 1.5 mean|w|, STE": ("absmean-wide", "absmean"),
    "the scale 1.5 mean|w|, HESTIA": ("hestia-wide", "hestia-no-hessian"),
    "leak": ("leak", "hestia-no-hessian"),
    "leak, at 1.5 mean|w|": ("leak-wide", "hestia-wide"),
    "guidance, against a common score": ("hestia", "hestia:scores=common"),
    "all, against the STE": ("leak-wide", "absmean"),
    "all, against the STE at 1.5 mean|w|": ("leak-wide", "absmean-wide"),
    "all, against HESTIA as printed": ("leak-wide", "hestia"),
}
TEACHER = {  # rows with a teacher and without
    "teacher, STE": ("absmean", "absmean"),
    "teacher, STE at 1.5 mean|w|": ("absmean-wide", "absmean-wide"),
    "teacher, HESTIA, alpha = 0": ("hestia-no-hessian", "hestia-no-hessian"),
    "teacher, HESTIA at 1.5 mean|w|": ("hestia-wide", "hestia-wide"),
    "teacher, all": ("leak-wide", "leak-wide"),
    "all with a teacher, against HESTIA as printed": ("leak-wide", "hestia"),
}


def worth(files, split):
    """{part: [(mean, half width of its 95 % interval, standard deviation) or None, for each file]}.

    files: contents of results.json, of the same seeds and texts. None where a row is not there.
    """
    found = {}
    for part, (row, other) in PARTS.items():
        found[part] = [paired(file["per_seed"], row, other, split)
                       if {row, other} <= {*file["per_seed"][0]} else None for file in files]
    first = files[0]["per_seed"]
    for part, (row, other) in TEACHER.items():
        found[part] = [None]
        for file in files[1:]:
            both = [{"with": b.get(row), "without": a.get(other)}
                    for a, b in zip(first, file["per_seed"], strict=True)]
            known = all(both[0].values())
            found[part].append(paired(both, "with", "without", split) if known else None)
    return {part: each for part, each in found.items() if any(each)}


# --------------------------------------------------------------------------------------------------
# tables


def print_columns(head, rows):
    """A Markdown table that can be read as it is. Columns that are empty are left out."""
    kept = [i for i, cells in enumerate(zip(*rows)) if i == 0 or any(cells)]
    head, *rows = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]
    for line in (head, None, *rows):
        if line is None:
            print("|" + "|".join(rule) + "|")
            continue
        cells = [text.rjust(width) for text, width in zip(line, widths)]
        cells[0] = line[0].ljust(widths[0])
        print("| " + " | ".join(cells) + " |")


def print_table(results):
    """The losses of every row, the gap it recovered, and what it took."""
    table, llama = plots.summarize(results["per_seed"]), results["config"].get("llama")
    first = next(iter(table.values()))
    splits = [split for split in SPLITS if split in first]
    rates = {columns["lr"][0] for columns in table.values() if "lr" in columns}

    def cell(row, column, digits, scale=1.0, unit="", spread=True):
        mean, deviation = table[row].get(column, (None, None))
        if mean is None:
            return ""
        several = f" ± {scale * deviation:.{digits}f}" if spread and deviation is not None else ""
        return f"{scale * mean:.{digits}f}{several}{unit}"

    head = ["", *(SPLITS[split] for split in splits)]
    head += ["gap recovered, train", "gap recovered, validation", "changed in last tenth"]
    head += ["bits per weight", "learning rate", "seconds"]
    head += [f"perplexity, {SPLITS[split]}" for split in splits[1:]]
    rows = []
    for row, columns in table.items():
        name = label(row) + ", continued" * (row == "full")
        line = [name, *(cell(row, split, 4) for split in splits)]
        for split in ("train", "val"):
            line.append(cell(row, f"gap_{split}", 0, 100, " %"))
        line += [cell(row, "changed_last_tenth", 2, 100, " %"), cell(row, "bits", 2, spread=False)]
        line.append(f"{columns['lr'][0]:g}" if len(rates) > 1 and "lr" in columns else "")
        line.append(cell(row, "seconds", 0))
        for split in splits[1:]:
            line.append(f"{math.exp(min(99.0, columns[split][0])):.2f}" if llama else "")
        rows.append(line)
    print_columns(head, rows)
    needed = [f"{rivals.EXTRA[row]} ({label(row)})" for row in table if row in rivals.EXTRA]
    if needed:
        print("\nInference also needs: " + "; ".join(needed) + ".")


def print_paired(per_seed):
    """Each row minus AbsMean STE and minus HESTIA, seed by seed."""
    others = [other for other in ("absmean", "hestia") if other in per_seed[0]]
    names = [name for name in per_seed[0] if name not in ("before", "untrained", "full")]
    if len(per_seed) < 2 or not others or len(names) < 2:
        return
    head, rows = ["difference, seed by seed, ± 95 %"], []
    for other in others:
        head += [f"train − {label(other)}", f"validation − {label(other)}"]
    for name in names:
        line = [label(name)]
        for other in others:
            for split in ("train", "val"):
                mean, half, _ = paired(per_seed, name, other, split)
                text = f"{mean:+.4f} ± {half:.4f}"
                text = text if abs(mean) > half else f"({text})"
                line.append("" if name == other else text)
        rows.append(line)
    print_columns(head, rows)
    print("\nIn brackets where the interval holds zero: no difference was seen.")


def print_worth(files):
    """What each part adds to the loss, on two texts, without a teacher and with it."""
    for file in files[1:]:
        for key in ("sha256", "unit"):
            if file["data"][key] != files[0]["data"][key]:
                raise ValueError("the files are of different texts")
    splits = [split for split in ("val", "test") if split in files[0]["per_seed"][0]["before"]]
    splits = splits if len(splits) == 2 else ["train", *splits]
    names = [f"teacher {d:g}" if (d := file["config"].get("distill")) else "cross-entropy"
             for file in files]
    found = [worth(files, split) for split in splits]
    rows = []
    for part in found[0]:
        line = [part]
        for k in range(len(files)):
            for each in found:
                mean, half, _ = each[part][k] or (None, None, None)
                text = "" if mean is None else f"{mean:+.4f} ± {half:.4f}"
                line.append(text if mean is None or abs(mean) > half else f"({text})")
        rows.append(line)
    head = [f"{SPLITS[split]}, {name}" for name in names for split in splits]
    print_columns(["what it adds to the loss, ± 95 %", *head], rows)
    print("\nIn brackets where the interval holds zero: no difference was seen.")


def print_bench(rows):
    """What a step costs: medians over the rounds [least, largest]. A ratio compares two runs of one
    round."""

    def cell(values, form):
        if not values:
            return ""
        ends = f" [{min(values):{form}}, {max(values):{form}}]" if len(values) > 1 else ""
        return f"{np.median(values):{form}}{ends}"

    head = {"": "", "ms": "ms", "over": "over full precision", "of_step": "of the step",
            "tokens_per_s": "tokens/s", "tflops": "model TFLOP/s", "of_held": "of the held rate",
            "of_matrix_rate": "of the matrix rate", "of_copy_rate": "of the copy rate",
            "GiB": "GiB", "MHz": "MHz", "watts": "W"}
    forms = {"ms": ".2f", "over": ".3f", "tokens_per_s": ".0f", "tflops": ".4g", "GiB": ".2f",
             "MHz": ".0f", "watts": ".0f"}  # others are shares
    held = {row["setting"]: row["tflops"] for row in rows if row["mode"].startswith("products, ")
            and "^3" in row["mode"]}  # of each machine, by lab/bench.py's mode "rate"
    for setting in dict.fromkeys(row["setting"] for row in rows):
        rate = next((held[machine] for machine in held if setting.startswith(machine + ", ")), None)
        modes = {}  # {mode: {round: what was measured}}
        for row in rows:
            if row["setting"] == setting:
                modes.setdefault(row["mode"], {})[row["round"]] = row
        full, ours = modes.get("full", {}), modes.get("hestia", {})
        lines, compared = [], []
        for mode, rounds in modes.items():
            name = MODES.get(mode, mode)
            ms = {turn: row["ms"] for turn, row in rounds.items()}
            for turn, row in rounds.items():
                more = {"over": ms[turn] / full[turn]["ms"]} if turn in full else {}
                if rate and "tflops" in row:
                    more["of_held"] = row["tflops"] / rate
                rounds[turn] = row | more
            lines.append([name])
            for key in [*head][1:]:
                values = [row[key] for row in rounds.values() if key in row]
                lines[-1].append(cell(values, forms.get(key, ".1%")))
            times = [ours[turn]["ms"] / ms[turn] for turn in ms if turn in ours]
            if times and mode != "hestia":
                compared.append(f"{cell(times, '.3f')} times {name}")
        print(f"\n{setting}\n")
        print_columns([*head.values()], lines)
        if compared:
            print("\nHESTIA's step takes " + "; ".join(compared))


def print_estimators(study):
    """How far estimated traces are from the exact ones, and what that does to the scores."""
    head = ["estimator", "products", "relative error, rms", "of the median tensor"]
    head += ["Spearman with the exact traces", "mean difference of the scores"]
    rows = []
    for name, points in study["curves"].items():
        for products, found in points.items():
            line = [name, products, f"{found['rms_over_all']:.3f}"]
            line += [f"{found['rms_of_median_tensor']:.3f}", f"{found['spearman']:.3f}"]
            rows.append([*line, f"{found['score_difference']:.4f}"])
    print_columns(head, rows)


def print_cost(study):
    """What the traces of a large model cost."""
    print(f"{study['tensors']} tensors, {study['products']} products, {study['hardware']}\n")
    rows = []
    for row in study["rows"]:
        per_tensor = row.get("hutchpp_extrapolated")
        line = [str(row["sequences_per_batch"]), f"{row['joint_seconds']:.1f} s"]
        line += [f"{row['joint_GiB']:.0f} GiB", f"{per_tensor:.0f} s" if per_tensor else ""]
        rows.append([*line, f"{row['ratio']:.0f}" if per_tensor else ""])
    print_columns(["sequences at once", "joint", "memory", "Hutch++, extrapolated", "ratio"], rows)


def show(path, *others):
    """Print the tables of a file, or of some together. ValueError or LookupError: it has none."""
    found, *more = [json.loads(Path(file).read_text(encoding="utf-8")) for file in (path, *others)]
    if more:
        print_worth([found, *more])
    elif isinstance(found, list):
        print_bench(found)
    elif "scores" in found:
        from notebooks.lab import zeroshot  # late: it imports this file

        zeroshot.print_scores(found["scores"])
    elif "consumers" in found:
        from notebooks.lab import consumers  # late: it is rarely wanted

        consumers.print_rows(found["consumers"])
    elif "models" in found:
        from notebooks.lab import measures  # late: it imports this file

        measures.print_measures(found)
    elif "curves" in found:
        print_estimators(found)
    elif "rows" in found:
        print_cost(found)
    else:
        print_table(found)
        print()
        print_paired(found["per_seed"])


def main(arguments=None):
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.tables", description=description,
                                     epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", help="a .json that holds results")
    files = parser.parse_args(arguments).files
    try:
        show(*files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        print(f"{' '.join(files)} holds no results that can be shown ({error})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(main())
