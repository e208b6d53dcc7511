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

from typing import Literal, NotRequired, Required, TypeAlias, TypedDict, Unpack, cast

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
    "Profile",
    "RPS",
    "Report",
    "RewardShape",
    "Score",
    "Select",
    "SelectionReport",
    "TraitPrompts",
    "TrustJudge",
    "VAS",
    "extra_body",
    "report",
]


class BestOfN(TypedDict, total=False):
    """Draw n candidates per prompt and return the best by the rewards."""

    n: int


class Adaptive(TypedDict, total=False):
    """Draw candidates in batches until the expected gain of one more batch is below its cost."""

    max_n: int
    batch: int
    cost: float


class VAS(TypedDict, total=False):
    """Steer every token by value estimates while it is sampled."""

    beta: dict[str, float]
    top_k: int | Literal["all"]
    tail: Literal["keep", "mask"]
    min_p: float
    max_kl: float


class TraitPrompts(TypedDict, total=False):
    """The prompts of a trait that a request brings itself."""

    prompt: Required[str]
    negative_prompt: str


class Guidance(TypedDict, total=False):
    """Steer every token towards traits, by the difference that a prompt for each trait makes."""

    scale: dict[str, float]
    traits: dict[str, TraitPrompts]
    min_p: float
    keep: Literal["body", "all"]


class EarlyStop(TypedDict, total=False):
    """Stop the candidates with the lowest value estimates."""

    values: dict[str, float]
    after: int
    keep: float


class DPA(TypedDict, total=False):
    """Name a preference direction in the prompt, and score answers along it."""

    direction: dict[str, float]


class RPS(TypedDict, total=False):
    """Draw from k directions near `dpa.direction`, and select by that direction itself."""

    k: int
    max_angle: float
    neighborhood: Literal["uniform", "published", "none"]


class Choice(TypedDict, total=False):
    """One choice of a user: this answer is better than that one."""

    chosen: Required[str]
    rejected: Required[str]
    messages: list[dict[str, object]]


class Profile(TypedDict, total=False):
    """Answer as one user prefers, learnt from earlier choices of this user."""

    id: str
    choices: list[Choice]
    weights: dict[str, float]
    description: str
    adapt: Literal["weights", "in_context"]


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


class Principle(TypedDict, total=False):
    """One quality that the judge reads by itself. `text` is required."""

    text: str
    weight: float
    negate: bool


class TrustJudge(TypedDict, total=False):
    """Let a judge score or compare the candidates."""

    mode: Literal["score", "pairwise"]
    scale: Literal[5, 10, 100]
    criteria: str
    weight: float
    readout: Literal["expected", "geval", "published"]
    principles: list[Principle]
    rubric: str
    aspects: dict[str, str] | list[str]
    votes: int


class RewardParameters(TypedDict, total=False):
    """A reward with parameters of this request. Each kind of reward takes its own."""

    weight: float
    reference: str
    prompt: str | None
    negative_prompt: str | None
    per_token: bool
    extract: str | None
    mode: Literal["score", "pairwise"]
    scale: Literal[5, 10, 100]
    criteria: str
    readout: Literal["expected", "geval", "published"]


class Ensemble(TypedDict, total=False):
    """The objective that reduces the members of each reward to one score."""

    objective: Literal["mean", "wco", "uwo"]
    uncertainty_weight: float
    standardize: bool


class RewardShape(TypedDict, total=False):
    """The shape in which one reward enters the sum."""

    shape: Literal["raw", "standardize", "rank", "par", "cap"]
    references: int
    at: float


class Gate(TypedDict):
    """A minimum that a candidate must reach."""

    at_least: float


# The shape of each reward by its name, and under the key "gates" the minima by reward.
Compose: TypeAlias = dict[str, RewardShape | dict[str, Gate]]


class Select(TypedDict, total=False):
    """Choose the rule by which a candidate is returned."""

    rule: Literal[
        "argmax",
        "win_rate",
        "minimax",
        "maxmin",
        "lexicographic",
        "consensus",
        "pessimistic",
        "tilted",
        "shortest",
    ]
    margin: float
    beta: float
    within: float
    order: list[str]
    regret: bool


class Budget(TypedDict, total=False):
    """Limits on the cost of one answer."""

    completion_tokens: int
    deadline_seconds: float


class Align(TypedDict, total=False):
    """The `align` object of a request. Every key is optional, and all of them compose."""

    preset: str
    dpa: DPA
    rps: RPS
    best_of_n: BestOfN
    adaptive: Adaptive
    early_stop: EarlyStop
    vas: VAS
    guidance: Guidance
    profile: Profile
    trust_judge: TrustJudge
    # A weight, or an object with a weight and parameters of the reward.
    rewards: dict[str, float | RewardParameters]
    ensemble: Ensemble
    compose: Compose
    select: Select
    budget: Budget
    details: Literal["none", "scores", "candidates"]


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
