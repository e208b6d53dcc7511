"""Log-probabilities of given texts in vLLM, against the embedded engine with the same model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.engines import Engine
from infer_align.engines.transformers import Transformers
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.types import Capability
from tests.engines.vllm.stepping import WARNINGS
from tests.server.conftest import Live

pytestmark = [*WARNINGS, pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.anyio]
QUESTION = [{"role": "user", "content": "What do owls eat?"}]
# Longer than two blocks of the prefix cache.
LONG = [{"role": "user", "content": "The owl is kind. " * 24 + "What do owls eat?"}]
TEXTS = ("Owls eat mice.", "", "m", "The owl eats mice<|end|> and more.", "Owls eat mice, kindly.")


async def in_server(live: Live, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the event loop of the server, where its engine lives."""
    loop = live.server.config.app.state.loading.get_loop()
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


@asynccontextmanager
async def embedded() -> AsyncIterator[Engine]:
    engine = Transformers(model="demo", dtype="float32").load()
    await engine.start()
    yield engine
    await engine.close()


def same(answer: SequenceLogprobs, expected: SequenceLogprobs) -> None:
    assert [len(each) for each in answer.logprobs] == [len(each) for each in expected.logprobs]
    for got, each in zip(answer.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(got, each, atol=1e-4)
    np.testing.assert_allclose(answer.sums, expected.sums, atol=1e-3)
    assert answer.prompt_tokens == expected.prompt_tokens
    assert answer.text_tokens == expected.text_tokens


async def test_log_probabilities_equal_those_of_the_embedded_engine(live: Live) -> None:
    engine = live.service.engine
    assert Capability.SEQUENCE_LOGPROBS in engine.capabilities
    continued = [*QUESTION, {"role": "assistant", "content": "Owls eat"}]
    bodies: list[dict[str, Any]] = [
        {"messages": QUESTION},
        {"messages": LONG},
        {"messages": continued, "continue_final_message": True, "add_generation_prompt": False},
    ]
    queries = [SequenceQuery(body, TEXTS) for body in bodies]
    answered = [*QUESTION, {"role": "assistant", "content": "Owls eat mice."}]
    queries.append(SequenceQuery({"messages": answered}, ("Thanks!", "No."), role="user"))
    queries.append(SequenceQuery({"prompt": "the owl ea"}, ("ts mice", " "), kind="completion"))
    queries.append(SequenceQuery({"prompt": [40, 41, 42]}, ("ts mice",), kind="completion"))
    async with embedded() as reference:
        for query in queries:
            expected = await reference.sequence_logprobs(query)
            same(await in_server(live, engine.sequence_logprobs(query)), expected)
            # Now the prefix cache holds the prompt, and perhaps some of the texts.
            same(await in_server(live, engine.sequence_logprobs(query)), expected)


async def test_tokens_of_a_text_that_are_cached_are_read_again(live: Live) -> None:
    # More than two blocks after the same words, which the second text finds in the cache.
    begun = "the owl is kind and " * 8
    texts = (begun + "eats mice", begun + "sleeps", begun + "eats mice")
    query = SequenceQuery({"messages": LONG}, texts)
    async with embedded() as reference:
        expected = await reference.sequence_logprobs(query)
        for _ in range(2):
            same(await in_server(live, live.service.engine.sequence_logprobs(query)), expected)


async def test_a_prompt_is_read_once_for_all_texts(live: Live) -> None:
    words = "A prompt that no other test has read before this one. " * 3
    query = SequenceQuery({"messages": [{"role": "user", "content": words}]}, ("a b",) * 6)
    hits = live.metric("vllm:prefix_cache_hits_total")
    answer = await in_server(live, live.service.engine.sequence_logprobs(query))
    blocks = answer.prompt_tokens // 32
    assert blocks >= 2
    assert live.metric("vllm:prefix_cache_hits_total") - hits >= 6 * 32 * (blocks - 1)


async def test_a_text_that_fills_the_context_is_read_and_a_longer_one_is_refused(
    live: Live,
) -> None:
    engine = live.service.engine
    empty = await in_server(
        live, engine.sequence_logprobs(SequenceQuery({"messages": QUESTION}, ("",)))
    )
    room = engine.context_length - empty.prompt_tokens
    full = SequenceQuery({"messages": QUESTION}, ("x" * room,))
    answer = await in_server(live, engine.sequence_logprobs(full))
    assert len(answer.logprobs[0]) == room
    with pytest.raises(InvalidRequest, match=rf"text 1: .* the context of {engine.context_length}"):
        await in_server(
            live,
            engine.sequence_logprobs(
                SequenceQuery({"messages": QUESTION}, ("a", "x" * (room + 1)))
            ),
        )


async def test_values_and_wrong_prompts_are_refused_by_name(live: Live) -> None:
    engine = live.service.engine
    with pytest.raises(Unsupported, match="values: helpful cannot be read"):
        await in_server(
            live,
            engine.sequence_logprobs(
                SequenceQuery({"messages": QUESTION}, ("a",), values=("helpful",))
            ),
        )
    for prompt in ([], [10**6], [-1]):
        query = SequenceQuery({"prompt": prompt}, ("a",), kind="completion")
        with pytest.raises(InvalidRequest, match="prompt"):
            await in_server(live, engine.sequence_logprobs(query))


async def test_a_cancelled_query_leaves_no_request(live: Live) -> None:
    query = SequenceQuery({"messages": LONG}, tuple(f"text {i} of many" for i in range(40)))
    loop = live.server.config.app.state.loading.get_loop()
    call = asyncio.run_coroutine_threadsafe(live.service.engine.sequence_logprobs(query), loop)
    call.cancel()
    assert live.until(lambda: not live.metric("vllm:num_requests_running"))
    assert live.until(lambda: not live.service.engine._started.engine.get_num_unfinished_requests())
