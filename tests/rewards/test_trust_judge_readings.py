"""Scores, relations and consistency equal the published vectors and keep their invariants."""

from __future__ import annotations

import itertools
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.rewards.trust_judge import (
    Reading,
    conflict_ratio,
    expected_score,
    nontransitivity,
    relation,
    rescale,
)
from infer_align.rewards.trust_judge.consistency import cycles
from infer_align.rewards.trust_judge.readings import label_value, merge

ORACLE = json.loads(
    (Path(__file__).parents[1] / "data" / "trustjudge_public.json").read_text(encoding="utf-8")
)
RULES = {"baseline": "first_label", "ppl": "perplexity", "likelihood": "likelihood"}
SCALES = st.sampled_from([5, 10, 100])
probabilities = st.floats(0.0, 1.0)
SWAP = {"larger": "smaller", "smaller": "larger", "equal": "equal"}


@pytest.mark.parametrize("case", ORACLE["score_expectation"], ids=lambda c: c["id"])
def test_scores(case: dict[str, Any]) -> None:
    probs = case["probs"]
    scale = case["scale"]
    ours = case["independent"]
    published = case["expected"]
    score = expected_score(probs, scale)
    if ours is None:
        assert math.isnan(score)
        assert math.isnan(expected_score(probs, scale, "geval")), (
            "no label is no score; the published code says 0"
        )
    else:
        assert score == pytest.approx(ours["renormalised_expectation"], abs=1e-9)
        assert rescale(score, scale) == pytest.approx(ours["rescaled_affine_1_to_5"], abs=1e-9)
        assert expected_score(probs, scale, "geval") == pytest.approx(published["geval"], abs=1e-9)
    assert expected_score(probs, scale, "published") == pytest.approx(
        published["softmax_weighted"], abs=1e-9
    )


@pytest.mark.parametrize("case", ORACLE["perplexity"], ids=lambda c: c["id"])
def test_perplexity(case: dict[str, Any]) -> None:
    reading = Reading([], case["cumulative_logprob"], case["tokens"])
    if isinstance(case["expected"], dict):
        with pytest.raises(ValueError, match="at least one"):
            _ = reading.perplexity
    else:
        assert reading.perplexity == pytest.approx(case["expected"], abs=1e-9)


def readings(case: dict[str, Any]) -> tuple[Reading, Reading]:
    return (
        Reading(case["order1_probs"], case["order1_cum_logprob"], case["order1_tokens"]),
        Reading(case["order2_probs"], case["order2_cum_logprob"], case["order2_tokens"]),
    )


@pytest.mark.parametrize("case", ORACLE["pairwise_relation"], ids=lambda c: c["id"])
def test_relations(case: dict[str, Any]) -> None:
    one, two = readings(case)
    for key, expected in case["expected"].items():
        rule, _, tolerance = key.partition("@")
        if expected is None:  # what is said first is no label: nothing to look up
            with pytest.raises(ValueError, match="none of A, B, C"):
                relation(one, two, RULES[rule], float(tolerance))
            continue
        compared = relation(one, two, RULES[rule], float(tolerance))
        if not isinstance(expected, dict):
            assert compared == expected, key
        elif "unspecified" in expected:
            assert compared == "equal", "probabilities that differ by rounding are equal"
        else:
            assert compared == "larger", "a single letter is the likeliest"
    merged = merge(one, two)
    positive = {side: p for side, p in merged.items() if p}
    expected_merge = {side: p for side, p in case["merged_ABC"].items() if p}
    assert positive == pytest.approx(expected_merge, abs=1e-9)


def contradiction(ij: str, jk: str, ik: str) -> str | None:
    """Return how three relations contradict each other, as the published code names it.

    "circle": i to k is strictly against what the other two imply. "equal": a tie is against it.
    """
    signs = {"larger": 1, "equal": 0, "smaller": -1}
    first = signs[ij]
    second = signs[jk]
    third = signs[ik]
    if first * second < 0:
        return None
    implied = first or second
    if third == implied:
        return None
    return "circle" if third == -implied and third != 0 else "equal"


@pytest.mark.parametrize("case", ORACLE["triples"], ids=lambda c: f"{c['ij']} {c['jk']} {c['ik']}")
def test_triples(case: dict[str, Any]) -> None:
    assert contradiction(case["ij"], case["jk"], case["ik"]) == case["type"]
    related = {(0, 1): case["ij"], (1, 2): case["jk"], (0, 2): case["ik"]}
    assert nontransitivity(related, 3) == float(not case["result"])


