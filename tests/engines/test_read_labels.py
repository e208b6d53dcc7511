"""What a model says of labels: exact against one forward per path, batched, shared, and beside what is decoded."""

from __future__ import annotations

import asyncio
import math
from collections import deque

import numpy as np
import pytest
import torch

from infer_align.decoding.labels import LabelTree
from infer_align.engines.fake import Fake, ScriptedLabels
from infer_align.engines.transformers.reading import take_group
from infer_align.errors import AlignError, EngineFailed, Unavailable, Unsupported
from infer_align.types import Capability, LabelQuery

pytestmark = pytest.mark.anyio
HUNDRED = tuple(str(i) for i in range(1, 101))


def ask(text: str, labels: tuple[str, ...] = HUNDRED, prefix: str = "Score: [") -> LabelQuery:
    return LabelQuery([{"role": "user", "content": text}], prefix, labels)


@torch.inference_mode()
def alone(engine, query: LabelQuery) -> dict[str, float]:
    """By one plain forward of the whole text for every path."""
    model = engine.frozen
    text = (
        model.tokenizer.apply_chat_template(
            query.messages, tokenize=False, add_generation_prompt=True
        )
        + query.prefix
    )
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tree = LabelTree(model.tokenizer.get_vocab(), query.labels)
    read = {}
    for path, tokens in tree.readings.items():
        logits = model.lm(torch.tensor([[*ids, *path]])).logits[0, -1].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        read[path] = {token: float(logprobs[token]) for token in tokens}
    return tree.logprobs(read)


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
async def test_it_is_the_models_own_distribution(serving, architecture, labels):
    async with serving(architecture) as engine:
        assert Capability.LABEL_LOGPROBS in engine.capabilities
        query = ask("the cat sat on the mat", labels)
        reading = await engine.read_labels(query)
        same(reading, alone(engine, query))
        assert reading.prompt_tokens > 10
        assert reading.calls == len(LabelTree(engine.frozen.tokenizer.get_vocab(), labels).readings)


@pytest.mark.parametrize(
    "architecture", ["Llama", "Mistral"]
)  # the latter's attention reaches eight columns back
@pytest.mark.parametrize("prefill_tokens", [16, 1024])
async def test_many_at_once_are_each_their_own(serving, architecture, prefill_tokens):
    texts = [
        "the cat sat on the mat " * 4 + tail
        for tail in ("", "and", "and then it was gone", "b c d", "x " * 30)
    ]
    texts += ["a dog", "something quite different " * 6]
    async with serving(architecture, prefill_tokens=prefill_tokens) as engine:
        queries = [ask(text, labels) for text in texts for labels in (HUNDRED, ("A", "B", "C"))]
        readings = await asyncio.gather(*(engine.read_labels(query) for query in queries))
        for query, reading in zip(queries, readings, strict=True):
            same(reading, alone(engine, query))


async def test_readings_do_not_disturb_what_is_decoded(serving, draw, finish):
    async with serving("Llama") as engine:
        (quiet,), _ = await finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        task = asyncio.create_task(
            finish(engine, draw("the cat", seed=3, max_tokens=40, ignore_eos=True))
        )
        for i in range(10):
            await engine.read_labels(ask(f"number {i}"))
        (busy,), _ = await task
        assert busy.choice == quiet.choice


async def test_a_little_cache_is_enough(serving):
    async with serving("Llama") as plain:
        cell = plain.frozen.cell_bytes
        query = ask("the cat sat on the mat " * 3)
        expected = alone(plain, query)
    async with serving("Llama", kv_cache_gib=cell * 400 / 2**30) as engine:
        for reading in await asyncio.gather(*(engine.read_labels(query) for _ in range(6))):
            same(reading, expected)


async def test_what_does_not_fit_is_refused(serving):
    async with serving("Llama", context_length=64) as engine:
        with pytest.raises(EngineFailed, match="64"):
            await engine.read_labels(ask("word " * 200))
        with pytest.raises(Unsupported, match="spelt"):
            await engine.read_labels(ask("x", ("\u20ac",)))
        with pytest.raises(AlignError):
            await engine.read_labels(
                LabelQuery([{"role": "user", "content": [{"type": "image_url"}]}], "[", ("A",))
            )


async def test_leaving_and_closing(serving):
    async with serving("Llama") as engine:
        tasks = [asyncio.create_task(engine.read_labels(ask(f"number {i}"))) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(found, asyncio.CancelledError) for found in done[::2])
        assert not any(isinstance(found, BaseException) for found in done[1::2])
        await engine.close()
        with pytest.raises(Unavailable):
            await engine.read_labels(ask("late"))


async def test_weights_that_are_not_finite_fail_the_reading_not_the_engine(serving):
    async with serving("Llama") as engine:
        head = engine.frozen.lm.get_output_embeddings().weight
        kept = head.detach().clone()
        with torch.no_grad():
            head.fill_(math.nan)
        with pytest.raises(EngineFailed, match="not finite"):
            await engine.read_labels(ask("x"))
        with torch.no_grad():
            head.copy_(kept)
        same(await engine.read_labels(ask("x")), alone(engine, ask("x")))


def test_what_begins_alike_is_read_together():
    class Asked:
        def __init__(self, *ids):
            self.ids = list(ids)

    like, other = [Asked(1, 2, 3, 4, 5, i) for i in range(6)], Asked(9, 9, 9, 9)
    waiting = deque([*like[:2], other, *like[2:]])
    assert take_group(waiting, 1024, 10_000) == like
    assert [*waiting] == [other]
    waiting = deque(like)
    assert len(take_group(waiting, 3, 10_000)) == 3
    assert len(take_group(deque(like), 1024, 12)) == 2


async def test_the_script_of_the_fake_engine():
    script = (
        ScriptedLabels({"5": 0.5, "4": 0.25}, "good"),
        ScriptedLabels({"A": 1.0}),
        ScriptedLabels({}, "broken", error="no judge today"),
    )
    engine = Fake(labels=script).load()
    await engine.start()
    reading = await engine.read_labels(ask("a good one", ("1", "4", "5")))
    assert {label: round(math.exp(p), 9) for label, p in reading.logprobs.items()} == {
        "1": 0.0,
        "4": 0.25,
        "5": 0.5,
    }
    assert (await engine.read_labels(ask("x", ("A", "B")))).logprobs == {"A": 0.0, "B": -math.inf}
    even = await engine.read_labels(ask("bad", ("1", "2")))
    assert all(math.isclose(p, math.log(0.5)) for p in even.logprobs.values())
    assert len(engine.queries) == 3
    with pytest.raises(EngineFailed, match="no judge"):
        await engine.read_labels(ask("broken", ("1", "2")))
