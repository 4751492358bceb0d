"""lab/bench.py at a tiny size."""

import json
import shlex
import time

import pytest
import torch
from torch import nn

import hestia
from notebooks.lab import bench

TINY = shlex.split("--rounds 1 --steps 1 --micro 1 --accumulate 1 --block-size 16 --no-compile")


@pytest.fixture
def settings():
    """What a worker sets for its whole process is put back."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision(precision)


def worker(capsys, *arguments):
    """{mode: row} of one worker, in this process."""
    assert bench.main([*TINY, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("result ")) for line in lines]
    return {row["mode"]: row for row in rows}


@pytest.mark.parametrize("codebook", [hestia.TERNARY, hestia.TWO_BIT])
def test_the_naive_forward_of_the_bench_is_hestias(codebook):
    layer = nn.Linear(16, 4, bias=False)
    layer.__class__, layer.group_size = bench.NaiveLinear, 8
    layer.settings = torch.tensor([0.4, 0.3, *codebook])
    expected = hestia.effective_weight(layer.weight, 0.3, 0.4, 8, codebook).T
    torch.testing.assert_close(layer(torch.eye(16)), expected)


def test_times_are_those_of_the_works():
    short, long = lambda: time.sleep(0.01), lambda: time.sleep(0.03)
    one, three = bench.timed(torch.device("cpu"), short, long, repeat=6)
    assert 10 <= one < three and three >= 30


def test_a_step_of_hestia_is_measured(settings, capsys):
    row = worker(capsys, "--worker", "hestia", "--accumulate", "1", "2", "--steps", "3")["hestia"]
    assert row["setting"].endswith("tiny, 1 x 16 tokens x 2")
    assert len(row["laps"]) == 3 and row["ms"] == sorted(row["laps"])[1]
    assert row["tokens_per_s"] == pytest.approx(2 * 16 * 1000 / row["ms"])
    # by hand: 3 layers of 2 (128, 128), 2 (128, 64), 3 (128, 384), and a head of (128, 256)
    matrices = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 128 * 256
    flops = 6 * matrices + 12 * 3 * 128 * (16 / 2)  # 12 per layer, width and token attended to
    assert row["tflops"] == pytest.approx(1e-12 * flops * row["tokens_per_s"])
    assert row["of_matrix_rate"] == pytest.approx(row["tflops"] / row["matrix_tflops"])
    assert 0 < row["of_matrix_rate"] < 1 and row["GiB"] > 0.1


def test_the_rates_that_a_device_holds(settings, capsys):
    found = worker(capsys, "--worker", "rate", "--seconds", "0.3")
    square, all_ = found.values()
    assert list(found) == ["products, 1024^3, 0.3 s", "products, those of a micro-batch, 0.3 s"]
    assert square["tflops"] == pytest.approx(1e-9 * 2 * 1024**3 / square["ms"])
    # by hand: three products each, of 16 tokens; the weights are those of the test above
    matrices = 3 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 128 * 256
    assert all_["tflops"] == pytest.approx(1e-9 * 6 * 16 * matrices / all_["ms"])


def test_a_step_by_kinds_of_kernels_is_the_whole_step(settings, capsys):
    found = worker(capsys, "--worker", "profile", "--steps", "2")
    assert {"matrix products", "attention", "AdamW", "relax and pull_back", "the loss", "SwiGLU"
            } < found.keys() <= {*bench.KINDS, "all else", "nothing, or the profiler"}
    assert sum(row["of_step"] for row in found.values()) == pytest.approx(1)
    whole = {row["ms"] / row["of_step"] for row in found.values()}
    assert max(whole) == pytest.approx(min(whole)) and min(whole) > 1


@pytest.mark.parametrize(("name", "kind"), [
    ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
    ("triton_per_fused__to_copy_abs_add_clamp_div_exp2_mean_mul_neg_pow", "relax and pull_back"),
    ("triton_red_fused__fused_rms_norm__to_copy_embedding_0", "RMSNorm, and sums of branches"),
    ("void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "AdamW"),
    ("triton_poi_fused__unsafe_view_mul_silu_7", "SwiGLU"),
    ("void reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float>, unsigned int>>",
     "norms of gradients"),
    ("Memset (Device)", "all else"),
])
def test_kernels_are_told_apart_by_their_names(name, kind):
    assert bench.kind_of(name) == kind


@pytest.mark.parametrize("bad", ["--modes magic", "--steps 0", "--accumulate 4 -1", "--tau nan",
                                 "--gpus two"])
def test_bad_options_are_one_sentence(bad, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(bad.split())
    assert f"error: argument {bad.split()[0]}: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_bench_measures_every_mode_and_compares_them(settings, tmp_path, capsys):
    out, kept = tmp_path / "bench.json", {"round": 4, "mode": "full", "setting": "old", "ms": 1.0}
    out.write_text(json.dumps([kept]))
    arguments = [*TINY, "--out", str(out), "--modes"]
    assert bench.main([*arguments, "full", "absmean", "hestia"]) == 0
    rows = json.loads(out.read_text())  # new ones are added to those that were there
    assert rows[0] == kept and [(row["round"], row["mode"]) for row in rows[1:]] == [
        (5, "full"), (5, "absmean"), (5, "hestia")]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("HESTIA's step takes ")
    assert " times full precision" in printed and " times AbsMean STE" in printed

    assert bench.main([*arguments, "full", "--llama", str(tmp_path)]) == 1
    assert "bench: full failed: " in capsys.readouterr().err
    assert json.loads(out.read_text()) == rows

    found = {}
    for mode in ("naive", "plain", "passes", "products"):  # as in processes of their own
        found |= worker(capsys, "--worker", mode)
    assert list(found) == [
        "naive", "plain", "relax alone", "pull_back alone", "both by a stacked softmax, eager",
        "products with W", "products with H(W; 0.3)", "products with H(W; 0.05)",
        "products with Q(W)"]
    assert all(row["ms"] > 0 for row in found.values())
    assert all(0 < found[mode]["of_matrix_rate"] < 1 for mode in ("naive", "plain"))


@pytest.mark.slow
def test_the_bench_shares_a_batch_under_torchrun(tmp_path):
    out = tmp_path / "bench.json"
    assert bench.main([*TINY, "--out", str(out), "--modes", "hestia", "--gpus", "2"]) == 0
    (row,) = json.loads(out.read_text())
    assert row["setting"].startswith("2 x ")
    assert row["tokens_per_s"] == pytest.approx(2 * 16 * 1000 / row["ms"])
