"""The tokens of a text as the continuation of a prompt.

An engine makes text of the tokens that it samples. This is the way back: from the text of an answer
to the tokens that a model would sample for it. A token never spans the border between the prompt
and the text, and control tokens that are written out are ordinary text.

Many tokenizers write a space before the first word that they see. That space belongs to an answer
only if the chat template writes one there, and never into the middle of a text. So a text is read
in several ways, and the first one counts whose tokens spell the text at its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from infer_align.errors import InvalidRequest

# Tokens of the prompt that are decoded together with the text, at most.
CONTEXT_TOKENS = 32
# A text that merges with no other text.
LINE_BREAK = "\n"
# Words that no chat template contains.
TURN = "infer-align-turn-7f3c"


def text_tokens(
    tokenizer: Any, text: str, prompt: Sequence[int], *, is_continued: bool
) -> list[int]:
    """Return the tokens of a text that follows a prompt.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: the text. Special tokens that are written out in it are read as ordinary text.
        prompt: the tokens of the prompt.
        is_continued: True if the text goes on with the last text of the prompt, as in a text
            completion; False if it begins a turn.

    Raises:
        InvalidRequest: the text is not valid Unicode.
    """
    if not text:
        return []
    try:
        if is_continued:
            return _continuation(tokenizer, text, prompt)
        return _beginning(tokenizer, text, prompt)
    # The tokenizer raises these for lone surrogates.
    except (TypeError, UnicodeError):
        raise InvalidRequest("texts: a text is not valid Unicode.", param="texts") from None


def _beginning(tokenizer: Any, text: str, prompt: Sequence[int]) -> list[int]:
    """Return the tokens of a text that begins a turn. Decoders drop one space at a beginning."""
    space = turn_space(tokenizer, str(tokenizer.chat_template or ""))
    for written in dict.fromkeys((space + text, text)):
        tokens = _continuation(tokenizer, written, prompt)
        if _decode(tokenizer, tokens) == text:
            return tokens
    return _ids(tokenizer, text)


def _continuation(tokenizer: Any, text: str, prompt: Sequence[int]) -> list[int]:
    """Return the first tokens whose text after the prompt is `text`; else those of it alone."""
    ending = list(prompt[-CONTEXT_TOKENS:])
    before = _decode(tokenizer, ending)
    for tokens in _readings(tokenizer, text, before):
        if _decode(tokenizer, [*ending, *tokens]) == before + text:
            return tokens
    return _ids(tokenizer, text)


def _readings(tokenizer: Any, text: str, before: str) -> Iterator[list[int]]:
    """Yield the tokens of a text alone, after the end of its prompt, and after a line break."""
    yield _ids(tokenizer, text)
    for beginning in (before, LINE_BREAK):
        ids, offsets = _encode(tokenizer, beginning + text)
        border = len(beginning)
        first = sum(1 for _, end in offsets if end <= border)
        # A token that spans the border belongs to neither side.
        if all(start >= border for start, _ in offsets[first:]):
            yield ids[first:]


@lru_cache(64)
def turn_space(tokenizer: Any, template: str) -> str:
    """Return the space that a chat template writes before the assistant's words; "" if none.

    Such a space is no part of the prompt: the model samples it with the first word.
    """
    if not template:
        return ""
    question = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": TURN}
    try:
        begun = tokenizer.apply_chat_template(
            [question], tokenize=False, add_generation_prompt=True, chat_template=template
        )
        finished = tokenizer.apply_chat_template(
            [question, answer], tokenize=False, chat_template=template
        )
    # A template is code that comes with the model; it may raise anything.
    except Exception:
        return ""
    return " " if finished.startswith(f"{begun} {TURN}") else ""


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens of ordinary text, and the place of each as (start, end)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    if _control_ids(tokenizer).isdisjoint(ids):
        return ids, encoded["offset_mapping"]
    reading = _text_reader(tokenizer).encode(text, add_special_tokens=False)
    return reading.ids, reading.offsets


@lru_cache(64)
def _control_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that may not be read from a text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, entry in added if entry.special)


@lru_cache(8)
def _text_reader(tokenizer: Any) -> Tokenizer:
    """Return a copy of a tokenizer that reads control tokens as ordinary text.

    The tokenizer has a switch for it, but other threads use it, and they would read their prompts
    without control tokens meanwhile.
    """
    reader = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reader.no_truncation()
    reader.no_padding()
    reader.encode_special_tokens = True
    return reader


def _ids(tokenizer: Any, text: str) -> list[int]:
    return _encode(tokenizer, text)[0]


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text
