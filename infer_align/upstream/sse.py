"""Server-sent events from bytes, as they come."""

from __future__ import annotations

MAX_EVENT_BYTES = 64 * 2**20


class EventParser:
    """Cuts a byte stream into the data of its events, wherever the network has cut it; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""  # a line that is not complete yet
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The events that are complete now.

        Raises:
            ValueError: an event is larger than any answer.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is over {MAX_EVENT_BYTES} bytes")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").removesuffix(b"\r"))
            elif line in {b"", b"\r"} and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    def end(self) -> list[bytes]:
        """The event that no empty line has closed: servers forget it after the last."""
        return self.feed(b"\n\n")
