"""Several upstreams share the load, and one that is down is left out until it is back."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.upstream.conftest import BEST_OF_4, Serve, align_of, content_of, engine_of


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/v1"


def test_a_retry_goes_to_another_upstream(up: FakeUpstream, serve_upstream: Serve) -> None:
    with fake_upstream() as second:
        server = serve_upstream('n = "single"', urls=f"'{up.url}', '{second.url}'")
        # With one upstream only, this Retry-After would be too long.
        up.behave = lambda _, __: "error_429_long"
        align = align_of(server.chat({"best_of_n": {"n": 6}}))
        assert align["dropped"] == 0
        assert second.calls == 6
        assert align["usage"]["engine_calls"] == up.calls + second.calls


def test_an_upstream_that_is_down_is_left_out(up: FakeUpstream, serve_upstream: Serve) -> None:
    urls = f"'{unused_url()}', {{url = '{up.url}', weight = 3}}"
    server = serve_upstream("recovery_seconds = 0.2", urls=urls)
    assert server.get("/ready").status_code == 200
    numbers = [3, 1, 9, 9]
    assert [content_of(server.chat()) for _ in numbers] == [f"candidate {n}" for n in numbers]
    down, good = engine_of(server).client.pool.hosts
    assert down.down_reason
    assert good.down_reason is None


def test_load_is_shared_by_weight(up: FakeUpstream, serve_upstream: Serve) -> None:
    with fake_upstream() as second:
        urls = f"{{url = '{up.url}', weight = 3}}, '{second.url}'"
        server = serve_upstream('n = "single"', urls=urls)
        up.word_seconds = second.word_seconds = 0.1
        server.chat({"best_of_n": {"n": 16}})
        assert (up.calls, second.calls) == (12, 4)


def test_the_concurrency_of_an_upstream_is_limited(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream('n = "single"\nmax_concurrency = 2')
    up.word_seconds = 0.05
    running: list[int] = []

    def behave(_: int, __: dict[str, Any]) -> str:
        running.append(up.running)
        return "ok"

    up.behave = behave
    assert align_of(server.chat({"best_of_n": {"n": 7}}))["dropped"] == 0
    # A call that is answered still counts in the upstream until its connection notices.
    assert 2 <= max(running) <= 4


def test_a_server_becomes_ready_when_its_upstream_does(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    engine = 'model = "up"\nrecovery_seconds = 0.1'
    server = serve_upstream(engine, urls=f"'{unused_url()}'")
    ready = server.get("/ready")
    assert ready.status_code == 503
    assert "no connection" in ready.json()["reason"]
    assert server.chat(BEST_OF_4).status_code == 503
    engine_of(server).client.pool.hosts[0].url = up.url
    assert server.until(lambda: server.get("/ready").status_code == 200)
    assert server.chat().status_code == 200


def test_an_upstream_that_stays_down_is_logged_once(
    serve_upstream: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve_upstream("recovery_seconds = 0.05", urls=f"'{unused_url()}'")
    host = engine_of(server).client.pool.hosts[0]
    failures = host.failures
    assert server.until(lambda: host.failures > failures + 6)
    refused = server.post({"model": "up", "messages": [{"role": "user", "content": "hi"}]})
    assert refused.status_code == 503
    assert "refused; try again later." in refused.json()["error"]["message"]
    warnings = [record.message for record in caplog.records if host.url in record.message]
    assert len(warnings) == 1, warnings
