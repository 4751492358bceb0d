"""Other estimators of a tensor's sensitivity than the paper's, and the study that compares them.

    python -m notebooks.lab.curvature            # the study: 15 minutes on one CPU core
    python -m notebooks.lab.curvature --fast     # a smaller model, fewer seeds: half a minute
    python -m notebooks.lab.curvature --cost 1b  # time and memory at Llama-3.2-1B's shapes

hestia.hessian_traces has the paper's estimator, Hutch++, and the joint one. Here are three
stand-ins for the trace: Fisher's, the gradient's norm, and the error of rounding. `sensitivities`
calls any of the five by its name.

The study builds the exact Hessian of a small trained Llama, in float64, column by column. It
measures how far estimates are from its traces, and what that does to the scores of Eq. (13). It
also tries three misreadings of Eq. (12), compares 20 with 50 samples, and counts negative traces.
It writes curvature.json, curvature-fast.json or curvature-cost-1b.json to notebooks/results/.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hestia
from notebooks.lab import fast

RESULTS = Path(__file__).resolve().parents[1] / "results"

# --------------------------------------------------------------------------------------------------
# estimators


def gradients(what, value, params, **how):
    """The gradients of a number for {name: tensor}. ValueError names those it does not depend on:
    their gradients would be None, and a trace of 0 would look like an insensitive tensor."""
    grads = [None] * len(params)
    if value.requires_grad:
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True, **how)
    if lost := [name for name, g in zip(params, grads) if g is None]:
        raise ValueError(f"the {what} not depend on {', '.join(lost)}; give the model's own "
                         "tensors, and checkpoint with use_reentrant=False")
    return grads


@torch.enable_grad()
def fisher_traces(logits_fn, params, batches, samples=20, *, generator=None, progress=None):
    """Traces of the Gauss-Newton matrix G (Fisher's): near the Hessian's, and never negative.

    With labels drawn from the model's own distribution, E[T ||dL/dW_i||^2] = Tr(G_i), where L is
    the mean loss over a batch's T tokens. So one backward pass gives a reading of every tensor.

    logits_fn(batch) -> (..., V). samples: backward passes per batch. The rest is as in
    `hestia.hessian_traces`. Returns {name: TraceEstimate}, in nats per squared weight. ValueError
    says what cannot be used.

    >>> b = torch.zeros(3, requires_grad=True)  # logits of one token: G = diag(pi) - pi pi^T
    >>> round(fisher_traces(lambda batch: b.view(1, 3), {"b": b}, [None], 4)["b"].value, 4)
    0.6667
    """
    batches, weights = list(batches), list(params.values())
    if samples < 1 or not batches or not weights:
        raise ValueError(f"{samples} samples, {len(batches)} calibration batches, {len(weights)} "
                         "tensors; a trace needs at least one of each")
    for name, w in params.items():
        if not w.requires_grad or w.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: a trace needs float32 or float64 that requires grad")
    readings = torch.zeros(len(weights), samples, dtype=torch.float64)
    done = itertools.count(1)
    for batch in batches:
        logits = hestia._at_least_float32(logits_fn(batch)).flatten(0, -2)  # (T, V)
        probs = torch.softmax(logits.detach(), -1)
        for k in range(samples):
            labels = torch.multinomial(probs, 1, generator=generator).squeeze(1)  # (T,)
            loss = F.cross_entropy(logits, labels)
            grads = gradients("logits do", loss, params, retain_graph=True)
            t = [len(labels) * g.square().sum() for g in grads]
            readings[:, k] += torch.stack(t).cpu() / len(batches)
            if progress:
                progress(next(done), samples * len(batches))
        del logits, loss, grads  # and with them this batch's graph, before the next one is built
    return {name: hestia._estimate(0.0, t) for name, t in zip(params, readings)}


@torch.enable_grad()
def gradient_norms(loss_fn, params, batches):
    """||dL/dW_i|| of the mean loss over the batches. {name: float}, in nats per unit of weight.
    ValueError if the loss does not depend on a tensor.

    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> gradient_norms(lambda batch: batch * w.square().sum(), {"w": w}, [0.5, 1.5])
    {'w': 10.0}
    """
    total = {name: torch.zeros_like(w) for name, w in params.items()}
    for batch in batches:
        for name, g in zip(params, gradients("loss does", loss_fn(batch), params)):
            total[name] += g / len(batches)
    return {name: float(g.norm()) for name, g in total.items()}


def rounding_errors(params, group_size=None):
    """||W - Q(W)|| / ||W||, the relative error of rounding to ternary. {name: float}, no unit.

    >>> rounding_errors({"w": torch.tensor([3.0, -3.0, 0.0, 0.0])})  # gamma is 1.5
    {'w': 0.5}
    """
    errors = {}
    for name, w in params.items():
        w = w.detach()
        errors[name] = float((w - hestia.quantize(w, group_size)).norm() / w.norm())
    return errors


def sensitivities(config, model, params, batches, **how):
    """Another ranking of the tensors for train_tiny.py. Returns {name: TraceEstimate}.

    config.sensitivity: "fisher", "gradnorm" or "error"; config.group_size is for the last.
    model(x, y) -> mean loss, model(x) -> logits. params: {name: weight of a layer}. batches: a
    list of (x, y). how: as in `hestia.hessian_traces`.
    """
    if config.sensitivity == "fisher":
        how.pop("rank")
        return fisher_traces(lambda batch: model(batch[0]), params, batches, **how)
    if config.sensitivity == "gradnorm":
        found = gradient_norms(lambda batch: model(*batch), params, batches)
    elif config.sensitivity == "error":
        found = rounding_errors(params, config.group_size or None)
    else:
        raise ValueError(f"unknown sensitivity {config.sensitivity!r}; expected fisher, gradnorm "
                         "or error")
    return {name: hestia.TraceEstimate(value, 0.0) for name, value in found.items()}


# --------------------------------------------------------------------------------------------------
# the study: a small Llama, and the truth about it


class Size(NamedTuple):
    """How large a study is. products: of an estimator. The joint one also takes twice the last."""

    layers: int
    width: int
    intermediate: int
    steps: int
    seeds: int
    products: tuple


FULL = Size(4, 16, 40, steps=800, seeds=40, products=(8, 16, 24, 40, 80, 160, 320))
FAST = Size(1, 8, 16, steps=60, seeds=6, products=(8, 16, 40, 80))


def trained_llama(tokens, size, steps):
    """A small Llama after a training of this length, in float64. Always the same for a size."""
    torch.manual_seed(0)
    model = hestia.Llama(hestia.LlamaConfig(
        vocab_size=128, hidden_size=size.width, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=2, num_key_value_heads=1,
        rope_theta=10000.0))
    if steps:
        hestia.train(model, tokens, steps=steps, batch_size=16, block_size=64, lr=1e-2)
    return model.double()


def linear_weights(model):
    """{name: weight} of the layers that HESTIA quantizes, which leaves out frozen ones."""
    layers = hestia.linear_layers(model).items()
    return {name: layer.weight for name, layer in layers if layer.weight.requires_grad}


def gradient_and_hessian(model, batch, params):
    """Gradient (N,) and exact Hessian (N, N) of {name: tensor}, float64, one column per product."""
    weights = list(params.values())
    sizes = [w.numel() for w in weights]
    H = torch.empty(sum(sizes), sum(sizes), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        grads = gradients("loss does", model(*batch), params, create_graph=True)
        for k in range(len(H)):
            unit = torch.zeros(len(H), dtype=torch.float64)
            unit[k] = 1
            parts = [u.view_as(w) for u, w in zip(unit.split(sizes), weights)]
            column = hestia._hessian_product(grads, weights, parts)
            H[k] = torch.cat([c.flatten() for c in column])
            if k % 1000 == 999:
                print(f"    column {k + 1}/{len(H)}", flush=True)
    return torch.cat([g.detach().flatten() for g in grads]), H


# --------------------------------------------------------------------------------------------------
# the study: estimates, and how good they are


def joint_readings(H, sizes, a, probes, seed):
    """What each tensor reads from each product with H (N, N): (tensors, probes).

    hestia._joint_traces by matrix algebra. a: (tensors,), the factors of the probes.
    """
    signs = hestia._signs((len(H), probes), H, torch.Generator().manual_seed(seed))
    V = signs * a.repeat_interleave(torch.tensor(sizes))[:, None]
    readings = (V * (H @ V)).split(sizes)
    return torch.stack([t.sum(0) for t in readings]) / a[:, None] ** 2


def per_tensor(blocks, rank, samples, seed):
    """Hutch++ of every block, each from 2 rank + samples products of its own: (tensors,)."""
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for B in blocks:
        traces.append(hestia.hutchpp(B.matmul, len(B), rank, samples, generator, B.dtype))
    return np.array(traces)


def misread(blocks, rank, samples, seed, mistake):
    """Hutch++ with a mistake that a reader of Eq. (12) may make: (tensors,)."""
    generator = torch.Generator().manual_seed(seed)
    traces = []
    for B in blocks:
        S = hestia._signs((len(B), rank), B, generator)
        G = hestia._signs((len(B), samples), B, generator)
        Q = torch.linalg.qr(B @ S).Q
        if mistake == "S reused in G":
            G = torch.cat([S, G[:, rank:]], 1)
        if mistake != "G not projected":
            G = G - Q @ (Q.T @ G)
        rest = (G * (B @ G)).sum()
        if mistake != "no 1/m":
            rest = rest / samples
        traces.append(((Q * (B @ Q)).sum() + rest).item())
    return np.array(traces)


def spearman(a, b):
    """Rank correlation.

    >>> round(spearman([1, 2, 3], [10, 30, 20]), 4)
    0.5
    """
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def scores(traces):
    """Eq. (13) of an array of traces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # estimates that are not positive are raised, as they are
        found = hestia.sensitivity_scores({str(k): float(t) for k, t in enumerate(traces)})
    return np.array(list(found.values()))


def judged(estimates, exact):
    """How far estimates (seeds, tensors) are from the truth (tensors,), in traces and in scores."""
    relative = (np.asarray(estimates) - exact) / exact
    of_seed, of_tensor = np.sqrt((relative**2).mean(1)), np.sqrt((relative**2).mean(0))
    low, median, high = np.quantile(of_seed, [0.25, 0.5, 0.75])
    return {
        "rms": {"median": median, "q25": low, "q75": high, "n": len(of_seed)},
        "rms_over_all": float(np.sqrt((relative**2).mean())),
        "rms_of_median_tensor": float(np.median(of_tensor)),
        "worst_tensor": float(of_tensor.max()),
        "spearman": float(np.mean([spearman(e, exact) for e in estimates])),
        "score_difference": float(np.mean([abs(scores(e) - scores(exact)) for e in estimates])),
    }


def error_curves(size, H, blocks, exact, norms):
    """{estimator: {products, of all tensors together: how good}}."""
    tensors, sizes, seeds = len(blocks), [len(B) for B in blocks], range(size.seeds)
    plain, plus, joint = {}, {}, {"joint, unscaled": {}, "joint": {}}
    for products in size.products:
        r = products // 4  # the paper's shares: a quarter, a quarter, a half
        runs = [per_tensor(blocks, 0, products, seed) for seed in seeds]
        plain[products * tensors] = judged(runs, exact)
        runs = [per_tensor(blocks, r, products - 2 * r, seed) for seed in seeds]
        plus[products * tensors] = judged(runs, exact)
    H = H.float()  # faster. Exact traces in float32 agree to 1e-6
    for products in (*size.products, 2 * size.products[-1]):
        for name, a in (("joint, unscaled", torch.ones(tensors)), ("joint", 1 / norms.float())):
            means, squared_z = [], []
            for seed in seeds:
                t = joint_readings(H, sizes, a, products, seed).double()  # (tensors, products)
                mean, stderr = t.mean(1).numpy(), t.std(1).numpy() / products**0.5
                means.append(mean)
                squared_z.append(((mean - exact) / stderr) ** 2)
            joint[name][products] = judged(means, exact)
            joint[name][products]["mean_squared_z"] = float(np.mean(squared_z))  # 1, if honest
    return {"Hutchinson, per tensor": plain, "Hutch++, per tensor": plus, **joint}


def misreadings(size, blocks, exact):
    """What becomes of Hutch++ with 10, 10 and 20 products by each mistake."""
    found = {}
    for mistake in ("as it should be", "no 1/m", "S reused in G", "G not projected"):
        runs = np.array([misread(blocks, 10, 20, seed, mistake) for seed in range(size.seeds)])
        ratio = runs.mean(0) / exact
        found[mistake] = judged(runs, exact)
        found[mistake] |= {"mean_over_truth": ratio.tolist(),
                           "ratio_median": float(np.median(ratio))}
    return found


def samples_20_or_50(size, blocks):
    """The spread over seeds of scores and of first temperatures, with tau_init and alpha usual."""
    found = {}
    for m in (20, 50):
        s = np.array([scores(per_tensor(blocks, 10, m, seed)) for seed in range(size.seeds)])
        tau = 0.35 * np.exp(0.4 * s)  # Eq. (15)
        found[m] = {"score_sd": s.std(0, ddof=1).tolist(), "tau_sd": tau.std(0, ddof=1).tolist(),
                    "score_mean": s.mean(0).tolist()}
    return found


def fisher_for_hessian(size, model, batch, exact):
    """Fisher's traces with 8 and 20 backward passes, judged as if they were Hessian traces."""
    found, params = {}, linear_weights(model)
    for n in (8, 20):
        runs = []
        for seed in range(min(size.seeds, 10)):
            generator = torch.Generator().manual_seed(seed)
            traces = fisher_traces(lambda b: model(b[0]), params, [batch], n, generator=generator)
            runs.append([h.value for h in traces.values()])
        found[n] = judged(runs, exact)
        found[n]["over_hessian"] = (np.mean(runs, 0) / exact).tolist()
    return found


def negative_traces(size, tokens, model):
    """How many exact traces are negative, by age of the model and number of tokens."""
    found = []
    for steps in (0, size.steps // 8, size.steps):
        aged = model if steps == size.steps else trained_llama(tokens, size, steps)
        for sequences, length in ((1, 32), (8, 64)):
            x, y = hestia.batch_at(tokens, 0, sequences, 64, seed=99)
            traces = []
            for name, w in linear_weights(aged).items():
                _, H = gradient_and_hessian(aged, (x[:, :length], y[:, :length]), {name: w})
                traces.append(H.trace().item())
            below = sum(t < 0 for t in traces)
            found.append({"steps": steps, "tokens": sequences * length, "negative": below,
                          "of": len(traces), "traces": traces})
            print(f"    {steps} steps, {sequences * length} tokens: "
                  f"{below}/{len(traces)} negative", flush=True)
    return found


def study(tokens, size):
    """All that curvature.json holds, but for the command. tokens: (N,), below 128."""
    began = time.perf_counter()
    print("training, then the exact Hessian", flush=True)
    model = trained_llama(tokens, size, size.steps)
    batch = hestia.batch_at(tokens, 0, 8, 64, seed=99)
    params = linear_weights(model)
    g, H = gradient_and_hessian(model, batch, params)
    sizes = [w.numel() for w in params.values()]
    norms = torch.stack([part.norm() for part in g.split(sizes)])
    blocks, start = [], 0
    for n in sizes:
        blocks.append(H[start : start + n, start : start + n].contiguous())
        start += n
    exact = np.array([B.trace().item() for B in blocks])

    result = {
        "seeds": size.seeds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "model": {"tensors": len(sizes), "weights": sum(sizes), "steps": size.steps,
                  "calibration_tokens": batch[0].numel()},
        "names": list(params), "sizes": sizes,
        "exact": exact.tolist(), "exact_scores": scores(exact).tolist(),
    }
    print("error against products", flush=True)
    result["curves"] = error_curves(size, H, blocks, exact, norms)
    print("misreadings of Eq. (12)", flush=True)
    result["mutants"] = misreadings(size, blocks, exact)
    print("20 against 50 samples", flush=True)
    result["samples"] = samples_20_or_50(size, blocks)
    print("Fisher's traces", flush=True)
    result["fisher"] = fisher_for_hessian(size, model, batch, exact)
    errors = [e**2 for e in rounding_errors(params).values()]  # of squared norms, as published
    result["other"] = {"gradnorm": norms.tolist(), "error": errors}
    print("negative traces", flush=True)
    result["negatives"] = negative_traces(size, tokens, model)
    result["seconds"] = round(time.perf_counter() - began)
    return result


def print_study(result):
    def line(name, what, row):
        print(f"{name:40} {what}, Spearman {row['spearman']:.4f}, "
              f"mean |score difference| {row['score_difference']:.4f}")

    for name, curve in result["curves"].items():
        for products, row in curve.items():
            line(f"{name}, {products} products", f"rms error {row['rms_over_all']:.3f}, of the "
                 f"median tensor {row['rms_of_median_tensor']:.3f}", row)
    for name, row in result["mutants"].items():
        line(name, f"median of mean / truth {row['ratio_median']:.2f}", row)
    for n, row in result["fisher"].items():
        ratio = np.median(row["over_hessian"])
        line(f"Fisher, {n} backward passes", f"median over Hessian {ratio:.2f}", row)


# --------------------------------------------------------------------------------------------------
# what the traces of a large model cost

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {},  # LlamaConfig's defaults
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
}


def cost(shape, length=512):
    """Seconds and memory of 40 products at a Llama's shapes: 5 sequences of 512 tokens, TF32.

    joint: all tensors. Hutch++: q_proj and down_proj of the first, middle and last layer, whose
    mean stands for all.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    config = hestia.LlamaConfig(**SHAPES[shape])
    torch.manual_seed(0)
    with device:
        model = fast.Llama(config)  # never holds all logits
        ids = torch.randint(0, config.vocab_size, (5, length + 1))
    loss_fn = lambda batch: model(batch[:, :-1], batch[:, 1:])
    params, few = linear_weights(model), {}
    for n in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1):
        for name in (f"model.layers.{n}.self_attn.q_proj", f"model.layers.{n}.mlp.down_proj"):
            few[name] = params[name]

    def timed(tensors, batches, estimator, **products):
        """Seconds and GiB. The estimates end as floats, so the clock stops after the GPU."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        draws, clock = torch.Generator(device).manual_seed(0), time.perf_counter()
        hestia.hessian_traces(loss_fn, tensors, batches, estimator, **products, generator=draws)
        seconds = time.perf_counter() - clock
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None

    result = {"command": f"python -m notebooks.lab.curvature --cost {shape}",
              "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
              "torch": torch.__version__, "tensors": len(params),
              "weights": sum(w.numel() for w in params.values()), "products": 40,
              "hutchpp_measured_on": list(few), "rows": []}
    for sequences in (1, 5):
        batches = list(ids.split(sequences))
        row = {"sequences_per_batch": sequences}
        try:
            timed(params, batches[:1], "joint", rank=0, samples=1)  # warm-up
            row["joint_seconds"], row["joint_GiB"] = timed(params, batches, "joint")
            if shape != "3b":
                each = [timed({name: w}, batches, "hutchpp")[0] for name, w in few.items()]
                whole = float(np.mean(each)) * len(params)
                row |= {"hutchpp_seconds": each, "hutchpp_extrapolated": whole,
                        "ratio": whole / row["joint_seconds"]}
        except torch.OutOfMemoryError:
            print(f"{sequences} sequences at once do not fit", flush=True)
            continue
        result["rows"].append(row)
        print(row, flush=True)
        save(result, f"curvature-cost-{shape}.json")


# --------------------------------------------------------------------------------------------------


def save(result, name):
    """Write a file of notebooks/results, whole or not at all. Returns its path."""
    RESULTS.mkdir(exist_ok=True)
    aside = RESULTS / (name + ".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    os.replace(aside, RESULTS / name)
    return RESULTS / name


def main(arguments=None):
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.curvature", epilog=rest,
                                     description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smaller model and fewer seeds")
    parser.add_argument("--cost", choices=SHAPES, help="measure time and memory at these shapes")
    options = parser.parse_args(arguments)
    if options.cost:
        return cost(options.cost)

    import train_tiny  # here, because train_tiny.py imports this file for --sensitivity

    text, _ = train_tiny.standard_library()
    tokens = torch.frombuffer(bytearray(text[:1_000_000]), dtype=torch.uint8).clamp(max=127)
    command = "python -m notebooks.lab.curvature" + (" --fast" if options.fast else "")
    result = {"command": command, **study(tokens, FAST if options.fast else FULL)}
    path = save(result, "curvature-fast.json" if options.fast else "curvature.json")
    print_study(result)
    print(f"{path} after {result['seconds']} s")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    main()
