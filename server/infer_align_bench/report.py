"""From a run to one JSON object, the same whether it is printed, plotted or kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from infer_align_bench.against import against
from infer_align_bench.figures import figures
from infer_align_bench.types import Load, Run, Sample, Target

SCHEMA = "infer-align/bench-serve/2"
LOAD = ("concurrency", "rate", "requests", "duration", "grace", "timeout", "max_in_flight")
ROW = (
    "target",
    "index",
    "intended",
    "started",
    "ended",
    "first",
    "chunks",
    "prompt_tokens",
    "spent",
    "returned",
    "finish_reason",
)


def report(
    run: Run,
    targets: Sequence[Target],
    load: Load,
    goals: Mapping[str, float],
    dataset: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that is known of a run. Latencies are milliseconds; an estimate is {value, low, high}."""
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version(), "infer-align": version("infer-align")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": load.seed,
        "load": {
            "loop": "open" if load.open else "closed",
            **{name: getattr(load, name) for name in LOAD},
        },
        "dataset": dict(dataset),
        "goodput_ms": dict(goals),
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "abandoned": run.abandoned,
        "unsent": run.unsent,
        "targets": {},
    }
    for target in targets:
        samples = [sample for sample in run.samples if sample.target == target.name]
        spans = [span for span in run.spans if span.target == target.name]
        slices = {"slices": [[span.began, span.ended] for span in spans]}
        made["targets"][target.name] = {
            **_described(target),
            **slices,
            **figures(samples, spans, load, goals),
        }
    if len(targets) == 2:
        made["ratios"] = against(run, (targets[0].name, targets[1].name), goals, load.seed)
    made["samples"] = [
        _row(sample) for sample in sorted(run.samples, key=lambda s: (s.index, s.target))
    ]
    return made


def _described(target: Target) -> dict[str, Any]:
    return {
        "base_url": target.place,
        "model": target.model,
        "align": target.align,
        "body": dict(target.body),
        "stream": target.stream,
    }


def _row(sample: Sample) -> dict[str, Any]:
    row = {name: getattr(sample, name) for name in ROW} | {
        "gaps": list(sample.gaps),
        "align": dict(sample.align),
    }
    return row if sample.ok else {**row, "error": sample.error, "message": sample.message}
