"""Words of texts in many scripts."""

from __future__ import annotations

import pytest

from infer_align.words import count_words, is_in_word, words_of

TEXTS = [
    ("The Owl,\n eats: Mice!", ["the", "owl", "eats", "mice"], 4),
    ("", [], 0),
    ("don't", ["don", "t"], 1),
    ("a_b 3x", ["a_b", "3x"], 2),
    ("你好，OK", ["你", "好", "ok"], 3),
    ("हिन्दी की", ["हिन्दी", "की"], 2),
    ("한국어 말", ["한국어", "말"], 2),
    ("👍🏽 good", ["👍", "🏽", "good"], 2),
    ("x+1 `y` |z|", ["x", "+", "1", "y", "z"], 3),
    ("soft\u00adware", ["software"], 1),
]


@pytest.mark.parametrize(("text", "words", "count"), TEXTS)
def test_a_text_has_words(text: str, words: list[str], count: int) -> None:
    assert words_of(text) == words
    assert count_words(text) == count


@pytest.mark.parametrize(
    ("text", "place", "inside"),
    [
        ("ab", 1, True),
        ("ab", 0, False),
        ("ab", 2, False),
        ("a b", 1, False),
        ("a!", 1, False),
        ("你好", 1, False),
        ("a你", 1, False),
        ("e\u0301", 1, True),
        ("4x", 1, True),
    ],
)
def test_a_place_is_inside_of_a_word_or_not(text: str, place: int, inside: bool) -> None:
    assert is_in_word(text, place) is inside
