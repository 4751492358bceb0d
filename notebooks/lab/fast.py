"""The same numbers sooner: fused passes over W, a step that never waits, a loss without all logits.

    fast.settle()
    model = fast.llama(hestia.load_llama(folder, torch.float32, "cuda"))
    qat, update = fast.Hestia(model, steps, dtype=torch.bfloat16), fast.Update()
    hestia.train(torch.compile(model), tokens.cuda(), qat=qat, update=update, steps=steps, ...)
    update.flush()  # was the last step refused?

hestia.train gathers each batch where the tokens lie: with tokens on the GPU no step waits for a
copy from the host.
"""

import functools
import math
import os

import torch
from torch.utils.checkpoint import checkpoint

import hestia

# --------------------------------------------------------------------------------------------------
# The maps, of rows w (n_groups, g). p and tau > 0 are tensors that broadcast to (n_groups, 1).
# As floats they would be constants of a program, and each step would compile a new one.


def code_moments(z, tau, codebook):
    """Eqs. (16) and (17): the mu and V of hestia.code_moments. Nothing has K times z's size.

    >>> code_moments(torch.tensor([[0.5]]), torch.tensor(0.01), hestia.TERNARY)
    (tensor([[0.5000]]), tensor([[0.2500]]))
    """
    if tuple(codebook) == hestia.TERNARY:
        # One exponential per weight is enough. Let a = |z|, and s the sign of z. The codes s, 0, -s
        # lie at squared distances (a - 1)^2, a^2, (a + 1)^2. Their odds are 1 : B : A, with
        #     B = e^((1 - 2a) / tau),   A = e^(-4a / tau) = (B e^(-1 / tau))^2.
        # Processors have powers of 2 only, so e^(1 / tau) = 2^k. Exponents end at 100, certain yet
        # far from overflow. 1e-18 keeps A from denormal numbers, which are slow on a CPU.
        k = 1 / (tau * math.log(2))
        B = torch.exp2(((1 - 2 * z.abs()) * k).clamp(max=100.0))
        A = (B * 2.0**-k + 1e-18).square()
        P = 1 / (1 + A + B)
        # V is E[q^2] - mu^2 with mu = (1 - A) P put in: no difference is left to cancel
        return torch.copysign((1 - A) * P, z), (4 * A + B + A * B) * P * P
    # Around the nearest code, so that no digits are lost when the assignment is nearly certain.
    near, z = hestia.nearest_code(z, codebook), z.clamp(-1e18, 1e18)
    total, first, second = 0.0, 0.0, 0.0
    for q in codebook:
        step = q - near
        weight = torch.exp(step * (2 * z - near - q) / tau)
        total, first, second = total + weight, first + weight * step, second + weight * step * step
    return near + first / total, second / total - (first / total).square()


def relax_hestia(w, p, tau, codebook):
    """Eq. (9): W_eff = (1 - p) W + p gamma mu."""
    gamma = hestia.absmean_scale(w, w.shape[1])  # (n_groups, 1)
    mu, _ = code_moments(w / gamma, tau, codebook)
    return (1 - p) * w + p * (gamma * mu)


def slope_hestia(w, p, tau, codebook):
    """dW_eff/dW = (1 - p) + p (2 / tau) V, Lemma 4.1. With it pull_back needs no graph."""
    gamma = hestia.absmean_scale(w, w.shape[1])
    _, variance = code_moments(w / gamma, tau, codebook)
    return (1 - p) + p * (2 / tau * variance)


def relax_ste(w, p, tau, codebook):
    return hestia.quantize(w, w.shape[1], codebook)


def relax_full(w, p, tau, codebook):
    return w


def slope_1(w, p, tau, codebook):
    return 1.0


FUSED = {  # readable map: (W_eff, dW_eff/dW)
    hestia.relax_full: (relax_full, slope_1),
    hestia.relax_ste: (relax_ste, slope_1),
    hestia.relax_hestia: (relax_hestia, slope_hestia),
}

# --------------------------------------------------------------------------------------------------
# The passes. Memory bounds them: a weight should be read once, and a result written once.


@functools.cache
def compiled(function):
    # From Hopper on a kernel may start as the one before it ends. These are short, and many.
    return torch.compile(function, dynamic=False, options={"triton.enable_pdl": True})


