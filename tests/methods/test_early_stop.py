"""Early stopping: which candidates are rejected, and that only the estimates decide it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest
from infer_align.methods import PlanDraft
from infer_align.methods.best_of_n import BestOfN
from infer_align.methods.early_stop import EarlyStop, Halving
from infer_align.methods.rps import RPS
from infer_align.steering import EstimateSchedule
from infer_align.types import Candidate, Delta, Draw, Estimate

ALIGN = {"best_of_n": {"n": 4}, "early_stop": {"values": {"helpful": 1.0}}}


class Race:
    """Feeds estimates to a `Halving` and records the candidates that it rejects, in order."""

    def __init__(self, candidates: int, keep: float = 0.5, n_returned: int = 1) -> None:
        self.halving = Halving(candidates, keep, n_returned)
        self.rejected: list[int] = []
        self.reasons: dict[int, str] = {}

    def estimate(self, index: int, tokens: int, value: float) -> None:
        self._record(self.halving.observe(Estimate(index, tokens, value)))

    def finish(self, index: int) -> None:
        self._record(self.halving.observe(Candidate(index, {})))

    def _record(self, rejected: Mapping[int, str]) -> None:
        self.rejected += rejected
        self.reasons |= rejected


def test_estimates_are_due_at_the_first_number_of_tokens_and_its_doubles() -> None:
    schedule = EstimateSchedule({"v": 1.0}, 6)
    assert [t for t in range(-12, 100) if schedule.is_due(t)] == [6, 12, 24, 48, 96]


def test_the_lower_half_stops_at_each_comparison() -> None:
    race = Race(4)
    for i, value in enumerate([0.1, 0.4, 0.2, 0.3]):
        assert not race.rejected
        race.estimate(i, 16, value)
    assert race.rejected == [2, 0]
    for i, value in ((3, 0.9), (1, 0.8)):
        race.estimate(i, 32, value)
    assert race.rejected == [2, 0, 1]
    reason = "stopped early: after 32 tokens, estimate 0.8, below the best 1 of 2"
    assert race.reasons[1] == reason


def test_candidates_are_compared_when_each_has_arrived_or_finished() -> None:
    race = Race(3)
    race.estimate(0, 8, 1.0)
    race.estimate(1, 8, 2.0)
    race.estimate(1, 16, 2.0)
    assert not race.rejected
    race.finish(2)
    assert race.rejected == [0], "candidate 2 finished before and was not compared"


def test_a_candidate_that_lost_is_rejected_even_after_it_finished() -> None:
    race = Race(2)
    race.estimate(0, 8, 1.0)
    race.finish(0)
    race.estimate(1, 8, 2.0)
    assert race.rejected == [0]


def test_ties_go_to_the_lowest_index_and_nan_is_not_compared() -> None:
    race = Race(5)
    for i, value in enumerate([math.nan, 1.0, 1.0, 1.0, 1.0]):
        race.estimate(i, 4, value)
    assert race.rejected == [3, 4]


def test_values_that_differ_by_rounding_are_equal() -> None:
    race = Race(2)
    race.estimate(1, 4, 0.12341)
    race.estimate(0, 4, 0.12340999)
    assert race.rejected == [1]


def test_as_many_as_must_be_returned_are_drawn_to_the_end() -> None:
    race = Race(4, 0.25, n_returned=3)
    for i in range(4):
        race.estimate(i, 4, float(i))
    assert race.rejected == [0]


def test_a_repeated_estimate_is_ignored() -> None:
    race = Race(4)
    for tokens in (4, 4, 8):
        for i in range(4):
            race.estimate(i, tokens, float(i))
    assert race.rejected == [1, 0, 2]


def test_deltas_change_nothing() -> None:
    race = Race(2)
    race.estimate(0, 4, 1.0)
    assert race.halving.observe(Delta(1, {"delta": {"content": "x"}})) == {}
    race.estimate(1, 4, 2.0)
    assert race.rejected == [0]


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.floats(-9, 9), min_size=6, max_size=6)),
        min_size=1,
        max_size=9,
    ),
    st.floats(0.1, 1.0),
    st.randoms(use_true_random=False),
)
def test_the_outcome_does_not_depend_on_the_order_of_events(
    candidates: Any, keep: float, rng: random.Random
) -> None:
    """Each candidate has a length and a value at each checkpoint; events interleave freely."""

    def outcome(order: random.Random) -> set[int]:
        race = Race(len(candidates), keep)
        pending = []
        for length, values in candidates:
            checkpoints = zip((2, 4, 8, 16, 32, 64), values, strict=True)
            pending.append([(t, v) for t, v in checkpoints if t < length])
        running = list(range(len(candidates)))
        while running:
            i = order.choice(running)
            if i in race.rejected or not pending[i]:
                race.finish(i)
                running.remove(i)
            else:
                race.estimate(i, *pending[i].pop(0))
        return set(race.rejected)

    first = outcome(rng)
    assert first == outcome(random.Random(1))
    assert len(first) < len(candidates), "some candidate always remains"


def test_it_needs_candidates_to_choose_from() -> None:
    alone = PlanDraft((Draw({"messages": []}),))
    with pytest.raises(InvalidRequest, match=r"give align.best_of_n or align.rps"):
        EarlyStop({"v": 1.0}).apply(alone)
    planned = EarlyStop({"v": 2.0}, after=3, keep=0.25).apply(BestOfN(4).apply(alone))
    assert planned.draws[0].estimates == EstimateSchedule({"v": 2.0}, 3)
    observer = planned.observers[0](4, 1)
    assert isinstance(observer, Halving)
    assert RPS.stage < EarlyStop.stage


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "values"),
        ({"values": {}}, "values"),
        ({"values": {"v": math.nan}}, "values.v"),
        ({"values": {"v": 1}, "after": 0}, "after"),
        ({"values": {"v": 1}, "keep": 0}, "keep"),
        ({"values": {"v": 1}, "keep": 1.5}, "keep"),
        ({"values": {"v": 1}, "kep": 1}, "kep"),
    ],
)
def test_bad_parameters_are_named(given: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(EarlyStop, given, "align.early_stop")
    assert caught.value.param == f"align.early_stop.{named}"
