"""Tests of label probabilities, against one forward pass of the complete text per path."""

from __future__ import annotations

import asyncio
import math
from collections import deque

import numpy as np
import pytest
import torch

from infer_align.decoding.labels import LabelQuery, LabelTree
from infer_align.engines.transformers.reading import take_group
from infer_align.errors import AlignError, EngineFailed, Unavailable, Unsupported
from infer_align.types import Capability

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
HUNDRED = tuple(str(i) for i in range(1, 101))


def question(text: str, labels: tuple[str, ...] = HUNDRED, prefix: str = "Score: [") -> LabelQuery:
    return LabelQuery([{"role": "user", "content": text}], prefix, labels)


@torch.inference_mode()
def alone(engine, query: LabelQuery) -> dict[str, float]:
    """Return the logprobs from one forward pass of the complete text per path."""
    model = engine.frozen
    text = (
        model.tokenizer.apply_chat_template(
            query.messages, tokenize=False, add_generation_prompt=True
        )
        + query.prefix
    )
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tree = LabelTree(model.tokenizer.get_vocab(), query.labels)
    measured = {}
    for path, tokens in tree.readings.items():
        logits = model.lm(torch.tensor([[*ids, *path]], device=model.device)).logits[0, -1].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        measured[path] = {token: float(logprobs[token]) for token in tokens}
    return tree.logprobs(measured)


def same(reading, expected: dict[str, float]) -> None:
    assert reading.logprobs.keys() == expected.keys()
    np.testing.assert_allclose(
        [math.exp(p) for p in reading.logprobs.values()],
        [math.exp(p) for p in expected.values()],
        atol=1e-6,
    )
    assert max(math.exp(p) for p in expected.values()) > 1e-6


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Mistral", "Gemma2", "Gemma3Text"])
@pytest.mark.parametrize(
    "labels", [HUNDRED, HUNDRED[:10], ("A", "B", "C")], ids=["hundred", "ten", "letters"]
)
async def test_the_distribution_is_that_of_the_model(serving, architecture, labels):
    async with serving(architecture) as engine:
        assert Capability.LABEL_LOGPROBS in engine.capabilities
        query = question("the cat sat on the mat", labels)
        reading = await engine.read_labels(query)
        same(reading, alone(engine, query))
        assert reading.prompt_tokens > 10
        assert reading.calls == len(LabelTree(engine.frozen.tokenizer.get_vocab(), labels).readings)


# The attention of this Mistral reaches eight columns back.
@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@pytest.mark.parametrize("prefill_tokens", [16, 1024])
async def test_questions_at_once_give_the_same_as_alone(serving, architecture, prefill_tokens):
    texts = [
        "the cat sat on the mat " * 4 + tail
        for tail in ("", "and", "and then it was gone", "b c d", "x " * 30)
    ]
    texts += ["a dog", "something quite different " * 6]
    async with serving(architecture, prefill_tokens=prefill_tokens) as engine:
        queries = [
            question(text, labels) for text in texts for labels in (HUNDRED, ("A", "B", "C"))
        ]
        readings = await asyncio.gather(*(engine.read_labels(query) for query in queries))
        for query, reading in zip(queries, readings, strict=True):
            same(reading, alone(engine, query))


async def test_readings_do_not_change_what_is_decoded(serving, draw, finish):
    async with serving("Llama") as engine:
        (quiet,), _ = await finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        task = asyncio.create_task(
            finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        )
        for i in range(10):
            await engine.read_labels(question(f"number {i}"))
        (busy,), _ = await task
        assert busy.choice == quiet.choice


async def test_a_small_cache_is_enough(serving):
    async with serving("Llama") as plain:
        cell = plain.frozen.cell_bytes
        query = question("the cat sat on the mat " * 3)
        expected = alone(plain, query)
    async with serving("Llama", kv_cache_gib=cell * 400 / 2**30) as engine:
        for reading in await asyncio.gather(*(engine.read_labels(query) for _ in range(6))):
            same(reading, expected)


async def test_a_prompt_that_does_not_fit_is_refused(serving):
    async with serving("Llama", context_length=64) as engine:
        with pytest.raises(EngineFailed, match="64"):
            await engine.read_labels(question("word " * 200))
        with pytest.raises(Unsupported, match="spelt"):
            await engine.read_labels(question("x", ("\u20ac",)))
        with pytest.raises(AlignError):
            await engine.read_labels(
                LabelQuery([{"role": "user", "content": [{"type": "image_url"}]}], "[", ("A",))
            )


async def test_cancelled_questions_do_not_stop_the_others(serving):
    async with serving("Llama") as engine:
        tasks = [
            asyncio.create_task(engine.read_labels(question(f"number {i}"))) for i in range(20)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in done[::2])
        assert not any(isinstance(result, BaseException) for result in done[1::2])
        await engine.close()
        with pytest.raises(Unavailable):
            await engine.read_labels(question("late"))


async def test_weights_that_are_not_finite_fail_the_reading_only(serving):
    async with serving("Llama") as engine:
        head = engine.frozen.lm.get_output_embeddings().weight
        original = head.detach().clone()
        with torch.no_grad():
            head.fill_(math.nan)
        with pytest.raises(EngineFailed, match="not finite"):
            await engine.read_labels(question("x"))
        with torch.no_grad():
            head.copy_(original)
        same(await engine.read_labels(question("x")), alone(engine, question("x")))


def test_questions_with_a_common_beginning_are_read_together():
    class WithIds:
        def __init__(self, *ids):
            self.ids = list(ids)

    similar = [WithIds(1, 2, 3, 4, 5, i) for i in range(6)]
    other = WithIds(9, 9, 9, 9)
    waiting = deque([*similar[:2], other, *similar[2:]])
    assert take_group(waiting, 1024, 10_000) == similar
    assert [*waiting] == [other]
    waiting = deque(similar)
    assert len(take_group(waiting, 3, 10_000)) == 3
    assert len(take_group(deque(similar), 1024, 12)) == 2
