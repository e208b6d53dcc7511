"""VAS through an upstream does what VAS in the engine that owns the model does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("torch")

from infer_align import config as configuration
from infer_align.config import Limits
from infer_align.demo import world
from infer_align.engines import Engine, Undiscovered
from infer_align.engines.openai import OpenAI, OpenAIEngine
from infer_align.engines.transformers import Transformers
from infer_align.errors import ConfigError, InvalidRequest, Unavailable, Unsupported
from infer_align.flow.plan import Plan, make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.run import align
from infer_align.steering import Steering
from infer_align.types import Candidate, Capability, Delta, Draw
from infer_align.values import Value
from infer_align.values.head import Head
from infer_align.values.lookahead import Lookahead
from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.conftest import Live, end, start

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

Tail = Literal["mask", "keep"]
QUESTION = [{"role": "user", "content": world.prompts(1, seed=3)[0]}]
VALUE = "helpful-lookahead"


def values() -> dict[str, Value]:
    return {
        VALUE: Lookahead(path="demo/value-lm", head="helpful").load(),
        "brief": Lookahead(path="demo/value-lm", head="brief").load(),
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The embedded model as an upstream, without any values."""
    path: Path = tmp_path_factory.mktemp("demo") / "config.toml"
    path.write_text(
        '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n', encoding="utf-8"
    )
    live = start(configuration.load(path))
    yield live
    end(live)


async def steerable(urls: str, **config: Any) -> OpenAIEngine:
    """Return a started engine with the tokenizer and the values of the demo."""
    engine = OpenAI(**{"urls": urls, "tokenizer": "demo", "probe": "start", **config}).load()
    engine.values = values()
    await engine.start()
    try:
        engine.missing(frozenset({Capability.STEER}))
    except Undiscovered as gap:
        await gap.discover()
    return engine


@pytest.fixture
async def engine(demo: Live) -> AsyncIterator[OpenAIEngine]:
    engine = await steerable(demo.base_url)
    yield engine
    await engine.close()


@pytest.fixture
async def local_engine() -> AsyncIterator[Engine]:
    """The engine that owns the same model."""
    engine = Transformers(model="demo", threads=1).load()
    engine.values = values()
    await engine.start()
    yield engine
    await engine.close()


def steered(tail: Tail, beta: float = 6.0, n: int = 1, **fields: Any) -> Draw:
    body = {"messages": QUESTION, "max_tokens": 16, **fields}
    steering = Steering({VALUE: beta, "brief": 0.5}, 10, tail)
    return Draw(body, n, tuple(range(n)), steering=steering)


# --- the same answers ---


@pytest.mark.parametrize(("tail", "calls_per_token"), [("mask", 1), ("keep", 2)])
@pytest.mark.parametrize("beta", [6.0, -6.0])
async def test_greedy_answers_equal_those_of_the_engine_that_owns_the_model(
    engine: OpenAIEngine, local_engine: Engine, tail: Tail, calls_per_token: int, beta: float
) -> None:
    draw = steered(tail, beta, temperature=0)
    engine.check(draw)
    (remote,) = await engine.generate(draw)
    (local,) = await local_engine.generate(draw)
    (plain,) = await local_engine.generate(Draw(draw.body, 1, (0,)))
    assert remote.error is None
    assert remote.text == local.text
    assert remote.text != plain.text, "steering changes the answer"
    assert remote.finish_reason == local.finish_reason
    assert remote.prompt_tokens == local.prompt_tokens
    # The token that ends an answer is sampled and counted by both.
    assert remote.completion_tokens == local.completion_tokens
    assert remote.calls == remote.completion_tokens * calls_per_token


@pytest.mark.parametrize("tail", ["mask", "keep"])
async def test_sampled_answers_have_the_distribution_of_the_engine_that_owns_the_model(
    engine: OpenAIEngine, local_engine: Engine, tail: Tail
) -> None:
    n = 60
    draw = steered(tail, 2.0, n, max_tokens=1)
    remote = Counter(candidate.text for candidate in await engine.generate(draw))
    local = Counter(candidate.text for candidate in await local_engine.generate(draw))
    distance = sum(abs(remote[text] - local[text]) for text in remote | local) / (2 * n)
    assert distance < 0.35


