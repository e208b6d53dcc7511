"""Tests of the room that answers and contexts take."""

from __future__ import annotations

import pytest

from infer_align.engines.transformers.room import (
    FieldNames,
    Room,
    completion_tokens,
    guided_tokens,
)
from infer_align.errors import InvalidRequest
from infer_align.types import Body, Draw, Kind

ROOM = Room(context_length=100, capacity=400, max_batch=4)


@pytest.mark.parametrize(
    ("requested", "default", "tokens"),
    [(30, None, 30), (70, 16, 70), (None, None, 70), (None, 16, 16), (None, 500, 70)],
)
def test_an_answer_gets_what_was_requested_or_what_fits(
    requested: int | None, default: int | None, tokens: int
) -> None:
    fields = FieldNames("messages", "max_tokens")
    assert completion_tokens(fields, 30, requested, default, ROOM) == tokens


@pytest.mark.parametrize(
    ("kind", "body", "prompt_tokens", "param"),
    [
        ("chat", {"max_tokens": 71}, 30, "max_tokens"),
        ("chat", {"max_completion_tokens": 71}, 30, "max_completion_tokens"),
        ("chat", {"max_completion_tokens": 71, "max_tokens": 5}, 30, "max_completion_tokens"),
        ("chat", {}, 100, "messages"),
        ("chat", {"max_tokens": 1}, 100, "messages"),
        ("completion", {"max_tokens": 71}, 30, "max_tokens"),
        ("completion", {}, 100, "prompt"),
    ],
)
def test_an_answer_without_room_is_refused_by_the_field_of_the_request(
    kind: Kind, body: Body, prompt_tokens: int, param: str
) -> None:
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    fields = FieldNames.of(Draw(body, kind=kind))
    with pytest.raises(InvalidRequest, match=f"^{param}: {prompt_tokens} tokens of") as error:
        completion_tokens(fields, prompt_tokens, limit, None, ROOM)
    assert (error.value.param, error.value.code) == (param, "context_length_exceeded")
    small = Room(context_length=100, capacity=50, max_batch=4)
    with pytest.raises(InvalidRequest, match=r"^max_tokens: a candidate of 51 tokens") as error:
        completion_tokens(FieldNames("prompt", "max_tokens"), 30, 21, None, small)
    assert error.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("traits", "contexts", "requested", "tokens"),
    [
        # The longest context leaves 40 of 100 tokens.
        ({"cheerful": 60, "brief": 35}, 3, None, 40),
        ({"cheerful": 60, "brief": 35}, 3, 20, 20),
        # Four contexts share 400 cells: 100 columns each.
        ({"cheerful": 99}, 4, None, 1),
    ],
)
def test_a_guided_answer_is_shortened_to_what_its_contexts_leave(
    traits: dict[str, int], contexts: int, requested: int | None, tokens: int
) -> None:
    maximum = requested or 70
    assert guided_tokens(traits, contexts, requested, maximum, ROOM) == tokens


@pytest.mark.parametrize(
    ("traits", "contexts", "requested", "param", "words"),
    [
        ({"a": 10}, 5, 1, "align.guidance.scale", "takes 5 rows of the batch"),
        ({"a": 10, "b": 95}, 3, 10, "align.guidance.scale.b", "95 tokens and 10 of completion"),
        ({"a": 100}, 2, None, "align.guidance.scale.a", "100 tokens, which do not fit"),
        ({"a": 60}, 4, 41, "align.guidance.scale.a", "context of 100"),
    ],
)
def test_contexts_without_room_are_refused_by_name(
    traits: dict[str, int], contexts: int, requested: int | None, param: str, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words) as error:
        guided_tokens(traits, contexts, requested, 1, ROOM)
    assert error.value.param == param


def test_contexts_that_do_not_fit_the_cache_together_are_refused() -> None:
    small = Room(context_length=100, capacity=200, max_batch=4)
    with pytest.raises(InvalidRequest, match=r"4 contexts of 70 tokens .* cache of 200") as error:
        guided_tokens({"a": 50}, 4, 20, 20, small)
    assert error.value.param == "align.guidance.scale"
    assert guided_tokens({"a": 50}, 2, 20, 20, small) == 20
