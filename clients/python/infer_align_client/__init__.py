"""Typed `align` knobs for the OpenAI SDK.

    client.chat.completions.create(model="demo", messages=[...], extra_body=extra_body(best_of_n={"n": 8}))

Depends on nothing: a knob is a plain dictionary with a type, and `extra_body` wraps them as the SDK sends them.
"""

from __future__ import annotations

from typing import Literal, TypedDict

__all__ = ["Align", "BestOfN", "Budget", "Ensemble", "VAS", "extra_body"]  # noqa: RUF022 - plainly sorted


class BestOfN(TypedDict, total=False):
    """Draw n candidates, answer with the best by the rewards."""

    n: int


class VAS(TypedDict, total=False):
    """Steer every token by value estimates."""

    beta: dict[str, float]
    top_k: int
    tail: Literal["keep", "mask"]


class Ensemble(TypedDict, total=False):
    """How the members of each reward become one score."""

    objective: Literal["mean", "wco", "uwo"]
    uncertainty_weight: float
    standardize: bool


class Budget(TypedDict, total=False):
    """What an answer may cost at most."""

    completion_tokens: int
    deadline_seconds: float


class Align(TypedDict, total=False):
    """The `align` object of a request; every key is optional and they compose."""

    preset: str
    best_of_n: BestOfN
    vas: VAS
    rewards: dict[str, float]
    ensemble: Ensemble
    budget: Budget
    details: Literal["none", "scores", "candidates"]


def extra_body(
    *,
    preset: str | None = None,
    best_of_n: BestOfN | None = None,
    vas: VAS | None = None,
    rewards: dict[str, float] | None = None,
    ensemble: Ensemble | None = None,
    budget: Budget | None = None,
    details: Literal["none", "scores", "candidates"] | None = None,
) -> dict[str, Align]:
    """`{"align": {...}}` with the knobs that are given, for `extra_body=` of the OpenAI SDK."""
    align: Align = {}
    if preset is not None:
        align["preset"] = preset
    if best_of_n is not None:
        align["best_of_n"] = best_of_n
    if vas is not None:
        align["vas"] = vas
    if rewards is not None:
        align["rewards"] = rewards
    if ensemble is not None:
        align["ensemble"] = ensemble
    if budget is not None:
        align["budget"] = budget
    if details is not None:
        align["details"] = details
    return {"align": align}