@pytest.mark.parametrize("tail", ["mask", "keep"])
async def test_equal_seeds_give_equal_answers(
    engine: OpenAIEngine, finish: Any, tail: Tail
) -> None:
    draw = steered(tail, n=2, temperature=1.0)
    first, deltas = await finish(engine, draw)
    second, _ = await finish(engine, draw)
    assert [candidate.choice for candidate in first] == [candidate.choice for candidate in second]
    for candidate in first:
        pieces = [delta.choice["delta"] for delta in deltas if delta.index == candidate.index]
        assert "".join(piece["content"] for piece in pieces) == candidate.text


async def test_weights_of_zero_need_one_plain_call(engine: OpenAIEngine) -> None:
    body = {"messages": QUESTION, "max_tokens": 8}
    zero = Steering({VALUE: 0.0}, 10, "keep")
    (plain,) = await engine.generate(Draw(body, 1, (3,)))
    (candidate,) = await engine.generate(Draw(body, 1, (3,), steering=zero))
    assert candidate.choice == plain.choice
    assert candidate.calls == 1


async def test_the_calls_of_a_candidate_are_reported(engine: OpenAIEngine) -> None:
    vas = {"beta": {VALUE: 2.0}, "tail": "mask"}
    body = {"messages": QUESTION, "max_tokens": 4, "align": {"vas": vas}}
    plan = make_plan(parse_request(body, "chat", {}), engine, {}, {}, Limits(8, 1000))
    response = await align(plan, engine)
    (candidate,) = response.candidates
    assert candidate.calls >= candidate.completion_tokens


async def test_stop_finishes_every_candidate(engine: OpenAIEngine) -> None:
    candidates = []
    async with engine.sample(steered("mask", n=3, max_tokens=100)) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                stream.stop()
            elif isinstance(event, Candidate):
                candidates.append(event)
    assert len(candidates) == 3
    for candidate in candidates:
        assert candidate.interrupted or candidate.finish_reason == "stop"
    assert not engine._drawings


# --- refusals and failures ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 1),
        ("tools", [{"type": "function"}]),
        ("temperature", 7),
        ("stop", [""]),
        ("logprobs", True),
        ("stop", 5),
        ("stop", [5]),
        ("max_tokens", "a"),
        ("max_tokens", True),
        ("max_completion_tokens", 0),
        ("temperature", "1"),
    ],
)
async def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    engine: OpenAIEngine, field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=field) as raised:
        engine.check(steered("mask", **{field: value}))
    assert raised.value.param == field


async def test_unknown_values_and_a_large_top_k_are_refused(engine: OpenAIEngine) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'brief'"):
        engine.check(Draw({"messages": QUESTION}, steering=Steering({"brif": 1.0}, 10, "mask")))
    with pytest.raises(Unsupported, match=r"top_k: 21 is over the 20"):
        engine.check(Draw({"messages": QUESTION}, steering=Steering({VALUE: 1.0}, 21, "mask")))
    # A value LM reads each token that it values, so their number must be fixed.
    with pytest.raises(InvalidRequest, match=r"align\.vas\.top_k: 'all' values any number"):
        engine.check(Draw({"messages": QUESTION}, steering=Steering({VALUE: 1.0}, "all", "mask")))
    likely = Steering({VALUE: 1.0}, 20, "mask", 0.1)
    with pytest.raises(InvalidRequest, match=r"align\.vas\.min_p: 0\.1 values any number"):
        engine.check(Draw({"messages": QUESTION}, steering=likely))


async def test_a_limit_of_the_divergence_is_refused(engine: OpenAIEngine) -> None:
    limited = Steering({VALUE: 1.0}, 20, "keep", max_kl=0.5)
    with pytest.raises(Unsupported, match=r"align\.vas\.max_kl: the divergence cannot") as refused:
        engine.check(Draw({"messages": QUESTION}, steering=limited))
    assert refused.value.param == "align.vas.max_kl"


