"""The checks that end a serving benchmark when an answer is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.serving.answers import (
    WrongAnswerError,
    check_completions,
    check_equal,
    check_target,
    draw_candidates,
)
from infer_align.engines.fake import Fake, Reply
from infer_align.types import Draw

QUESTION = {"messages": [{"role": "user", "content": "What do owls eat?"}]}
FIXED = {**QUESTION, "max_tokens": 5, "ignore_eos": True}


def answer(*texts: str, tokens: int = 5, reason: str | None = "stop") -> dict[str, Any]:
    choices = []
    for index, text in enumerate(texts):
        message = {"role": "assistant", "content": text}
        choices.append({"index": index, "message": message, "finish_reason": reason})
    return {"choices": choices, "usage": {"completion_tokens": tokens}}


def test_right_answers_pass() -> None:
    check_completions(QUESTION, [answer("Mice."), answer("Voles.")])
    check_completions({**FIXED, "n": 2}, [answer("Mice.", "Voles.", tokens=10)])
    check_completions({**FIXED, "align": {"best_of_n": {"n": 8}}}, [answer("Mice.", tokens=40)])
    check_completions({**FIXED, "align": {"rps": {"k": 5}}}, [answer("Mice.", tokens=25)])


@pytest.mark.parametrize(
    ("body", "wrong", "message"),
    [
        ({**QUESTION, "n": 2}, answer("Mice."), "1 choices; must be 2"),
        (QUESTION, answer(""), "not complete"),
        (QUESTION, answer("Mice.", reason=None), "not complete"),
        (FIXED, answer("Mice.", tokens=4), "4 tokens were sampled; must be 5"),
        ({**FIXED, "align": {"best_of_n": {"n": 8}}}, answer("Mice."), "must be 40"),
    ],
)
def test_one_wrong_answer_ends_the_benchmark(
    body: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    right = answer(*["Mice."] * body.get("n", 1), tokens=40 if "align" in body else 5)
    with pytest.raises(WrongAnswerError, match=message):
        check_completions(body, [right, wrong])


def test_scripted_servers_must_give_the_same_texts() -> None:
    check_equal(answer("Mice."), answer("Mice.", tokens=9))
    with pytest.raises(WrongAnswerError, match="different answers"):
        check_equal(answer("Mice."), answer("Voles."))


def target(answered: int, failed: int, returned: int) -> dict[str, Any]:
    return {
        "requests": {"answered": answered, "failed": failed},
        "errors": {"timeout": failed},
        "tokens": {"returned": returned},
    }


def test_a_report_with_failures_or_short_answers_is_refused() -> None:
    check_target(target(4, 0, 20), 5)
    with pytest.raises(WrongAnswerError, match="1 requests failed"):
        check_target(target(3, 1, 15), 5)
    with pytest.raises(WrongAnswerError, match="19 tokens were returned; must be 20"):
        check_target(target(4, 0, 19), 5)


@pytest.mark.anyio
async def test_a_failed_candidate_ends_the_benchmark() -> None:
    engine = Fake(replies=(Reply("Owls eat mice."), Reply("", error="out of memory"))).load()
    await engine.start()
    try:
        (candidate,) = await draw_candidates(engine, Draw(QUESTION, 1, (0,)), None)
        with pytest.raises(WrongAnswerError, match="must be 99"):
            await draw_candidates(engine, Draw(QUESTION, 1, (0,)), 99)
        with pytest.raises(WrongAnswerError, match="out of memory"):
            await draw_candidates(engine, Draw(QUESTION, 2, (0, 1)), None)
    finally:
        await engine.close()
    assert candidate.text == "Owls eat mice."
