"""Print the trace of one best-of-8, as a collector receives it.

    python -m benchmarks.serving.trace_tree

A server with the embedded demo answers one request, and sends its spans and events over OTLP/HTTP
to a collector in this process. Each line is a span: its name, its time, and what it says.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.serving.client import DEMO, Connection, serving
from tests.server.collector import Collector, collector

BODY = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
    "max_tokens": 24,
    "seed": 7,
    "align": {"best_of_n": {"n": 8}},
}
NAME_WIDTH = 32

Span = Mapping[str, Any]


def tree(received: Collector) -> list[str]:
    """Return the spans of a collector as lines, children below their parents."""
    names = {span["span_id"] for span in received.spans}
    scores: dict[str, list[Mapping[str, Any]]] = {}
    for event in received.events:
        scores.setdefault(event["span_id"], []).append(event["attributes"])
    lines: list[str] = []
    roots = [span for span in received.spans if span["parent_id"] not in names]
    for root in _in_order(roots):
        lines.append(_line(root, "", scores))
        lines += _below(root, "", received.spans, scores)
    return lines


def _below(
    parent: Span,
    indent: str,
    spans: Sequence[Span],
    scores: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """Return the lines of all descendants of a span."""
    children = _in_order([span for span in spans if span["parent_id"] == parent["span_id"]])
    lines = []
    for child in children:
        is_last = child is children[-1]
        lines.append(_line(child, f"{indent}{'└─' if is_last else '├─'} ", scores))
        lines += _below(child, f"{indent}{'   ' if is_last else '│  '}", spans, scores)
    return lines


def _in_order(spans: Sequence[Span]) -> list[Span]:
    """Return spans by their beginning, and candidates, which begin together, by their number."""
    return sorted(
        spans,
        key=lambda span: (span["begin"], span["attributes"].get("infer_align.candidate.index", 0)),
    )


def _line(span: Span, indent: str, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    attributes = span["attributes"]
    name = f"{indent}{span['name']}"
    facts = []
    if "infer_align.candidate.index" in attributes:
        index = attributes["infer_align.candidate.index"]
        tokens = attributes["gen_ai.usage.output_tokens"]
        facts.append(f"candidate {index}, {tokens} tokens")
    for score in scores.get(span["span_id"], ()):
        value = score.get("gen_ai.evaluation.score.value", math.nan)
        facts.append(f"{score['gen_ai.evaluation.name']} {value:.3f}")
    if "infer_align.selected" in attributes:
        indices = ", ".join(str(index) for index in attributes["infer_align.selected"])
        facts.append(f"selected {indices}: {attributes['infer_align.reason']}")
    if span["failed"]:
        facts.append(f"failed: {attributes['error.type']}")
    line = f"{name:<{NAME_WIDTH}} {span['seconds'] * 1e3:8.1f} ms  {'; '.join(facts)}"
    return line.rstrip()


def best_of_8() -> list[str]:
    """Let a server with the embedded demo answer a best-of-8; return its trace."""
    with collector() as received:
        endpoint = f'telemetry.endpoint="{received.url}"'
        with serving(*DEMO, "--set", endpoint) as (port, _):
            # The first request also compiles and warms up.
            asyncio.run(_post(port, {**BODY, "align": None}))
            asyncio.run(_post(port, BODY))
        # The end of the server has sent everything.
        warm_up = min(received.spans, key=lambda span: span["begin"])["trace_id"]
        received.spans = [span for span in received.spans if span["trace_id"] != warm_up]
        return tree(received)


async def _post(port: int, body: Mapping[str, Any]) -> None:
    connection = Connection(port)
    fields = {name: value for name, value in body.items() if value is not None}
    await connection.post("/v1/chat/completions", json.dumps(fields).encode())
    connection.close()


if __name__ == "__main__":
    print(*best_of_8(), sep="\n")
