"""The nouns of the flow: frozen, and with few rules of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from infer_align import types
from infer_align.steering import EstimateSchedule
from infer_align.types import Candidate, ScoringUsage

NOUNS = [cls for cls in vars(types).values() if dataclasses.is_dataclass(cls)]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda cls: cls.__name__)
def test_a_noun_is_frozen_and_has_slots(noun: Any) -> None:
    assert noun.__dataclass_params__.frozen
    assert "__slots__" in vars(noun)


@pytest.mark.parametrize(
    ("after", "due"),
    [
        (1, [1, 2, 4, 8, 16, 32]),
        (3, [3, 6, 12, 24]),
        (40, [40]),
        (41, []),
    ],
)
def test_checkpoints_double(after: int, due: list[int]) -> None:
    schedule = EstimateSchedule({"helpful": 1.0}, after)
    assert [tokens for tokens in range(41) if schedule.is_due(tokens)] == due


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"message": {"content": "mice"}}, "mice"),
        ({"message": {"content": None, "tool_calls": [{}]}}, ""),
        ({"message": {"content": "mice", "reasoning_content": "hm"}}, "mice"),
        ({"message": {}}, ""),
        ({"text": "mice"}, "mice"),
        ({}, ""),
    ],
)
def test_the_text_is_what_a_reader_sees(choice: dict[str, Any], text: str) -> None:
    assert Candidate(0, choice).text == text


def test_a_failed_or_rejected_candidate_is_not_eligible() -> None:
    assert Candidate(0, {}).eligible
    assert Candidate(0, {}, interrupted=True).eligible
    assert not Candidate(0, {}, error="boom").eligible
    assert not Candidate(0, {}, rejected="a low estimate").eligible


def test_usage_adds_up_field_by_field() -> None:
    total = ScoringUsage(1, 2, 3, 4) + ScoringUsage(10, 20, 30, 40) + ScoringUsage()
    assert total == ScoringUsage(11, 22, 33, 44)
