"""A client that leaves stops everything it started, wherever it was, and is counted."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

ROUTE = {"messages": [{"role": "user", "content": "hello"}]}
PREFILL = '{text = "one 2", first_token_seconds = 30}'
DECODE = '{text = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", seconds_per_token = 0.3}'
REWARDS = """
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.slow]
kind = "callable"
function = "tests.server.scorers:slow"
[server]
default_rewards = {brevity = 1.0}
keepalive_seconds = 0.2
"""


def script(reply: str, extra: str = "") -> str:
    return f'[engine]\nkind = "fake"\nreplies = [{reply}]\n{REWARDS}{extra}'


def send(live: Any, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
    """A request whose answer nobody has read yet."""
    content = json.dumps({**ROUTE, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    raw = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    raw.sendall(head + content)
    return raw


def left(live: Any) -> float:
    return float(live.metric("infer_align_disconnects_total"))


def leaves(live: Any, raw: socket.socket, before: float) -> None:
    """Close, and see that nothing runs a second later and that it was counted."""
    raw.close()
    assert live.idle(1.0), f"{live.engine.running} candidates still run"
    assert live.until(lambda: left(live) == before + 1), "not counted as a disconnect"
    assert live.metric("infer_align_requests_total", status="500") == 0


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 8}}])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [PREFILL, DECODE], ids=["mid-prefill", "mid-decode"])
def test_while_sampling(serve: Any, align: Any, stream: bool, reply: str) -> None:
    live = serve(script(reply))
    before = left(live)
    raw = send(live, {"stream": stream, **({"align": align} if align else {})})
    assert live.until(lambda: live.engine.running == (8 if align else 1))
    if stream and reply == DECODE:
        assert b"200" in raw.recv(100), "the stream has begun"
    leaves(live, raw, before)


@pytest.mark.parametrize("stream", [False, True])
def test_while_scoring(serve: Any, stream: bool) -> None:
    live = serve(script('{text = "candidate 1"}'))
    before, sampled = left(live), live.engine.sampled
    raw = send(live, {"stream": stream, "align": {"best_of_n": {"n": 3}, "rewards": {"slow": 1}}})
    assert live.until(lambda: live.engine.sampled == sampled + 3 and not live.engine.running)
    assert live.service.admission.running == 1
    leaves(live, raw, before)


def test_while_scoring_given_candidates(serve: Any) -> None:
    live = serve(script('{text = "candidate 1"}'))
    before = left(live)
    raw = send(live, {"candidates": ["1", "2"], "rewards": {"slow": 1}}, "/v1/align/score")
    assert live.until(lambda: live.service.admission.running == 1)
    leaves(live, raw, before)


@pytest.mark.parametrize("stream", [False, True])
def test_while_queued(serve: Any, stream: bool) -> None:
    live = serve(script(PREFILL, "[limits]\nmax_running = 1\n"))
    before = left(live)
    first = send(live, {})
    assert live.until(lambda: live.engine.running == 1)
    second = send(live, {"stream": stream})
    assert live.until(lambda: live.service.admission.queued == 1)
    second.close()
    assert live.until(lambda: live.service.admission.queued == 0, 1.0)
    assert live.engine.running == 1, "the other client's request goes on"
    assert live.until(lambda: left(live) == before + 1)
    leaves(live, first, before + 1)


def test_a_place_that_comes_free_goes_to_the_next(serve: Any) -> None:
    live = serve(script(PREFILL, "[limits]\nmax_running = 1\n"))
    clients = [send(live, {}) for _ in range(4)]
    for remaining in (3, 2, 1, 0):
        assert live.until(
            lambda n=remaining: (live.engine.running, live.service.admission.queued) == (1, n)
        )
        clients.pop(0).close()
    assert live.idle()


def test_while_sending_the_body(serve: Any) -> None:
    live = serve(script(PREFILL))
    before = left(live)
    with socket.create_connection(("127.0.0.1", live.port), timeout=5) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        )
    assert live.until(lambda: left(live) == before + 1)
    assert live.metric("infer_align_requests_total", status="500") == 0


def test_64_leave_at_once(serve: Any) -> None:
    live = serve(script(DECODE))
    before = left(live)
    clients = [
        send(live, {"stream": i % 2 == 0, "align": {"best_of_n": {"n": 2}}}) for i in range(64)
    ]
    assert live.until(lambda: live.engine.running == 128, 5)
    for raw in clients:
        raw.close()
    assert live.idle(2.0)
    assert live.until(lambda: left(live) == before + 64)
    assert live.chat({"best_of_n": {"n": 2}}, max_tokens=1).status_code == 200, "and it serves on"


def test_keepalive_comments_while_candidates_are_compared(serve: Any) -> None:
    live = serve(script('{text = "one 2", first_token_seconds = 0.7}'))
    answer = live.chat({"best_of_n": {"n": 2}}, stream=True)
    blocks = answer.text.split("\n\n")
    comments = [block for block in blocks if block.startswith(":")]
    assert len(comments) >= 2
    assert blocks.index(comments[-1]) < min(
        i for i, block in enumerate(blocks) if block.startswith("data:")
    )
    assert blocks[-2:] == ["data: [DONE]", ""]


def test_an_error_after_the_comments_began_is_an_event(serve: Any) -> None:
    live = serve(script('{text = "", error = "out of memory", first_token_seconds = 0.7}'))
    answer = live.chat({"best_of_n": {"n": 2}}, stream=True)
    assert answer.status_code == 200, "the head was sent with the first comment"
    assert "out of memory" in answer.text
    assert '"error":{' in answer.text
    assert "[DONE]" not in answer.text
