"""Message content becomes text in one way, whatever its form."""

from __future__ import annotations

import pytest

from infer_align.messages import text_of, text_with_placeholders, transcript

IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
PARTS = [{"type": "text", "text": "Look: "}, IMAGE, {"type": "text", "text": "nice"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("the cat", "the cat"),
        ("", ""),
        (None, ""),
        ([], ""),
        (PARTS, "Look: nice"),
        ([{"type": "text"}, {"type": "text", "text": None}, "stray", 5], ""),
    ],
)
def test_text_is_the_string_or_the_joined_text_parts(content: object, text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("the cat", "the cat"),
        (None, ""),
        (PARTS, "Look: [image_url]nice"),
        ([{"no": "type"}], "[None]"),
    ],
)
def test_a_placeholder_stands_for_a_part_that_is_not_text(content: object, text: str) -> None:
    assert text_with_placeholders(content) == text


def test_a_transcript_names_the_roles_of_several_messages() -> None:
    user = {"role": "user", "content": PARTS}
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assistant = {"role": "assistant", "content": text}
    assert transcript([]) == ""
    assert transcript([{"role": "user", "content": "the cat"}, assistant]) == (
        "user: the cat\nassistant: ab"
    )
    assert transcript([user]) == "Look: nice"
    tool = {"role": "tool", "content": None}
    assert transcript([user, tool]) == "user: Look: nice\ntool: "
    assert transcript([user, tool], text_with_placeholders) == (
        "user: Look: [image_url]nice\ntool: "
    )
