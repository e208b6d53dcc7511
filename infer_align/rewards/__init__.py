"""Rewards score candidates. This page is what a reward is; each file beside it is one kind.

A reward module holds a frozen dataclass, its `[rewards.<name>]` section, whose `load()` gives the Reward.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from infer_align.types import Array, Body, Candidate, LabelReader, Messages, ScoringUsage

# How long the scoring that runs now may take, in seconds: the reward's own limit, or less before a deadline. Whoever makes several
# calls ends each a little before it, so that one that hangs does not take the others along.
time_budget: ContextVar[float] = ContextVar("time_budget", default=math.inf)
# Of that time, what a single call gets.
CALL_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class RewardScores:
    """What one reward says of N candidates."""

    values: (
        Array  # [A, K, N]: attributes (1 when it has none), members, candidates; NaN is not scored
    )
    spent: ScoringUsage = field(default_factory=ScoringUsage)  # to score them
    notes: tuple[
        str | None, ...
    ] = ()  # per candidate: why it is NaN, or that it was truncated; () for none
    report: Body = field(default_factory=dict)  # what it has to say beside its scores, as JSON


class Reward(ABC):
    """Scores candidates of one conversation.

    Attributes:
        description: one line for people.
        members: names of the K members of the ensemble.
        attributes: names of its A objectives, or () when its score is one number.
        timeout_seconds: how long a call may take before its candidates count as not scored.
        pipelined: whether it is asked about each candidate as soon as that is finished, not about all of them together.
        judges: whether it asks an engine: then it is read only where it is named.
        engines: the process's engines by name, "served" and those of `[engines.*]`; given before `start`, already started.
    """

    description: str = ""
    members: tuple[str, ...] = ("score",)
    attributes: tuple[str, ...] = ()
    timeout_seconds: float = 30.0
    pipelined: ClassVar[bool] = False
    engines: Mapping[str, LabelReader] = MappingProxyType({})
    uses_engine: bool = False

    async def start(self) -> None:
        """Load whatever takes time. Called once, before anything else."""

    async def close(self) -> None:
        """Free what is held."""

    def health(self) -> str | None:
        """None while it can score, else why it cannot."""
        return None

    def with_parameters(self, parameters: object) -> Reward:
        """The same reward as one request wants it, by the parameters that a method left for it in the plan."""
        raise NotImplementedError(f"{type(self).__name__} takes no parameters: {parameters!r}")

    def check(self, where: str) -> None:
        """Refuse, before anything is spent, what cannot be scored here.

        Raises:
            Unsupported: naming `where` it was asked for, what is missing, and of which engine.
        """

    def worst_case_tokens(self, _n: int) -> int:
        """The most tokens that scoring n candidates can have sampled; what only reads samples none."""
        return 0

    @abstractmethod
    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Score every candidate as the next turn of `messages`; a text completion's prompt is a user's turn."""
