"""Log-probabilities of given texts: the question of a reward to an engine, and its answer.

An engine reads one prompt, and each text as the model's next words. Nothing is sampled.

A text is read as an answer that begins after the prompt, so no token spans the border between both.
The tokens are those that the tokenizer makes of the text at this place: at the beginning of an
assistant's turn, or in the middle of a text that a completion continues. They are the tokens that
the model sampled for an answer, unless it spelt the answer in a way that the tokenizer would not.
The name of a control token in a text, such as "</s>", is ordinary text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from infer_align.errors import InvalidRequest, quote
from infer_align.types import Array, Body, Kind


@dataclass(frozen=True, slots=True)
class SequenceQuery:
    """A question of a reward to an engine: how likely each text is as the next turn."""

    # Holds the conversation (`messages`) of a chat, or the `prompt` of a text completion: a string,
    # or token ids. Fields that change the prompt, such as `tools`, count. Sampling fields are
    # ignored: the answer is the model's own distribution at temperature 1.
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

    @property
    def sums(self) -> tuple[float, ...]:
        """Return the log-probability of each text, in nats."""
        return tuple(float(each.sum()) for each in self.logprobs)


def check_fit(
    index: int,
    prompt_tokens: int,
    text_tokens: int,
    context_length: int,
    *,
    is_bound: bool = False,
) -> None:
    """Refuse a text that does not fit the context together with its prompt.

    Args:
        index: the text's index in its query.
        prompt_tokens: number of tokens of the prompt.
        text_tokens: number of tokens of the text.
        context_length: maximum of prompt and text together.
        is_bound: True if the text has at least so many tokens, and may have more.

    Raises:
        InvalidRequest: naming the text and the limit.
    """
    if prompt_tokens + text_tokens <= context_length:
        return
    count = f"at least {text_tokens}" if is_bound else str(text_tokens)
    raise InvalidRequest(
        f"text {index}: {prompt_tokens} tokens of prompt and {count} of text do not "
        f"fit the context of {context_length}; shorten the prompt or the text.",
        code="context_length_exceeded",
    )


def check_token_prompt(prompt: object) -> list[int]:
    """Return a prompt of token ids, checked.

    Raises:
        InvalidRequest: it is neither a string nor a list of token ids, or it is empty.
    """
    is_list = isinstance(prompt, list | tuple) and bool(prompt)
    tokens = list(prompt) if isinstance(prompt, list | tuple) else []
    are_ids = all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)
    if not is_list or not are_ids or min(tokens) < 0:
        raise InvalidRequest(
            f"prompt: {quote(prompt)} is not allowed; must be a string, or a list of token ids.",
            param="prompt",
        )
    return tokens
