"""Section 5.5 as a command: what a training step costs, with HESTIA, the STE and without either.

    python -m notebooks.lab.bench                        # a tiny model, minutes on two CPU cores
    python -m notebooks.lab.bench --llama 1b             # the shapes of Llama-3.2-1B, on a GPU
    python -m notebooks.lab.bench --llama 1b --modes full absmean hestia --gpus 2 --out two.json

Modes take turns, each in a process of its own, with random tokens and weights:

    full, absmean, hestia   methods of hestia.py through lab/fast.py
    naive                   HESTIA as a softmax over all codes in every forward pass
    plain                   no Hestia at all: float32 weights, autocast on a GPU
    passes                  relax and pull_back alone, as shares of the rate of a copy
    products                matrix products alone, with W as each method shows it
    rate                    matrix products without a pause: the rates that the device holds
    profile                 where a step of HESTIA goes, by kernels
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hestia
from notebooks.lab import fast, parallel

MODES = ("full", "absmean", "hestia", "naive", "plain", "passes", "products", "rate", "profile")


def small(width, intermediate, layers):
    return dict(vocab_size=256, hidden_size=width, intermediate_size=intermediate,
                num_hidden_layers=layers, num_attention_heads=width // 32,
                num_key_value_heads=width // 64, rope_theta=10000.0)


SHAPES = {  # tiny: train_tiny.py's default, 0.6 M weights in linear layers
    "tiny": small(128, 384, 3), "0.1m": small(64, 192, 2), "1.7m": small(192, 512, 4),
    "8m": small(384, 1024, 5), "1b": dict(),
    "3b": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
}
KINDS = {  # of kernels and operators, by their names; the first that fits
    "attention": "flash|fmha|attention|sdpa|cudnn::fusion",
    "matrix products": "nvjet|gemm|cutlass|xmma|::mm|::addmm|::bmm",
    "AdamW": "adam|FusedOptimizer",
    "relax and pull_back": "copysign|exp2|softquantize",
    "the loss": "softmax|nll|logsumexp",
    "SwiGLU": "silu",
    "RMSNorm, and sums of branches": "rms_norm|rsqrt|::mean|MeanBackward|::pow|PowBackward",
    "sums of micro-batches": "functor.*add|::add_$",
    "norms of gradients": "LpNorm|lpnorm|NormTwoOps|vector_norm",
}
WARM_UP = 6  # steps that are not timed: the first five, and the last, which is logged


def options():
    """The parser. Its defaults suit the machine."""
    cuda = torch.cuda.is_available()
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.bench", description=about,
                                     epilog=more, formatter_class=argparse.RawTextHelpFormatter)

    def add(name, default, help, **kind):
        parser.add_argument("--" + name, default=default, help=f"{help} [{default}]", **kind)

    def above_zero(kind):
        def number(text):
            if not 0 < kind(text) < math.inf:
                raise argparse.ArgumentTypeError(f"{text} is not above 0")
            return kind(text)
        return number

    integer, flag = dict(type=above_zero(int)), dict(action=argparse.BooleanOptionalAction)
    add("llama", "tiny", f"{', '.join(SHAPES)} (random weights), or a Hugging Face folder")
    add("modes", MODES[:-2], "which of them", nargs="+", choices=MODES, metavar="MODE")
    add("micro", 8 if cuda else 32, "sequences per micro-batch", **integer)
    add("accumulate", [1, 4], "micro-batches per step and process", nargs="+", **integer)
    add("group-size", 128 if cuda else 64, "weights per scale", **integer)
    add("block-size", 1024 if cuda else 128, "tokens per sequence", **integer)
    add("rounds", 3, "how often the modes take turns", **integer)
    add("steps", 20 if cuda else 8, f"steps that are timed, beside {WARM_UP} others", **integer)
    add("gpus", 1, "GPUs (or CPU processes) that share every batch", **integer)
    add("seconds", 30.0, "of products without a pause, for rate", type=above_zero(float))
    add("tau", 0.3, "HESTIA's temperature at first; 0.001 is that of a training's last steps",
        type=above_zero(float))
    add("checkpointing", False, "of activations, layer by layer", **flag)
    add("compile", cuda, "torch.compile, and fused passes", **flag)
    add("out", "bench.json", "file of results; new ones are added")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    return parser


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    args = options().parse_args(arguments)
    if args.worker:
        work(args)
        return 0
    out, failed = Path(args.out), 0
    rows = json.loads(out.read_text("utf-8")) if out.exists() else []
    first = 1 + max((row["round"] for row in rows), default=-1)
    for turn in range(first, first + args.rounds):
        for mode in args.modes:
            several = f"-m torch.distributed.run --standalone --nproc-per-node={args.gpus}".split()
            command = [sys.executable, *(several if args.gpus > 1 else []), "-m",
                       "notebooks.lab.bench", *arguments, "--worker", mode]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
            found = [{"round": turn, **json.loads(line[7:])} for line in lines]
            print(f"round {turn}, {mode}:", *(f"{row['ms']:.2f} ms" for row in found), flush=True)
            if done.returncode:
                failed, said = 1, done.stderr.splitlines() or ["it said nothing"]
                why = next((line for line in said if "Error:" in line), said[-1])
                print(f"bench: {mode} failed: {why}", file=sys.stderr, flush=True)
            rows += found
            whole = out.with_suffix(".tmp")  # out is never half written
            whole.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
            os.replace(whole, out)
    from notebooks.lab import tables  # draws on matplotlib, which a worker does not need

    tables.print_bench(rows)
    return failed


# --------------------------------------------------------------------------------------------------
# Time on the device's own clock


def now(device):
    """A mark that the device passes when it gets there. The host does not wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a, b):
    """Milliseconds from one mark to another."""
    if isinstance(a, float):
        return 1e3 * (b - a)
    b.synchronize()
    return a.elapsed_time(b)


