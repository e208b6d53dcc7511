"""Tests of guided decoding against a reference without cache and batch.

The reference reads every context of a candidate again for each token, in float32, and applies the
float64 definition.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from infer_align.decoding.text import token_bytes
from infer_align.errors import InvalidRequest
from infer_align.methods.guidance import guide
from infer_align.steering import Contrast, Guidance
from infer_align.types import Candidate, Draw
from tests.engines.transformers.test_scheduler import Forwards, idle

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


def with_system(draw: Draw, text: str) -> Any:
    """Return the body of a draw with a text before it."""
    if draw.kind == "completion":
        return {**draw.body, "prompt": f"{text} {draw.body['prompt']}"}
    return {**draw.body, "messages": [{"role": "system", "content": text}, *draw.body["messages"]]}


def guided(
    draw: Draw, *traits: tuple[float, str, str | None], min_p: float = 0.0, **fields: Any
) -> Draw:
    """Return the draw, guided by traits: (scale, prompt, negative prompt)."""
    contrasts = []
    for i, (scale, prompt, negative) in enumerate(traits):
        body = None if negative is None else with_system(draw, negative)
        contrasts.append(Contrast(f"trait{i}", scale, with_system(draw, prompt), body))
    return replace(draw, guidance=Guidance(tuple(contrasts), min_p), **fields)


class Reference:
    """The definition, token by token: every forward pass reads the complete context again."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.lm = AutoModelForCausalLM.from_pretrained(
            engine.config.model, dtype=torch.float32
        ).eval()

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        return self.lm(torch.tensor([ids])).logits[0, -1].double().numpy()

    def logprobs(self, ids: list[int]) -> np.ndarray:
        return torch.log_softmax(torch.from_numpy(self.logits(ids)), -1).numpy()

    def greedy(self, draw: Draw, n: int) -> tuple[list[int], list[float], list[float]]:
        """Return tokens, logprobs under the guided logits, and logprobs of the frozen model."""
        model = self.engine.frozen
        contrasts = draw.guidance.contrasts
        prompt = model.render(draw).ids
        contexts = []
        for contrast in contrasts:
            negative = contrast.negative_body
            bodies = (contrast.body, draw.body if negative is None else negative)
            contexts.append([model.render(replace(draw, body=body)).ids for body in bodies])
        tokens: list[int] = []
        aligned: list[float] = []
        frozen: list[float] = []
        for _ in range(n):
            pairs = [[self.logprobs(ids + tokens) for ids in pair] for pair in contexts]
            scales = [contrast.scale for contrast in contrasts]
            logits = guide(self.logits(prompt + tokens), pairs, scales, draw.guidance.min_p)
            token = int(logits.argmax())
            aligned.append(float(torch.log_softmax(torch.from_numpy(logits), -1)[token]))
            frozen.append(float(self.logprobs(prompt + tokens)[token]))
            tokens.append(token)
            if token in model.eos:
                break
        return tokens, aligned, frozen


TRAITS: list[tuple[tuple[float, str, str | None], ...]] = [
    ((2.0, "the dog ran", None),),
    ((-1.5, "a big red ball is in the box", "the sun"),),
    ((1.0, "the cat", None), (3.0, "a small hat", None), (-0.5, "the dog", "the cat")),
    ((6.0, "the box and the sun and the dog and the hat " * 3, "a hat"),),
]


def mixed_draws(draw: Any, count: int) -> list[Draw]:
    """Return greedy draws with several kinds of guidance; every fifth one has none."""
    draws: list[Draw] = []
    for i in range(count):
        plain = draw(
            "the cat sat " * (1 + i % 4) + "on",
            seed=i,
            kind="completion" if i % 3 == 2 else "chat",
            temperature=0,
            max_tokens=4 + i % 6,
            logprobs=1 if i % 3 == 2 else True,
        )
        is_plain = i % 5 == 4
        traits = TRAITS[i % len(TRAITS)]
        draws.append(plain if is_plain else guided(plain, *traits, min_p=0.1 * (i % 2)))
    return draws


def entries(candidate: Candidate) -> tuple[list[float], list[float]]:
    """Return the logprobs of a chat candidate: of the frozen model, and as it was sampled."""
    content = candidate.choice["logprobs"]["content"]
    return [e["logprob"] for e in content], [e["aligned_logprob"] for e in content]


