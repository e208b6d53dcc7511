"""Say which candidates are answers, and what of them rewards and rules read.

A client may write the beginning of an answer; every candidate continues it. A client may also ask
for its own text before each answer, with `echo`. Neither may change which candidate is best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from infer_align.flow.plan import Plan
from infer_align.messages import message_text, text_of
from infer_align.types import Candidate


def in_play(plan: Plan, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that can be compared.

    A deadline, or the content filter of an upstream, may cut a candidate before its first word. It
    is compared only if all are like that: otherwise a reward for short answers would choose it.
    """
    eligible = [candidate for candidate in candidates if candidate.eligible]
    answers: list[Candidate] = []
    for candidate in eligible:
        if cut_by(candidate) is None or without_echo(plan, candidate).text.strip():
            answers.append(candidate)
    return answers or eligible


def cut_by(candidate: Candidate) -> str | None:
    """Return what ended a candidate, if neither the model nor a limit of tokens did."""
    if candidate.finish_reason == "content_filter":
        return "a content filter"
    return "the deadline" if candidate.interrupted else None


def whole_answer(plan: Plan, candidate: Candidate) -> Candidate:
    """Return a candidate without the echo, and with the beginning that the client wrote."""
    answer = without_echo(plan, candidate)
    message = answer.choice.get("message")
    if not plan.begun_answer or not isinstance(message, Mapping):
        return answer
    return _with_content(answer, message, plan.begun_answer + text_of(message.get("content")))


def without_echo(plan: Plan, candidate: Candidate) -> Candidate:
    """Return a candidate without the text of the client that the engine repeated before it."""
    echo = _echo(plan)
    if not echo:
        return candidate
    message = candidate.choice.get("message")
    if isinstance(message, Mapping):
        content = text_of(message.get("content"))
        return _with_content(candidate, message, content.removeprefix(echo))
    text = candidate.choice.get("text") or ""
    return replace(candidate, choice={**candidate.choice, "text": text.removeprefix(echo)})


def _echo(plan: Plan) -> str:
    """Return the text that the engine repeats before every answer, or "".

    A text completion repeats its prompt. A chat of vLLM repeats the last message, if its role is
    that of the answer.
    """
    request = plan.request
    if not request.body.get("echo") or not plan.messages:
        return ""
    if request.kind == "completion":
        return message_text(plan.messages[-1])
    last = request.body["messages"][-1]
    if last.get("role") == "assistant" or request.body.get("add_generation_prompt") is False:
        return message_text(last)
    return ""


def _with_content(candidate: Candidate, message: Mapping[str, Any], content: str) -> Candidate:
    choice = {**candidate.choice, "message": {**message, "content": content}}
    return replace(candidate, choice=choice)
