"""Check that measurements cover a planned request, and warn where a plan extrapolates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from infer_align.errors import ConfigError
from infer_align_bench.cost import Prices, Setting

# A length was varied if its longest value is at least this multiple of its shortest.
VARIED = 1.5
# A value outside the measured range, by more than this factor, is extrapolated.
TOLERANCE = 1.1
# More concurrency raises the throughput if it does so by at least this factor.
MIN_GAIN = 1.05
# Mean lengths of equal requests differ by less than this share from run to run.
LENGTH_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Feature:
    """A part of a request that only some requests have."""

    # Describes the requests that have it.
    adjective: str
    # Prices that it pays.
    prices: tuple[str, ...]


# By the field of Setting that is not zero.
FEATURES = {
    "k": Feature("steered", ("steer", "steered_step")),
    "reward_tokens": Feature("scored", ("reward",)),
    "judge_tokens": Feature("judged", ("judge",)),
}
LENGTHS = {"prompt_tokens": "prompts", "output_tokens": "answers"}


def refuse_unmeasured(settings: Sequence[Setting], planned: Setting) -> None:
    """Refuse to plan a request with a feature or a length that was not measured.

    Raises:
        ConfigError: no measured setting has the feature, or a length is outside the measured range
            and was not varied in the measurements.
    """
    for name, feature in FEATURES.items():
        measured = any(getattr(setting, name) for setting in settings)
        if getattr(planned, name) and not measured:
            raise ConfigError(
                f"{name}: no result has {feature.adjective} requests, so they have no price; "
                "measure some and add the result."
            )
    for name, noun in LENGTHS.items():
        if not _varied(settings, name) and not _covered(settings, name, planned):
            low, high = _range(settings, name)
            raise ConfigError(
                f"{name}: {getattr(planned, name):g} cannot be planned: all measured {noun} have "
                f"{low:.3g} to {high:.3g} tokens, too little variation to predict other lengths; "
                "measure some with --dataset synthetic --input-tokens ... --output-tokens ..."
            )


def extrapolation_warnings(
    prices: Prices, settings: Sequence[Setting], planned: Setting
) -> Iterator[str]:
    """Yield a warning for each part of a plan that the measurements do not support.

    Args:
        prices: fitted to the settings.
        settings: that were measured.
        planned: the planned request, with the planned concurrency.
    """
    for name, feature in FEATURES.items():
        priced = any(getattr(prices, price) for price in feature.prices)
        if getattr(planned, name) and not priced:
            yield (
                f"{name}: measured, but the fit gave it a price of zero: "
                "it is planned as if it were free."
            )
    if not _varied(settings, "prompt_tokens"):
        low, high = _range(settings, "prompt_tokens")
        yield (
            f"prompts were not varied ({low:.3g} to {high:.3g} tokens): "
            "the cost of reading them is part of other prices."
        )
    for name in (*LENGTHS, "k", "n"):
        value = getattr(planned, name)
        if value and not _covered(settings, name, planned):
            low, high = _range(settings, name)
            yield f"{name}: {value:g} is extrapolated; measured were {low:.3g} to {high:.3g}."
    sequences = planned.concurrency * planned.n
    max_measured = max(s.concurrency * s.n / s.replicas for s in settings)
    if sequences > TOLERANCE * max_measured:
        yield (
            f"{sequences:g} sequences at once are extrapolated; at most {max_measured:g} were "
            "measured: a replica may queue requests or fail. Measure with a larger "
            "--concurrency, or set --max-sequences."
        )


def saturation_warnings(settings: Sequence[Setting], measured: Sequence[float]) -> Iterator[str]:
    """Yield a warning for each load at which more concurrency gave no more throughput.

    Such a measurement contains waiting in a queue, not work.
    """
    for setting, latency in zip(settings, measured, strict=True):
        smaller_loads = []
        for other, other_latency in zip(settings, measured, strict=True):
            if other.concurrency < setting.concurrency and _same_request(setting, other):
                smaller_loads.append((other.concurrency / other_latency, other.concurrency))
        if not smaller_loads:
            continue
        throughput, concurrency = max(smaller_loads)
        if setting.concurrency / latency < MIN_GAIN * throughput:
            yield (
                f"saturated: {setting.concurrency:g} requests in flight give no more requests / s "
                f"than {concurrency:g} (n = {setting.n:g}): they wait in the server, and the "
                "prices include that waiting; leave that result out."
            )


def _same_request(first: Setting, second: Setting) -> bool:
    """Return True if two settings differ in their load only; mean lengths may differ a little."""
    adjusted = replace(
        first,
        concurrency=second.concurrency,
        prompt_tokens=second.prompt_tokens,
        output_tokens=second.output_tokens,
        reward_tokens=second.reward_tokens,
        judge_tokens=second.judge_tokens,
    )
    if adjusted != second:
        return False
    for name in (*LENGTHS, "reward_tokens", "judge_tokens"):
        values = (getattr(first, name), getattr(second, name))
        if abs(values[0] - values[1]) > LENGTH_TOLERANCE * max(values):
            return False
    return True


def _varied(settings: Sequence[Setting], name: str) -> bool:
    low, high = _range(settings, name)
    return high >= VARIED * max(low, 1e-9)


def _covered(settings: Sequence[Setting], name: str, planned: Setting) -> bool:
    """Return True if the planned value is in the measured range, with some tolerance."""
    low, high = _range(settings, name)
    value: float = getattr(planned, name)
    return low / TOLERANCE <= value <= high * TOLERANCE


def _range(settings: Sequence[Setting], name: str) -> tuple[float, float]:
    values = [getattr(setting, name) for setting in settings]
    return min(values), max(values)
