"""What one target's samples come to. Latencies are milliseconds; an estimate is {value, low, high}."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infer_align_bench.quantiles import Estimate, Rate, estimates, rate, share
from infer_align_bench.types import Load, Sample, Span

MILLISECONDS = 1e3

# What a request's latency is: the values in seconds, of which an answer may have none (it came whole) or many (its gaps).
LATENCIES: dict[str, Callable[[Sample], Sequence[float]]] = {
    "ttft": lambda sample: () if sample.ttft is None else (sample.ttft,),
    "tpot": lambda sample: () if sample.tpot is None else (sample.tpot,),
    "itl": lambda sample: sample.gaps,
    "e2e": lambda sample: (sample.e2e,),
}
GOALS = ("ttft", "tpot", "e2e")
AMOUNTS: dict[str, Callable[[Sample], float]] = {
    "requests_per_second": lambda sample: float(sample.ok),
    "output_tokens_per_second": lambda sample: float(sample.tokens) if sample.ok else 0.0,
    "generated_tokens_per_second": lambda sample: float(spent(sample)) if sample.ok else 0.0,
}


def figures(
    samples: Sequence[Sample], spans: Sequence[Span], load: Load, goals: Mapping[str, float]
) -> dict[str, Any]:
    """Of one target: its samples, and the time for which it was under load."""
    in_order = sorted(samples, key=lambda s: s.index)
    done = [sample for sample in in_order if sample.ok]
    latency = {
        name: estimates([read(sample) for sample in done], load.seed)
        for name, read in LATENCIES.items()
    }
    delays = estimates([s.started - s.intended for s in in_order], load.seed) if load.open else {}
    return {
        "seconds": sum(span.ended - span.began for span in spans),
        "requests": {
            "sent": len(samples),
            "answered": len(done),
            "failed": len(samples) - len(done),
        },
        "errors": _errors(samples),
        "latency_ms": {
            name: {key: as_json(e, MILLISECONDS) for key, e in found.items()}
            for name, found in latency.items()
        },
        "rates": {
            name: as_json(found.estimate)
            for name, found in rates(samples, spans, load.seed).items()
        },
        "goodput": _goodput(samples, spans, load, goals) if goals else None,
        "tokens": _tokens(done),
        "send_delay_ms": {key: as_json(e, MILLISECONDS) for key, e in delays.items()},
    }


def rates(
    samples: Sequence[Sample],
    spans: Sequence[Span],
    seed: int,
    amounts: Mapping[str, Callable[[Sample], float]] = AMOUNTS,
) -> dict[str, Rate]:
    """Per second of the time under load; {} where nothing ended. A failed request adds nothing, and its time counts."""
    ended, seconds = _times(samples, spans)
    if not ended or not sum(seconds):
        return {}
    return {
        name: rate([read(sample) for sample in ended], seconds, seed)
        for name, read in amounts.items()
    }


def _times(samples: Sequence[Sample], spans: Sequence[Span]) -> tuple[list[Sample], list[float]]:
    """Samples as they ended, and how long after the one before; the first and the last of a span have its ends too."""
    ended: list[Sample] = []
    seconds: list[float] = []
    left = 0.0
    for span in spans:
        within = sorted(
            (s for s in samples if span.began <= s.ended <= span.ended), key=lambda s: s.ended
        )
        if not within:
            left += span.ended - span.began
            continue
        times = [span.began, *(s.ended for s in within)]
        seconds += [b - a for a, b in itertools.pairwise(times)]
        seconds[-1] += span.ended - times[-1]
        ended += within
    if seconds:
        seconds[-1] += left
    return ended, seconds


def _goodput(
    samples: Sequence[Sample], spans: Sequence[Span], load: Load, goals: Mapping[str, float]
) -> dict[str, Any] | None:
    """Requests that were seen to meet every goal: neither a failed one, nor one whose time was not measured, has met it."""
    if not samples:
        return None
    good = sum(met(sample, goals) for sample in samples)
    found = rates(samples, spans, load.seed, {"good": lambda sample: float(met(sample, goals))})
    unmeasured = {name: sum(s.ok and not LATENCIES[name](s) for s in samples) for name in goals}
    return {
        "share": as_json(share(good, len(samples))),
        "requests_per_second": as_json(found["good"].estimate) if found else None,
        "unmeasured": {name: count for name, count in unmeasured.items() if count},
    }


def met(sample: Sample, goals: Mapping[str, float]) -> bool:
    """Whether it was answered, with every goal measured and kept; milliseconds."""
    return sample.ok and all(
        bool(values := LATENCIES[name](sample)) and max(values) * MILLISECONDS <= limit
        for name, limit in goals.items()
    )


def _errors(samples: Sequence[Sample]) -> dict[str, Any]:
    kinds = Counter(sample.error for sample in samples if sample.error is not None)
    first = {sample.error: sample.message for sample in reversed(samples) if not sample.ok}
    return {kind: {"count": count, "first": first[kind]} for kind, count in kinds.most_common()}


def spent(sample: Sample) -> int:
    """Generated tokens; the returned ones where the endpoint does not say."""
    return sample.tokens if sample.spent is None else sample.spent


def _tokens(done: Sequence[Sample]) -> dict[str, Any]:
    """Sums. `counted_by` says whether the endpoint counted the returned tokens, or the chunks stand for them."""
    told = sum(sample.returned is not None for sample in done)
    returned, chunks = sum(sample.tokens for sample in done), sum(sample.chunks for sample in done)
    generated = sum(spent(sample) for sample in done)
    streamed = sum(sample.tokens for sample in done if sample.chunks)
    align: Counter[str] = Counter()
    for sample in done:
        align.update(sample.align)
    return {
        "prompt": sum(sample.prompt_tokens or 0 for sample in done),
        "spent": generated,
        "returned": returned,
        "spent_per_returned": generated / returned if returned else None,
        "counted_by": "usage" if told == len(done) else "mixed" if told else "chunks",
        "chunks": chunks,
        "tokens_per_chunk": streamed / chunks if chunks else None,
        "align": dict(align),
    }


def as_json(estimate: Estimate, scale: float = 1.0) -> dict[str, float | None]:
    """An estimate for a file; null for what is not known."""
    return {
        name: value * scale if math.isfinite(value := getattr(estimate, name)) else None
        for name in ("value", "low", "high")
    }
