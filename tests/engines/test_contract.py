"""The contract of every engine in the registry; a new file in engines/ is tested too."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace

import pytest

from infer_align.config import registry
from infer_align.engines import Engine
from infer_align.engines.fake import Reply
from infer_align.errors import ConfigError, InvalidRequest, Unavailable
from infer_align.types import Candidate, Capability, Delta
from tests.engines.openai.upstream import fake_upstream, reply

pytestmark = pytest.mark.anyio


# Values that every engine refuses: when it checks a draw, or through its upstream when it samples.
WRONG_VALUES = [("temperature", 5), ("max_tokens", 0), ("stop", [""]), ("top_p", "x")]


async def refuse_wrong_value(_app, body, send):
    name = wrong_field(body)
    error = {"message": f"{name} is wrong", "param": name, "code": None}
    await reply(send, 400, {"error": error})


def wrong_field(body):
    names = [name for name, value in WRONG_VALUES if body.get(name) == value]
    return names[0] if names else None


@pytest.fixture(scope="module")
def upstream():
    """An upstream that samples by the seed and refuses wrong values."""
    with fake_upstream() as app:
        app.seeded = True
        app.word_seconds = 0.002
        app.behave = lambda _, body: refuse_wrong_value if wrong_field(body) else "ok"
        yield app


@pytest.fixture(params=registry.engines.names())
async def engine(request, language_model, upstream):
    try:
        plugin = registry.engines.get(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    fields = {f.name for f in dataclasses.fields(plugin)}
    if "replies" in fields:
        section = plugin(replies=(Reply("a b c d e f g h " * 8, seconds_per_token=0.002),))
    elif request.param == "transformers":
        section = plugin(model=language_model())
    elif request.param == "openai":
        section = plugin(urls=upstream.url, probe="start")
    elif request.param == "vllm":
        pytest.skip("starts vLLM: tests/engines/vllm/test_serving.py")
    else:
        pytest.fail(f"how is {request.param!r} made for the contract?")
    engine = section.load()
    assert engine.health(), "not healthy before start"
    await engine.start()
    yield engine
    await engine.close()


async def test_is_an_engine(engine):
    assert isinstance(engine, Engine)
    assert engine.health() is None
    assert engine.model
    assert engine.context_length > 0
    assert {Capability.CHAT, Capability.SEED} <= engine.capabilities


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_each_candidate_comes_once_and_its_deltas_make_it_up(engine, draw, finish, kind):
    request = replace(draw("the cat", n=3, seed=7, kind=kind, max_tokens=6), deltas=True)
    candidates, deltas = await finish(engine, request)
    assert [c.index for c in candidates] == [0, 1, 2]
    for candidate in candidates:
        assert candidate.error is None
        assert candidate.finish_reason in {"stop", "length"}
        assert 1 <= candidate.completion_tokens <= 6
        assert candidate.prompt_tokens > 0
        choices = [d.choice for d in deltas if d.index == candidate.index]
        pieces = [c["delta"]["content"] if kind == "chat" else c["text"] for c in choices]
        assert "".join(pieces) == candidate.text


async def test_the_same_seed_gives_the_same_answer(engine, draw, finish):
    request = draw("the cat", n=3, seed=11, max_tokens=10)
    first, _ = await finish(engine, request)
    second, _ = await finish(engine, request)
    assert [c.choice for c in first] == [c.choice for c in second]
    (alone,), _ = await finish(engine, draw("the cat", seed=11, max_tokens=10))
    assert alone.choice == first[0].choice


async def test_stop_finishes_every_candidate_with_its_text(engine, draw):
    candidates: list[Candidate] = []
    async with engine.sample(draw("the cat", n=3, max_tokens=200, ignore_eos=True)) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                stream.stop()
            else:
                candidates.append(event)
    assert sorted(c.index for c in candidates) == [0, 1, 2]
    assert all(c.error is None for c in candidates)
    for candidate in candidates:
        # A fast engine may finish before it hears of the stop.
        if candidate.interrupted:
            assert candidate.finish_reason == "length"
            assert candidate.completion_tokens < 200


async def test_stop_of_what_is_finished_is_nothing(engine, draw):
    async with engine.sample(draw("the cat", max_tokens=2)) as stream:
        events = [event async for event in stream]
        stream.stop(0)
        stream.stop()
    assert sum(isinstance(e, Candidate) for e in events) == 1


async def test_leaving_early_and_by_an_error(engine, draw, finish):
    with pytest.raises(ZeroDivisionError):
        async with engine.sample(draw("the cat", n=4, max_tokens=60)):
            1 / 0  # noqa: B018
    async with engine.sample(draw("the cat", n=4, max_tokens=60)) as stream:
        await anext(stream)
    assert len((await finish(engine, draw(max_tokens=2)))[0]) == 1


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
async def test_a_wrong_value_is_refused_by_name(engine, draw, finish, name, value):
    async def check_and_sample(request):
        engine.check(request)
        await finish(engine, request)

    with pytest.raises(InvalidRequest, match=name) as refused:
        await check_and_sample(draw(**{name: value}))
    assert refused.value.param == name


async def test_worst_case(engine):
    chat = {"messages": []}
    assert engine.worst_case_tokens({**chat, "max_tokens": 5}) == 5
    assert engine.worst_case_tokens({**chat, "max_tokens": 5, "max_completion_tokens": 7}) == 7
    assert engine.worst_case_tokens(chat) == engine.context_length
    assert engine.worst_case_tokens({"prompt": "x"}) == 16


async def test_closing_ends_every_stream_with_an_error(engine, draw, finish):
    # A second request waits behind the first, so something still runs when the engine closes.
    request = draw(n=64, max_tokens=200, ignore_eos=True)
    tasks = [asyncio.create_task(finish(engine, request)) for _ in range(2)]
    await asyncio.sleep(0)
    await engine.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    assert engine.health()
    with pytest.raises(Unavailable):
        engine.sample(draw())
