"""Server-sent events are returned complete, wherever the network splits the bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.upstream import sse
from infer_align.upstream.sse import EventParser, is_done

LINE = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20)


@given(st.lists(LINE.filter(bool), max_size=6), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_any_split_gives_the_same_events(
    texts: list[str], newline: str, data: st.DataObject
) -> None:
    written = [
        f": a comment{newline}event: x{newline}data: {text}{newline}{newline}" for text in texts
    ]
    stream = "".join(written).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = EventParser()
    events = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += parser.feed(stream[start:stop])
    events += parser.end()
    assert [event.decode() for event in events] == texts


@pytest.mark.parametrize(
    "content",
    [
        b"data: 1\r\rdata: 2\r\r",
        b"data: 1\r\n\rdata: 2\n\r\n",
        b"\rdata:1\r\r\r: comment\rdata: 2\r",
        b"\xef\xbb\xbfdata: 1\r\rid: 7\rdata: 2",
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_lines_may_end_with_a_carriage_return_alone(content: bytes, size: int) -> None:
    parser = EventParser()
    events = []
    for start in range(0, len(content), size):
        events += parser.feed(content[start : start + size])
    assert events + parser.end() == [b"1", b"2"]


def test_an_event_is_complete_at_its_last_carriage_return() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\r\r") == [b"a"], "the reader does not wait for a line feed"
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: b\r\n\r\n") == [b"b"]


def test_the_data_lines_of_one_event_are_joined() -> None:
    assert EventParser().feed(b"data: {\ndata:  1}\n\n") == [b"{\n 1}"]
    assert EventParser().feed(b"data: {\rdata:  1}\r\r") == [b"{\n 1}"]


def test_the_last_empty_line_may_be_missing() -> None:
    parser = EventParser()
    assert parser.feed(b"data: [DONE]") == []
    assert parser.end() == [b"[DONE]"]
    assert EventParser().end() == []


def test_an_event_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    with pytest.raises(ValueError, match="over 100 bytes"):
        EventParser().feed(b"data: " + b"x" * 200)


@pytest.mark.parametrize("data", [b"[DONE]", b" [DONE] ", b"[DONE]\r"])
def test_done_ends_a_stream(data: bytes) -> None:
    assert is_done(data)


@pytest.mark.parametrize("data", [b"", b"{}", b'"[DONE]"'])
def test_other_data_does_not_end_a_stream(data: bytes) -> None:
    assert not is_done(data)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_byte_order_mark_at_the_start_is_skipped(size: int) -> None:
    content = b"\xef\xbb\xbfdata: 1\n\ndata: \xef\xbb\xbf2\n\n"
    parser = EventParser()
    events = []
    for start in range(0, len(content), size):
        events += parser.feed(content[start : start + size])
    assert events == [b"1", b"\xef\xbb\xbf2"]
