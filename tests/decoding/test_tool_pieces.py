"""Tool calls that are streamed in pieces are put together, however a server numbers them."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.decoding.stream import ChoiceBuilder
from infer_align.messages import text_of

Piece = dict[str, Any]


def piece(arguments: Any = "", name: Any = None, **fields: Any) -> Piece:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return {**fields, "function": function}


def assembled(*deltas: Piece) -> Piece:
    """Return the message that a stream of these deltas makes."""
    builder = ChoiceBuilder("chat")
    for delta in deltas:
        builder.add({"index": 0, "delta": delta, "finish_reason": None})
    message: Piece = builder.choice("tool_calls")["message"]
    return message


def calls_of(*pieces: Piece) -> list[tuple[Any, str, str]]:
    message = assembled(*({"tool_calls": [each]} for each in pieces))
    calls = message["tool_calls"]
    assert all("index" not in call for call in calls)
    return [
        (call.get("id"), call["function"]["name"], call["function"]["arguments"]) for call in calls
    ]


ONE = [("a", "f", '{"x": 1}')]
TWO = [("a", "f", "{1}"), ("b", "g", "{2}")]


@pytest.mark.parametrize(
    "pieces",
    [
        # Empty fields say nothing.
        (piece('{"x"', "f", index=0, id="a"), piece(": 1}", "", index=0, id="", type="")),
        (piece('{"x"', "f", index=0, id="a"), piece(": 1}", index=0, id=None)),
        # No index, and no new id.
        (piece('{"x"', "f", id="a"), piece(": 1}")),
        (piece('{"x"', "f", id="a"), piece(": 1}", id="a")),
        (piece('{"x"', "f", index=None, id="a"), piece(": 1}", index=None)),
        (piece('{"x"', "f", index=0, id="a"), piece(": 1}")),
        # Other forms of the index, and an id that comes late.
        (piece('{"x"', "f", index="0", id="a"), piece(": 1}", index=0)),
        (piece('{"x"', "f", index=0), piece(": 1}", index=0, id="a")),
        # Names that are repeated, and arguments that are null or an object.
        (piece('{"x"', "f", index=0, id="a"), piece(": 1}", "f", index=0)),
        (piece(None, "f", index=0, id="a"), piece('{"x": 1}', index=0)),
        (piece({"x": 1}, "f", id="a"),),
    ],
)
def test_pieces_of_one_call_become_one_call(pieces: tuple[Piece, ...]) -> None:
    assert calls_of(*pieces) == ONE


@pytest.mark.parametrize(
    "pieces",
    [
        # A new id at an index in use.
        (piece("{1}", "f", index=0, id="a"), piece("{2}", "g", index=0, id="b")),
        (
            piece("{", "f", index=0, id="a"),
            piece("1}", index=0),
            piece("{", "g", index=0, id="b"),
            piece("2}", index=0),
        ),
        # Interleaved, by index and by id.
        (
            piece("{", "f", index=0, id="a"),
            piece("{", "g", index=1, id="b"),
            piece("1}", index=0),
            piece("2}", index=1, id=""),
        ),
        (
            piece("{", "f", index=0, id="a"),
            piece("{", "g", index=0, id="b"),
            piece("1}", index=0, id="a"),
            piece("2}", index=0, id="b"),
        ),
        # No index at all.
        (piece("{", "f", id="a"), piece("1}"), piece("{", "g", id="b"), piece("2}")),
        # Indices with a gap.
        (piece("{1}", "f", index=2, id="a"), piece("{2}", "g", index=7, id="b")),
    ],
)
def test_pieces_of_two_calls_become_two_calls(pieces: tuple[Piece, ...]) -> None:
    assert calls_of(*pieces) == TWO


WHOLE = [(None, "f", '{"x": 1}'), (None, "f", '{"x": 2}')]


@pytest.mark.parametrize("index", [{}, {"index": 0}], ids=["no index", "index 0"])
def test_whole_calls_without_ids_are_calls_of_their_own(index: dict[str, int]) -> None:
    first, second = piece('{"x": 1}', "f", **index), piece('{"x": 2}', "f", **index)
    assert calls_of(first, second) == WHOLE
    message = assembled({"tool_calls": [first, second]})
    assert len(message["tool_calls"]) == 2
    # A name that is repeated with the rest of the arguments begins nothing.
    split = (piece('{"x"', "f", **index), piece(": 1}", "f", **index), piece("", "f", **index))
    assert calls_of(*split) == WHOLE[:1]


def test_the_deltas_for_the_client_are_numbered() -> None:
    builder = ChoiceBuilder("chat")
    numbers = []
    for each in (piece("1", "f", index=0, id="a"), piece("2", "g", index=0, id="b"), piece("3")):
        delta = builder.add({"delta": {"tool_calls": [each]}})
        assert delta is not None
        numbers.append(delta["delta"]["tool_calls"][0]["index"])
    assert numbers == [0, 1, 1]


def test_a_call_without_arguments_has_an_empty_text() -> None:
    assert calls_of({"index": 0, "id": "a", "function": {"name": "f"}}) == [("a", "f", "")]


def test_legacy_function_calls_are_put_together() -> None:
    message = assembled(
        {"role": "assistant", "function_call": {"name": "f", "arguments": ""}},
        {"role": "", "function_call": {"name": "", "arguments": "{"}},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "}"}},
    )
    assert message["function_call"] == {"name": "f", "arguments": "{}"}
    assert message["role"] == "assistant"


def test_other_texts_of_a_message_are_put_together() -> None:
    message = assembled(
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"content": None, "refusal": "n"},
        {"content": "b", "reasoning_content": "s", "refusal": "o"},
    )
    assert (message["content"], message["refusal"]) == ("ab", "no")
    assert message["reasoning_content"] == "rs"


def test_text_and_parts_of_a_content_keep_their_order() -> None:
    thought = {"type": "thinking", "thinking": "hm"}
    part = {"type": "text", "text": "b"}
    message = assembled({"content": "a"}, {"content": [thought, part]}, {"content": "c"})
    assert message["content"] == [
        {"type": "text", "text": "a"},
        thought,
        part,
        {"type": "text", "text": "c"},
    ]
    assert text_of(message["content"]) == "abc"
    assert assembled({"content": ""}, {"content": [part]})["content"] == [part]


def test_a_chunk_may_hold_a_message_in_place_of_a_delta() -> None:
    builder = ChoiceBuilder("chat")
    delta = builder.add({"index": 0, "message": {"role": "assistant", "content": "hi"}})
    assert delta == {"delta": {"content": "hi"}}
    assert builder.choice("stop")["message"] == {"role": "assistant", "content": "hi"}
