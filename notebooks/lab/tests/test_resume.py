"""resume.py: N + M steps are N + M steps, bit for bit, and nothing else is taken for a state."""

import json
import multiprocessing
import random
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import hestia
import plots
import train_tiny
from notebooks.lab import resume, rivals

torch.set_num_threads(1)  # these models are so small that a second thread only waits

TINY = ["--layers", "1", "--hidden", "8", "--intermediate", "8", "--heads", "2", "--group-size",
        "4", "--batch-size", "2", "--block-size", "8", "--eval-tokens", "256", "--samples", "2",
        "--rank", "1", "--device", "cpu"]

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(hestia.__file__).read_text()[:20000])
    return str(path)


def training(row, steps, hidden=8):
    """(config, model, qat, further arguments of train) of a tiny model, always the same."""
    config = train_tiny.parse([*TINY, "--hidden", str(hidden), "--steps", str(steps),
                               "--tau-init", "0.3", "--save-minutes", "0", "--device", "cpu"])
    model = train_tiny.first_model(config, 0)
    qat, more = None, {}
    if row != "no latents":
        scores = {name: k / 6 for k, name in enumerate(hestia.linear_layers(model))}
        qat, more = train_tiny.make(config, row, model, scores)
    return config, model, qat, more


def untimed(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def ended(row, steps, folder):
    """Train in this folder to the end. Everything that a run keeps, but for the time it took."""
    config, model, qat, more = training(row, steps)
    tokens = torch.arange(1024) % 256
    log, watch = train_tiny.train(config, model, tokens, row, 0, folder, steps, 1e-2, qat, **more)
    arrays = {}
    if qat:
        arrays = {**watch.arrays(), "changed": np.array(watch.changed())}
        qat.harden()
    records = [untimed(record) for record in log]
    seconds = [r["seconds"] for r in log]
    assert seconds == sorted(seconds)  # they go on, too
    tensors = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
    return records, tensors, {name: a.tobytes() for name, a in arrays.items()}


# (row, M + N, M): of 80 steps every second is recorded, and 18 of 20 are before the last tenth
CASES = [("hestia", 80, 45), ("hestia", 20, 19), ("no latents", 20, 9)]
CASES += [(row, 20, 9) for row in
          ("full", "absmean", "lsq", "spectra", "stochastic", "lotion", "pv")]


@pytest.mark.parametrize("row, steps, first", CASES)
def test_a_training_that_is_broken_off_ends_with_the_same_bits(row, steps, first, tmp_path,
                                                               monkeypatch):
    for name in ("whole", "broken"):
        (tmp_path / name / "runs").mkdir(parents=True)
    expected = ended(row, steps, tmp_path / "whole")
    save, restore, starts = resume.save, resume.restore, []

    def save_and_stop(path, step, *what):
        now = save(path, step, *what)
        if step >= first:
            raise KeyboardInterrupt
        return now

    def restore_elsewhere(*what):
        torch.manual_seed(99)  # as another process would have it
        starts.append(restore(*what))
        return starts[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume, "save", save_and_stop)
        ended(row, steps, tmp_path / "broken")
    monkeypatch.setattr(resume, "restore", restore_elsewhere)
    assert ended(row, steps, tmp_path / "broken") == expected and starts == [first]


@pytest.fixture
def saved(tmp_path):
    """(path, what restore takes beside it) of a training of three steps, all of them recorded."""
    (tmp_path / "runs").mkdir()
    config, model, qat, more = training("hestia", steps=3)
    tokens = torch.arange(256)
    train_tiny.train(config, model, tokens, "hestia", 0, tmp_path, 3, 1e-2, qat, **more)
    return tmp_path / "runs" / "hestia-seed0.state"


def fresh(steps=3, hidden=8, row="hestia"):
    _, _, qat, _ = training(row, steps, hidden)
    return hestia.adamw(qat.parameters(), 1e-2), steps, [], train_tiny.Watch(qat, 1)


def everything(optimizer, steps, log, watch):
    parameters = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return [*parameters, torch.get_rng_state()], len(optimizer.state), len(log), watch.rows


def refused(path, what, *words):
    """restore refuses it in one sentence with these words, and leaves all as it was."""
    before = everything(*what)
    with pytest.raises(ValueError) as error:
        resume.restore(path, *what)
    message = str(error.value)
    assert all(word in message for word in (str(path), "remove", *words)), message
    assert "\n" not in message
    after = everything(*what)
    assert before[1:] == after[1:] == (0, 0, [])
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))


