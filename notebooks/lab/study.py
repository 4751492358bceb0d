"""A study: rows x rates x seeds. What is finished is kept, and workers are processes.

    python -m notebooks.lab.study --methods all --lrs 1e-3 3e-3 9e-3 --seeds 5 --out out/table1
    python -m notebooks.lab.study --ablate group hessian --workers 8 --out out/table4   # Table 4

All options of train_tiny.py hold here too. The same command goes on with a study that was
interrupted. With --lrs each method gets the rate at which its hard weights lose least on the last
2.5 % of the training text, with a seed of its own. Nothing else uses either. A variant such as
hestia:alpha=0.6 has the rate of what it varies. With --tune only these rows are tried; another row
takes the rate of the first of them but full that has a temperature, or has none, as it does.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import shlex
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

import hestia
import plots
import train_tiny
from notebooks.lab import activations, options, rivals, tables

# {what: {row: arguments of Hestia}}. Two keys are this file's own: what becomes of the scores, and
# from how many samples they are estimated.
ABLATIONS = {
    "group": {
        "absmean:group_size=0": dict(method="absmean", group_size=None),
        "absmean:group_size=16": dict(method="absmean", group_size=16),
        "absmean:group_size=32": dict(method="absmean", group_size=32),
        "hestia-no-hessian:group_size=0": dict(alpha=0.0, group_size=None),
        "hestia:group_size=0": dict(group_size=None),
        "hestia:group_size=16": dict(group_size=16),
        "hestia:group_size=32": dict(group_size=32),
    },
    "hessian": {
        "hestia-no-hessian": dict(alpha=0.0),
        "hestia:scores=shuffled": dict(scores="shuffled"),
        "hestia:scores=common": dict(scores="common"),
        "hestia:scores=hawq": dict(scores="hawq"),
    },
    "alpha": {f"hestia:alpha={a}": dict(alpha=a) for a in (0.6, 0.2, 0.0, -0.2, -0.4, -0.6)},
    "tau": {f"hestia-no-hessian:tau_init={tau}": dict(alpha=0.0, tau_init=tau)
            for tau in (0.15, 0.25, 0.35, 0.45, 0.55, 0.7)},
    "rho": {f"hestia:rho={rho}": dict(rho=rho) for rho in (0.0, 0.1, 0.3, 0.5)},
    "bits": {row: rivals.ROWS[row] for row in ("int2", "hestia-binary", "hestia-2bit")},
    "samples": {f"hestia:samples={m}": dict(samples=m) for m in (5, 50)},
}
LINES = {row: {"method": "hestia", **line} for rows in ABLATIONS.values()
         for row, line in rows.items()} | activations.ROWS
ROWS = [*train_tiny.ROWS, *rivals.ROWS]


@dataclasses.dataclass
class Config(train_tiny.Config):
    ablate: tuple = ()
    lrs: tuple = ()
    tune: tuple = ()


def parse(arguments):
    """(Config, number of workers, which of them this process is or None)."""
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.lab.study", description=about, epilog=more, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"study.py: {message}\n")
    parser.add_argument("--ablate", nargs="+", default=[], choices=[*ABLATIONS, "all"],
                        help="compare variants; other --methods are added")
    parser.add_argument("--lrs", nargs="+", type=float, default=[], metavar="RATE",
                        help="choose the peak learning rate of each method among these")
    parser.add_argument("--tune", nargs="+", default=[], metavar="ROW",
                        help="the rows that choose, where not all do; others take their rates")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="processes that share the work, each with a GPU in turn [0: this one]")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    own, others = parser.parse_known_args(arguments)
    config = Config(**vars(train_tiny.parse(others)), ablate=tuple(own.ablate), lrs=tuple(own.lrs),
                    tune=tuple(own.tune))
    config.methods, config.out = chosen_rows(config), config.out or "out/study"
    others = {is_soft(row) for row in config.methods if row.partition(":")[0] not in config.tune}
    known = {is_soft(row) for row in config.tune if row != "full"}  # full's rate is its own
    if config.tune and not ({*config.tune} <= {*ROWS} and others <= known):
        raise ValueError("--tune takes names of rows, with a temperature and without as --methods")
    if not all(0 < lr < math.inf for lr in config.lrs) or own.workers < 0:
        raise ValueError("--lrs are rates above 0, and --workers is a number of processes")
    return config, own.workers, own.worker


def chosen_rows(config):
    """The names of what --methods and --ablate ask for."""
    names = ROWS if "all" in config.methods else config.methods
    if config.ablate:
        asked = () if config.methods == train_tiny.Config.methods else names
        names = ["full", "absmean", *asked, "hestia"]
        for what in ABLATIONS if "all" in config.ablate else config.ablate:
            names += [row for row in ABLATIONS[what]  # without the group size of all rows
                      if not row.endswith(f":group_size={config.group_size}")]
    return tuple(dict.fromkeys(names))


def is_soft(name):
    """Whether a row has a temperature."""
    line = LINES.get(name) or {**train_tiny.ROWS, **rivals.ROWS}.get(name, {"method": name})
    method = hestia.METHODS.get(line.get("method", "hestia"))
    return bool(method and method.soft)


def best_rate(losses):
    """The rate with the lowest loss. None: that rate diverged.

    >>> best_rate({"0.001": 1.3, "0.003": 1.2, "0.009": None})
    0.003
    """
    best = min(losses, key=lambda lr: math.inf if losses[lr] is None else losses[lr])
    if losses[best] is None:
        raise RuntimeError("it diverged at all of --lrs; give smaller ones")
    return float(best)


def changed_scores(scores, how, alpha, seed):
    """The scores, shuffled among the tensors, or one common score: its temperature is the mean."""
    if how == "shuffled":
        values = list(scores.values())
        random.Random(seed).shuffle(values)
        return dict(zip(scores, values))
    if how == "common":
        mean = sum(math.exp(alpha * s) for s in scores.values()) / len(scores)
        common = math.log(mean) / alpha if alpha else 0.0
        return dict.fromkeys(scores, min(1.0, max(0.0, common)))  # rounding may leave 0 to 1
    return scores


class Study:
    """The tasks of a study. Each is finished when its file is in folder/runs/."""

    def __init__(self, config, tokens):
        self.config, self.tokens, self.folder = config, tokens, Path(config.out)
        self.seeds = range(config.seed, config.seed + config.seeds)
        self.tuning_seed, self.tuning_tokens = config.seed + 1000, {}
        if config.lrs:
            front, end = tokens["train"].tensor_split([round(0.975 * len(tokens["train"]))])
            self.tokens = {**tokens, "train": front}
            self.tuning_tokens = {"train": front, "end": end}
            if len(end) <= config.block_size + 1:
                raise ValueError(f"2.5 % of the training text, for --lrs, is {len(end)} tokens; "
                                 f"expected more than a block of {config.block_size}")

    def path(self, name, seed):
        return plots.run_file(self.folder, name, seed, "json")

    def stages(self):
        """[{file of a task: its function}]. A stage begins when the one before has ended."""
        starts, tries, rows = {}, {}, {}
        for seed in [*self.seeds, self.tuning_seed] if self.config.lrs else self.seeds:
            starts[self.path("start", seed)] = functools.partial(self.begin, seed)
        for name in self.config.methods:
            for lr, path in self.tries(name).items():
                tries[path] = functools.partial(self.tune, self.chooser(name), lr, path)
        for name in self.config.methods:  # a row that is there for some seeds is of no use
            for seed in self.seeds:
                rows[self.path(name, seed)] = functools.partial(self.row, name, seed)
        return [starts, tries, rows]

    def chooser(self, name):
        """The row whose tries choose this row's rate: itself, what it varies, or one of --tune."""
        stem = name.partition(":")[0]
        if not self.config.tune or stem in self.config.tune:
            return stem
        return next(row for row in self.config.tune
                    if row != "full" and is_soft(row) == is_soft(name))

    def tries(self, name):
        """{rate: file of the try} of the row that chooses a row's rate."""
        stem, seed = self.chooser(name), self.tuning_seed
        return {lr: self.path(f"{stem} at {lr}", seed) for lr in self.config.lrs}

    def tuning(self, name):
        """{rate: what `tune` left}"""
        tries = self.tries(name).items()
        return {str(lr): json.loads(path.read_text("utf-8")) for lr, path in tries}

    def begin(self, seed):
        tokens = self.tuning_tokens if seed == self.tuning_seed else self.tokens
        return train_tiny.begin(self.config, tokens, seed, self.folder)

    def ready(self, seed):
        """What `begin` left, but not its work, which one process alone may do."""
        if not self.path("start", seed).exists():
            raise RuntimeError(f"start-seed{seed} failed")
        return self.begin(seed)

    def tune(self, name, lr, path):
        """Train at a rate to choose it or not. It leaves the loss of the hard weights, or None."""
        (model, entry), loss = self.ready(self.tuning_seed), None
        config = dataclasses.replace(self.config, lr=lr)
        scores = {tensor: h["score"] for tensor, h in entry["sensitivities"]["tensors"].items()}
        torch.manual_seed(self.tuning_seed)
        qat, more = train_tiny.make(config, name, model, scores or None)
        with contextlib.suppress(hestia.Diverged):
            train_tiny.train(config, model, self.tuning_tokens["train"], f"{name} at {lr}",
                             self.tuning_seed, self.folder, config.steps, lr, qat, **more)
            qat.harden()
            loss = train_tiny.losses(config, model, {"end": self.tuning_tokens["end"]})["end"]
        plots.write_json(path, loss if math.isfinite(loss or 0.0) else None)
        path.with_suffix(".state").unlink(missing_ok=True)

    def row(self, name, seed):
        (model, entry), config = self.ready(seed), self.config
        line = dict(LINES.get(name, {}))
        if samples := line.pop("samples", None):
            more = dataclasses.replace(config, samples=samples)
            found = train_tiny.sensitivities(more, model, self.tokens["train"], seed)
            entry["sensitivities"] = found
        if how := line.pop("scores", None):
            tensors = entry["sensitivities"]["tensors"]
            scores = {tensor: h["score"] for tensor, h in tensors.items()}
            if how == "hawq":
                scores = self.hawq_scores(model, tensors)
            for tensor, score in changed_scores(scores, how, config.alpha, seed).items():
                tensors[tensor]["score"] = score
        if config.lrs:
            config = dataclasses.replace(config, lr=best_rate(self.tuning(name)))
        train_tiny.run_row(config, name, model, entry, self.tokens, seed, self.folder, line or None)

    def hawq_scores(self, model, tensors):
        """Eq. (13) with HAWQ-V2's measure (arXiv 1911.03852) for the trace: it times the mean
        squared error of rounding."""
        size, measure = self.config.group_size or None, {}
        for name, h in tensors.items():
            w = model.get_submodule(name).weight.detach().float()
            error = float((w - hestia.quantize(w, size)).square().mean())
            measure[name] = hestia.TraceEstimate(h["value"] * error, h["stderr"] * error)
        return hestia.sensitivity_scores(measure, self.config.kappa)

    def bits(self):
        """{row: bits per weight}. It makes each row once: what does not fit is refused now."""
        config, bits = dataclasses.replace(self.config, tau_init=0.3), {}
        for name in config.methods:
            line = {k: v for k, v in LINES.get(name, {}).items() if k not in ("scores", "samples")}
            model = train_tiny.first_model(config, config.seed)
            try:
                qat, _ = train_tiny.make(config, name, model, None, line or None)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            bits[name] = rivals.bits_per_weight(qat)
        return bits

    def finish(self, about, bits):
        """results.json and the tables, of the rows that are there for every seed."""
        there = lambda name: all(self.path(name, seed).exists() for seed in self.seeds)
        names, per_seed = [name for name in self.config.methods if there(name)], []
        if not names:
            return
        entries = [json.loads(self.path("start", seed).read_text("utf-8")) for seed in self.seeds]
        for seed, entry in zip(self.seeds, entries):
            rows = {"before": entry["before"], "untrained": entry["untrained"]}
            for name in names:
                rows[name] = json.loads(self.path(name, seed).read_text("utf-8"))["row"]
                if name != "full":
                    rows[name]["bits"] = bits[name]
            per_seed.append(rows)
        tuned = names if self.config.lrs else ()
        about["tuning"] = {self.chooser(name): self.tuning(name) for name in tuned}
        with contextlib.redirect_stdout(io.StringIO()):
            train_tiny.finish(about, entries, per_seed, self.folder)  # a shorter table
        tables.show(self.folder / "results.json")


