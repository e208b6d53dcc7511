"""Each rule by itself, and their sum."""

from __future__ import annotations

import pytest

from infer_align.errors import ConfigError
from infer_align.rewards.rules import Rules
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio


def candidate(text: str, reason: str = "stop") -> Candidate:
    return Candidate(
        0, {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    )


RULES = [
    (Rules(target_words=4), "one two three four", 0.0),
    (Rules(target_words=4), "one two three", -0.25),
    (Rules(target_words=4), "one two three four five six", -0.5),
    (Rules(target_words=4), "", -1.0),
    (Rules(words_weight=-0.5), "one  two\nthree", -1.5),
    (Rules(regex=r"\d{3}"), "call 911 now", 1.0),
    (Rules(regex=r"^\d{3}$"), "call 911 now", 0.0),
    (Rules(json_object=True), ' {"a": [1, 2]} ', 1.0),
    (Rules(json_object=True), "[1, 2]", 0.0),
    (Rules(json_object=True), 'Sure: {"a": 1}', 0.0),
    (Rules(json_object=True), '{"a":' * 100_000, 0.0),
    (Rules(require=("please", "thank you")), "Please wait", 0.5),
    (Rules(require=("please",)), "displeased", 0.0),
    (Rules(require=("c++", "é")), "I like C++ and É.", 1.0),
    (Rules(avoid=("sorry", "cannot")), "Sorry, I cannot. Sorry!", -2.0),
    (Rules(avoid=("sorry",)), "fine", 0.0),
    (Rules(words_weight=1.0, regex="two", avoid=("two",)), "one two", 2.0),
]


@pytest.mark.parametrize(("rules", "text", "expected"), RULES)
async def test_a_rule(rules, text, expected):
    marks = await rules.load().score([], [candidate(text)])
    assert marks.values.tolist() == [[[expected]]]


async def test_finished():
    marks = await Rules(finished=True).load().score([], [candidate("a"), candidate("a", "length")])
    assert marks.values.tolist() == [[[0.0, -1.0]]]


async def test_text_completions_and_tool_calls_have_text_too():
    tool = Candidate(
        0, {"message": {"role": "assistant", "content": None}, "finish_reason": "tool_calls"}
    )
    marks = await Rules(words_weight=1.0).load().score([], [Candidate(0, {"text": "a b"}), tool])
    assert marks.values.tolist() == [[[2.0, 0.0]]]


@pytest.mark.parametrize("rules", [Rules(), Rules(regex="(")])
def test_rules_that_say_nothing_are_refused(rules):
    with pytest.raises(ConfigError, match="rules"):
        rules.load()


def test_the_description_names_the_rules():
    assert Rules(regex="a", finished=True).load().description == "rules: regex, finished"
    assert Rules(regex="a", description="politeness").load().description == "politeness"
