"""Log-probabilities of given texts: the question of a reward to an engine, and its answer.

An engine reads one prompt, and each text as the model's next words. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from infer_align.types import Array, Body, Kind


@dataclass(frozen=True, slots=True)
class SequenceQuery:
    """A question of a reward to an engine: how likely each text is as the next turn."""

    # Holds the conversation (`messages`) of a chat, or the `prompt` of a text completion. Sampling
    # fields are ignored: the answer is the model's own distribution at temperature 1.
    body: Body
    texts: tuple[str, ...]
    kind: Kind = "chat"
    # The author of the texts in a chat: the model's answer, or the next turn of the user, written
    # as the chat template writes one.
    role: Literal["assistant", "user"] = "assistant"
    # Names of fitted values whose expectation after the last token of each text is read too.
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceLogprobs:
    """The model's log-probability of each token of each text, in nats."""

    # Per text [T]: one number per token of the text, without an end token. The sum is the
    # log-probability of the text after the prompt. An empty text has no tokens.
    logprobs: tuple[Array, ...]
    prompt_tokens: int = 0  # of the prompt; read once for all texts
    text_tokens: int = 0  # of all texts together
    # value -> [N]: what the value expects after the last token of each text
    estimates: Mapping[str, Array] = field(default_factory=dict)
