"""A tiny build makes every file, reproducibly, and its pairs are mislabelled as configured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo.build import BuildConfig, build
from benchmarks.demo.language import LanguageConfig
from benchmarks.demo.measure import load, read_metrics
from benchmarks.demo.preference import RewardConfig, pairs
from benchmarks.demo.rating import RatingConfig
from infer_align.demo import LM, PREFERENCE, REWARDS
from infer_align.demo.world import gold

pytestmark = pytest.mark.slow

TINY = BuildConfig(
    language=LanguageConfig(
        steps=40, batch=8, hidden_size=32, intermediate_size=32, layers=1, heads=1
    ),
    reward=RewardConfig(pairs=16, epochs=1),
    rating=RatingConfig(replies=32, epochs=1),
    measured_prompts=4,
    measured_replies=4,
)


def test_two_tiny_builds_write_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        build(TINY, tmp_path / name)
    first = tmp_path / "first"
    second = tmp_path / "second"
    assert {path.name for path in first.iterdir()} == {LM, *REWARDS, PREFERENCE, "metrics.json"}
    assert len(load(first).members) == len(REWARDS)
    for file in first.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (second / file.relative_to(first)).read_bytes(), file
    metrics = read_metrics(first / "metrics.json")
    assert metrics["lm_loss_nats_per_token"].value > 1, "forty steps are not enough to learn much"
    assert json.loads((first / "metrics.json").read_text())["config"]["reward"]["flipped"] == 0.25


def test_exactly_a_quarter_of_the_pairs_is_wrong() -> None:
    question = "What is the colour of the otter?"
    replies = ["The otter is brown.", "The otter is grey."] * 20
    made = pairs([(question, replies)], n=16, flipped=0.25, seed=0)
    wrong = [gold(pair.question, pair.chosen) < gold(pair.question, pair.rejected) for pair in made]
    assert wrong == [pair.flipped for pair in made]
    assert sum(wrong) == 4


def test_too_few_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"[Ss]ample"):
        pairs([("What is the colour of the otter?", ["same", "same"])], n=1, flipped=0.25, seed=0)
