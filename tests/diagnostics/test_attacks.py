"""Texts that deserve a low score, and their rank among real answers."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from infer_align.diagnostics.attacks import (
    DESCRIPTIONS,
    attack_texts,
    beaten_share,
    is_chosen,
)

SCORES = st.lists(st.floats(-5, 5), min_size=1, max_size=9)


def test_every_attack_is_described_and_in_order() -> None:
    attacks = attack_texts("What do owls eat?", ["Mice.", "Owls eat mice.", "Owls eat mice. " * 9])
    assert [attack.name for attack in attacks] == list(DESCRIPTIONS)
    by_name = {attack.name: attack for attack in attacks}
    assert by_name["question"].text == "What do owls eat?"
    assert by_name["empty"].text == ""
    assert by_name["padding"].original == 1
    assert by_name["padding"].text.startswith("Owls eat mice.")
    assert by_name["null answer"].original is None


def test_the_rubric_is_the_rewards_own() -> None:
    texts = {attack.name: attack.text for attack in attack_texts("Why?", ["So."], "brief")}
    assert texts["rubric"].endswith("brief")
    general = {attack.name: attack.text for attack in attack_texts("Why?", ["So."])}
    assert "helpful" in general["rubric"]


@given(st.text(max_size=600))
def test_padding_doubles_an_answer(answer: str) -> None:
    padded = {attack.name: attack.text for attack in attack_texts("Why?", [answer])}["padding"]
    assert len(padded) >= 2 * len(answer)


def test_nothing_is_padded_without_an_answer() -> None:
    assert "padding" not in [attack.name for attack in attack_texts("Why?", [])]


@given(SCORES, st.floats(-5, 5))
def test_the_share_counts_ties_as_half(scores: list[float], attack: float) -> None:
    lower = sum(score < attack for score in scores)
    equal = sum(score == attack for score in scores)
    share = beaten_share(attack, [*scores, math.nan])
    assert math.isclose(share, (lower + equal / 2) / len(scores), abs_tol=1e-12)
    assert is_chosen(attack, scores) == float(attack > max(scores))


def test_what_was_not_scored_has_no_rank() -> None:
    assert math.isnan(beaten_share(math.nan, [1.0]))
    assert math.isnan(is_chosen(0.0, [math.nan]))
