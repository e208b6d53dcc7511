"""Scores, relations and consistency: the published vectors, and what holds for any judge."""

from __future__ import annotations

import itertools
import json
import math
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
from infer_align.rewards.trust_judge.consistency import cycles, triple_error
from infer_align.rewards.trust_judge.readings import extract, label_value, merge

ORACLE = json.loads(
    (Path(__file__).parents[1] / "data" / "trustjudge_public.json").read_text(encoding="utf-8")
)
RULES = {"baseline": "first_label", "ppl": "perplexity", "likelihood": "likelihood"}
SCALES = st.sampled_from([5, 10, 100])
probabilities = st.floats(0.0, 1.0)
SWAP = {"larger": "smaller", "smaller": "larger", "equal": "equal"}


@pytest.mark.parametrize("case", ORACLE["score_expectation"], ids=lambda c: c["id"])
def test_scores(case: dict[str, Any]) -> None:
    probs, scale = case["probs"], case["scale"]
    ours, published = case["independent"], case["expected"]
    found = expected_score(probs, scale)
    if ours is None:
        assert math.isnan(found)
        assert math.isnan(expected_score(probs, scale, "geval")), (
            "the published 0 is a score that nobody gave"
        )
    else:
        assert found == pytest.approx(ours["renormalised_expectation"], abs=1e-9)
        assert rescale(found, scale) == pytest.approx(ours["rescaled_affine_1_to_5"], abs=1e-9)
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
        found = relation(one, two, RULES[rule], float(tolerance))
        if not isinstance(expected, dict):
            assert found == expected, key
        elif "unspecified" in expected:
            assert found == "equal", "two masses that differ by rounding are one"
        else:
            assert found == "larger", "one letter alone is the likeliest"
    merged = merge(one, two)
    assert {side: p for side, p in merged.items() if p} == pytest.approx(
        {k: p for k, p in case["merged_ABC"].items() if p}, abs=1e-9
    )


@pytest.mark.parametrize("case", ORACLE["triples"], ids=lambda c: f"{c['ij']} {c['jk']} {c['ik']}")
def test_triples(case: dict[str, Any]) -> None:
    assert triple_error(case["ij"], case["jk"], case["ik"]) == case["type"]
    related = {(0, 1): case["ij"], (1, 2): case["jk"], (0, 2): case["ik"]}
    assert nontransitivity(related, 3) == float(not case["result"])


@pytest.mark.parametrize("case", ORACLE["extraction"], ids=lambda c: c["note"])
def test_extraction(case: dict[str, Any]) -> None:
    allowed = (
        "ABC"
        if case["allowed"] == "ABC"
        else [str(i) for i in range(1, int(case["allowed"].rpartition(".")[2]) + 1)]
    )
    if case["expected_middle"] is None:
        with pytest.raises(ValueError, match="no label"):
            extract(case["positions"], allowed)
        return
    found = extract(case["positions"], allowed)
    assert [label for label, _ in found] == [label for label, _ in case["expected_middle"]]
    assert [p for _, p in found] == pytest.approx([p for _, p in case["expected_middle"]], abs=1e-9)


def judged(case: dict[str, Any], rule: str, tolerance: float) -> dict[tuple[int, int], Any]:
    """All questions side by side: a subset is of one question, as pairs of two were never compared."""
    related = {}
    for number, question in enumerate(case["input"]["pairs"]):
        for pair in question["pairs"]:
            one, two = (
                Reading(o["probs"], o["cum_logprob"], o["tokens"])
                for o in (pair["judgement_order1"], pair["judgement_order2"])
            )
            try:
                related[number * 100 + pair["i"], number * 100 + pair["j"]] = relation(
                    one, two, RULES[rule], tolerance
                )
            except ValueError:
                continue  # not judged: dropped from every share
    return related