# --------------------------------------------------------------------------------------------------
# the work, in one process or in several


def ended(path):
    return path.exists() or path.with_suffix(".failed").exists()


def take(path, task):
    """Do a task unless a process has it. Returns whether it was done here."""
    lock = path.with_suffix(".lock")
    try:
        with open(lock, "x", encoding="utf-8") as file:  # one process alone can create it
            file.write(f"process {os.getpid()} was ended")  # to be said if it was
    except FileExistsError:
        return False
    try:
        if not ended(path):
            task()
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        path.with_suffix(".failed").write_text(str(error) or type(error).__name__, "utf-8")
    finally:
        lock.unlink()
    return True


def work(stages):
    for tasks in stages:
        while left := [path for path in tasks if not ended(path)]:
            if not any([take(path, tasks[path]) for path in left]):
                time.sleep(0.2)  # others have them


def end_with_first_process():
    """The first process has the other end of this pipe, which is closed when it ends."""
    os.read(0, 1)
    os._exit(1)


def run_workers(count, arguments, config, paths):
    """The same command in processes of its own. What each prints is in a file in the folder."""
    folder, root, children = Path(config.out), str(Path(__file__).resolve().parents[2]), []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = gpus if gpus[0] else [str(k) for k in range(torch.cuda.device_count())]
    for k in range(count):
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count)),
               "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        if config.device == "cuda":
            env["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
        command = [sys.executable, "-m", "notebooks.lab.study", *arguments, "--worker", str(k)]
        with open(folder / f"worker{k}.log", "a", encoding="utf-8") as log:
            children.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log,
                                             stderr=subprocess.STDOUT))
    done = 0
    try:
        while any([child.poll() is None for child in children]):
            for child in children:  # nobody waits for the task of one that was killed
                for lock in folder.glob("runs/*.lock") if child.poll() else ():
                    if lock.read_text("utf-8") == f"process {child.pid} was ended":
                        lock.rename(lock.with_suffix(".failed"))
            if (now := sum(map(ended, paths))) > done:
                print(f"  {(done := now)} of {len(paths)} tasks ended", flush=True)
            time.sleep(0.2)
    finally:
        for child in children:
            child.terminate()
            child.wait()