async def test_candidates_with_different_guidance_equal_the_reference(
    serving: Any, draw: Any, finish: Any
) -> None:
    draws = mixed_draws(draw, 15)
    async with serving(prefill_tokens=32) as engine:
        reference = Reference(engine)

        async def cancelled() -> None:
            async with engine.sample(guided(draw("the dog", n=4, max_tokens=99), *TRAITS[2])):
                await asyncio.sleep(0)

        finished, _ = await asyncio.gather(
            asyncio.gather(*(finish(engine, d) for d in draws)), cancelled()
        )
        for d, (candidates, _) in zip(draws, finished, strict=True):
            if d.guidance is None:
                continue
            tokens, aligned, frozen = reference.greedy(d, d.body["max_tokens"])
            text = b"".join(token_bytes(engine.frozen.tokenizer, t) for t in tokens)
            assert candidates[0].completion_tokens == len(tokens)
            if d.kind == "chat":
                logprobs, as_sampled = entries(candidates[0])
                assert logprobs == pytest.approx(frozen, abs=1e-4)
                assert as_sampled == pytest.approx(aligned, abs=1e-3)
            elif candidates[0].finish_reason == "length":
                assert candidates[0].text == text.decode(errors="replace")


async def test_contexts_are_read_once_and_step_together(
    serving: Any, draw: Any, finish: Any
) -> None:
    request = draw(n=3, max_tokens=4, ignore_eos=True)
    # The request, two prompts, and the same prompt again.
    traits = ((1.0, "the dog", None), (2.0, "a hat", "the dog"))
    async with serving() as engine:
        forwards = Forwards(engine)
        candidates, _ = await finish(engine, guided(request, *traits))
        read = list(forwards)
        prompts = [
            len(engine.frozen.render(Draw(with_system(request, t))).ids) for _, t, _ in traits
        ]
    assert read == [(3, max(prompts)), (9, 1), (9, 1), (9, 1)]
    assert [c.context_prompt_tokens for c in candidates] == [sum(prompts)] * 3
    assert [c.context_completion_tokens for c in candidates] == [8] * 3
    assert candidates[0].prompt_tokens < min(prompts)


async def test_long_contexts_are_read_in_parts(serving: Any, draw: Any, finish: Any) -> None:
    request = guided(
        draw("the cat sat on the box", max_tokens=5, temperature=0, logprobs=True),
        (2.0, "the dog ran to the sun " * 4, "a hat " * 9),
    )
    async with serving() as engine:
        (expected,), _ = await finish(engine, request)
    async with serving(prefill_tokens=16) as engine:
        forwards = Forwards(engine)
        (actual,), _ = await finish(engine, request)
        assert all(rows * tokens <= 16 for rows, tokens in forwards)
    assert actual.text == expected.text
    for in_parts, at_once in zip(entries(actual), entries(expected), strict=True):
        assert in_parts == pytest.approx(at_once, abs=1e-4)


async def test_plain_candidates_do_not_change(serving: Any, draw: Any, finish: Any) -> None:
    plain = [draw("the cat " * i, seed=i, max_tokens=12) for i in range(1, 4)]
    async with serving() as engine:
        expected = [(await finish(engine, d))[0][0].choice for d in plain]
        other = guided(draw("the dog", n=3, max_tokens=12, seed=70), *TRAITS[2], min_p=0.2)
        results = await asyncio.gather(finish(engine, other), *(finish(engine, d) for d in plain))
    assert [candidates[0].choice for candidates, _ in results[1:]] == expected
    assert results[1][0][0].context_prompt_tokens == 0


async def test_seeded_answers_do_not_depend_on_the_batch(
    serving: Any, draw: Any, finish: Any
) -> None:
    draws = []
    for i in range(8):
        plain = draw("the cat " * (1 + i % 3), n=2, seed=50 * i, max_tokens=10)
        draws.append(guided(plain, *TRAITS[i % len(TRAITS)], min_p=0.05))
    async with serving() as engine:
        alone = [[c.text for c in (await finish(engine, d))[0]] for d in draws]
        together = await asyncio.gather(*(finish(engine, d) for d in draws))
    assert [[c.text for c in candidates] for candidates, _ in together] == alone


async def test_rows_of_contexts_count_in_the_batch_and_in_the_cache(
    serving: Any, draw: Any, finish: Any, until: Any
) -> None:
    request = guided(draw("the cat", n=5, max_tokens=6, ignore_eos=True), *TRAITS[2])
    async with serving(max_batch=9) as engine:
        forwards = Forwards(engine)
        candidates, _ = await finish(engine, request)
        assert len(candidates) == 5
        decoding = [rows for rows, tokens in forwards if tokens == 1]
        assert max(decoding) == 8, "two candidates of four contexts"
        await until(lambda: idle(engine))
    cell = engine.frozen.cell_bytes
    width = max(
        len(engine.frozen.render(replace(request, body=c.body)).ids)
        for c in request.guidance.contrasts
    )
    room = (4 * (width + 6) * cell + cell) / 2**30
    async with serving(kv_cache_gib=room) as engine:
        forwards = Forwards(engine)
        candidates, _ = await finish(engine, request)
        assert len(candidates) == 5
        assert max(rows for rows, tokens in forwards if tokens == 1) == 4


