"""Score an answer by how likely a known reference becomes after it.

    score = log p(reference | conversation, answer, "Answer:")

The answer is read as reasoning, and the reference as its conclusion. The request brings the
reference: use it to pick the best reasoning where the right result is known, to grade in an
evaluation, or to build data. The sum over the reference's tokens compares the answers to one
request; scores of different references cannot be compared.

Source: "Likelihood-Based Reward Designs for General LLM Reasoning", for the log-probability of the
reference, which works for long references where the probability itself vanishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from infer_align.decoding.sequences import SequenceQuery
from infer_align.errors import InvalidRequest
from infer_align.messages import message_text
from infer_align.methods.guidance import Words
from infer_align.rewards import DESCRIPTION, TIMEOUT, RewardScores
from infer_align.rewards._sequences import (
    ENGINE,
    SequenceReward,
    empty_answer,
    kind_of,
    prompt_tokens,
    read,
    scores,
)
from infer_align.types import Body, Candidate, Kind, Messages, ScoringUsage


@dataclass(frozen=True, slots=True)
class ReferenceParameters:
    """The parameters that a request sets."""

    reference: Words = field(
        metadata={"description": "The answer that is known to be right, as text."}
    )


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The log-probability of the request's reference after an answer."""

    lead: str = field(
        default="\n\nAnswer:",
        metadata={"description": "Text between the answer and the reference."},
    )
    engine: str = field(default="served", metadata=ENGINE)
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def load(self) -> LikelihoodReward:
        """Return the reward. Its `engines` must be set before it starts."""
        return LikelihoodReward(self)


plugin = Likelihood


class LikelihoodReward(SequenceReward):
    """The log-probability of a reference after each answer, in nats."""

    kind = "likelihood"
    parameters: ClassVar[type | None] = ReferenceParameters
    named_only = True

    def __init__(self, config: Likelihood, reference: str | None = None) -> None:
        super().__init__([config.engine])
        self.config = config
        self.reference = reference
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or "log-probability of the request's reference"
        self.cost = "reads the conversation, the answer and the reference once per answer"

    def with_parameters(self, parameters: Mapping[str, Any]) -> LikelihoodReward:
        """Return the same reward with the reference of one request."""
        reward = LikelihoodReward(self.config, parameters["reference"])
        reward.engines = self.engines
        return reward

    def check(self, where: str) -> None:
        """Refuse a request without a reference, and an engine that cannot read.

        Raises:
            InvalidRequest: there is no reference, or the engine lacks the capability.
        """
        if self.reference is None:
            raise InvalidRequest(
                f"{where}: needs the reference that the answers are compared with; write "
                f'{where} = {{"weight": 1, "reference": "..."}}.',
                param=where,
            )
        super().check(where)

    def worst_case_reading(self, messages: Messages, kind: Kind, answers: Sequence[int]) -> int:
        """Return the tokens of the conversation, the answer and the reference, for each answer."""
        engine = self.engine(self.config.engine)
        per_answer = prompt_tokens(engine, self._body(messages, empty_answer(kind)), kind)
        per_answer += prompt_tokens(engine, {"prompt": self._text}, "completion")
        return len(answers) * per_answer + sum(answers)

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] log-probabilities of the reference."""
        engine = self.engine(self.config.engine)
        text = self._text
        queries: list[SequenceQuery] = []
        for candidate in candidates:
            body = self._body(messages, candidate)
            queries.append(SequenceQuery(body, (text,), kind_of(candidate)))
        answers = await asyncio.gather(*(read(engine, query) for query in queries))
        usage = sum((answer.usage for answer in answers), ScoringUsage())
        values = [answer.texts[0].total for answer in answers]
        return scores(values, usage, [answer.error for answer in answers])

    @property
    def _text(self) -> str:
        """Return the reference as it is read."""
        # The space belongs to the first word: tokenizers write " 42" as one token.
        return f" {(self.reference or '').strip()}"

    def _body(self, messages: Messages, candidate: Candidate) -> Body:
        """Return the body whose last words are the answer and the lead to the reference."""
        begun = candidate.text.rstrip() + self.config.lead
        if kind_of(candidate) == "completion":
            prompt = message_text(messages[0]) if messages else ""
            return {"prompt": prompt + begun}
        return {
            "messages": [*messages, {"role": "assistant", "content": begun}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        }