def timed(device, *works, repeat=13):
    """Median milliseconds of each work, done in turns. The first three turns are left out."""
    turns = []
    for _ in range(repeat):
        marks = [now(device)]
        for work in works:
            work()
            marks.append(now(device))
        turns.append(marks)
    return [float(np.median([between(marks[k], marks[k + 1]) for marks in turns[3:]]))
            for k in range(len(works))]


def ceilings(device, square):
    """TFLOP/s of a product of matrices like `square`; GB/s of a copy, bytes read and written."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    product, copy = timed(device, lambda: square @ square.T, lambda: target.copy_(source))
    return 2e-9 * len(square) ** 3 / product, 8e-6 * len(source) / copy


# --------------------------------------------------------------------------------------------------
# What is measured


def softmax_per_forward(w, p, tau, q, group_size):
    """Eqs. (7) to (9) by a softmax over a stacked codebook, whose every tensor autograd saves."""
    gamma = hestia.absmean_scale(w, group_size)  # (n_groups, 1)
    z = (w.view(-1, group_size) / gamma).unsqueeze(-1)  # (n_groups, g, 1)
    pi = torch.softmax(-((z - q) ** 2) / tau, -1)  # (n_groups, g, K)
    return (1 - p) * w + p * (gamma * (pi * q).sum(-1)).view_as(w)


class NaiveLinear(nn.Linear):
    """settings: p, tau and the codes, a tensor (2 + K,)."""

    def forward(self, x):
        p, tau, q = self.settings[0], self.settings[1], self.settings[2:]
        return F.linear(x, softmax_per_forward(self.weight, p, tau, q, self.group_size))


def work(args):
    """One mode, in this process. Prints a line "result {...}" for everything it measured."""
    cuda, mode = torch.cuda.is_available(), args.worker
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name()
    else:
        device, name = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
        torch.set_flush_denormal(True)  # gradients fade as tau falls, and denormal numbers are slow
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    fast.settle()
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    square = torch.randn(size, size, device=device, dtype=dtype)
    matrix_rate, copy_rate = ceilings(device, square)

    if args.llama in SHAPES:
        with device:
            model = hestia.Llama(hestia.LlamaConfig(**SHAPES[args.llama]))
    else:
        model = hestia.load_llama(args.llama, torch.float32, device)
    model, qat = fast.llama(model, args.checkpointing), None
    settings = torch.tensor([0.5, 0.3, *hestia.TERNARY], device=device)  # p, tau and the codes
    if mode == "naive":
        for layer in hestia.linear_layers(model).values():
            layer.__class__ = NaiveLinear
            layer.settings, layer.group_size = settings, args.group_size
    elif mode != "plain":
        kind = fast.Hestia if args.compile else hestia.Hestia
        method = mode if mode in hestia.METHODS else "hestia"
        qat = kind(model, args.steps + WARM_UP, method=method, group_size=args.group_size,
                   tau_init=args.tau, dtype=dtype)

    setting = f"{args.gpus} x {name}, torch {torch.__version__}, {args.llama}"
    setting += ", compiled" * args.compile + ", checkpointing" * args.checkpointing
    setting += f", tau {args.tau:g}" * (args.tau != 0.3)
    about = {"mode": mode, "setting": setting, "matrix_tflops": matrix_rate,
             "copy_gb_per_s": copy_rate}
    if mode == "passes":
        rows = passes(qat, device, square, settings, copy_rate)
    elif mode == "products":
        rows = products(qat, device)
    elif mode == "rate":
        rows = sustained(args, model, square)
    else:
        with parallel.together(cuda) if args.gpus > 1 else nullcontext():
            rows = (profile if mode == "profile" else training)(args, model, qat, settings, about)
    if int(os.environ.get("RANK", 0)) == 0:
        for row in rows:
            print("result " + json.dumps({**about, **row}))


def training(args, model, qat, settings, about):
    """A row for every accumulation: what a step of hestia.train took."""
    c, device, steps = model.config, settings.device, args.steps + WARM_UP
    weights = [layer.weight for layer in (*hestia.linear_layers(model).values(), model.lm_head)]
    flops = 6 * sum(w.numel() for w in weights)  # per token; then those of causal attention
    flops += 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * args.block_size
    tokens = torch.randint(c.vocab_size, (1 << 20,), device=device, dtype=torch.int32)
    model, backward, rows = torch.compile(model) if args.compile else model, hestia.backward, []
    if args.gpus > 1:
        model, backward = parallel.wrap(model, qat), parallel.backward
    for accumulate in args.accumulate:
        marks, memory = [], []

        def on_step(t, record, marks=marks, memory=memory):
            marks.append(now(device))
            p = hestia.pressure(t, steps, 0.2)
            tau = hestia.base_temperature(t, steps, 0.2, args.tau)
            settings[:2].copy_(torch.tensor([p, tau]), non_blocking=True)
            if t == WARM_UP - 2 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if t == steps - 2:
                memory.append(peak_memory(device) / 2**30)

        batch, update = args.micro * accumulate * args.gpus, fast.Update()
        hestia.train(model, tokens, steps=steps, batch_size=batch, block_size=args.block_size,
                     lr=1e-4, qat=qat, micro_batches=accumulate, backward=backward, update=update,
                     on_step=on_step, log_every=steps)
        update.flush()
        # from the end of the last step of the warm-up to the end of the one before the last
        laps = [between(a, b) for a, b in zip(marks[WARM_UP - 2 : -2], marks[WARM_UP - 1 : -1])]
        ms = float(np.median(laps))
        rate = 1e3 * batch * args.block_size / ms
        share = 1e-12 * rate * flops / args.gpus / about["matrix_tflops"]
        micro = f"{args.micro} x {args.block_size} tokens x {accumulate}"
        rows.append({"setting": f"{about['setting']}, {micro}", "ms": ms, "laps": laps,
                     "tokens_per_s": rate, "GiB": memory[0], "tflops": 1e-12 * rate * flops,
                     "of_matrix_rate": share})
    return rows


def kind_of(kernel):
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)),
                "all else")


def profile(args, model, qat, settings, about):
    """Milliseconds of a step by kinds of kernels, or of operators; the last of `accumulate`."""
    model, steps = torch.compile(model) if args.compile else model, args.steps + WARM_UP
    device, accumulate, marks = settings.device, args.accumulate[-1], []
    kind = "CUDA" if device.type == "cuda" else "CPU"
    profiler = torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)])

    def on_step(t, record):
        marks.append(now(device))
        if t in (WARM_UP - 1, steps - 1):  # all steps between them
            between(marks[-1], marks[-1])  # waits for the device
            profiler.start() if t < WARM_UP else profiler.stop()

    tokens = torch.randint(model.config.vocab_size, (1 << 20,), device=device, dtype=torch.int32)
    update = fast.Update()
    hestia.train(model, tokens, steps=steps, batch_size=args.micro * accumulate, lr=1e-4, qat=qat,
                 block_size=args.block_size, micro_batches=accumulate, update=update,
                 on_step=on_step, log_every=steps)
    update.flush()
    whole, found = between(marks[WARM_UP - 1], marks[-1]) / args.steps, {}
    for event in profiler.key_averages():
        us = event.self_device_time_total if kind == "CUDA" else event.self_cpu_time_total
        name = kind_of(event.key)
        found[name] = found.get(name, 0.0) + 1e-3 * us / args.steps
    found["nothing, or the profiler"] = whole - sum(found.values())
    micro = f"a step of {args.micro} x {args.block_size} tokens x {accumulate}, by kernels"
    return [{"setting": f"{about['setting']}, {micro}", "mode": name, "ms": ms,
             "of_step": ms / whole} for name, ms in found.items()]


def peak_memory(device):
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    from resource import RUSAGE_SELF, getrusage  # not on Windows

    return 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def passes(qat, device, square, settings, copy_rate):
    """relax and pull_back alone: bytes that must be read and written, over time. Then autograd
    through a softmax over a stacked codebook, in eager mode."""
    weights, latents = [layer.weight for layer in qat.layers.values()], list(qat.latents.values())
    grads = [torch.randn_like(w) for w in weights]

    def ahead():  # products to wait for: a GPU's host is then ahead of it, as it is in training
        give(latents, [None] * len(latents))  # a pull_back without a step would be refused
        qat.pulled = 0
        for _ in range(20 if device.type == "cuda" else 0):
            square @ square

    def give(to, grads):
        for w, grad in zip(to, grads):
            w.grad = grad

    def stacked():
        for w, grad in zip(latents, grads):
            W_eff = softmax_per_forward(w, settings[0], settings[1], settings[2:], qat.group_size)
            W_eff.to(grad.dtype).backward(grad)

    _, relax, _, pull = timed(device, ahead, lambda: qat.relax(1), lambda: give(weights, grads),
                              qat.pull_back)
    _, naive = timed(device, lambda: give(latents, [None] * len(latents)), stacked, repeat=6)
    n, narrow, rows = sum(w.numel() for w in latents), weights[0].element_size(), []
    for mode, ms, size in (("relax alone", relax, 4 + narrow),
                           ("pull_back alone", pull, 8 + narrow),
                           ("both by a stacked softmax, eager", naive, 12 + 2 * narrow)):
        rows.append({"mode": mode, "ms": ms, "of_copy_rate": 1e-6 * n * size / ms / copy_rate})
    return rows


def watch(device):
    """Begin to note a GPU's clock and power. Calling the result ends it: their medians, or {}."""
    if device.type != "cuda":
        return dict
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", which, "--query-gpu=clocks.sm,power.draw", "-lms", "500",
               "--format=csv,noheader,nounits"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end():
        child.terminate()
        noted = re.findall(r"([\d.]+), ([\d.]+)", child.communicate()[0])
        middle = np.median(np.float64(noted), 0).tolist() if noted else []
        return dict(zip(("MHz", "watts"), middle))

    return end


