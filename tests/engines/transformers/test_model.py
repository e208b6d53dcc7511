"""Greedy decoding equals transformers' own `generate`, token by token, in any batch."""

from __future__ import annotations

import asyncio

import pytest
import torch

from infer_align.errors import ConfigError

pytestmark = pytest.mark.anyio

# Rotary and learned positions, position biases, sliding windows with and without full layers,
# and soft caps.
ARCHITECTURES = ["Llama", "Qwen2", "Mistral", "Gemma2", "Gemma3Text", "GPT2", "Bloom", "OPT"]
PROMPTS = [
    "the cat",
    "a big red ball is in the box with the small blue hat and the dog",
    "sun",
    "the dog ran to the sun",
    "x y",
]


def generate(engine, prompt: str, tokens: int) -> str:
    tokenizer = engine.frozen.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(engine.frozen.device)
    out = engine.frozen.lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


async def answer(engine, draw, finish, prompt: str, tokens: int, **fields):
    body = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
    (candidate,), _ = await finish(engine, draw(prompt, kind="completion", **body))
    assert candidate.completion_tokens == tokens
    return candidate.choice["text"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_greedy_decoding_equals_generate_alone_and_in_a_changing_batch(
    architecture, serving, draw, finish
):
    # With 16 prefill tokens, the long prompt is read in parts.
    async with serving(architecture, prefill_tokens=16) as engine:
        tokens = [10 + 7 * i for i in range(len(PROMPTS))]
        expected = [generate(engine, p, t) for p, t in zip(PROMPTS, tokens, strict=True)]
        alone = [
            await answer(engine, draw, finish, p, t) for p, t in zip(PROMPTS, tokens, strict=True)
        ]
        assert alone == expected

        async def late(i: int) -> str:
            await asyncio.sleep(0.004 * i)
            return await answer(engine, draw, finish, PROMPTS[i], tokens[i])

        assert await asyncio.gather(*map(late, range(len(PROMPTS)))) == expected


@pytest.mark.slow
async def test_the_cache_grows_past_its_first_buffer(serving, draw, finish):
    async with serving() as engine:
        assert await answer(engine, draw, finish, "the cat", 200) == generate(
            engine, "the cat", 200
        )


async def test_decoding_ends_where_generate_ends(serving, draw, finish, language_model):
    async with serving() as engine:
        ids = engine.frozen.tokenizer("sun", return_tensors="pt")["input_ids"]
        ids = ids.to(engine.frozen.device)
        tokens = engine.frozen.lm.generate(
            ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, ids.shape[1] :]
        tokens = tokens.tolist()
    # The same weights, with a token of the greedy answer as the end of sequence.
    async with serving(model=language_model("Llama", eos_token_id=tokens[-1])) as engine:
        (candidate,), _ = await finish(
            engine, draw("sun", kind="completion", max_tokens=30, temperature=0)
        )
        assert candidate.finish_reason == "stop"
        assert candidate.completion_tokens == tokens.index(tokens[-1]) + 1
        assert candidate.text == engine.frozen.tokenizer.decode(
            tokens[: tokens.index(tokens[-1])], skip_special_tokens=True
        )


async def test_the_demo_answers(serving, draw, finish):
    async with serving(model="demo") as engine:
        (candidate,), deltas = await finish(engine, draw("Hello", max_tokens=5))
    assert 1 <= candidate.completion_tokens <= 5
    assert "".join(d.choice["delta"]["content"] for d in deltas) == candidate.text


@pytest.mark.parametrize("architecture", ["Mamba", "Rwkv"])
async def test_a_model_without_keys_and_values_is_refused_at_start(architecture, serving):
    with pytest.raises(ConfigError, match="keys and values"):
        async with serving(architecture):
            pass


async def test_a_context_longer_than_that_of_the_model_is_refused_at_start(serving):
    with pytest.raises(ConfigError, match="context_length: 300 is over the 256"):
        async with serving("GPT2", context_length=300):
            pass
