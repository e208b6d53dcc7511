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
        encoded = _encode(tokenizer, beginning + text, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        border = len(beginning)
        first = sum(1 for _, end in offsets if end <= border)
        # A token that spans the border belongs to neither side.
        if all(start >= border for start, _ in offsets[first:]):
            yield encoded["input_ids"][first:]


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


def _encode(tokenizer: Any, text: str, **options: bool) -> Any:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, **options)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = _encode(tokenizer, text)["input_ids"]
    return ids


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)
    return text
