"""Judge documents hold the server's prompts, labels of its scales, and noise as configured."""

from __future__ import annotations

import random
from statistics import correlation

import pytest

from benchmarks.demo import documents, judgement
from infer_align.demo import world
from infer_align.rewards.trust_judge.prompts import BETTER, SCORE, SIDES, labels


@pytest.mark.slow
def test_scores_follow_gold_with_noise() -> None:
    rng = random.Random(0)
    scores = []
    worth = []
    for _ in range(3000):
        system, user, assistant = judgement.score_document(rng)
        scale = next(scale for scale in (100, 10, 5) if f"to {scale} (" in system["content"])
        label = assistant["content"].removeprefix(SCORE).removesuffix("]")
        assert label in labels(scale)
        if scale == 100 and "Criteria: helpful" in system["content"]:
            question, answer = user["content"].split("\nAnswer <")
            scores.append(float(label))
            worth.append(world.gold(question, answer))
    assert 0.7 < correlation(scores, worth) < 0.98
    assert all(value % 5 == 0 for value in scores), "people rate in round numbers"


@pytest.mark.slow
def test_comparisons_prefer_the_first_answer() -> None:
    rng = random.Random(0)
    chosen = []
    for _ in range(3000):
        assistant = judgement.comparison_document(rng)[-1]
        chosen.append(assistant["content"].removeprefix(BETTER).removesuffix("]"))
    assert {*chosen} == {*SIDES}
    assert chosen.count("A") > 1.1 * chosen.count("B")


@pytest.mark.slow
def test_every_kind_of_document_has_its_share() -> None:
    rng = random.Random(0)
    first_turns = [documents.document(rng)[0] for _ in range(2000)]
    systems = [turn["content"] for turn in first_turns if turn["role"] == "system"]
    for start, share in (
        ("You are a helpful, respectful", 0.36),
        ("Rate the answer", 0.14),
        ("Say which answer", 0.16),
    ):
        count = sum(text.startswith(start) for text in systems)
        assert count / 2000 == pytest.approx(share, abs=0.03)
