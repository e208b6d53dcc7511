"""From tokens to text as they come: whole characters only, and stop strings found across token boundaries."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


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
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._held = ""  # may be the beginning of a stop string
        self._tokens: list[int] = []
        self._decoded = 0  # characters that the decoder has given out

    def push(self, token: int) -> str:
        """Add a token; -> the text that is certain now."""
        self._tokens.append(token)
        piece = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        return self._emit(piece, final=not self._stops)

    def finish(self) -> str:
        """The end has come: -> what was held back, an unfinished character included."""
        rest = self._tokenizer.backend_tokenizer.decode(self._tokens, skip_special_tokens=True)[self._decoded :]
        return self._emit(rest, final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain = min(found)
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
