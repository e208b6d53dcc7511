"""An engine with its own application gets requests without `align` and all other routes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route as StarletteRoute

from infer_align.config.config import Config, Limits, Server
from infer_align.engines.fake import Fake, FakeEngine
from tests.server.conftest import FOREVER, USER, Live, end, start

KEY = {"Authorization": "Bearer sesame"}
CHAT = {"model": "fake", "messages": USER}


class Serving(FakeEngine):
    """The fake engine with an application that echoes requests.

    The route `/hang` waits until its client disconnects.
    """

    models = ("fake", "adapter")

    def __init__(self, script: Fake) -> None:
        super().__init__(script)
        self.disconnects = 0

    def app(self) -> Any:
        return self._answer if self.health() is None else None

    def exposition(self) -> bytes:
        return b"# TYPE engine_left counter\nengine_left_total 7.0\n"

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/hang":
            while (await receive())["type"] != "http.disconnect":
                await asyncio.sleep(0)
            self.disconnects += 1
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        echo = {
            "path": scope["path"],
            "method": scope["method"],
            "body": body.decode(),
            "type": headers.get("content-type"),
        }
        status = 404 if scope["path"] == "/nothing" else 200
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await send({"type": "http.response.body", "body": json.dumps(echo).encode()})


@dataclass(frozen=True)
class Section:
    load_seconds: float = 0.0

    def load(self) -> Serving:
        return Serving(Fake(load_seconds=self.load_seconds))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORWARD_KEYS", "sesame")
        limits = Limits(max_candidates=4, max_completion_tokens=5000, max_body_bytes=2000)
        presets = {"best": {"best_of_n": {"n": 2}, "rewards": {}}}
        server = Server(api_keys_env="FORWARD_KEYS")
        live = start(
            Config(
                engine=Section(), engine_kind="fake", server=server, limits=limits, presets=presets
            )
        )
        yield live
        end(live)


def test_a_request_without_align_reaches_the_engine_byte_for_byte(live: Live) -> None:
    body = b'{"messages" : [{"role":"user","content":"\\u00e9"}],"unknown_field":1, "model":"fake"}'
    for headers in (
        {},
        {"Content-Type": "text/plain"},
    ):  # curl -d says neither what it sends nor the truth
        echo = live.post(body, headers={**KEY, **headers}).json()
        assert echo == {
            "path": "/v1/chat/completions",
            "method": "POST",
            "body": body.decode(),
            "type": "application/json",
        }
    echo = live.post({"model": "fake", "prompt": ["a", "b"]}, "/v1/completions", headers=KEY).json()
    assert echo["path"] == "/v1/completions"


@pytest.mark.parametrize("fields", [{"align": {}}, {"align": {"details": "none"}}])
def test_a_request_with_align_is_not_forwarded(live: Live, fields: dict[str, Any]) -> None:
    answer = live.post({**CHAT, **fields}, headers=KEY).json()
    assert answer["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"n": 5}, 400, "n"),
        ({"n": "x"}, 400, "n"),
        ({"n": 2, "max_tokens": 2501}, 400, "max_tokens"),
        ({"prompt": ["a"] * 3, "n": 2}, 400, "n"),
        ({"metadata": "x" * 2000}, 413, None),
        ({"align": 3}, 400, "align"),
    ],
)
def test_our_models_and_limits_apply(
    live: Live, fields: dict[str, Any], status: int, param: str | None
) -> None:
    answer = live.post({**CHAT, **fields}, headers=KEY)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_all_models_of_the_engine_are_listed(live: Live) -> None:
    listed = live.get("/v1/models", headers=KEY).json()["data"]
    assert [(entry["id"], entry.get("root"), "align" in entry) for entry in listed] == [
        ("fake", None, False),
        ("adapter", None, False),
        ("fake@best", "fake", True),
        ("adapter@best", "adapter", True),
    ]
    assert (
        json.loads(live.post({**CHAT, "model": "adapter"}, headers=KEY).json()["body"])["model"]
        == "adapter"
    )
    aligned = live.post({**CHAT, "model": "adapter", "align": {}}, headers=KEY)
    assert aligned.json()["model"] == "adapter"


def test_every_route_needs_a_key(live: Live) -> None:
    assert live.post(CHAT).status_code == 401
    for path in ("/anything", "/v1/other", "/nothing"):
        assert live.get(path).status_code == 401


def test_other_routes_are_forwarded(live: Live) -> None:
    assert live.get("/v1/embeddings/x", headers=KEY).json()["path"] == "/v1/embeddings/x"
    assert live.post(b"\x00not json", "/upload", headers=KEY).json()["body"] == "\x00not json"
    assert live.get("/nothing", headers=KEY).status_code == 404
    assert live.get("/v1/models", headers=KEY).json()["object"] == "list"
    assert live.post(b"x" * 3000, "/upload", headers=KEY).status_code == 413


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/responses", {"max_output_tokens": 5001}, "max_output_tokens"),
        ("/v1/responses", {"align": {}}, "align"),
        ("/v1/messages", {"max_tokens": 5001}, "max_tokens"),
        ("/generate", {"max_completion_tokens": 5001}, "max_completion_tokens"),
        ("/generate", {"align": {"best_of_n": {}}}, "align"),
        ("/v1/completions", {"prompt": "x", "best_of": 5}, "n"),
    ],
)
def test_the_limits_apply_to_every_route(
    live: Live, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = live.post({"model": "fake", **fields}, path, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_responses_api_is_forwarded(live: Live) -> None:
    echo = live.post(
        {"model": "fake", "input": "x", "max_output_tokens": 9}, "/v1/responses", headers=KEY
    ).json()
    assert (echo["path"], json.loads(echo["body"])["input"]) == ("/v1/responses", "x")
    for path in ("/v1/responses/resp_1", "/v1/responses/resp_1/input_items"):
        assert live.get(path, headers=KEY).json()["path"] == path


def test_metrics_include_those_of_the_engine(live: Live) -> None:
    assert live.metric("engine_left_total") == 7.0
    assert live.metric("infer_align_ready") == 1.0


def test_a_disconnect_reaches_the_engine(live: Live) -> None:
    engine = live.service.engine
    assert isinstance(engine, Serving)
    before = engine.disconnects
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(
            b"POST /hang HTTP/1.1\r\nHost: x\r\n"
            b"Authorization: Bearer sesame\r\nContent-Length: 2\r\n\r\nhi"
        )
        assert live.until(lambda: live.service.admission.running == 1)
    assert live.until(lambda: engine.disconnects == before + 1)
    assert live.idle()


def test_nothing_is_forwarded_before_the_engine_is_ready() -> None:
    live = start(Config(engine=Section(load_seconds=FOREVER), engine_kind="fake"), wait=False)
    for answer in (live.post(CHAT), live.get("/anything")):
        assert answer.status_code == 503
    end(live)


def test_an_engine_without_an_application_keeps_our_404_and_405(numbers: Live) -> None:
    assert numbers.get("/anything").status_code == 404
    assert numbers.get("/v1/chat/completions").status_code == 405


class Routed(Serving):
    """The same with an application that has routes, as vLLM's has."""

    def app(self) -> Any:
        async def words(_: Any) -> JSONResponse:
            return JSONResponse({"words": 2})

        return Starlette(routes=[StarletteRoute("/words", words, methods=["POST", "PATCH"])])


def test_a_wrong_method_is_answered_with_the_methods_of_the_path() -> None:
    class Section(Fake):
        def load(self) -> FakeEngine:
            return Routed(self)

    live = start(Config(engine=Section(), engine_kind="fake"))
    allowed = {}
    for method, path in (
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/fake"),
        ("POST", "/ready"),
        ("DELETE", "/words"),
    ):
        with live.http() as http:
            answer = http.request(method, path)
        assert answer.status_code == 405, path
        assert answer.json()["error"]["code"] == "http_405"
        allowed[path] = answer.headers["allow"]
    assert allowed == {
        "/v1/chat/completions": "POST",
        "/v1/models": "GET, HEAD",
        "/v1/models/fake": "GET, HEAD",
        "/ready": "GET, HEAD",
        "/words": "PATCH, POST",
    }
    assert live.get("/nothing").status_code == 404
    end(live)
