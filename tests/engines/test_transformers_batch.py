"""The running batch: shared prefills, seeds, cancellation, bounded memory, fairness, and steps that fail."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from infer_align.engines.transformers import Transformers
from infer_align.engines.transformers.scheduler import Scheduler
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Candidate

pytestmark = pytest.mark.anyio
LONG = "a big red ball is in the box with the small blue hat and the dog ran to the sun"


class Forwards(list):
    """The shape of every forward, newest last; `at(step)` is called before each."""

    def __init__(self, engine) -> None:
        super().__init__()
        self.at = lambda step: None
        self.after = lambda logits: logits
        engine.frozen.lm.register_forward_pre_hook(self._before, with_kwargs=True)
        engine.frozen.lm.register_forward_hook(self._after)

    def _before(self, module, args, kwargs) -> None:
        self.append(tuple(kwargs["input_ids"].shape))
        self.at(len(self))

    def _after(self, module, args, output):
        output.logits = self.after(output.logits)
        return output


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def idle(engine) -> bool:
    s: Scheduler = engine._started.scheduler
    return not (s._batch.rows or s._waiting or s._ready or s._jobs)


async def test_draws_of_one_request_share_its_prefill(serving, draw, finish):
    async with serving() as engine:
        forwards = Forwards(engine)
        candidates, _ = await finish(engine, draw(n=8, max_tokens=4, ignore_eos=True))
    prompt = candidates[0].prompt_tokens
    assert forwards == [(1, prompt), (8, 1), (8, 1), (8, 1)]


async def test_prompts_are_read_in_parts_and_short_ones_together(serving, draw, finish):
    async with serving(prefill_tokens=16) as engine:
        forwards = Forwards(engine)
        await finish(engine, draw(LONG * 2, kind="completion", max_tokens=1))
        length = sum(q for _, q in forwards)
        assert length == len(engine.frozen.tokenizer(LONG * 2)["input_ids"])
        assert all(rows * q <= 16 for rows, q in forwards)


async def test_same_seed_same_text_alone_and_among_32(serving, draw, finish):
    async with serving(prefill_tokens=32) as engine:

        def request(i: int):
            return draw(
                f"{LONG[: i * 2]}!",
                n=1 + i % 3,
                seed=100 * i,
                max_tokens=5 + i,
                temperature=1.0,
                top_p=0.9,
            )

        alone = [[c.text for c in (await finish(engine, request(i)))[0]] for i in (0, 7, 31)]
        crowd = await asyncio.gather(*(finish(engine, request(i)) for i in range(32)))
        assert [[c.text for c in crowd[i][0]] for i in (0, 7, 31)] == alone
        await until(lambda: idle(engine))
    assert len({c.text for c in crowd[31][0]}) == 2  # and other seeds other texts


async def test_leaving_mid_decode_empties_the_batch_and_disturbs_nobody(serving, draw, finish):
    async with serving() as engine:
        request = draw("the dog", n=2, max_tokens=60, ignore_eos=True, logprobs=True)
        expected, _ = await finish(engine, request)
        task = asyncio.create_task(finish(engine, request))
        async with engine.sample(draw(LONG, n=16, max_tokens=100, ignore_eos=True)) as stream:
            async for _ in stream:
                break
        got, _ = await task
        assert [c.text for c in got] == [c.text for c in expected]
        await until(lambda: idle(engine))
        assert engine._started.scheduler._batch.cache.length == 0


async def test_leaving_mid_prefill(serving, draw, finish):
    async with serving(prefill_tokens=16) as engine:
        forwards = Forwards(engine)
        reading, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def pause(step: int) -> None:
            if step == 2:
                loop.call_soon_threadsafe(reading.set)
                go.wait(20)

        forwards.at = pause
        async with engine.sample(draw(LONG * 2, max_tokens=5)):
            await reading.wait()
        go.set()
        await until(lambda: idle(engine))
        assert len(forwards) == 2
        assert len((await finish(engine, draw(max_tokens=3)))[0]) == 1


async def test_stop_finishes_one_candidate_with_what_it_has(serving, draw, finish):
    async with serving() as engine:
        request = draw("the cat", n=3, max_tokens=80, ignore_eos=True)
        whole, _ = await finish(engine, request)
        events = []
        async with engine.sample(request) as stream:
            async for event in stream:
                if len(events) == 12:
                    stream.stop(1)
                events.append(event)
        cut = {e.index: e for e in events if isinstance(e, Candidate)}
        said = "".join(
            e.choice["delta"]["content"]
            for e in events
            if not isinstance(e, Candidate) and e.index == 1
        )
    assert cut[1].interrupted
    assert cut[1].finish_reason == "length"
    assert 0 < cut[1].completion_tokens < 80
    assert cut[1].text == said
    assert whole[1].text.startswith(cut[1].text.rstrip("\ufffd"))
    assert [cut[i].text for i in (0, 2)] == [whole[i].text for i in (0, 2)]
    assert not cut[0].interrupted


async def test_stop_all_finishes_those_that_wait_too(serving, draw):
    async with serving(max_batch=2) as engine:
        async with engine.sample(draw("the cat", n=5, max_tokens=200, ignore_eos=True)) as stream:
            finished = []
            async for event in stream:
                stream.stop()
                finished += [event] if isinstance(event, Candidate) else []
        assert sorted(c.index for c in finished) == [0, 1, 2, 3, 4]
        assert all(c.interrupted for c in finished)
        await until(lambda: idle(engine))


async def test_what_can_never_fit_is_refused(serving, draw):
    async with serving() as engine:
        for request, param in [
            (draw("the cat " * 200), "messages"),
            (draw("the cat " * 200, kind="completion"), "prompt"),
            (draw(max_tokens=256), "max_completion_tokens"),
        ]:
            with pytest.raises(InvalidRequest, match="context of 256") as refused:
                engine.sample(request)
            assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")


def gib(engine_cells: int) -> float:
    # Llama of the fixture: 2 layers, 2 key-value heads of 8 dimensions, keys and values, float32.
    return engine_cells * (2 * 2 * 8 * 2 * 4) / 2**30


async def test_a_small_cache_queues_and_is_never_over_capacity(serving, draw, finish):
    async with serving(kv_cache_gib=gib(100) * 1.001) as engine:
        assert engine._started.scheduler.capacity == 100
        forwards = Forwards(engine)
        over = []
        forwards.at = lambda _: over.append(
            sum(1 for _ in engine._started.scheduler._batch.rows)
            * engine._started.scheduler._batch.cache.length
            > 100
        )
        results = await asyncio.gather(
            *(
                finish(engine, draw("sun", n=6, seed=i, max_tokens=20, ignore_eos=True))
                for i in range(4)
            )
        )
        assert [c.completion_tokens for found, _ in results for c in found] == [20] * 24
        assert not any(over)
        with pytest.raises(InvalidRequest, match="key-value cache of 100"):
            engine.sample(draw(LONG, max_tokens=90))
        # Who names no maximum gets what there is room for.
        (candidate,), _ = await finish(engine, draw("sun", ignore_eos=True))
        assert candidate.prompt_tokens + candidate.completion_tokens == 100


async def test_prompts_that_wait_for_room_are_not_all_read_ahead(serving, draw, finish):
    async with serving(kv_cache_gib=gib(200) * 1.001) as engine:
        forwards, held = Forwards(engine), []
        forwards.at = lambda _: held.append(
            sum(len(j.prompt.ids) for j in engine._started.scheduler._ready)
        )
        await asyncio.gather(
            *(
                finish(engine, draw(LONG, n=2, seed=i, max_tokens=30, ignore_eos=True))
                for i in range(12)
            )
        )
    assert max(held) <= 200


async def test_a_large_request_does_not_hold_up_a_small_one(serving, draw, finish):
    async with serving(max_batch=4) as engine:
        big = asyncio.create_task(
            finish(engine, draw("the cat", n=64, max_tokens=30, ignore_eos=True))
        )
        await asyncio.sleep(0.02)
        await finish(engine, draw("sun", max_tokens=5, ignore_eos=True))
        assert not big.done()
        assert len((await big)[0]) == 64


@pytest.mark.parametrize("parts", [16, 1024])
async def test_a_failing_prefill_fails_only_its_request(serving, draw, finish, parts, caplog):
    async with serving(prefill_tokens=parts) as engine:
        running = asyncio.create_task(
            finish(engine, draw("sun", n=2, max_tokens=150, ignore_eos=True))
        )
        forwards = Forwards(engine)
        await until(lambda: len(forwards) > 5)

        def fail(step: int) -> None:
            if forwards[-1][1] > 1:
                forwards.at = lambda _: None
                raise RuntimeError("out of memory")

        forwards.at = fail
        with pytest.raises(EngineFailed, match="out of memory"):
            await finish(engine, draw(LONG, max_tokens=5))
        assert [c.completion_tokens for c in (await running)[0]] == [150, 150]
        await until(lambda: idle(engine))
        assert engine.health() is None


async def test_a_failing_decode_fails_the_batch_and_the_engine_lives_on(
    serving, draw, finish, caplog
):
    async with serving(max_batch=2) as engine:
        request = draw("sun", n=2, max_tokens=40, ignore_eos=True)
        expected, _ = await finish(engine, request)
        forwards = Forwards(engine)

        def fail(step: int) -> None:
            if step == 20:
                raise RuntimeError("a broken kernel")

        forwards.at = fail
        failing = asyncio.create_task(finish(engine, request))
        await until(lambda: len(forwards) > 3)
        waiting = asyncio.create_task(finish(engine, request))
        with pytest.raises(EngineFailed, match="a broken kernel"):
            await failing
        assert [c.text for c in (await waiting)[0]] == [c.text for c in expected]
        await until(lambda: idle(engine))


async def test_logits_that_are_not_numbers_fail_that_candidate_alone(serving, draw, finish):
    async with serving() as engine:
        request = draw("sun", n=3, max_tokens=20, ignore_eos=True)
        expected, _ = await finish(engine, request)
        forwards = Forwards(engine)

        def poison(logits):
            if len(forwards) == 10:
                logits = logits.clone()
                logits[1, -1, 5] = torch.nan
            return logits

        forwards.after = poison
        candidates, _ = await finish(engine, request)
        assert "not finite" in candidates[1].error
        assert [candidates[i].text for i in (0, 2)] == [expected[i].text for i in (0, 2)]
        forwards.after = lambda logits: torch.full_like(logits, torch.nan)
        candidates, _ = await finish(engine, request)
        assert all("not finite" in c.error for c in candidates)
        await until(lambda: idle(engine))


async def test_closing_ends_what_runs_and_what_comes_after(serving, draw, finish):
    async with serving(max_batch=1) as engine:
        tasks = [
            asyncio.create_task(finish(engine, draw(n=2, max_tokens=200, ignore_eos=True)))
            for _ in range(3)
        ]
        await until(lambda: engine._started.scheduler._batch.rows)
        await engine.close()
        for task in tasks:
            with pytest.raises(Unavailable, match="shut down"):
                await task
        assert engine.health()
        with pytest.raises(Unavailable, match="shut down"):
            engine.sample(draw())


async def test_sampling_before_start_is_refused(language_model, draw):
    engine = Transformers(model=language_model()).load()
    assert engine.health()
    with pytest.raises(Unavailable, match="loading"):
        engine.sample(draw())
