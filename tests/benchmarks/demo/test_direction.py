"""Exact attributes, traits of drafts, and documents that follow the angle they carry."""

from __future__ import annotations

import random
import re
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo import direction
from infer_align.demo import world
from infer_align.methods.dpa import PUBLISHED

ONE = world.AnimalQuestion("otter", ("colour",))


@pytest.mark.parametrize(
    ("reply", "helpfulness", "verbosity"),
    [
        ("The otter is brown.", 1 - 0.25, -1.0),
        ("The otter is grey.", -0.7 - 0.25, -1.0),
        (
            "Gladly! The otter is brown. "
            "It is a moon-bright, honey-soft, moss-warm, river-wise creature.",
            1.25,
            0.0,
        ),
        (
            "Ugh, obviously. The otter is brown. It is a moon-bright, honey-soft creature.",
            1 - 0.6 - 0.0625,
            -0.5,
        ),
    ],
)
def test_attribute_rewards_follow_the_formula(
    reply: str, helpfulness: float, verbosity: float
) -> None:
    assert direction.ratings(ONE, reply) == pytest.approx((helpfulness, verbosity))


@given(st.integers(0, 10**9))
def test_a_draft_has_the_traits_of_its_wording(seed: int) -> None:
    rng = random.Random(seed)
    question = world.random_question(rng)
    draft = world.draft(question, rng)
    assert world.read(question, world.write(question, draft, rng)) == world.traits(question, draft)


@pytest.mark.slow
@given(st.integers(0, 10**9), st.floats(-60, 60))
def test_more_draws_give_better_replies(seed: int, degrees: float) -> None:
    v = direction.direction_at(degrees)
    rng = random.Random(seed)
    question = world.random_question(rng)

    def projected(drawn: int) -> float:
        projections = []
        for i in range(30):
            rng = random.Random(seed + i)
            reply = direction.best_reply(question, degrees, rng, drawn, drawn)
            helpfulness, verbosity = direction.ratings(question, reply)
            projections.append(v["helpfulness"] * helpfulness + v["verbosity"] * verbosity)
        return mean(projections)

    assert projected(16) > projected(1)


def test_the_best_number_of_flourishes_grows_with_the_angle() -> None:
    rng = random.Random(0)

    def flourishes(degrees: float) -> float:
        return mean(
            world.read(ONE, direction.best_reply(ONE, degrees, rng)).flourishes for _ in range(60)
        )

    counts = [flourishes(degrees) for degrees in (-20, -10, 0, 10, 20)]
    assert counts == sorted(counts)
    assert counts[2] == pytest.approx(4, abs=0.5)


def test_documents_carry_the_published_sentence_and_only_trained_angles() -> None:
    rng = random.Random(1)
    weights_of_verbosity = []
    for _ in range(500):
        system, user, assistant = direction.directed_document(rng)
        weights = re.search(r"helpfulness\*(\d+) \+ verbosity\*(-?\d+)", system["content"])
        assert weights
        h, v = map(int, weights.groups())
        assert h**2 + v**2 == pytest.approx(10_000, rel=0.02)
        assert system["content"].startswith(PUBLISHED.partition("{")[0])
        assert world.read_question(user["content"])
        assert assistant["role"] == "assistant"
        weights_of_verbosity.append(v)
    assert max(map(abs, weights_of_verbosity)) <= 50, "100 times the sine of 30 degrees"
    assert mean(abs(v) > 34 for v in weights_of_verbosity) == pytest.approx(0.1, abs=0.05)
