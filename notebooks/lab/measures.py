"""What else ranks tensors, and which measure foretells the rise of the loss when one is rounded?

    python -m notebooks.lab.measures                               # on the tiny Llama, three seeds
    python -m notebooks.lab.measures --llama FOLDER --data my.txt  # and on a Llama of yours

It rounds one tensor at a time to ternary, and asks which measure ranks the tensors as the loss
does: HESTIA's trace, HAWQ's eigenvalue (arXiv 1905.03696), HAWQ-V2's product (1911.03852),
AdaHessian's diagonal (2006.00719), QuIP's proxy (2307.13304) and others. It trains train_tiny.py's
Llama for three seeds, and keeps it in out/measures/. The same command goes on after an
interruption. The table is in notebooks/results/measures.json. Losses are in nats per token.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hestia
import plots
import train_tiny
from notebooks.lab import curvature, tables, texts

# --------------------------------------------------------------------------------------------------
# what else ranks tensors: HAWQ's eigenvalue, AdaHessian's diagonal, QuIP's proxy


def top_eigenvalue(matvec, v, products):
    """HAWQ: the eigenvalue of largest modulus of a symmetric operator, by power iteration.

    matvec: maps v, any shape, to H v. Returns the Rayleigh quotient v . H v / v . v at each
    product. The last one is the estimate; its step from the one before says whether it settled.

    >>> H = torch.tensor([[4.0, 1.0], [1.0, 2.0]])  # its largest eigenvalue is 3 + sqrt(2)
    >>> [round(x, 4) for x in top_eigenvalue(H.mv, torch.tensor([1.0, 0.0]), 4)]
    [4.0, 4.3529, 4.4062, 4.4132]
    """
    quotients = []
    for _ in range(products):
        v = v / v.norm()
        Hv = matvec(v)
        quotients.append(float((v * Hv).sum()))
        v = Hv
    return quotients


@torch.enable_grad()
def diagonals(loss_fn, params, batches, products=40, *, generator=None, progress=None):
    """AdaHessian: the Hessian's diagonal as the mean of z * (H z), of all tensors at once.

    The probes are those of the joint estimate: tensor j gets a_j z_j, random signs z_j times
    a_j = 1 / ||g_j||. The elements of one z_i * (H v)_i / a_i sum to a reading of the trace.
    Arguments as in `hestia.hessian_traces`. Returns ({name: D, w's shape}, {name: TraceEstimate of
    its sum}), in nats per squared weight.

    >>> w = torch.zeros(2, requires_grad=True)
    >>> loss = lambda batch: 2 * w[0] ** 2 + w[0] * w[1] + w[1] ** 2  # H = [[4, 1], [1, 2]]
    >>> D, _ = diagonals(loss, {"w": w}, [0], 1, generator=torch.Generator().manual_seed(0))
    >>> D["w"]  # signs that differ give (3, 1), equal ones (5, 3), and their mean is (4, 2)
    tensor([3., 1.])
    """
    batches, weights = list(batches), list(params.values())
    D = [torch.zeros_like(w) for w in weights]
    readings = torch.zeros(len(weights), products, dtype=torch.float64)
    done = itertools.count(1)
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            grads = curvature.gradients("loss does", loss_fn(batch), params, create_graph=True)
            norms = torch.stack([g.detach().norm() for g in grads])
            norms = norms / norms.max() if norms.any() else torch.ones_like(norms)
            a = 1 / norms.clamp_min(1e-3)  # (tensors,)
            for k in range(products):
                z = [hestia._signs(w.shape, w, generator) for w in weights]
                v = [a_j * z_j for a_j, z_j in zip(a, z)]
                Hv = hestia._hessian_product(grads, weights, v)
                for i in range(len(weights)):
                    reading = z[i] * Hv[i] / a[i]
                    D[i] += reading / (products * len(batches))
                    readings[i, k] += float(reading.sum(dtype=torch.float64)) / len(batches)
                if progress:
                    progress(next(done), products * len(batches))
            del grads, Hv  # and with them this batch's graph, before the next one is built
    return dict(zip(params, D)), {n: hestia._estimate(0.0, t) for n, t in zip(params, readings)}


@torch.no_grad()
def second_moments(model, names, ids):
    """QuIP's H = E[x x^T], the mean over the tokens of ids, of what these layers get as inputs.
    {name: (in_features, in_features)}."""
    found, hooks = {}, []
    for name in names:
        def hook(layer, inputs, name=name):
            x = inputs[0].flatten(0, -2)  # (B, T, C) -> (tokens, C)
            found[name] = x.T @ x / len(x)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def quip_proxy(change, H):
    """QuIP: tr(change H change^T), the mean squared change of a layer's output. A float.

    change: (out, in), rounded minus original weight. H: (in, in), of `second_moments`.

    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> round(quip_proxy(torch.tensor([[-0.4, -0.4]]), H), 4)  # (0.4, 0.4) rounded to (0, 0)
    0.96
    """
    return float((change @ H * change).sum())


def ldlq(w, H, group_size=None, codebook=hestia.TERNARY, scale=None):
    """QuIP's LDLQ: rounding column by column, each making up for the errors of those before it.

    With H = U D U^T, U upper triangular with ones on its diagonal, column k is rounded from
    w_k + sum over j < k of (w_j - rounded_j) U_jk. `quip_proxy` then is the sum of D_k times the
    squared error of that rounding. w: (out, in). H: (in, in), positive definite. The rest is as in
    `hestia.quantize`; gamma is that of w. Returns the rounded weight, w's shape.

    >>> H, w = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[0.4, 0.4]])
    >>> rounded = ldlq(w, H, codebook=(-1, 0, 1), scale=torch.ones(1, 1))
    >>> rounded, round(quip_proxy(rounded - w, H), 4)  # U_12 = 1/2: the target 0.6 is rounded to 1
    (tensor([[0., 1.]]), 0.56)
    """
    gamma = hestia.absmean_scale(w, group_size) if scale is None else scale  # (n_groups, 1)
    gamma = gamma.expand(-1, w.numel() // len(gamma)).reshape(w.shape)  # of each weight
    upper = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H = upper upper^T
    U, rounded = upper / upper.diagonal(), torch.zeros_like(w)
    for k in range(w.shape[1]):
        target = w[:, k] + (w[:, :k] - rounded[:, :k]) @ U[:k, k]  # (out,)
        rounded[:, k] = gamma[:, k] * hestia.nearest_code(target / gamma[:, k], codebook)
    return rounded


MEASURES = {  # {name: (what a table calls it, of the numbers that one tensor has)}
    "trace": ("HESTIA: Tr H", lambda x: x["trace"]),
    "trace/n": ("Tr H / n", lambda x: x["trace"] / x["n"]),
    "hawq": ("HAWQ: λ / n", lambda x: x["eigenvalue"] / x["n"]),
    "hawq-omega": ("HAWQ: λ ‖ΔW‖²", lambda x: x["eigenvalue"] * x["error"]),
    "hawq-v2": ("HAWQ-V2: (Tr H / n) ‖ΔW‖²", lambda x: x["trace"] / x["n"] * x["error"]),
    "error": ("‖ΔW‖² alone", lambda x: x["error"]),
    "gradnorm": ("gradient norm ‖g‖", lambda x: x["gradnorm"]),
    "fisher": ("Fisher: Tr G", lambda x: x["fisher"]),
    "adahessian": ("AdaHessian: Σ D ΔW²", lambda x: x["adahessian"]),
    "quip": ("QuIP: E‖ΔW x‖²", lambda x: x["proxy"]),
    "taylor": ("Taylor: g·ΔW + ½ ΔW·HΔW", lambda x: x["first"] + x["second"] / 2),
    "trial": ("the rise on other text", lambda x: x["trial"]),
}


def measured(x):
    """Each of MEASURES that the numbers x of a tensor allow: {measure: number}.

    Two layers of n = 2 weights. A has H = [[4, 1], [1, 2]] and moves by (0.05, -0.02); B has
    H = diag(1, 0.5) and moves by (0.1, 0.2). B is less curved and is hurt more:

    >>> A = dict(n=2, trace=6.0, eigenvalue=3 + 2**0.5, error=0.0029, first=0.0, second=0.0088)
    >>> B = dict(n=2, trace=1.5, eigenvalue=1.0, error=0.05, first=0.0, second=0.03)
    >>> for name, a in measured(A).items():
    ...     print(f"{name:10}  A {a:.4f}  B {measured(B)[name]:.4f}")
    trace       A 6.0000  B 1.5000
    trace/n     A 3.0000  B 0.7500
    hawq        A 2.2071  B 0.5000
    hawq-omega  A 0.0128  B 0.0500
    hawq-v2     A 0.0087  B 0.0375
    error       A 0.0029  B 0.0500
    taylor      A 0.0044  B 0.0150
    """
    found = {}
    for name, (_, formula) in MEASURES.items():
        with suppress(KeyError):  # what was not estimated for this tensor
            found[name] = formula(x)
    return found


@torch.no_grad()
def rises(model, params, batch, group_size=None, progress=None):
    """By how much the loss really rises if one tensor at a time is rounded. {name: nats per token}.

    model: a hestia.Llama. params: {name: weight} of linear layers in its blocks. batch: (ids,
    targets). What comes before a tensor's block is computed once.
    """
    (ids, targets), body, found = batch, model.model, {}
    cos, sin = model.rope(ids.shape[1], ids.device)

    def loss_from(x, depth):
        for block in body.layers[depth:]:
            x = block(x, cos, sin)
        return float(model.loss(body.norm(x), targets))

    x = body.embed_tokens(ids)  # (B, T, C)
    before = loss_from(x, 0)
    for depth, block in enumerate(body.layers):
        for name, w in params.items():
            if name.startswith(f"model.layers.{depth}."):
                original = w.data
                w.data = hestia.quantize(original, group_size)
                found[name] = loss_from(x, depth) - before
                w.data = original
                if progress:
                    progress(len(found), len(params))
        x = block(x, cos, sin)
    return found


# --------------------------------------------------------------------------------------------------
# the study of measures: which of them foretells the rise of the loss


class Budget(NamedTuple):
    """What is spent on the measures of a model."""

    seeds: int  # of a trained model; texts of a loaded one
    sequences: int  # of calibration
    others: int  # sequences on which the real rise is measured
    length: int  # tokens of a sequence
    products: int  # joint ones, for traces and diagonals
    samples: int  # backward passes, for Fisher's traces
    iterations: int  # of power iteration
    layers: int  # whose tensors are measured, from the first to the last at equal steps
    blocks: int  # of these, the layers whose tensors get an eigenvalue, one product at a time


def spread(items, count):
    """So many of these, from the first to the last at equal steps.

    >>> spread(range(30), 4)
    [0, 10, 19, 29]
    """
    return [items[round(k)] for k in np.linspace(0, len(items) - 1, min(count, len(items)))]


def countdown(what):
    """A progress(done, total) that prints a line with the time left."""
    began = time.perf_counter()

    def progress(done, total):
        left = (time.perf_counter() - began) / done * (total - done)
        if done % (total // 50 + 1) == 0 or done == total:
            end = "\n" if done == total else ""
            print(f"\r  {what}: {done}/{total}, {left:.0f} s left  ", end=end, flush=True)

    return progress


def by_probes(model, params, batch, change, budget, seed):
    """Facts of all tensors from joint products: trace, AdaHessian's sum, norm of the gradient."""
    loss_fn, draws = lambda batch: model(*batch), torch.Generator().manual_seed(seed)
    D, traces = diagonals(loss_fn, params, [batch], budget.products, generator=draws,
                          progress=countdown("joint products"))
    return {
        "trace": {name: h.value for name, h in traces.items()},
        "trace_stderr": {name: h.stderr for name, h in traces.items()},
        "adahessian": {name: float((D[name] * change[name] ** 2).sum()) for name in params},
        "gradnorm": curvature.gradient_norms(loss_fn, params, [batch]),
    }


