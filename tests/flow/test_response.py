"""A response: the returned candidates, and the tokens of prompts and of early stopping."""

from __future__ import annotations

import pytest

from infer_align.flow.plan import Plan
from infer_align.flow.response import Response, Timing
from infer_align.types import Candidate, Draw, Scores, Selection

TIMING = Timing(0.0, 0.0, 0.0)
ONE = {"prompt": "one"}
TWO = {"prompt": "two"}


def respond(
    plan: Plan,
    *candidates: Candidate,
    ranking: tuple[int, ...] = (),
    late: bool = False,
) -> Response:
    selection = Selection(ranking, (), {}, {}, "", late=late)
    return Response(plan, candidates, Scores(), selection, TIMING)


def test_the_best_candidates_are_returned_in_order() -> None:
    plan = Plan((Draw(ONE, 3),), n_returned=2)
    candidates = [Candidate(i, {"text": str(i)}) for i in range(3)]
    response = respond(plan, *candidates, ranking=(2, 0, 1))
    assert response.returned == (candidates[2], candidates[0])
    fewer = respond(plan, *candidates, ranking=(1,))
    assert fewer.returned == (candidates[1],)


@pytest.mark.parametrize(
    ("candidate", "late", "partial"),
    [
        (Candidate(0, {}), False, False),
        (Candidate(0, {}), True, True),
        (Candidate(0, {}, interrupted=True), False, True),
        (Candidate(0, {}, interrupted=True, rejected="a low estimate"), False, False),
        (Candidate(0, {}, interrupted=True, rejected="a low estimate"), True, True),
    ],
)
def test_a_response_is_partial_if_a_deadline_cut_it(
    candidate: Candidate, late: bool, partial: bool
) -> None:
    response = respond(Plan((Draw(ONE),)), candidate, late=late)
    assert response.partial is partial


def test_the_prompt_of_one_draw_is_counted_once() -> None:
    failed = Candidate(0, {}, error="boom")
    finished = Candidate(1, {}, prompt_tokens=5)
    assert respond(Plan((Draw(ONE, 2),)), failed, finished).prompt_tokens == 5


def test_each_distinct_prompt_is_counted_once() -> None:
    response = respond(
        Plan((Draw(ONE), Draw(ONE), Draw(TWO, 3))),
        Candidate(0, {}, draw=0, prompt_tokens=5),
        Candidate(1, {}, draw=1, prompt_tokens=5),
        Candidate(2, {}, draw=2, prompt_tokens=7),
        Candidate(3, {}, draw=2, prompt_tokens=7),
        Candidate(4, {}, draw=2, error="boom"),
    )
    assert response.prompt_tokens == 12


def test_a_stopped_candidate_would_have_the_mean_length_of_the_others() -> None:
    response = respond(
        Plan((Draw(ONE, 5),), worst_case_tokens=500),
        Candidate(0, {}, completion_tokens=10),
        Candidate(1, {}, completion_tokens=20),
        Candidate(2, {}, completion_tokens=4, interrupted=True),
        Candidate(3, {}, completion_tokens=30, interrupted=True),
        Candidate(4, {}, completion_tokens=100, error="boom"),
    )
    assert response.saved_tokens == 15 - 4


def test_if_no_candidate_ended_by_itself_the_worst_case_is_the_length() -> None:
    response = respond(
        Plan((Draw(ONE, 3),), worst_case_tokens=80, scoring_tokens=20),
        Candidate(0, {}, completion_tokens=4, interrupted=True),
        Candidate(1, {}, completion_tokens=20, interrupted=True),
        Candidate(2, {}, completion_tokens=15, interrupted=True),
    )
    assert response.saved_tokens == (20 - 4) + 0 + (20 - 15)


def test_without_early_stopping_nothing_is_saved() -> None:
    candidates = (Candidate(0, {}, completion_tokens=3), Candidate(1, {}, completion_tokens=9))
    assert respond(Plan((Draw(ONE, 2),), worst_case_tokens=20), *candidates).saved_tokens == 0


def test_contexts_are_counted_once_per_draw_and_their_answers_once_per_candidate() -> None:
    first = {"draw": 0, "context_prompt_tokens": 50}
    response = respond(
        Plan((Draw(ONE, 2), Draw(TWO, 2))),
        Candidate(0, {}, **first, context_completion_tokens=6),
        Candidate(1, {}, **first, context_completion_tokens=9),
        Candidate(2, {}, draw=1, context_prompt_tokens=30, context_completion_tokens=4),
        Candidate(3, {}, draw=1, error="boom"),
    )
    assert response.context_tokens == (50 + 6 + 9) + (30 + 4)
