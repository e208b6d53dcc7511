"""Score answers by a fitted value: what a head expects at the last token of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines import Engine
from infer_align.errors import ConfigError, Unsupported, nearest
from infer_align.messages import text_of
from infer_align.rewards import DESCRIPTION, TIMEOUT, Reward, RewardScores
from infer_align.rewards._sequences import empty_answer, prompt_tokens
from infer_align.types import Array, Candidate, Kind, Messages, ScoringUsage

SERVED = "served"


@dataclass(frozen=True, slots=True)
class ValueRewardSection:
    """The reward that a fitted value head expects at the last token of an answer.

    It costs one reading of the prompt and of each answer. It fails where the value does: a head is
    fitted to the answers of the frozen model, so it is a guess about answers of another model, and
    about answers that end in the middle of a sentence.
    """

    value: str = field(
        metadata={"description": "Name of a value of kind head: the section [values.<name>]."}
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=30.0, metadata=TIMEOUT)

    def load(self) -> ValueReward:
        """Return the reward. Its `engines` must be set before it starts."""
        return ValueReward(self)


plugin = ValueRewardSection


class ValueReward(Reward):
    """The expectation of one head after the last token of each answer."""

    uses_engine = True
    cost = "reads the conversation and each answer once"

    def __init__(self, section: ValueRewardSection) -> None:
        self._name = section.value
        self.timeout_seconds = section.timeout_seconds
        self.description = (
            section.description or f"what the value {section.value!r} expects at the end"
        )

    async def start(self) -> None:
        """Check that the served engine has the value.

        Raises:
            ConfigError: there is no value of the configured name, or it cannot estimate an answer.
        """
        if not self.engines:
            return
        values = self._engine.values
        if self._name not in values:
            raise ConfigError(f"value: {self._name!r} is not configured; {nearest('', values)}")
        if not values[self._name].estimates_states:
            able = [name for name, value in values.items() if value.estimates_states]
            raise ConfigError(
                f"value: {self._name!r} cannot estimate an answer without a further token; values "
                f"of kind head can: {', '.join(able) or 'none is configured'}."
            )

    @property
    def _engine(self) -> Engine:
        if SERVED not in self.engines:
            raise Unsupported("the engine that holds the values does not run here.")
        return self.engines[SERVED]

    def check(self, where: str) -> None:
        """Refuse an engine that does not read values after given texts.

        Raises:
            Unsupported: naming `where` and the engine.
        """
        engine = self._engine
        if not engine.reads_values:
            raise Unsupported(
                f"{where}: needs a value's expectation after given texts, which "
                f"{engine.describe()} does not read; use an engine of kind transformers.",
                param=where,
            )

    def worst_case_reading(self, messages: Messages, kind: Kind, answers: Sequence[int]) -> int:
        """Return the tokens of the conversation, read once, and of each answer."""
        tokens = sum(answers)
        for query, _ in _queries(messages, [empty_answer(kind)], self._name):
            tokens += prompt_tokens(self._engine, query.body, query.kind)
        return tokens

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] scores. A candidate that the value cannot estimate is NaN."""
        values = np.full(len(candidates), np.nan)
        read = 0
        for query, indices in _queries(messages, candidates, self._name):
            answer = await self._engine.sequence_logprobs(query)
            values[indices] = answer.estimates[self._name]
            read += answer.prompt_tokens + answer.text_tokens
        return RewardScores(
            values[None, None], ScoringUsage(read, engine_tokens=read), self._notes(values)
        )

    def _notes(self, values: Array) -> tuple[str | None, ...]:
        notes: list[str | None] = []
        for value in values:
            is_missing = bool(np.isnan(value))
            notes.append(f"the value {self._name!r} gave no estimate" if is_missing else None)
        return tuple(notes) if np.isnan(values).any() else ()


def _queries(
    messages: Messages, candidates: Sequence[Candidate], value: str
) -> list[tuple[SequenceQuery, list[int]]]:
    """Return the queries that read all candidates, each with the indices of its candidates.

    A text completion goes on with its prompt, which is the user's turn of `messages`.
    """
    texts = tuple(candidate.text for candidate in candidates)
    everything = list(range(len(candidates)))
    if not candidates:
        return []
    if messages and "message" in candidates[0].choice:
        body = {"messages": list(messages)}
        return [(SequenceQuery(body, texts, values=(value,)), everything)]
    prompt = "".join(text_of(message.get("content")) for message in messages)
    if prompt:
        query = SequenceQuery({"prompt": prompt}, texts, kind="completion", values=(value,))
        return [(query, everything)]
    # There is nothing before the text, so the text itself is the prompt.
    queries: list[tuple[SequenceQuery, list[int]]] = []
    for index, text in enumerate(texts):
        alone = SequenceQuery({"prompt": text}, ("",), kind="completion", values=(value,))
        queries.append((alone, [index]))
    return queries
