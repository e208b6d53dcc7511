"""VAS before a model out of reach does what VAS in the engine that owns it does, token by token; and says what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from infer_align import config as configuration
from infer_align.config import Limits
from infer_align.demo import world
from infer_align.engines.openai import OpenAI, OpenAIEngine
from infer_align.engines.openai.continuation import Continuation, Prompt
from infer_align.engines.transformers import Transformers
from infer_align.errors import ConfigError, InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.flow.run import align
from infer_align.types import Capability, Draw, Steering
from infer_align.upstream import UpstreamFailed
from infer_align.values.head import Head
from infer_align.values.lookahead import Lookahead
from tests.engines.openai.upstream import fake_upstream
from tests.server.conftest import Live, end, start

pytestmark = pytest.mark.anyio
QUESTION = [{"role": "user", "content": world.prompts(1, seed=3)[0]}]
NAME = "helpful-lookahead"


def values() -> dict[str, Any]:
    return {
        NAME: Lookahead(path="demo/value-lm", head="helpful").load(),
        "brief": Lookahead(path="demo/value-lm", head="brief").load(),
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: Any) -> Iterator[Live]:
    """The embedded model, as an upstream that knows nothing of values."""
    path: Path = tmp_path_factory.mktemp("demo") / "c.toml"
    path.write_text(
        '[engine]\nkind = "transformers"\nmodel = "demo"\nthreads = 1\n', encoding="utf-8"
    )
    live = start(configuration.load(path))
    yield live
    end(live)


@pytest.fixture
async def engine(demo: Live) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAI(urls=demo.base_url, tokenizer="demo").load()
    engine.values = values()
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def own() -> AsyncIterator[Any]:
    engine = Transformers(model="demo", threads=1).load()
    engine.values = values()
    await engine.start()
    yield engine
    await engine.close()


def steered(tail: Any, beta: float = 6.0, n: int = 1, **fields: Any) -> Draw:
    body = {"messages": QUESTION, "max_tokens": 16, **fields}
    return Draw(body, n, tuple(range(n)), steering=Steering({NAME: beta, "brief": 0.5}, 10, tail))


@pytest.mark.parametrize("tail", ["mask", "keep"])
@pytest.mark.parametrize("beta", [6.0, -6.0])
async def test_greedy_it_says_what_the_engine_that_owns_the_model_says(
    engine: Any, own: Any, tail: str, beta: float
) -> None:
    draw = steered(tail, beta, temperature=0)
    engine.check(draw)
    (there,), (here,) = await engine.generate(draw), await own.generate(draw)
    (plain,) = await own.generate(
        Draw({"messages": QUESTION, "max_tokens": 16, "temperature": 0}, 1, (0,))
    )
    assert there.error is None
    assert there.text == here.text
    assert there.text != plain.text, "it steers"
    assert there.finish_reason == here.finish_reason
    assert there.prompt_tokens == here.prompt_tokens
    steps = there.completion_tokens + (there.finish_reason == "stop")
    assert there.calls in {
        steps * (1 if tail == "mask" else 2),
        there.completion_tokens * (1 if tail == "mask" else 2),
    }


@pytest.mark.parametrize("tail", ["mask", "keep"])
async def test_it_samples_the_distribution_of_the_engine_that_owns_the_model(
    engine: Any, own: Any, tail: str
) -> None:
    n = 60
    draw = steered(tail, 2.0, n, max_tokens=1)
    found = [Counter(c.text for c in await e.generate(draw)) for e in (engine, own)]
    distance = sum(abs(found[0][text] - found[1][text]) for text in found[0] | found[1]) / (2 * n)
    assert distance < 0.35


@pytest.mark.parametrize("tail", ["mask", "keep"])
async def test_the_same_seed_says_the_same(engine: Any, finish: Any, tail: str) -> None:
    draw = steered(tail, n=2, temperature=1.0)
    first, deltas = await finish(engine, draw)
    second, _ = await finish(engine, draw)
    assert [c.choice for c in first] == [c.choice for c in second]
    for candidate in first:
        assert (
            "".join(d.choice["delta"]["content"] for d in deltas if d.index == candidate.index)
            == candidate.text
        )


async def test_without_weights_it_is_one_plain_call(engine: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 8}
    draw = Draw(body, 1, (3,), steering=Steering({NAME: 0.0}, 10, "keep"))
    (plain,), (steered_by_nothing,) = (
        await engine.generate(Draw(body, 1, (3,))),
        await engine.generate(draw),
    )
    assert steered_by_nothing.choice == plain.choice
    assert steered_by_nothing.calls == 1


async def test_the_cost_is_said(engine: Any) -> None:
    body = {
        "messages": QUESTION,
        "max_tokens": 4,
        "align": {"vas": {"beta": {NAME: 2.0}, "tail": "mask"}, "best_of_n": {"n": 2}},
    }
    request = parse_request({**body, "align": {"vas": body["align"]["vas"]}}, "chat", {})
    plan = make_plan(request, engine, {}, {}, Limits(8, 1000))
    response = await align(plan, engine)
    (candidate,) = response.candidates
    assert candidate.calls >= candidate.completion_tokens


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
async def test_what_it_cannot_honour_is_refused_by_name(
    engine: Any, field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=field) as refused:
        engine.check(steered("mask", **{field: value}))
    assert refused.value.param == field


def scripted(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An upstream of text completions that shows two tokens of the demo's vocabulary, and always samples the first."""
    logprobs = {"tokens": ["the"], "top_logprobs": [{"the": -0.5, "a": -1.0}]}
    choice = {
        "index": 0,
        "text": "the",
        "message": {"content": "the"},
        "logprobs": logprobs,
        "finish_reason": "length",
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


async def test_what_the_upstream_refuses_is_the_requests_fault_and_never_422() -> None:
    with fake_upstream() as up:
        up.answer = scripted
        engine = OpenAI(urls=up.url, tokenizer="demo", probe=False).load()
        engine.values = values()
        await engine.start()
        assert Capability.STEER in engine.capabilities
        up.behave = lambda _, __: "error_422"
        with pytest.raises(InvalidRequest, match="not a number") as refused:
            await engine.generate(steered("mask", n=2))
        assert refused.value.status == 400
        up.behave = lambda _, __: "error_500"
        (failed,) = await engine.generate(steered("mask"))
        assert failed.status == 500
        assert not engine._drawings
        await engine.close()


async def test_names_and_sizes_are_refused(engine: Any) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'brief'"):
        engine.check(Draw({"messages": QUESTION}, steering=Steering({"brif": 1.0}, 10, "mask")))
    with pytest.raises(Unsupported, match=r"top_k: 21 is over the 20"):
        engine.check(Draw({"messages": QUESTION}, steering=Steering({NAME: 1.0}, 21, "mask")))


async def test_stop_and_leave(engine: Any) -> None:
    async with engine.sample(steered("mask", n=3, max_tokens=100)) as stream:
        async for event in stream:
            if not hasattr(event, "interrupted"):
                stream.stop()
            else:
                assert event.interrupted or event.finish_reason == "stop"
    assert not engine._drawings


def vas(engine: Any, tail: str = "keep") -> Any:
    request = parse_request(
        {"messages": QUESTION, "align": {"vas": {"beta": {NAME: 1.0}, "tail": tail}}}, "chat", {}
    )
    return make_plan(request, engine, {}, {}, Limits(8, 100000))


async def test_what_is_missing_is_named(demo: Live) -> None:
    without = OpenAI(urls=demo.base_url).load()
    await without.start()
    with pytest.raises(Unsupported, match="tokenizer"):
        vas(without)
    await without.close()
    with fake_upstream() as blind:  # shows no logprobs at all
        engine = OpenAI(urls=blind.url, tokenizer="demo").load()
        engine.values = values()
        await engine.start()
        assert Capability.STEER not in engine.capabilities
        with pytest.raises(Unsupported, match="top_logprobs"):
            vas(engine)
        await engine.close()


async def test_the_tail_needs_logit_bias(demo: Live) -> None:
    engine = OpenAI(
        urls=demo.base_url, tokenizer="demo", probe=False, capabilities=("completion", "logprobs")
    ).load()
    engine.values = values()
    await engine.start()
    with pytest.raises(Unsupported, match="logit_bias"):
        vas(engine)
    assert vas(engine, "mask").draws[0].steering.tail == "mask"
    await engine.close()


async def test_values_that_need_the_models_states_are_refused(demo: Live) -> None:
    engine = OpenAI(urls=demo.base_url, tokenizer="demo").load()
    engine.values = {"helpful": Head(path="demo/value-helpful.safetensors").load()}
    with pytest.raises(ConfigError, match="lookahead"):
        await engine.start()
    await engine.close()


# --- how tokens are named ---

VOCABULARY = {b"a": 1, b"\xe2\x82": 2, b" b": 3}


def shown(way: Any, names: Any) -> dict[int, float]:
    return Continuation(way, VOCABULARY, "m").top_logprobs({"choices": [{"logprobs": names}]})


def test_tokens_are_known_by_id_by_text_or_by_bytes() -> None:
    assert shown("ids", {"top_logprobs": [{"token_id:7": -1.0, "token_id:1": -2.0}]}) == {
        7: -1.0,
        1: -2.0,
    }
    assert shown(
        "text", {"top_logprobs": [{"a": -1.0, "bytes:\\xe2\\x82": -2.0, " b": -3.0, "?": -4.0}]}
    ) == {
        1: -1.0,
        2: -2.0,
        3: -3.0,
    }
    entries = [
        {"token": "\ufffd", "bytes": [0xE2, 0x82], "logprob": -1.0},
        {"token": "a", "bytes": None, "logprob": -2.0},
    ]
    assert shown("chat", {"content": [{"token": "a", "top_logprobs": entries}]}) == {
        2: -1.0,
        1: -2.0,
    }
    for nothing in (None, {}, {"top_logprobs": []}, {"top_logprobs": [{"?": -1.0}]}):
        with pytest.raises(UpstreamFailed):
            shown("text", nothing)


def test_a_prefix_is_continued_as_exactly_as_can_be() -> None:
    prompt = Prompt("<u>q", (4,), {"messages": QUESTION, "chat_template_kwargs": {"x": 1}})
    assert Continuation("ids", VOCABULARY, "m").body(prompt, [5], "so")["prompt"] == [4, 5]
    assert Continuation("text", VOCABULARY, "m").body(prompt, [5], "so")["prompt"] == "<u>qso"
    chat = Continuation("chat", VOCABULARY, "m").body(prompt, [5], "so")
    assert chat["messages"][-1] == {"role": "assistant", "content": "so"}
    assert chat["continue_final_message"] is True
    assert chat["chat_template_kwargs"] == {"x": 1}
    assert Continuation("chat", VOCABULARY, "m").body(prompt, [], "")["messages"] == QUESTION
