"""From samples to figures: one JSON object for a run, the same whether it is printed, plotted or kept."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from infer_align_bench.quantiles import Estimate, estimates, rate, ratios
from infer_align_bench.types import Load, Run, Sample, Target

SCHEMA = "infer-align/bench-serve/1"
MILLISECONDS = 1e3

# What a request's latency is: the values in seconds, of which an answer may have none (it came whole) or many (its gaps).
LATENCIES: dict[str, Callable[[Sample], Sequence[float]]] = {
    "ttft": lambda sample: () if sample.ttft is None else (sample.ttft,),
    "tpot": lambda sample: () if sample.tpot is None else (sample.tpot,),
    "itl": lambda sample: sample.gaps,
    "e2e": lambda sample: (sample.e2e,),
}
GOALS = ("ttft", "tpot", "e2e")


def report(
    run: Run, targets: Sequence[Target], load: Load, goals: Mapping[str, float], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that is known of a run. Latencies are milliseconds; an estimate is {value, low, high}."""
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"python": platform.python_version(), "infer-align": version("infer-align")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": load.seed,
        "load": {
            "loop": "open" if load.open else "closed",
            **{name: getattr(load, name) for name in ("concurrency", "rate", "requests", "duration", "timeout", "max_in_flight")},
        },
        "dataset": dict(dataset),
        "goodput_ms": dict(goals),
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        "abandoned": run.abandoned,
        "targets": {},
    }
    for target in targets:
        samples = [sample for sample in run.samples if sample.target == target.name]
        made["targets"][target.name] = {**_described(target), **_figures(samples, load, goals, len(targets))}
    if len(targets) == 2:
        made["ratios"] = _against(run.samples, targets[0].name, targets[1].name, load.seed)
    made["samples"] = [_row(sample) for sample in sorted(run.samples, key=lambda s: (s.index, s.target))]
    return made


def _described(target: Target) -> dict[str, Any]:
    return {
        "base_url": target.place,
        "model": target.model,
        "align": target.align,
        "body": dict(target.body),
        "stream": target.stream,
    }


def _figures(samples: Sequence[Sample], load: Load, goals: Mapping[str, float], targets: int) -> dict[str, Any]:
    done = [sample for sample in samples if sample.ok]
    latency = {name: estimates([read(sample) for sample in done], load.seed) for name, read in LATENCIES.items()}
    return {
        "requests": {"sent": len(samples), "answered": len(done), "failed": len(samples) - len(done)},
        "errors": _errors(samples),
        "latency_ms": {name: {key: _json(e, MILLISECONDS) for key, e in found.items()} for name, found in latency.items()},
        "rates": _rates(done, load, targets),
        "goodput": _goodput(samples, load, goals, targets) if goals else None,
        "tokens": _tokens(done),
        "send_delay_ms": {
            key: _json(e, MILLISECONDS) for key, e in estimates([s.started - s.intended for s in samples], load.seed).items()
        }
        if load.open
        else {},
    }


def _errors(samples: Sequence[Sample]) -> dict[str, Any]:
    kinds = Counter(sample.error for sample in samples if sample.error is not None)
    first = {sample.error: sample.message for sample in reversed(samples) if not sample.ok}
    return {kind: {"count": count, "first": first[kind]} for kind, count in kinds.most_common()}


def _rates(done: Sequence[Sample], load: Load, targets: int) -> dict[str, Any]:
    amounts: dict[str, list[float]] = {
        "requests_per_second": [1.0] * len(done),
        "output_tokens_per_second": [sample.tokens for sample in done],
        "generated_tokens_per_second": [sample.tokens if sample.spent is None else sample.spent for sample in done],
    }
    return {name: _rate(values, done, load, targets) for name, values in amounts.items()}


def _rate(values: Sequence[float], samples: Sequence[Sample], load: Load, targets: int) -> dict[str, Any] | None:
    """Something per second, while the target has its turn.

    One target: over the time from the first request to the last end. Two in a closed loop take turns in each place, so each has the
    time that its requests took: sum(latency) / concurrency. The interval is that of the ratio of sums over requests.
    """
    if not samples:
        return None
    window = max(s.ended for s in samples) - min(s.intended for s in samples)
    shared = not load.open and targets > 1
    time = sum(s.e2e for s in samples) / (load.concurrency or 1) if shared else window
    if load.open:
        ends = sorted(s.ended for s in samples)
        seconds = [b - a for a, b in zip([min(s.intended for s in samples), *ends], ends, strict=False)]
    else:
        seconds = [s.e2e for s in samples]
    relative = rate(values, seconds, load.seed)
    value = sum(values) / time if time else math.nan
    scale = value / relative.value if relative.value else math.nan
    return _json(Estimate(value, relative.low * scale, relative.high * scale), 1.0)


def _goodput(samples: Sequence[Sample], load: Load, goals: Mapping[str, float], targets: int) -> dict[str, Any] | None:
    """Requests that met every goal: a failed one met none; an answer in one piece has no TPOT to miss."""
    if not samples:
        return None
    good = [float(sample.ok and all(_met(sample, name, limit) for name, limit in goals.items())) for sample in samples]
    share = estimates([(value,) for value in good], load.seed)["mean"]
    return {"share": _json(share, 1.0), "requests_per_second": _rate(good, samples, load, targets)}


def _met(sample: Sample, name: str, limit_ms: float) -> bool:
    return all(value * MILLISECONDS <= limit_ms for value in LATENCIES[name](sample))


def _tokens(done: Sequence[Sample]) -> dict[str, Any]:
    """Sums. `counted_by` says whether the endpoint counted the returned tokens, or the chunks stand for them."""
    told = sum(sample.returned is not None for sample in done)
    returned, chunks = sum(sample.tokens for sample in done), sum(sample.chunks for sample in done)
    spent = sum(sample.tokens if sample.spent is None else sample.spent for sample in done)
    streamed = sum(sample.tokens for sample in done if sample.chunks)
    align: Counter[str] = Counter()
    for sample in done:
        align.update(sample.align)
    return {
        "prompt": sum(sample.prompt_tokens or 0 for sample in done),
        "spent": spent,
        "returned": returned,
        "spent_per_returned": spent / returned if returned else None,
        "counted_by": "usage" if told == len(done) else "mixed" if told else "chunks",
        "chunks": chunks,
        "tokens_per_chunk": streamed / chunks if chunks else None,
        "align": dict(align),
    }


def _against(samples: Sequence[Sample], ours: str, baseline: str, seed: int) -> dict[str, Any]:
    """A over B, over the pairs of which both were answered."""
    of = {name: {s.index: s for s in samples if s.target == name and s.ok} for name in (ours, baseline)}
    pairs = sorted(of[ours].keys() & of[baseline].keys())
    found: dict[str, Any] = {"pairs": len(pairs)}
    for name, read in LATENCIES.items():
        a, b = ([read(of[side][i]) for i in pairs] for side in (ours, baseline))
        found[name] = {key: _json(estimate, 1.0) for key, estimate in ratios(a, b, seed).items()} if pairs else {}
    return found


def _row(sample: Sample) -> dict[str, Any]:
    row = {name: getattr(sample, name) for name in ("target", "index", "intended", "started", "ended", "first", "chunks")}
    row |= {name: getattr(sample, name) for name in ("prompt_tokens", "spent", "returned", "finish_reason")}
    return row if sample.ok else {**row, "error": sample.error, "message": sample.message}


def _json(estimate: Estimate, scale: float) -> dict[str, float | None]:
    return {name: value * scale if math.isfinite(value := getattr(estimate, name)) else None for name in ("value", "low", "high")}
