"""Parser for server-sent events (SSE), the `text/event-stream` format of streamed answers.

The parser does no I/O. Feed it bytes as they arrive; it returns the data of each complete event:

    parser = EventParser()
    for received in response:
        for data in parser.feed(received):
            if is_done(data):
                return
            print(json.loads(data))
    last = parser.end()  # events that the server did not close with an empty line
"""

from __future__ import annotations

from codecs import BOM_UTF8

MAX_EVENT_BYTES = 64 * 2**20


class EventParser:
    """Splits a byte stream into the data of its events.

    A line ends with LF, CR LF or CR alone, as the standard allows. Network chunks may end
    anywhere, also within a character or a line end. An event with several
    `data:` lines gives them joined by line feeds. Comments, other fields and a byte order mark are
    skipped.
    """

    def __init__(self) -> None:
        self._incomplete_line = b""
        self._at_start = True
        self._after_cr = False
        self._data_lines: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that `received` completes.

        Raises:
            ValueError: an event is larger than MAX_EVENT_BYTES.
        """
        if self._after_cr and received:
            # A CR has already ended the line. This LF belongs to it.
            received = received.removeprefix(b"\n")
            self._after_cr = False
        content = self._incomplete_line + received
        if self._at_start:
            if len(content) < len(BOM_UTF8) and BOM_UTF8.startswith(content):
                self._incomplete_line = content
                return []
            self._at_start = False
            content = content.removeprefix(BOM_UTF8)
        events = []
        for line in self._complete_lines(content):
            if line.startswith(b"data:"):
                self._data_lines.append(line.removeprefix(b"data:").removeprefix(b" "))
            elif not line and self._data_lines:
                events.append(b"\n".join(self._data_lines))
                self._data_lines = []
        return events

    def _complete_lines(self, content: bytes) -> list[bytes]:
        """Return the lines of `content` without their ends, and keep the last if it goes on."""
        # For bytes, `splitlines` splits at LF, CR LF and CR only.
        lines = content.splitlines()
        self._incomplete_line = b""
        if lines and not content.endswith((b"\n", b"\r")):
            self._incomplete_line = lines.pop()
        if content:
            self._after_cr = content.endswith(b"\r")
        if len(self._incomplete_line) > MAX_EVENT_BYTES:
            raise ValueError(f"an event is over {MAX_EVENT_BYTES} bytes")
        return lines

    def end(self) -> list[bytes]:
        """Return the last event if no empty line closed it: some servers omit that line."""
        return self.feed(b"\n\n")


def is_done(data: bytes) -> bool:
    """Return True if an event's data is "[DONE]", which ends a stream of the OpenAI API."""
    return data.strip() == b"[DONE]"
