"""The nouns of the flow, in the order they appear: Request, Draw, Plan, Candidate, Scores, Selection, Response.

Everything here is frozen: a stage makes the next noun, it never edits the last one. Arrays are numpy; K members, N candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Kind = Literal["chat", "completion"]
Body = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
Direction = Mapping[str, float]  # attribute -> weight


class Capability(StrEnum):
    """What an engine can do; a plan that needs one it lacks is refused before anything is spent."""

    CHAT = "chat"
    COMPLETION = "completion"
    SEED = "seed"
    LOGPROBS = "logprobs"
    LABEL_LOGPROBS = "label_logprobs"
    SEQUENCE_LOGPROBS = "sequence_logprobs"
    TOOLS = "tools"
    STRUCTURED = "structured"
    STEER = "steer"
    ESTIMATES = "estimates"


class Stage(IntEnum):
    """Where in the flow a method acts; methods are applied to a plan in this order."""

    CONDITION = 1
    PROPOSE = 2
    STEER = 3
    SCORE = 4
    SELECT = 5


class Method(Protocol):
    """One key of `align`. A method is a frozen dataclass: its fields are its parameters, its docstring is its description."""

    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[Capability]]

    @abstractmethod
    def plan(self, plan: Plan) -> Plan:
        """The plan with this method's part written into it. Pure."""


class Conditioner(Protocol):
    """How a model is told a preference direction."""

    @abstractmethod
    def condition(self, body: Body, direction: Direction) -> Body:
        """The chat body with the direction written into it."""


class Objective(Protocol):
    """How the members of one reward become one score."""

    @property
    def name(self) -> str:
        """The word for it in the response's reason, such as "uwo"."""

    @abstractmethod
    def reduce(self, scores: Array) -> Array:
        """[K, N] member scores -> [N]; NaN members are ignored, a candidate without any stays NaN."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What an answer may cost at most."""

    completion_tokens: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "refuse a plan whose worst case exceeds this many generated tokens",
        },
    )
    deadline_seconds: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "description": "answer with the best so far after this many seconds, marked partial",
        },
    )


@dataclass(frozen=True, slots=True)
class Request:
    """One OpenAI request: the client's body, whole but for `align`, and what `align` asked for."""

    body: Body
    kind: Kind = "chat"
    methods: Mapping[str, Method] = field(default_factory=dict)
    rewards: Mapping[str, float] | None = None  # None: the configured default
    objective: Objective | None = None
    budget: Budget = field(default_factory=Budget)
    details: Literal["none", "scores", "candidates"] = "scores"
    aligned: bool = (
        False  # whether `align` or a preset was given: only then does the response carry one
    )


@dataclass(frozen=True, slots=True)
class Steering:
    """How a draw's logits are reweighted by value estimates."""

    beta: Mapping[str, float]  # value name -> weight
    top_k: int
    tail: Literal["keep", "mask"]


@dataclass(frozen=True, slots=True)
class EstimateSchedule:
    """When an engine says what value estimates expect of a draw's candidates, and which values."""

    values: Mapping[str, float]  # value name -> weight
    after: int  # tokens; then twice, four times, ... as many

    def is_due(self, tokens: int) -> bool:
        """Whether a candidate of so many tokens is estimated."""
        times, rest = divmod(tokens, self.after)
        return tokens > 0 and not rest and times.bit_count() == 1


@dataclass(frozen=True, slots=True)
class Draw:
    """One homogeneous batch to sample: n candidates of one body."""

    body: Body  # without n, seed and stream, which are said beside it
    n: int = 1
    seeds: tuple[int, ...] = ()  # one per candidate; filled when the plan is complete
    kind: Kind = "chat"
    direction: Direction | None = None  # the preference direction it carries
    steering: Steering | None = None  # the values that steer it
    estimates: EstimateSchedule | None = (
        None  # the values that are reported of its candidates on their way
    )
    seed_requested: bool = (
        True  # whether the request named a seed; where it did not, an engine may draw its own
    )
    deltas: bool = False  # whether pieces are wanted as they are sampled; an engine may yield them all the same
    has_deadline: bool = False  # a deadline may cut it short: an engine that knows only what it has received should receive pieces


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done and what it can cost at most, known before anything is spent."""

    draws: tuple[Draw, ...]
    objective: Objective
    rewards: Mapping[str, float] = field(default_factory=dict)
    messages: Messages = ()  # the client's own, before any method conditions them: what rewards read
    seed: int = 0
    settings: Mapping[str, object] = field(
        default_factory=dict
    )  # method -> its section of the configuration
    attributes: tuple[str, ...] = ()  # of the rewards with several objectives
    direction: Direction | None = None  # unit; rewards with several objectives score along it
    conditioner: Conditioner | None = (
        None  # how a draw was told its direction, for methods that change it
    )
    parameters: Mapping[str, object] = field(
        default_factory=dict
    )  # reward -> what this request asks of it
    note: str = ""  # what a method could not do as asked; said with the reason
    methods: tuple[str, ...] = ()
    needs: frozenset[Capability] = frozenset()
    selects: bool = (
        False  # whether candidates are compared; otherwise they stream as they are sampled
    )
    survival: float = (
        1.0  # of the candidates that are compared on their way, the share that is drawn to the end
    )
    keep: int = 1  # OpenAI's n: how many of the ranking are returned
    worst_case_tokens: int = 0  # sampled for the candidates, and by judges
    scoring_tokens: int = 0  # of those, by judges
    deadline_seconds: float | None = None

    @property
    def candidates(self) -> int:
        """How many candidates the plan samples."""
        return sum(draw.n for draw in self.draws)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one candidate as it is sampled: `choice` is an OpenAI stream choice without its index."""

    index: int
    choice: Body


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a draw's `watch` expects of a candidate that has so many tokens: the weighted sum of its values' estimates."""

    index: int
    tokens: int
    value: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer exactly as the engine produced it; `choice` is an OpenAI choice without its index."""

    index: int
    choice: Body
    draw: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    status: int | None = None  # the HTTP status behind `error`, where the engine knows one
    retry_after: float | None = None  # seconds, where the engine's upstream says when to come back
    calls: int = 1  # made to the engine for it, retries included
    interrupted: bool = False  # stopped early, not by the model
    rejected: str | None = None  # why it was given up on its way, in favour of others
    response_fields: Body = field(
        default_factory=dict
    )  # what an upstream's answer held beside its choices, such as system_fingerprint

    @property
    def eligible(self) -> bool:
        """Whether it takes part in the selection: it did not fail, and was not given up."""
        return self.error is None and self.rejected is None

    @property
    def text(self) -> str:
        """The words a reward reads; tool calls and reasoning are not part of it."""
        content = (
            self.choice["message"].get("content")
            if "message" in self.choice
            else self.choice.get("text")
        )
        return content or ""

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's finish_reason; None for a failed candidate."""
        reason: str | None = self.choice.get("finish_reason")
        return reason


