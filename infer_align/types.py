"""The nouns that all parts of the flow share: Draw, Candidate, Scores, Selection.

Everything here is frozen: a stage makes the next noun, it never edits the last one. Arrays are
numpy. In shapes, K counts the members of a reward, N the candidates, A the attributes of a reward.
The ways to steer a draw are in `infer_align.steering`, other nouns in the package that owns them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from infer_align.messages import message_text
from infer_align.steering import EstimateSchedule, Guidance, Steering

Array: TypeAlias = NDArray[np.float64]
Kind = Literal["chat", "completion"]
Body = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
Direction = Mapping[str, float]  # attribute -> weight


class Capability(StrEnum):
    """A feature of an engine. A plan that needs a missing one is refused at no cost."""

    CHAT = "chat"  # answers conversations
    COMPLETION = "completion"  # continues plain texts
    SEED = "seed"  # repeats a candidate for the same seed
    LOGPROBS = "logprobs"  # reports the log-probabilities of the sampled tokens
    LABEL_LOGPROBS = "label_logprobs"  # answers `Engine.read_labels`, as judges need
    TOOLS = "tools"  # calls tools
    STRUCTURED = "structured"  # keeps answers to a schema, a choice or a pattern
    STEER = "steer"  # carries out `Draw.steering`
    ESTIMATES = "estimates"  # carries out `Draw.estimates`
    GUIDE = "guide"  # carries out `Draw.guidance`
    SEQUENCE_LOGPROBS = "sequence_logprobs"  # answers `Engine.sequence_logprobs`


@dataclass(frozen=True, slots=True)
class Draw:
    """One homogeneous batch to sample: n candidates of one body."""

    body: Body  # without n, seed and stream, which are fields of their own
    # Written by PROPOSE.
    n: int = 1
    # One per candidate. Written by the planner when the plan is complete.
    seeds: tuple[int, ...] = ()
    kind: Kind = "chat"
    # The preference direction that the body carries. Written by CONDITION and PROPOSE.
    direction: Direction | None = None
    # Written by STEER.
    steering: Steering | None = None
    guidance: Guidance | None = None
    # Written by OBSERVE.
    estimates: EstimateSchedule | None = None
    # True if the request named a seed; otherwise an engine may draw its own.
    seed_requested: bool = True
    # True to receive deltas while sampling. Written by OBSERVE and when the draw starts.
    deltas: bool = False
    # True if a deadline may end the draw; engines that see only streamed text should then stream.
    # Written when the draw starts.
    has_deadline: bool = False
    # Number of candidates of the same draw that earlier batches sampled. Written by the flow.
    first: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one candidate as it is sampled.

    The new text is in `choice["delta"]["content"]` of a chat and in `choice["text"]` of a text
    completion. It may be missing or null: a piece can hold a part of a tool call, or logprobs.
    """

    index: int
    choice: Body  # an OpenAI stream choice without its index


@dataclass(frozen=True, slots=True)
class Estimate:
    """The weighted sum of value estimates for a candidate that has this many tokens."""

    index: int
    tokens: int
    value: float


# Fields of an answer outside its choices that are made anew for the client. Others are passed on.
ANSWER_FIELDS = frozenset({"id", "object", "created", "model", "choices", "usage"})
USAGE_DETAILS = ("prompt_tokens_details", "completion_tokens_details")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer exactly as the engine produced it."""

    # Numbered in the draw by the engine; renumbered over all draws by the flow.
    index: int
    choice: Body  # an OpenAI choice without its index
    # The index of the draw in its plan. Written by the flow.
    draw: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Tokens that the model read in the contexts of guidance, without the prompt and the answer: the
    # contexts' prompts, which are the same for all candidates of a draw, and the answer in each.
    context_prompt_tokens: int = 0
    context_completion_tokens: int = 0
    error: str | None = None
    # The HTTP status behind `error`, if the engine knows one.
    status: int | None = None
    # Seconds until a retry makes sense, if the engine's upstream names them.
    retry_after: float | None = None
    # Calls made to the engine for this candidate, retries included.
    calls: int = 1
    # True if the candidate was stopped early, and not by the model.
    interrupted: bool = False
    # The reason why an observer gave the candidate up. Written by the flow.
    rejected: str | None = None
    # Fields of the engine's answer outside its choices, such as system_fingerprint; and, in
    # "usage", the details of its token counts.
    response_fields: Body = field(default_factory=dict)

    @property
    def eligible(self) -> bool:
        """Return True if the candidate takes part in the selection."""
        return self.error is None and self.rejected is None

    @property
    def text(self) -> str:
        """Return the text that rewards read: content or refusal, then tool calls, no reasoning."""
        if "message" in self.choice:
            return message_text(self.choice["message"])
        return self.choice.get("text") or ""

    @property
    def finish_reason(self) -> str | None:
        """Return OpenAI's finish_reason, or None for a failed candidate."""
        reason: str | None = self.choice.get("finish_reason")
        return reason


Event: TypeAlias = Delta | Estimate | Candidate


@dataclass(frozen=True, slots=True)
class ScoringUsage:
    """The cost of scoring."""

    reward_tokens: int = 0  # read by reward models
    judge_calls: int = 0
    judge_prompt_tokens: int = 0
    judge_completion_tokens: int = 0
    # The part of `reward_tokens` that engines read; it counts in token budgets.
    engine_tokens: int = 0

    def __add__(self, other: ScoringUsage) -> ScoringUsage:
        return ScoringUsage(
            self.reward_tokens + other.reward_tokens,
            self.judge_calls + other.judge_calls,
            self.judge_prompt_tokens + other.judge_prompt_tokens,
            self.judge_completion_tokens + other.judge_completion_tokens,
            self.engine_tokens + other.engine_tokens,
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Member scores of every candidate, by scorer. NaN means not scored, never 0."""

    members: Mapping[str, Array] = field(default_factory=dict)  # scorer -> [K, N]
    usage: ScoringUsage = field(default_factory=ScoringUsage)
    # scorer -> N notes: why a score is NaN, or that the text was truncated
    notes: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    reports: Mapping[str, Body] = field(default_factory=dict)  # reward -> further results as JSON
    failures: Mapping[str, int] = field(default_factory=dict)  # reward -> candidates not scored
    # reward -> type of the first exception that left a candidate without a score
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)  # reward -> time of its slowest call
    # pairwise judge -> [N, N] probabilities that a row beats a column; NaN: not compared
    matrices: Mapping[str, Array] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)  # reward -> a limitation to mention


@dataclass(frozen=True, slots=True)
class Selection:
    """The ranking of the candidates, best first, and the reason for it."""

    ranking: tuple[int, ...]
    objective: tuple[float, ...]  # per candidate; NaN if it was not compared
    values: Mapping[str, Array]  # scorer -> [N], before shapes and weights
    dropped: Mapping[int, str]  # candidate -> why it was not compared
    reason: str
    # scorer -> [N] after its shape; empty if the request composes nothing
    composed: Mapping[str, Array] = field(default_factory=dict)
    # The name of the rule that ranked the candidates; "" if nothing was ranked.
    rule: str = ""
    # The probability of each candidate to be first; None: the rule is no lottery.
    distribution: tuple[float, ...] | None = None
    # True if the rule compared pairs; then the next two fields say what it saw.
    pairwise: bool = False
    condorcet: int | None = None
    cycles: int = 0
    worst_case: float | None = None
    # True if the deadline passed before anything was scored. Written by the flow.
    late: bool = False
