"""Parsing an `align` object: its settings, its presets and its errors."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.config.align import Budget, parse_align
from infer_align.errors import InvalidRequest
from infer_align.methods.best_of_n import BestOfN
from infer_align.objectives import Ensemble


def test_settings() -> None:
    request = parse_align(
        {
            "rewards": {"a": 1},
            "ensemble": {"objective": "wco"},
            "budget": {"deadline_seconds": 2},
            "details": "none",
        },
        {},
    )
    assert request.rewards == {"a": 1.0}
    assert request.ensemble == Ensemble("wco")
    assert request.budget == Budget(deadline_seconds=2.0)
    assert request.details == "none"


def test_the_preset_of_the_request_wins_over_the_preset_of_the_model() -> None:
    presets = {"p": {"best_of_n": {"n": 4}, "details": "none"}, "q": {"best_of_n": {"n": 2}}}
    method = parse_align({"preset": "q"}, presets, preset="p").methods["best_of_n"]
    assert isinstance(method, BestOfN)
    assert method.n == 2


@pytest.mark.parametrize("path", ["align", ""])
@pytest.mark.parametrize(
    ("align", "param"),
    [
        ({"best_of_m": {}}, "best_of_m"),
        ({"best_of_n": {"n": 0}}, "best_of_n.n"),
        ({"preset": "p"}, "preset"),
        ({"rewards": {"a": -1}}, "rewards.a"),
        ({"rewards": {"a": 1e10}}, "rewards.a"),
        ({"rewards": {"a": True}}, "rewards.a"),
        ({"rewards": [1]}, "rewards"),
        ({"budget": {"completion_tokens": 0}}, "budget.completion_tokens"),
        ({"details": "all"}, "details"),
    ],
)
def test_a_wrong_field_is_named_by_its_path(align: Any, param: str, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_align(align, {}, path=path)
    assert caught.value.param == (f"{path}.{param}" if path else param)


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"best_of_n": 8}, 'align.best_of_n: 8 is not an object; allowed: {"n": 8}.'),
        (
            {"vas": {}},
            "align.vas.beta: is required: {value name: weight}; a negative weight steers away from "
            "the value.",
        ),
        (
            {"dpa": {}},
            "align.dpa.direction: is required: {attribute: weight}; only the proportions matter; "
            "a negative weight asks for less of the attribute.",
        ),
        (
            {"vas": 1},
            'allowed: {"beta": ..., "top_k": 20, "tail": "keep", "min_p": null, "max_kl": null}.',
        ),
    ],
)
def test_a_wrong_shape_is_answered_with_a_whole_sentence(align: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_align(align)
    assert caught.value.message.endswith(message)