def settle():
    """Let this process compile a program for each method and shape. torch stops after eight."""
    from torch._dynamo import config  # loads much, so only here

    config.recompile_limit, config.accumulated_recompile_limit = 1000, 10000


def side_by_side(tensors):
    """(K, *shape): torch.stack, without a copy where the K tensors lie side by side in memory."""
    first, size, places = tensors[0], tensors[0].numel(), set()
    for k, x in enumerate(tensors):
        places.add((x.untyped_storage().data_ptr(), x.storage_offset() - k * size, x.stride()))
    if len(places) > 1:
        return torch.stack(tensors)
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


def relax_rows(stack, table, dtype, codebook, relax):
    """W_eff (K n_groups, g) of K layers. stack: W (K, n_groups, g). table: p, tau, 0, 0 (K, 4)."""
    K, n, g = stack.shape
    p, tau = [table[:, k, None].expand(K, n).reshape(K * n, 1) for k in (0, 1)]
    return relax(stack.view(K * n, g), p, tau, codebook).to(dtype)


def pull_rows(rows, grads, table, codebook, slope):
    """Eq. (19) for K layers. rows, grads: K times (n_groups, g). table: K times (4,).

    dL/dW is written over dL/dW_eff where both have one dtype.
    """
    pulled = []
    for w, grad, step in zip(rows, grads, table):
        pulled.append(grad.to(w.dtype).mul_(slope(w, step[0], step[1], codebook)))
    return pulled


