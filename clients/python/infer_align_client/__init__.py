"""Typed `align` knobs for the OpenAI SDK.

    answer = client.chat.completions.create(model="demo", messages=[...], extra_body=extra_body(best_of_n={"n": 8}))
    print(report(answer)["reason"])

Depends on nothing, so any version of the SDK will do, and the asynchronous client too: a knob is a plain dictionary with a
type, `extra_body` wraps them as the SDK sends them, and `report` reads what comes back.
"""

from __future__ import annotations

from typing import Literal, TypedDict, cast

__all__ = [  # noqa: RUF022 - plainly sorted
    "Align",
    "BestOfN",
    "Budget",
    "CandidateReport",
    "DPA",
    "EarlyStop",
    "Ensemble",
    "RPS",
    "Report",
    "Score",
    "TrustJudge",
    "VAS",
    "extra_body",
    "report",
]


class BestOfN(TypedDict, total=False):
    """Draw n candidates, answer with the best by the rewards."""

    n: int


class VAS(TypedDict, total=False):
    """Steer every token by value estimates."""

    beta: dict[str, float]
    top_k: int
    tail: Literal["keep", "mask"]


class EarlyStop(TypedDict, total=False):
    """Stop drawing the candidates that value estimates give the least hope."""

    values: dict[str, float]
    after: int
    keep: float


class DPA(TypedDict, total=False):
    """Tell the model a preference direction, and score answers along it."""

    direction: dict[str, float]


class RPS(TypedDict, total=False):
    """Draw from k directions near `dpa.direction`, and select by that direction itself."""

    k: int
    max_angle: float
    neighborhood: Literal["uniform", "published", "none"]


class TrustJudge(TypedDict, total=False):
    """Let a judge score or compare the candidates, beside the rewards."""

    mode: Literal["score", "pairwise"]
    scale: Literal[5, 10, 100]
    criteria: str
    weight: float
    readout: Literal["expected", "geval", "published"]


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
    dpa: DPA
    rps: RPS
    best_of_n: BestOfN
    early_stop: EarlyStop
    vas: VAS
    trust_judge: TrustJudge
    rewards: dict[str, float]
    ensemble: Ensemble
    budget: Budget
    details: Literal["none", "scores", "candidates"]


def extra_body(
    *,
    preset: str | None = None,
    dpa: DPA | None = None,
    rps: RPS | None = None,
    best_of_n: BestOfN | None = None,
    early_stop: EarlyStop | None = None,
    vas: VAS | None = None,
    trust_judge: TrustJudge | None = None,
    rewards: dict[str, float] | None = None,
    ensemble: Ensemble | None = None,
    budget: Budget | None = None,
    details: Literal["none", "scores", "candidates"] | None = None,
) -> dict[str, Align]:
    """`{"align": {...}}` with the knobs that are given, for `extra_body=` of the OpenAI SDK."""
    given = {
        "preset": preset,
        "dpa": dpa,
        "rps": rps,
        "best_of_n": best_of_n,
        "early_stop": early_stop,
        "vas": vas,
        "trust_judge": trust_judge,
        "rewards": rewards,
        "ensemble": ensemble,
        "budget": budget,
        "details": details,
    }
    return {
        "align": cast("Align", {key: value for key, value in given.items() if value is not None})
    }


class Score(TypedDict, total=False):
    """One reward's view of one candidate; None where it was not scored."""

    value: float | None
    std: float | None
    members: list[float | None]
    note: str


class CandidateReport(TypedDict, total=False):
    """One candidate: how it scored, or why it was dropped."""

    index: int
    objective: float | None
    scores: dict[str, Score]
    direction: dict[str, float] | None
    finish_reason: str | None
    completion_tokens: int
    error: str | None
    choice: dict[str, object]


class Report(TypedDict):
    """The `align` object of an answer: what was drawn, how it scored, what was chosen and why."""

    methods: list[str]
    selected: int
    dropped: int
    partial: bool
    reason: str
    candidates: list[CandidateReport]
    usage: dict[str, int]
    timing: dict[str, float]


def report(answer: object) -> Report | None:
    """The report of a completion, or of a stream's last chunk; None where the request asked for no alignment."""
    return cast("Report | None", getattr(answer, "align", None))
