"""What people type and what disks do to files: an answer, or one sentence. Never a traceback."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hestia
import train_tiny
from notebooks.lab import options

SMALL = """--layers 1 --hidden 8 --intermediate 8 --heads 2 --group-size 8 --batch-size 2 --rank 1
--samples 2 --calibration 1 --block-size 8 --eval-tokens 64 --pretrain-steps 2 --steps 2"""
TINY = SMALL.split()
VALUES = {  # beside numbers of all sizes
    "methods": ["full", "absmean hestia", "twn", "fairy2i", "nothing", "full full", "hestia:rho=1"],
    "data": ["text.txt", "short.txt", "nowhere", ".", "binary"], "val-data": ["text.txt", "no"],
    "test-data": ["text.txt", "binary", ""], "llama": ["nowhere", ".", "text.txt"],
    "sensitivity": ["joint", "fisher", "gradnorm", "error", "magic"], "preset": ["cpu", "tiny"],
    "device": ["cpu", "cuda:77", "tpu", ""], "out": ["run", "text.txt", "full", "text.txt/run"],
}
NUMBERS = ["0", "1", "2", "3", "0.5", "-1", "1e-30", "1e30", "nan", "inf", "x", "", "2.5"]
FLAGS = ["--packed", "--resume", "--no-packed", "--magic"]


def random_line(rng):
    """Three or fewer changes to a small run."""
    line = ["--data", "text.txt", "--methods", "hestia", "--out", "run"]
    names = [action for field in train_tiny.dataclasses.fields(train_tiny.Config)
             if (action := field.name.replace("_", "-")) not in ("compile", "packed", "resume")]
    for name in rng.sample(names, rng.randint(1, 3)):
        line += ["--" + name, *rng.choice(VALUES.get(name, NUMBERS)).split()]
    return line + rng.choices(["", *FLAGS], [9, 1, 1, 1, 1])[0].split()


def try_lines(count, seed, capsys):
    """Random command lines. Returns their exit codes."""
    rng, codes = random.Random(seed), []
    for _ in range(count):
        line = random_line(rng)
        try:
            code = train_tiny.main([*TINY, *line])
        except SystemExit as ended:  # argparse
            code = ended.code
        said = capsys.readouterr().err
        assert code in (0, 1, 2) and said.count("\n") == (code > 0), (line, code, said)
        assert code == 0 or said.startswith("train_tiny.py: "), (line, said)
        shutil.rmtree("run", ignore_errors=True)
        codes.append(code)
    return codes


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(Path(hestia.__file__).read_bytes()[:4000])
    Path("short.txt").write_text("short", "utf-8")
    Path("binary").write_bytes(bytes(range(256)) * 8)
    Path("full/folder").mkdir(parents=True)


def test_random_command_lines(files, capsys):
    assert set(try_lines(30, 0, capsys)) == {0, 2}


@pytest.mark.slow
def test_three_hundred_random_command_lines(files, capsys):
    assert set(try_lines(300, 1, capsys)) >= {0, 2}


def damage(path, rng):
    """One of the things that disks, copies and editors do to a file."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "empty", "bit", "zeros", "longer", "text", "swap", "folder", "gone"])
    if kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "empty":
        content.clear()
    elif kind == "bit":
        for _ in range(rng.choice([1, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
    elif kind == "longer":
        content += rng.randbytes(100)
    elif kind == "text":
        content = bytearray(rng.choice([b"{}", b"[1]", b"null", b'{"a": 1e999}', b"<p>", b"\xff"]))
    elif kind == "swap":
        middle = rng.randrange(len(content))
        content = content[middle:] + content[:middle]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(content)
    return kind


def try_damaged_llamas(count, seed, folder):
    rng, refused = random.Random(seed), 0
    config = train_tiny.Config(device="cpu", data="text.txt", llama=str(folder / "broken"))
    for _ in range(count):
        shutil.copytree(folder / "whole", folder / "broken")
        file = rng.choice(["config.json", "model.safetensors"])
        kind = damage(folder / "broken" / file, rng)
        options.load_once.cache_clear()
        try:
            model = train_tiny.first_model(config, 0)
            assert hestia.linear_layers(model), (kind, file)
        except ValueError as error:
            assert str(error).startswith(config.llama) and "\n" not in str(error), (kind, error)
            refused += 1
        shutil.rmtree(folder / "broken")
    return refused


def try_damaged_runs(count, seed, run, capsys):
    """--resume after damage to what a run keeps. A damaged file is refused, or it is made anew."""
    rng, codes = random.Random(seed), []
    line = [*TINY, "--data", "text.txt", "--methods", "absmean", "hestia", "--resume", "--out"]
    kept = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    for n in range(count):
        shutil.copytree(run, f"copy{n}")
        file = Path(f"copy{n}") / rng.choice(kept)
        kind = damage(file, rng)
        codes.append(train_tiny.main([*line, f"copy{n}"]))
        said = capsys.readouterr().err
        assert codes[-1] in (0, 2) and said.count("\n") == codes[-1] / 2, (file, kind, said)
        shutil.rmtree(f"copy{n}")
    return codes


@pytest.fixture
def llama(files):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    small = hestia.LlamaConfig(64, 16, 32, 1, 2, 1)
    hestia.save_llama(hestia.Llama(small), Path("llamas") / "whole")
    return Path("llamas")


@pytest.fixture
def run(files, capsys):
    line = [*TINY, "--data", "text.txt", "--methods", "absmean", "hestia", "--out", "finished"]
    assert train_tiny.main(line) == 0
    capsys.readouterr()
    return Path("finished")


def test_damaged_checkpoints(llama, run, capsys):
    assert try_damaged_llamas(25, 0, llama) > 10
    assert {0, 2} == set(try_damaged_runs(15, 0, run, capsys))


KEPT = {  # what is in a file that a run keeps: how it is changed, by its name
    "runs/hestia-seed0.json": ["null", "[]", "{}", '{"row": {}, "log": []}', "log: null",
                               "row: null", "log: [null]", "log: [[]]", 'log: [{"loss": 1}]',
                               'row: {"train": 1, "val": true, "seconds": 1}',
                               'row: {"train": 1, "val": NaN, "seconds": 1}',
                               'row: {"train": 1, "val": 1e999, "seconds": 1}', "log: []"],
    "runs/start-seed0.json": ["null", "[]", "before: null", "sensitivities: []", "before: {}",
                              'sensitivities: {"tensors": {"x": null}}', "untrained: [1]",
                              'sensitivities: {"tensors": {"x": {"score": "high"}}}'],
    "runs/pretrain-seed0.json": ["null", "[]", "log: null", "log: [0]"],
    "config.json": ["null", "[]", "config: null", "data: []", "config: [1]"],
}


def test_each_kept_file_is_looked_at_before_a_run_goes_on(run, capsys):
    line = [*TINY, "--data", "text.txt", "--methods", "absmean", "hestia", "--resume", "--out"]
    results = json.loads((run / "results.json").read_text("utf-8"))["per_seed"]

    def refused(*words):
        assert train_tiny.main([*line, str(run)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(word in said for word in words), said

    for name, contents in KEPT.items():
        file, before = run / name, (run / name).read_text("utf-8")
        for content in contents:
            key, colon, value = content.partition(": ")
            whole = json.loads(before)
            if colon and key in whole:
                content = json.dumps(whole | {key: 0}).replace(f'"{key}": 0', f'"{key}": {value}')
            file.write_text(content, "utf-8")
            refused(name, "damaged" if "runs" in name else "") if name != "config.json" else \
                refused("no readable config.json")
        file.write_text(before, "utf-8")

    # bits in the middle of tensors and arrays, which only checksums can tell
    bits = [run / "pretrained-seed0.pt", run / "hestia-seed0.pt", run / "runs/hestia-seed0.npz"]
    for file in bits:
        before = file.read_bytes()
        places = [len(before) // 3, len(before) // 2]
        if file.suffix == ".pt":  # the mantissa of weights
            w = train_tiny.load_checkpoint(file).model.norm.weight.detach().numpy().tobytes()
            places = [before.index(w), before.index(w) + 5]
        for place in places:
            content = bytearray(before)
            content[place] ^= 1
            file.write_bytes(content)
            refused(f"{file} is damaged; remove what bears its name and seed")
        file.unlink()
        if "pretrained" not in file.name:
            refused(f"{file} is gone; remove {run / 'runs/hestia-seed0.json'} to have both")
        os.mkfifo(file)
        refused(f"{file} is damaged")
        file.unlink()
        file.write_bytes(before)
    assert train_tiny.main([*line, str(run)]) == 0
    capsys.readouterr()
    assert json.loads((run / "results.json").read_text("utf-8"))["per_seed"] == results


def test_a_run_has_its_folder_for_itself(run, capsys, monkeypatch):
    line = [*TINY, "--data", "text.txt", "--methods", "absmean", "hestia", "--out"]
    code = ("import sys; from pathlib import Path; from notebooks.lab import options\n"
            "options.own(Path(sys.argv[1])); print('owned', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(run.resolve())], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=Path(hestia.__file__).parent)
    assert other.stdout.readline() == "owned\n"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train_tiny.main([*line, str(run), "--resume"]) == 2
    assert "another run is at work in finished; wait for its end" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    other.send_signal(signal.SIGKILL)  # as a full memory ends a run
    other.communicate()
    for _ in range(2):  # twice in this process
        assert train_tiny.main([*line, str(run), "--resume"]) == 0

    original = Path.mkdir

    def late(path, *mode, **how):  # another run makes it a moment sooner
        if path.name == "runs":
            os.makedirs(path)
        original(path, *mode, **how)

    monkeypatch.setattr(Path, "mkdir", late)
    capsys.readouterr()
    assert train_tiny.main([*line, "race"]) == 2
    assert "race/runs was made by another run just now; name another" in capsys.readouterr().err
    assert [path.name for path in Path("race").rglob("*")] == ["runs"]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_a_run_that_still_goes_on_is_not_resumed(files, capsys):
    line = [*TINY, "--data", "text.txt", "--steps", "1000000", "--out", "living"]
    script = Path(hestia.__file__).with_name("train_tiny.py")
    living = subprocess.Popen([sys.executable, script, *line], stdout=subprocess.DEVNULL)
    try:
        while not Path("living/runs/start-seed0.json").exists():
            assert living.poll() is None
            time.sleep(0.1)
        assert train_tiny.main([*line, "--resume"]) == 2
        said = capsys.readouterr().err
        assert f"process {living.pid}, which began it, is at work in living; wait for" in said
    finally:
        living.kill()
        living.wait()
    config = train_tiny.parse([*line, "--resume"])
    train_tiny.check(config)
    _, facts = train_tiny.load_text(config)
    assert train_tiny.open_folder(config, facts)[0] == Path("living")


def test_a_wrong_llama_is_refused_before_the_text_is_read(llama, capsys, monkeypatch):
    folder = Path("llamas/whole")
    monkeypatch.setattr(train_tiny, "load_text", lambda config: pytest.fail("too late"))
    (Path("llamas") / "empty").mkdir()
    packed = shutil.copytree(folder, Path("llamas/packed"))
    config = json.loads((packed / "config.json").read_text("utf-8"))
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"a": 1}}))
    for name, words in (("llamas/empty", "is empty; expected a config.json or a params.json in it"),
                        ("text.txt", "text.txt is no folder; expected a folder with"),
                        ("HuggingFaceTB/SmolLM2", "hf download HuggingFaceTB/SmolLM2 --local-dir"),
                        ("llamas/packed", "python -m notebooks.lab.checkpoints llamas/packed NEW"),
                        ("llamas/none", "llamas/none does not exist")):
        line = [*TINY, "--preset", "cpu", "--data", "text.txt", "--llama", name, "--out", "x"]
        assert train_tiny.main(line) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not Path("x").exists()


@pytest.mark.slow
def test_two_hundred_damaged_checkpoints(llama, run, capsys):
    try_damaged_llamas(120, 1, llama)
    try_damaged_runs(80, 1, run, capsys)
