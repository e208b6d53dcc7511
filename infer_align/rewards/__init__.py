"""Rewards score candidates. This page is what a reward is; each file beside it is one kind.

A reward module holds a frozen dataclass, its `[rewards.<name>]` section, whose `load()` gives the Reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer_align.types import Array, Candidate

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Marks:
    """What one reward says of N candidates."""

    values: Array  # [A, K, N]: attributes (1 when it has none), members, candidates; NaN is not scored
    tokens: int = 0  # read to score them
    notes: tuple[str | None, ...] = ()  # per candidate: why it is NaN, or that it was truncated; () for none


class Reward(ABC):
    """Scores candidates of one conversation.

    Attributes:
        description: one line for people.
        members: names of the K members of the ensemble.
        attributes: names of its A objectives, or () when its score is one number.
        timeout_seconds: how long a call may take before its candidates count as not scored.
    """

    description: str = ""
    members: tuple[str, ...] = ("score",)
    attributes: tuple[str, ...] = ()
    timeout_seconds: float = 30.0

    async def start(self) -> None:
        """Load whatever takes time. Called once, before anything else."""

    async def close(self) -> None:
        """Free what is held."""

    @abstractmethod
    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> Marks:
        """Score every candidate as the next turn of `messages` ([] for a text completion)."""
