"""The study behind notebook 03: how well, and at what cost, do the estimators find the traces of a small trained Llama?

    python notebooks/curvature.py            # about 15 minutes on a CPU core; --fast: a smaller model, under a minute
    python notebooks/curvature.py --cost 1b  # time and memory at the shapes of Llama-3.2-1B (or 3b), on a GPU

Everything is compared with the exact Hessian in float64, built column by column. What it measures goes to
notebooks/results/curvature.json (curvature-fast.json with --fast): error against products, what it does to the scores,
what three misreadings of Eq. (12) do, when traces are negative, 20 against 50 samples, and the Fisher stand-in.
"""

import argparse
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import hestia  # noqa: E402
import train_tiny  # noqa: E402


def quantiles(values):
    """Median, quartiles and number of a list: what a figure's line and band need."""
    low, mid, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return {"median": mid, "q25": low, "q75": high, "n": len(values)}


def spearman(a, b):
    rank = lambda x: np.argsort(np.argsort(np.asarray(x)))
    return float(np.corrcoef(rank(a), rank(b))[0, 1])


class Llama:
    """A small Llama along its training, with what the study asks of it."""

    def __init__(self, layers, width, intermediate, tokens):
        torch.manual_seed(0)
        self.model = hestia.Llama(hestia.LlamaConfig(
            vocab_size=128, hidden_size=width, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, rope_theta=10000.0,
        ))  # fmt: skip
        self.tokens = tokens

    def train(self, steps):
        """From the initialization; the batches and the learning rate of a run of this length."""
        hestia.train(self.model.float(), self.tokens, steps=steps, batch_size=16, block_size=64, lr=1e-2)
        self.model.double()
        return self

    @property
    def params(self):
        return hestia.Hestia(self.model.double(), 1, method="full", group_size=None).weights

    def batch(self, sequences):
        return hestia.batch_at(self.tokens, 0, sequences, 64, seed=99)

    def loss(self, batch):
        return self.model(*batch)

    def hessian(self, batch):
        """Gradient (N,) and Hessian (N, N) of all quantized tensors, float64, one column per product."""
        params = self.params
        weights, sizes = list(params.values()), [w.numel() for w in params.values()]
        H = torch.empty(sum(sizes), sum(sizes), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            grads = hestia._gradients(self.loss, batch, weights)
            for k in range(len(H)):
                unit = torch.zeros(len(H), dtype=torch.float64)
                unit[k] = 1
                parts = [u.view_as(w) for u, w in zip(unit.split(sizes), weights)]
                H[k] = torch.cat([c.flatten() for c in hestia._hessian_product(grads, weights, parts)])
                if k % 1000 == 999:
                    print(f"    column {k + 1}/{len(H)}", flush=True)
        return torch.cat([g.detach().flatten() for g in grads]), H

    def exact_traces(self, batch):
        """{name: trace}, from each tensor's own block alone."""
        out = {}
        with sdpa_kernel(SDPBackend.MATH):
            for name, w in self.params.items():
                grads, total = hestia._gradients(self.loss, batch, [w]), 0.0
                for k in range(w.numel()):
                    unit = torch.zeros(w.numel(), dtype=torch.float64)
                    unit[k] = 1
                    total += hestia._hessian_product(grads, [w], [unit.view_as(w)])[0].view(-1)[k].item()
                out[name] = total
        return out


def joint_readings(H, sizes, alpha, probes, seed):
    """(tensors, probes): what each tensor reads from each product, by matrix algebra."""
    signs = hestia._signs((len(H), probes), H, torch.Generator().manual_seed(seed))
    V = signs * alpha.repeat_interleave(torch.tensor(sizes))[:, None]
    read = (V * (H @ V)).split(sizes)
    return torch.stack([r.sum(0) for r in read]) / alpha[:, None] ** 2


def per_tensor(blocks, rank, samples, seed, mutant=None):
    """The trace of every block, each from 2 rank + samples products with that block alone; or a mutant's."""
    generator = torch.Generator().manual_seed(seed)
    if mutant is None:
        run = lambda B: hestia._hutchpp(lambda V: B @ V, len(B), rank, samples, generator, B.dtype, "cpu").value
        return np.array([run(B) for B in blocks])
    out = []
    for B in blocks:
        S, G = (hestia._signs((len(B), k), B, generator) for k in (rank, samples))
        Q = torch.linalg.qr(B @ S).Q
        G = torch.cat([S, G[:, rank:]], 1) if mutant == "S reused in G" else G
        G = G if mutant == "G not projected" else G - Q @ (Q.T @ G)
        rest = (G * (B @ G)).sum() / (1 if mutant == "no 1/m" else samples)
        out.append(((Q * (B @ Q)).sum() + rest).item())
    return np.array(out)


def scores(traces):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(list(hestia.sensitivity_scores({str(k): float(t) for k, t in enumerate(traces)}).values()))


def judged(estimates, exact):
    """How far a list of estimates (seeds, tensors) is from the truth, in traces and in scores."""
    relative = (np.asarray(estimates) - exact) / exact
    return {
        "rms": quantiles(np.sqrt((relative**2).mean(1))),
        "rms_over_all": float(np.sqrt((relative**2).mean())),
        "rms_of_median_tensor": float(np.median(np.sqrt((relative**2).mean(0)))),
        "worst_tensor": float(np.sqrt((relative**2).mean(0)).max()),
        "spearman": float(np.mean([spearman(e, exact) for e in estimates])),
        "score_difference": float(np.mean([np.abs(scores(e) - scores(exact)).mean() for e in estimates])),
    }


SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "1b": {},  # LlamaConfig's defaults
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}  # fmt: skip