def by_fisher(model, params, batch, change, budget, seed):
    draws = torch.Generator().manual_seed(seed)
    found = curvature.fisher_traces(lambda batch: model(batch[0]), params, [batch], budget.samples,
                          generator=draws, progress=countdown("Fisher's passes"))
    return {"fisher": {name: h.value for name, h in found.items()}}


def by_inputs(model, params, batch, change, budget, seed):
    H = second_moments(model, params, batch[0])
    return {"proxy": {name: quip_proxy(change[name], H[name]) for name in params}}


@torch.enable_grad()
def by_blocks(model, params, batch, change, budget, seed):
    """Facts that need products with one tensor's own block: the eigenvalue, and Taylor's terms.
    Power iteration starts at the gradient. That is our choice; HAWQ starts at random."""
    layers = [name.split(".")[2] for name in params]
    few = spread([*dict.fromkeys(layers)], budget.blocks)
    chosen = {name: w for layer, (name, w) in zip(layers, params.items()) if layer in few}
    facts = {"eigenvalue": {}, "settled": {}, "first": {}, "second": {}}
    progress = countdown("power iteration")
    with sdpa_kernel(SDPBackend.MATH):
        grads = curvature.gradients("loss does", model(*batch), chosen, create_graph=True)
        for done, ((name, w), g) in enumerate(zip(chosen.items(), grads), 1):
            product = lambda v, g=g, w=w: hestia._hessian_product([g], [w], [v])[0]
            quotients = top_eigenvalue(product, g.detach(), budget.iterations)
            facts["eigenvalue"][name] = quotients[-1]
            facts["settled"][name] = abs(quotients[-1] / quotients[-2] - 1)
            facts["first"][name] = float((g.detach() * change[name]).sum())
            facts["second"][name] = float((change[name] * product(change[name])).sum())
            progress(done, len(chosen))
    return facts


