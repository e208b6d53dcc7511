"""Compare two targets: the ratio A / B over their pairs of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infer_align_bench.intervals import ratios
from infer_align_bench.summary import (
    AMOUNTS,
    LATENCIES,
    Amount,
    Goals,
    Latencies,
    as_json,
    meets_goals,
    rates,
)
from infer_align_bench.types import Run, Sample

TOKENS: dict[str, Amount] = {
    "returned_tokens": lambda sample: float(sample.tokens),
    "generated_tokens": lambda sample: float(sample.generated_tokens),
}
Pair = tuple[Sample, Sample]


def compare(run: Run, names: tuple[str, str], goals: Goals, seed: int) -> dict[str, Any]:
    """Return the ratios of the first target to the second.

    Latencies and tokens are compared over the pairs in which both requests were answered;
    `dropped` counts the other pairs. Rates are compared over all requests.

    Args:
        run: of both targets.
        names: of the two targets.
        goals: latency limits in milliseconds, by name; {} for no goodput.
        seed: of the resamples.
    """
    pairs, total = _answered_pairs(run, names)
    result: dict[str, Any] = {"pairs": len(pairs), "dropped": total - len(pairs)}
    for metric, read in LATENCIES.items():
        result[metric] = _latency_ratios(pairs, read, seed)
    for amount, count in TOKENS.items():
        result[amount] = _token_ratio(pairs, count, seed)
    return result | _rate_ratios(run, names, goals, seed)


def _answered_pairs(run: Run, names: tuple[str, str]) -> tuple[list[Pair], int]:
    """Return the pairs in which both requests were answered, and the number of all pairs."""
    indices = sorted({sample.index for sample in run.samples})
    first_answers = _answers(run, names[0])
    second_answers = _answers(run, names[1])
    pairs = []
    for index in indices:
        if index in first_answers and index in second_answers:
            pairs.append((first_answers[index], second_answers[index]))
    return pairs, len(indices)


def _answers(run: Run, name: str) -> dict[int, Sample]:
    """Return the answered requests of a target by their index."""
    answers = {}
    for sample in run.samples:
        if sample.target == name and sample.ok:
            answers[sample.index] = sample
    return answers


def _latency_ratios(pairs: Sequence[Pair], read: Latencies, seed: int) -> dict[str, Any]:
    if not pairs:
        return {}
    numerator = [read(first) for first, _ in pairs]
    denominator = [read(second) for _, second in pairs]
    result = {}
    for name, estimate in ratios(numerator, denominator, seed).items():
        result[name] = as_json(estimate)
    return result


def _token_ratio(pairs: Sequence[Pair], count: Amount, seed: int) -> dict[str, float | None] | None:
    if not pairs:
        return None
    numerator = [[count(first)] for first, _ in pairs]
    denominator = [[count(second)] for _, second in pairs]
    return as_json(ratios(numerator, denominator, seed)["mean"])


def _rate_ratios(run: Run, names: tuple[str, str], goals: Goals, seed: int) -> dict[str, Any]:
    amounts = dict(AMOUNTS)
    if goals:
        amounts["goodput"] = lambda sample: float(meets_goals(sample, goals))
    target_rates = []
    for i, name in enumerate(names):
        samples = [sample for sample in run.samples if sample.target == name]
        spans = [span for span in run.spans if span.target == name]
        # The targets were measured independently and need independent resamples.
        target_rates.append(rates(samples, spans, seed + i, amounts))
    first, second = target_rates
    if not first or not second:
        return dict.fromkeys(amounts)
    return {name: as_json(first[name].over(second[name])) for name in amounts}
