"""The tokens of a prompt with their log-probabilities, as upstreams report them.

echo              text completions repeat the prompt, and list the logprobs of its tokens (OpenAI)
prompt_logprobs   chat completions list the logprobs of the rendered prompt (vLLM)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The prefix by which OpenAI's text completions mark a token that is a part of a character.
BYTES = "bytes:"
_ESCAPED_BYTE = re.compile(r"\\x([0-9a-fA-F]{2})")
_CONTROL = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")


class PromptToken(NamedTuple):
    """A token of a prompt.

    Attributes:
        data: its UTF-8.
        logprob: in nats; None for the first token, which follows nothing.
    """

    data: bytes
    logprob: float | None


def echoed_tokens(answer: Any) -> list[PromptToken]:
    """Return the tokens of the prompt that a text completion echoes; [] if it lists none."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        count = int(answer["usage"]["prompt_tokens"])
        listed = list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))[:count]
        return [PromptToken(named_bytes(str(name)), _number(value)) for name, value in listed]
    except (KeyError, IndexError, TypeError, ValueError):
        return []


def rendered_tokens(answer: Any) -> list[PromptToken]:
    """Return the tokens of the rendered prompt of a chat completion; [] if it lists none."""
    try:
        return [_rendered_token(entry) for entry in answer["prompt_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return []


def _rendered_token(entry: Mapping[str, Any] | None) -> PromptToken:
    if entry is None:
        return PromptToken(b"", None)
    # The first of several tokens is the prompt's own; others are alternatives.
    chosen = next(iter(entry.values()))
    return PromptToken(str(chosen["decoded_token"]).encode(), _number(chosen["logprob"]))


def named_bytes(name: str) -> bytes:
    """Return the UTF-8 of a token that a text completion names."""
    if name.startswith(BYTES):
        return bytes(int(value, 16) for value in _ESCAPED_BYTE.findall(name))
    return name.encode()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def text_logprobs(tokens: Sequence[PromptToken], text: str) -> list[float] | None:
    """Return the logprobs of the last tokens, those that spell `text`.

    Some upstreams name a token without the space before it. Then white space does not count.

    Returns:
        None if no tokens at the end spell the text, or if one of them is a control token.
    """
    for spelling in (bytes, _without_space):
        count = _count_last(tokens, text.encode(), spelling)
        if count is None:
            continue
        last = tokens[len(tokens) - count :]
        controls = any(_CONTROL.fullmatch(token.data.decode(errors="replace")) for token in last)
        logprobs = [token.logprob for token in last if token.logprob is not None]
        return None if controls or len(logprobs) < count else logprobs
    return None


def _count_last(tokens: Sequence[PromptToken], text: bytes, spelling: Any) -> int | None:
    """Return the number of tokens at the end that spell a text; None if none do."""
    remaining = spelling(text)
    for count, token in enumerate(reversed(tokens), 1):
        data = spelling(token.data)
        if not remaining.endswith(data):
            return None
        remaining = remaining[: len(remaining) - len(data)]
        if not remaining:
            return count
    return None


def _without_space(data: bytes) -> bytes:
    return b"".join(data.split())
