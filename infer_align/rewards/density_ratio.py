"""Score an answer by how much likelier a better context makes it.

    score = log p(answer | conversation with `prompt`)
          - log p(answer | conversation with `negative_prompt`)

The first context asks for what is wanted, such as "Answer politely.". The second one is the
conversation as it is, or it asks for the opposite. Both may be read by the same frozen model, or by
two: a tuned model against its base. No reward model is trained.

The score says what the difference of the two contexts says, and nothing else. Two prompts that
differ in another trait than the one that is wanted order the answers by that other trait.

Sources: "Dr. SoW: Density Ratio of Strong-over-weak LLMs" (2411.02481), for the ratio of two
models, there per token; "Self-Rewarding PPO", for the sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines import Engine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.methods.guidance import Words
from infer_align.rewards import DESCRIPTION, TIMEOUT, RewardScores
from infer_align.rewards._sequences import (
    ENGINE,
    SequenceReward,
    TextReadings,
    answer_body,
    empty_answer,
    kind_of,
    prompt_tokens,
    read,
    scores,
)
from infer_align.types import Body, Candidate, Kind, Messages

EMPTY = "an empty answer has no word to compare"
SAME_CONTEXTS = (
    "compares a context with itself, so every score would be 0; set a prompt that differs from "
    "negative_prompt"
)


@dataclass(frozen=True, slots=True)
class RatioParameters:
    """The parameters that a request may set."""

    prompt: Words | None = field(
        default=None,
        metadata={
            "description": "Text of the better context, as in a system message. Default: the "
            "conversation as it is, which then needs a negative_engine or a negative_prompt."
        },
    )
    negative_prompt: Words | None = field(
        default=None,
        metadata={"description": "Text of the other context. Default: the conversation as it is."},
    )
    per_token: bool = field(
        default=False,
        metadata={
            "description": "Divide by the number of tokens that the first engine reads in the "
            "answer. Otherwise a long answer can gain or lose more than a short one."
        },
    )


@dataclass(frozen=True, slots=True)
class DensityRatio(RatioParameters):
    """The log-ratio by which a better prompt, or a better model, makes an answer likelier."""

    engine: str = field(default="served", metadata=ENGINE)
    negative_engine: str | None = field(
        default=None,
        metadata={"description": "Engine that reads the other context. Default: the same."},
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    def load(self, model: str | None = None) -> DensityRatioReward:
        """Return the reward. Its `engines` must be set before it starts.

        Args:
            model: the one of several models of the engines that reads; None for the first.

        Raises:
            ConfigError: both contexts are the same.
        """
        if self.compares_nothing:
            raise ConfigError(f"density_ratio: {SAME_CONTEXTS}, or set negative_engine.")
        return DensityRatioReward(self, model)

    @property
    def compares_nothing(self) -> bool:
        """Return True if both contexts are the same."""
        other = self.negative_engine or self.engine
        return self.prompt == self.negative_prompt and other == self.engine


plugin = DensityRatio


class DensityRatioReward(SequenceReward):
    """The log-ratio of two contexts, in nats."""

    kind = "density_ratio"
    parameters: ClassVar[type | None] = RatioParameters

    def __init__(self, config: DensityRatio, model: str | None = None) -> None:
        """Score by a section; `model` names one of several models of the engines."""
        super().__init__([config.engine, config.negative_engine or config.engine])
        self.config = config
        self.model = model
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or _description(config)
        self.cost = "reads the conversation and each answer twice"

    def with_parameters(self, parameters: Mapping[str, Any]) -> DensityRatioReward:
        """Return the same reward with these fields of its section changed."""
        reward = DensityRatioReward(replace(self.config, **parameters), self.model)
        reward.engines = self.engines
        return reward

    def check(self, where: str) -> None:
        """Refuse contexts that are the same, and an engine that cannot read them.

        Raises:
            InvalidRequest: both contexts are the same, or an engine lacks the capability.
        """
        if self.config.compares_nothing:
            raise InvalidRequest(f"{where}: {SAME_CONTEXTS}.", param=where)
        super().check(where)

    def worst_case_reading(self, messages: Messages, kind: Kind, answers: Sequence[int]) -> int:
        """Return the tokens of both contexts, and of each answer in both."""
        config = self.config
        contexts = (
            (config.engine, config.prompt),
            (config.negative_engine or config.engine, config.negative_prompt),
        )
        tokens = 0
        for name, prompt in contexts:
            engine = self.engine(name)
            body = self._body(engine, messages, empty_answer(kind), prompt)
            tokens += prompt_tokens(engine, body, kind) + sum(answers)
        return tokens

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] log-ratios. An empty answer is not scored, unless all are empty.

        Its ratio is 0 whatever the contexts are, so it would win over answers that they disfavour.
        """
        config = self.config
        better, worse = await asyncio.gather(
            self._read(config.engine, messages, candidates, config.prompt),
            self._read(
                config.negative_engine or config.engine,
                messages,
                candidates,
                config.negative_prompt,
            ),
        )
        values: list[float] = []
        errors = []
        for first, second in zip(better.texts, worse.texts, strict=True):
            ratio = first.total - second.total
            if config.per_token:
                ratio /= max(1, len(first.logprobs))
            values.append(ratio)
            errors.append(first.error or second.error)
        result = scores(values, better.usage + worse.usage, errors)
        return _without_empty(result, [bool(each.text.strip()) for each in candidates])

    async def _read(
        self, name: str, messages: Messages, candidates: Sequence[Candidate], prompt: str | None
    ) -> TextReadings:
        """Read all answers in one context with the engine of this name."""
        engine = self.engine(name)
        texts = tuple(candidate.text for candidate in candidates)
        if not texts:
            return await read(engine, SequenceQuery({}, ()))
        body = self._body(engine, messages, candidates[0], prompt)
        return await read(engine, SequenceQuery(body, texts, kind_of(candidates[0])))

    def _body(
        self, engine: Engine, messages: Messages, candidate: Candidate, prompt: str | None
    ) -> Body:
        """Return the body of one context, for the model that reads."""
        body = answer_body(engine, messages, candidate, prompt)
        return body if self.model is None else {**body, "model": self.model}


def _without_empty(result: RewardScores, have_text: Sequence[bool]) -> RewardScores:
    """Return the scores of the answers that have a text; all scores if none has."""
    if all(have_text) or not any(have_text):
        return result
    notes = list(result.notes)
    for index, has_text in enumerate(have_text):
        if not has_text:
            notes[index] = notes[index] or EMPTY
    values = np.where(have_text, result.values, np.nan)
    return replace(result, values=values, notes=tuple(notes))


def _description(config: DensityRatio) -> str:
    first = f'with "{config.prompt}"' if config.prompt else "as it is"
    second = f'with "{config.negative_prompt}"' if config.negative_prompt else "as it is"
    if config.negative_engine not in {None, config.engine}:
        first += f" on the engine {config.engine!r}"
        second += f" on {config.negative_engine!r}"
    return f"log-ratio of the answer's probability: {first}, against {second}"
