"""Check the answers that a benchmark counts, so that no speed is reported for wrong ones.

The checks run outside the measured time. The first wrong answer ends the benchmark before a result
is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infer_align.engines import Engine
from infer_align.types import Candidate, Draw


class WrongAnswerError(RuntimeError):
    """An answer is not what the request asked for."""


async def draw_candidates(engine: Engine, draw: Draw, tokens: int | None) -> list[Candidate]:
    """Sample a draw and return its candidates.

    Args:
        engine: started.
        draw: what to sample.
        tokens: the length that every candidate must have; None if it may end by itself.

    Raises:
        WrongAnswerError: a candidate is missing, failed, or has another length.
    """
    candidates = await engine.generate(draw)
    if len(candidates) != draw.n:
        raise WrongAnswerError(f"{len(candidates)} candidates; must be {draw.n}")
    for candidate in candidates:
        if candidate.error is not None:
            raise WrongAnswerError(f"a candidate failed: {candidate.error}")
        if tokens is not None and candidate.completion_tokens != tokens:
            raise WrongAnswerError(f"{candidate.completion_tokens} tokens; must be {tokens}")
    return candidates


def check_completions(body: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """Check the answers to one chat request that was sent several times.

    Args:
        body: the request.
        answers: the JSON of each answer with status 200.

    Raises:
        WrongAnswerError: an answer has another number of choices, an empty one, or, if the request
            fixes the length, another number of tokens.
    """
    for answer in answers:
        choices = answer["choices"]
        expected = body.get("n", 1)
        if len(choices) != expected:
            raise WrongAnswerError(f"{len(choices)} choices; must be {expected}")
        for choice in choices:
            if not choice["message"]["content"] or choice["finish_reason"] is None:
                raise WrongAnswerError(f"a choice is not complete: {choice}")
        _check_length(body, answer)


def _check_length(body: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Check the number of tokens of an answer whose candidates cannot end by themselves."""
    if not body.get("ignore_eos"):
        return
    align = body.get("align", {})
    candidates = body.get("n", 1)
    if "best_of_n" in align:
        candidates = align["best_of_n"]["n"]
    elif "rps" in align:
        candidates = align["rps"]["k"]
    expected = candidates * body["max_tokens"]
    tokens = answer["usage"]["completion_tokens"]
    if tokens != expected:
        raise WrongAnswerError(f"{tokens} tokens were sampled; must be {expected}")


def check_equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Check that two servers gave the same texts.

    Raises:
        WrongAnswerError: they did not.
    """
    texts = []
    for answer in (first, second):
        texts.append([choice["message"]["content"] for choice in answer["choices"]])
    if texts[0] != texts[1]:
        raise WrongAnswerError(f"the servers gave different answers: {texts[0]} and {texts[1]}")


def check_target(target: Mapping[str, Any], tokens: int) -> None:
    """Check the part of a report of `bench serve` that is about one target.

    Args:
        target: from the report's "targets".
        tokens: the length of each returned answer.

    Raises:
        WrongAnswerError: a request failed, or an answer has another length.
    """
    requests = target["requests"]
    if requests["failed"]:
        raise WrongAnswerError(f"{requests['failed']} requests failed: {target['errors']}")
    expected = requests["answered"] * tokens
    returned = target["tokens"]["returned"]
    if returned != expected:
        raise WrongAnswerError(f"{returned} tokens were returned; must be {expected}")
