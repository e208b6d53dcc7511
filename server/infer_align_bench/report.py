"""Turn a run into one JSON object, which is printed, plotted and written to a file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from infer_align_bench.comparison import compare
from infer_align_bench.summary import summarize
from infer_align_bench.types import Load, Run, Sample, Target

SCHEMA = "infer-align/bench-serve/2"
LOAD_FIELDS = ("concurrency", "rate", "requests", "duration", "grace", "timeout", "max_in_flight")
SAMPLE_FIELDS = (
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


def build_report(
    run: Run,
    targets: Sequence[Target],
    load: Load,
    goals: Mapping[str, float],
    dataset: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the report of a run. Latencies are milliseconds; an estimate is {value, low, high}."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version(), "infer-align": version("infer-align")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": load.seed,
        "load": _load_fields(load),
        "dataset": dict(dataset),
        "goodput_ms": dict(goals),
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "abandoned": run.abandoned,
        "unsent": run.unsent,
        "targets": {target.name: _target_report(run, target, load, goals) for target in targets},
    }
    if len(targets) == 2:
        names = (targets[0].name, targets[1].name)
        report["ratios"] = compare(run, names, goals, load.seed)
    ordered = sorted(run.samples, key=lambda sample: (sample.index, sample.target))
    report["samples"] = [_sample_fields(sample) for sample in ordered]
    return report


def _load_fields(load: Load) -> dict[str, Any]:
    fields: dict[str, Any] = {"loop": "open" if load.open else "closed"}
    for name in LOAD_FIELDS:
        fields[name] = getattr(load, name)
    return fields


def _target_report(
    run: Run, target: Target, load: Load, goals: Mapping[str, float]
) -> dict[str, Any]:
    samples = [sample for sample in run.samples if sample.target == target.name]
    spans = [span for span in run.spans if span.target == target.name]
    return {
        "base_url": target.place,
        "model": target.model,
        "align": target.align,
        "body": dict(target.body),
        "stream": target.stream,
        "slices": [[span.began, span.ended] for span in spans],
        **summarize(samples, spans, load, goals),
    }


def _sample_fields(sample: Sample) -> dict[str, Any]:
    fields = {name: getattr(sample, name) for name in SAMPLE_FIELDS}
    fields["gaps"] = list(sample.gaps)
    fields["align"] = dict(sample.align)
    if not sample.ok:
        fields["error"] = sample.error
        fields["message"] = sample.message
    return fields
