"""A completion: OpenAI's fields, usage of all candidates, and the `align` report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from infer_align.config.align import Align, parse_align
from infer_align.flow.plan import Plan
from infer_align.flow.request import Request
from infer_align.flow.response import Response, Timing
from infer_align.types import Candidate, Draw, Scores, ScoringUsage, Selection
from infer_align_server.wire.completion import (
    align_json,
    completion_json,
    scores_json,
    usage_json,
)

HEAD = {"id": "x-1", "created": 1, "model": "owl"}
NO_ALIGN = Align()
NO_SCORES = Scores()


def answer(index: int, text: str, **fields: Any) -> Candidate:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    tokens = {"prompt_tokens": 5, "completion_tokens": 2 + index}
    return Candidate(index, choice, **{**tokens, **fields})


def respond(
    *candidates: Candidate,
    align: Align = NO_ALIGN,
    scores: Scores = NO_SCORES,
    returned: int = 1,
) -> Response:
    """Return the response that ranks the candidates by their index."""
    n = len(candidates)
    request = Request({"prompt": "hi"}, align=align, aligned=align is not NO_ALIGN)
    plan = Plan((Draw({}, n),), request=request, methods=("best_of_n",), n_returned=returned)
    values = {name: members.mean(axis=0) for name, members in scores.members.items()}
    ranking = tuple(range(n))
    selection = Selection(ranking, (0.5,) * n, values, {}, "highest of all")
    return Response(plan, candidates, scores, selection, Timing(0.1, 0.2, 0.3))


def test_the_choice_is_as_the_engine_made_it() -> None:
    candidate = answer(0, "mice", response_fields={"system_fingerprint": "fp"})
    body = completion_json([respond(candidate, answer(1, "voles"))], HEAD)
    assert body["choices"] == [{"index": 0, **candidate.choice}]
    assert body["object"] == "chat.completion"
    assert body["system_fingerprint"] == "fp"
    assert {key: body[key] for key in HEAD} == HEAD
    assert "align" not in body


def test_returned_choices_are_numbered_from_zero() -> None:
    body = completion_json(
        [respond(answer(0, "a"), answer(1, "b"), answer(2, "c"), returned=2)], HEAD
    )
    assert [choice["index"] for choice in body["choices"]] == [0, 1]


def test_usage_counts_every_candidate_and_its_prompt_once() -> None:
    usage = usage_json(respond(answer(0, "a"), answer(1, "b"), answer(2, "c")))
    assert usage["prompt_tokens"] == 5
    assert usage["completion_tokens"] == 2 + 3 + 4
    assert usage["total_tokens"] == 5 + 9
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == 2
    assert details["rejected_prediction_tokens"] == 3 + 4


@pytest.mark.parametrize(
    ("cached", "total"), [((2, 3), 5), ((4, 4), 5), ((True, 2), 2), ((-1, 2), 2), (("3", 2), 2)]
)
def test_details_of_the_engine_are_summed_within_their_total(
    cached: tuple[Any, Any], total: int
) -> None:
    candidates = []
    for index, tokens in enumerate(cached):
        usage = {"prompt_tokens_details": {"cached_tokens": tokens}}
        candidates.append(answer(index, "a", response_fields={"usage": usage}))
    assert usage_json(respond(*candidates))["prompt_tokens_details"]["cached_tokens"] == total


@pytest.mark.parametrize("details", ["none", "scores", "candidates"])
def test_the_report_has_the_requested_details(details: str) -> None:
    align = parse_align({"best_of_n": {"n": 2}, "details": details})
    body = completion_json([respond(answer(0, "a"), answer(1, "b"), align=align)], HEAD)
    assert ("align" in body) == (details != "none")
    if details != "none":
        choices = ["choice" in candidate for candidate in body["align"]["candidates"]]
        assert choices == [details == "candidates"] * 2


def test_the_report_explains_the_selection() -> None:
    scores = Scores(usage=ScoringUsage(reward_tokens=7))
    report = align_json(respond(answer(0, "a"), answer(1, "b", calls=3), scores=scores))
    assert report["selected"] == 0
    assert report["reason"] == "highest of all"
    assert report["usage"]["engine_calls"] == 1 + 3
    assert report["usage"]["candidate_tokens"] == 2 + 3
    assert report["usage"]["reward_tokens"] == 7
    assert report["timing"]["total_seconds"] == 0.3


def test_a_missing_score_is_null_and_has_its_note() -> None:
    members = np.array([[1.0, math.nan], [3.0, 5.0]])
    scores = Scores({"quality": members}, notes={"quality": (None, "member 0 failed")})
    response = respond(answer(0, "a"), answer(1, "b"), scores=scores)
    first, second = (scores["quality"] for scores in scores_json(response))
    assert first == {"value": 2.0, "std": 1.0, "members": [1.0, 3.0]}
    assert second["members"] == [None, 5.0]
    assert second["value"] is None
    assert second["note"] == "member 0 failed"
