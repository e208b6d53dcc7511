"""Rewards score candidates.

This file defines a reward; each file beside it whose name has no underscore is one kind.

A reward module holds a frozen dataclass, the `[rewards.<name>]` section of the configuration. Its
`load()` returns the Reward.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

from infer_align.engines import Engine
from infer_align.errors import ConfigError, Unsupported
from infer_align.types import Array, Body, Candidate, Kind, Messages, ScoringUsage

log = logging.getLogger(__name__)

# Time limit of the scoring that runs now, in seconds: the reward's own limit, or less before a
# deadline.
time_budget: ContextVar[float] = ContextVar("time_budget", default=math.inf)
# Share of the time budget for each of several concurrent calls. A call that hangs then fails before
# the budget ends, and the results of the other calls are not lost.
CALL_SHARE = 0.95

# Metadata of the fields `description` and `timeout_seconds` of a reward's section.
DESCRIPTION = {"description": "One line about this reward, for people."}
TIMEOUT = {
    "gt": 0,
    "description": "Time limit of scoring, in seconds. A candidate without a score by then counts "
    "as not scored.",
}


@dataclass(frozen=True, slots=True)
class RewardScores:
    """The scores of one reward for N candidates."""

    # [A, K, N]: attributes (1 if the reward has none), members, candidates. NaN means not scored.
    values: Array
    # The cost of scoring.
    usage: ScoringUsage = field(default_factory=ScoringUsage)
    # Per candidate, why it is NaN or that its text was truncated; () if there are no notes.
    notes: tuple[str | None, ...] = ()
    # Further results as JSON, such as the comparisons of a judge.
    report: Body = field(default_factory=dict)
    # The first exception that left a candidate without a score, for the log.
    failure: BaseException | None = None
    # [N, N]: the probability that the candidate of the row beats the one of the column, and NaN for
    # pairs that were not compared. None: the reward does not compare pairs.
    matrix: Array | None = None
    # A limitation of this scoring that the response's reason mentions; "" if there is none.
    remark: str = ""


def refuse_without_chat(engine: Engine, where: str) -> None:
    """Refuse an engine that cannot be asked in a chat, for a reward that asks in one.

    Raises:
        Unsupported: naming `where` and the engine.
    """
    if not engine.reads_chats:
        raise Unsupported(
            f"{where}: asks in a chat, but {engine.describe()} has no chat template; name a file "
            "with one in the engine's chat_template, or another engine of [engines.*] in the "
            "reward's section.",
            param=where,
        )


class Reward(ABC):
    """Scores candidates of one conversation.

    Attributes:
        description: one line for people.
        members: names of the K members of the ensemble.
        attributes: names of its A objectives, or () if its score is one number.
        timeout_seconds: time limit of `score`; after it, the candidates count as not scored.
        pipelined: True if each candidate is scored as soon as it is finished, instead of all
            together.
        compares_pairs: True if its scores come with a matrix of win probabilities.
        relative: True if the score of a candidate depends on the candidates that are scored with
            it. Such a reward scores all candidates again if more are drawn.
        uses_engine: True if it generates or reads with an engine. Requests that name no rewards are
            scored by it only if there is no reward without an engine.
        named_only: True if it scores only if a request names it.
        parameters: the dataclass of the parameters that a request may set, or None.
        cost: the tokens that it reads or samples for each request, in words.
        engines: the engines of the process by name, "served" and those of `[engines.*]`. They are
            set before `start`, and have started already.
        warnings: sentences about what an operator should check; they are complete after `start`.
    """

    description: str = ""
    members: tuple[str, ...] = ("score",)
    attributes: tuple[str, ...] = ()
    timeout_seconds: float = 30.0
    pipelined: ClassVar[bool] = False
    relative: bool = False
    engines: Mapping[str, Engine] = MappingProxyType({})
    compares_pairs: bool = False
    uses_engine: bool = False
    named_only: bool = False
    parameters: ClassVar[type | None] = None
    cost: str = ""
    warnings: tuple[str, ...] = ()

    async def start(self) -> None:
        """Load models and open connections. It is called once, before every other method."""

    async def close(self) -> None:
        """Free all resources."""

    def health(self) -> str | None:
        """Return None if the reward can score, else the reason why it cannot."""
        return None

    def with_parameters(self, parameters: Mapping[str, Any]) -> Reward:
        """Return the same reward with the parameters of one request.

        Raises:
            Unsupported: the reward takes no parameters.
        """
        names = ", ".join(parameters)
        raise Unsupported(
            f"{names}: a reward of the kind {type(self).__name__} takes no parameters of a "
            "request; set them in its section [rewards.*]."
        )

    def check(self, where: str) -> None:
        """Refuse a reward that cannot score here, before anything is generated.

        Args:
            where: the field of the request that names this reward.

        Raises:
            Unsupported: naming `where`, the missing capability and the engine that lacks it.
        """

    def check_conversation(self, where: str, messages: Messages) -> None:
        """Refuse a conversation that the reward cannot read, before anything is generated.

        Args:
            where: the field of the request that names this reward.
            messages: the conversation that candidates answer to.

        Raises:
            InvalidRequest: naming `where` and what cannot be read.
        """

    def worst_case_tokens(self, _n: int) -> int:
        """Return the maximum number of tokens sampled to score n candidates.

        A reward that only reads samples none.
        """
        return 0

    def worst_case_reading(self, _messages: Messages, _kind: Kind, _answers: Sequence[int]) -> int:
        """Return the maximum number of tokens that engines read in one call of `score`.

        A reward with a model of its own has no engine read.

        Args:
            _messages: the conversation that the candidates answer to.
            _kind: of the request.
            _answers: for each candidate, the most tokens that it has.
        """
        return 0

    def join_reports(self, parts: Sequence[RewardScores]) -> Body:
        """Return one report on candidates that were scored in several calls, in their order."""
        return parts[-1].report

    @abstractmethod
    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Score every candidate as the next turn of `messages`.

        The prompt of a text completion is a user's turn.
        """


class ComparableReward(Reward):
    """A reward whose scores can be compared with those of a plain recipe, see `rewards check`."""

    @abstractmethod
    async def score_by_recipe(
        self, messages: Messages, candidates: Sequence[Candidate]
    ) -> RewardScores:
        """Score as `tokenizer(text, truncation=True)` reads the text, one text at a time."""


async def start_reward(name: str, reward: Reward) -> None:
    """Start the reward of the section `[rewards.<name>]`, and log its warnings.

    Raises:
        ConfigError: it cannot score as it is configured; the message names the section.
    """
    try:
        await reward.start()
    except ConfigError as error:
        raise ConfigError(f"[rewards.{name}] {error.message}") from error
    for warning in reward.warnings:
        log.warning("[rewards.%s] %s", name, warning)
