"""Servers in front of a fake upstream, which is a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align import config as configuration
from infer_align.engines.openai import OpenAIEngine
from infer_align.upstream import client
from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.conftest import Live, end, start

NUMBER = '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
BEST_OF_4 = {"best_of_n": {"n": 4}}
# A function that starts a server with these options of [engine].
Serve = Callable[..., Live]


@pytest.fixture(scope="module")
def running_upstream() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


@pytest.fixture
def up(running_upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    """A fake upstream that behaves well and has no requests yet."""
    running_upstream.reset()
    yield running_upstream
    running_upstream.reset()


@pytest.fixture(autouse=True)
def _no_lost_connection_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry a kept-alive connection that is lost at once, even if a busy machine is late."""
    monkeypatch.setattr(client, "STALE_SECONDS", 60.0)


@pytest.fixture
def serve_upstream(up: FakeUpstream, tmp_path: Path) -> Iterator[Serve]:
    """`serve_upstream('n = "single"')`: a running server; `urls` is TOML, by default of `up`."""
    servers: list[Live] = []

    def serve(engine: str = "", extra: str = "", urls: str = "") -> Live:
        path = tmp_path / f"{len(servers)}.toml"
        urls = urls or repr(up.url)
        probe = "" if "probe =" in engine else "probe = false\n"
        section = f'[engine]\nkind = "openai"\n{probe}urls = [{urls}]\n{engine}\n'
        path.write_text(f"{section}{NUMBER}{extra}", encoding="utf-8")
        server = start(configuration.load(path))
        servers.append(server)
        up.clear_log()
        return server

    yield serve
    for server in servers:
        hosts = engine_of(server).client.pool.hosts
        # Every call has given its place back.
        assert up.until(lambda hosts=hosts: not any(host.running for host in hosts))
        end(server)


def engine_of(server: Live) -> OpenAIEngine:
    engine = server.service.engine
    assert isinstance(engine, OpenAIEngine)
    return engine


def align_of(answer: httpx2.Response) -> Any:
    """Return `align` of a successful answer."""
    assert answer.status_code == 200, answer.text
    return answer.json()["align"]


def content_of(answer: httpx2.Response) -> str:
    """Return the text of the first choice of a successful answer."""
    assert answer.status_code == 200, answer.text
    content = answer.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def events_of(answer: httpx2.Response) -> list[Any]:
    """Return the JSON of the events of a streamed answer."""
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    data = [line.removeprefix("data: ") for line in lines]
    return [json.loads(each) for each in data if each != "[DONE]"]
