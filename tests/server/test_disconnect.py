"""When a client disconnects, all of its work is cancelled, and the disconnect is counted.

The work of these tests would take an hour, or waits for `hold`. It ends only by cancellation.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from tests.server.conftest import FOREVER, USER, Live

REQUEST = {"messages": [{"role": "user", "content": "hello"}]}
PREFILL = f'{{text = "one 2", first_token_seconds = {FOREVER}}}'
DECODE = f'{{text = "{"word " * 4000}2", seconds_per_token = 1.0}}'
REWARDS = """
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.hanging]
kind = "callable"
function = "tests.server.scorers:hanging"
[rewards.fails_late]
kind = "callable"
function = "tests.server.scorers:fails_late"
[server]
default_rewards = {brevity = 1.0}
keepalive_seconds = 0.2
"""


def script(reply: str, extra: str = "") -> str:
    return f'[engine]\nkind = "fake"\nreplies = [{reply}]\n{REWARDS}{extra}'


def send(live: Live, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
    """Send a request without reading its response."""
    content = json.dumps({**REQUEST, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    raw = socket.create_connection(("127.0.0.1", live.port), timeout=60)
    raw.sendall(head + content)
    return raw


def disconnects(live: Live) -> float:
    return live.metric("infer_align_disconnects_total")


def close_and_check(live: Live, raw: socket.socket, before: float) -> None:
    """Close a connection; check that its work ends and that one disconnect is counted."""
    raw.close()
    assert live.idle(), f"{live.engine.running} candidates still run"
    assert live.until(lambda: disconnects(live) == before + 1), "not counted as a disconnect"
    assert live.metric("infer_align_requests_total", status="500") == 0


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 8}}])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [PREFILL, DECODE], ids=["mid-prefill", "mid-decode"])
def test_a_disconnect_cancels_sampling(serve: Any, align: Any, stream: bool, reply: str) -> None:
    live = serve(script(reply))
    before = disconnects(live)
    raw = send(live, {"stream": stream, **({"align": align} if align else {})})
    assert live.until(lambda: live.engine.running == (8 if align else 1))
    if stream and reply == DECODE:
        assert b"200" in raw.recv(100), "the stream has started"
    close_and_check(live, raw, before)


@pytest.mark.usefixtures("hold")
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_scoring(serve: Any, stream: bool) -> None:
    live = serve(script('{text = "candidate 1"}'))
    before = disconnects(live)
    sampled = live.engine.sampled
    align = {"best_of_n": {"n": 3}, "rewards": {"hanging": 1}}
    raw = send(live, {"stream": stream, "align": align})
    assert live.until(lambda: live.engine.sampled == sampled + 3 and not live.engine.running)
    assert live.service.admission.running == 1
    close_and_check(live, raw, before)


@pytest.mark.usefixtures("hold")
def test_a_disconnect_cancels_the_score_route(serve: Any) -> None:
    live = serve(script('{text = "candidate 1"}'))
    before = disconnects(live)
    body = {"candidates": ["1", "2"], "rewards": {"hanging": 1}}
    raw = send(live, body, "/v1/align/score")
    assert live.until(lambda: live.service.admission.running == 1)
    close_and_check(live, raw, before)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_leaves_the_queue(serve: Any, stream: bool) -> None:
    live = serve(script(PREFILL, "[limits]\nmax_running = 1\n"))
    before = disconnects(live)
    first = send(live, {})
    assert live.until(lambda: live.engine.running == 1)
    second = send(live, {"stream": stream})
    assert live.until(lambda: live.service.admission.queued == 1)
    second.close()
    assert live.until(lambda: live.service.admission.queued == 0)
    assert live.engine.running == 1, "the request of the other client continues"
    assert live.until(lambda: disconnects(live) == before + 1)
    close_and_check(live, first, before + 1)


def test_a_free_place_goes_to_the_next_request(serve: Any) -> None:
    live = serve(script(PREFILL, "[limits]\nmax_running = 1\n"))
    admission = live.service.admission
    clients = [send(live, {}) for _ in range(4)]
    for remaining in (3, 2, 1, 0):
        assert live.until(lambda n=remaining: (live.engine.running, admission.queued) == (1, n))
        clients.pop(0).close()
    assert live.idle()


def test_a_disconnect_during_the_body_is_counted(serve: Any) -> None:
    live = serve(script(PREFILL))
    before = disconnects(live)
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        )
    assert live.until(lambda: disconnects(live) == before + 1)
    assert live.metric("infer_align_requests_total", status="500") == 0


@pytest.mark.slow
def test_64_disconnects_at_once_cancel_everything(serve: Any) -> None:
    live = serve(script(DECODE))
    before = disconnects(live)
    clients = []
    for i in range(64):
        body = {"stream": i % 2 == 0, "align": {"best_of_n": {"n": 2}}}
        clients.append(send(live, body))
    assert live.until(lambda: live.engine.running == 128)
    for raw in clients:
        raw.close()
    assert live.idle()
    assert live.until(lambda: disconnects(live) == before + 64)
    answer = live.chat({"best_of_n": {"n": 2}}, max_tokens=1)
    assert answer.status_code == 200, "the server continues to serve"


def test_comments_keep_a_stream_open_during_scoring(serve: Any, hold: threading.Event) -> None:
    live = serve(script('{text = "one 2"}'))
    body = {
        "messages": USER,
        "stream": True,
        "align": {"best_of_n": {"n": 2}, "rewards": {"hanging": 1}},
    }
    lines = []
    with live.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
            if sum(line.startswith(":") for line in lines) == 2:
                hold.set()
    is_comment = [line.startswith(":") for line in lines]
    first_chunk = is_comment.index(False)
    assert first_chunk >= 2, "comments come first"
    assert all(is_comment[:first_chunk])
    assert not any(is_comment[first_chunk:])
    assert lines[-1] == "data: [DONE]"


def test_an_error_after_a_comment_is_an_event(serve: Any, hold: threading.Event) -> None:
    live = serve(script('{text = "one 2"}'))
    body = {
        "messages": USER,
        "stream": True,
        "align": {"best_of_n": {"n": 2}, "rewards": {"fails_late": 1}},
    }
    text = ""
    with live.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, "the head was sent with the first comment"
        for received in response.iter_text():
            text += received
            hold.set()
    assert "out of memory" in text
    assert '"error":{' in text
    assert "[DONE]" not in text
