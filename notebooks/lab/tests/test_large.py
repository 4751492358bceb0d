"""large.py against published sizes, torch's own counter and a GPU's measured memory."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hestia
from notebooks.lab import large

RESULTS = Path(large.__file__).resolve().parents[1] / "results"


def test_sizes_are_the_published_ones():
    assert sum(large.sizes("8B")) == 8_030_261_248
    assert sum(large.sizes("70B")) == 70_553_706_496
    assert [sum(large.sizes(s)) for s in ("1B", "3B")] == [1_235_814_400, 3_212_749_824]


def test_flops_against_torchs_counter(monkeypatch):
    shape = dict(vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2)
    monkeypatch.setitem(large.SHAPES, "tiny", shape)
    model, ids = hestia.Llama(hestia.LlamaConfig(**shape)), torch.zeros(16, 4, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    # it counts attention without the mask, which is next to nothing at this length
    counted = counter.get_total_flops() / 64  # of 16 x 4 tokens
    assert large.flops_per_token("tiny", 4) == pytest.approx(counted, rel=0.02)


def test_memory_is_a_little_less_than_what_was_measured():
    rows = json.loads((RESULTS / "bench-h200-621e002.json").read_text("utf-8"))
    (measured,) = {row["GiB"] for row in rows if " 3b, " in row["setting"] and "GiB" in row}
    assert 0.9 < sum(large.memory("3B").values()) / 2**30 / measured < 1


def test_what_goes_over_the_wire_by_hand(monkeypatch):
    monkeypatch.setattr(large, "sizes", lambda shape: (100, 10))
    assert large.wire("x", 4, 2) == (2 * 100 + 2 * 10 + 4 * 110) * 3 / 4  # gathered once
    monkeypatch.setattr(large, "sizes", lambda shape: (10**11, 0))  # too large to be kept
    assert large.gathers("x", 16) == 2 * 2**20 / (16 * 8192)
    assert large.wire("x", 16, 2) == pytest.approx((16 * 2 + 4) * 1e11 * 15 / 16)
