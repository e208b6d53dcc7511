"""The expected times on a GPU: floors, verdicts, and a record that is not out of date."""

from __future__ import annotations

import json
import math
import re

import pytest

from benchmarks.gpu import attention_work, expected, older_version
from benchmarks.gpu.hardware import BANDWIDTH, MICRO, Range, Work, compiled
from benchmarks.gpu.parts import CONCURRENCIES
from benchmarks.gpu.steering import ONE_VALUE, SEVERAL_VALUES
from benchmarks.kernels import bench_sibling_attention, bench_top_candidates
from benchmarks.record import RESULTS

AIM = re.compile(r"at (?P<kind>least|most) (?P<limit>[\d.]+)")
ROWS = expected.all_rows()


def rounded(value: object) -> object:
    """Return numbers with six digits: the last bits of a float may differ between machines."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def test_the_record_is_what_the_script_computes_now() -> None:
    recorded = json.loads((RESULTS / f"{expected.NAME}.json").read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in recorded] == [row["what"] for row in ROWS]
    for old, new in zip(recorded, ROWS, strict=True):
        assert {key: rounded(value) for key, value in old.items()} == {
            key: rounded(value) for key, value in new.items()
        }, "run: python -m benchmarks.gpu.expected"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"])
def test_every_aim_has_the_verdict_of_its_numbers(row: expected.Row) -> None:
    assert 0 < row["low"] <= row["high"] < math.inf
    aim = AIM.fullmatch(row["target"])
    if aim is None:
        assert (row["target"], row["verdict"]) == ("none", expected.NO_AIM)
        return
    limit = float(aim["limit"])
    is_met = [row["low"] >= limit, row["high"] >= limit]
    if aim["kind"] == "most":
        is_met = [row["low"] <= limit, row["high"] <= limit]
    verdicts = {
        2: {expected.WITH_MARGIN, expected.CLOSELY},
        1: {expected.OPEN},
        0: {expected.MISSED},
    }
    assert row["verdict"] in verdicts[sum(is_met)]


@pytest.mark.parametrize(
    ("value", "kind", "limit", "verdict"),
    [
        (Range(40, 85), "most", 100, expected.WITH_MARGIN),
        (Range(40, 86), "most", 100, expected.CLOSELY),
        (Range(40, 101), "most", 100, expected.OPEN),
        (Range(101, 102), "most", 100, expected.MISSED),
        (Range(0.975, 0.99), "least", 0.97, expected.WITH_MARGIN),
        (Range(0.971, 0.99), "least", 0.97, expected.CLOSELY),
        (Range(0.96, 0.99), "least", 0.97, expected.OPEN),
        (Range(0.95, 0.96), "least", 0.97, expected.MISSED),
    ],
)
def test_a_verdict_is_about_the_whole_range(
    value: Range, kind: str, limit: float, verdict: str
) -> None:
    assert expected.verdict(value, kind, limit) == verdict


def test_the_floors_are_those_of_the_measured_bandwidth() -> None:
    for rows in older_version.HEAD_FLOOR_US:
        logits = 2 * rows * expected.VOCABULARY
        head = logits + 2 * expected.VOCABULARY * 128
        # The figures were written with one digit after the point.
        for moved, floors in (
            (head, older_version.HEAD_FLOOR_US),
            (logits, older_version.CANDIDATES_FLOOR_US),
        ):
            assert moved / BANDWIDTH / MICRO == pytest.approx(floors[rows], rel=0.01, abs=0.06)
    for shape, floor in zip(attention_work.SHAPES, older_version.ATTENTION_FLOOR_US, strict=True):
        # The lengths of the prefixes were drawn; here they have their mean.
        assert shape.floor_us == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize("number", range(3))
def test_the_older_attention_was_in_the_range_of_this_model(number: int) -> None:
    shape = attention_work.SHAPES[number]
    time = attention_work.time(shape, attention_work.older(shape))
    assert time.low < older_version.OLD_ATTENTION_US[number] < time.high


def test_what_is_computed_is_what_the_benchmarks_measure() -> None:
    shapes = [tuple(shape) for shape in attention_work.SHAPES]
    assert sorted(shapes) == sorted(bench_sibling_attention.CUDA_SHAPES)
    assert set(older_version.TORCH_TOPK_US) == set(bench_top_candidates.CUDA_ROWS)
    assert expected.VOCABULARY == bench_top_candidates.VOCABULARY
    assert tuple(expected.ONE_VALUE) == CONCURRENCIES
    goals = {c: f"at least {limit:g}" for c, limit in expected.ONE_VALUE.items()}
    assert goals == ONE_VALUE
    assert f"at least {expected.SEVERAL_VALUES:g}" == SEVERAL_VALUES


def test_more_work_takes_longer() -> None:
    resources = compiled("tile_peaks", logits="*fp32")
    small = Work(resources, 1000, 1e8, 1e8, 200.0, memory_waits=1)
    large = Work(resources, 1000, 2e8, 1e8, 200.0, memory_waits=1)
    assert small.time.low < large.time.low
    assert small.time.high < large.time.high
    assert small.bound == "memory"
    waiting = Work(resources, 1000, 1e6, 1e6, 200.0, memory_waits=100)
    assert waiting.bound == "waits"


def test_a_kernel_that_is_not_in_the_report_is_refused() -> None:
    with pytest.raises(LookupError, match=r"no row of tile_peaks .*compile_report\.py"):
        compiled("tile_peaks", TILE=1)
