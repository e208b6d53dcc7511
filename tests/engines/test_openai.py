"""The engine before real upstreams: what it finds out, how it reads labels, and the contract of every engine."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from infer_align.engines.openai import OpenAI, OpenAIEngine
from infer_align.engines.openai.models import parse_models
from infer_align.errors import ConfigError, InvalidRequest, Unavailable, Unsupported
from infer_align.types import Candidate, Capability, Delta, Draw, LabelQuery
from infer_align.upstream import UpstreamFailed
from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.conftest import end, start

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def up() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


@pytest.fixture
async def engine(up: FakeUpstream) -> AsyncIterator[Callable[..., Any]]:
    """`await engine(n="single")`: started before that upstream."""
    up.reset()
    made: list[OpenAIEngine] = []

    async def make(**config: Any) -> OpenAIEngine:
        made.append(OpenAI(**{"urls": up.url, "probe": False, **config}).load())
        assert made[-1].health(), "not healthy before start"
        await made[-1].start()
        return made[-1]

    yield make
    for one in made:
        await one.close()


# --- what it finds out ---


def capable(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An upstream that can do everything; it continues a turn where it is asked to."""
    top = [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.5}]
    says = {"40": "I", "50": "S"}.get(
        next(iter(body.get("logit_bias") or {}), ""), f"seed {body.get('seed')}"
    )
    message: dict[str, Any] = {
        "role": "assistant",
        "content": '{"x": 1}' if "response_format" in body else says,
    }
    if isinstance(body.get("tool_choice"), dict):
        message |= {
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": body["tool_choice"]["function"]}
            ],
        }
    choice: dict[str, Any] = {"message": message, "finish_reason": "length"}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.5, "top_logprobs": top}]}
    tokens = 10 - 3 * bool(body.get("continue_final_message"))
    return {
        "choices": [{"index": i, **choice} for i in range(body.get("n", 1))],
        "usage": {"prompt_tokens": tokens},
    }


def indifferent(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An upstream that answers 200 whatever it is asked, and always the same."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "text": "hello",
        "finish_reason": "length",
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 10}}


async def test_everything_is_found(up: FakeUpstream, engine: Any) -> None:
    up.answer = capable
    found = await engine(probe=True)
    assert {"completion", "seed", "logprobs", "label_logprobs", "tools", "structured"} | {
        "chat"
    } == set(found.capabilities)
    (probed,) = found.features.values()
    assert {"n", "logit_bias", "continue"} <= probed.supported
    assert not probed.ignored | probed.accepted | probed.unknown
    assert all(body["max_tokens"] <= 48 for body in up.bodies)
    assert len(up.bodies) < 16
    assert found.context_length == 1000


async def test_a_200_is_no_capability(up: FakeUpstream, engine: Any) -> None:
    """Seeds, tools, formats and biases count where they are seen to work; a bias that changes nothing is refused by name."""
    up.answer = indifferent
    found = await engine(probe=True)
    assert set(found.capabilities) == {"chat", "completion"}
    (probed,) = found.features.values()
    assert probed.accepted == {"seed", "tools", "structured"}
    assert probed.ignored == {"logprobs", "n", "logit_bias", "continue"}
    found.check(Draw({"messages": ASK, "tools": [{}], "response_format": {}}, seed_requested=True))
    with pytest.raises(Unsupported, match="logit_bias"):
        found.check(Draw({"messages": ASK, "logit_bias": {"1": 5}}))


async def test_what_is_ignored_is_refused_by_name(up: FakeUpstream, engine: Any) -> None:
    up.max_choices = 1
    found = await engine(probe=True)
    assert Capability.LOGPROBS not in found.capabilities
    assert Capability.LABEL_LOGPROBS not in found.capabilities
    with pytest.raises(Unsupported, match="logprobs") as refused:
        found.check(Draw({"messages": ASK, "logprobs": True, "top_logprobs": 3}))
    assert refused.value.param == "logprobs"
    found.check(
        Draw({"messages": ASK, "temperature": 7, "custom": 1})
    )  # whether a value is right is the upstream's to say
    up.clear_log()
    await found.generate(Draw({"messages": ASK}, 3, (1, 2, 3)))
    assert up.calls == 3, "that n is ignored was found at the start"
    with pytest.raises(Unsupported):
        await found.read_labels(LabelQuery(ASK, "", ("1",)))


