"""Each rule scores alone, and several rules add up."""

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
    (Rules(avoid=("!",)), "Great! Go on.", -1.0),
    (Rules(avoid=("—",)), "It is—as ever—late.", -1.0),
    (Rules(avoid=("I'm sorry",)), "I’m sorry.", -1.0),
    (Rules(avoid=("as an AI",)), "I speak as an\nAI.", -1.0),
    (Rules(avoid=("对不起",)), "我对不起你。", -1.0),
    (Rules(require=("café",)), "a cafe\u0301", 1.0),
    (Rules(require=("cafe",)), "a cafe\u0301", 0.0),
    (Rules(require=("C++",)), "C++17", 1.0),
    (Rules(require=("no no",)), "hono no no", 1.0),
    (Rules(words_weight=1.0), "你好，世界。 OK then", 6.0),
    (Rules(words_weight=1.0), "ที่นี่", 2.0),
    (Rules(words_weight=1.0), "a - b", 3.0),
    (Rules(json_object=True), '{"a": NaN}', 0.0),
    (Rules(json_object=True), '{"a": -Infinity}', 0.0),
]


@pytest.mark.parametrize(("rules", "text", "expected"), RULES)
async def test_rules_score_text(rules, text, expected):
    scores = await rules.load().score([], [candidate(text)])
    assert scores.values.tolist() == [[[expected]]]


async def test_an_answer_cut_by_the_token_limit_loses_a_point():
    scores = await Rules(finished=True).load().score([], [candidate("a"), candidate("a", "length")])
    assert scores.values.tolist() == [[[0.0, -1.0]]]


async def test_text_completions_and_tool_calls_are_scored():
    tool = Candidate(
        0, {"message": {"role": "assistant", "content": None}, "finish_reason": "tool_calls"}
    )
    scores = await Rules(words_weight=1.0).load().score([], [Candidate(0, {"text": "a b"}), tool])
    assert scores.values.tolist() == [[[2.0, 0.0]]]


@pytest.mark.parametrize(
    "rules", [Rules(), Rules(regex="("), Rules(avoid=("",)), Rules(require=("a", " "))]
)
def test_a_section_without_a_valid_rule_is_refused(rules):
    with pytest.raises(ConfigError, match="rules"):
        rules.load()


def test_the_description_names_the_rules():
    assert Rules(regex="a", finished=True).load().description == "rules: regex, finished"
    assert Rules(regex="a", description="politeness").load().description == "politeness"
