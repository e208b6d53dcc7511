"""From tokens to text as they come: whole characters only, and stop strings found across token boundaries."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# A character is at most four bytes and so four tokens; who sends more that end in none is not waited for.
PATIENCE = 32
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one candidate.

    Attributes:
        text: all of it so far that cannot become part of a stop string, without the stop string itself.
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self._before: list[
            int
        ] = []  # the tokens of the last piece: whether a space leads depends on what stands before
        self._tokens: list[int] = []  # those since

    def push(self, token: int) -> str:
        """Add a token; -> the text that is certain now."""
        self._tokens.append(token)
        return self._emit(self._piece(final=False), final=not self._stops)

    def finish(self) -> str:
        """The end has come: -> what was held back, an unfinished character included."""
        return self._emit(self._piece(final=True), final=True)

    def _piece(self, *, final: bool) -> str:
        before, text = self._decode(self._before), self._decode([*self._before, *self._tokens])
        # Bytes that follow a character made of bytes can spoil it in the decoder's eyes; what was said stays said.
        piece = text[len(before) :] if text.startswith(before) else self._decode(self._tokens)
        unfinished = piece.endswith(_UNKNOWN) and len(self._tokens) < PATIENCE
        if not piece or (unfinished and not final):
            return ""
        self._before, self._tokens = self._tokens, []
        return piece

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        # The first to be complete, and of those the longest: so it does not matter where tokens begin and end.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain = min(found)[1]
        else:
            certain = len(self._held) if final else len(self._held) - self._risk()
        out = self._held[:certain]
        self._held = "" if self.stopped else self._held[certain:]
        self.text += out
        return out

    def _risk(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


@lru_cache(2**18)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 of one token, which may be a part of a character."""
    piece: str | None = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # an embedding without a token: vocabularies are padded
        return b""
    if token in tokenizer.added_tokens_decoder:
        return piece.encode()
    decoder = repr(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel(" in decoder:
        return (
            bytes(_LETTERS[letter] for letter in piece)
            if all(letter in _LETTERS for letter in piece)
            else piece.encode()
        )
    if "ByteFallback(" in decoder and (byte := _BYTE.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    if _SPACE in decoder:
        return piece.replace(_SPACE, " ").encode()
    text: str = tokenizer.decode([token])
    return text.encode()


def _letters() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with: printable ones stand for themselves, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(hidden)
    }


_LETTERS = _letters()