class Hestia(hestia.Hestia):
    """hestia.Hestia with fused passes for the methods full, absmean and hestia, any codebook.

    relax reads W once and writes W_eff once. pull_back reads W and dL/dW_eff and writes dL/dW.
    There is no graph, and nothing of W's size is kept. Other methods take the readable passes.
    Call settle() first where one process has several of these.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fused = FUSED.get(self.method.relax)  # None: the readable passes
        # Up to eight layers with equal rows share a program, so that few are compiled.
        alike, self.chunks = {}, []
        for name, w in self.latents.items():
            kind = self._rows(w).shape, w.dtype, self.layers[name].weight.dtype
            alike.setdefault(kind, []).append(name)
        for names in alike.values():
            self.chunks += [tuple(names[k : k + 8]) for k in range(0, len(names), 8)]

    def _rows(self, x):
        return x.detach().reshape(-1, self.group_size or x.numel())  # (n_groups, g)

    @torch.no_grad()
    def relax(self, t):
        if self.fused is None or not 0 <= t < self.total_steps:
            return super().relax(t)  # which refuses such a t
        self._look(self.shown)
        # p and tau of all layers in one copy to the device. Four numbers a row: compiled code wants
        # its inputs 16 bytes apart. It divides by tau, and at 1e-20 H has long been Q.
        steps = [self.step_of(t, name) for names in self.chunks for name in names]
        table = torch.tensor([[s.p, max(s.tau, 1e-20), 0, 0] for s in steps], dtype=torch.float32)
        table = table.to(next(iter(self.latents.values())).device, non_blocking=True)
        # in the place of graphs: this is all that pull_back needs
        self.graphs = dict(zip(self.chunks, table.split([len(names) for names in self.chunks])))
        for names, table in self.graphs.items():
            latents = [self.latents[name] for name in names]
            weights = [self.layers[name].weight for name in names]
            W, dtype = side_by_side([self._rows(w) for w in latents]), weights[0].dtype
            W_eff = compiled(relax_rows)(W, table, dtype, self.codebook, self.fused[0])
            for w, weight, row, new in zip(latents, weights, W, W_eff.chunk(len(names))):
                w.data = row.view_as(w)  # side by side from now on: the next stack is no copy
                weight.data, weight.grad = new.view_as(weight), None
        self.begun = t + 1
        self.shown = self._look({})

    @torch.no_grad()
    def pull_back(self):
        if self.fused is None or not self.graphs:
            return super().pull_back()  # which asks for relax(t)
        self._check_loop()
        for names in self.chunks:
            self._pull_back(names, self.graphs.pop(names))

    def _pull_back(self, names, table):
        """One chunk's. Its gradients of W_eff are freed before the next chunk's of W come."""
        latents, grads, steps = [], [], []
        for name, step in zip(names, table):
            w, weight = self.latents[name], self.layers[name].weight
            if weight.grad is not None:  # None where the loss left the layer out
                latents.append(w)
                grads.append(self._rows(weight.grad))
                steps.append(step)
            w.grad = weight.grad = None
        if latents:
            rows = [self._rows(w) for w in latents]
            pulled = compiled(pull_rows)(rows, grads, steps, self.codebook, self.fused[1])
            for w, grad in zip(latents, pulled):
                w.grad = grad.view_as(w)


# --------------------------------------------------------------------------------------------------
# The step, and the model


class Update:
    """An `update` for hestia.train that never waits for the GPU.

    AdamW's own kernel clips and guards: it divides the gradients by grad_scale, and changes nothing
    where found_inf is 1. Whether it refused a step is read one step later, when the GPU has that
    one to do, and hestia.Diverged names the step. On a CPU it is read at once. Call flush() after
    the last step, and before a state is saved. start: the number of the first step.
    """

    def __init__(self, start=0):
        self.step, self.pending = start - 1, None

    def __call__(self, optimizer, loss, norm, clip):
        assert optimizer.defaults.get("fused"), "only fused kernels read grad_scale and found_inf"
        self.flush()
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0).float()
        optimizer.found_inf = 1.0 - torch.isfinite(loss + norm).float()
        optimizer.step()
        self.step += 1
        self.pending = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if loss.is_cuda else None
        if self.arrived:
            self.arrived.record()
        else:
            self.flush()

    def flush(self):
        """hestia.Diverged if the last step was refused. The weights are those before it."""
        if self.pending is None:
            return
        if self.arrived:
            self.arrived.synchronize()
        (loss, norm), self.pending = self.pending.tolist(), None
        if not math.isfinite(loss + norm):
            raise hestia.Diverged(f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}; "
                                  "lower the learning rate")


class Checkpointed(hestia.Block):
    def forward(self, x, cos, sin):
        if not torch.is_grad_enabled():
            return super().forward(x, cos, sin)
        return checkpoint(super().forward, x, cos, sin, use_reentrant=False)


class Llama(hestia.Llama):
    def rope(self, T, device):
        # as_strided changes nothing here. Without it compiled code works the cosines out anew in
        # every layer and head.
        return [x.as_strided(x.shape, x.stride()) for x in super().rope(T, device)]

    def loss(self, x, targets, budget=1 << 24):
        """The mean loss. More than `budget` logits are computed in parts, twice, and not kept."""
        rows = max(1, budget // self.config.vocab_size)
        # compiled autocast saves logits in bf16, and has them in float32 only in registers
        narrow = torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)
        if narrow or targets.numel() <= rows:
            return super().loss(x, targets)

        def part(x, targets):  # a sum: a part may have no target, and then it has no mean
            logits = hestia._at_least_float32(self.lm_head(x))  # (rows, V)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        x, targets, total = x.flatten(0, 1), targets.flatten(), 0.0  # (B T, C), (B T,)
        for x_, y_ in zip(x.split(rows), targets.split(rows)):
            total = total + checkpoint(part, x_, y_, use_reentrant=False)
        return total / (targets != -100).sum()  # cross_entropy leaves out targets of -100


def llama(model, checkpointing=False):
    """Make this hestia.Llama a fast one, and return it. Parameters and their names stay.

    checkpointing: keep one activation per layer and compute the rest again in the backward pass.
    That takes less memory, and a third more time.
    """
    assert isinstance(model, hestia.Llama)
    model.__class__ = Llama
    for block in model.model.layers:
        block.__class__ = Checkpointed if checkpointing else hestia.Block
    return model


def faster(config, model, qat, more):
    """(model, arguments of hestia.train) for train_tiny.py's --compile, and for torchrun."""
    if config.compile:
        settle()
        model, more = torch.compile(llama(model)), {"update": Update(), **more}
    if "RANK" in os.environ:
        from notebooks.lab import parallel

        share = parallel.backward
        if "backward" in more:  # a teacher's
            share = functools.partial(more["backward"], backward=parallel.backward)
        model, more = parallel.wrap(model, qat), {**more, "backward": share}
    return model, more
