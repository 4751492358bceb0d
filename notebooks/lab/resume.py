"""The state of a long training, saved and taken up again: the same bits as without a break.

    saved = resume.save(path, t + 1, optimizer, steps, log, watch)     # after a recorded step
    start = resume.restore(path, optimizer, steps, log, watch)         # in a new process

log is the list of records; watch is a plots.Watch, or None for a training without latents. Batches
are functions of the step, so they need no state.
"""

import time
import zipfile

import numpy as np
import torch

import plots


def settings_of(watch):
    """{what: plain value} of the Hestia that a state belongs to; {} for a training without one."""
    if not watch:
        return {}
    qat = watch.qat
    found = {
        "method": f"{qat.method.label} ({type(qat).__name__})", "group size": qat.group_size,
        "codebook": list(qat.codebook), "rho": float(qat.rho), "alpha": float(qat.alpha),
    }
    found |= {f"layer {k}": name for k, name in enumerate(qat.latents)}
    if qat.method.soft:
        found["tau_init"] = float(qat.tau_init)
        found |= {f"score of {name}": float(qat.scores[name]) for name in qat.latents}
    return found


def same(what, then, now):
    if None not in (then, now) and what.startswith(("tau_init", "score")):
        return abs(then - now) < 0.005  # they are estimates, and another machine rounds otherwise
    return then == now


def save(path, step, optimizer, steps, log, watch):
    """Write what the steps from `step` on depend on, whole or not at all. Returns time.monotonic().

    The optimizer's parameters are the latents, what a method learns beside them, and all that is
    not quantized. The file holds plain tensors and numbers.
    """
    parameters = [[p.detach() for p in group["params"]] for group in optimizer.param_groups]
    device, rows = parameters[0][0].device, []
    for row in watch.rows if watch else ():
        rows.append({**row, "hist": torch.from_numpy(np.array(row["hist"]))})
    state = {
        "step": step, "steps": steps, "settings": settings_of(watch), "parameters": parameters,
        "optimizer": optimizer.state_dict(), "log": log, "rows": rows,
        "late": watch.late if watch else None, "random": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    plots.write(path, lambda aside: torch.save(state, aside))
    return time.monotonic()


def read(path):
    """What `save` wrote, on the CPU. Nothing in the file is executed. ValueError: unreadable."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums
                raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        keys = ("step", "steps", "settings", "parameters", "optimizer", "log", "rows", "late",
                "random", "cuda")
        return [state[key] for key in keys]
    except Exception as error:  # whatever a damaged file may raise
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no saved state ({why}); remove it to train anew") from None


def restore(path, optimizer, steps, log, watch):
    """Put a saved state into a training that was set up like the first time. Returns its step.

    ValueError says what differs. Nothing is changed then.
    """
    step, of, settings, parameters, adam, records, rows, late, random, cuda = read(path)
    own = [group["params"] for group in optimizer.param_groups]
    shapes = lambda groups: [[f"{tuple(p.shape)} {p.dtype}" for p in group] for group in groups]
    facts, current = [("steps", of, steps)], settings_of(watch)
    facts += [(what, settings.get(what), current.get(what)) for what in {**settings, **current}]
    facts += [("parameters", [len(g) for g in parameters], [len(g) for g in own])]
    for then, now in zip(shapes(parameters), shapes(own)):
        facts += [(f"parameter {k}", *pair) for k, pair in enumerate(zip(then, now))]
    for what, then, now in facts:
        if not same(what, then, now):
            raise ValueError(f"{path} has {what}: {then}, and this training {now}; give the same "
                             "settings, or remove the file to train anew")

    optimizer.load_state_dict(adam)
    with torch.no_grad():
        for group, saved in zip(own, parameters):
            for p, x in zip(group, saved):
                p.copy_(x)
    torch.set_rng_state(random)
    device = own[0][0].device
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
    log[:] = records
    if watch:
        watch.rows = [{**row, "hist": list(row["hist"].numpy())} for row in rows]
        watch.late = late and {name: codes.to(device) for name, codes in late.items()}
        watch.keep()  # W before the next step that is watched, or an earlier one
    return step
