"""Tests of the running batch: prefill, seeds, cancellation, memory, fairness and failing steps."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from infer_align.engines.transformers import Transformers
from infer_align.engines.transformers.scheduler import Scheduler
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Candidate

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
LONG = "a big red ball is in the box with the small blue hat and the dog ran to the sun"


class Forwards(list):
    """The shape of every forward pass, the newest last.

    `before(step)` is called before each pass; `after(logits)` may replace its logits.
    """

    def __init__(self, engine) -> None:
        super().__init__()
        self.before = lambda step: None
        self.after = lambda logits: logits
        engine.frozen.lm.register_forward_pre_hook(self._record, with_kwargs=True)
        engine.frozen.lm.register_forward_hook(self._replace)

    def _record(self, module, args, kwargs) -> None:
        self.append(tuple(kwargs["input_ids"].shape))
        self.before(len(self))

    def _replace(self, module, args, output):
        output.logits = self.after(output.logits)
        return output


def idle(engine) -> bool:
    scheduler: Scheduler = engine._started.scheduler
    queued = scheduler._waiting or scheduler._ready or scheduler._jobs
    return not (queued or scheduler._batch.rows)


async def test_candidates_of_a_draw_share_its_prefill(serving, draw, finish):
    async with serving() as engine:
        forwards = Forwards(engine)
        candidates, _ = await finish(engine, draw(n=8, max_tokens=4, ignore_eos=True))
    prompt = candidates[0].prompt_tokens
    assert forwards == [(1, prompt), (8, 1), (8, 1), (8, 1)]


@pytest.mark.parametrize(("threads", "expected"), [(None, 1), (2, 2)])
async def test_a_small_model_decodes_with_one_thread_by_default(
    serving, draw, finish, several_threads, threads, expected
):
    counts = set()
    async with serving(threads=threads) as engine:
        Forwards(engine).before = lambda step: counts.add(torch.get_num_threads())
        await finish(engine, draw(max_tokens=2))
    assert counts == {expected}
    assert torch.get_num_threads() == several_threads


async def test_prompts_are_read_in_parts_and_short_ones_together(serving, draw, finish):
    async with serving(prefill_tokens=16) as engine:
        forwards = Forwards(engine)
        await finish(engine, draw(LONG * 2, kind="completion", max_tokens=1))
        length = sum(q for _, q in forwards)
        assert length == len(engine.frozen.tokenizer(LONG * 2)["input_ids"])
        assert all(rows * q <= 16 for rows, q in forwards)


async def test_same_seed_same_text_alone_and_among_32(serving, draw, finish, until):
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
    assert len({c.text for c in crowd[31][0]}) == 2, "other seeds give other texts"


async def test_leaving_mid_decode_empties_the_batch_and_keeps_other_results(
    serving, draw, finish, until
):
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


async def test_leaving_mid_prefill_ends_the_prefill(serving, draw, finish, until):
    async with serving(prefill_tokens=16) as engine:
        forwards = Forwards(engine)
        reading, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def pause(step: int) -> None:
            if step == 2:
                loop.call_soon_threadsafe(reading.set)
                go.wait(60)

        forwards.before = pause
        async with engine.sample(draw(LONG * 2, max_tokens=5)):
            await reading.wait()
        go.set()
        await until(lambda: idle(engine))
        assert len(forwards) == 2
        assert len((await finish(engine, draw(max_tokens=3)))[0]) == 1


async def test_stop_finishes_one_candidate_with_what_it_has(serving, draw, finish):
    async with serving() as engine:
        request = draw("the cat", n=3, max_tokens=80, ignore_eos=True)
        complete, _ = await finish(engine, request)
        events = []
        async with engine.sample(request) as stream:
            async for event in stream:
                if len(events) == 12:
                    stream.stop(1)
                events.append(event)
        candidates = {e.index: e for e in events if isinstance(e, Candidate)}
        deltas = [e for e in events if not isinstance(e, Candidate) and e.index == 1]
        streamed = "".join(delta.choice["delta"]["content"] for delta in deltas)
    assert candidates[1].interrupted
    assert candidates[1].finish_reason == "length"
    assert 0 < candidates[1].completion_tokens < 80
    assert candidates[1].text == streamed
    assert complete[1].text.startswith(candidates[1].text.rstrip("\ufffd"))
    assert [candidates[i].text for i in (0, 2)] == [complete[i].text for i in (0, 2)]
    assert not candidates[0].interrupted


async def test_stop_finishes_waiting_candidates_too(serving, draw, until):
    async with serving(max_batch=2) as engine:
        async with engine.sample(draw("the cat", n=5, max_tokens=200, ignore_eos=True)) as stream:
            finished = []
            async for event in stream:
                stream.stop()
                finished += [event] if isinstance(event, Candidate) else []
        assert sorted(c.index for c in finished) == [0, 1, 2, 3, 4]
        assert all(c.interrupted for c in finished)
        await until(lambda: idle(engine))


async def test_a_request_that_can_never_fit_is_refused(serving, draw):
    async with serving() as engine:
        for request, param in [
            (draw("the cat " * 200), "messages"),
            (draw("the cat " * 200, kind="completion"), "prompt"),
            (draw(max_tokens=256), "max_tokens"),
        ]:
            with pytest.raises(InvalidRequest, match="context of 256") as refused:
                engine.sample(request)
            assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")


async def test_a_text_of_megabytes_is_refused_without_reading_it(serving, draw, monkeypatch):
    async with serving() as engine:
        for param, request in [
            ("messages", draw("the cat " * 100_000)),
            ("prompt", draw("the cat " * 100_000, kind="completion")),
        ]:
            with monkeypatch.context() as patch:
                patch.setattr("infer_align.engines.transformers.model.tokenize", None)
                with pytest.raises(InvalidRequest, match=r"at least \d+ tokens") as refused:
                    engine.sample(request)
            assert (refused.value.param, refused.value.code) == (param, "context_length_exceeded")


def gib(engine_cells: int) -> float:
    # Llama of the fixture: 2 layers, 2 key-value heads of 8 dimensions, keys and values, float32.
    return engine_cells * (2 * 2 * 8 * 2 * 4) / 2**30


async def test_a_small_cache_queues_and_is_never_over_capacity(serving, draw, finish):
    async with serving(kv_cache_gib=gib(100) * 1.001) as engine:
        assert engine._started.scheduler.capacity == 100
        forwards = Forwards(engine)
        cells: list[int] = []

        def count_cells(step: int) -> None:
            batch = engine._started.scheduler._batch
            cells.append(len(batch.rows) * batch.cache.length)

        forwards.before = count_cells
        results = await asyncio.gather(
            *(
                finish(engine, draw("sun", n=6, seed=i, max_tokens=20, ignore_eos=True))
                for i in range(4)
            )
        )
        assert [c.completion_tokens for drawn, _ in results for c in drawn] == [20] * 24
        assert max(cells) <= 100
        with pytest.raises(InvalidRequest, match="key-value cache of 100"):
            engine.sample(draw(LONG, max_tokens=90))
        # A request without a maximum gets all the room there is.
        (candidate,), _ = await finish(engine, draw("sun", ignore_eos=True))
        assert candidate.prompt_tokens + candidate.completion_tokens == 100


async def test_prompts_that_wait_for_room_are_not_all_read_ahead(serving, draw, finish):
    async with serving(kv_cache_gib=gib(200) * 1.001) as engine:
        forwards = Forwards(engine)
        prefilled: list[int] = []
        forwards.before = lambda _: prefilled.append(
            sum(len(j.prompt.ids) for j in engine._started.scheduler._ready)
        )
        await asyncio.gather(
            *(
                finish(engine, draw(LONG, n=2, seed=i, max_tokens=30, ignore_eos=True))
                for i in range(12)
            )
        )
    assert max(prefilled) <= 200


async def test_a_large_request_does_not_hold_up_a_small_one(serving, draw, finish, until, running):
    async with serving(max_batch=4) as engine:
        big = asyncio.create_task(
            finish(engine, draw("the cat", n=64, max_tokens=30, ignore_eos=True))
        )
        await until(lambda: running(engine))
        await finish(engine, draw("sun", max_tokens=5, ignore_eos=True))
        assert not big.done()
        assert len((await big)[0]) == 64


@pytest.mark.parametrize("parts", [16, 1024])
async def test_a_failing_prefill_fails_only_its_request(
    serving, draw, finish, parts, caplog, until
):
    async with serving(prefill_tokens=parts) as engine:
        decoding = asyncio.create_task(
            finish(engine, draw("sun", n=2, max_tokens=150, ignore_eos=True))
        )
        forwards = Forwards(engine)
        await until(lambda: len(forwards) > 5)

        def fail(step: int) -> None:
            if forwards[-1][1] > 1:
                forwards.before = lambda _: None
                raise RuntimeError("out of memory")

        forwards.before = fail
        with pytest.raises(EngineFailed, match="out of memory"):
            await finish(engine, draw(LONG, max_tokens=5))
        assert [c.completion_tokens for c in (await decoding)[0]] == [150, 150]
        await until(lambda: idle(engine))
        assert engine.health() is None


async def test_a_failing_decode_fails_the_batch_and_the_engine_lives_on(
    serving, draw, finish, caplog, until
):
    async with serving(max_batch=2) as engine:
        request = draw("sun", n=2, max_tokens=40, ignore_eos=True)
        expected, _ = await finish(engine, request)
        forwards = Forwards(engine)

        def fail(step: int) -> None:
            if step == 20:
                raise RuntimeError("a broken kernel")

        forwards.before = fail
        failing = asyncio.create_task(finish(engine, request))
        await until(lambda: len(forwards) > 3)
        waiting = asyncio.create_task(finish(engine, request))
        with pytest.raises(EngineFailed, match="a broken kernel"):
            await failing
        assert [c.text for c in (await waiting)[0]] == [c.text for c in expected]
        await until(lambda: idle(engine))


async def test_logits_that_are_not_finite_fail_that_candidate_alone(serving, draw, finish, until):
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


async def test_closing_ends_running_and_later_draws(serving, draw, finish, until, running):
    async with serving(max_batch=1) as engine:
        tasks = [
            asyncio.create_task(finish(engine, draw(n=2, max_tokens=200, ignore_eos=True)))
            for _ in range(3)
        ]
        await until(lambda: running(engine))
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
