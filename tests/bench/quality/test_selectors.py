"""Test which settings the gold itself selects or steers."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align_bench.quality.grid import Cell
from infer_align_bench.quality.selectors import (
    ServerNames,
    describe_gold_selection,
    selected_by_gold,
)

NAMES = ServerNames(("quality",), {"happy": "sentiment", "short": "brevity"})


@pytest.mark.parametrize(
    ("align", "gold", "rewards"),
    [
        ({"best_of_n": {"n": 4}, "rewards": {"sentiment": 1}}, "sentiment", ["sentiment"]),
        ({"best_of_n": {"n": 4}, "rewards": {"sentiment": 0}}, "sentiment", []),
        ({"best_of_n": {"n": 4}}, "quality", ["quality"]),
        ({"best_of_n": {"n": 4}}, "sentiment", []),
        ({"adaptive": {}, "rewards": {"a": 1, "b": 2}}, '{"rewards": {"b": 1, "c": 1}}', ["b"]),
        ({"rps": {}, "trust_judge": {}}, '{"trust_judge": {}}', ["trust_judge"]),
        ({"best_of_n": {"n": 2}}, '{"trust_judge": {}}', []),
        ({"vas": {"beta": {"happy": 8}}}, "sentiment", ["sentiment"]),
        ({"vas": {"beta": {"happy": 0, "short": 1}}}, "sentiment", []),
        ({"best_of_n": {"n": 2}, "early_stop": {"values": {"short": 1}}}, "brevity", ["brevity"]),
        ({"rewards": {"sentiment": 1}}, "sentiment", []),
        ({"best_of_n": {"n": 4}, "rewards": {"sentiment": 1}}, "module:sentiment", []),
        ({"vas": "wrong", "best_of_n": {}, "rewards": []}, "sentiment", []),
        (None, "quality", []),
    ],
)
def test_gold_selects_where_a_reward_of_its_name_decides(
    align: Any, gold: str, rewards: list[str]
) -> None:
    selected = selected_by_gold([Cell("a", align)], gold, NAMES)
    assert selected == ({"a": rewards} if rewards else {})


def test_the_warning_names_the_rewards_and_the_settings() -> None:
    assert describe_gold_selection({}) == []
    (text,) = describe_gold_selection({"best of 4": ["b"], "vas 8": ["a", "b"]})
    assert "'a', 'b' scores" in text
    assert "in: best of 4, vas 8." in text
