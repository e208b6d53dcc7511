"""The part of a response that reports what a profile changed in its request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LearnedScale:
    """The scale of a trait that choices speak for."""

    scale: float
    uncertainty: float | None  # standard deviation of the scale; None: no choice says anything
    bounds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class AppliedProfile:
    """The changes that a profile made to one request."""

    id: str | None
    adapt: str
    choices: int  # that the weights were learnt from, or that stand in the prompt
    left_out: int  # choices that could not be used
    weights: Mapping[str, float]  # by reward or attribute
    uncertainty: Mapping[str, float | None]  # standard deviations of the weights
    bounds: Mapping[str, tuple[float, float]]
    scales: Mapping[str, LearnedScale] = field(default_factory=dict)  # of guidance, by trait
    failed: Mapping[str, int] = field(default_factory=dict)  # reward -> choices without a score
