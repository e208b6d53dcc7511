"""Score an answer by the next turn of the user that it makes likely: satisfied or dissatisfied.

    score = mean over satisfied texts of log p(text | conversation, answer) / tokens of the text
          - the same mean over dissatisfied texts

The texts are next turns of the user. The model that was trained on conversations says which kind
it expects after the answer. No reward model is trained; the texts can be read and changed.

Source: "Aligning Language Models Using Follow-up Likelihood as Reward Signal" (2409.13948). Its
code averages raw logits at one position; this is the formula of the paper.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Len

from infer_align.decoding.sequences import SequenceQuery
from infer_align.methods.guidance import Words
from infer_align.rewards import DESCRIPTION, TIMEOUT, RewardScores, refuse_without_chat
from infer_align.rewards._conversation import json_turns
from infer_align.rewards._sequences import (
    ENGINE,
    SequenceReward,
    TextReadings,
    empty_answer,
    prompt_tokens,
    read,
    scores,
)
from infer_align.types import Candidate, Kind, Messages, ScoringUsage

# Understanding, relevance, correctness, interest, information, and following the request.
SATISFIED = (
    "Thank you, that is exactly what I needed.",
    "You understood my question very well.",
    "That makes sense, thanks for the clear explanation.",
    "That is correct, thank you.",
    "That is really interesting, tell me more!",
    "Great, you did what I asked for.",
)
DISSATISFIED = (
    "That is not what I asked.",
    "You did not understand my question.",
    "That makes no sense to me.",
    "I think that is wrong.",
    "That is boring and not helpful at all.",
    "You ignored what I asked for.",
)
MAX_TEXTS = 64
Texts = Annotated[tuple[Words, ...], Len(min_length=1, max_length=MAX_TEXTS)]


@dataclass(frozen=True, slots=True)
class FollowUp:
    """The likelihood of satisfied next turns of the user, against dissatisfied ones."""

    satisfied: Texts = field(
        default=SATISFIED,
        metadata={"description": "Next turns of a user who is satisfied with the answer."},
    )
    dissatisfied: Texts = field(
        default=DISSATISFIED,
        metadata={"description": "Next turns of a user who is dissatisfied with the answer."},
    )
    engine: str = field(default="served", metadata=ENGINE)
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def load(self) -> FollowUpReward:
        """Return the reward. Its `engines` must be set before it starts."""
        return FollowUpReward(self)


plugin = FollowUp


class FollowUpReward(SequenceReward):
    """The difference of two mean log-probabilities per token, in nats."""

    kind = "follow_up"

    def __init__(self, config: FollowUp) -> None:
        super().__init__([config.engine])
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or (
            f"log-probability per token of {len(config.satisfied)} satisfied next turns, minus "
            f"that of {len(config.dissatisfied)} dissatisfied ones"
        )
        turns = len(config.satisfied) + len(config.dissatisfied)
        self.cost = f"reads the conversation, the answer and {turns} short texts once per answer"

    def check(self, where: str) -> None:
        """Refuse an engine that cannot read a chat, or that reports no log-probabilities.

        Raises:
            Unsupported: naming `where` and the engine.
        """
        refuse_without_chat(self.engine(self.config.engine), where)
        super().check(where)

    def worst_case_reading(self, messages: Messages, _kind: Kind, answers: Sequence[int]) -> int:
        """Return the tokens of the conversation, the answer and all texts, for each answer."""
        engine = self.engine(self.config.engine)
        body = {"messages": json_turns(messages, empty_answer("chat"))}
        per_answer = prompt_tokens(engine, body, "chat")
        for text in {*self.config.satisfied, *self.config.dissatisfied}:
            per_answer += prompt_tokens(engine, {"prompt": text}, "completion")
        return len(answers) * per_answer + sum(answers)

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] differences. A text completion is read as a chat's answer."""
        engine = self.engine(self.config.engine)
        texts = (*self.config.satisfied, *self.config.dissatisfied)
        queries: list[SequenceQuery] = []
        for candidate in candidates:
            body = {"messages": json_turns(messages, candidate)}
            queries.append(SequenceQuery(body, texts, "chat", "user"))
        answers = await asyncio.gather(*(read(engine, query) for query in queries))
        usage = sum((answer.usage for answer in answers), ScoringUsage())
        values = [self._difference(answer) for answer in answers]
        return scores(values, usage, [answer.error for answer in answers])

    def _difference(self, answer: TextReadings) -> float:
        means = [reading.mean for reading in answer.texts]
        first = len(self.config.satisfied)
        return float(np.mean(means[:first]) - np.mean(means[first:]))