async def test_contexts_without_room_are_refused_by_name(serving: Any, draw: Any) -> None:
    request = guided(draw("the cat", max_tokens=6), *TRAITS[2])
    async with serving(max_batch=3) as engine:
        with pytest.raises(InvalidRequest, match=r"takes 4 rows .* max_batch 3") as error:
            engine.check(request)
        assert error.value.param == "align.guidance.scale"
    async with serving(kv_cache_gib=100 * engine.frozen.cell_bytes / 2**30) as engine:
        with pytest.raises(
            InvalidRequest, match=r"key-value cache of 100; .* kv_cache_gib"
        ) as error:
            engine.check(request)
        assert error.value.param == "align.guidance.scale"
    async with serving(context_length=40) as engine:
        long = guided(draw("the cat", max_tokens=6), (1.0, "a hat", None), (1.0, "the " * 60, None))
        tokens = len(engine.frozen.render(Draw(with_system(long, "the " * 60))).ids)
        message = f"has {tokens} tokens and 6 of completion, which do not fit the context of 40"
        with pytest.raises(InvalidRequest, match=message) as error:
            engine.check(long)
        assert error.value.param == "align.guidance.scale.trait1"
        assert error.value.code == "context_length_exceeded"


async def test_an_answer_without_a_limit_is_shortened_to_what_its_contexts_leave(
    serving: Any, draw: Any, finish: Any
) -> None:
    request = guided(draw("the cat", ignore_eos=True), (1.0, "the dog " * 5, None))
    async with serving(context_length=64) as engine:
        prompt = len(
            engine.frozen.render(replace(request, body=request.guidance.contrasts[0].body)).ids
        )
        (candidate,), _ = await finish(engine, request)
    assert candidate.completion_tokens == 64 - prompt
    assert candidate.finish_reason == "length"


async def test_leaving_and_stopping_free_the_rows_of_all_contexts(
    serving: Any, draw: Any, finish: Any, until: Any
) -> None:
    request = guided(draw("the cat", n=3, max_tokens=60, ignore_eos=True), *TRAITS[2])
    async with serving() as engine:
        complete, _ = await finish(engine, request)
        task = asyncio.create_task(finish(engine, request))
        async with engine.sample(guided(draw("the", n=4, max_tokens=90), *TRAITS[1])) as stream:
            async for _ in stream:
                break
        events = []
        async with engine.sample(request) as stream:
            async for event in stream:
                if len(events) == 9:
                    stream.stop(1)
                events.append(event)
        again, _ = await task
        await until(lambda: idle(engine))
        assert engine._started.scheduler._batch.cache.length == 0
    candidates = {e.index: e for e in events if isinstance(e, Candidate)}
    assert candidates[1].interrupted
    assert complete[1].text.startswith(candidates[1].text.rstrip("\ufffd"))
    assert [candidates[i].text for i in (0, 2)] == [complete[i].text for i in (0, 2)]
    assert [c.text for c in again] == [c.text for c in complete]


async def test_a_grammar_and_strong_guidance_give_valid_json(
    serving: Any, draw: Any, finish: Any
) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
    plain = draw("the cat", n=4, max_tokens=60, response_format=form)
    async with serving() as engine:
        for scale in (20.0, -20.0):
            request = guided(plain, (scale, "the dog ran", None), min_p=1.0)
            candidates, _ = await finish(engine, request)
            for candidate in candidates:
                assert candidate.error is None
                assert json.loads(candidate.text)["colour"] in {"red", "blue"}


async def test_biases_and_bans_come_before_guidance(serving: Any, draw: Any, finish: Any) -> None:
    plain = draw("the cat", max_tokens=5, temperature=0, logprobs=True)
    async with serving() as engine:
        token = engine.frozen.tokenizer("dog", add_special_tokens=False)["input_ids"][0]
        biased = replace(plain, body={**plain.body, "logit_bias": {str(token): 100}})
        (candidate,), _ = await finish(engine, guided(biased, *TRAITS[0], min_p=0.05))
        data = token_bytes(engine.frozen.tokenizer, token)
    assert candidate.text == data.decode() * 5
    _, aligned = entries(candidate)
    assert aligned == pytest.approx([0.0] * 5, abs=1e-3)


async def test_a_context_whose_logits_are_not_finite_fails_its_candidate_alone(
    serving: Any, draw: Any, finish: Any
) -> None:
    plain = draw("the cat", max_tokens=4, ignore_eos=True)
    async with serving() as engine:
        forwards = Forwards(engine)
        broken = guided(plain, *TRAITS[0])
        together = asyncio.gather(finish(engine, broken), finish(engine, plain))

        def spoil(logits: torch.Tensor) -> torch.Tensor:
            rows = engine._started.scheduler._batch.rows
            if len(rows) == 2:
                # The two contexts of the guided candidate stand before or after the plain one.
                logits[1 if rows[0].guidance else 2] = torch.nan
            return logits

        forwards.after = spoil
        (failed, _), (sound, _) = await together
    assert "not finite" in failed[0].error
    assert sound[0].completion_tokens == 4
