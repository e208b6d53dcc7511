"""A plan with a stop rule draws batch after batch until the rule, a limit or a deadline ends it."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from infer_align import align
from infer_align.engines.fake import Fake, FakeEngine, Reply
from infer_align.errors import AlignError, DeadlineExceeded, EngineFailed
from infer_align.flow.batches import enlarge, plan_sizes
from infer_align.flow.plan import Plan
from infer_align.flow.selection import NothingScored
from infer_align.methods import StopRule
from infer_align.methods.early_stop import EarlyStop
from infer_align.rewards import RewardScores
from infer_align.steering import EstimateSchedule
from infer_align.types import Array, Draw, ScoringUsage
from tests.flow.builders import (
    Pipelined,
    Scripted,
    by_number,
    drained,
    engine,
    forever,
    ones,
    run,
    scored,
)


@dataclass(frozen=True, slots=True)
class AfterBatches(StopRule):
    """Stops after a number of batches, and records the objectives that it was shown."""

    max_candidates: int = 12
    batch: int = 2
    batches: int = 2
    objectives: list[list[float]] = field(default_factory=list)

    def reason_to_stop(self, objective: Array) -> str | None:
        self.objectives.append(objective.tolist())
        return "by the test" if len(self.objectives) >= self.batches else None


def sequential(rule: StopRule | None = None, draws: int = 1, **fields: Any) -> Plan:
    """Return a scored plan that is drawn in batches."""
    rule = AfterBatches() if rule is None else rule
    made = scored(1, draws=draws, n_returned=fields.pop("n_returned", 1), **fields)
    sizes = plan_sizes(made.draws, rule, made.n_returned)
    enlarged = []
    for d, draw in enumerate(enlarge(made.draws, sizes)):
        enlarged.append(replace(draw, seeds=tuple(range(100 * d, 100 * d + draw.n))))
    return replace(made, draws=tuple(enlarged), batch_sizes=sizes, stop_rule=rule, selects=True)


NUMBERS = ("1", "5", "2", "9", "3", "4", "8", "7", "6", "0", "11", "10")


def test_the_drawing_ends_when_the_rule_says_so() -> None:
    rule = AfterBatches()
    source = engine(*NUMBERS)
    response = run(sequential(rule), source)
    assert [c.text for c in response.candidates] == ["1", "5", "2", "9"]
    assert [c.index for c in response.candidates] == [0, 1, 2, 3]
    assert rule.objectives == [[1.0, 5.0], [1.0, 5.0, 2.0, 9.0]]
    assert source.sampled == 4
    assert response.returned[0].text == "9"
    assert response.reason.endswith("; drew 4 of at most 12: by the test")
    assert not response.partial
    assert response.prompt_tokens == 1
    assert response.saved_tokens == 8
    assert response.scores.usage == ScoringUsage(4)


def test_all_candidates_are_those_of_the_fixed_plan() -> None:
    rule = AfterBatches(batches=99)
    made = sequential(rule)
    response = run(made, engine(*NUMBERS))
    fixed = run(replace(made, stop_rule=None, batch_sizes=()), engine(*NUMBERS))
    assert response.candidates == fixed.candidates
    assert response.selection.ranking == fixed.selection.ranking
    assert response.selection.objective == fixed.selection.objective
    assert response.selection.reason == fixed.selection.reason
    np.testing.assert_array_equal(response.scores.members["r"], fixed.scores.members["r"])
    assert response.reason.endswith("; drew all 12 candidates")
    assert len(rule.objectives) == 5, "after the last batch there is nothing to decide"
    assert response.saved_tokens == 0


def test_batches_are_spread_over_several_draws() -> None:
    response = run(sequential(AfterBatches(batch=3), draws=2), engine("{seed}"))
    assert [c.text for c in response.candidates] == ["0", "1", "100", "2", "101", "102"]
    assert [c.draw for c in response.candidates] == [0, 0, 1, 0, 1, 1]
    assert response.selection.ranking[0] == 5


@pytest.mark.parametrize("kind", [Scripted, Pipelined])
def test_only_new_candidates_are_scored(kind: type[Scripted]) -> None:
    scored_texts: list[str] = []

    def record(candidates: Any) -> RewardScores:
        scored_texts.extend(c.text for c in candidates)
        return by_number(candidates)

    response = run(sequential(AfterBatches(batches=3), reward=kind(record)), engine(*NUMBERS))
    assert scored_texts == [*NUMBERS[:6]]
    assert response.scores.members["r"].tolist() == [[1, 5, 2, 9, 3, 4]]
    assert response.scores.usage == ScoringUsage(6)


def test_a_reward_that_compares_scores_the_pool_again_and_counts_it() -> None:
    class Comparing(Scripted):
        relative = True

        def worst_case_tokens(self, n: int) -> int:
            return n * n

    def share_of_largest(candidates: Any) -> RewardScores:
        numbers = np.array([float(c.text) for c in candidates])
        return RewardScores((numbers / numbers.max())[None, None], ScoringUsage(len(numbers)))

    response = run(sequential(reward=Comparing(share_of_largest)), engine("1", "2", "4", "8"))
    assert response.scores.members["r"].tolist() == [[0.125, 0.25, 0.5, 1.0]]
    assert response.scores.usage == ScoringUsage(2 + 4)


def test_earlier_comparisons_hold_if_the_pool_cannot_be_compared_again() -> None:
    class Comparing(Scripted):
        relative = True

    def compare(candidates: Any) -> RewardScores:
        if len(candidates) > 2:
            raise ValueError("too many")
        matrix = np.array([[0.5, 0.9], [0.1, 0.5]])
        return replace(by_number(candidates), matrix=matrix, report={"pairs": 1})

    response = run(sequential(reward=Comparing(compare)), engine(*NUMBERS))
    np.testing.assert_array_equal(response.scores.members["r"], [[1.0, 5.0, math.nan, math.nan]])
    assert response.scores.reports == {"r": {"pairs": 1}}
    assert response.scores.notes["r"] == (None, None, *["ValueError: too many"] * 2)
    matrix = response.scores.matrices["r"]
    assert matrix.shape == (4, 4)
    assert matrix[0, 1] == 0.9
    assert np.isnan(matrix[2:]).all()
    assert response.returned[0].text == "5"


def test_failed_candidates_are_data_in_every_batch() -> None:
    bad = Reply("", error="boom")
    rule = AfterBatches(batches=3)
    response = run(sequential(rule), engine("1", bad, "3", "4", bad, "6"))
    assert [c.error for c in response.candidates] == [None, "boom", None, None, "boom", None]
    assert math.isnan(rule.objectives[-1][4])
    assert response.scores.members["r"][0, [0, 2, 3, 5]].tolist() == [1, 3, 4, 6]
    assert response.selection.ranking == (5, 3, 2, 0)


def test_a_failed_batch_ends_the_drawing_with_the_best_so_far() -> None:
    bad = Reply("", error="boom", status=503)
    response = run(sequential(AfterBatches(batches=9)), engine("1", "3", bad, bad))
    assert response.returned[0].text == "3"
    assert response.reason.endswith("drew 4 of at most 12: the last 2 failed: boom")
    with pytest.raises(EngineFailed, match="all 2 candidates failed"):
        run(sequential(), engine(bad))


def test_an_engine_that_refuses_a_later_batch_ends_the_drawing() -> None:
    class Refusing(FakeEngine):
        def sample(self, draw: Draw) -> Any:
            if draw.first:
                raise AlignError("no more of this", status=503)
            return super().sample(draw)

    source = Refusing(Fake(replies=(Reply("1"), Reply("3"))))
    response = run(sequential(AfterBatches(batches=9)), source)
    assert response.returned[0].text == "3"
    assert "the last 2 failed: no more of this" in response.reason


def test_the_drawing_goes_on_until_enough_answers_can_be_returned() -> None:
    bad = Reply("", error="boom")
    rule = AfterBatches(batches=1)
    response = run(sequential(rule, n_returned=2), engine("1", bad, "3", "4"))
    assert [c.text for c in response.returned] == ["4", "3"]
    assert len(rule.objectives) == 1


def test_if_nothing_can_be_scored_no_more_is_drawn() -> None:
    def fail(_: Any) -> RewardScores:
        raise ValueError("broken")

    source = engine("1", "2")
    with pytest.raises(NothingScored):
        run(sequential(reward=Scripted(fail)), source)
    assert source.sampled == 2


def test_the_log_names_each_failed_score_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail_for_five(candidates: Any) -> RewardScores:
        scores = by_number(candidates)
        return replace(scores, values=np.where(scores.values == 5, math.nan, scores.values))

    with caplog.at_level("ERROR", "infer_align"):
        reward = Scripted(fail_for_five)
        run(sequential(AfterBatches(batches=3), reward=reward), engine(*NUMBERS))
    (line,) = caplog.records
    assert line.__dict__["candidates"] == 1


class Hanging(FakeEngine):
    """Plays its script for the first batch; later candidates wait for their stop."""

    async def _play(
        self, draw: Draw, params: Any, index: int, stream: Any, stop: asyncio.Event
    ) -> None:
        if draw.first:
            await stop.wait()
        await super()._play(draw, params, index, stream, stop)


def test_a_deadline_returns_the_best_so_far_marked_partial() -> None:
    source = Hanging(Fake(replies=(Reply("1"), Reply("3"))))
    response = run(sequential(AfterBatches(batches=9), deadline_seconds=1.0), source)
    assert response.returned[0].text == "3"
    assert len(response.candidates) == 4
    assert response.partial
    assert response.reason.endswith("drew 4 of at most 12: the deadline passed")


def test_a_deadline_that_passes_while_scoring_ends_the_drawing() -> None:
    slow = Scripted(forever, timeout=60)
    source = engine("1", "2")
    response = run(sequential(reward=slow, deadline_seconds=0.5), source)
    assert response.partial
    assert source.sampled == 2
    assert "the deadline passed" in response.reason


def test_a_deadline_before_the_first_answer_is_an_error() -> None:
    source = engine(Reply("1 2", first_token_seconds=60))
    with pytest.raises(DeadlineExceeded):
        run(sequential(deadline_seconds=0.1), source)


def test_cancelling_cancels_the_running_batch_and_draws_no_other() -> None:
    async def scenario() -> None:
        source = Hanging(Fake(replies=(Reply("1"), Reply("3"))))
        await source.start()
        task = asyncio.create_task(align(sequential(AfterBatches(batches=9)), source))
        while source.sampled < 4:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await drained(source)
        assert source.sampled == 4

    asyncio.run(scenario())


def test_early_stopping_compares_within_each_batch() -> None:
    schedule = EstimateSchedule({"v": 1.0}, 4)
    made = sequential(AfterBatches(batch=2), reward=Scripted(ones))
    draws = tuple(replace(draw, estimates=schedule) for draw in made.draws)
    observers = (EarlyStop({"v": 1.0}, 4, 0.5).observer,)
    worths = (0.1, 0.9, 0.8, 0.2)
    replies = [
        Reply("1 " * 60 + "1", estimates={"v": worth}, seconds_per_token=0.001) for worth in worths
    ]
    response = run(replace(made, draws=draws, observers=observers), engine(*replies))
    rejected = [candidate.rejected is not None for candidate in response.candidates]
    assert rejected == [True, False, False, True]
    assert response.selection.ranking == (1, 2)
