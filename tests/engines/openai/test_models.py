"""The engine serves the models that its upstreams list, each where it is listed."""

from __future__ import annotations

import pytest

from infer_align.engines.openai.models import parse_models
from infer_align.errors import Unsupported
from infer_align.types import Draw
from tests.engines.openai.conftest import QUESTION, MakeEngine
from tests.engines.openai.test_probe import capable, indifferent
from tests.engines.openai.upstream import FakeUpstream, fake_upstream

pytestmark = pytest.mark.anyio


async def test_each_upstream_is_probed_for_its_own_models(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    up.answer = capable
    with fake_upstream() as other:
        other.models = [{"id": "other", "max_model_len": 77}, {"id": "another"}]
        other.answer = indifferent
        engine = await make_engine(probe=True, urls=(up.url, other.url))
        # The models of the first upstream come first, even if another one answers first.
        assert engine.models == ("up", "other", "another")
        assert {body["model"] for body in up.bodies} == {"up"}
        assert {body["model"] for body in other.bodies} == {"other", "another"}
        # The capabilities are those of the first model.
        assert {"logprobs", "seed"} <= set(engine.capabilities)
        engine.check(Draw({"model": "up", "messages": QUESTION, "logprobs": True}))
        with pytest.raises(Unsupported, match="'other' does not honour it"):
            engine.check(Draw({"model": "other", "messages": QUESTION, "logprobs": True}))
        assert engine.worst_case_tokens({"model": "other", "messages": QUESTION}) == 77
        assert engine.worst_case_tokens({"messages": QUESTION}) == 1000


async def test_an_upstream_without_the_configured_model_is_not_used(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    with fake_upstream() as other:
        other.models = [{"id": "else"}]
        engine = await make_engine(model="up", urls=(other.url, up.url))
        for _ in range(4):
            await engine.generate(Draw({"messages": QUESTION}))
        assert (up.calls, other.calls) == (4, 0)


async def test_a_model_that_no_upstream_lists_may_be_on_any(
    up: FakeUpstream, make_engine: MakeEngine
) -> None:
    with fake_upstream() as other:
        other.models = [{"id": "else"}]
        engine = await make_engine(model="unlisted", urls=(other.url, up.url))
        await engine.generate(Draw({"messages": QUESTION}))
        assert up.calls + other.calls == 1


def test_malformed_entries_of_a_list_of_models_are_skipped() -> None:
    entries = [
        {"id": "a", "max_model_len": 5},
        {"id": "b", "context_length": 7},
        {"id": "c"},
        {"x": 1},
        3,
    ]
    assert parse_models({"data": entries}) == {"a": 5, "b": 7, "c": None}
    assert parse_models([]) == {}
    assert parse_models({"data": None}) == {}
