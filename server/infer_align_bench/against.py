"""What two targets' pairs come to: A over B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from infer_align_bench.figures import AMOUNTS, LATENCIES, as_json, met, rates, spent
from infer_align_bench.quantiles import ratios
from infer_align_bench.types import Run, Sample

TOKENS: dict[str, Callable[[Sample], float]] = {
    "returned_tokens": lambda sample: float(sample.tokens),
    "generated_tokens": lambda sample: float(spent(sample)),
}


def against(
    run: Run, names: tuple[str, str], goals: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """A over B. Latencies and tokens: over the pairs of which both were answered; `dropped` counts the others. Rates: all."""
    of = {name: {s.index: s for s in run.samples if s.target == name} for name in names}
    sent = sorted(of[names[0]].keys() | of[names[1]].keys())
    pairs = [i for i in sent if all(i in of[name] and of[name][i].ok for name in names)]
    found: dict[str, Any] = {"pairs": len(pairs), "dropped": len(sent) - len(pairs)}
    for metric, read in LATENCIES.items():
        a, b = ([read(of[name][i]) for i in pairs] for name in names)
        found[metric] = (
            {key: as_json(estimate) for key, estimate in ratios(a, b, seed).items()}
            if pairs
            else {}
        )
    for amount, count in TOKENS.items():
        ours, theirs = ([[count(of[name][i])] for i in pairs] for name in names)
        found[amount] = as_json(ratios(ours, theirs, seed)["mean"]) if pairs else None
    amounts = dict(AMOUNTS) | (
        {"goodput": lambda sample: float(met(sample, goals))} if goals else {}
    )
    first, second = (
        rates(
            list(of[name].values()), [s for s in run.spans if s.target == name], seed + i, amounts
        )
        for i, name in enumerate(names)
    )
    return found | {
        name: as_json(first[name].over(second[name])) if first and second else None
        for name in amounts
    }
