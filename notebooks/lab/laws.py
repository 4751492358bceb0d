r"""How long to train quantized: CO-QAT's law for the best share of the training, and our runs.

    python -m notebooks.lab.figures best_share     # draws it

CO-QAT (arXiv 2509.22935) splits a budget of D tokens into full precision first and quantization-
aware training after it. The best share f of the second part grows with S, the tokens per byte of
the quantized weights: f = exp(-a / ln S). The fit is over models of 86 M to 2.2 B parameters and
1 to 6 bits. a was read from a summary of the paper and was not fitted again here.

Our runs lie outside of it. On SmolLM2 we add 16.4 M tokens to 2 T: a share of 8e-6 where the law
asks for 0.55, and taken alone they are S = 0.62, below 1, where the law has no value. In the
default run of train_tiny.py S is 21 and a quarter of the steps is quantized, where the law says
0.11; but its tokens are bytes and its model is 140 times smaller than the smallest one fitted.
"""

import math

import numpy as np

import plots

A = 6.7297  # no unit. 10 % more or less gives f = 0.134 or 0.194 in place of 0.161 at S = 40

MODELS = {"1 B parameters": 1e9, "135 M parameters": 134.5e6}  # of the curves, ternary
RUNS = {  # what is drawn: (tokens, parameters, bits, share of quantized training)
    "SmolLM2, 2 T tokens and ours": (2e12 + 16.4e6, 134.5e6, 1.58, 16.4e6 / 2e12),
    "train_tiny.py, default": (640 * 32 * 128, 623_488, 1.58, 0.25),
}


def tokens_per_byte(tokens, parameters, bits):
    """S = D / (N B / 8). For a model of 1 B parameters at 2 bits, after 10 B tokens:

    >>> tokens_per_byte(10e9, 1e9, 2)
    40.0
    """
    return tokens / (parameters * bits / 8)


def best_share(S, a=A):
    """The share of the tokens that is best spent on quantized training. S: tokens per byte.

    >>> [round(best_share(tokens_per_byte(D, 1e9, 2)), 3) for D in (10e9, 100e9)]
    [0.161, 0.325]
    >>> round(best_share(tokens_per_byte(2e12, 134.5e6, 1.58)), 3)  # SmolLM2
    0.549
    """
    if S <= 1:
        raise ValueError(f"{S:.3g} tokens per byte of weights: the law begins above 1; take more "
                         "tokens or a smaller model")
    return math.exp(-a / math.log(S))


def shares(ax=None):
    """The law for a model of 1 B parameters and for one of 135 M, ternary, and our runs."""
    (ax,) = plots.panels(ax, 1, (6.2, 3.8))
    S = np.logspace(0.3, 5.5, 200)
    for look, (name, N) in zip(plots.LOOKS, MODELS.items()):
        ax.plot(S * N * 1.58 / 8, [*map(best_share, S)], label=name, **{**look, "marker": ""})
    for (name, (D, N, bits, share)), marker in zip(RUNS.items(), "oX"):
        best = best_share(tokens_per_byte(D, N, bits))
        ax.plot(D, share, marker, color=plots.BLACK, label=f"{name}: {share:.2g}, law {best:.2f}")
    ax.set_xscale("log")
    return plots.finish(ax, "CO-QAT's law: the longer the training, the larger the best share of "
                        "quantized training. Our runs lie outside", "tokens in all",
                        "best share of quantized training", legend="upper left")
