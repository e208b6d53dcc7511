"""The documented trace of a best-of-8, and the servers whose times are compared."""

from __future__ import annotations

import asyncio
import re

import pytest

from benchmarks.serving import telemetry
from benchmarks.serving.client import closed_loop
from benchmarks.serving.trace_tree import NAME_WIDTH, best_of_8

pytestmark = pytest.mark.slow


def test_the_trace_of_a_best_of_8_has_each_stage_and_the_score_of_each_candidate() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    lines = best_of_8()
    names = [line[:NAME_WIDTH].rstrip() for line in lines]
    assert names == [
        "POST /v1/chat/completions",
        "├─ plan",
        "├─ draw",
        *["│  ├─ chat demo"] * 7,
        "│  └─ chat demo",
        "├─ reward quality",
        "└─ select",
    ]
    candidates = [line for line in lines if "chat demo" in line]
    for index, line in enumerate(candidates):
        assert f"candidate {index}, " in line
        assert "quality " in line
    assert re.search(r"  selected \d: .* of 8 candidates", lines[0])


def test_each_server_answers_each_load() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    # The others are the second one with another setting.
    names = (telemetry.BASELINE, "sampled")
    with telemetry.servers(names) as ports:
        for text, body in telemetry.LOADS.values():
            for name in names:
                port, _ = ports[name, text]
                latencies, _ = asyncio.run(closed_loop(port, body, 1, 2))
                assert len(latencies) == 2
