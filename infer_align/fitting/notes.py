"""Sentences about a suggested beta that a user should read before using it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from infer_align.config.fitting import FitConfig
from infer_align.fitting.baseline import BestOfPoint
from infer_align.fitting.curve import (
    KL_TOLERANCE,
    SIGNIFICANT_ERRORS,
    BetaPoint,
    BetaSample,
    Groups,
    clustered_mean,
    make_points,
)


def explain(
    samples: Sequence[BetaSample],
    groups: Groups,
    suggested: float,
    config: FitConfig,
    baseline: Sequence[BestOfPoint],
) -> Iterator[str]:
    """Yield what a user should know about the suggestion.

    Args:
        samples: all measured betas.
        groups: [N] prompt of each reply.
        suggested: the suggested beta.
        config: settings of the search.
        baseline: best-of-n on the same prompts.
    """
    points = make_points(samples, groups)
    steered = [point for point in points if point.beta > 0]
    point = next(point for point in points if point.beta == suggested)
    within = [p for p in steered if p.kl <= KL_TOLERANCE * config.kl_limit]
    if suggested == 0:
        yield _no_effect(steered, within, config)
    elif point.beta == max(p.beta for p in within):
        yield _end_of_grid(point, config)
    yield from _beyond_limit(samples, groups, suggested, config)
    yield from _better_baseline(point, baseline)
    for p in points:
        if p.unscored:
            yield (
                f"With beta {p.beta:.4g}, {p.unscored} of {config.curve_replies} replies could not "
                "be scored. They are left out."
            )


def _no_effect(steered: Sequence[BetaPoint], within: Sequence[BetaPoint], config: FitConfig) -> str:
    """Return why no beta is suggested."""
    scored = [point for point in within if math.isfinite(point.gain)]
    if not scored:
        smallest = min(steered, key=lambda point: point.kl)
        return (
            f"No beta was measured within kl_limit = {config.kl_limit:g} nats; the smallest KL is "
            f"{smallest.kl:.3g} nats, with beta {smallest.beta:.4g}."
        )
    best = max(scored, key=lambda point: point.gain)
    farthest = max(scored, key=lambda point: point.kl)
    return (
        f"No beta differs from 0 by two standard errors, up to {farthest.kl:.3g} nats. The best is "
        f"beta {best.beta:.4g}: {best.gain:+.3f} ± {best.gain_se:.3f}. Fit the value to more "
        "samples, or measure more replies with --fit curve_replies."
    )


def _end_of_grid(point: BetaPoint, config: FitConfig) -> str:
    """Return a warning that a larger beta may be better."""
    beta = f"Beta {point.beta:.4g} is the end of the grid, at {point.kl:.3g} nats"
    if point.beta >= config.largest_beta:
        return f"{beta}: it is largest_beta. A larger one may be better."
    return (
        f"{beta}: a larger beta within kl_limit = {config.kl_limit:g} was not measured. A larger "
        "one may gain more. To look further, raise --fit kl_limit, and read the replies: far from "
        "the frozen model, text breaks."
    )


def _beyond_limit(
    samples: Sequence[BetaSample], groups: Groups, suggested: float, config: FitConfig
) -> Iterator[str]:
    """Yield a warning about the best beta above the limit, if it is measurably better."""
    reference = next(sample for sample in samples if sample.beta == suggested)
    best = None
    for sample in samples:
        if sample.kl <= KL_TOLERANCE * config.kl_limit:
            continue
        more, error = clustered_mean(sample.rewards - reference.rewards, groups)
        if more > SIGNIFICANT_ERRORS * error and (best is None or more > best[0]):
            best = (more, error, sample)
    if best is None:
        return
    more, error, sample = best
    yield (
        f"Beta {sample.beta:.4g} gains {more:.3f} ± {error:.3f} more, but at {sample.kl:.3g} nats, "
        f"above kl_limit = {config.kl_limit:g}. Far from the frozen model, text breaks. Read the "
        "replies before you use it."
    )


def _better_baseline(point: BetaPoint, baseline: Sequence[BestOfPoint]) -> Iterator[str]:
    """Yield the smallest best-of-n that gains more than the suggestion."""
    for best in baseline:
        if best.gain > point.gain:
            yield (
                f"Best of {best.n} gains more than the suggestion: {best.gain:+.3f} ± "
                f"{best.gain_se:.3f} against {point.gain:+.3f} ± {point.gain_se:.3f}, with at most "
                f"{best.kl_bound:.2f} nats, for {best.n} times the tokens."
            )
            return
