"""The engine in front of another infer-align server keeps the contract of every engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from infer_align.engines.openai import OpenAI, OpenAIEngine
from infer_align.errors import ConfigError, InvalidRequest, Unavailable
from infer_align.types import Candidate, Delta, Draw, Kind
from tests.engines.openai.conftest import QUICK, until
from tests.server.conftest import Live

pytestmark = pytest.mark.anyio

MakeDraw = Callable[..., Draw]


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_candidates_come_whole_and_streamed(
    engine: OpenAIEngine, draw: MakeDraw, finish: Any, kind: Kind, streamed: bool
) -> None:
    body = draw(kind=kind, max_tokens=5).body
    candidates, deltas = await finish(engine, Draw(body, 3, (1, 2, 3), kind, deltas=streamed))
    assert [candidate.index for candidate in candidates] == [0, 1, 2]
    for candidate in candidates:
        assert candidate.text == "a b c d e"
        assert candidate.finish_reason == "length"
        assert candidate.completion_tokens == 5
        assert candidate.prompt_tokens == 2
        choices = [delta.choice for delta in deltas if delta.index == candidate.index]
        texts = [
            choice["delta"]["content"] if kind == "chat" else choice["text"] for choice in choices
        ]
        assert "".join(texts) == (candidate.text if streamed else "")
    assert sum(candidate.calls for candidate in candidates) == 1


async def test_stop_finishes_all_candidates_with_their_text(
    engine: OpenAIEngine, server: Live, draw: MakeDraw
) -> None:
    finished: list[Candidate] = []
    request = Draw(draw().body, 4, (1, 2, 3, 4), has_deadline=True)
    async with engine.sample(request) as stream:
        async for event in stream:
            if isinstance(event, Delta):
                stream.stop()
            elif isinstance(event, Candidate):
                finished.append(event)
    finished.sort(key=lambda candidate: candidate.index)
    assert [candidate.index for candidate in finished] == [0, 1, 2, 3]
    assert finished[1].interrupted
    assert finished[3].interrupted
    assert await until(lambda: server.idle(0.0))


@pytest.mark.slow
async def test_one_candidate_is_stopped_and_the_other_finishes(
    engine: OpenAIEngine, draw: MakeDraw
) -> None:
    finished: dict[int, Candidate] = {}
    # Both candidates come by one call, which goes on until its last choice ends.
    body = draw(max_tokens=100).body
    async with engine.sample(Draw(body, 2, (1, 2), deltas=True)) as stream:
        async for event in stream:
            if isinstance(event, Delta) and event.index == 1:
                stream.stop(1)
            elif isinstance(event, Candidate):
                finished[event.index] = event
    assert (finished[0].interrupted, finished[1].interrupted) == (False, True)
    # The upstream would have counted the prompt at the end of its stream.
    assert finished[1].prompt_tokens > 0
    assert finished[0].text == QUICK


async def test_closing_the_engine_ends_every_stream_with_an_error(
    engine: OpenAIEngine, draw: MakeDraw
) -> None:
    async with engine.sample(draw(n=2)) as stream:
        await engine.close()
        with pytest.raises(Unavailable):
            await anext(stream)
    assert engine.health()
    with pytest.raises(Unavailable):
        engine.sample(draw())


async def test_the_upstream_refuses_a_wrong_value_by_name(
    engine: OpenAIEngine, draw: MakeDraw
) -> None:
    with pytest.raises(InvalidRequest, match="temperature") as raised:
        await engine.generate(draw(temperature=5))
    assert (raised.value.param, raised.value.status) == ("temperature", 400)


async def test_the_worst_case_is_the_maximum_or_the_context(engine: OpenAIEngine) -> None:
    assert engine.worst_case_tokens({"messages": [], "max_tokens": 5}) == 5
    assert engine.worst_case_tokens({"messages": []}) == engine.context_length


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
def test_a_wrong_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OpenAI(**{"urls": "http://x", **config}).load()


@pytest.mark.slow
def test_forwarding_needs_neither_torch_nor_the_sdk() -> None:
    code = (
        "import sys, infer_align.engines.openai\n"
        "assert not {'torch', 'transformers', 'openai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
