"""Streaming text of sampled tokens: complete characters, and stop strings across tokens.

`tokenizers.decoders.DecodeStream` does not suffice: it raises when bytes follow that spoil a
character, holds broken characters back forever and cannot flush an unfinished one at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# A character is at most four bytes, so at most four tokens. After this many tokens without a
# complete character, the replacement character is emitted.
MAX_PENDING_TOKENS = 32
# Tokens of the prompt that are decoded with the first token of an answer, at most.
MAX_CONTEXT_TOKENS = 32
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The letters with which byte-level vocabularies write bytes.
_BYTE_OF_LETTER: dict[str, int] = {letter: byte for byte, letter in bytes_to_unicode().items()}


class TextStream:
    """The text of one candidate.

    Args:
        tokenizer: the model's tokenizer.
        stops: the stop strings.
        special: True to show special tokens.
        prompt: the tokens of the text that the candidate continues. Many tokenizers write a space
            before a word only if text comes before it. Empty if the candidate begins a text.

    Attributes:
        text: the text so far, without the stop string and without an end that may begin one.
        stopped: True once a stop string has arrived.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: tuple[str, ...] = (),
        *,
        special: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._skips_special = not special
        # Decoded text that may be the beginning of a stop string.
        self._held = ""
        # How many characters of it came while no stop string counted.
        self._kept = 0
        # The tokens of the latest piece. The decoder needs them to place a leading space.
        self._context = self._end_of(prompt)
        # The tokens since then, which do not yet end in a complete character.
        self._pending: list[int] = []

    @property
    def held_back(self) -> str | None:
        """Return the text behind `text`, which may begin a stop string; None within a character."""
        return None if self._pending else self._held

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; return the text that is certain now.

        Args:
            token: the token.
            may_stop: False if a stop string that ends with this token does not count.
        """
        self._pending.append(token)
        piece = self._next_piece(final=False)
        if not may_stop:
            self._kept = len(self._held) + len(piece)
        return self._emit(piece, final=not self._stops)

    def finish(self) -> str:
        """Return the text that was held back, an unfinished character included."""
        return self._emit(self._next_piece(final=True), final=True)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Return the last tokens of a prompt that show some text, from a complete character on."""
        for length in range(1, min(len(prompt), MAX_CONTEXT_TOKENS) + 1):
            end = list(prompt[-length:])
            text = self._decode(end)
            if text.strip() and not text.startswith(_REPLACEMENT):
                return end
        return list(prompt[-MAX_CONTEXT_TOKENS:])

    def _next_piece(self, *, final: bool) -> str:
        context = self._decode(self._context)
        text = self._decode([*self._context, *self._pending])
        # Later bytes can change how the decoder renders earlier ones. Never retract emitted text.
        unchanged = text.startswith(context)
        piece = text[len(context) :] if unchanged else self._decode(self._pending)
        unfinished = piece.endswith(_REPLACEMENT) and len(self._pending) < MAX_PENDING_TOKENS
        if not piece or (unfinished and not final):
            return ""
        self._context = self._pending
        self._pending = []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(
            tokens, skip_special_tokens=self._skips_special
        )
        return text

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        stop = self._first_stop()
        if stop is not None:
            self.stopped = True
            certain = stop
        elif final:
            certain = len(self._held)
        else:
            certain = len(self._held) - self._stop_prefix_length()
        emitted = self._held[:certain]
        self._held = "" if self.stopped else self._held[certain:]
        self._kept = max(0, self._kept - certain)
        self.text += emitted
        return emitted

    def _first_stop(self) -> int | None:
        """Return where in the held text a stop string begins.

        The stop string that is complete first counts, and of those the longest. So the result
        does not depend on where tokens begin and end.
        """
        matches: list[tuple[int, int]] = []
        for stop in self._stops:
            start = self._held.find(stop, max(0, self._kept - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        return min(matches)[1] if matches else None

    def _stop_prefix_length(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


@lru_cache(2**18)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the UTF-8 of one token, which may be a part of a character.

    An id without a token gives no bytes; vocabularies are padded.
    """
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in _added_ids(tokenizer):
        return piece.encode()
    steps = _decoder_steps(tokenizer)
    if "ByteLevel" in steps:
        return _byte_level(piece)
    byte = _BYTE.fullmatch(piece)
    if "ByteFallback" in steps and byte:
        return bytes([int(byte[1], 16)])
    text: str = piece.replace(_SPACE, " ") if _SPACE in steps else tokenizer.decode([token])
    return text.encode()


def _byte_level(piece: str) -> bytes:
    if all(letter in _BYTE_OF_LETTER for letter in piece):
        return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
    return piece.encode()


@lru_cache(64)
def _added_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that were added to the vocabulary.

    transformers makes an object of each of them for every call: there may be thousands.
    """
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(64)
def _decoder_steps(tokenizer: Any) -> frozenset[str]:
    """Return the types of a tokenizer's decoders, and "▁" if one of them turns it into a space."""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return frozenset()
    steps: set[str] = set()
    remaining = [json.loads(decoder.__getstate__())]
    while remaining:
        step = remaining.pop()
        remaining += step.get("decoders", [])
        steps.add(step["type"])
        if _SPACE in (step.get("replacement"), step.get("pattern", {}).get("String")):
            steps.add(_SPACE)
    return frozenset(steps)
