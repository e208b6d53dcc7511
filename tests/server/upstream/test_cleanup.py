"""After a request, nothing of it runs any more: neither here nor at the upstream."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from typing import Any

import pytest

from tests.engines.openai.upstream import FakeUpstream
from tests.server.conftest import LIMIT_SECONDS, USER, Live
from tests.server.upstream.conftest import Serve, engine_of

pytestmark = pytest.mark.slow

FAULTS = (
    "error_500",
    "error_503",
    "hang",
    "drip",
    "garbage",
    "truncated",
    "reset",
    "ended_early",
    "error_400",
)
BODIES: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"n": 2},
    {"align": {"best_of_n": {"n": 4}}},
    {"stream": True, "align": {"best_of_n": {"n": 3}}},
]


def send(server: Live, body: dict[str, Any]) -> socket.socket:
    """Send a request and return its connection, without reading the answer."""
    content = json.dumps({"model": "up", "messages": USER, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_SECONDS)
    connection.sendall(head.encode() + b"\r\n" + content)
    return connection


def assert_nothing_runs(server: Live, up: FakeUpstream) -> None:
    admission = server.service.admission
    assert up.until(lambda: up.running == 0), f"{up.running} calls run at the upstream"
    assert up.until(lambda: not (admission.running or admission.queued))
    assert up.until(lambda: not engine_of(server)._drawings)


@pytest.mark.parametrize("fault", ["hang", "drip", "error_429_long"])
@pytest.mark.parametrize(
    "body", [{}, {"stream": True}, {"align": {"best_of_n": {"n": 8}}}, {"n": 3}], ids=str
)
@pytest.mark.parametrize("engine", ["", 'n = "single"'])
def test_nothing_runs_after_the_client_has_left(
    up: FakeUpstream, serve_upstream: Serve, fault: str, body: Any, engine: str
) -> None:
    # A refused call is to be retried after 77 s.
    server = serve_upstream(f"{engine}\nmax_retry_wait_seconds = 100")
    before = server.server.tasks()
    up.behave = lambda _, __: fault
    connection = send(server, body)
    is_refused = fault == "error_429_long"
    assert up.until(lambda: up.calls > 0 and (up.running == 0) == is_refused)
    connection.close()
    assert_nothing_runs(server, up)
    # What waits to try again is a task too.
    assert up.until(lambda: server.server.tasks() <= before)


def test_nothing_runs_after_many_clients_and_many_faults(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    """Every request is answered, or its client leaves."""
    server = serve_upstream("retries = 1\nmax_concurrency = 24")
    chance = random.Random(7)
    behaviours = ["ok"] * 6 + list(FAULTS)
    up.behave = lambda _, __: chance.choice(behaviours)
    statuses: list[int] = []

    def run_client(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(6):
            body = {**chance.choice(BODIES)}
            if chance.random() < 0.4:
                connection = send(server, body)
                time.sleep(chance.random() * 0.1)
                connection.close()
            else:
                align = {**body.pop("align", {}), "budget": {"deadline_seconds": 0.5}}
                statuses.append(server.chat(align, **body).status_code)

    threads = [threading.Thread(target=run_client, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request was never answered"
    assert set(statuses) <= {200, 400, 424, 500, 502, 503, 504}
    assert_nothing_runs(server, up)