async def test_an_upstream_that_refuses_or_fails_probes_still_serves(
    up: FakeUpstream, engine: Any
) -> None:
    up.behave = lambda _, body: (
        "ok" if "max_tokens" not in body else ("error_500" if "tools" in body else "error_400")
    )
    found = await engine(probe=True)
    assert found.health() is None
    assert set(found.capabilities) == {"chat"}
    assert (await found.generate(Draw({"messages": ASK})))[0].text.startswith("candidate")
    with pytest.raises(Unsupported, match="text completions"):
        found.check(Draw({"prompt": "x"}, kind="completion"))
    found.check(Draw({"messages": ASK, "tools": [{}]}))


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> bool:
    """Whether it comes true in time; the loop goes on meanwhile."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


async def test_a_probe_that_failed_is_repeated(up: FakeUpstream, engine: Any) -> None:
    up.behave, up.answer = (lambda _, __: "error_500"), capable
    found = await engine(probe=True, recovery_seconds=0.1)
    assert set(found.capabilities) == {"chat"}
    up.behave = lambda _, __: "ok"
    assert await until(lambda: "label_logprobs" in found.capabilities)
    calls = up.calls
    await asyncio.sleep(0.4)
    assert up.calls == calls, "what is known is not asked again"


async def test_each_upstream_is_asked_about_models_of_its_own(
    up: FakeUpstream, engine: Any
) -> None:
    up.answer = capable
    with fake_upstream() as other:
        other.models, other.answer = (
            [{"id": "other", "max_model_len": 77}, {"id": "another"}],
            indifferent,
        )
        found = await engine(probe=True, urls=(up.url, other.url))
        assert found.models == ("up", "other", "another"), (
            "the first upstream's first, whoever answers first"
        )
        assert {body["model"] for body in up.bodies} == {"up"}
        assert {body["model"] for body in other.bodies} == {"other", "another"}
        assert {"logprobs", "seed"} <= set(found.capabilities), "those of the first model"
        found.check(Draw({"model": "up", "messages": ASK, "logprobs": True}))
        with pytest.raises(Unsupported, match="'other' does not honour it"):
            found.check(Draw({"model": "other", "messages": ASK, "logprobs": True}))
        assert found.worst_case_tokens({"model": "other", "messages": ASK}) == 77
        assert found.worst_case_tokens({"messages": ASK}) == 1000


async def test_an_upstream_without_the_configured_model_is_left_out(
    up: FakeUpstream, engine: Any
) -> None:
    with fake_upstream() as other:
        other.models = [{"id": "else"}]
        found = await engine(model="up", urls=(other.url, up.url))
        for _ in range(4):
            await found.generate(Draw({"messages": ASK}))
        assert (up.calls, other.calls) == (4, 0)
        nobody = await engine(model="unlisted", urls=(other.url, up.url))
        await nobody.generate(Draw({"messages": ASK}))
        assert up.calls + other.calls == 5, "where none lists it, lists say nothing"


async def test_probes_are_bounded_in_time(up: FakeUpstream, engine: Any) -> None:
    up.behave = lambda _, __: "hang"
    found = await engine(probe=True, probe_seconds=0.3)
    assert found.health() is None
    assert set(found.capabilities) == {"chat"}
    assert up.until(lambda: up.running == 0, 1.0)


async def test_a_list_can_be_trusted_instead(up: FakeUpstream, engine: Any) -> None:
    found = await engine(capabilities=("seed", "label_logprobs"))
    assert up.calls == 0
    assert set(found.capabilities) == {"chat", "seed", "label_logprobs"}
    for field in ("tools", "response_format", "logprobs", "logit_bias"):
        with pytest.raises(Unsupported, match=field):
            found.check(Draw({"messages": ASK, field: [{"x": 1}]}))


@pytest.mark.parametrize(
    "config",
    [
        {"urls": ()},
        {"urls": "ftp://x"},
        {"urls": "http://u:p@x"},
        {"api_key_env": "NO_SUCH_KEY"},
        {"capabilities": ("telepathy",)},
    ],
)
def test_what_cannot_be_configured(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OpenAI(**{"urls": "http://x", **config}).load()


def test_lists_of_models_in_the_wild() -> None:
    entries = [
        {"id": "a", "max_model_len": 5},
        {"id": "b", "context_length": 7},
        {"id": "c"},
        {"x": 1},
        3,
    ]
    assert parse_models({"data": entries}) == {"a": 5, "b": 7, "c": None}
    assert parse_models([]) == parse_models({"data": None}) == {}


def test_forwarding_needs_neither_torch_nor_the_sdk() -> None:
    code = "import sys, infer_align.engines.openai; assert not {'torch', 'transformers', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the contract of every engine ---


@pytest.fixture
async def before_ours(tmp_path: Path) -> AsyncIterator[Any]:
    """The engine before another server of ours, over the scripted engine."""
    path = tmp_path / "c.toml"
    path.write_text(
        '[engine]\nkind = "fake"\nreplies = [{text = "a b c d e f g h i j k l", seconds_per_token = 0.01}]\n',
        encoding="utf-8",
    )
    live = start(configuration.load(path))
    engine = OpenAI(urls=live.base_url).load()
    await engine.start()
    yield engine, live
    await engine.close()
    assert live.idle()
    end(live)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_our_own_server_as_the_upstream(
    before_ours: Any, draw: Any, finish: Any, kind: Any, streamed: bool
) -> None:
    engine, _ = before_ours
    request = Draw(draw(kind=kind, max_tokens=5).body, 3, (1, 2, 3), kind, deltas=streamed)
    candidates, deltas = await finish(engine, request)
    assert [c.index for c in candidates] == [0, 1, 2]
    for candidate in candidates:
        assert candidate.text == "a b c d e"
        assert candidate.finish_reason == "length"
        assert candidate.completion_tokens == 5
        assert candidate.prompt_tokens == 2
        mine = [d.choice for d in deltas if d.index == candidate.index]
        said = "".join(c["delta"]["content"] if kind == "chat" else c["text"] for c in mine)
        assert said == (candidate.text if streamed else "")
    assert sum(c.calls for c in candidates) == 1


async def test_stop_yields_what_there_is(before_ours: Any, draw: Any) -> None:
    engine, live = before_ours
    seen: list[Candidate] = []
    async with engine.sample(Draw(draw().body, 3, (1, 2, 3), has_deadline=True)) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                stream.stop()
            else:
                seen.append(event)
    assert sorted(c.index for c in seen) == [0, 1, 2]
    assert all(c.interrupted for c in seen)
    assert live.idle(1.0)


async def test_one_of_several_is_stopped(before_ours: Any, draw: Any) -> None:
    engine, _ = before_ours
    seen: dict[int, Candidate] = {}
    async with engine.sample(Draw(draw().body, 2, (1, 2), deltas=True)) as stream:
        async for event in stream:
            if isinstance(event, Delta) and event.index == 1 and 1 not in seen:
                stream.stop(1)
            elif isinstance(event, Candidate):
                seen[event.index] = event
    assert (seen[0].interrupted, seen[1].interrupted) == (False, True)
    assert seen[0].text.endswith("k l")


async def test_closing_ends_every_stream_with_an_error(before_ours: Any, draw: Any) -> None:
    engine, _ = before_ours
    async with engine.sample(draw(n=2)) as stream:
        await engine.close()
        with pytest.raises(Unavailable):
            await anext(stream)
    assert engine.health()
    with pytest.raises(Unavailable):
        engine.sample(draw())


async def test_a_wrong_value_is_refused_by_the_upstream_by_name(
    before_ours: Any, draw: Any
) -> None:
    engine, _ = before_ours
    with pytest.raises(InvalidRequest, match="temperature") as refused:
        await engine.generate(draw(temperature=5))
    assert (refused.value.param, refused.value.status) == ("temperature", 400)


async def test_worst_case(before_ours: Any) -> None:
    engine, _ = before_ours
    assert engine.worst_case_tokens({"messages": [], "max_tokens": 5}) == 5
    assert engine.worst_case_tokens({"messages": []}) == engine.context_length


async def test_a_text_that_names_stream_options_unmeters_nobody(
    up: FakeUpstream, engine: Any
) -> None:
    up.behave = lambda _, body: "echo" if "top_p" in body else "ok"
    asked = await engine()
    with pytest.raises(InvalidRequest, match="I refuse"):
        await asked.generate(Draw({"messages": ASK, "top_p": 7}, deltas=True))
    up.clear_log()
    await asked.generate(Draw({"messages": ASK}, deltas=True))
    assert up.bodies[0]["stream_options"] == {"include_usage": True}


async def test_usage_that_is_missing_is_read_from_the_text(up: FakeUpstream, engine: Any) -> None:
    up.answer = lambda _, __: {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "x" * 400}}]
    }
    (candidate,) = await (await engine()).generate(Draw({"messages": ASK}))
    assert candidate.completion_tokens == 100


async def test_an_upstream_that_meters_no_streams(up: FakeUpstream, engine: Any) -> None:
    up.behave = lambda _, body: "no_stream_options" if "stream_options" in body else "ok"
    asked = await engine()
    for calls in (2, 1):
        up.clear_log()
        (candidate,) = await asked.generate(Draw({"messages": ASK}, deltas=True))
        assert (candidate.text, candidate.completion_tokens) == ("candidate 3", 3), (
            "its eleven characters"
        )
        assert candidate.calls == up.calls == calls


# --- labels ---


def speaker(model: dict[str, dict[str, float]], *, continues: bool) -> Any:
    """An upstream whose next token after each text is known."""

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        last = body["messages"][-1]
        if body.get("continue_final_message") and continues:
            said = last["content"].removeprefix("Score: [")
        else:
            said = last["content"].partition("Score: [")[2].partition("'")[0]
        top = [{"token": t, "logprob": math.log(p)} for t, p in model.get(said, {"z": 1.0}).items()]
        choice = {
            "message": {"content": "?"},
            "logprobs": {
                "content": [{"token": "?", "top_logprobs": top[: body.get("top_logprobs", 0)]}]
            },
        }
        return {"choices": [choice], "usage": {"prompt_tokens": 11}}

    return answer


@pytest.mark.parametrize("continues", [True, False])
async def test_labels_of_one_token(up: FakeUpstream, engine: Any, continues: bool) -> None:
    up.answer = speaker({"": {"3": 0.5, "4": 0.25, "x": 0.25}}, continues=continues)
    features = ("label_logprobs", *(("continue",) if continues else ()))
    reading = await (await engine(capabilities=features)).read_labels(
        LabelQuery(ASK, "Score: [", ("3", "4", "5"))
    )
    assert reading.logprobs == {
        "3": pytest.approx(math.log(0.5)),
        "4": pytest.approx(math.log(0.25)),
        "5": -math.inf,
    }
    assert (reading.calls, reading.prompt_tokens, up.calls) == (1, 11, 1)
    sent = up.bodies[0]
    assert (sent["max_tokens"], sent["top_logprobs"]) == (1, 20)
    assert (sent["messages"][-1]["role"] == "assistant") is continues
    assert sent.get("add_generation_prompt", True) is not continues


async def test_labels_of_several_tokens(up: FakeUpstream, engine: Any) -> None:
    model = {
        "": {"8": 0.5, "1": 0.4, "85": 0.0625},
        "8": {"5": 0.5, "]": 0.5},
        "1": {"0": 0.5, "]": 0.5},
        "10": {"0": 0.5, "]": 0.5},
    }
    up.answer = speaker(model, continues=True)
    labels = tuple(str(i) for i in range(1, 101))
    reading = await (await engine(capabilities=("label_logprobs", "continue"))).read_labels(
        LabelQuery(ASK, "Score: [", labels)
    )
    found = {
        label: math.exp(logprob)
        for label, logprob in reading.logprobs.items()
        if logprob > -math.inf
    }
    assert found == pytest.approx({"8": 0.25, "85": 0.25 + 0.0625, "1": 0.2, "10": 0.1, "100": 0.1})
    assert reading.calls == up.calls == 4


async def test_where_turns_cannot_be_continued_a_label_may_end_before_a_longer_one(
    up: FakeUpstream, engine: Any
) -> None:
    """The upstream says what it was asked to choose from: "]" where the label is whole."""
    labels = tuple(str(i) for i in range(1, 11))
    up.answer = speaker({"": {"1": 0.9, "2": 0.1}, "1": {"]": 0.95, "0": 0.05}}, continues=False)
    asked = await engine(capabilities=("label_logprobs",))
    reading = await asked.read_labels(LabelQuery(ASK, "Score: [", labels))
    assert {
        label: math.exp(p) for label, p in reading.logprobs.items() if p > -math.inf
    } == pytest.approx({"1": 0.855, "10": 0.045, "2": 0.1})
    assert up.bodies[1]["messages"][-1]["content"].endswith("It is one of: ], 0.")


async def test_a_tokenizer_that_says_numbers_whole_is_asked_once(
    up: FakeUpstream, engine: Any
) -> None:
    up.answer = speaker(
        {"": {"1": 0.9, "85": 0.1}, "1": {"0": 1.0}, "8": {"5": 1.0}}, continues=False
    )
    labels = tuple(str(i) for i in range(1, 101))
    reading = await (await engine(capabilities=("label_logprobs",))).read_labels(
        LabelQuery(ASK, "Score: [", labels)
    )
    found = {label: math.exp(p) for label, p in reading.logprobs.items() if p > -math.inf}
    assert found == pytest.approx({"1": 0.9, "85": 0.1})
    assert up.calls == reading.calls == 1


@pytest.mark.parametrize(("probed", "calls"), [(True, 1), (False, 2)])
async def test_labels_of_a_model_that_knows_the_newer_limit_only(
    up: FakeUpstream, engine: Any, probed: bool, calls: int
) -> None:
    up.behave = lambda _, body: "newer_limit" if "max_tokens" in body else "ok"
    up.answer = speaker({"": {"3": 0.5, "4": 0.25}}, continues=False)
    asked = await engine(probe=probed, capabilities=("label_logprobs",))
    up.clear_log()
    reading = await asked.read_labels(LabelQuery(ASK, "Score: [", ("3", "4")))
    assert reading.logprobs["3"] == pytest.approx(math.log(0.5))
    assert (reading.calls, up.calls) == (calls, calls)
    assert up.bodies[-1]["max_completion_tokens"] >= 1


async def test_labels_fail_by_name(up: FakeUpstream, engine: Any) -> None:
    asked = await engine(capabilities=("label_logprobs",))
    with pytest.raises(UpstreamFailed, match="no top logprobs"):
        await asked.read_labels(LabelQuery(ASK, "", ("1",)))
    up.behave = lambda _, __: "error_500"
    with pytest.raises(UpstreamFailed, match="on fire"):
        await asked.read_labels(LabelQuery(ASK, "", ("1",)))
