"""The parts of a script: replies, judgements, and the log-probabilities of words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer.

    In `text`, "{prompt}" stands for the text of the last message, and "{seed}" for the seed of the
    candidate.
    """

    text: str = field(
        default="Hello from {prompt}",
        metadata={"description": "Text of the answer, one word per token."},
    )
    tool_calls: tuple[dict[str, Any], ...] = field(
        default=(), metadata={"description": "OpenAI tool calls at the end of the answer."}
    )
    error: str | None = field(
        default=None, metadata={"description": "Message of a failure after the text."}
    )
    status: int | None = field(
        default=None, metadata={"description": "HTTP status of the failure."}
    )
    seconds_per_token: float = field(
        default=0.0, metadata={"ge": 0, "description": "Delay before each token in seconds."}
    )
    estimates: dict[str, float] = field(
        default_factory=dict,
        metadata={"description": "{value name: estimate of this answer while it runs}."},
    )
    first_token_seconds: float = field(
        default=0.0,
        metadata={
            "ge": 0,
            "description": "Additional delay before the first token in seconds, "
            "to imitate a prefill.",
        },
    )
    spread: float = field(
        default=0.0,
        metadata={
            "ge": 0,
            "description": "Relative spread of the delays: each candidate's delays are multiplied "
            "by a factor from 1 to 1 + spread, by its seed.",
        },
    )


@dataclass(frozen=True, slots=True)
class ScriptedLabels:
    """One scripted judgement: the label probabilities after prompts that match a pattern."""

    probabilities: dict[str, Annotated[float, Ge(0), Le(1)]] = field(
        metadata={"description": "{label: probability}; other labels have probability 0."}
    )
    pattern: str = field(
        default="",
        metadata={
            "description": "Regular expression that the prompt's text must match somewhere; a dot "
            "matches line breaks."
        },
    )
    error: str | None = field(
        default=None, metadata={"description": "Message of a failure instead of a judgement."}
    )


@dataclass(frozen=True, slots=True)
class ScriptedWords:
    """Scripted log-probabilities: those of words after prompts that match a pattern."""

    logprobs: dict[str, Annotated[float, Le(0)]] = field(
        default_factory=dict,
        metadata={"description": "{word: log-probability in nats}; other words have `other`."},
    )
    pattern: str = field(
        default="",
        metadata={
            "description": "Regular expression that the prompt's text must match somewhere; a dot "
            "matches line breaks."
        },
    )
    other: float = field(
        default=-1.0,
        metadata={"le": 0, "description": "Log-probability of every other word, in nats."},
    )
    error: str | None = field(
        default=None, metadata={"description": "Message of a failure instead of an answer."}
    )
