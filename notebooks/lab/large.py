"""On paper: what HESTIA would take at 8 and 70 B parameters. Arithmetic, and one measured rate.

    python -m notebooks.lab.large        # the tables in RESULTS.md

Latents, gradients and moments are sharded, a part on each GPU, as torch's fully_shard does it.
Each GPU computes W_eff of its own shard, in bfloat16, before the shards are gathered for a layer.
The pass is elementwise, and groups lie within rows, so nothing else changes.
"""

import math
import sys

import torch

import hestia
from notebooks.lab import tables

SHAPES = {  # Llama-3.2's and Llama-3.1's
    "1B": dict(),
    "3B": dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               tie_word_embeddings=False),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, tie_word_embeddings=False),
}
RATE = 536e12  # FLOP/s of a step at 1B shapes on an H200: notebooks/results/bench-h200.json
MEMORY, ROOM = 141e9, 0.85  # bytes of an H200, and the share for all but activations
LINKS = {"NVLink": 450e9, "between hosts": 50e9}  # bytes/s one way for a GPU, nominal
TOKENS, MICRO = 2**20, 8192  # of a step, and of a micro-batch on a GPU
BYTES = {  # of a quantized weight, and of another: embedding, head, norms
    "latent W, or the weight itself": (4, 4),
    "AdamW's two moments": (8, 8),
    "W_eff, or a narrow copy": (2, 2),
    "dL/dW_eff": (2, 0),
    "dL/dW": (4, 4),
}


def sizes(shape):
    """(quantized weights, all others) of a Llama of this shape.

    >>> sizes("1B")
    (973078528, 262735872)
    """
    with torch.device("meta"):
        model = hestia.Llama(hestia.LlamaConfig(**SHAPES[shape]))
    linear = sum(layer.weight.numel() for layer in hestia.linear_layers(model).values())
    return linear, sum(p.numel() for p in model.parameters()) - linear


def memory(shape):
    """{part: bytes}, without activations.

    >>> round(sum(memory("3B").values()) / 2**30, 1)  # measured with activations: 62.2
    59.1
    """
    linear, rest = sizes(shape)
    return {part: a * linear + b * rest for part, (a, b) in BYTES.items()}


def flops_per_token(shape, length=1024):
    """Two for each product with a weight and with a key or value, three times: forward, backward.

    >>> f"{flops_per_token('1B'):.2e}"
    '7.62e+09'
    """
    c = hestia.LlamaConfig(**SHAPES[shape])
    products = sizes(shape)[0] + c.vocab_size * c.hidden_size
    attended = c.num_hidden_layers * c.num_attention_heads * c.head_dim * length  # causal: half
    return 6 * (products + attended)


def gathers(shape, gpus):
    """How often a step gathers the weights: once where a GPU can keep W_eff of the whole model,
    else for the forward and the backward pass of every micro-batch.

    >>> gathers("8B", 8), gathers("70B", 16)
    (1, 16)
    """
    whole = 2 * sum(sizes(shape))
    return 1 if whole < 0.15 * MEMORY else 2 * TOKENS // (gpus * MICRO)


def wire(shape, gpus, of_weight):
    """Bytes that a GPU receives in a step: gathered weights, and float32 gradients once.

    of_weight: bytes of a quantized weight as it travels. 4: W itself; 2: W_eff in bfloat16;
    0.27: codes of two bits and a scale for each 128, which are enough for the STE's hard weights.
    """
    linear, rest = sizes(shape)
    gathered = gathers(shape, gpus) * (of_weight * linear + 2 * rest)
    return (gathered + 4 * (linear + rest)) * (gpus - 1) / gpus


def main():
    names, rows = list(SHAPES), []
    kept = {shape: memory(shape) for shape in names}
    for part in BYTES:
        rows.append([part, *(f"{kept[shape][part] / 1e9:.1f} GB" for shape in names)])
    totals = {shape: sum(kept[shape].values()) for shape in names}
    gpus = {shape: math.ceil(totals[shape] / (ROOM * MEMORY)) for shape in names}
    gpus = {shape: 2 ** math.ceil(math.log2(n)) for shape, n in gpus.items()}
    rows.append(["all of it", *(f"{totals[shape] / 1e9:.0f} GB" for shape in names)])
    rows.append(["H200s that hold it, a power of two", *(str(gpus[shape]) for shape in names)])
    days = {shape: 10e9 * flops_per_token(shape) / RATE / 86400 for shape in names}
    rows.append(["GPU days for 10 B tokens", *(f"{days[shape]:.1f}" for shape in names)])
    many = {shape: max(8, gpus[shape]) for shape in names}
    step = {shape: TOKENS * flops_per_token(shape) / RATE / many[shape] for shape in names}
    rows.append(["GPUs, 8 or as many as hold it", *(str(many[shape]) for shape in names)])
    rows.append(["a step of 1 M tokens on them", *(f"{step[s]:.1f} s" for s in names)])
    rows.append(["gathers in a step", *(str(gathers(s, many[s])) for s in names)])
    for of_weight, what in ((4, "W in float32"), (2, "W_eff in bfloat16"), (0.27, "codes")):
        received = {s: wire(s, many[s], of_weight) for s in names}
        rows.append([f"a GPU receives, {what}", *(f"{received[s] / 1e9:.0f} GB" for s in names)])
        for link, rate in LINKS.items():
            rows.append([f"- which takes, {link}", *(f"{received[s] / rate:.1f} s" for s in names)])
    tables.print_columns(["", *names], rows)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    main()
