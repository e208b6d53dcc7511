"""Probing finds the features that an upstream really offers."""

from __future__ import annotations

from typing import Any

import pytest

from infer_align.decoding.labels import LabelQuery
from infer_align.engines.openai import OpenAIEngine
from infer_align.engines.openai.probe import Features
from infer_align.errors import Unsupported
from infer_align.types import Capability, Draw
from tests.engines.openai.conftest import QUESTION, MakeEngine, until
from tests.engines.openai.upstream import FakeUpstream

pytestmark = pytest.mark.anyio

TEXT_OF_BIAS = {"40": "I", "50": "S"}
TOP_LOGPROBS = [{"token": "x", "logprob": -0.5}, {"token": "y", "logprob": -1.5}]


def capable(_: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer as an upstream with every feature does."""
    biased_token = next(iter(body.get("logit_bias") or {}), "")
    content = TEXT_OF_BIAS.get(biased_token, f"seed {body.get('seed')}")
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if "response_format" in body:
        message["content"] = '{"x": 1}'
    if isinstance(body.get("tool_choice"), dict):
        function = body["tool_choice"]["function"]
        message["content"] = None
        message["tool_calls"] = [{"id": "c", "type": "function", "function": function}]
    choice: dict[str, Any] = {"message": message, "finish_reason": "length"}
    if body.get("logprobs"):
        entry = {"token": "x", "logprob": -0.5, "top_logprobs": TOP_LOGPROBS}
        choice["logprobs"] = {"content": [entry]}
    prompt_tokens = 7 if body.get("continue_final_message") else 10
    extra: dict[str, Any] = {}
    if body.get("echo"):
        tokens = body["prompt"].split(" ")
        prompt_tokens = len(tokens)
        choice["logprobs"] = {
            "tokens": [*tokens, "x"],
            "token_logprobs": [None, *[-1.0] * len(tokens)],
        }
    if "prompt_logprobs" in body:
        words = body["messages"][-1]["content"].split(" ")
        listed = [{"1": {"decoded_token": f" {word}", "logprob": -1.0}} for word in words]
        extra["prompt_logprobs"] = [None, *listed]
    return {
        **extra,
        "choices": [{"index": i, **choice} for i in range(body.get("n", 1))],
        "usage": {"prompt_tokens": prompt_tokens},
    }


def indifferent(_: str, __: dict[str, Any]) -> dict[str, Any]:
    """Answer as an upstream does that accepts and ignores every field."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "text": "hello",
        "finish_reason": "length",
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 10}}


def features_of(engine: OpenAIEngine) -> Features:
    (features,) = engine.features.values()
    return features


async def test_every_feature_is_found(up: FakeUpstream, make_engine: MakeEngine) -> None:
    up.answer = capable
    engine = await make_engine(probe=True)
    assert set(engine.capabilities) == {
        "chat",
        "completion",
        "seed",
        "logprobs",
        "label_logprobs",
        "sequence_logprobs",
        "tools",
        "structured",
    }
    features = features_of(engine)
    assert {"n", "logit_bias", "continue", "echo"} <= features.supported
    assert not features.ignored | features.accepted | features.unknown
    assert engine.context_length == 1000


async def test_probing_is_cheap(up: FakeUpstream, make_engine: MakeEngine) -> None:
    up.answer = capable
    await make_engine(probe=True)
    assert all(body["max_tokens"] <= 48 for body in up.bodies)
    assert len(up.bodies) < 18


async def test_status_200_proves_no_feature(up: FakeUpstream, make_engine: MakeEngine) -> None:
    """A feature counts if it has an effect; a bias that changes nothing is refused by name."""
    up.answer = indifferent
    engine = await make_engine(probe=True)
    assert set(engine.capabilities) == {"chat", "completion"}
    features = features_of(engine)
    assert features.accepted == {"seed", "tools", "structured"}
    assert features.ignored == {"logprobs", "n", "logit_bias", "continue"}
    fields = {"tools": [{}], "response_format": {}}
    engine.check(Draw({"messages": QUESTION, **fields}, seed_requested=True))
    with pytest.raises(Unsupported, match="logit_bias"):
        engine.check(Draw({"messages": QUESTION, "logit_bias": {"1": 5}}))


async def test_an_ignored_feature_is_refused_by_name(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    engine = await make_engine(probe=True)
    assert Capability.LOGPROBS not in engine.capabilities
    assert Capability.LABEL_LOGPROBS not in engine.capabilities
    with pytest.raises(Unsupported, match="logprobs") as raised:
        engine.check(Draw({"messages": QUESTION, "logprobs": True, "top_logprobs": 3}))
    assert raised.value.param == "logprobs"
    with pytest.raises(Unsupported):
        await engine.read_labels(LabelQuery(QUESTION, "", ("1",)))


async def test_values_and_unknown_fields_are_left_to_the_upstream(
    make_engine: MakeEngine,
) -> None:
    engine = await make_engine(probe=True)
    engine.check(Draw({"messages": QUESTION, "temperature": 7, "custom": 1}))


async def test_an_ignored_n_is_not_requested(up: FakeUpstream, make_engine: MakeEngine) -> None:
    up.max_choices = 1
    engine = await make_engine(probe=True)
    up.clear_log()
    await engine.generate(Draw({"messages": QUESTION}, 3, (1, 2, 3)))
    assert [body.get("n") for body in up.bodies] == [None] * 3


async def test_an_upstream_that_refuses_or_fails_probes_still_serves(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    def behave(_: int, body: dict[str, Any]) -> str:
        if "max_tokens" not in body:
            return "ok"
        return "error_500" if "tools" in body else "error_400"

    up.behave = behave
    engine = await make_engine(probe=True)
    assert engine.health() is None
    assert set(engine.capabilities) == {"chat"}
    (candidate,) = await engine.generate(Draw({"messages": QUESTION}))
    assert candidate.text.startswith("candidate")
    with pytest.raises(Unsupported, match="text completions"):
        engine.check(Draw({"prompt": "x"}, kind="completion"))
    engine.check(Draw({"messages": QUESTION, "tools": [{}]}))


async def test_a_failed_probe_is_repeated_until_it_is_answered(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.behave = lambda _, __: "error_500"
    up.answer = capable
    engine = await make_engine(probe=True, recovery_seconds=0.1)
    assert set(engine.capabilities) == {"chat"}
    up.behave = lambda _, __: "ok"
    assert await until(lambda: "label_logprobs" in engine.capabilities)
    calls = up.calls
    for _ in range(3):
        await engine._models.reach_all()
    assert up.calls == calls


async def test_probes_are_limited_in_time(up: FakeUpstream, make_engine: MakeEngine) -> None:
    up.behave = lambda _, __: "hang"
    engine = await make_engine(probe=True, probe_seconds=0.3)
    assert engine.health() is None
    assert set(engine.capabilities) == {"chat"}
    assert await until(lambda: up.running == 0)


async def test_without_probes_the_configured_features_count(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    engine = await make_engine(capabilities=("seed", "label_logprobs"))
    assert up.calls == 0
    assert set(engine.capabilities) == {"chat", "seed", "label_logprobs"}
    for field in ("tools", "response_format", "logprobs", "logit_bias"):
        with pytest.raises(Unsupported, match=field):
            engine.check(Draw({"messages": QUESTION, field: [{"x": 1}]}))
