r"""The first question of readers: can activations be relaxed by the same softmax? Does it help?

    python -m notebooks.lab.activations --seeds 3 --sensitivity error --out out/activations
    python -m notebooks.lab.activations --show notebooks/results/activations.json

The first is a study (notebooks/lab/study.py, whose options it takes) of ternary weights and ROWS.
The second prints the differences. Not with --compile, which would compile anew at every step.

The paper quantizes weights only. This is our construction. A layer's input x, (n_in,) for a token,
has the scale s = max|x| / q, detached, and the levels -q ... q. Then Eq. (8) holds with z = x / s:
H = s * sum of k * pi(k), pi the softmax of -(z - k)^2 / tau over all levels, and dH/dx is
(2 / tau) Var(k). tau is in steps of the grid, so that Eqs. (10) and (14) carry over.

The answer, at 0.1 M parameters and three seeds: it does not help, and mostly hurts. Slopes, up to
1 / (2 tau), multiply from layer to layer: the gradient's norm passes 800 in every run as tau falls.
"""

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import hestia
import plots
from notebooks.lab import tables

TAU_INIT = 0.35  # in steps: what Section 5.1's search finds for Gaussian weights


def window(tau):
    """How many levels on each side of the nearest one count: R. Level R + 1 has a weight of at most
    exp(-R (R + 1) / tau), where the nearest one has 1: less than float32's precision.

    >>> [window(tau) for tau in (1.0, 0.5, 0.35, 0.1)]
    [4, 3, 2, 1]
    """
    R = 1
    while 17 * tau > R * (R + 1):
        R += 1
    return R


class SoftRound(torch.autograd.Function):
    """The mean level at z under the softmax, z's shape. Backward: (2 / tau) times its variance."""

    @staticmethod
    def forward(ctx, z, tau, q, reach):
        near = z.round().clamp(-q, q)
        away, total = z - near, torch.ones_like(z)
        first, second = torch.zeros_like(z), torch.zeros_like(z)  # moments, counted from near
        for k in range(1, reach + 1):
            for side in (k, -k):
                # -(away - k)^2 + away^2, so that the nearest level's weight is 1
                weight = (2 * side / tau * away).sub_(k * k / tau).exp_()
                weight *= near <= q - k if side > 0 else near >= k - q  # where there is this level
                total += weight
                first.add_(weight, alpha=side)
                second.add_(weight, alpha=k * k)
        mean = first.div_(total)
        ctx.save_for_backward(second.div_(total).sub_(mean.square()).mul_(2 / tau))
        return near + mean

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None


def on_grid(x, q, tau=0.0, p=1.0):
    """(1 - p) x + p H(x; tau), x's shape and dtype. tau = 0: rounding, with the STE's gradient.

    >>> x = torch.tensor([0.9, -1.4, 0.25, 0.55])
    >>> on_grid(x, q=7, tau=0.3)
    tensor([ 0.9000, -1.3931,  0.2305,  0.5695])
    >>> on_grid(x[1:], q=7)
    tensor([-1.4000,  0.2000,  0.6000])
    """
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    s = x32.detach().abs().amax(-1, keepdim=True).clamp_min(1e-5) / q  # (..., 1)
    if tau > 0:
        H = s * SoftRound.apply(x32 / s, tau, q, min(window(tau), 2 * q))
    else:
        H = s * (x32.detach() / s).round() + (x32 - x32.detach())
    return ((1 - p) * x32 + p * H).to(x.dtype)


def two_neighbours(z, tau):
    """What not to do: the softmax over the levels below and above z alone. Where z passes a level,
    one of them is exchanged, and the mean jumps by 2 (1 - sigmoid(1 / tau)) steps.

    >>> two_neighbours(torch.tensor([0.9999999, 1.0]), 0.3)
    tensor([0.9656, 1.0344])
    """
    below = z.floor()
    return below + torch.sigmoid((2 * (z - below) - 1) / tau)