def run(arguments):
    """A study, or a worker's part of it. Returns the exit code: 1 if something failed."""
    config, workers, worker = parse(arguments)
    train_tiny.check(config)
    torch.set_flush_denormal(True)  # as train_tiny.run has them
    torch.set_float32_matmul_precision("high")
    tokens, facts = train_tiny.load_text(config)
    study = Study(config, tokens)
    stages = study.stages()
    if worker is not None:
        threading.Thread(target=end_with_first_process, daemon=True).start()
        work(stages)
        return 0
    bits = study.bits()
    config.resume = (study.folder / "config.json").exists()
    _, about = train_tiny.open_folder(config, facts)
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty'
    failed, about["commit"] = subprocess.getstatusoutput(git)
    about["commit"] = None if failed else about["commit"]
    about["command"] = shlex.join(["python", "-m", "notebooks.lab.study", *arguments])
    for left in [*study.folder.glob("runs/*.lock"), *study.folder.glob("runs/*.failed")]:
        left.unlink()  # those tasks are taken again
    if workers:
        run_workers(workers, arguments, config, [path for tasks in stages for path in tasks])
    else:
        work(stages)
    if all(path.exists() for path in stages[0]):
        study.finish(about, bits)
    missing = [path for tasks in stages for path in tasks if not path.exists()]
    for path in missing:
        failed = path.with_suffix(".failed")
        why = failed.read_text("utf-8") if failed.exists() else "no process was left to do it"
        print(f"{path.stem} failed: {why}", file=sys.stderr)
    return 1 if missing else 0


def main(arguments=None):
    warnings.showwarning = lambda message, *_: print(f"  note: {message}", flush=True)
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("\nstudy.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        return options.explain(error, "study.py", None)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
    sys.exit(main())
