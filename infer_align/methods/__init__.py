"""The methods that a request can name in `align`. This file defines a method.

Each file beside this one is a method: its parameters as a frozen dataclass in the variable
`plugin`, and its maths as plain functions. A method gets the draft of a plan and returns it with
its own part written into it:

    @dataclass(frozen=True, slots=True)
    class Twice:
        times: int = field(default=2, metadata={"ge": 1, "description": "Factor of draws."})

        stage: ClassVar[Stage] = Stage.PROPOSE
        needs: ClassVar[frozenset[Capability]] = frozenset()

        def apply(self, draft: PlanDraft) -> PlanDraft:
            draws = tuple(replace(draw, n=draw.n * self.times) for draw in draft.draws)
            return replace(draft, draws=draws, selects=True)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import numpy as np

from infer_align.types import Array, Body, Capability, Direction, Draw, Event, Messages

SectionT = TypeVar("SectionT")
# With a larger weight of a value, a float32 softmax is an argmax over the values.
MAX_VALUE_WEIGHT = 1000.0
# Writes a preference direction into a chat body.
Condition: TypeAlias = Callable[[Body, Direction], Body]


class Stage(IntEnum):
    """A place in the flow where methods act. Methods are applied to a plan in this order.

    Methods of one stage are applied in the order of their keys in `align`. A score for texts that a
    client sends is planned too; then only CONDITION, SCORE and SELECT take part.
    """

    CONDITION = 1  # write into the prompt: what the model and the rewards know of a preference
    PROPOSE = 2  # say how many candidates are drawn, and with which body each draw is sampled
    STEER = 3  # let the engine change the logits of each token
    OBSERVE = 4  # watch the candidates while they are drawn, and reject some of them
    SCORE = 5  # add rewards to the weighted sum
    SELECT = 6  # shape the scores before the sum, or set the rule that ranks the candidates


class Method(Protocol):
    """One key of `align`.

    A method is a frozen dataclass. Its fields are its parameters, its docstring is its description.
    A method that reads a section of the configuration names its dataclass in a class attribute
    `section`. The section has the name of the method, or the one in the dataclass's `section_name`.
    If the dataclass names another one in a class attribute `entry`, the section is a table of such
    entries by name, such as `[traits.*]`. A method that multiplies the candidates names the
    parameter in a class attribute `fan_out`, for the message about too many candidates. A method
    that is of no use without a configured reward or value says so in a class attribute `relies_on`:
    "rewards" or "values". A method that a text completion cannot have, because it changes the
    messages of a chat, has a class attribute `chat_only` that is True.
    """

    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[Capability]]

    @abstractmethod
    def apply(self, draft: PlanDraft) -> PlanDraft:
        """Return the draft with this method's part written into it. Pure.

        The same draft gives an equal one, so what is written is compared by value: a frozen
        dataclass, a tuple, or a bound method of this dataclass.
        """


class Sections:
    """The configuration sections that methods read, looked up by their dataclass."""

    def __init__(self, *sections: object) -> None:
        self._by_class: dict[type, object] = {type(section): section for section in sections}

    def get(self, section: type[SectionT]) -> SectionT:
        """Return the configured section, or one with its defaults if none is configured."""
        configured = self._by_class.get(section)
        if not isinstance(configured, section):
            configured = section()
            self._by_class[section] = configured
        return configured


class Observer(ABC):
    """Follows the running candidates of one batch and may reject some of them.

    A method that observes estimates or deltas asks for them: it sets `estimates` or `deltas` of
    every draw. A request whose candidates are all rejected fails, and names the first reason.
    """

    @abstractmethod
    def observe(self, event: Event) -> Mapping[int, str]:
        """Return the candidates to reject now, each with the reason.

        Called for each event of each candidate, in order of arrival; a `Candidate` is the last
        event of its index. `event.index` counts over all draws of the batch. A rejected candidate
        is stopped if it still runs, and takes no part in the selection.
        """


# Makes the observer of one batch from its number of candidates and the number that the request
# returns. A plan without a stop rule has one batch.
ObserverFactory: TypeAlias = Callable[[int, int], Observer]


class StopRule(ABC):
    """Lets a plan draw its candidates in batches, and decides after each if another one is drawn.

    Attributes:
        max_candidates: number of candidates of all draws and batches together, at most.
        batch: number of candidates of each batch after the first. The first one has at least as
            many: those that the other methods ask for, and those that the request returns.
    """

    max_candidates: int
    batch: int

    @abstractmethod
    def reason_to_stop(self, objective: Array) -> str | None:
        """Return a clause that says why no other batch is drawn, or None to draw one. Pure.

        Called only while more candidates may be drawn.

        Args:
            objective: [N] of the candidates so far, in the order of drawing; NaN marks one that was
                not compared.
        """


@dataclass(frozen=True, slots=True)
class ScorerRequest:
    """A reward that a method adds to the plan, by its configured name.

    A method computes no scores itself. A score of a new kind is a reward, see
    `infer_align.rewards`.
    """

    reward: str  # such as "quality", or "quality.verbosity" for one attribute
    weight: float
    # Fields of the reward's section that this request overrides.
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Composition(ABC):
    """Shapes the scores of one request before they are summed, and gates its candidates."""

    @property
    @abstractmethod
    def shaped(self) -> tuple[str, ...]:
        """Return the names of the rewards with a shape."""

    @property
    @abstractmethod
    def gates(self) -> Mapping[str, float]:
        """Return the lowest score that passes, by reward."""

    @abstractmethod
    def compose(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Return the shaped scores of each reward: {reward: [N]} -> {reward: [N]}; NaN stays."""

    @abstractmethod
    def shortfalls(self, values: Mapping[str, Array]) -> Array:
        """Return by how much each candidate misses the gates: {reward: [N]} -> [N].

        0 passes; NaN is a candidate that a gate's reward did not score.
        """


