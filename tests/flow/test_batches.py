"""The batches of a plan: their sizes, their spread over the draws, and their seeds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.errors import InvalidRequest
from infer_align.flow.batches import enlarge, plan_sizes, split
from infer_align.methods.adaptive import ExpectedGain
from infer_align.types import Draw
from tests.flow.builders import plan, plan_request


def sizes(*weights: int, batch: int, most: int, n_returned: int = 1) -> Any:
    draws = [Draw({}, n) for n in weights]
    return plan_sizes(draws, ExpectedGain(most, batch, 0.05), n_returned)


def test_one_draw_is_cut_into_batches() -> None:
    assert sizes(1, batch=4, most=12) == ((4,), (4,), (4,))
    assert sizes(1, batch=4, most=10) == ((4,), (4,), (2,))
    assert sizes(1, batch=4, most=3) == ((3,),)
    assert sizes(1, batch=4, most=4) == ((4,),)


def test_the_first_batch_has_what_other_methods_and_n_ask_for() -> None:
    assert sizes(6, batch=4, most=12) == ((6,), (4,), (2,))
    assert sizes(1, batch=4, most=12, n_returned=7) == ((7,), (4,), (1,))
    assert sizes(12, batch=4, most=12) == ((12,),)


def test_every_batch_is_spread_over_the_draws() -> None:
    assert sizes(1, 1, batch=3, most=9) == ((2, 1), (1, 2), (2, 1))
    assert sizes(2, 1, 1, batch=4, most=12) == ((2, 1, 1),) * 3
    assert sizes(1, 1, 1, 1, 1, batch=2, most=9) == (
        (1, 1, 1, 1, 1),
        (1, 1, 0, 0, 0),
        (0, 0, 1, 1, 0),
    )


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 60),
    st.integers(1, 12),
)
def test_batches_add_up_and_stay_in_proportion(
    weights: list[int], batch: int, more: int, n_returned: int
) -> None:
    most = sum(weights) + more
    batches = sizes(*weights, batch=batch, most=most, n_returned=min(n_returned, most))
    assert sum(map(sum, batches)) == most
    assert all(1 <= sum(size) <= batch for size in batches[1:])
    totals = [0] * len(weights)
    for size in batches:
        totals = [total + n for total, n in zip(totals, size, strict=True)]
        shares = [total / weight for total, weight in zip(totals, weights, strict=True)]
        assert max(shares) - min(shares) <= 1


def test_batches_are_numbered_in_the_order_of_drawing() -> None:
    seeded = enlarge((Draw({"a": 1}, 1), Draw({"b": 1}, 1)), ((2, 1), (1, 2)))
    draws = (
        Draw(seeded[0].body, seeded[0].n, (10, 11, 12)),
        Draw(seeded[1].body, seeded[1].n, (20, 21, 22)),
    )
    first, second = split(draws, ((2, 1), (1, 2)))
    assert (first.first, first.candidates) == (0, 3)
    assert (second.first, second.candidates) == (3, 3)
    assert [(s.index, s.first, s.draw.seeds) for s in second.shares] == [
        (0, 3, (12,)),
        (1, 4, (21, 22)),
    ]
    assert [share.draw.first for share in second.shares] == [2, 1]


def test_a_plan_without_a_stop_rule_is_one_batch() -> None:
    made = plan(3, draws=2)
    (batch,) = made.batches
    assert [share.draw for share in batch.shares] == list(made.draws)
    assert [share.first for share in batch.shares] == [0, 3]


def test_an_adaptive_plan_has_the_seeds_of_the_fixed_one() -> None:
    fixed = plan_request({"best_of_n": {"n": 16}}, seed=7)
    adaptive = plan_request({"adaptive": {"max_n": 16}}, seed=7)
    assert adaptive.draws == fixed.draws
    assert [batch.candidates for batch in adaptive.batches] == [4, 4, 4, 4]
    assert [share.draw.seeds for b in adaptive.batches for share in b.shares] == [
        fixed.draws[0].seeds[i : i + 4] for i in range(0, 16, 4)
    ]
    assert adaptive.worst_case_tokens == fixed.worst_case_tokens


def test_each_direction_draws_a_prefix_of_its_fixed_draws() -> None:
    align = {"dpa": {"direction": {"helpful": 1, "brief": 1}}, "rps": {"k": 2}}
    fixed = plan_request({**align, "best_of_n": {"n": 8}}, seed=7)
    for methods in ({"adaptive": {"max_n": 8}, **align}, {**align, "adaptive": {"max_n": 8}}):
        adaptive = plan_request(methods, seed=7)
        assert [draw.n for draw in adaptive.draws] == [4, 4]
        for draw, whole in zip(adaptive.draws, fixed.draws, strict=True):
            assert draw.seeds == whole.seeds[:4]
            assert draw.body == whole.body


@pytest.mark.parametrize(
    ("align", "fields", "param"),
    [
        ({"adaptive": {"max_n": 4}, "best_of_n": {"n": 5}}, {}, "align.adaptive.max_n"),
        ({"best_of_n": {"n": 5}, "adaptive": {"max_n": 4}}, {}, "align.adaptive.max_n"),
        ({"adaptive": {"max_n": 17}}, {}, "align.adaptive.max_n"),
        ({"adaptive": {"max_n": 4}}, {"n": 5}, "n"),
        ({"adaptive": {"max_n": 0}}, {}, "align.adaptive.max_n"),
        ({"adaptive": {"batch": 0}}, {}, "align.adaptive.batch"),
        ({"adaptive": {"cost": -0.1}}, {}, "align.adaptive.cost"),
        ({"adaptive": {"cost": float("nan")}}, {}, "align.adaptive.cost"),
        ({"adaptive": {"max_n": 16}}, {"max_tokens": 100}, "max_tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    align: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_request(align, **fields)
    assert caught.value.param == param


@pytest.mark.parametrize("align", [{}, {"select": {"rule": "consensus"}}])
def test_without_rewards_there_is_nothing_to_stop_by(align: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="nothing to choose by"):
        plan_request({"adaptive": {"max_n": 8}, **align, "rewards": {}})
