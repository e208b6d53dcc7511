"""Counting the tokens of an answer that is passed on unread, from the usage that it carries."""

from __future__ import annotations

import re

from starlette.types import Message, Send

_GENERATED = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,12})')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,12})')
_FIELDS = {"prompt_tokens": _PROMPT, "completion_tokens": _GENERATED}
# The first line of an event. The parts of an answer usually begin with one.
_EVENT = re.compile(rb"(?:\A|[\r\n])data:")
# The end of a body contains its usage.
TAIL_BYTES = 2**16


class TokenMeter:
    """Sends an answer and counts its tokens.

    The names of the usage cannot occur in the texts of the answer: quotes are escaped there.

    Attributes:
        started: True once the answer has begun.
    """

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._tail = bytearray()
        self._events = 0
        self._is_stream = False
        self._is_error = False
        self._is_text = False
        self._usage: dict[str, int] | None = None

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        self.started = True
        if message["type"] == "http.response.start":
            self._read_head(message)
        elif self._is_text:
            chunk = message.get("body", b"")
            self._usage = None
            self._tail += chunk[-TAIL_BYTES:]
            del self._tail[:-TAIL_BYTES]
            if self._is_stream:
                self._events += len(_EVENT.findall(chunk))
        await self._send(message)

    def _read_head(self, message: Message) -> None:
        headers = {name.lower(): value for name, value in message.get("headers", ())}
        content_type = headers.get(b"content-type", b"")
        self._is_error = message["status"] >= 400
        self._is_stream = content_type.startswith(b"text/event-stream")
        self._is_text = self._is_stream or b"json" in content_type

    def usage(self) -> dict[str, int]:
        """Return the counts that the answer reports, under their names in the access line."""
        if self._usage is None:
            self._usage = {} if self._is_error else self._read_usage()
        return self._usage

    def _read_usage(self) -> dict[str, int]:
        usage: dict[str, int] = {}
        for name, pattern in _FIELDS.items():
            counts = pattern.findall(self._tail)
            if counts:
                usage[name] = int(counts[-1])
        return usage

    def tokens(self, worst_case: int) -> int:
        """Return the number of tokens that the answer reports as generated.

        An error counts 0. A stream without usage counts one token per event. Any other answer
        without usage counts `worst_case`.
        """
        if self._is_error:
            return 0
        generated = self.usage().get("completion_tokens")
        if generated is not None:
            return generated
        return self._events if self._is_stream else worst_case

    def prompt_tokens(self) -> int:
        """Return the number of prompt tokens that the answer reports; 0 if it reports none."""
        return self.usage().get("prompt_tokens", 0)