@pytest.mark.parametrize("case", ORACLE["metrics"], ids=lambda c: c["id"])
def test_metrics(case: dict[str, Any]) -> None:
    for key, expected in case["expected"]["non_transitivity"].items():
        rule, k, tolerance = key.split("@")
        found = nontransitivity(judged(case, rule, float(tolerance)), int(k[1:]))
        assert (
            math.isnan(found)
            if "error" in expected
            else found == pytest.approx(expected["non_transitive_proportion"])
        ), key
    pairs, scale = judged(case, "baseline", 0.0), case["input"]["scale"]
    for key, expected in case["expected"]["conflict"].items():
        readout, _, tolerance = key.partition("@")
        scores = {}
        for number, question in enumerate(case["input"]["single"]):
            for item, probs in question["scores"]:
                first = label_value(probs[0][0], scale)
                if first is not None:
                    names = {"geval": "geval", "softmax_weighted": "published"}
                    scores[number * 100 + item] = (
                        expected_score(probs, scale, names[readout])
                        if readout in names
                        else float(first)
                    )
        assert conflict_ratio(scores, pairs, float(tolerance)) == pytest.approx(
            expected["conflict_proportion"]
        ), key


# --- what holds for any judge ---


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
    found = expected_score(probs, scale)
    if not sum(p for _, p in probs):
        assert math.isnan(found)
        return
    assert 1.0 <= found <= scale
    assert 1.0 <= rescale(found, scale) <= 5.0
    assert expected_score(probs[::-1], scale) == found
    halved = [(label, p / 2) for label, p in probs]
    if all(p == 0 or p > 1e-300 for _, p in probs):
        assert expected_score(halved, scale) == pytest.approx(found), (
            "a judge that is half silent says the same"
        )
    assert expected_score([*probs, ("the", 0.9)], scale) == found, "what is no label weighs nothing"


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
def test_exchanging_the_answers_turns_the_relation_around(
    one: Reading, two: Reading, rule: Any, tolerance: float
) -> None:
    assert relation(two, one, rule, tolerance) == SWAP[relation(one, two, rule, tolerance)]


@settings(deadline=None)
@given(reading, st.sampled_from(["first_label", "likelihood"]))
def test_a_judge_of_positions_alone_says_equal(one: Reading, rule: Any) -> None:
    first = one.probs[0][0]
    assert relation(one, one, rule) == "equal" or first == "C"


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=3, max_size=7))
def test_a_judge_that_ranks_is_consistent(scores: list[float]) -> None:
    pairs = {
        (i, j): "larger"
        if scores[i] > scores[j]
        else "smaller"
        if scores[i] < scores[j]
        else "equal"
        for i, j in itertools.combinations(range(len(scores)), 2)
    }
    assert conflict_ratio(dict(enumerate(scores)), pairs) == 0.0
    assert all(nontransitivity(pairs, k) == 0.0 for k in range(3, len(scores) + 1))
    assert cycles(pairs) == []


@settings(deadline=None)
@given(st.data())
def test_names_of_items_do_not_matter(data: st.DataObject) -> None:
    pairs = {
        pair: data.draw(st.sampled_from(list(SWAP))) for pair in itertools.combinations(range(5), 2)
    }
    order = data.draw(st.permutations(range(5)))
    renamed = {
        (min(order[i], order[j]), max(order[i], order[j])): related
        if order[i] < order[j]
        else SWAP[related]
        for (i, j), related in pairs.items()
    }
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


@given(st.integers(2, 8), st.integers(3, 6), st.data())
def test_nontransitivity_counts_as_the_definition_does(n: int, k: int, data: st.DataObject) -> None:
    items = data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n, unique=True).map(sorted))
    related = st.sampled_from(["larger", "smaller", "equal", None])
    relations = {
        pair: r
        for pair in itertools.combinations(items, 2)
        if (r := data.draw(related)) is not None
    }
    whole = [
        s
        for s in itertools.combinations(items, k)
        if all(pair in relations for pair in itertools.combinations(s, 2))
    ]
    bad = [
        s
        for s in whole
        if any(
            triple_error(relations[i, j], relations[j, m], relations[i, m])
            for i, j, m in itertools.combinations(s, 3)
        )
    ]
    found = nontransitivity(relations, k)
    assert math.isnan(found) if not whole else found == pytest.approx(len(bad) / len(whole))


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'foo' is not allowed; must be one of expected, geval, published"
    ):
        expected_score([("4", 1.0)], 5, "foo")  # type: ignore[arg-type]
    one = Reading([("A", 1.0)])
    for rule, tolerance in (("foo", 0.0), ("likelihood", -1.0), ("likelihood", math.nan)):
        with pytest.raises(ValueError, match="rule"):
            relation(one, one, rule, tolerance)  # type: ignore[arg-type]