def jumps(axes=None):  # a figure: the mean level by all levels and by two, in steps of the grid
    z, axes = torch.linspace(-0.5, 2.5, 3001), plots.panels(axes, 2, (8, 3.4), sharey=True)
    for ax, tau in zip(axes, (1.0, 0.3)):
        plots.curves(ax, z, {"all levels": SoftRound.apply(z, tau, 7, 14),
                             "two neighbours": two_neighbours(z, tau)})
        jump = 2 / (1 + math.exp(1 / tau))
        plots.finish(ax, f"τ = {tau:g}: two neighbours jump by {jump:.2f} steps at every level",
                     "x / s", "mean level", legend="upper left")
    return axes[0].figure


class Inputs:
    """A forward pre-hook that puts a layer's input, (..., n_in), on the grid. Hard until told."""

    def __init__(self, bits):
        self.q, self.tau, self.p = 2 ** (bits - 1) - 1, 0.0, 1.0

    def __call__(self, layer, args):
        return (on_grid(args[0], self.q, self.tau, self.p), *args[1:])


def hard_inputs(layers, bits):
    """Round the inputs of these layers from now on. A file of weights does not hold the grid, so a
    model that is read back needs this: hard_inputs(hestia.linear_layers(model).values(), bits)."""
    inputs = Inputs(bits)
    for layer in layers:
        layer.register_forward_pre_hook(inputs)
    return inputs


class Activations(hestia.Hestia):
    """hestia.Hestia with the inputs of its layers on a grid, by "STE" or by "HESTIA"."""

    def __init__(self, model, total_steps, *, bits, inputs, **settings):
        super().__init__(model, total_steps, **settings)
        self.inputs, self.relaxed = hard_inputs(self.layers.values(), bits), inputs == "HESTIA"

    def relax(self, t):
        super().relax(t)
        if self.relaxed:
            self.inputs.p = hestia.pressure(t, self.total_steps, self.rho)
            self.inputs.tau = hestia.base_temperature(t, self.total_steps, self.rho, TAU_INIT)

    @contextmanager
    def hard(self):
        before = vars(self.inputs).copy()
        self.inputs.tau, self.inputs.p = 0.0, 1.0
        try:
            with super().hard():
                yield self.model
        finally:
            vars(self.inputs).update(before)

    def harden(self):
        super().harden()
        self.inputs.tau, self.inputs.p = 0.0, 1.0


WEIGHTS = {"absmean": dict(method="absmean"), "hestia-no-hessian": dict(method="hestia", alpha=0.0)}
ROWS = {f"{weights}:bits={bits},inputs={by}": dict(line, cls=Activations, bits=bits, inputs=by)
        for weights, line in WEIGHTS.items() for bits in (8, 4, 3) for by in ("STE", "HESTIA")}


def show(path, split="val"):
    """What the grid costs, and HESTIA's inputs minus the STE's, seed by seed, in nats."""
    per_seed, rows = json.loads(Path(path).read_text("utf-8"))["per_seed"], []
    for name in [*ROWS][::2]:  # those by the STE
        weights, soft = name.partition(":")[0], name.replace("STE", "HESTIA")
        line = [tables.label(name.partition(",")[0])]
        for pair in ((name, weights), (soft, weights), (soft, name)):
            mean, half, _ = tables.paired(per_seed, *pair, split)
            text = f"{mean:+.4f} ± {half:.4f}"
            line.append(text if abs(mean) > half else f"({text})")
        rows.append(line)
    head = [f"{split}, ± 95 %", "STE − no grid", "HESTIA − no grid", "HESTIA − STE"]
    tables.print_columns(head, rows)


if __name__ == "__main__":
    from notebooks.lab import study

    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    study.LINES.update(ROWS)
    if sys.argv[1:2] == ["--show"]:
        sys.exit(show(*sys.argv[2:]))
    sys.exit(study.main(["--methods", *WEIGHTS, *ROWS, *sys.argv[1:]]))
