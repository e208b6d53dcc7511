"""The request that a profile makes: with other weights, another direction and other scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from infer_align.flow.applied_profile import AppliedProfile, LearnedScale
from infer_align.flow.request import Request
from infer_align.methods.dpa import DPA, unit
from infer_align.methods.guidance import PromptGuidance
from infer_align.methods.profile import Profile, ProfileSettings, turned
from infer_align.profiles.weights import Learned


class Term(NamedTuple):
    """One thing that a profile weighs."""

    name: str  # in the report
    feature: str  # the score that it weighs: "reward" or "reward.attribute"
    prior: float
    is_attribute: bool = False  # of `align.dpa.direction`
    is_measure: bool = False  # of a trait alone: no weight of the request belongs to it


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything that the profile of one request may weigh."""

    weights: Mapping[str, float]  # of all rewards, those that no choice can change included
    direction: Mapping[str, float] | None  # of dpa; None without it
    traits: Mapping[str, float]  # {trait: scale} of guidance that choices may change
    learnt: tuple[Term, ...]


def personalised(
    request: Request,
    profile: Profile,
    terms: Terms,
    learned: Learned,
    scales: Mapping[str, LearnedScale],
    total: int,
    settings: ProfileSettings,
    failed: Mapping[str, int],
) -> Request:
    """Return the request with the weights and scales that were learnt.

    Args:
        request: as it came.
        profile: complete, with what is stored of it.
        terms: what the profile weighs.
        learned: the weights of the terms that can be learnt.
        scales: of the traits of guidance.
        total: choices, those that taught nothing included.
        settings: their `max_angle` is the largest angle between the direction of the request and
            the one that was learnt.
        failed: {reward: number of choices that it could not score}.
    """
    weights = dict(terms.weights)
    learnt_direction = dict(terms.direction or {})
    uncertainty: dict[str, float | None] = {}
    bounds: dict[str, tuple[float, float]] = {}
    report: dict[str, float] = {}
    for i, term in enumerate(terms.learnt):
        # What was learnt of a measure is in `scales`.
        if term.is_measure:
            continue
        value = float(learned.weights[i])
        uncertainty[term.name] = _number_or_none(learned.deviations[i])
        if term.is_attribute:
            learnt_direction[term.name] = value
            continue
        weights[term.name] = value
        report[term.name] = value
        if not math.isnan(learned.low[i]):
            bounds[term.name] = (float(learned.low[i]), float(learned.high[i]))
    start = unit_or_same(terms.direction or {})
    direction = turned(start, learnt_direction, settings.max_angle)
    report |= direction
    used = learned.choices if terms.learnt else 0
    applied = AppliedProfile(
        id=profile.id,
        adapt=profile.adapt,
        choices=used,
        left_out=total - used,
        weights=report,
        uncertainty=uncertainty,
        bounds=bounds,
        scales=scales,
        failed=failed,
    )
    return changed_request(request, profile, weights, direction, applied)


def changed_request(
    request: Request,
    profile: Profile,
    weights: Mapping[str, float],
    direction: Mapping[str, float],
    applied: AppliedProfile,
) -> Request:
    """Return the request with its complete profile, these weights and this direction."""
    methods = {**request.align.methods, "profile": profile}
    if direction:
        methods["dpa"] = DPA(dict(direction))
    guidance = methods.get("guidance")
    if isinstance(guidance, PromptGuidance):
        changed = {trait: learned.scale for trait, learned in applied.scales.items()}
        methods["guidance"] = replace(guidance, scale={**guidance.scale, **changed})
    align = replace(request.align, methods=methods)
    if align.rewards is not None:
        align = replace(align, rewards=weights)
    return replace(request, align=align, weights=weights, profile=applied)


def unit_or_same(direction: Mapping[str, float]) -> Mapping[str, float]:
    """Return the direction with length 1; one without length as it is."""
    try:
        return unit(direction)
    except ValueError:
        return direction


def _number_or_none(value: float) -> float | None:
    """Return a number; None in place of NaN."""
    return None if math.isnan(value) else float(value)
