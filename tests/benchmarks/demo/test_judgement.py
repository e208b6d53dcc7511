"""Judge documents: the server's own prompts, labels of its scales, and people who are noisy in the way that is said."""

import random
from statistics import correlation, mean

import pytest

from benchmarks.demo import documents, judgement
from infer_align.demo import world
from infer_align.rewards.trust_judge.prompts import BETTER, SCORE, SIDES, labels


def test_scores_follow_gold_with_noise() -> None:
    rng = random.Random(0)
    given, worth = [], []
    for _ in range(3000):
        system, user, said = judgement.scored(rng)
        scale = next(scale for scale in (100, 10, 5) if f"to {scale} (" in system["content"])
        label = said["content"].removeprefix(SCORE).removesuffix("]")
        assert label in labels(scale)
        if scale == 100 and "Criteria: helpful" in system["content"]:
            question, answer = user["content"].split("\nAnswer <")
            given.append(float(label))
            worth.append(world.gold(question, answer))
    assert 0.7 < correlation(given, worth) < 0.98
    assert all(value % 5 == 0 for value in given), "people rate in round numbers"


def test_comparisons_lean_to_the_first() -> None:
    rng = random.Random(0)
    said = [
        judgement.compared(rng)[-1]["content"].removeprefix(BETTER).removesuffix("]")
        for _ in range(3000)
    ]
    assert {*said} == {*SIDES}
    assert said.count("A") > 1.1 * said.count("B")


def test_every_kind_of_document_is_there() -> None:
    rng = random.Random(0)
    systems = [
        turns[0]["content"]
        for turns in (documents.document(rng) for _ in range(2000))
        if turns[0]["role"] == "system"
    ]
    for start, share in (
        ("You are a helpful, respectful", 0.36),
        ("Rate the answer", 0.14),
        ("Say which answer", 0.16),
    ):
        assert mean(text.startswith(start) for text in systems) * len(
            systems
        ) / 2000 == pytest.approx(share, abs=0.03)
