"""A summary contains exactly the figures of its samples."""

from __future__ import annotations

import numpy as np
import pytest

from infer_align_bench.summary import summarize
from infer_align_bench.types import Load, Sample, Span

LOAD = Load(concurrency=4, requests=100)


def sample(index: int, latency: float, error: str | None = None) -> Sample:
    """Return a request that starts every 0.1 s, with its first token after half of its time."""
    due = 0.1 * index
    middle = due + latency / 2
    return Sample(
        target="A",
        index=index,
        intended=due,
        started=due,
        ended=due + latency,
        first=None if error else middle,
        gaps=() if error else (latency / 4, latency / 4),
        chunks=0 if error else 3,
        prompt_tokens=5,
        spent=6,
        returned=3,
        error=error,
    )


def test_percentiles_equal_numpys() -> None:
    latencies = np.random.default_rng(0).exponential(0.2, 100)
    samples = [sample(i, latency) for i, latency in enumerate(latencies)]
    end = max(item.ended for item in samples)
    summary = summarize(samples, [Span("A", 0.0, end)], LOAD, {})
    expected = {"e2e": latencies, "ttft": latencies / 2, "tpot": latencies / 4}
    expected["itl"] = np.repeat(latencies / 4, 2)
    for metric, seconds in expected.items():
        figures = summary["latency_ms"][metric]
        assert figures["mean"]["value"] == pytest.approx(seconds.mean() * 1e3)
        for q in (50, 90, 99):
            assert figures[f"p{q}"]["value"] == pytest.approx(np.percentile(seconds, q) * 1e3)
            assert (figures[f"p{q}"]["high"] is None) == (q == 99), "100 requests are few"
    assert summary["rates"]["requests_per_second"]["value"] == pytest.approx(100 / end)
    assert summary["rates"]["generated_tokens_per_second"]["value"] == pytest.approx(600 / end)


def test_a_failed_or_slow_request_meets_no_goal() -> None:
    samples = [
        sample(0, 0.1),
        sample(1, 0.2),
        sample(2, 0.9),
        sample(3, 0.1, error="http 500"),
    ]
    end = max(item.ended for item in samples)
    goals = {"e2e": 300.0, "ttft": 1000.0}
    goodput = summarize(samples, [Span("A", 0.0, end)], LOAD, goals)["goodput"]
    assert goodput["share"]["value"] == 2 / 4
    assert goodput["requests_per_second"]["value"] == pytest.approx(2 / end)
    assert goodput["unmeasured"] == {}


def test_a_failed_request_adds_its_time_to_the_rate() -> None:
    samples = [sample(0, 0.1), sample(1, 0.1, error="timeout"), sample(2, 0.1)]
    summary = summarize(samples, [Span("A", 0.0, 0.5)], LOAD, {})
    assert summary["requests"] == {"sent": 3, "answered": 2, "failed": 1}
    assert summary["rates"]["requests_per_second"]["value"] == pytest.approx(2 / 0.5)
    assert summary["errors"] == {"timeout": {"count": 1, "first": ""}}


def test_a_sample_between_two_spans_counts_once() -> None:
    samples = [sample(0, 0.1), sample(1, 0.1)]
    spans = [Span("A", 0.0, 0.1), Span("A", 0.1, 0.2)]
    summary = summarize(samples, spans, LOAD, {})
    assert summary["rates"]["requests_per_second"]["value"] == pytest.approx(2 / 0.2)
