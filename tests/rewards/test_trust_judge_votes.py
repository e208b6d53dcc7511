"""A judge that votes: several sampled critiques, and a verdict after each."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from infer_align.decoding.labels import LabelLogprobs, LabelQuery
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.rewards.trust_judge import TrustJudgeReward, TrustJudgeSection
from infer_align.types import Candidate

ASK: Any = [{"role": "user", "content": "What is the diet of the owl?"}]


class Persuaded(FakeEngine):
    """Gives the label that the critique names last, with some probability on the others."""

    mass = 0.9

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        self.queries.append(query)
        verdict = query.prefix.split("\n")[0].split()[-1]
        probabilities = {verdict: 0.6 * self.mass, query.labels[0]: 0.4 * self.mass}
        if verdict == query.labels[0]:
            probabilities = {verdict: self.mass}
        return LabelLogprobs({label: math.log(p) for label, p in probabilities.items()}, 40)


def judge(*critiques: Reply, **section: Any) -> TrustJudgeReward:
    loaded = TrustJudgeSection(**section).load()
    loaded.engines = {"served": Persuaded(Fake(replies=critiques))}
    return loaded


def says(*labels: str) -> tuple[Reply, ...]:
    return tuple(Reply(f"I think it is {label}") for label in labels)


def scored(reward: TrustJudgeReward, *texts: str) -> Any:
    answers = [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]
    return asyncio.run(reward.score(ASK, answers))


def test_the_share_of_votes_is_the_probability_to_win() -> None:
    # Each order has the same votes, so the answer shown first wins 3 of 5 in both: a tie.
    reward = judge(*says("A", "A", "B", "A", "C"), votes=5, mode="pairwise")
    biased = scored(reward, "one", "two")
    assert biased.matrix[0, 1] == pytest.approx(0.5)
    assert biased.report["position_bias"] == pytest.approx(0.4)
    assert reward.worst_case_tokens(2) == 2 * 5 * (1 + 256)


def test_votes_are_counted_in_both_orders() -> None:
    class Prefers(Persuaded):
        """Writes verdicts for the answer "one" in four of five critiques."""

        async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
            is_first = "one" in query.messages[1]["content"].partition("Answer B")[0]
            good, bad = ("A", "B") if is_first else ("B", "A")
            label = bad if "not sure" in query.prefix else good
            return LabelLogprobs({label: math.log(0.9)}, 40)

    reward = judge(votes=5, mode="pairwise", critique_tokens=20)
    replies = (*says("sure", "sure", "not sure", "sure", "sure"),)
    engine = Prefers(Fake(replies=replies))
    reward.engines = {"served": engine}
    scores = scored(reward, "one", "two")
    assert scores.matrix[0, 1] == pytest.approx(0.8)
    assert scores.values[0, 0].tolist() == [5.0, 1.0]
    [body, _] = engine.bodies
    assert body["temperature"] == 1.0
    assert body["max_tokens"] == 20
    assert body["stop"] == ["Better: ["]


def test_the_score_is_the_mean_vote() -> None:
    scores = scored(judge(*says("5", "3", "4", "4"), votes=4, scale=5), "one")
    assert scores.values[0, 0, 0] == pytest.approx(4.0)


def test_calls_and_tokens_are_counted_exactly() -> None:
    reward = judge(*says("5", "3"), votes=4, scale=5)
    scores = scored(reward, "one", "two")
    # Two answers, four critiques of five words each, and one label after each.
    assert scores.usage.judge_calls == 2 * 4 * 2
    assert scores.usage.judge_completion_tokens == 2 * 4 * (5 + 1)


def test_a_refused_vote_does_not_count() -> None:
    class Unsure(Persuaded):
        async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
            self.mass = 0.01 if " 1\n" in query.prefix else 0.9
            return await super().read_labels(query)

    reward = judge(votes=3, scale=5)
    reward.engines = {"served": Unsure(Fake(replies=says("5", "1", "5")))}
    assert scored(reward, "one").values[0, 0, 0] == pytest.approx(5.0)


def test_a_failed_critique_is_no_vote() -> None:
    replies = (*says("5"), Reply("I", error="no power"), *says("3"))
    assert scored(judge(*replies, votes=3, scale=5), "one").values[0, 0, 0] == pytest.approx(4.0)
    failed = scored(judge(Reply("I", error="no power"), votes=3, scale=5), "one")
    assert np.isnan(failed.values).all()
    assert failed.notes == ("no power",)
