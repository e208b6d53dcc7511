"""Who is given up on the way, and that it depends on the estimates alone."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest
from infer_align.flow.observe import Halving
from infer_align.methods.best_of_n import BestOfN
from infer_align.methods.early_stop import EarlyStop
from infer_align.methods.rps import RPS
from infer_align.objectives import Ensemble
from infer_align.types import Draw, EstimateSchedule, Plan


def field(n: int, survival: float = 0.5, least: int = 1) -> tuple[Halving, list[int]]:
    halving, stopped = Halving(n, survival, least), []
    for i in range(n):
        halving.joins(i, lambda i=i: stopped.append(i))
    return halving, stopped


def test_estimates_are_due_at_the_first_number_of_tokens_and_its_doubles() -> None:
    watch = EstimateSchedule({"v": 1.0}, 6)
    assert [t for t in range(-12, 100) if watch.is_due(t)] == [6, 12, 24, 48, 96]


def test_the_lower_half_stops_at_each_comparison() -> None:
    halving, stopped = field(4)
    for i, value in enumerate([0.1, 0.4, 0.2, 0.3]):
        assert not stopped
        halving.estimated(i, 16, value)
    assert stopped == [2, 0]
    for i, value in ((3, 0.9), (1, 0.8)):
        halving.estimated(i, 32, value)
    assert stopped == [2, 0, 1]
    assert (
        halving.rejected[1] == "stopped early: after 32 tokens, estimate 0.8, below the best 1 of 2"
    )
    assert 3 not in halving.rejected


def test_nobody_is_judged_before_all_are_there_or_have_ended() -> None:
    halving, stopped = field(3)
    halving.estimated(0, 8, 1.0)
    halving.estimated(1, 8, 2.0)
    halving.estimated(1, 16, 2.0)
    assert not stopped
    halving.ended(2)
    assert stopped == [0]
    assert 2 not in halving.rejected, "who ended before was not compared"


def test_ties_go_to_the_lowest_index_and_what_is_no_number_is_left_alone() -> None:
    halving, stopped = field(5)
    for i, value in enumerate([math.nan, 1.0, 1.0, 1.0, 1.0]):
        halving.estimated(i, 4, value)
    assert stopped == [3, 4]


def test_what_differs_by_rounding_is_equal() -> None:
    halving, stopped = field(2)
    halving.estimated(1, 4, 0.12341)
    halving.estimated(0, 4, 0.12340999)
    assert stopped == [1]


def test_as_many_as_are_asked_for_are_drawn_to_the_end() -> None:
    halving, stopped = field(4, 0.25, least=3)
    for i in range(4):
        halving.estimated(i, 4, float(i))
    assert stopped == [0]


def test_a_repeated_estimate_holds_nobody_up() -> None:
    halving, stopped = field(4)
    for tokens in (4, 4, 8):
        for i in range(4):
            halving.estimated(i, tokens, float(i))
    assert stopped == [1, 0, 2]


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.floats(-9, 9), min_size=6, max_size=6)),
        min_size=1,
        max_size=9,
    ),
    st.floats(0.1, 1.0),
    st.randoms(use_true_random=False),
)
def test_the_outcome_does_not_depend_on_who_was_quick(
    field_of: Any, survival: float, rng: random.Random
) -> None:
    """Candidate i has a length and a value at each comparison; their events come in any order that each of them could have."""

    def outcome(shuffle: random.Random) -> set[int]:
        halving, stopped = field(len(field_of), survival)
        left = [
            [(t, v) for t, v in zip((2, 4, 8, 16, 32, 64), values, strict=True) if t < length]
            for length, values in field_of
        ]
        going = [*range(len(field_of))]
        while going:
            i = shuffle.choice(going)
            if i in stopped or not left[i]:
                halving.ended(i)
                going.remove(i)
            else:
                halving.estimated(i, *left[i].pop(0))
        return {*halving.rejected}

    first = outcome(rng)
    assert first == outcome(random.Random(1))
    assert len(first) < len(field_of), "somebody is always left"


def test_it_needs_candidates_to_choose_from() -> None:
    alone = Plan((Draw({"messages": []}),), Ensemble())
    with pytest.raises(InvalidRequest, match=r"give align.best_of_n or align.rps"):
        EarlyStop({"v": 1.0}).plan(alone)
    planned = EarlyStop({"v": 2.0}, after=3, keep=0.25).plan(BestOfN(4).plan(alone))
    assert planned.draws[0].estimates == EstimateSchedule({"v": 2.0}, 3)
    assert planned.survival == 0.25
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
