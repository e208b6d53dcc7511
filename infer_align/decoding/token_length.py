"""A lower bound on the number of tokens of a text, without tokenizing it.

A tokenizer takes seconds for a text of megabytes, and other requests wait meanwhile. So a text that
cannot fit the context is refused before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from infer_align.errors import InvalidRequest

# Parts of a tokenizer that split a text and keep all of it.
KEEPING_SPLITS = frozenset({"ByteLevel", "Digits", "Split"})
# A text up to so many characters is tokenized in well under a tenth of a second. So a message about
# it has the exact number of tokens.
SHORT_TEXT = 2**16
# Normal form C writes at most so many bytes as one.
NFC_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenLength:
    """The most bytes of a text that one token stands for.

    It is known for byte-level tokenizers, such as those of GPT-2, Llama 3, Qwen and SmolLM2.

    Attributes:
        longest: the bytes of the longest token.
        dropped: the bytes without a token. The tokenizer drops them.
    """

    longest: int
    dropped: bytes = b""

    @classmethod
    def of(cls, tokenizer: Any) -> TokenLength | None:
        """Return the length for a fast tokenizer of transformers.

        Returns:
            None if it is not known: a token may stand for a text of any length.
        """
        vocabulary = tokenizer.get_vocab()
        backend = tokenizer.backend_tokenizer
        letters = bytes_to_unicode()
        dropped = bytes(byte for byte, letter in letters.items() if letter not in vocabulary)
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        # Such a token takes all the spaces around it.
        takes_spaces = any(token.lstrip or token.rstrip for token in added.values())
        if takes_spaces or not _keeps_text(_state(backend.pre_tokenizer)):
            return None
        # The name of an ordinary token has a letter for each byte.
        names = [len(name) for name in vocabulary if name not in added]
        longest = max([*names, *(len(name.encode()) for name in added)])
        normal_form = _state(backend.normalizer).get("type")
        if normal_form is None:
            return cls(longest, dropped)
        # The bytes of a normal form are others than those of the text.
        if normal_form == "NFC" and not dropped:
            return cls(longest * NFC_BYTES)
        return None

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that the text has at least."""
        content = text.encode("utf-8", "surrogatepass").translate(None, self.dropped)
        return -(-len(content) // self.longest)


def check_length(
    text: str, length: TokenLength | None, context_length: int | None, param: str
) -> None:
    """Refuse a long prompt that cannot fit the context.

    Args:
        text: the prompt.
        length: what is known of the tokens; None if nothing is.
        context_length: maximum number of tokens of prompt and answer; None if it is unknown.
        param: the field of the request that the prompt comes from.

    Raises:
        InvalidRequest: naming the field and the limit.
    """
    if length is None or context_length is None or len(text) <= SHORT_TEXT:
        return
    fewest = length.fewest_tokens(text)
    if fewest > context_length:
        raise InvalidRequest(
            f"{param}: a prompt of at least {fewest} tokens does not fit the context of "
            f"{context_length}; shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )


def _state(part: Any) -> dict[str, Any]:
    """Return the description of a part of a tokenizer; {} if there is no such part."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Return True if the text is split into bytes, and nothing of it is dropped."""
    parts = splitter.get("pretokenizers", [splitter])
    kinds = {part.get("type") for part in parts}
    is_dropping = any(part.get("behavior") == "Removed" for part in parts)
    return "ByteLevel" in kinds and kinds <= KEEPING_SPLITS and not is_dropping