def two_tokens(_: str, __: dict[str, Any]) -> dict[str, Any]:
    """Answer with top logprobs of two tokens of the demo's vocabulary; the first is sampled."""
    choice = {
        "index": 0,
        "text": "the",
        "message": {"content": "the"},
        "logprobs": {"tokens": ["the"], "top_logprobs": [{"the": -0.5, "a": -1.0}]},
        "finish_reason": "length",
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


@pytest.fixture
def up() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


async def test_a_refusal_fails_the_request_and_an_error_its_candidate(up: FakeUpstream) -> None:
    up.answer = two_tokens
    engine = await steerable(up.url, probe=False)
    assert Capability.STEER in engine.capabilities
    up.behave = lambda _, __: "error_422"
    with pytest.raises(InvalidRequest, match="not a number") as raised:
        await engine.generate(steered("mask", n=2))
    assert raised.value.status == 400
    up.behave = lambda _, __: "error_500"
    (failed,) = await engine.generate(steered("mask"))
    assert failed.status == 500
    assert not engine._drawings
    await engine.close()


def plan_vas(engine: Engine, tail: Tail = "keep") -> Plan:
    align = {"vas": {"beta": {VALUE: 1.0}, "tail": tail}}
    request = parse_request({"messages": QUESTION, "align": align}, "chat", {})
    return make_plan(request, engine, {}, {}, Limits(8, 100_000))


async def test_a_missing_tokenizer_is_named(demo: Live) -> None:
    engine = OpenAI(urls=demo.base_url).load()
    await engine.start()
    with pytest.raises(Unsupported, match="tokenizer"):
        plan_vas(engine)
    await engine.close()


async def test_missing_logprobs_are_named(up: FakeUpstream) -> None:
    engine = await steerable(up.url)
    assert Capability.STEER not in engine.capabilities
    with pytest.raises(Unsupported, match="top_logprobs"):
        plan_vas(engine)
    await engine.close()


async def test_the_tail_keep_needs_logit_bias(demo: Live) -> None:
    features = ("completion", "logprobs")
    engine = await steerable(demo.base_url, probe=False, capabilities=features)
    with pytest.raises(Unsupported, match="logit_bias"):
        plan_vas(engine)
    (draw,) = plan_vas(engine, "mask").draws
    assert draw.steering is not None
    assert draw.steering.tail == "mask"
    await engine.close()


async def test_steering_is_looked_for_at_its_first_need(up: FakeUpstream) -> None:
    up.answer = two_tokens
    engine = OpenAI(urls=up.url, tokenizer="demo").load()
    engine.values = values()
    await engine.start()
    assert up.calls == 0
    assert Capability.STEER in engine.unknown_capabilities
    with pytest.raises(Undiscovered) as gap:
        plan_vas(engine, "mask")
    await asyncio.gather(gap.value.discover(), gap.value.discover())
    assert up.calls == 2, "text completions with token ids are tried first, then with text"
    assert plan_vas(engine, "mask").draws
    assert Capability.STEER not in engine.unknown_capabilities
    await engine.close()


async def test_a_failed_look_for_steering_is_not_remembered(up: FakeUpstream) -> None:
    up.behave = lambda _, __: "error_500"
    engine = OpenAI(urls=up.url, tokenizer="demo", recovery_seconds=60).load()
    engine.values = values()
    await engine.start()
    with pytest.raises(Undiscovered) as gap:
        plan_vas(engine, "mask")
    await gap.value.discover()
    with pytest.raises(Unavailable, match="did not answer the calls that show if it can do steer"):
        plan_vas(engine, "mask")
    up.answer = two_tokens
    up.behave = lambda _, __: "ok"
    # As when the upstream comes back after it was down.
    engine._features.forget_intervals(engine.client.pool.hosts[0])
    with pytest.raises(Undiscovered) as gap:
        plan_vas(engine, "mask")
    await gap.value.discover()
    assert plan_vas(engine, "mask").draws
    await engine.close()


async def test_a_value_that_reads_hidden_states_is_refused(demo: Live) -> None:
    engine = OpenAI(urls=demo.base_url, tokenizer="demo").load()
    engine.values = {"helpful": Head(path="demo/value-helpful.safetensors").load()}
    with pytest.raises(ConfigError, match="lookahead"):
        await engine.start()
    await engine.close()
