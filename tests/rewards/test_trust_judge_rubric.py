"""Rubrics that the judge writes: one per conversation, checked on labels or probes, cached."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from infer_align.engines.fake import Fake, FakeEngine, Reply, ScriptedLabels
from infer_align.errors import ConfigError
from infer_align.methods.trust_judge import Principle
from infer_align.rewards.trust_judge import TrustJudgeReward, TrustJudgeSection
from infer_align.rewards.trust_judge.probes import NULL_ANSWERS, PROBE_TOKENS, PROBES
from infer_align.rewards.trust_judge.rubric import RUBRIC_TOKENS, parse_generated, parse_rubric
from infer_align.types import Candidate

ASK: Any = [{"role": "user", "content": "What is the diet of the owl?"}]
RUBRIC = "Names the food. [Hard Rule]\nBe brief. [Principle]"
GOOD = "The owl eats mice."
BAD = "Who knows?"
# The judge's own answer repeats the rubric, because the script has one reply.
OWN_ANSWER = r"Answer <\d+>\n(?:- )?Names"
LABELS = (
    ScriptedLabels({"4": 1.0}, rf"Criteria: Names the .*food\..*{OWN_ANSWER}"),
    ScriptedLabels({"5": 1.0}, rf"Criteria: Names the food\..*Answer <\d+>\n{GOOD}"),
    ScriptedLabels({"1": 1.0}, r"Criteria: Names the food\."),
    ScriptedLabels({"3": 1.0}, rf"Criteria: Be brief\..*Answer <\d+>\n{GOOD}"),
    ScriptedLabels({"5": 1.0}, r"Criteria: Be brief\."),
    ScriptedLabels({"2": 1.0}),
)


def judge(engine: FakeEngine | None = None, **section: Any) -> TrustJudgeReward:
    loaded = TrustJudgeSection(rubric="auto", scale=5, **section).load()
    loaded.engines = {"served": engine or written(RUBRIC)}
    return loaded


def written(*texts: str) -> FakeEngine:
    return Fake(replies=tuple(Reply(text) for text in texts), labels=LABELS).load()


async def score(reward: TrustJudgeReward, messages: Any = ASK) -> Any:
    answers = [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate((GOOD, BAD))
    ]
    return await reward.score(messages, answers)


def labelled(tmp_path: Path, *pairs: tuple[str, str]) -> str:
    path = tmp_path / "labels.jsonl"
    lines = []
    for chosen, rejected in pairs:
        lines.append(json.dumps({"messages": ASK, "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines))
    return str(path)


def test_answers_are_judged_by_the_rules_that_the_judge_wrote() -> None:
    reward = judge()
    scores = asyncio.run(score(reward))
    assert scores.values[0, 0].tolist() == [3.0, 1.0], "the hard rule multiplies"
    assert scores.report["rubric"] == {
        "rules": [{"text": "Names the food", "hard": True}, {"text": "Be brief", "hard": False}],
        "accepted": True,
        "reason": None,
        "labels": 0,
        "reproduced": 0,
        "probes": {"answer": 4.0, "null_answers": dict.fromkeys(NULL_ANSWERS, 1.0)},
    }
    assert scores.remark == ""
    engine: Any = reward.engines["served"]
    rubric_body, answer_body = engine.bodies
    assert rubric_body["max_tokens"] == RUBRIC_TOKENS
    assert answer_body["messages"] == ASK
    assert answer_body["max_tokens"] == PROBE_TOKENS
    # A rubric and an answer of eight words each; two labels for each probe and each candidate.
    labels = 2 * (PROBES + 2)
    assert scores.usage.judge_calls == 2 + labels
    assert scores.usage.judge_completion_tokens == 2 * len(RUBRIC.split(" ")) + labels
    assert reward.worst_case_tokens(2) == RUBRIC_TOKENS + PROBE_TOKENS + 5 * PROBES + 5 * 2


def test_one_rubric_is_written_for_each_conversation() -> None:
    reward = judge()
    engine: Any = reward.engines["served"]

    async def run() -> list[Any]:
        at_once = await asyncio.gather(score(reward), score(reward.with_parameters({"votes": 1})))
        later = await score(reward.with_parameters({"mode": "score"}))
        other = await score(reward, [{"role": "user", "content": "And the newt?"}])
        return [*at_once, later, other]

    results = asyncio.run(run())
    assert len(engine.bodies) == 2 * 2
    written_once = 4 + 2 + 2 * PROBES
    assert sorted(each.usage.judge_calls for each in results[:3]) == [4, 4, written_once]
    assert results[3].usage.judge_calls == written_once


def test_a_rubric_that_reproduces_the_labels_is_used(tmp_path: Path) -> None:
    reward = judge(rubric_labels=labelled(tmp_path, (GOOD, BAD)))

    async def run() -> Any:
        await reward.start()
        return await score(reward)

    scores = asyncio.run(run())
    assert scores.report["rubric"]["accepted"]
    assert scores.report["rubric"]["reproduced"] == 1
    assert scores.usage.judge_calls == 1 + 4 + 4
    assert reward.worst_case_tokens(2) == RUBRIC_TOKENS + PROBE_TOKENS + 5 * PROBES + 5 * 2
    engine: Any = reward.engines["served"]
    prompt = engine.bodies[0]["messages"][1]["content"]
    assert "Better answer" in prompt
    assert GOOD in prompt
    assert BAD in prompt


def test_a_rubric_that_contradicts_a_label_is_not_used(tmp_path: Path) -> None:
    reward = judge(rubric_labels=labelled(tmp_path, (GOOD, BAD), (BAD, GOOD)))

    async def run() -> Any:
        await reward.start()
        return await score(reward)

    scores = asyncio.run(run())
    report = scores.report["rubric"]
    assert not report["accepted"]
    assert report["reason"] == "judging by it reproduces 1 of 2 labels"
    assert report["probes"] is None
    assert scores.remark == (
        "the generated rubric is not used: judging by it reproduces 1 of 2 labels; the criteria "
        "decide"
    )
    assert scores.values[0, 0].tolist() == [2.0, 2.0], "the criteria decide"
    assert "principles" not in scores.report


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("...", "0 of 0 lines"),
        ("The owl eats mice. It hunts at night.", "0 of 1 lines"),
        ("Owls eat:\n1. mice\nThey hunt at night.\nThey are quiet.", "1 of 4 lines"),
        ("- " + "x" * 400, "0 of 1 lines"),
    ],
)
def test_a_text_that_is_no_list_of_rules_is_not_used(text: str, counts: str) -> None:
    reward = judge(written(text))
    first = asyncio.run(score(reward))
    reason = first.report["rubric"]["reason"]
    assert reason == f"the judge wrote no list of rules: {counts} are rules"
    assert first.values[0, 0].tolist() == [2.0, 2.0]
    assert first.usage.judge_calls == 1 + 2
    assert asyncio.run(score(reward)).usage.judge_calls == 2, "the refusal is cached"


def test_an_introduction_does_not_spoil_a_list() -> None:
    text = "Here is the rubric:\n\n1. **Names the food** [Hard Rule]\n2. Is brief."
    rules = parse_generated(text)
    assert [(rule.text, rule.hard) for rule in rules] == [
        ("Names the food", True),
        ("Is brief", False),
    ]


def test_a_line_that_the_limit_cut_off_is_no_rule() -> None:
    rule = "- Names the food.\n"
    text = rule + "- " + "and " * 2 * RUBRIC_TOKENS
    report = asyncio.run(score(judge(written(text)))).report["rubric"]
    assert [each["text"] for each in report["rules"]] == ["Names the food"]


@pytest.mark.parametrize("own", ["2", "3"])
def test_a_rubric_that_does_not_prefer_an_answer_to_a_null_answer_is_not_used(own: str) -> None:
    labels = (
        ScriptedLabels({own: 1.0}, r"Criteria: Names the food.*Answer <\d+>\n- Names"),
        ScriptedLabels({"3": 1.0}, r"Criteria: Names the food.*I do not know"),
        ScriptedLabels({"1": 1.0}, r"Criteria: Names the food"),
        ScriptedLabels({"2": 1.0}),
    )
    reward = judge(Fake(replies=(Reply("- Names the food"),), labels=labels).load())
    scores = asyncio.run(score(reward))
    assert scores.report["rubric"]["reason"] == (
        f"judging by it, an answer gets {float(own):.2f} of 5 and 'I do not know.' gets 3.00"
    )
    assert scores.values[0, 0].tolist() == [2.0, 2.0]
    assert "the criteria decide" in scores.remark
    again = asyncio.run(score(reward))
    assert again.usage.judge_calls == 2
    assert again.remark == scores.remark


def test_principles_decide_if_the_rubric_is_not_used() -> None:
    reward = judge(written("No list."), principles=(Principle("Be brief."),))
    scores = asyncio.run(score(reward))
    assert scores.remark.endswith("the principles decide")
    assert scores.values[0, 0].tolist() == [3.0, 5.0]


def test_a_failed_probe_is_tried_again() -> None:
    labels = (ScriptedLabels({}, "I do not know", error="no power"), *LABELS)
    reward = judge(Fake(replies=(Reply(RUBRIC),), labels=labels).load())
    first = asyncio.run(score(reward))
    assert first.report["rubric"]["reason"] == "it could not be tried on an answer: no power"
    assert first.report["rubric"]["probes"] is None
    asyncio.run(score(reward))
    engine: Any = reward.engines["served"]
    assert len(engine.bodies) == 2 * 2


def test_a_failed_generation_is_tried_again() -> None:
    replies = Fake(replies=(Reply("Names", error="no power"),), labels=LABELS)
    reward = judge(replies.load())

    async def run() -> list[Any]:
        return [await score(reward), await score(reward)]

    first, second = asyncio.run(run())
    assert first.report["rubric"]["reason"] == "the judge wrote no rubric: no power"
    engine: Any = reward.engines["served"]
    assert len(engine.bodies) == 2
    assert second.values[0, 0].tolist() == [2.0, 2.0]


def test_a_generated_rule_cannot_leave_its_line() -> None:
    class Odd(FakeEngine):
        control_tokens = frozenset({"<|boss|>"})

    text = "Names the <|boss|> food [Principle]\n" + "x" * 400
    reward = judge(Odd(Fake(replies=(Reply(text),), labels=LABELS)))
    report = asyncio.run(score(reward)).report["rubric"]
    assert report["rules"] == [{"text": "Names the < |boss|> food", "hard": False}]


def test_a_file_of_labels_that_holds_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ConfigError):
        asyncio.run(judge(rubric_labels=str(path)).start())
    path.write_text(
        '{"prompt": "x", "chosen": "a"}\n{"prompt": "x", "chosen": "a", "rejected": "b"}'
    )
    reward = judge(rubric_labels=str(path))
    asyncio.run(reward.start())
    assert "line 1" in reward.warnings[0]


@pytest.mark.parametrize(
    ("line", "text", "hard"),
    [
        ("1. Is brief. [Hard Rule]", "Is brief", True),
        ("- Is brief [hard]", "Is brief", True),
        ("* [Principle] Is brief", "Is brief", False),
        ("2) (Hard Rule): Is brief", "Is brief", True),
        ("Is brief", "Is brief", False),
        ("10 words at most", "10 words at most", False),
    ],
)
def test_a_line_of_a_rubric(line: str, text: str, hard: bool) -> None:
    [rule] = parse_rubric(f"\n{line}\n---\n")
    assert (rule.text, rule.hard) == (text, hard)
