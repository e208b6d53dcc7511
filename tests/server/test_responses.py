"""The Responses API of an upstream is passed through with the upstream's key and is charged."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from tests.engines.openai.upstream import SSE, FakeUpstream, Faults, fake_upstream, reply, start
from tests.server.conftest import Live, end
from tests.server.conftest import start as serve

pytestmark = pytest.mark.slow

KEY = "sk-upstream-secret"
CALLER = {"authorization": "Bearer the-clients-own"}
ASKED = {"model": "up", "input": "hello", "unknown": {"x": [1, None]}}
EVENTS = [
    b"event: response.created\ndata: "
    b'{"type":"response.created","response":{"id":"resp_1","usage":null}}\n\n',
    b"event: response.output_text.delta\ndata: "
    b'{"type":"response.output_text.delta","delta":"hi"}\n\n',
    b"event: response.completed\ndata: "
    b'{"type":"response.completed","response":{"usage":{"output_tokens":7}}}\n\n',
]


class Answers:
    """Return the response of an upstream with a Responses API."""

    @staticmethod
    async def stored(_: FakeUpstream, body: dict[str, Any], send: Any) -> None:
        await reply(
            send,
            200,
            {"id": "resp_1", "object": "response", "got": body, "usage": {"output_tokens": 40}},
        )

    @staticmethod
    async def streamed(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
        await start(send, 200, SSE)
        for piece in EVENTS:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def broken(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
        await start(send, 200, SSE)
        await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
        send.__self__.transport.close()

    @staticmethod
    async def endless(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
        await start(send, 200, SSE)
        await send({"type": "http.response.body", "body": EVENTS[0], "more_body": True})
        await Faults.hang(_, __, send)

    @staticmethod
    async def missing(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
        await reply(send, 404, {"detail": "Not Found"})

    @staticmethod
    async def unknown(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
        await reply(
            send,
            404,
            {
                "error": {
                    "message": "Response with id 'resp_9' not found.",
                    "param": "response_id",
                    "code": None,
                }
            },
        )


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    for name, answer in vars(Answers).items():
        if isinstance(answer, staticmethod):
            monkeypatch.setattr(Faults, name, answer, raising=False)
    with fake_upstream() as app:
        app.behave = lambda _, __: "stored"
        yield app


@pytest.fixture
def front(
    up: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Live]]:
    monkeypatch.setenv("TEST_RESPONSES_UPSTREAM", KEY)
    monkeypatch.setenv("TEST_RESPONSES_KEYS", "the-clients-own")
    lives: list[Live] = []

    def make(*more: str, limits: str = "") -> Live:
        path = tmp_path / "c.toml"
        path.write_text(
            f'[engine]\nkind = "openai"\nurls = {json.dumps([up.url, *more])}\nprobe = false\n'
            f'api_key_env = "TEST_RESPONSES_UPSTREAM"\n'
            f'[server]\napi_keys_env = "TEST_RESPONSES_KEYS"\n'
            f"[presets.best]\nbest_of_n = {{n = 2}}\n[limits]\n{limits}\n"
        )
        lives.append(serve(configuration.load(path)))
        return lives[-1]

    yield make
    for live in lives:
        end(live)


def ask(live: Live, **fields: Any) -> Any:
    return live.post({**ASKED, **fields}, "/v1/responses", headers=CALLER)


def available(live: Live) -> float:
    return float(live.service.tokens.available("key 0"))


def test_a_request_arrives_unchanged_with_the_upstreams_key(up: FakeUpstream, front: Any) -> None:
    live = front()
    raw = b'{"input" : "h\\u00e9",  "model":"up","seed":1.50}'
    answer = live.post(raw, "/v1/responses", headers=CALLER)
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == "resp_1"
    assert up.raw == [raw]
    assert up.headers[0]["authorization"] == f"Bearer {KEY}"
    assert live.post({"model": "up"}, "/v1/responses").status_code == 401
    assert "/v1/responses" in live.get("/openapi.json", headers=CALLER).json()["paths"]


def test_stored_responses_are_read_deleted_and_cancelled(up: FakeUpstream, front: Any) -> None:
    live = front()
    with live.http(headers=CALLER) as http:
        assert http.get("/v1/responses/resp_1?include=a%26b&include=c").status_code == 200
        assert http.delete("/v1/responses/resp_1").status_code == 200
        assert http.post("/v1/responses/resp_1/cancel").status_code == 200
        assert http.get("/v1/responses/resp_1/input_items").status_code == 200
        for path in ("..%2f..%2fsecret", "a%2fb", "x%3fy=1", "a%23b"):
            assert http.get(f"/v1/responses/{path}").status_code == 404
    assert up.requests == [
        "GET /v1/responses/resp_1?include=a%26b&include=c",
        "DELETE /v1/responses/resp_1",
        "POST /v1/responses/resp_1/cancel",
        "GET /v1/responses/resp_1/input_items",
    ]


def test_a_stream_comes_byte_for_byte(up: FakeUpstream, front: Any) -> None:
    live = front()
    up.behave = lambda _, __: "streamed"
    answer = ask(live, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == b"".join(EVENTS)
    up.behave = lambda _, __: "broken"
    answer = ask(live, stream=True)
    assert answer.content.startswith(EVENTS[0])
    last = json.loads(answer.text.rpartition("data: ")[2])
    assert (last["type"], last["code"]) == ("error", "upstream_failed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_ends_the_request_to_the_upstream(
    up: FakeUpstream, front: Any, stream: bool
) -> None:
    live = front()
    up.behave = lambda _, __: "endless" if stream else "hang"
    content = json.dumps({**ASKED, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        key = CALLER["authorization"]
        head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        raw.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        assert live.until(lambda: up.running == 1)
        if stream:
            assert b"200" in raw.recv(1000)
    assert live.until(lambda: up.running == 0)
    assert live.until(lambda: live.service.admission.running == 0)


def test_an_upstream_without_a_responses_api_is_named(up: FakeUpstream, front: Any) -> None:
    live = front()
    up.behave = lambda _, __: "missing"
    answer = ask(live)
    assert answer.status_code == 404
    assert "the upstream does not serve this" in answer.json()["error"]["message"]
    up.behave = lambda _, __: "unknown"
    answer = live.get("/v1/responses/resp_9", headers=CALLER)
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "response_id")
    assert "resp_9" in answer.json()["error"]["message"]


def test_a_response_stored_on_another_upstream_is_read_there(up: FakeUpstream, front: Any) -> None:
    with fake_upstream() as second:
        second.behave = lambda _, __: "stored"
        up.behave = lambda _, __: "unknown"
        live = front(second.url)
        for _ in range(3):
            assert live.get("/v1/responses/resp_1", headers=CALLER).status_code == 200
        assert second.calls == 3


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"align": {"best_of_n": {}}}, 400, "align"),
        ({"model": "up@best", "max_output_tokens": 9}, 400, "model"),
        ({"model": "nobody", "max_output_tokens": 9}, 404, "model"),
        ({"max_output_tokens": 500}, 400, "max_output_tokens"),
        ({}, 400, "max_output_tokens"),
    ],
)
def test_refused_requests_are_named(
    up: FakeUpstream, front: Any, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = ask(front(limits="max_completion_tokens = 400"), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert up.calls == 0


@pytest.mark.parametrize(
    ("behaviour", "spent"), [("stored", 40), ("streamed", 7), ("error_400", 0)]
)
def test_responses_are_charged(up: FakeUpstream, front: Any, behaviour: str, spent: int) -> None:
    live = front(limits="candidate_tokens_per_minute = 1000")
    up.behave = lambda _, __: behaviour
    ask(live, max_output_tokens=20)
    assert live.until(lambda: live.service.admission.running == 0)
    assert 1000 - spent <= available(live) <= 1001 - spent, (
        "what was said, and not only what was announced"
    )
    live.get("/v1/responses/resp_1", headers=CALLER)
    assert available(live) >= 1000 - spent, "reading it again is free"
    ask(live, max_output_tokens=990)
    assert ask(live, max_output_tokens=1000).status_code == (429 if spent else 400)