def facts_of(model, calibration, group_size, budget, seed, path, other=None):
    """All facts of a model on a text: {"facts": {fact: {tensor: number}}, "seconds": {stage: ...}}.

    calibration: (ids, targets). other: the same of another text, for the real rise. path: a file
    that keeps each stage when it is done, so that the same command goes on after an interruption.
    """
    few = {f"model.layers.{k}." for k in spread(range(len(model.model.layers)), budget.layers)}
    params = {name: w for name, w in curvature.linear_weights(model).items()
              if name.startswith((*few,))}
    change = {name: hestia.quantize(w.detach(), group_size) - w.detach()
              for name, w in params.items()}
    stages = {
        "sizes": lambda: {"n": {name: w.numel() for name, w in params.items()},
                          "error": {name: float(d.square().sum()) for name, d in change.items()}},
        "trial": lambda: {"trial": rises(model, params, calibration, group_size,
                                         countdown("rises of the loss"))},
    }
    if other:
        stages["rise"] = lambda: {"rise": rises(model, params, other, group_size,
                                                countdown("rises on other text"))}
    for make in (by_probes, by_fisher, by_inputs, by_blocks):
        stages[make.__name__] = lambda make=make: make(model, params, calibration, change, budget,
                                                       seed)
    settings = json.loads(json.dumps([*budget, group_size, seed]))
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if kept.get("settings") != settings:
        kept = {"settings": settings, "facts": {}, "seconds": {}}
    for stage, make in stages.items():
        if stage not in kept["seconds"]:
            began = time.perf_counter()
            kept["facts"] |= make()
            kept["seconds"][stage] = round(time.perf_counter() - began, 1)
            plots.write_json(path, kept)
    return kept


