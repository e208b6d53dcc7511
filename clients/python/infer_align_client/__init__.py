"""Typed `align` parameters for the OpenAI SDK.

    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is the diet of the owl?"}],
        extra_body=extra_body(best_of_n={"n": 8}),
    )
    print(report(answer)["reason"])

The parameters of a method are a plain dictionary with a type. `extra_body` wraps them as the SDK
sends them, and `report` reads the `align` object of the answer. This package depends on nothing, so
it works with every version of the SDK and with its asynchronous client.
"""

from __future__ import annotations

from typing import Literal, NotRequired, Required, TypedDict, Unpack, cast

# --- written by `make docs` ---
from infer_align_client.parameters import (
    DPA,
    RPS,
    VAS,
    Adaptive,
    Align,
    BestOfN,
    Budget,
    Choice,
    Compose,
    EarlyStop,
    Ensemble,
    Gate,
    Guidance,
    Principle,
    Profile,
    RewardParameters,
    RewardShape,
    Select,
    TraitPrompts,
    TrustJudge,
)

# Sorted by character, as the tests of this repository expect.
__all__ = [  # noqa: RUF022
    "Adaptive",
    "Align",
    "BestOfN",
    "Budget",
    "CandidateReport",
    "Choice",
    "Compose",
    "DPA",
    "EarlyStop",
    "Ensemble",
    "Feedback",
    "Gate",
    "Guidance",
    "Principle",
    "Profile",
    "ProfileReport",
    "RPS",
    "Report",
    "RewardParameters",
    "RewardShape",
    "ScaleReport",
    "Score",
    "Select",
    "SelectionReport",
    "TraitPrompts",
    "TrustJudge",
    "VAS",
    "extra_body",
    "report",
]
# --- end ---


class Feedback(TypedDict, total=False):
    """The body of `/v1/align/feedback`: a choice of a user, for `client.post(..., body=...)`."""

    profile: Required[str]
    messages: list[dict[str, object]]
    candidates: list[str]
    chosen: int | str
    rejected: int | str
    rating: float
    request_id: str
    description: str
    weights: dict[str, float]


def extra_body(**align: Unpack[Align]) -> dict[str, Align]:
    """Return `{"align": {...}}` with the given keys, for `extra_body=` of the OpenAI SDK.

    Keys that are None are left out.

    Raises:
        TypeError: `align` has no such key.
    """
    for key in align:
        if key not in Align.__annotations__:
            allowed = ", ".join(Align.__annotations__)
            raise TypeError(f"extra_body() got an unexpected key {key!r}; allowed: {allowed}")
    present = {key: value for key, value in align.items() if value is not None}
    return {"align": cast("Align", present)}


class Score(TypedDict, total=False):
    """The score of one candidate by one reward. None means not scored."""

    value: float | None
    composed: float | None
    std: float | None
    members: list[float | None]
    note: str


class CandidateReport(TypedDict, total=False):
    """One candidate: its scores, or the reason why it was dropped."""

    index: int
    objective: float | None
    scores: dict[str, Score]
    direction: dict[str, float] | None
    finish_reason: str | None
    completion_tokens: int
    error: str | None
    choice: dict[str, object]


class SelectionReport(TypedDict, total=False):
    """The result of `select` and `compose`. A rule reports only what it computes."""

    rule: str
    distribution: list[float]
    condorcet: int | None
    cycles: int
    worst_case: float


class ScaleReport(TypedDict):
    """The scale of a trait that choices have changed."""

    scale: float
    uncertainty: float | None
    bounds: list[float]


class ProfileReport(TypedDict, total=False):
    """The changes that `profile` made: the weights, how certain they are, and their bounds."""

    id: str
    adapt: Literal["weights", "in_context"]
    choices: int
    left_out: int
    weights: dict[str, float | None]
    uncertainty: dict[str, float | None]
    bounds: dict[str, list[float]]
    scales: dict[str, ScaleReport]
    # {reward: number of choices that it could not score}
    failed: dict[str, int]


class Report(TypedDict):
    """The `align` object of an answer: the candidates, their scores, and the selection."""

    methods: list[str]
    selected: int
    dropped: int
    partial: bool
    reason: str
    candidates: list[CandidateReport]
    usage: dict[str, int]
    timing: dict[str, float]
    direction: NotRequired[dict[str, float]]
    profile: NotRequired[ProfileReport]
    selection: NotRequired[SelectionReport]
    # What a reward reports beside its scores, by its name.
    reports: NotRequired[dict[str, dict[str, object]]]


def report(answer: object) -> Report | None:
    """Return the report of a completion or of the last chunk of a stream.

    It is None if the request did not ask for alignment. A text completion of several prompts has
    one report for each, in `answer.align["prompts"]`.
    """
    return cast("Report | None", getattr(answer, "align", None))