def test_another_training_is_refused_and_nothing_was_changed(saved):
    assert resume.restore(saved, *fresh()) == 3
    refused(saved, fresh(hidden=16), "parameter 0", "(8, 8) torch.float32", "(16, 16)")
    refused(saved, fresh(steps=4), "steps: 3, and this training 4")
    refused(saved, fresh(row="lsq"), "method: HESTIA (Hestia), and this training LSQ (Learned)")
    what = fresh()
    last = what[0].param_groups[-1]["params"]
    last[-1] = torch.nn.Parameter(last[-1].detach().bfloat16())  # all before it would fit
    refused(saved, what, "torch.float32", "torch.bfloat16")


def a_hestia(name="hestia", left_out=(), steps=10, **settings):
    """What save and restore take, of a row around a model whose two inner layers are alike."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    layers = {name: layer for name, layer in model.named_children() if name not in left_out}
    settings = {"group_size": 4, "tau_init": 0.3, "layers": layers, **settings}
    if "scores" in settings:
        settings["scores"] = dict(zip(layers, settings["scores"]))
    row = {**rivals.ROWS.get(name, {"method": name}), "scratch": False}
    qat, _ = rivals.make(name, model, steps, 1e-2, row, **settings)
    return hestia.adamw(qat.parameters(), 1e-2), steps, [], plots.Watch(qat, 1)


OTHERS = [  # settings of the state, settings of the training, what is said
    ({}, dict(group_size=8), "group size: 4, and this training 8"),
    (dict(group_size=None), {}, "group size: None, and this training 4"),
    ({}, dict(codebook=hestia.TWO_BIT), "codebook: [-1.0, 0.0, 1.0], and this training [-1.5"),
    ({}, dict(rho=0.25), "rho: 0.2, and this training 0.25"),
    ({}, dict(alpha=0.401), "alpha: 0.4, and this training 0.401"),
    ({}, dict(tau_init=0.31), "tau_init: 0.3, and this training 0.31"),
    (dict(scores=[0.5, 0.2, 0.5]), dict(scores=[0.5, 0.5, 0.5]),
     "score of 1: 0.2, and this training 0.5"),
    (dict(left_out="0"), dict(left_out="1"), "layer 0: 1, and this training 0"),
    ({}, dict(name="absmean"), "method: HESTIA (Hestia), and this training AbsMean STE (Hestia)"),
    (dict(name="dge"), dict(name="daq"), "method: DGE (Hestia), and this training DAQ (Hestia)"),
    (dict(name="int2", group_size=None), dict(name="llm-qat"),  # a scale per tensor, or per row
     "method: AbsMean STE (Hestia), and this training AbsMean STE (PerRow)"),
    (dict(name="lsq"), dict(name="seq"), "method: LSQ (Learned), and this training SEQ (Learned)"),
    (dict(name="lsq", group_size=None), dict(name="lsq"), "group size: None, and this training 4"),
]


@pytest.mark.parametrize("then, now, words", OTHERS)
def test_a_state_of_other_settings_is_refused_and_nothing_was_changed(then, now, words, tmp_path):
    path = tmp_path / "state"
    resume.save(path, 3, *a_hestia(**then))
    refused(path, a_hestia(**now), words)
    assert resume.restore(path, *a_hestia(**then)) == 3  # the same ones go on


def test_scales_per_tensor_do_not_fit_scales_per_group_by_their_shapes_alone(tmp_path):
    path = tmp_path / "state"
    resume.save(path, 3, *a_hestia("lsq", group_size=None))
    state, what = torch.load(path, weights_only=True), a_hestia("lsq")
    state["settings"] = resume.settings_of(what[-1])  # as if all settings were the same
    torch.save(state, path)
    refused(path, what, "parameter 0: (1,) torch.float32, and this training (16,) torch.float32")


def test_estimates_of_another_machine_and_fused_passes_go_on(tmp_path):
    path = tmp_path / "state"
    resume.save(path, 3, *a_hestia(scores=[0.5, 0.2, 0.7]))
    scores = [0.5004, 0.1998, 0.7]  # as another machine rounds
    assert resume.restore(path, *a_hestia(scores=scores, tau_init=0.3003)) == 3
    assert resume.restore(path, *a_hestia(scores=scores, compile=True)) == 3


def test_a_training_with_latents_and_one_without_are_not_each_others(tmp_path):
    path, what = tmp_path / "state", a_hestia("full")
    without = (*what[:-1], None)  # the same parameters, with nobody who knows what they are
    for then, now, words in ((what, without, "method: full precision (Hestia), and this training "
                              "None"), (without, what, "method: None, and this training full")):
        resume.save(path, 3, *then)
        with pytest.raises(ValueError) as error:
            resume.restore(path, *now)
        assert words in str(error.value)
        assert resume.restore(path, *then) == 3


def test_a_damaged_state_is_refused_in_a_sentence(saved):
    content = saved.read_bytes()
    state = torch.load(saved, weights_only=True)  # torch itself does not look at checksums
    for size in (0, 1, 1000, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        refused(saved, fresh(), "is no saved state (")
    moments = state["optimizer"]["state"][0]
    for tensor in (state["parameters"][0][1], moments["exp_avg_sq"], state["random"]):
        damaged = bytearray(content)
        damaged[content.index(tensor.numpy().tobytes()) + 5] ^= 1
        saved.write_bytes(damaged)
        refused(saved, fresh(), "is no saved state (its checksums are wrong)")
    torch.save({"step": 3}, saved)
    refused(saved, fresh(), "is no saved state ('steps')")


# --------------------------------------------------------------------------------------------------
# processes that are killed


def quietly(arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train_tiny.main(arguments)


def outcome(folder):
    """All that a finished run leaves, but for the time that it took."""
    results = json.loads((folder / "results.json").read_text())
    rows = [untimed(row) for row in results["per_seed"][0].values()]
    log = {key: [untimed(record) for record in records]
           for key, records in plots.read_log(folder).items()}
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        for name, t in train_tiny.load_checkpoint(path).state_dict().items():
            tensors[f"{path.name}/{name}"] = t.numpy().tobytes()
    arrays = {row: {key: array.tobytes() for key, array in arrays.items()}
              for row, arrays in plots.read_snapshots(folder).items()}
    return {"rows": rows, "log": log, "tensors": tensors, "arrays": arrays}


def start_process(arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_tiny", "notebooks.lab.resume", "notebooks.lab.rivals"])
    process = context.Process(target=quietly, args=(arguments,))
    process.start()
    return process


def killed_until_done(arguments, folder, seconds, seed):
    """Run in processes that are killed at random moments, and resumed, until one ends. Returns how
    many were killed."""
    rng, kills = random.Random(seed), 0
    while not (folder / "overview.png").exists():  # the last file
        more = ["--resume"] if (folder / "config.json").exists() else []
        if folder.exists() and not more:
            shutil.rmtree(folder)  # killed before it had begun
        process = start_process([*arguments, "--out", str(folder), *more])
        process.join(rng.uniform(0, seconds) if kills else seconds / 2)  # the first never ends
        kills += process.is_alive()
        process.kill()
        process.join()
    return kills


def compare_killed(text, tmp_path, runs):
    """lsq learns scales, tequila adds biases, stochastic draws random numbers."""
    arguments = ["--data", text, "--methods", "hestia", "lsq", "tequila", "stochastic", *TINY,
                 "--steps", "10", "--pretrain-steps", "10", "--save-minutes", "0"]
    start_process(["--steps", "none"]).join()  # the next ones need not import anything
    began = time.perf_counter()
    undisturbed = start_process([*arguments, "--out", str(tmp_path / "undisturbed")])
    undisturbed.join()
    seconds, expected = time.perf_counter() - began, outcome(tmp_path / "undisturbed")
    kills = []
    for n in range(runs):
        kills.append(killed_until_done(arguments, tmp_path / str(n), seconds, n))
        assert outcome(tmp_path / str(n)) == expected
        shutil.rmtree(tmp_path / str(n))
    print(f"{runs} runs, killed {sum(kills)} times, ended with the same bits")
    assert sum(kills) >= runs / 2


def test_a_killed_run_goes_on_to_the_same_bits(text, tmp_path):
    compare_killed(text, tmp_path, 1)


@pytest.mark.slow
def test_fifty_killed_runs_go_on_to_the_same_bits(text, tmp_path):
    compare_killed(text, tmp_path, 50)
