"""Summarize the samples of one target. Latencies are milliseconds.

An estimate is written as {value, low, high}.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infer_align_bench.intervals import IntervalEstimate, Rate, estimates, rate, share
from infer_align_bench.types import Load, Sample, Span

MILLISECONDS = 1e3

# Limits of latencies in milliseconds, by name.
Goals = Mapping[str, float]
# Reads an amount of a request, which is added up.
Amount = Callable[[Sample], float]
# Reads the latencies of a request in seconds.
Latencies = Callable[[Sample], Sequence[float]]

# The latencies of a request in seconds. An answer that arrived in one chunk has no "tpot" and no
# "itl" (gaps between chunks); a longer one has many gaps.
LATENCIES: dict[str, Latencies] = {
    "ttft": lambda sample: () if sample.ttft is None else (sample.ttft,),
    "tpot": lambda sample: () if sample.tpot is None else (sample.tpot,),
    "itl": lambda sample: sample.gaps,
    "e2e": lambda sample: (sample.e2e,),
}
GOALS = ("ttft", "tpot", "e2e")
# The amounts whose rate per second is reported. A failed request contributes nothing.
AMOUNTS: dict[str, Amount] = {
    "requests_per_second": lambda sample: float(sample.ok),
    "output_tokens_per_second": lambda sample: float(sample.tokens) if sample.ok else 0.0,
    "generated_tokens_per_second": (
        lambda sample: float(sample.generated_tokens) if sample.ok else 0.0
    ),
}


def summarize(
    samples: Sequence[Sample], spans: Sequence[Span], load: Load, goals: Goals
) -> dict[str, Any]:
    """Summarize one target.

    Args:
        samples: of the target.
        spans: the times in which the target was under load.
        load: of the run.
        goals: latency limits in milliseconds, by name; {} for no goodput.
    """
    ordered = sorted(samples, key=lambda sample: sample.index)
    answered = [sample for sample in ordered if sample.ok]
    latencies = {}
    for name, read in LATENCIES.items():
        latencies[name] = _milliseconds([read(sample) for sample in answered], load.seed)
    delays = {}
    if load.open:
        delays = _milliseconds([(s.started - s.intended,) for s in ordered], load.seed)
    target_rates: dict[str, Any] = {}
    for name, value in rates(samples, spans, load.seed).items():
        target_rates[name] = as_json(value.estimate)
    return {
        "seconds": sum(span.ended - span.began for span in spans),
        "requests": {
            "sent": len(samples),
            "answered": len(answered),
            "failed": len(samples) - len(answered),
        },
        "errors": _errors(samples),
        "latency_ms": latencies,
        "rates": target_rates,
        "goodput": _goodput(samples, spans, load, goals) if goals else None,
        "tokens": _tokens(answered),
        "send_delay_ms": delays,
    }


def _milliseconds(groups: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    result = {}
    for name, estimate in estimates(groups, seed).items():
        result[name] = as_json(estimate, MILLISECONDS)
    return result


def rates(
    samples: Sequence[Sample],
    spans: Sequence[Span],
    seed: int,
    amounts: Mapping[str, Amount] = AMOUNTS,
) -> dict[str, Rate]:
    """Return each amount per second under load; {} if no request ended.

    A failed request adds nothing to an amount, but its time counts.
    """
    ended, seconds = _intervals_between_ends(samples, spans)
    if not ended or not sum(seconds):
        return {}
    result = {}
    for name, read in amounts.items():
        result[name] = rate([read(sample) for sample in ended], seconds, seed)
    return result


def _intervals_between_ends(
    samples: Sequence[Sample], spans: Sequence[Span]
) -> tuple[list[Sample], list[float]]:
    """Return the samples in the order of their ends, and the seconds since the previous end.

    The first sample of a span counts from the span's start; the last one also gets the time up to
    the span's end. The seconds therefore add up to the seconds of all spans.
    """
    ended: list[Sample] = []
    seconds: list[float] = []
    # Time of spans in which nothing ended.
    idle = 0.0
    for span in spans:
        # Spans of a target may touch: half-open, so that no end belongs to two of them.
        inside = [sample for sample in samples if span.began < sample.ended <= span.ended]
        if not inside:
            idle += span.ended - span.began
            continue
        inside.sort(key=lambda sample: sample.ended)
        times = [span.began, *(sample.ended for sample in inside)]
        seconds += [later - earlier for earlier, later in itertools.pairwise(times)]
        seconds[-1] += span.ended - times[-1]
        ended += inside
    if seconds:
        seconds[-1] += idle
    return ended, seconds


def _goodput(
    samples: Sequence[Sample], spans: Sequence[Span], load: Load, goals: Goals
) -> dict[str, Any] | None:
    """Summarize the requests that met every goal.

    A failed request meets no goal, and neither does one without the latency of a goal.
    """
    if not samples:
        return None
    successes = sum(meets_goals(sample, goals) for sample in samples)
    amounts = {"goodput": lambda sample: float(meets_goals(sample, goals))}
    goodput = rates(samples, spans, load.seed, amounts).get("goodput")
    unmeasured = {}
    for name in goals:
        count = sum(sample.ok and not LATENCIES[name](sample) for sample in samples)
        if count:
            unmeasured[name] = count
    return {
        "share": as_json(share(successes, len(samples))),
        "requests_per_second": as_json(goodput.estimate) if goodput else None,
        "unmeasured": unmeasured,
    }


def meets_goals(sample: Sample, goals: Goals) -> bool:
    """Return True if the request was answered within every goal (milliseconds)."""
    if not sample.ok:
        return False
    for name, limit in goals.items():
        values = LATENCIES[name](sample)
        if not values or max(values) * MILLISECONDS > limit:
            return False
    return True


def _errors(samples: Sequence[Sample]) -> dict[str, Any]:
    """Count the errors by kind, with the first message of each kind."""
    counts = Counter(sample.error for sample in samples if sample.error is not None)
    first_messages: dict[str | None, str] = {}
    for sample in samples:
        if not sample.ok:
            first_messages.setdefault(sample.error, sample.message)
    result = {}
    for kind, count in counts.most_common():
        result[kind] = {"count": count, "first": first_messages[kind]}
    return result


def _tokens(answered: Sequence[Sample]) -> dict[str, Any]:
    """Add up the tokens.

    `counted_by` is "usage" if the endpoint counted the returned tokens, "chunks" if each chunk
    counts as one token, and "mixed" if only some answers have a usage.
    """
    with_usage = prompt = returned = generated = chunks = streamed = 0
    align: Counter[str] = Counter()
    for sample in answered:
        with_usage += sample.returned is not None
        prompt += sample.prompt_tokens or 0
        returned += sample.tokens
        generated += sample.generated_tokens
        chunks += sample.chunks
        if sample.chunks:
            streamed += sample.tokens
        align.update(sample.align)
    counted_by = "mixed" if with_usage else "chunks"
    if with_usage == len(answered):
        counted_by = "usage"
    return {
        "prompt": prompt,
        "spent": generated,
        "returned": returned,
        "spent_per_returned": generated / returned if returned else None,
        "counted_by": counted_by,
        "chunks": chunks,
        "tokens_per_chunk": streamed / chunks if chunks else None,
        "align": dict(align),
    }


def as_json(estimate: IntervalEstimate, scale: float = 1.0) -> dict[str, float | None]:
    """Return an estimate for a JSON file; null for an unknown end."""
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: end * scale if math.isfinite(end) else None for name, end in ends.items()}