def correlations(per_seed, names):
    """{measure: Spearman's correlation with the rise, of each seed, over these tensors}.
    per_seed: [{fact: {tensor: number}}]. A measure is left out where a tensor lacks it."""
    found = {}
    for facts in per_seed:
        x = {name: {fact: values[name] for fact, values in facts.items() if name in values}
             for name in names}
        rows = [measured(x[name]) for name in names]
        for measure in MEASURES:
            if all(measure in row for row in rows):
                r = [row[measure] for row in rows], [x[name]["rise"] for name in names]
                found.setdefault(measure, []).append(curvature.spearman(*r))
    return found


def compare(kept):
    """The tables of a model, from what facts_of returns for each seed."""
    per_seed, found = [seed["facts"] for seed in kept], {}
    every, few = list(per_seed[0]["n"]), list(per_seed[0]["eigenvalue"])
    for names in (every, few) if few != every else (every,):
        table = {}
        for measure, each in correlations(per_seed, names).items():
            half = tables.t_95(len(each) - 1) * float(np.std(each, ddof=1)) / len(each) ** 0.5
            table[measure] = {"label": MEASURES[measure][0], "each": each,
                              "mean": float(np.mean(each)), "half": half}
        found[f"{len(names)} tensors"] = table
    short = lambda x: None if x is None else float(f"{x:.5g}")
    facts = {fact: [[short(seed[fact].get(name)) for name in every] for seed in per_seed]
             for fact in per_seed[0]}
    return {"tables": found, "seconds": [seed["seconds"] for seed in kept], "names": every,
            "facts": facts}


def ldlq_of(model, calibration, other, group_size, name):
    """QuIP's rounding of one matrix beside the usual one: proxies, squared rounding errors, and
    rises of the loss on other text. So that H can be factored, a hundredth of its mean diagonal is
    added to it, which is our choice."""
    w = model.get_submodule(name).weight
    H = second_moments(model, [name], calibration[0])[name]
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    found, original = {"tensor": name}, w.data
    ways = {"plain": hestia.quantize(original, group_size), "ldlq": ldlq(original, H, group_size)}
    with torch.no_grad():
        before = float(model(*other))
        for way, rounded in ways.items():
            w.data = rounded
            found[way] = {"proxy": quip_proxy(rounded - original, H),
                          "error": float((rounded - original).square().sum()),
                          "rise": float(model(*other)) - before}
            w.data = original
    return found