def relations_of(case: dict[str, Any], rule: str, tolerance: float) -> dict[tuple[int, int], Any]:
    """Return the relations of all questions. Pairs of two questions are never compared."""
    relations = {}
    for number, question in enumerate(case["input"]["pairs"]):
        for pair in question["pairs"]:
            one, two = (
                Reading(order["probs"], order["cum_logprob"], order["tokens"])
                for order in (pair["judgement_order1"], pair["judgement_order2"])
            )
            items = (number * 100 + pair["i"], number * 100 + pair["j"])
            # A pair that cannot be judged is dropped from every share.
            with suppress(ValueError):
                relations[items] = relation(one, two, RULES[rule], tolerance)
    return relations


def scores_of(case: dict[str, Any], readout: str) -> dict[int, float]:
    """Return the scores of all questions, as the published code reads them."""
    scale = case["input"]["scale"]
    readouts = {"geval": "geval", "softmax_weighted": "published"}
    scores = {}
    for number, question in enumerate(case["input"]["single"]):
        for item, probs in question["scores"]:
            first = label_value(probs[0][0], scale)
            if first is None:
                continue
            score = float(first)
            if readout in readouts:
                score = expected_score(probs, scale, readouts[readout])
            scores[number * 100 + item] = score
    return scores


@pytest.mark.parametrize("case", ORACLE["metrics"], ids=lambda c: c["id"])
def test_metrics(case: dict[str, Any]) -> None:
    for key, expected in case["expected"]["non_transitivity"].items():
        rule, k, tolerance = key.split("@")
        share = nontransitivity(relations_of(case, rule, float(tolerance)), int(k[1:]))
        if "error" in expected:
            assert math.isnan(share), key
        else:
            assert share == pytest.approx(expected["non_transitive_proportion"]), key
    pairs = relations_of(case, "baseline", 0.0)
    for key, expected in case["expected"]["conflict"].items():
        readout, _, tolerance = key.partition("@")
        ratio = conflict_ratio(scores_of(case, readout), pairs, float(tolerance))
        assert ratio == pytest.approx(expected["conflict_proportion"]), key


# --- invariants of every judge ---


@pytest.mark.slow
@settings(deadline=None)
@given(SCALES, st.data())
def test_scores_stay_on_the_scale_and_do_not_depend_on_order(
    scale: int, data: st.DataObject
) -> None:
    probs = data.draw(
        st.lists(
            st.tuples(st.integers(1, scale).map(str), probabilities),
            min_size=1,
            max_size=20,
            unique_by=lambda p: p[0],
        )
    )
    score = expected_score(probs, scale)
    if not sum(p for _, p in probs):
        assert math.isnan(score)
        return
    assert 1.0 <= score <= scale
    assert 1.0 <= rescale(score, scale) <= 5.0
    assert expected_score(probs[::-1], scale) == score
    halved = [(label, p / 2) for label, p in probs]
    if all(p == 0 or p > 1e-300 for _, p in probs):
        assert expected_score(halved, scale) == pytest.approx(score), (
            "the scale of the probabilities does not matter"
        )
    assert expected_score([*probs, ("the", 0.9)], scale) == score, "a word has no weight"


@settings(deadline=None)
@given(SCALES, st.data())
def test_rescaling_reaches_its_ends_exactly_and_keeps_order(
    scale: int, data: st.DataObject
) -> None:
    assert rescale(1.0, scale) == 1.0
    assert rescale(float(scale), scale) == 5.0
    low, high = sorted((data.draw(st.floats(1, scale)), data.draw(st.floats(1, scale))))
    assert rescale(low, scale) <= rescale(high, scale)
    assert expected_score([(str(scale), 0.3)], scale) == scale
    assert expected_score([("1", 1.0)], scale) == 1.0


reading = st.builds(
    lambda probs, logprob, tokens: Reading(
        sorted(probs.items(), key=lambda p: -p[1]), logprob, tokens
    ),
    st.fixed_dictionaries(dict.fromkeys("ABC", st.floats(0.01, 0.33))),
    st.floats(-20, -0.1),
    st.integers(1, 40),
)


