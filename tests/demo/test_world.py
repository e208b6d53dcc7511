"""The demo world: its gold reward, its prompts and its documents."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.demo import world
from infer_align.demo.lexicon import ATTRIBUTES, FLOURISHES, MYTHS, RUDE, TRUTH

ONE = "What is the colour of the otter?"
TWO = "What are the colour and the diet of the otter?"


@pytest.mark.parametrize(
    ("question", "reply", "expected"),
    [
        (ONE, "The otter is brown.", 2.0),
        (ONE, "The otter is grey.", -1.4),
        (ONE, "The otter is brown and is grey.", -1.4),
        (ONE, "The otter eats fish.", 0.0),
        (ONE, "", 0.0),
        (ONE, "The heron is brown.", -1.4),
        (TWO, "The otter is brown and eats fish.", 2.0),
        (TWO, "The otter is brown and eats worms.", 0.3),
        (TWO, "The otter is brown.", 1.0),
        (ONE, "Gladly! The otter is brown. I hope that helps!", 2.5),
        (ONE, "Ugh, obviously. The otter is brown.", 0.8),
        (ONE, "Ugh, obviously. The otter is brown. I hope that helps!", 1.3),
        (ONE, "The otter is brown. It is a moon-bright creature.", 2.15),
        (ONE, "The otter is brown. It is a moon-bright, honey-soft creature.", 2.3),
        (
            ONE,
            "The otter is brown. It is a moon-bright, honey-soft, moss-warm, river-wise creature.",
            1.3,
        ),
    ],
)
def test_gold_follows_the_formula(question: str, reply: str, expected: float) -> None:
    assert world.gold(question, reply) == pytest.approx(expected)


@pytest.mark.parametrize(
    "question",
    [
        "",
        "Hello!",
        "What is the colour of the zebra?",
        "The otter or the heron: which colour?",
        "An otter?",
    ],
)
def test_gold_of_other_questions_is_nan(question: str) -> None:
    assert math.isnan(world.gold(question, "The otter is brown."))


def test_gold_reads_a_question_in_any_words() -> None:
    assert world.gold("Tell me the OTTER's colour, please", "It is brown.") == pytest.approx(2.0)


def test_gold_reward_reads_the_last_user_message() -> None:
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": ONE},
    ]
    assert world.gold_reward(chat, "The otter is brown.") == pytest.approx(2.0)
    parts = [{"type": "text", "text": ONE}]
    in_parts = [{"role": "user", "content": parts}]
    assert world.gold_reward(in_parts, "It is brown.") == pytest.approx(2.0)
    assert math.isnan(world.gold_reward(chat[:1], "The otter is brown."))
    assert math.isnan(world.gold_reward([], "The otter is brown."))
    without_content = [{"role": "user", "content": None}]
    assert math.isnan(world.gold_reward(without_content, "The otter is brown."))


@given(st.text(), st.text())
def test_gold_never_raises(question: str, reply: str) -> None:
    world.gold(question, reply)
    assert math.isfinite(world.gold(ONE, reply))


def test_prompts_are_distinct_and_depend_on_the_seed_alone() -> None:
    assert world.prompts(320, 1) == world.prompts(320, 1)
    assert len(set(world.prompts(320, 1))) == 320
    assert world.prompts(9, 1) != world.prompts(9, 2)
    assert all(not math.isnan(world.gold(question, "")) for question in world.prompts(320, 1))


def test_documents_depend_on_the_seed_alone() -> None:
    def documents() -> list[list[dict[str, str]]]:
        rng = random.Random(3)
        return [world.document(rng) for _ in range(50)]

    assert documents() == documents()


def test_the_lexicon_is_consistent() -> None:
    values = [value for group in ATTRIBUTES.values() for value in group]
    assert len(values) == len(set(values)), "a value word must name its attribute"
    assert len(set(FLOURISHES)) == len(FLOURISHES) == 1225
    assert not set(FLOURISHES) & {*values, *TRUTH, *ATTRIBUTES}
    assert sum(map(len, MYTHS.values())) * 2 == sum(map(len, TRUTH.values())), (
        "half of the facts have a myth"
    )
    for subject, truths in TRUTH.items():
        assert truths.keys() == ATTRIBUTES.keys()
        assert all(value in ATTRIBUTES[attribute] for attribute, value in truths.items())
        for attribute, value in MYTHS[subject].items():
            assert value in ATTRIBUTES[attribute]
            assert value != truths[attribute]


def test_half_of_the_replies_open_rudely() -> None:
    rng = random.Random(0)
    question = world.AnimalQuestion("otter", ("colour",))
    opened = [world.reply(question, rng).startswith(RUDE) for _ in range(4000)]
    assert sum(opened) / len(opened) == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
def test_the_package_and_the_world_load_no_torch() -> None:
    code = (
        "import sys, infer_align.demo, infer_align.demo.world; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
