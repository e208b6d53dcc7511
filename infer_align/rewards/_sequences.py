"""The base of rewards that read log-probabilities of given texts with an engine.

Nothing is sampled. Such a reward needs no reward model: the frozen model itself, or another engine,
says how likely a text is after a conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from infer_align.added_text import with_instruction
from infer_align.decoding.sequences import SequenceQuery
from infer_align.engines import Engine
from infer_align.errors import AlignError, ConfigError, InvalidRequest, Unsupported, nearest
from infer_align.messages import message_text
from infer_align.rewards import Reward, RewardScores
from infer_align.types import (
    Array,
    Body,
    Candidate,
    Capability,
    Draw,
    Kind,
    Messages,
    ScoringUsage,
)

# Metadata of the field `engine` of a reward's section.
ENGINE = {"description": 'Engine that reads: "served", or a name of `[engines.*]`.'}
_NEEDS = frozenset({Capability.SEQUENCE_LOGPROBS})


@dataclass(frozen=True, slots=True)
class TextReading:
    """The log-probabilities of one text, or the reason why it could not be read."""

    logprobs: Array  # [T] in nats
    error: AlignError | None = None

    @property
    def total(self) -> float:
        """Return the log-probability of the text; NaN if it could not be read."""
        return float(self.logprobs.sum()) if self.error is None else float("nan")

    @property
    def mean(self) -> float:
        """Return the log-probability per token; 0 for a text without tokens."""
        return self.total / max(1, len(self.logprobs))


@dataclass(frozen=True, slots=True)
class TextReadings:
    """The readings of all texts of one query."""

    texts: tuple[TextReading, ...]
    usage: ScoringUsage

    @property
    def error(self) -> AlignError | None:
        """Return the first reason why a text could not be read."""
        return next((each.error for each in self.texts if each.error is not None), None)


class SequenceReward(Reward):
    """A reward that reads texts with one engine or several."""

    kind: ClassVar[str]  # the `kind` of its configuration section, for error messages
    uses_engine = True

    def __init__(self, engines: Sequence[str]) -> None:
        """Read with the engines of these names."""
        self._engine_names = tuple(dict.fromkeys(engines))

    async def start(self) -> None:
        """Check that the engines exist.

        Raises:
            ConfigError: there is no engine of a configured name.
        """
        for name in self._engine_names:
            if self.engines and name not in self.engines:
                raise ConfigError(
                    f"{self.kind}.engine: {name!r} is not configured; {nearest(name, self.engines)}"
                )

    def check(self, where: str) -> None:
        """Refuse an engine that does not report the log-probabilities of given texts.

        Raises:
            Unsupported: naming `where`, the engine and the missing capability.
        """
        for name in self._engine_names:
            engine = self.engine(name)
            if not engine.missing(_NEEDS):
                continue
            able: list[str] = []
            for other, candidate in self.engines.items():
                if candidate.capabilities >= _NEEDS:
                    able.append(f"engine = {other!r}")
            advice = " or ".join(able) or "an engine of [engines.*] that has it"
            raise Unsupported(
                f"{where}: needs {', '.join(_NEEDS)}, which {engine.describe()} lacks; set in its "
                f"section {advice}.",
                param=where,
            )

    def engine(self, name: str) -> Engine:
        """Return an engine by its name.

        Raises:
            Unsupported: it does not run here.
        """
        if name not in self.engines:
            raise Unsupported(f"{self.kind}: the engine {name!r} does not run here.")
        return self.engines[name]


async def read(engine: Engine, query: SequenceQuery) -> TextReadings:
    """Read the texts of a query. Equal texts are read once.

    A text that the engine refuses, for example because it does not fit the context, fails alone.
    """
    texts = tuple(dict.fromkeys(query.texts))
    if not texts:
        return TextReadings((), ScoringUsage())
    try:
        answer = await engine.sequence_logprobs(replace(query, texts=texts))
    except InvalidRequest as error:
        if len(texts) == 1:
            return _failed(query, error)
        single = await asyncio.gather(
            *(read(engine, replace(query, texts=(text,))) for text in texts)
        )
        usage = sum((each.usage for each in single), ScoringUsage())
        unique = [each.texts[0] for each in single]
    except AlignError as error:
        return _failed(query, error)
    else:
        tokens = answer.prompt_tokens + answer.text_tokens
        usage = ScoringUsage(tokens, engine_tokens=tokens)
        unique = [TextReading(np.asarray(each, dtype=np.float64)) for each in answer.logprobs]
    by_text = dict(zip(texts, unique, strict=True))
    return TextReadings(tuple(by_text[text] for text in query.texts), usage)


def prompt_tokens(engine: Engine, body: Body, kind: Kind) -> int:
    """Return the number of tokens of a prompt that an engine will read, or an upper bound.

    A prompt that cannot be rendered costs nothing: no candidate is scored.
    """
    try:
        return engine.prompt_tokens(Draw(body, kind=kind))
    except AlignError:
        return 0


def empty_answer(kind: Kind) -> Candidate:
    """Return an answer without text, to count the tokens around it."""
    if kind == "completion":
        return Candidate(0, {"text": ""})
    return Candidate(0, {"message": {"role": "assistant", "content": ""}})


def answer_body(
    engine: Engine, messages: Messages, candidate: Candidate, prompt: str | None
) -> Body:
    """Return the body that a candidate answers to, with one more instruction in it.

    A chat gets the instruction by the rule of `with_instruction`; in a text completion it stands
    before the prompt.

    Args:
        engine: that will read the body.
        messages: the conversation.
        candidate: a chat answer, or a text completion.
        prompt: the instruction, or None for the conversation as it is.
    """
    if kind_of(candidate) == "completion":
        text = message_text(messages[0]) if messages else ""
        return {"prompt": text if prompt is None else f"{prompt}\n\n{text}"}
    if prompt is None:
        return {"messages": list(messages)}
    prompted = with_instruction(messages, prompt, has_system_role=engine.has_system_role)
    return {"messages": prompted}


def kind_of(candidate: Candidate) -> Kind:
    """Return "chat" for the answer of a chat, "completion" for a text completion."""
    return "chat" if "message" in candidate.choice else "completion"


def scores(
    values: Sequence[float], usage: ScoringUsage, errors: Sequence[AlignError | None]
) -> RewardScores:
    """Return N scores, with the reason for each that could not be read.

    Args:
        values: [N]; NaN or infinite for a candidate that was not scored.
        usage: the cost of reading.
        errors: [N]; the reason why a candidate could not be read, or None.
    """
    notes: list[str | None] = []
    for value, error in zip(values, errors, strict=True):
        note = error.message if error is not None else None
        if note is None and not np.isfinite(value):
            note = "the model gives this text no probability"
        notes.append(note)
    array: Any = np.array([[list(values)]], dtype=np.float64)
    failure = next((error for error in errors if error is not None), None)
    return RewardScores(array, usage, tuple(notes), failure=failure)


def _failed(query: SequenceQuery, error: AlignError) -> TextReadings:
    return TextReadings((TextReading(np.empty(0), error),) * len(query.texts), ScoringUsage())
