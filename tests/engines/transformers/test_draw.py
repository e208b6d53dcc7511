"""Tests of reading a draw: its prompts as tokens, with the contexts that guide it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infer_align.engines.transformers.draw import read_draw
from infer_align.engines.transformers.room import Room
from infer_align.steering import Contrast, Guidance

pytestmark = pytest.mark.anyio
ROOM = Room(context_length=200, capacity=10_000, max_batch=8)


async def test_contexts_of_the_same_tokens_are_one_context(serving: Any, draw: Any) -> None:
    plain, other = draw("the cat"), draw("the dog")
    contrasts = (
        Contrast("a", 1.0, other.body),
        Contrast("b", 2.0, draw("a hat").body, {**other.body, "user": "somebody"}),
        # The prompt changes nothing that the model sees.
        Contrast("c", 3.0, {**plain.body, "user": "somebody"}),
    )
    async with serving() as engine:
        guided = replace(plain, guidance=Guidance(contrasts, 0.05))
        read = read_draw(guided, engine.frozen, ROOM, None)
        assert read.guiding.prompts == tuple(
            engine.frozen.render(text).ids for text in (other, draw("a hat"))
        )
    pairs = [(p.scale, p.positive, p.negative) for p in read.guiding.candidate.pairs]
    assert pairs == [(1.0, 1, 0), (2.0, 2, 1), (3.0, 0, 0)]
    assert read.guiding.candidate.contexts == 3


async def test_the_limit_of_the_server_is_shortened_and_that_of_the_client_is_not(
    serving: Any, draw: Any
) -> None:
    async with serving() as engine:
        prompt = len(engine.frozen.render(draw()).ids)
        assert read_draw(draw(), engine.frozen, ROOM, 7).max_tokens == 7
        assert read_draw(draw(max_tokens=500), engine.frozen, ROOM, 500).max_tokens == 200 - prompt
        assert read_draw(draw(max_tokens=9), engine.frozen, ROOM, 500).max_tokens == 9
        assert read_draw(draw(), engine.frozen, ROOM, 7).guiding is None
