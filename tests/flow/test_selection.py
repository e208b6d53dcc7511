"""Ranking: equivariant, NaN-safe, ties to the lowest index, with a reason in one sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.config.align import parse_align
from infer_align.errors import RewardFailed
from infer_align.flow.plan import Plan
from infer_align.flow.rules import Highest
from infer_align.flow.scorers import Scorer
from infer_align.flow.selection import rank_candidates, select
from infer_align.methods import Contest, PlanDraft, Ranking, SelectionRule
from infer_align.methods.select import RuleName, Select
from infer_align.objectives import Ensemble, rank
from infer_align.rewards import Reward, RewardScores
from infer_align.steering import Steering
from infer_align.types import Candidate, Draw, Scores, Selection

NAN = math.nan
MEMBERS: Any = st.integers(1, 4).flatmap(
    lambda k: st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-3, 3).map(float) | st.just(NAN), min_size=n, max_size=n),
            min_size=k,
            max_size=k,
        )
    )
)
OBJECTIVES = [
    Ensemble("mean"),
    Ensemble("wco"),
    Ensemble("uwo"),
    Ensemble("uwo", 0.0),
    Ensemble("uwo", 2.0, standardize=True),
]


class Unused(Reward):
    """Stands for the reward of a scorer; the scores are given."""

    async def score(self, messages: Any, candidates: Any) -> RewardScores:
        raise AssertionError


def scorers(weights: dict[str, float]) -> tuple[Scorer, ...]:
    return tuple(Scorer(name, Unused(), weight) for name, weight in weights.items())


def chosen(
    scores: dict[str, Any],
    weights: dict[str, float] | None = None,
    objective: Any = OBJECTIVES[0],
    failed: tuple[int, ...] = (),
) -> Selection:
    members = {name: np.asarray(rows, dtype=np.float64) for name, rows in scores.items()}
    n = next(iter(members.values())).shape[1]
    candidates = [
        Candidate(i, {"text": str(i)}, error="x" if i in failed else None) for i in range(n)
    ]
    for rows in members.values():
        rows[:, list(failed)] = NAN
    plan = Plan(
        (Draw({}, n),),
        ensemble=objective,
        scorers=scorers(weights or dict.fromkeys(members, 1.0)),
        selects=True,
    )
    notes = dict.fromkeys(members, (None,) * n)
    return rank_candidates(plan, candidates, Scores(members, notes=notes))


@pytest.mark.slow
@given(MEMBERS, st.sampled_from(OBJECTIVES), st.randoms(use_true_random=False))
def test_permuting_the_candidates_permutes_the_answer(
    rows: Any, objective: Any, random: Any
) -> None:
    order = list(range(len(rows[0])))
    random.shuffle(order)
    plain = chosen({"r": rows}, objective=objective)
    moved = chosen({"r": np.asarray(rows)[:, order]}, objective=objective)
    np.testing.assert_allclose(
        np.asarray(moved.objective), np.asarray(plain.objective)[order], atol=1e-12
    )
    assert {order[i] for i in moved.dropped} == set(plain.dropped)
    if not objective.standardize:  # there sums are rounded in another order, which may break a tie
        best = np.asarray(plain.objective)
        np.testing.assert_array_equal(
            [best[order[i]] for i in moved.ranking], [best[i] for i in plain.ranking]
        )


@pytest.mark.slow
@given(MEMBERS, st.sampled_from(OBJECTIVES))
def test_everything_is_either_ranked_or_dropped_with_a_reason(rows: Any, objective: Any) -> None:
    made = chosen({"r": rows}, objective=objective)
    assert sorted([*made.ranking, *made.dropped]) == list(range(len(rows[0])))
    assert all(made.dropped.values())
    values = [made.objective[i] for i in made.ranking]
    assert values == sorted(values, reverse=True)
    assert not any(math.isnan(v) for v in values)
    for first, second in zip(made.ranking, made.ranking[1:], strict=False):
        assert made.objective[first] > made.objective[second] or first < second, (
            "ties go to the lowest index"
        )


@pytest.mark.slow
@given(MEMBERS)
def test_relations_between_the_objectives(rows: Any) -> None:
    mean, wco, uwo0 = (
        chosen({"r": rows}, objective=o).objective
        for o in (OBJECTIVES[0], OBJECTIVES[1], OBJECTIVES[3])
    )
    np.testing.assert_array_equal(mean, uwo0)
    assert all(not w > m + 1e-12 for w, m in zip(wco, mean, strict=True))


def test_a_failed_candidate_is_never_ranked() -> None:
    for weights in ({"r": 1.0}, {"r": 0.0}):
        made = chosen({"r": [[5, 9, 7]]}, weights, failed=(1,))
        assert set(made.ranking) == {0, 2}
        assert made.dropped == {1: "failed: x"}
        assert math.isnan(made.objective[1])


def test_weight_0_is_shown_and_does_not_count_even_as_nan() -> None:
    made = chosen({"a": [[1, 2, 3]], "b": [[NAN, 9, 0]]}, {"a": 1.0, "b": 0.0})
    assert made.ranking == (2, 1, 0)
    assert made.dropped == {}
    np.testing.assert_array_equal(made.values["b"], [NAN, 9, 0])


def test_the_weighted_sum() -> None:
    made = chosen({"a": [[1, 2]], "b": [[10, 1]]}, {"a": 2.0, "b": 0.5})
    assert made.objective == (7.0, 4.5)


def test_the_reason_for_a_drop_is_of_a_reward_that_counts() -> None:
    made = chosen({"a": [[NAN, 1]], "b": [[1, NAN]]}, {"a": 0.0, "b": 1.0})
    assert made.dropped == {1: "not scored: b: NaN"}


@pytest.mark.parametrize(
    ("rows", "failed", "reason"),
    [
        ([[1, 2, 0]], (), "highest mean of 3 candidates (2; runner-up 1)"),
        ([[1, NAN]], (), "the only one of 2 candidates that could be compared (mean 1)"),
        ([[1, 5]], (1,), "the only one of 2 candidates that could be compared (mean 1)"),
        ([[NAN, NAN]], (), "none of 2 candidates could be scored"),
        ([[1]], (), "one candidate, nothing to compare (mean 1)"),
    ],
)
def test_the_reason(rows: Any, failed: tuple[int, ...], reason: str) -> None:
    assert chosen({"r": rows}, failed=failed).reason == reason


def test_without_scorers_candidates_keep_the_order_of_drawing() -> None:
    plan = Plan((Draw({}, 3),))
    candidates = [Candidate(0, {}), Candidate(1, {}, error="x"), Candidate(2, {})]
    selection = select(plan, candidates, Scores())
    assert selection.ranking == (0, 2)
    assert selection.dropped == {1: "failed: x"}


def unscored(n: int, *, late: bool) -> Selection:
    plan = Plan((Draw({}, n),), scorers=scorers({"r": 1.0}), selects=True)
    scores = Scores({"r": np.full((1, n), NAN)}, notes={"r": ("no score",) * n})
    return select(plan, [Candidate(i, {}) for i in range(n)], scores, late=late)


def test_several_unscored_candidates_fail_unless_the_deadline_passed() -> None:
    with pytest.raises(RewardFailed, match="none of 2 candidates could be scored; first: not sco"):
        unscored(2, late=False)
    late = unscored(2, late=True)
    assert late.ranking == (0, 1)
    assert late.late
    assert "deadline" in late.reason


def test_whole_answers_come_first_if_the_deadline_passed_before_scoring() -> None:
    candidates = [
        Candidate(0, {}, interrupted=True),
        Candidate(1, {}, completion_tokens=3, interrupted=True),
        Candidate(2, {}, completion_tokens=2),
        Candidate(3, {}, completion_tokens=9, error="broken"),
        Candidate(4, {}, completion_tokens=1),
        Candidate(5, {}, completion_tokens=8, interrupted=True),
    ]
    plan = Plan((Draw({}, 6),), scorers=scorers({"r": 1.0}), selects=True)
    scores = Scores({"r": np.full((1, 6), NAN)}, notes={"r": ("no score",) * 6})
    assert select(plan, candidates, scores, late=True).ranking == (2, 4, 1, 5, 0)


def test_a_single_unscored_candidate_is_returned() -> None:
    single = unscored(1, late=False)
    assert single.ranking == (0,)
    assert not single.late
    assert single.reason == "nothing to compare; not scored: r: no score"


class Lowest(SelectionRule):
    """Ranks the lowest objective first."""

    name = "lowest"

    def rank(self, contest: Contest) -> Ranking:
        order = tuple(reversed(rank(contest.objective)))
        return Ranking(order, f"lowest of {contest.drawn}")


def test_a_plan_may_bring_another_rule() -> None:
    plan = Plan((Draw({}, 3),), scorers=scorers({"r": 1.0}), selects=True, rule=Lowest())
    scores = Scores({"r": np.array([[2.0, 1.0, NAN]])}, notes={"r": (None,) * 3})
    selection = select(plan, [Candidate(i, {}) for i in range(3)], scores)
    assert selection.ranking == (1, 0)
    assert selection.dropped == {2: "not scored: r: NaN"}
    assert selection.reason == "lowest of 3"


def test_the_reason_of_a_steered_draw_names_its_weights() -> None:
    steering = Steering({"helpful": 4.0, "brief": -0.5}, 20, "keep")
    plan = Plan((Draw({}, 1, steering=steering),))
    selection = rank_candidates(plan, [Candidate(0, {})], Scores())
    assert selection.reason == "one draw, steered by vas with beta helpful 4, brief -0.5"


def test_the_reason_of_a_draw_with_a_direction_names_it() -> None:
    draw = Draw({}, 1, direction={"helpful": 0.8, "brief": -0.6})
    selection = rank_candidates(Plan((draw,)), [Candidate(0, {})], Scores())
    reason = "one draw, in the direction helpful 0.8, brief -0.6"
    assert selection.reason == reason
    steered = replace(draw, steering=Steering({"helpful": 4.0}, 20, "keep"))
    selection = rank_candidates(Plan((steered,)), [Candidate(0, {})], Scores())
    assert selection.reason == f"{reason}, steered by vas with beta helpful 4"


def greedy(direction: float | None, temperature: float = 0, n: int = 1) -> Draw:
    """Return a draw whose prompt names a direction."""
    messages = [{"role": "system", "content": f"rating = {direction}"}]
    body = {"messages": messages, "temperature": temperature}
    return Draw(body, n, direction=None if direction is None else {"a": direction})


def reason(draws: list[Draw], texts: list[str], **fields: Any) -> str:
    """Return the reason for candidates with these texts, one after the other from the draws."""
    owners = [i for i, draw in enumerate(draws) for _ in range(draw.n)]
    candidates = [
        Candidate(i, {"text": text}, owner, **fields)
        for i, (text, owner) in enumerate(zip(texts, owners, strict=True))
    ]
    made = Plan(tuple(draws), scorers=scorers({"r": 1.0}), selects=True, note="a note")
    return rank_candidates(made, candidates, Scores({"r": np.ones((1, len(texts)))})).reason


IGNORED = "a note; all directions gave the same answer; the model may ignore directions"


@pytest.mark.parametrize(
    ("draws", "texts"),
    [
        ([greedy(1), greedy(2)], ["owls", "owls"]),
        ([greedy(1, 0.0), greedy(2, 0.0), greedy(3, 0.0)], ["", "", ""]),
        ([greedy(1, n=2), greedy(2)], ["owls", "owls", "owls"]),
    ],
)
def test_the_same_greedy_answer_to_all_directions_is_noted(
    draws: list[Draw], texts: list[str]
) -> None:
    assert reason(draws, texts).endswith(IGNORED)


@pytest.mark.parametrize(
    ("draws", "texts"),
    [
        ([greedy(1), greedy(2)], ["owls", "mice"]),
        ([greedy(1), greedy(2), greedy(3)], ["owls", "owls", "mice"]),
        # Sampled answers may be the same by chance.
        ([greedy(1, 0.7), greedy(2, 0.7)], ["owls", "owls"]),
        # Directions that are rounded to the same prompt.
        ([greedy(1), greedy(1)], ["owls", "owls"]),
        ([greedy(1, n=2)], ["owls", "owls"]),
        ([greedy(None), greedy(None)], ["owls", "owls"]),
    ],
)
def test_other_answers_are_not_noted(draws: list[Draw], texts: list[str]) -> None:
    assert reason(draws, texts).endswith("; a note")


def test_answers_that_were_cut_or_failed_say_nothing_about_directions() -> None:
    draws = [greedy(1), greedy(2)]
    for fields in ({"interrupted": True}, {"error": "x"}, {"rejected": "low"}):
        assert "ignore" not in reason(draws, ["", ""], **fields)


def composed(
    scores: dict[str, Any], align: dict[str, Any], weights: dict[str, float] | None = None
) -> Selection:
    """Return the selection of candidates "0", "1", ... with these scores under an `align`."""
    rows = {name: np.array([values], dtype=np.float64) for name, values in scores.items()}
    n = len(next(iter(scores.values())))
    draft = PlanDraft((Draw({}, n),))
    for method in parse_align(align).methods.values():
        draft = method.apply(draft)
    plan = Plan(
        draft.draws,
        ensemble=OBJECTIVES[0],
        scorers=scorers(weights or dict.fromkeys(scores, 1.0)),
        composition=draft.composition,
        rule=draft.rule or Highest(),
        selects=True,
    )
    notes = dict.fromkeys(scores, (None,) * n)
    candidates = [Candidate(i, {"text": str(i)}) for i in range(n)]
    return rank_candidates(plan, candidates, Scores(rows, notes=notes))


def test_a_shape_changes_the_sum_and_the_raw_score_stays() -> None:
    scores = {"a": [0.0, 100.0, 200.0], "b": [3.0, 2.0, 1.0], "c": [3.0, 2.0, 1.0]}
    assert composed(scores, {}).ranking == (2, 1, 0)
    ranks = {name: {"shape": "rank"} for name in scores}
    made = composed(scores, {"compose": ranks})
    assert made.ranking == (0, 1, 2)
    assert made.objective == (2.0, 1.5, 1.0)
    np.testing.assert_array_equal(made.values["a"], [0, 100, 200])
    np.testing.assert_array_equal(made.composed["a"], [0, 0.5, 1])
    assert made.reason == "highest composed mean of 3 candidates (2; runner-up 1.5)"
    assert composed(scores, {}).composed == {}


def test_a_reward_without_a_shape_enters_as_it_is() -> None:
    made = composed({"a": [5.0, 9.0], "b": [1.0, 0.0]}, {"compose": {"a": {"shape": "rank"}}})
    assert made.objective == (1.0, 1.0)
    np.testing.assert_array_equal(made.composed["b"], [1, 0])


def test_a_candidate_that_misses_a_gate_is_dropped() -> None:
    gates = {"compose": {"gates": {"safe": {"at_least": 0.5}}}}
    scores = {"good": [9.0, 1.0, 2.0], "safe": [0.4, 0.5, 0.9]}
    made = composed(scores, gates, {"good": 1.0, "safe": 0.0})
    assert made.ranking == (2, 1)
    assert made.dropped == {0: "missed a gate: safe 0.4 is under at_least 0.5"}
    assert math.isnan(made.objective[0])
    assert made.reason == (
        "highest composed mean of 3 candidates (2; runner-up 1); 1 of them missed a gate"
    )
    alone = composed({"good": [9.0, 1.0], "safe": [0.4, 0.5]}, gates)
    assert alone.reason == "the only one of 2 candidates that passed the gates (composed mean 1.5)"


def test_if_all_miss_a_gate_the_least_shortfall_wins_whatever_the_rule() -> None:
    align = {
        "compose": {"gates": {"safe": {"at_least": 5.0}}},
        "select": {"rule": "tilted"},
    }
    made = composed({"good": [9.0, 1.0, 2.0], "safe": [0.0, 1.0, 1.0]}, align)
    assert made.ranking == (2, 1, 0)
    assert made.dropped == {}
    assert made.distribution is None
    assert made.reason == "all 3 candidates miss a gate (safe); this one by the least"


def test_a_gate_is_read_before_the_shape_and_needs_a_score() -> None:
    align = {"compose": {"safe": {"shape": "rank"}, "gates": {"safe": {"at_least": 7.0}}}}
    made = composed({"safe": [9.0, 6.0, NAN]}, align)
    assert made.ranking == (0,)
    assert made.dropped[2] == "not scored: safe: NaN"
    unweighted = composed({"good": [1.0, 2.0], "safe": [9.0, NAN]}, align, {"good": 1, "safe": 0})
    assert unweighted.ranking == (0,)
    assert unweighted.dropped == {1: "not scored: safe: NaN"}


def test_a_rule_names_candidates_by_their_index_among_all() -> None:
    scores = {"a": [NAN, 1.0, 2.0, 0.0], "b": [5.0, 1.0, 2.0, 0.0]}
    made = composed(scores, {"select": {"rule": "minimax"}})
    assert made.ranking == (2, 1, 3)
    assert made.distribution == (0.0, 0.0, 1.0, 0.0)
    assert (made.rule, made.condorcet, made.cycles, made.worst_case) == ("minimax", 2, 0, 0.5)
    assert made.dropped == {0: "not scored: a: NaN"}


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_one_candidate_is_returned_by_every_rule(rule: str) -> None:
    align = {"select": {"rule": rule}, "compose": {"a": {"shape": "par"}}}
    made = composed({"a": [3.0], "b": [1.0]}, align)
    assert made.ranking == (0,)
    assert made.reason == "one candidate, nothing to compare (composed mean 1.5)"
    assert made.distribution in {None, (1.0,)}


def test_consensus_needs_no_reward() -> None:
    texts = ["owls eat mice", "bats", "owls eat mice daily"]
    draft = Select(rule="consensus").apply(PlanDraft((Draw({}, 3),)))
    plan = Plan(draft.draws, rule=draft.rule or Highest(), selects=True)
    made = select(plan, [Candidate(i, {"text": text}) for i, text in enumerate(texts)], Scores())
    assert made.ranking == (0, 2, 1)
    assert all(math.isnan(value) for value in made.objective)


# --- a deadline during scoring ---


def late(rows: dict[str, Any], align: dict[str, Any] | None = None, **weights: float) -> Selection:
    """Select at a deadline; rewards without rows did not score in time."""
    names = weights or dict.fromkeys(rows, 1.0)
    n = len(next(iter(rows.values())))
    draft = PlanDraft((Draw({}, n),))
    for method in parse_align(align or {}).methods.values():
        draft = method.apply(draft)
    plan = Plan(
        draft.draws,
        scorers=scorers(names),
        ensemble=Ensemble("mean"),
        selects=True,
        composition=draft.composition,
        rule=draft.rule or Highest(),
    )
    members = {name: np.array([rows.get(name, [NAN] * n)]) for name in names}
    errors = {name: "DeadlineExceeded" for name in names if name not in rows}
    notes = dict.fromkeys(names, ("no score",) * n)
    scores = Scores(members, notes=notes, errors=errors)
    return select(plan, [Candidate(i, {}) for i in range(n)], scores, late=True)


@pytest.mark.parametrize("rule", [None, "lexicographic", "maxmin"])
def test_at_a_deadline_the_rewards_in_time_choose(rule: Any) -> None:
    align = {"select": {"rule": rule}} if rule else None
    made = late({"fast": [1.0, 3.0, 2.0], "shown": [9.0, 9.0, 9.0]}, align, fast=2, slow=1, shown=0)
    assert made.ranking == (1, 2, 0)
    assert made.objective == (2.0, 6.0, 4.0)
    assert made.late
    assert made.dropped == {}
    assert made.reason == (
        "highest mean of 3 candidates (6; runner-up 4); the deadline passed before slow scored"
    )
    np.testing.assert_array_equal(made.values["slow"], [NAN] * 3)


def test_at_a_deadline_a_gate_that_was_read_holds() -> None:
    gates = {"compose": {"gates": {"safe": {"at_least": 0.5}}}}
    made = late({"fast": [1.0, 3.0], "safe": [1.0, 0.0]}, gates, fast=1, slow=1, safe=0)
    assert made.ranking == (0,)
    assert list(made.dropped) == [1]


@pytest.mark.parametrize(
    "align",
    [
        {"compose": {"gates": {"slow": {"at_least": 0.5}}}},
        {"compose": {"slow": {"shape": "rank"}}},
    ],
)
def test_at_a_deadline_nothing_chooses_if_a_gate_or_a_shape_was_not_read(align: Any) -> None:
    made = late({"fast": [1.0, 3.0]}, align, fast=1, slow=1)
    assert made.ranking == (0, 1)
    assert "the deadline passed before scoring" in made.reason


def test_at_a_deadline_a_reward_of_weight_0_does_not_choose() -> None:
    made = late({"shown": [1.0, 3.0]}, shown=0, slow=1)
    assert made.ranking == (0, 1)
    assert made.late


def test_a_selection_is_partial_if_the_deadline_cut_any_score() -> None:
    assert late({"fast": [1.0, 3.0]}, fast=1, slow=0).late
    assert not late({"fast": [1.0, 3.0]}, fast=1).late
