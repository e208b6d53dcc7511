"""Types of the `align` object, for programs that build requests.

`make docs` writes this file from the server's methods. Change it there.
"""

from typing import Literal, Required, TypeAlias, TypedDict


class Adaptive(TypedDict, total=False):
    """Draw candidates in batches until the expected gain of one more batch is below its cost."""

    max_n: int
    batch: int
    cost: float


class BestOfN(TypedDict, total=False):
    """Draw n candidates per prompt and return the best by the rewards."""

    n: int


class Gate(TypedDict, total=False):
    """A minimum that a candidate must reach."""

    at_least: Required[float]


class RewardShape(TypedDict, total=False):
    """The shape in which one reward enters the sum."""

    shape: Literal["raw", "standardize", "rank", "par", "cap"]
    references: int
    at: float


# Shape each reward before the sum, and drop candidates that miss a minimum.
Compose: TypeAlias = dict[str, RewardShape | dict[str, Gate]]


class DPA(TypedDict, total=False):
    """Name a preference direction in the prompt, and score answers along it."""

    direction: Required[dict[str, float]]


class EarlyStop(TypedDict, total=False):
    """Stop the candidates with the lowest value estimates."""

    values: Required[dict[str, float]]
    after: int
    keep: float


class TraitPrompts(TypedDict, total=False):
    """The prompts of a trait that a request brings itself."""

    prompt: Required[str]
    negative_prompt: str


class Guidance(TypedDict, total=False):
    """Steer every token towards traits, by the difference that a prompt for each trait makes."""

    scale: Required[dict[str, float]]
    traits: dict[str, TraitPrompts]
    min_p: float
    keep: Literal["body", "all"]


class Choice(TypedDict, total=False):
    """One choice: this answer is better than that one."""

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


class RPS(TypedDict, total=False):
    """Draw from k directions near `dpa.direction`, and select by that direction itself."""

    k: int
    max_angle: float
    neighborhood: Literal["uniform", "published", "none"]


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


class Principle(TypedDict, total=False):
    """One quality that the judge reads by itself."""

    text: Required[str]
    weight: float
    negate: bool


class TrustJudge(TypedDict, total=False):
    """Let a judge score or compare the candidates. Omitted parameters are as configured."""

    mode: Literal["score", "pairwise"]
    scale: Literal[5, 10, 100]
    criteria: str
    weight: float
    readout: Literal["expected", "geval", "published"]
    principles: list[Principle]
    rubric: str
    aspects: dict[str, str] | list[str]
    votes: int


class VAS(TypedDict, total=False):
    """Steer every token by value estimates while it is sampled."""

    beta: Required[dict[str, float]]
    top_k: int | Literal["all"]
    tail: Literal["keep", "mask"]
    min_p: float
    max_kl: float


class Ensemble(TypedDict, total=False):
    """The objective that reduces the members of each reward to one score."""

    objective: Literal["mean", "wco", "uwo"]
    uncertainty_weight: float
    standardize: bool


class Budget(TypedDict, total=False):
    """Limits on the cost of one answer."""

    completion_tokens: int
    deadline_seconds: float


class RewardParameters(TypedDict, total=False):
    """A reward with parameters of this request. Each kind of reward takes its own."""

    weight: float
    extract: str | None
    prompt: str | None
    negative_prompt: str | None
    per_token: bool
    reference: str
    mode: Literal["score", "pairwise"]
    scale: Literal[5, 10, 100]
    criteria: str
    readout: Literal["expected", "geval", "published"]
    principles: list[Principle]
    rubric: str
    aspects: dict[str, str] | list[str]
    votes: int


class Align(TypedDict, total=False):
    """The `align` object of a request. Every key is optional, and all of them compose."""

    adaptive: Adaptive
    best_of_n: BestOfN
    budget: Budget
    compose: Compose
    details: Literal["none", "scores", "candidates"]
    dpa: DPA
    early_stop: EarlyStop
    ensemble: Ensemble
    guidance: Guidance
    preset: str
    profile: Profile
    rewards: dict[str, float | RewardParameters]
    rps: RPS
    select: Select
    trust_judge: TrustJudge
    vas: VAS