@dataclass(frozen=True, slots=True)
class LabelQuery:
    """How likely is each label as the next words of an assistant's turn? What a judge asks of an engine."""

    messages: Messages
    prefix: str  # what the assistant has said already, such as "Score: ["; the labels continue it
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """The answer: the model's own distribution, at temperature 1 and before any penalty."""

    logprobs: Mapping[
        str, float
    ]  # label -> nats; -inf where it cannot be said, or the engine does not show it
    prompt_tokens: int = 0
    calls: int = 1  # of one token each: 1 where every label is one token


class LabelReader(Protocol):
    """What a judge needs of an engine."""

    @property
    @abstractmethod
    def model(self) -> str:
        """See `infer_align.engines.Engine.model`."""

    @property
    @abstractmethod
    def capabilities(self) -> frozenset[Capability]:
        """See `infer_align.engines.Engine.capabilities`."""

    @property
    @abstractmethod
    def control_tokens(self) -> frozenset[str]:
        """See `infer_align.engines.Engine.control_tokens`."""

    @abstractmethod
    def label_calls(self, labels: tuple[str, ...]) -> int:
        """See `infer_align.engines.Engine.label_calls`."""

    @abstractmethod
    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """See `infer_align.engines.Engine.read_labels`."""

    @abstractmethod
    async def generate(self, draw: Draw) -> list[Candidate]:
        """See `infer_align.engines.Engine.generate`."""


@dataclass(frozen=True, slots=True)
class ScoringUsage:
    """What scoring cost."""

    reward_tokens: int = 0  # read by reward models
    judge_calls: int = 0  # to a judge's engine
    judge_prompt_tokens: int = 0
    judge_completion_tokens: int = 0

    def __add__(self, other: ScoringUsage) -> ScoringUsage:
        return ScoringUsage(
            self.reward_tokens + other.reward_tokens,
            self.judge_calls + other.judge_calls,
            self.judge_prompt_tokens + other.judge_prompt_tokens,
            self.judge_completion_tokens + other.judge_completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Member scores of every candidate. NaN means not scored, never 0."""

    members: Mapping[str, Array] = field(default_factory=dict)  # reward -> [K, N]
    spent: ScoringUsage = field(default_factory=ScoringUsage)
    notes: Mapping[str, tuple[str | None, ...]] = field(
        default_factory=dict
    )  # reward -> N: why NaN, or what was cut
    reports: Mapping[str, Body] = field(
        default_factory=dict
    )  # reward -> what it says beside its scores, as JSON


@dataclass(frozen=True, slots=True)
class Selection:
    """The ranking, best first, and why."""

    ranking: tuple[int, ...]
    objective: tuple[float, ...]  # per candidate; NaN where it was not compared
    values: Mapping[str, Array]  # reward -> [N], before weighting
    dropped: Mapping[int, str]  # candidate -> why it was not compared
    reason: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, by the wall."""

    generate_seconds: float
    score_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back: the kept candidates, best first, and everything needed to say what was done."""

    plan: Plan
    candidates: tuple[Candidate, ...]
    scores: Scores
    selection: Selection
    timing: Timing
    partial: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Each distinct prompt once, however many candidates were drawn from it."""
        if len(self.plan.draws) == 1:
            return max(candidate.prompt_tokens for candidate in self.candidates)
        tokens = {
            repr(self.plan.draws[c.draw].body): c.prompt_tokens
            for c in self.candidates
            if c.error is None
        }
        return sum(tokens.values())

    @property
    def saved_tokens(self) -> int:
        """What the candidates that were stopped early would still have cost, had they become as long as the mean of the others.

        Where none ended by itself: at most, as the plan counted them.
        """
        ended = [
            c.completion_tokens for c in self.candidates if c.error is None and not c.interrupted
        ]
        at_most = (self.plan.worst_case_tokens - self.plan.scoring_tokens) // self.plan.candidates
        each = round(sum(ended) / len(ended)) if ended else at_most
        return sum(max(0, each - c.completion_tokens) for c in self.candidates if c.interrupted)

    @property
    def returned(self) -> tuple[Candidate, ...]:
        """The candidates that are returned, best first."""
        return tuple(self.candidates[i] for i in self.selection.ranking[: self.plan.keep])
