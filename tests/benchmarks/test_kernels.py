"""The benchmarks of the kernels run on the CPU, and keep what they have measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record as recording
from benchmarks.kernels import (
    bench_sibling_attention,
    bench_steer_logits,
    bench_top_candidates,
    bench_value_reweight,
    measure,
)
from benchmarks.record import problems

BANDWIDTH = 1e9


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the records."""
    folder = tmp_path / "results"
    monkeypatch.setattr(recording, "RESULTS", folder)
    monkeypatch.setattr(recording, "commit", lambda: "0123456789ab")
    return folder


@pytest.mark.parametrize(("seconds", "measured"), [("0", 1), ("1000", 3)])
def test_the_shapes_that_fit_are_recorded_and_the_others_named(
    seconds: str, measured: int, results: Path
) -> None:
    shapes = [(256, 20), (1, 20), (512, 20)]

    def measure_shape(rows: int, k: int, bandwidth: float) -> list[dict[str, Any]]:
        # What an earlier shape has measured is on the disk before the next one begins.
        assert (results / "kernels_top_candidates_cpu.json").exists() == (rows != 256)
        return [{"B": rows, "k": k, "faster than nothing": bandwidth > 0}]

    arguments = ["--tested", "--seconds", seconds]
    path = measure.record_shapes("top_candidates", "no baseline", shapes, measure_shape, arguments)
    assert problems(path) == []
    content = json.loads(path.read_text())
    assert [row["B"] for row in content["rows"]] == [256, 1, 512][:measured]
    assert content["setup"]["left_out"] == [str(shape) for shape in shapes[measured:]]


@pytest.mark.slow
def test_every_benchmark_measures_ours_beside_its_baseline() -> None:
    dense, head, *candidates = bench_value_reweight.measure_shape(2, 5000, torch.float32, BANDWIDTH)
    assert [dense["op"], head["op"]] == ["dense", "head"]
    assert [row["k"] for row in candidates] == [20, 64]
    # A read and a write of the logits, and a read of the weights.
    assert dense["floor_us"] == pytest.approx((2 * 2 * 5000 * 4 + 5000 * 128 * 4) / 1e3, abs=0.01)
    (top,) = bench_top_candidates.measure_shape(1, 20, BANDWIDTH)
    steer, likely = bench_steer_logits.measure_shape(1, 1, BANDWIDTH)
    assert [steer["op"], likely["op"]] == ["top_k", "min_p"]
    (attention,) = bench_sibling_attention.measure_shape(2, 4, 2, 5, 16, 16, BANDWIDTH)
    baselines = {
        "eager": dense,
        "topk": top,
        "separate": steer,
        "masked": attention,
    }
    for baseline, row in baselines.items():
        assert row["ours_p50_us"] > 0
        assert row[f"{baseline}_p50_us"] > 0
