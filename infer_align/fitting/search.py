"""Search the weights beta at which steering is a given distance from the frozen model.

The distance is the KL in nats per reply, which is measured by sampling. It grows about as beta² as
long as beta is small, so the search works with logarithms of both.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from infer_align.fitting.curve import BetaSample

# A beta is accepted if its KL is within these shares of the target.
ACCEPTED = (0.7, 1.05)
# Share of the target that the search aims at: the middle of the accepted range, in logarithms.
AIM = math.sqrt(ACCEPTED[0] * ACCEPTED[1])
MAX_TRIES = 3
# A small sample has this KL at least before its beta can be extrapolated from: it is noisy.
PROBE_KL = 0.3
PROBE_FACTOR = 4.0
SMALLEST_BETA = 1e-6
# Limits of the exponent of KL in beta when it is extrapolated, and of one step of beta.
MIN_EXPONENT, MAX_EXPONENT = 1.0, 3.0
QUADRATIC = 2.0
MAX_STEP = 8.0


@dataclass(frozen=True, slots=True)
class Trials:
    """The two ways to measure a beta.

    Attributes:
        probe: return a rough KL, from few replies.
        run: return all replies.
    """

    probe: Callable[[float], Awaitable[float]]
    run: Callable[[float], Awaitable[BetaSample]]


@dataclass(frozen=True, slots=True)
class _Place:
    """A beta and its KL."""

    beta: float
    kl: float


async def search_betas(
    trials: Trials, targets: Sequence[float], largest_beta: float
) -> list[BetaSample]:
    """Measure beta 0, and then a beta for each target.

    Args:
        trials: the measurements. Each costs replies, so the search makes few of them.
        targets: KL values in nats per reply, all above 0.
        largest_beta: the search measures no larger beta.

    Returns:
        Every beta with all replies, in ascending order. The last one has a KL below the largest
        target only if it is the largest beta, or if the measurements are too noisy to come closer.
    """
    samples = [await trials.run(0.0)]
    start = await _find_scale(trials, largest_beta)
    for target in sorted(set(targets)):
        for _ in range(MAX_TRIES):
            beta = _propose(start, samples, target, largest_beta)
            if beta is None:
                break
            samples.append(await trials.run(beta))
    return sorted(samples, key=lambda sample: sample.beta)


async def _find_scale(trials: Trials, largest_beta: float) -> _Place:
    """Return a beta whose KL is measurable and not far above `PROBE_KL`, from few replies."""
    beta = min(1.0, largest_beta)
    kl = await trials.probe(beta)
    while kl > PROBE_KL * PROBE_FACTOR**QUADRATIC and beta > SMALLEST_BETA:
        beta /= PROBE_FACTOR
        kl = await trials.probe(beta)
    while kl < PROBE_KL and beta < largest_beta:
        beta = min(beta * PROBE_FACTOR, largest_beta)
        kl = await trials.probe(beta)
    return _Place(beta, kl)


def _propose(
    start: _Place, samples: Sequence[BetaSample], target: float, largest_beta: float
) -> float | None:
    """Return the next beta to measure for a target; None if no measurement brings it closer."""
    low, high = (share * target for share in ACCEPTED)
    places = [_Place(sample.beta, sample.kl) for sample in samples if sample.beta > 0]
    if any(low <= place.kl <= high for place in places):
        return None
    aim = AIM * target
    below = max((p for p in places if p.kl < aim), key=lambda p: p.beta, default=None)
    above = min((p for p in places if p.kl >= aim), key=lambda p: p.beta, default=None)
    if below and above:
        beta = _between(below, above, aim)
    elif above:
        beta = _extrapolate(above, QUADRATIC, aim)
    elif below:
        beta = _extrapolate(below, _exponent(places), aim)
    else:
        beta = _extrapolate(start, QUADRATIC, aim)
    if beta is None:
        return None
    # A suggestion is written by people into requests, so it has three digits.
    beta = min(float(f"{beta:.3g}"), largest_beta)
    is_new = all(place.beta != beta for place in places)
    return beta if is_new else None


def _between(below: _Place, above: _Place, aim: float) -> float | None:
    """Interpolate in logarithms; None where noise has put the places in the wrong order."""
    if below.beta >= above.beta:
        return None
    if below.kl <= 0:
        return math.sqrt(below.beta * above.beta)
    share = math.log(aim / below.kl) / math.log(above.kl / below.kl)
    return float(below.beta * (above.beta / below.beta) ** share)


def _exponent(places: Sequence[_Place]) -> float:
    """Return the exponent of KL in beta between the last two places, within its limits."""
    ordered = sorted(places, key=lambda place: place.beta)[-2:]
    if len(ordered) < 2 or ordered[0].kl <= 0 or ordered[1].kl <= ordered[0].kl:
        return QUADRATIC
    steps = math.log(ordered[1].beta / ordered[0].beta)
    exponent = math.log(ordered[1].kl / ordered[0].kl) / steps
    return min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)


def _extrapolate(place: _Place, exponent: float, aim: float) -> float:
    """Return the beta with the KL `aim` if KL is a power of beta; one step has a limit."""
    if place.kl <= 0:
        return place.beta * MAX_STEP
    factor = (aim / place.kl) ** (1 / exponent)
    return float(place.beta * min(max(factor, 1 / MAX_STEP), MAX_STEP))
