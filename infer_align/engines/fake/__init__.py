"""A real engine that plays a script: replies, delays and faults, for tests, docs and benchmarks.

Candidate i of a draw plays reply `i mod len(replies)`, one word per token; the next batch of the
draw goes on with the script. The engine honours stop texts, token limits, cancellation and
streaming, so the flow above it is the same as over a model. It records seeds, but nothing in it is
random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from infer_align.engines.fake.engine import FakeEngine, delay_factor
from infer_align.engines.fake.script import Reply, ScriptedLabels, ScriptedWords

__all__ = [
    "Fake",
    "FakeEngine",
    "Reply",
    "ScriptedLabels",
    "ScriptedWords",
    "delay_factor",
    "plugin",
]


@dataclass(frozen=True, slots=True)
class Fake:
    """Scripted replies, delays and faults."""

    holds_model: ClassVar[bool] = False
    model: str = field(default="fake", metadata={"description": "Name of the model."})
    replies: tuple[Reply, ...] = field(
        default=(Reply(),),
        metadata={
            "min_length": 1,
            "description": "The script; candidate i returns reply i modulo the number of replies.",
        },
    )
    labels: tuple[ScriptedLabels, ...] = field(
        default=(),
        metadata={
            "description": "Scripted judgements; the first one that fits the prompt and the labels "
            "is used, or equal probabilities if none fits."
        },
    )
    words: tuple[ScriptedWords, ...] = field(
        default=(),
        metadata={
            "description": "Scripted log-probabilities of given texts; the first entry that fits "
            "the prompt is used. If none fits, every word has -1."
        },
    )
    context_length: int = field(
        default=4096,
        metadata={"ge": 1, "description": "Maximum tokens of prompt and completion together."},
    )
    load_seconds: float = field(
        default=0.0, metadata={"ge": 0, "description": "Duration of loading in seconds."}
    )

    def load(self) -> FakeEngine:
        """Return the engine, not yet started."""
        return FakeEngine(self)


plugin = Fake
