"""Several GPUs: under torchrun every process trains the same model on its share of each batch.

    with parallel.together(cuda=True):
        qat = hestia.Hestia(model, steps)
        hestia.train(parallel.wrap(model, qat), tokens, qat=qat, backward=parallel.backward, ...)
"""

import datetime
import gc
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import hestia


def backward(model, x, y, micro_batches=1):
    """hestia.backward of this process's share of x and y, (B, T). Returns the whole batch's loss.

    DDP averages the gradients of all processes at the last micro-batch. Micro-batches count alike,
    so the mean is over tokens only if each has as many targets that are not ignored (-100).
    ValueError if the batch does not split into equal parts.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if len(x) % (world * micro_batches):
        raise ValueError(f"a batch of {len(x)} sequences does not split into {world} processes "
                         f"times {micro_batches} micro-batches")
    x, y, loss = x.chunk(world)[rank], y.chunk(world)[rank], 0.0  # (B / world, T)
    for k, (x_, y_) in enumerate(zip(x.chunk(micro_batches), y.chunk(micro_batches))):
        with nullcontext() if k == micro_batches - 1 else model.no_sync():
            with hestia.precision(x.device):
                part = model(x_, y_) / micro_batches
            part.backward()
        loss = loss + part.detach()
    dist.all_reduce(loss.div_(world))
    return loss


def wrap(model, qat=None):
    """The model in DistributedDataParallel, for after Hestia(model, ...).

    All take the scores and tau_init of the first process: estimates differ by rounding.
    """
    if qat:
        settings = [qat.tau_init, qat.scores]
        dist.broadcast_object_list(settings)
        qat.tau_init, qat.scores = settings
    return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def check_alike(tensors, qat, name):
    """RuntimeError unless all processes hold the same bits in tensors, scores and tau_init."""
    sums = [int(x.detach().flatten().view(torch.int16).sum(dtype=torch.int64)) for x in tensors]
    mine, everywhere = (sums, qat and (qat.scores, qat.tau_init)), [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    if any(other != mine for other in everywhere):
        raise RuntimeError(f"{name}: the processes hold different weights or scores; give all the "
                           "same seed and files")


@contextmanager
def together(cuda, **options):
    """Join the other processes, and leave when all have come here. options: init_process_group's.

    What holds the group must be gone by then: a thread of gloo that is still there when the
    interpreter ends may abort it.
    """
    import torch.distributed.optim  # torch imports it later, and then it would hold the group

    torch.distributed.init_process_group("nccl" if cuda else "gloo", **options)
    try:
        yield
        dist.barrier()  # none leaves while another still listens to it
    finally:
        gc.collect()  # wrapped models hold the group, and may be in a cycle
        dist.destroy_process_group()


@contextmanager
def one_of_several(config):
    """Join the other processes with a script's config, whose device, out and resume are read.

    Each takes a GPU of its own. All but the first print nothing, and write to a folder that is
    removed. To resume, each gets a copy of what is in config.out. Without torchrun nothing happens.
    """
    if "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available() and not config.device.startswith("cpu")
    if cuda:
        config.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(config.device)
    patience = datetime.timedelta(hours=12)  # one may read a long text while the others wait
    screen = sys.stdout
    with (tempfile.TemporaryDirectory() as aside,
          open(os.devnull, "w", encoding="utf-8") as nowhere, together(cuda, timeout=patience)):
        if dist.get_rank() > 0:
            copy = Path(aside) / "run"
            if config.resume and config.out and Path(config.out).is_dir():
                shutil.copytree(config.out, copy)
            config.out, sys.stdout = str(copy), nowhere
        dist.barrier()  # the first process changes nothing before all have copied it
        try:
            yield
        finally:
            sys.stdout = screen
