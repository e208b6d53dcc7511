"""The engine in front of a fake upstream, or in front of another infer-align server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from infer_align.engines.openai import OpenAI, OpenAIEngine
from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.conftest import Live, end, start

MakeEngine = Callable[..., Awaitable[OpenAIEngine]]
QUESTION = [{"role": "user", "content": "hello"}]
# Candidates 0, 2, ... finish at once. Candidates 1, 3, ... run longer than any test.
QUICK = "a b c d e f g h i j k l"
LONG = QUICK + " and so on" * 1000
QUICK_AND_LONG = f"""
[engine]
kind = "fake"
replies = [{{text = "{QUICK}"}}, {{text = "{LONG}", seconds_per_token = 0.02}}]
"""


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Return True as soon as the condition holds, False after a time that is never needed."""
    end_time = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > end_time:
            return False
        await asyncio.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def running_upstream() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


@pytest.fixture
def up(running_upstream: FakeUpstream) -> FakeUpstream:
    """A fake upstream that behaves well and has no requests yet."""
    running_upstream.reset()
    return running_upstream


@pytest.fixture
async def make_engine(up: FakeUpstream) -> AsyncIterator[MakeEngine]:
    """`await make_engine(n="single")`: a started engine for the fake upstream, without probes."""
    engines: list[OpenAIEngine] = []

    async def make(**config: Any) -> OpenAIEngine:
        engine = OpenAI(**{"urls": up.url, "probe": False, **config}).load()
        engines.append(engine)
        assert engine.health(), "not healthy before start"
        await engine.start()
        return engine

    yield make
    for engine in engines:
        await engine.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    """An infer-align server over the scripted engine."""
    path = tmp_path / "config.toml"
    path.write_text(QUICK_AND_LONG, encoding="utf-8")
    live = start(configuration.load(path))
    yield live
    assert live.idle(), "every call was closed"
    end(live)


@pytest.fixture
async def engine(server: Live) -> AsyncIterator[OpenAIEngine]:
    """A started engine whose upstream is that server."""
    engine = OpenAI(urls=server.base_url).load()
    await engine.start()
    yield engine
    await engine.close()