def cost(shape):
    """Seconds and memory of 40 products at a Llama's shapes: 5 sequences of 512 tokens, float32 with TF32 products.

    joint: all tensors. Hutch++: q_proj and down_proj of the first, middle and last layer, whose mean stands for all.
    """
    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    config = hestia.LlamaConfig(**SHAPES[shape])
    with torch.device("cuda" if cuda else "cpu"):
        torch.manual_seed(0)
        model = hestia.Llama(config)
        ids = torch.randint(0, config.vocab_size, (5, 513))
    params = hestia.Hestia(model, 1, method="full", group_size=None).weights
    layers = [f"model.layers.{n}." for n in (0, config.num_hidden_layers // 2, config.num_hidden_layers - 1)]
    few = {k: w for k, w in params.items() if k.startswith(tuple(layers)) and k.endswith(("q_proj", "down_proj"))}
    loss_fn = lambda batch: model(batch[:, :-1], batch[:, 1:])

    def timed(tensors, batches, estimator, **settings):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        generator, clock = torch.Generator().manual_seed(0), time.perf_counter()
        hestia.hessian_traces(loss_fn, tensors, batches, estimator, **settings, generator=generator)  # ends in floats
        return time.perf_counter() - clock, torch.cuda.max_memory_allocated() / 2**30 if cuda else None

    hardware = torch.cuda.get_device_name() if cuda else "cpu"
    result = {"command": f"python notebooks/curvature.py --cost {shape}", "hardware": hardware,
              "torch": torch.__version__, "tensors": len(params), "weights": sum(w.numel() for w in params.values()),
              "products": 40, "hutchpp_measured_on": list(few), "rows": []}  # fmt: skip
    for size in (1, 5):
        batches = list(ids.split(size))
        row = {"sequences_per_batch": size}
        result["rows"].append(row)
        try:
            timed(params, batches[:1], "joint", rank=0, samples=1)  # warm-up
            row["joint_seconds"], row["joint_GiB"] = timed(params, batches, "joint")
            each = [timed({k: w}, batches, "hutchpp")[0] for k, w in few.items()] if shape != "3b" else []
        except torch.OutOfMemoryError:
            print(f"{size} sequences at once do not fit", flush=True)
            continue
        if each:
            whole = float(np.mean(each)) * len(params)
            row |= {"hutchpp_seconds": each, "hutchpp_extrapolated": whole, "ratio": whole / row["joint_seconds"]}
        print({k: v if isinstance(v, list) or v is None else round(v, 3) for k, v in row.items()}, flush=True)
        train_tiny.save_json(here / "results" / f"curvature-cost-{shape}.json", result)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a smaller model and fewer seeds, to see that it runs")
    parser.add_argument("--cost", choices=list(SHAPES), help="time and memory at these shapes instead")
    arguments = parser.parse_args()
    if arguments.cost:
        return cost(arguments.cost)
    fast = arguments.fast
    began = time.perf_counter()
    text, _ = train_tiny.standard_library()
    tokens = torch.frombuffer(bytearray(text[:1_000_000]), dtype=torch.uint8).clamp(max=127)
    shape = (1, 8, 16, tokens) if fast else (4, 16, 40, tokens)
    steps, seeds = (60, 6) if fast else (800, 40)

    print("training, then the exact Hessian", flush=True)
    llama = Llama(*shape).train(steps)
    batch = llama.batch(8)
    g, H = llama.hessian(batch)
    names, sizes = list(llama.params), [w.numel() for w in llama.params.values()]
    starts = np.cumsum([0, *sizes[:-1]])
    blocks = [H[o : o + n, o : o + n].contiguous() for o, n in zip(starts, sizes)]
    exact = np.array([B.trace().item() for B in blocks])
    M, norms = len(names), torch.stack([part.norm() for part in g.split(sizes)])
    H = H.float()  # for speed; exact traces in float32 agree to 1e-6

    print("error against products", flush=True)
    curves = {name: {} for name in ("Hutchinson, per tensor", "Hutch++, per tensor", "joint, unscaled", "joint")}
    for products in (8, 16, 40, 80) if fast else (8, 16, 24, 40, 80, 160, 320):
        r = products // 4
        runs = {
            "Hutchinson, per tensor": [per_tensor(blocks, 0, products, s) for s in range(seeds)],
            "Hutch++, per tensor": [per_tensor(blocks, r, products - 2 * r, s) for s in range(seeds)],
        }
        for name, curve in runs.items():
            curves[name][products * M] = judged(curve, exact)
    for products in (8, 16, 40, 80) if fast else (8, 16, 24, 40, 80, 160, 320, 640):
        for name, alpha in (("joint, unscaled", torch.ones(M)), ("joint", 1 / norms.float())):
            read = [joint_readings(H, sizes, alpha, products, s).double() for s in range(seeds)]
            curve = judged([t.mean(1).numpy() for t in read], exact)
            z = [((t.mean(1).numpy() - exact) / (t.std(1).numpy() / products**0.5)) ** 2 for t in read]
            curves[name][products] = curve | {"mean_squared_z": float(np.mean(z))}

    print("misreadings of Eq. (12)", flush=True)
    mutants = {}
    for mutant in (None, "no 1/m", "S reused in G", "G not projected"):
        estimates = np.array([per_tensor(blocks, 10, 20, s, mutant) for s in range(seeds)])
        ratio = estimates.mean(0) / exact
        mutants[mutant or "as it should be"] = judged(estimates, exact) | {
            "mean_over_truth": ratio.tolist(), "ratio_median": float(np.median(ratio)),
        }  # fmt: skip

    print("20 against 50 samples", flush=True)
    samples = {}
    for m in (20, 50):
        s = np.array([scores(per_tensor(blocks, 10, m, seed)) for seed in range(seeds)])
        tau = 0.35 * np.exp(0.4 * s)  # Eq. (15) at the start, alpha = 0.4
        samples[m] = {"score_sd": s.std(0, ddof=1).tolist(), "tau_sd": tau.std(0, ddof=1).tolist(),
                      "score_mean": s.mean(0).tolist()}  # fmt: skip

    print("the Fisher stand-in", flush=True)
    logits = lambda batch: llama.model(batch[0])
    fisher = {}
    for n in (8, 20):
        runs = [hestia.fisher_traces(logits, llama.params, [batch], n, generator=torch.Generator().manual_seed(s))
                for s in range(min(seeds, 10))]  # fmt: skip
        values = np.array([[h.value for h in run.values()] for run in runs])
        fisher[n] = judged(values, exact) | {"over_hessian": (values.mean(0) / exact).tolist()}
    weights = [w.detach() for w in llama.params.values()]
    other = {"gradnorm": norms.tolist(),
             "error": [float((w - hestia.quantize(w)).square().sum() / w.square().sum()) for w in weights]}  # fmt: skip

    print("negative traces", flush=True)
    negatives = []
    for at in (0, steps // 8, steps):
        young = Llama(*shape)
        young = young if at == 0 else llama if at == steps else young.train(at)
        for sequences, length in ((1, 32), (8, 64)):
            x, y = young.batch(sequences)
            traces = young.exact_traces((x[:, :length], y[:, :length]))
            below = sum(t < 0 for t in traces.values())
            negatives.append({"steps": at, "tokens": sequences * length, "negative": below, "of": M,
                              "traces": list(traces.values())})  # fmt: skip
            print(f"    {at} steps, {sequences * length} tokens: {below}/{M} negative", flush=True)

    result = {
        "command": "python notebooks/curvature.py" + (" --fast" if fast else ""), "seeds": seeds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - began),
        "model": {"tensors": M, "weights": sum(sizes), "steps": steps, "calibration_tokens": batch[0].numel()},
        "names": names, "sizes": sizes, "exact": exact.tolist(), "exact_scores": scores(exact).tolist(),
        "curves": curves, "mutants": mutants, "samples": samples, "fisher": fisher, "other": other,
        "negatives": negatives,
    }  # fmt: skip
    path = here / "results" / ("curvature-fast.json" if fast else "curvature.json")
    train_tiny.save_json(path, result)
    line = lambda name, what, row: print(f"{name:42} {what}, Spearman {row['spearman']:.4f}, "
                                         f"mean |score difference| {row['score_difference']:.4f}")  # fmt: skip
    for name, curve in curves.items():
        for products, row in curve.items():
            errors = f"rms error {row['rms_over_all']:.3f}, of the median tensor {row['rms_of_median_tensor']:.3f}"
            line(f"{name}, {products} products", errors, row)
    for name, row in mutants.items():
        line(name, f"median of mean / truth {row['ratio_median']:.2f}", row)
    for n, row in fisher.items():
        line(f"Fisher, {n} backward passes", f"median over Hessian {np.median(row['over_hessian']):.2f}", row)
    print(f"{path} after {result['seconds']} s")


if __name__ == "__main__":
    main()
