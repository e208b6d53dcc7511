"""What is asked: the demo's questions, text of a given length, or a file of chats."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer_align.demo.world import prompts as demo_questions
from infer_align.errors import ConfigError, nearest, shown
from infer_align_bench.types import Prompt

# Words that the tokenizers in use spell with one token each, or nearly: a count of words is about a count of tokens.
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


def demo(seed: int) -> list[Prompt]:
    """All questions of the embedded world, shuffled."""
    return [_user(text) for text in demo_questions(DEMO_QUESTIONS, seed)]


def synthetic(
    count: int, input_tokens: tuple[int, int], output_tokens: tuple[int, int], seed: int
) -> list[Prompt]:
    """`count` prompts of about so many tokens, each with its own `max_tokens`; both uniform in their range, ends included.

    No tokenizer is at hand: lengths are words, and the report says what the endpoint counted.
    """
    chance = random.Random(f"synthetic/{seed}")  # noqa: S311 - filler text
    made = []
    for _ in range(count):
        words = chance.choices(WORDS, k=chance.randint(*input_tokens))
        made.append(
            Prompt(_user(" ".join(words)).messages, {"max_tokens": chance.randint(*output_tokens)})
        )
    return made


def from_file(path: Path) -> list[Prompt]:
    """One chat a line: a JSON string, which is a user's message, or an object with `messages` and further fields of the body.

    Raises:
        ConfigError: not readable, empty, or a line is neither; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        guess = nearest(str(path), NAMES)
        hint = f"; {guess}" if guess.startswith("did") else "."
        raise ConfigError(f"prompts: {path} cannot be read: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts: {path} is not UTF-8: {error}.") from None
    found = [
        _line(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise ConfigError(f"prompts: {path} holds none.")
    return found


def marked(prompt: Prompt, mark: str) -> Prompt:
    """The same conversation with a mark before its first word: alike to ask, and no cache knows it."""
    first, *rest = prompt.messages
    content = first.get("content")
    content = (
        [{"type": "text", "text": mark}, *content]
        if isinstance(content, list)
        else f"{mark} {content or ''}"
    )
    return Prompt(({**first, "content": content}, *rest), prompt.body)


def _line(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, str):
        return _user(value)
    if not isinstance(value, Mapping) or not _messages(value.get("messages")):
        raise ConfigError(
            f'{place}: {shown(line)} is not allowed; must be a JSON string or {{"messages": [...]}}.'
        )
    return Prompt(
        tuple(value["messages"]),
        {name: field for name, field in value.items() if name != "messages"},
    )


def _messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) for message in value)
    )


def _user(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))