@dataclass(frozen=True, slots=True)
class Contest:
    """The candidates of one request that can be compared, as a selection rule sees them.

    N counts these candidates: none failed, and each has all its scores. R counts the rewards with a
    weight over 0. No score is NaN.
    """

    objective: Array  # [N]: the weighted sum of the composed scores
    names: tuple[str, ...] = ()  # R names of rewards
    values: Array = field(default_factory=lambda: np.zeros((0, 0)))  # [R, N] composed scores
    weights: Array = field(default_factory=lambda: np.zeros(0))  # [R], over 0
    # The rewards whose shape the request sets. The scale of any other one is arbitrary.
    shaped: frozenset[str] = frozenset()
    # pairwise judge -> [N, N] probabilities that a row beats a column; NaN: not compared
    matrices: Mapping[str, Array] = field(default_factory=dict)
    texts: tuple[str, ...] = ()  # N
    tokens: tuple[int, ...] = ()  # N
    measure: str = "objective"  # the name of the objective, such as "uwo"
    drawn: int = 0  # candidates of the request, including those that cannot be compared
    seed: int = 0
    n_returned: int = 1


@dataclass(frozen=True, slots=True)
class Ranking:
    """The result of a selection rule. Candidates are named by their index."""

    order: tuple[int, ...]  # every candidate of the contest, best first
    clause: str  # why the first one won, for the response's reason
    # The probability of each candidate to be first; None: the rule is no lottery.
    distribution: tuple[float, ...] | None = None
    # True if the rule compares pairs; then the next two fields say what it saw.
    pairwise: bool = False
    condorcet: int | None = None  # the candidate that beats every other one
    cycles: int = 0  # triples in which each beats the next one
    # The worst case that the rule maximises: a probability to win, or a group's score.
    worst_case: float | None = None


class SelectionRule(ABC):
    """Ranks the candidates of one request.

    Attributes:
        name: the value of `align.select.rule`, or another word for the response.
        needs_scores: False if the rule can choose without any reward.
    """

    name: ClassVar[str]
    needs_scores: ClassVar[bool] = True

    def check(self, param: str, rewards: Sequence[str], judges: Sequence[str]) -> None:
        """Refuse a plan that lacks what the rule needs, before anything is spent.

        Args:
            param: the field of the request that names the rule.
            rewards: the names of the rewards with a weight over 0, pairwise judges included.
            judges: the names of the pairwise judges among them.

        Raises:
            InvalidRequest: naming the field and what is missing.
        """

    @abstractmethod
    def rank(self, contest: Contest) -> Ranking:
        """Return the candidates to return, best first, by their place in the contest.

        There is at least one candidate. The same contest gives the same ranking.
        """


@dataclass(frozen=True, slots=True)
class PlanDraft:
    """A plan while the methods of one request write into it. The planner completes it."""

    draws: tuple[Draw, ...]  # rewritten by CONDITION, PROPOSE, STEER and OBSERVE

    # Given by the planner before the first method.
    messages: Messages = ()  # the client's messages before any method: what rewards read
    seed: int = 0
    attributes: tuple[str, ...] = ()  # attributes that some configured reward scores
    has_system_role: bool = True  # False if the model sees no system messages
    sections: Sections = field(default_factory=Sections)
    path: str = "align"  # where the methods stand in the request body, for error messages

    # Written by CONDITION.
    direction: Direction | None = None  # unit; rewards with several attributes score along it
    condition: Condition | None = None  # writes another direction into a draw's body
    # The setting that avoids the system message, if a method wrote into it.
    system_setting: str | None = None

    # Written by PROPOSE.
    selects: bool = False  # True if candidates are compared; otherwise they stream
    note: str = ""  # a limitation that the response's reason mentions
    # Draws more batches after the draws above, which are the first one; None: there are no more.
    stop_rule: StopRule | None = None

    # Written by OBSERVE.
    observers: tuple[ObserverFactory, ...] = ()

    # Written by SCORE.
    scorers: tuple[ScorerRequest, ...] = ()

    # Written by SELECT.
    composition: Composition | None = None  # None: scores are summed as they are
    rule: SelectionRule | None = None  # None: the highest objective first

    @property
    def candidates(self) -> int:
        """Return the number of candidates of all draws."""
        return sum(draw.n for draw in self.draws)

    def param(self, *names: str) -> str:
        """Return the dotted path of a parameter in the request, such as "align.dpa.direction"."""
        return ".".join(name for name in (self.path, *names) if name)