def sustained(args, model, square):
    """Products of random matrices without a pause: of the square, and all those of a micro-batch.
    Medians of the second half, in which the clock has settled."""
    device, dtype, tokens, pairs = square.device, square.dtype, args.micro * args.block_size, []
    for layer in (*hestia.linear_layers(model).values(), model.lm_head):
        w = layer.weight.detach().to(dtype)  # (m, n)
        m, n = w.shape
        x, dy = [torch.randn(tokens, size, device=device, dtype=dtype) for size in (n, m)]
        pairs.append((w, x, dy))

    def of_a_micro_batch():
        for w, x, dy in pairs:
            x @ w.T, dy @ w, dy.T @ x

    def repeated(work, seconds):
        """Milliseconds of each time. The host stays a little ahead of the device."""
        marks, began = [now(device)], time.perf_counter()
        while len(marks) == 1 or time.perf_counter() - began < seconds:
            work()
            marks.append(now(device))
            if device.type == "cuda" and len(marks) > 20:
                marks[-20].synchronize()
        return [between(a, b) for a, b in zip(marks, marks[1:])]

    flops, rows = 6 * tokens * sum(w.numel() for w, _, _ in pairs), []
    for mode, work, size in ((f"{len(square)}^3", lambda: square @ square, 2 * len(square) ** 3),
                             ("those of a micro-batch", of_a_micro_batch, flops)):
        repeated(work, args.seconds / 2)
        end = watch(device)
        ms = float(np.median(repeated(work, args.seconds / 2)))
        rows.append({"mode": f"products, {mode}, {args.seconds:g} s", "ms": ms,
                     "tflops": 1e-9 * size / ms, **end()})
    return rows


