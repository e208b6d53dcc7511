"""The rules on the candidates of one request: order, reason, distribution, ties, copies, seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.errors import InvalidRequest
from infer_align.methods import Contest, PlanDraft, SelectionRule
from infer_align.methods.select import Select
from infer_align.types import Draw

NAN = np.nan
RULES: list[dict[str, Any]] = [
    {"rule": "win_rate"},
    {"rule": "minimax"},
    {"rule": "maxmin"},
    {"rule": "maxmin", "regret": True},
    {"rule": "lexicographic"},
    {"rule": "consensus"},
    {"rule": "pessimistic"},
    {"rule": "tilted"},
    {"rule": "shortest"},
]
SCORES = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-2, 2).map(float) | st.just(1e308), min_size=n, max_size=n),
        min_size=2,
        max_size=3,
    )
)


def rule(**parameters: Any) -> SelectionRule:
    made = Select(**parameters).apply(PlanDraft((Draw({}),))).rule
    assert made is not None
    return made


def contest(values: Any, **fields: Any) -> Contest:
    """Return a contest of rewards a, b, c with weight 1, and texts of a word each."""
    rows = np.array(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        made = Contest(
            objective=rows.sum(axis=0),
            names=tuple("abc"[: len(rows)]),
            values=rows,
            weights=np.ones(len(rows)),
            texts=tuple(f"text {i}" for i in range(rows.shape[1])),
            tokens=tuple(range(9, 9 + rows.shape[1])),
            measure="uwo",
            drawn=rows.shape[1],
        )
    return replace(made, **fields)


@pytest.mark.parametrize("parameters", RULES, ids=str)
@settings(max_examples=30)
@given(values=SCORES, seed=st.integers(0, 2**63 - 1))
def test_every_rule_ranks_every_candidate_and_is_deterministic(
    parameters: Any, values: Any, seed: int
) -> None:
    pool = contest(values, seed=seed)
    ranking = rule(**parameters).rank(pool)
    assert sorted(ranking.order) == list(range(len(pool.objective)))
    assert ranking == rule(**parameters).rank(pool)
    assert ranking.clause
    if ranking.distribution is not None:
        assert sum(ranking.distribution) == pytest.approx(1)
        assert ranking.distribution[ranking.order[0]] > 0


DISTINCT = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.permutations([float(3**i) for i in range(n)]), min_size=2, max_size=3)
)


@pytest.mark.parametrize("parameters", [p for p in RULES if p["rule"] != "consensus"], ids=str)
@settings(max_examples=30)
@given(values=DISTINCT, random=st.randoms(use_true_random=False))
def test_a_rule_follows_its_candidates(parameters: Any, values: Any, random: Any) -> None:
    pool = contest(values)
    # The sum of powers breaks every tie.
    pool = replace(pool, objective=pool.objective + 1e-3 * pool.values[0])
    order = list(range(len(pool.objective)))
    random.shuffle(order)
    moved = replace(
        pool,
        objective=pool.objective[order],
        values=pool.values[:, order],
        texts=tuple(pool.texts[i] for i in order),
        tokens=tuple(pool.tokens[i] for i in order),
    )
    first = rule(**parameters).rank(pool)
    second = rule(**parameters).rank(moved)
    if first.distribution is None or second.distribution is None:
        assert order[second.order[0]] == first.order[0]
    else:
        expected = np.array(first.distribution)[order]
        np.testing.assert_allclose(second.distribution, expected, atol=1e-7)
    assert second.worst_case == pytest.approx(first.worst_case)


CYCLE = [[2.0, 1.0, 0.0, -9], [0.0, 2.0, 1.0, -9], [1.0, 0.0, 2.0, -9]]


def test_a_cycle_is_a_lottery_with_its_worst_case() -> None:
    ranking = rule(rule="minimax").rank(contest(CYCLE, seed=1))
    np.testing.assert_allclose(ranking.distribution, [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-9)
    assert (ranking.condorcet, ranking.cycles) == (None, 1)
    assert ranking.worst_case == pytest.approx(0.5)
    assert ranking.order[-1] == 3
    assert ranking.clause == (
        "drawn with probability 0.333 by the minimax lottery over 4 candidates; the lottery beats "
        "any of them with probability 0.5 or more; no candidate beats every other one"
    )


def test_a_lottery_draws_without_replacement_by_the_seed() -> None:
    orders = {rule(rule="minimax").rank(contest(CYCLE, seed=s)).order for s in range(60)}
    assert len(orders) == 6, "each order of the three that are drawn"
    firsts = [rule(rule="tilted").rank(contest([[0.0, 1.0]], seed=s)).order[0] for s in range(200)]
    chance = rule(rule="tilted").rank(contest([[0.0, 1.0]])).distribution
    assert chance is not None
    assert np.mean(firsts) == pytest.approx(chance[1], abs=0.09)


def test_copies_of_an_answer_are_no_rivals_and_come_last() -> None:
    copied = [0, 1, 2, 2, 2]
    values = np.array(CYCLE)[:, copied]
    texts = ("a", "b", "c", "c", "c")
    for name in ("minimax", "win_rate", "lexicographic"):
        ranking = rule(rule=name).rank(contest(values, texts=texts))
        assert set(ranking.order[:3]) == {0, 1, 2}
        assert ranking.order[3:] == (3, 4)
    lottery = rule(rule="minimax").rank(contest(values, texts=texts)).distribution
    np.testing.assert_allclose(lottery, [1 / 3, 1 / 3, 1 / 3, 0, 0], atol=1e-9)


JUDGED = np.array(
    [[0.5, 0.6, 0.7, 0.2], [0.4, 0.5, 0.9, NAN], [0.3, 0.1, 0.5, 0.4], [0.8, NAN, 0.6, 0.5]]
)


def test_a_judge_gives_its_probabilities_and_other_rewards_their_order() -> None:
    pool = contest([[3.0, 2.0, 1.0, 4.0]], matrices={"a": JUDGED})
    ranking = rule(rule="win_rate").rank(pool)
    # Mean probabilities .5, .65, .27 and .7.
    assert ranking.order == (3, 1, 0, 2)
    assert ranking.clause.startswith("highest win rate of 4 candidates (0.7; runner-up 0.65)")
    both = contest([[3.0, 2.0, 1.0, 4.0], [1.0, 0.0, 0.0, 0.0]], matrices={"a": JUDGED})
    assert rule(rule="win_rate").rank(both).order[0] == 0
    assert rule(rule="win_rate", order=["a"]).rank(both).order[0] == 3


def test_the_probabilities_of_copies_are_averaged() -> None:
    texts = ("x", "y", "x", "z")
    pool = contest([[3.0, 2.0, 1.0, 4.0]], matrices={"a": JUDGED}, texts=texts)
    ranking = rule(rule="win_rate").rank(pool)
    # x: (.6 + .1) / 2 against y, (.2 + .4) / 2 against z; y: .65; z: .7.
    assert ranking.order == (3, 1, 0, 2)
    assert ranking.worst_case == pytest.approx(0.5)


def test_nothing_compared_is_an_even_lottery() -> None:
    pool = contest([[1.0, 2.0]], matrices={"a": np.full((2, 2), NAN)})
    ranking = rule(rule="minimax").rank(pool)
    assert ranking.distribution == (0.5, 0.5)
    assert rule(rule="win_rate").rank(pool).order == (1, 0)


def test_a_condorcet_winner_is_chosen_by_minimax_though_not_by_the_sum() -> None:
    # Two of three rewards prefer the first one by a little, the third the last one by far.
    pool = contest([[1.0, 0.9, 0.0], [1.0, 0.0, 0.9], [0.0, 1.0, 50.0]])
    ranking = rule(rule="minimax").rank(pool)
    assert pool.objective.argmax() == 2
    assert ranking.order[0] == ranking.condorcet == 0
    assert ranking.clause.endswith("it beats every other one")


def test_maxmin_standardizes_rewards_without_a_shape() -> None:
    values = [[0.0, 1000.0, 600.0], [1.0, 0.0, 0.7]]
    ranking = rule(rule="maxmin").rank(contest(values))
    assert ranking.order[0] == 2
    assert "by a; runner-up" in ranking.clause
    # As they are, the second reward is always the worst group.
    raw = rule(rule="maxmin").rank(contest(values, shaped=frozenset("ab")))
    assert raw.order == (2, 1, 0)
    assert raw.worst_case == 0.7
    only = rule(rule="maxmin", order=["b"]).rank(contest(values))
    assert only.order == (0, 2, 1)


def test_lexicographic_takes_the_heaviest_reward_first() -> None:
    values = [[0.0, 9.0], [1.0, 0.0]]
    assert rule(rule="lexicographic").rank(contest(values)).order == (1, 0)
    weights = np.array([1.0, 2.0])
    ranking = rule(rule="lexicographic").rank(contest(values, weights=weights))
    assert ranking.order == (0, 1)
    assert ranking.clause == "wins 1 of 1 comparisons by b, then a"
    assert rule(rule="lexicographic", order=["a"]).rank(contest(values, weights=weights)).order == (
        1,
        0,
    )


def test_consensus_prefers_the_answer_that_shares_its_words() -> None:
    texts = ("owls eat mice", "owls eat voles", "owls eat mice and voles", "no idea")
    ranking = rule(rule="consensus").rank(contest([[0.0] * 4], texts=texts))
    assert ranking.order[0] == 2
    assert ranking.order[-1] == 3
    assert ranking.clause.startswith("most like the others of 4 candidates (mean overlap ")


def test_the_shortest_counts_tokens_or_characters() -> None:
    pool = contest([[1.0, 1.01, 0.0]], tokens=(4, 9, 1), texts=("long text", "brief", "x"))
    ranking = rule(rule="shortest").rank(pool)
    assert ranking.order == (0, 1, 2)
    assert ranking.clause == (
        "shortest (4 tokens) of the 2 within 0.25 standard deviations of the highest uwo of 3 "
        "candidates"
    )
    unknown = replace(pool, tokens=(0, 0, 0))
    assert rule(rule="shortest").rank(unknown).order[0] == 1
    assert "(1 character)" in rule(rule="shortest", within=9.0).rank(unknown).clause


@pytest.mark.parametrize("name", ["pessimistic", "tilted"])
def test_beta_is_in_standard_deviations_of_the_objective(name: str) -> None:
    values = np.array([[0.0, 1.0, 2.0, 2.2]])
    plain = rule(rule=name, beta=0.3).rank(contest(values))
    scaled = rule(rule=name, beta=0.3).rank(contest(1e6 * values))
    assert plain.distribution is not None
    np.testing.assert_allclose(plain.distribution, scaled.distribution, atol=1e-9)
    narrow = rule(rule=name, beta=1e-6).rank(contest(values))
    np.testing.assert_allclose(narrow.distribution, [0, 0, 0, 1])


def test_argmax_is_the_rule_of_every_plan() -> None:
    assert Select().apply(PlanDraft((Draw({}),))).rule is None


@pytest.mark.parametrize("name", ["win_rate", "minimax"])
def test_rules_of_pairs_need_a_judge_or_several_rewards(name: str) -> None:
    made = rule(rule=name)
    made.check("align.select", ["a", "b"], [])
    made.check("align.select", ["a"], ["a"])
    for rewards in ([], ["a"]):
        with pytest.raises(InvalidRequest, match=f"{name} needs pairs") as caught:
            made.check("align.select", rewards, [])
        assert caught.value.param == "align.select.rule"
    with pytest.raises(InvalidRequest, match="a alone"):
        rule(rule=name, order=["a"]).check("align.select", ["a", "b"], [])


@pytest.mark.parametrize("name", ["win_rate", "minimax", "maxmin", "lexicographic"])
def test_an_order_names_rewards_that_count(name: str) -> None:
    made = rule(rule=name, order=["quality", "bref"])
    with pytest.raises(InvalidRequest, match=r"'bref' .* did you mean 'brief'\?") as caught:
        made.check("align.select", ["quality", "brief"], [])
    assert caught.value.param == "align.select.order"
