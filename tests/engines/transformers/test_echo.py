"""A text completion that echoes its prompt with logprobs, and another server that reads them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from infer_align.decoding.sequences import SequenceQuery
from infer_align.errors import Unavailable

pytestmark = pytest.mark.anyio


async def test_an_echo_has_the_logprobs_of_the_prompt(serving, draw, finish):
    async with serving(model="demo") as engine:
        prompt = "the owl eats"
        plain = draw(prompt, kind="completion", max_tokens=3, seed=3, logprobs=0, n=2)
        echoed = draw(prompt, kind="completion", max_tokens=3, seed=3, logprobs=0, n=2, echo=True)
        answers, _ = await finish(engine, plain)
        echoes, deltas = await finish(engine, echoed)
        for answer, echo in zip(answers, echoes, strict=True):
            assert echo.text == prompt + answer.text
            listed, own = echo.choice["logprobs"], answer.choice["logprobs"]
            length = answer.prompt_tokens
            assert "".join(listed["tokens"][:length]) == prompt
            assert listed["tokens"][length:] == own["tokens"]
            assert listed["token_logprobs"][length:] == pytest.approx(own["token_logprobs"])
            assert listed["token_logprobs"][0] is None
            assert listed["text_offset"][0] == 0
            assert listed["top_logprobs"] is None
            query = SequenceQuery({"prompt": "the owl"}, (" eats",), kind="completion")
            read = await engine.sequence_logprobs(query)
            end = listed["token_logprobs"][length - len(read.logprobs[0]) : length]
            np.testing.assert_allclose(end, read.logprobs[0], atol=1e-4)
        first = next(delta for delta in deltas if delta.index == 0)
        assert first.choice["text"].startswith(prompt)
        assert len(first.choice["logprobs"]["tokens"]) > length


async def test_a_closed_engine_ends_an_echo(serving, draw, finish):
    async with serving() as engine:
        request = draw("the cat", kind="completion", max_tokens=3, logprobs=0, echo=True)
        task = asyncio.create_task(finish(engine, request))
        await asyncio.sleep(0)
        await engine.close()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, Unavailable) or len(result[0]) == 1