TINY = Budget(3, 16, 16, 128, products=40, samples=20, iterations=12, layers=3, blocks=3)
LOADED = Budget(2, 1, 4, 128, products=16, samples=8, iterations=3, layers=10, blocks=3)


def measures(llama="", data=""):
    """The study of measures: the tiny Llama, and a loaded one if there is one. Prints the table."""
    torch.set_flush_denormal(True)
    folder, began, entries = Path("out/measures"), time.perf_counter(), []
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    config = train_tiny.parse(["--methods", "absmean", "--device", "cpu", "--save-minutes", "1"])
    train_tiny.check(config)
    tokens, text = train_tiny.load_text(config)
    kept, roundings = [], []
    for seed in range(TINY.seeds):  # each has a model of its own
        model, _ = train_tiny.begin(config, tokens, seed, folder)
        calibration, other = (
            hestia.batch_at(tokens["train"], k, sequences, TINY.length, 10_000 + seed)
            for k, sequences in enumerate((TINY.sequences, TINY.others)))
        found = facts_of(model, calibration, config.group_size, TINY, seed,
                         folder / f"tiny-facts{seed}.json", other)
        kept.append(found)
        hurt_most = max(found["facts"]["rise"], key=found["facts"]["rise"].get)
        roundings.append(ldlq_of(model, calibration, other, config.group_size, hurt_most))
    entries.append({"model": "tiny Llama", "text": text, "budget": TINY._asdict(),
                    "group_size": config.group_size, "ldlq": roundings, **compare(kept)})
    command = "python -m notebooks.lab.measures"
    if llama:
        name, source = Path(llama).name, Path(data).name
        command += f" --llama {name} --data {source}"
        config = train_tiny.parse(["--llama", llama, "--data", data, "--group-size", "64"])
        tokens, text = texts.load(config)
        model, tokens = hestia.load_llama(llama, torch.float32), torch.tensor(tokens["train"])
        other = hestia.batch_at(tokens, LOADED.seeds, LOADED.others, LOADED.length, 10_000)
        kept = []
        for k in range(LOADED.seeds):  # one model, several texts of calibration, one real rise
            calibration = hestia.batch_at(tokens, k, LOADED.sequences, LOADED.length, 10_000)
            kept.append(facts_of(model, calibration, config.group_size, LOADED, k,
                                 folder / f"{name}-facts{k}.json", None if k else other))
            kept[k]["facts"]["rise"] = kept[0]["facts"]["rise"]
        entries.append({"model": name, "text": text | {"source": source},
                        "budget": LOADED._asdict(), "group_size": config.group_size,
                        **compare(kept)})
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty'
    failed, commit = subprocess.getstatusoutput(git)
    result = {"command": command,
              "commit": None if failed else commit,
              "versions": {"python": platform.python_version(), "torch": torch.__version__},
              "hardware": {"device": platform.machine(), "threads": torch.get_num_threads()},
              "seconds_of_last_session": round(time.perf_counter() - began), "models": entries}
    path = curvature.save(result, "measures.json")
    print_measures(result)
    print(f"\n{path}")


def print_measures(result):
    """Markdown tables: Spearman's correlation of each measure with the rise of the loss."""
    for entry in result["models"]:
        budget = entry["budget"]
        n = budget["sequences"] * budget["length"]
        for which, table in entry["tables"].items():
            head = [f"{entry['model']}, {which}", f"mean of {budget['seeds']}, {n:,} tokens each",
                    "± 95 %", "least", "most"]
            rows = []
            for row in sorted(table.values(), key=lambda row: -row["mean"]):
                mean, half, each = row["mean"], row["half"], row["each"]
                half = f"{half:.2f}" if len(each) > 2 else ""  # of two it would say nothing
                rows.append([row["label"], f"{mean:.2f}", half, f"{min(each):.2f}",
                             f"{max(each):.2f}"])
            print()
            tables.print_columns(head, rows)


def main(arguments=None):
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.measures", description=about,
                                     epilog=more,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama", default="", metavar="FOLDER", help="a trained Llama, too")
    parser.add_argument("--data", default="", metavar="FILE", help="a text for it")
    options = parser.parse_args(arguments)
    if bool(options.llama) != bool(options.data):
        parser.exit(2, "--llama and --data need each other: a Llama, and a text for it\n")
    try:
        measures(options.llama, options.data)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    main()