def products(qat, device):
    """A batch times the largest W and a gradient times it, with W as it is and as methods show it.

    At its power limit a GPU multiplies faster what takes less power.
    """
    name = max(qat.latents, key=lambda name: qat.latents[name].numel())
    w, dtype, g = qat.latents[name].detach(), qat.layers[name].weight.dtype, qat.group_size
    shown = {"W": w, "H(W; 0.3)": hestia.soft_quantize(w, 0.3, g),
             "H(W; 0.05)": hestia.soft_quantize(w, 0.05, g), "Q(W)": hestia.quantize(w, g)}
    tokens, pairs = (8192, 300) if device.type == "cuda" else (256, 1)
    x, dy = [torch.randn(tokens, n, device=device, dtype=dtype) for n in (w.shape[1], w.shape[0])]

    def multiply(v):
        for _ in range(pairs):
            x @ v.T, dy @ v

    works = []
    for v in shown.values():  # twice each: the power settles in the first
        works += [functools.partial(multiply, v.to(dtype))] * 2
    times = [ms / pairs for ms in timed(device, *works, repeat=9)[1::2]]
    return [{"mode": f"products with {name}", "ms": ms, "tflops": 4e-9 * tokens * w.numel() / ms}
            for name, ms in zip(shown, times)]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(main())