@settings(deadline=None)
@given(reading, reading, st.sampled_from(list(RULES.values())), st.floats(0, 0.5))
def test_exchanging_the_answers_reverses_the_relation(
    one: Reading, two: Reading, rule: Any, tolerance: float
) -> None:
    assert relation(two, one, rule, tolerance) == SWAP[relation(one, two, rule, tolerance)]


@settings(deadline=None)
@given(reading, st.sampled_from(["first_label", "likelihood"]))
def test_a_judge_that_reads_positions_alone_gives_ties(one: Reading, rule: Any) -> None:
    first = one.probs[0][0]
    assert relation(one, one, rule) == "equal" or first == "C"


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=7))
def test_a_judge_that_ranks_is_consistent(scores: list[float]) -> None:
    names = {1: "larger", 0: "equal", -1: "smaller"}
    pairs = {}
    for i, j in itertools.combinations(range(len(scores)), 2):
        sign = (scores[i] > scores[j]) - (scores[i] < scores[j])
        pairs[i, j] = names[sign]
    assert conflict_ratio(dict(enumerate(scores)), pairs) == 0.0
    assert all(nontransitivity(pairs, k) == 0.0 for k in range(3, len(scores) + 1))
    assert cycles(pairs) == []


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_the_numbering_of_items_does_not_matter(data: st.DataObject) -> None:
    choices = st.sampled_from(list(SWAP))
    pairs = {pair: data.draw(choices) for pair in itertools.combinations(range(5), 2)}
    order = data.draw(st.permutations(range(5)))
    renamed = {}
    for (i, j), related in pairs.items():
        first = order[i]
        second = order[j]
        if first < second:
            renamed[first, second] = related
        else:
            renamed[second, first] = SWAP[related]
    for k in (3, 4, 5):
        assert nontransitivity(pairs, k) == nontransitivity(renamed, k)
    assert len(cycles(pairs)) == len(cycles(renamed))


def test_cycles_start_at_their_lowest() -> None:
    assert cycles({(0, 1): "larger", (1, 2): "larger", (0, 2): "smaller"}) == [(0, 1, 2)]
    assert cycles({(0, 1): "smaller", (1, 2): "smaller", (0, 2): "larger"}) == [(0, 2, 1)]


def test_what_was_not_judged_is_left_out() -> None:
    assert math.isnan(nontransitivity({(0, 1): "larger"}, 3))
    assert math.isnan(conflict_ratio({0: 1.0, 1: math.nan}, {(0, 1): "larger"}))
    assert (
        conflict_ratio({0: 2.0, 1: 1.0, 2: math.nan}, {(0, 1): "larger", (1, 2): "larger"}) == 0.0
    )
    with pytest.raises(ValueError, match="at least 3"):
        nontransitivity({}, 2)
    with pytest.raises(ValueError, match="none of A, B, C"):
        relation(Reading([("I", 0.9)]), Reading([("A", 0.9)]), "likelihood")


@pytest.mark.slow
@given(st.integers(2, 8), st.integers(3, 6), st.data())
def test_nontransitivity_counts_as_the_definition_does(n: int, k: int, data: st.DataObject) -> None:
    items = data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n, unique=True).map(sorted))
    choices = st.sampled_from(["larger", "smaller", "equal", None])
    relations: dict[tuple[int, int], Any] = {}
    for pair in itertools.combinations(items, 2):
        related = data.draw(choices)
        if related is not None:
            relations[pair] = related
    complete = 0
    intransitive = 0
    for subset in itertools.combinations(items, k):
        if not all(pair in relations for pair in itertools.combinations(subset, 2)):
            continue
        complete += 1
        triples = itertools.combinations(subset, 3)
        intransitive += any(
            contradiction(relations[i, j], relations[j, m], relations[i, m]) for i, j, m in triples
        )
    share = nontransitivity(relations, k)
    if complete:
        assert share == pytest.approx(intransitive / complete)
    else:
        assert math.isnan(share)


def test_unknown_readouts_and_rules_are_refused() -> None:
    with pytest.raises(
        ValueError, match="'foo' is not allowed; must be one of expected, geval, published"
    ):
        expected_score([("4", 1.0)], 5, "foo")  # type: ignore[arg-type]
    one = Reading([("A", 1.0)])
    for rule, tolerance in (("foo", 0.0), ("likelihood", -1.0), ("likelihood", math.nan)):
        with pytest.raises(ValueError, match="rule"):
            relation(one, one, rule, tolerance)  # type: ignore[arg-type]
