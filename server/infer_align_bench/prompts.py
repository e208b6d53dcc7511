"""The prompts of a run: the demo's questions, synthetic text of a chosen length, or a file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer_align.demo.world import prompts as demo_questions
from infer_align.errors import ConfigError, nearest, quote
from infer_align.preferences.lines import read_content
from infer_align_bench.types import ChatPrompt

# Common tokenizers encode each of these words with about one token, so that a number of words is
# about a number of tokens.
WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "group",
    "hand",
)
DEMO_QUESTIONS = 320
NAMES = ("demo", "synthetic")


def demo(seed: int) -> list[ChatPrompt]:
    """Return all questions of the embedded demo, shuffled."""
    return [_user(text) for text in demo_questions(DEMO_QUESTIONS, seed)]


def synthetic(
    count: int, input_tokens: tuple[int, int], output_tokens: tuple[int, int], seed: int
) -> list[ChatPrompt]:
    """Return `count` prompts of random words, each with its own `max_tokens`.

    Both lengths are drawn uniformly from a range with both ends included. Lengths are counted in
    words, because no tokenizer is available; the report has the endpoint's counts.
    """
    generator = random.Random(f"synthetic/{seed}")  # noqa: S311 - filler text
    prompts = []
    for _ in range(count):
        words = generator.choices(WORDS, k=generator.randint(*input_tokens))
        body = {"max_tokens": generator.randint(*output_tokens)}
        prompts.append(_user(" ".join(words), body))
    return prompts


def from_file(path: Path) -> list[ChatPrompt]:
    """Read one chat per line of a JSONL file.

    A line is a JSON string (the user's message), or an object with `messages` and further fields
    of the body.

    Raises:
        ConfigError: the file cannot be read or is empty, or a line has another form.
    """
    try:
        lines = read_content(path).decode().split("\n")
    except ConfigError as error:
        guess = nearest(str(path), NAMES)
        hint = f"; {guess}" if guess.startswith("did you mean") else "."
        raise ConfigError(f"prompts: {error.message.removesuffix('.')}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {path} is not UTF-8: {error}.") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompts.append(_parse_line(line, f"{path}:{number}"))
    if not prompts:
        raise ConfigError(f"prompts: {path} has no prompts; write one chat per line.")
    return prompts


def with_prefix(prompt: ChatPrompt, prefix: str) -> ChatPrompt:
    """Return the conversation with a prefix before its first word.

    It costs about the same as the original, and no prefix cache contains it.
    """
    first, *rest = prompt.messages
    content = first.get("content")
    if isinstance(content, list):
        prefixed: Any = [{"type": "text", "text": prefix}, *content]
    else:
        prefixed = f"{prefix} {content or ''}"
    return ChatPrompt(({**first, "content": prefixed}, *rest), prompt.body)


def _parse_line(line: str, place: str) -> ChatPrompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str):
        return _user(value)
    if not isinstance(value, Mapping) or not _is_conversation(value.get("messages")):
        raise ConfigError(
            f"{place}: {quote(line)} is not allowed; "
            'must be a JSON string or {"messages": [...]}.'
        )
    body = {name: field for name, field in value.items() if name != "messages"}
    return ChatPrompt(tuple(value["messages"]), body)


def _is_conversation(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(message, Mapping) for message in value)


def _user(text: str, body: Mapping[str, Any] | None = None) -> ChatPrompt:
    return ChatPrompt(({"role": "user", "content": text},), body or {})
