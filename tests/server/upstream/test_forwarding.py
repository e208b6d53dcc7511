"""Without `align`, a request reaches the upstream as it is, and so does the answer the client."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from infer_align_server import logs
from tests.engines.openai.upstream import FakeUpstream, body_part, reply, start
from tests.server.conftest import USER, Live
from tests.server.upstream.conftest import Serve

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STREAM = {"stream": True}
MULTIPART = "multipart/form-data; boundary=b"
FILE = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n\x00\xff\r\n--b--\r\n'
)

CHAT_FIELDS: list[dict[str, Any]] = [
    {},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, **STREAM},
    {"stream_options": None, **STREAM},
    {"n": 3},
    {"n": 3.0, "max_tokens": 4.0, "seed": 1.0},
    {"n": "many"},
    {"logprobs": True, "top_logprobs": 5},
    {"logit_bias": {"5": -1}},
    {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    {"prediction": {"type": "content", "content": "x"}},
    {"store": True, "metadata": {"a": "b"}},
    {"web_search_options": {"search_context_size": "low"}},
    {"reasoning_effort": "minimal", "verbosity": "low"},
    {"response_format": {"type": "json_object"}},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    {"functions": [{"name": "f"}], "function_call": "auto"},
    {"max_tokens": None, "temperature": None},
    {"vendor": {"nested": [1, None, "ü"]}, "provider": {"order": ["x"]}},
    {"guided_json": {"type": "object"}, "min_p": 0.1},
    {"messages": []},
    {"messages": "not a list"},
    {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
    {"stop": ["a", "b"], "service_tier": "flex", "safety_identifier": "x"},
    {"prompt_cache_key": "k", "user": "u", **STREAM},
]
TEXT_FIELDS: list[dict[str, Any]] = [
    {"prompt": "x"},
    {"prompt": ["x", "y"]},
    {"prompt": ["x", "y"], **STREAM},
    {"prompt": [1, 2, 3]},
    {"prompt": [[1, 2], [3]]},
    {"prompt": "x", "echo": True, "logprobs": 2},
    {"prompt": "x", "suffix": "y"},
    {"prompt": "x", "best_of": 4, "n": 2},
    {"prompt": None},
]
TURN = b'"messages":[{"role":"user","content":"hi"}]'
IMAGE = (
    b'{"type":"image_url","image_url":{"url":"data:image/png;base64,iVBORw0KGgo=","detail":"low"}}'
)
AUDIO = b'{"type":"input_audio","input_audio":{"data":"UklGRg==","format":"wav"}}'
CALL = b'{"id":"c1","type":"function","function":{"name":"f","arguments":"{\\"a\\": 1.0}"}}'
# Bodies whose bytes no encoder would write again.
RAW: dict[str, bytes] = {
    "a key twice": b'{"model":"up",' + TURN + b',"temperature":0,"temperature":1.5}',
    "the model twice": b'{"model":"other",' + TURN + b',"model":"up"}',
    "messages twice": b'{"model":"up","messages":[],' + TURN + b"}",
    "large integers": b'{"model":"up",'
    + TURN
    + b',"seed":123456789012345678901234567890,"x":-9007199254740993}',
    "floats": b'{"model":"up",'
    + TURN
    + b',"temperature":1.0,"top_p":1,"presence_penalty":-0.0,"frequency_penalty":1E-7,"n":1.0}',
    "long decimals": b'{"model":"up",'
    + TURN
    + b',"temperature":0.1000000000000000055511151231257827}',
    "escapes": b'{"model":"\\u0075p","messages":[{"role":"user",'
    b'"content":"\\u00fc\\ud83e\\udd89\\/\\u0000"}]}',
    "text as it is": '{"model":"up","messages":[{"role":"user","content":"ü🦉\u2028"}]}'.encode(),
    "white space": b'\r\n\t{ "model" :\n"up" ,\t' + TURN + b" }\n\n ",
    "another order": b'{"stream":false,' + TURN + b',"user":"","model":"up"}',
    "n streamed": b'{"model":"up",'
    + TURN
    + b',"n":3,"stream":true,"stream_options":{"include_usage":true},"logprobs":true}',
    "tool results": b'{"model":"up","messages":[{"role":"user","content":""},'
    b'{"role":"assistant","content":null,"tool_calls":[' + CALL + b"," + CALL + b"]},"
    b'{"role":"tool","tool_call_id":"c1","content":[{"type":"text","text":"4"}]},'
    b'{"role":"tool","tool_call_id":"c1","content":""}]}',
    "parts": b'{"model":"up","messages":[{"role":"user","content":['
    + IMAGE
    + b","
    + AUDIO
    + b',{"type":"file","file":{"file_id":"file-1"}},{"type":"refusal","refusal":"no"}]}]}',
    "an audio answer": b'{"model":"up",'
    + TURN
    + b',"modalities":["text","audio"],"audio":{"voice":{"id":"v"},"format":"pcm16"},'
    b'"stream":true}',
    "a prediction of parts": b'{"model":"up",'
    + TURN
    + b',"prediction":{"type":"content","content":[{"type":"text","text":"x"}]}}',
    "null everywhere": b'{"model":"up",'
    + TURN
    + b',"n":null,"stream":null,"stop":null,"tools":null,"logit_bias":null}',
    "custom tools": b'{"model":"up",'
    + TURN
    + b',"tools":[{"type":"custom","custom":{"name":"sql","format":{"type":"text"}}}],'
    b'"tool_choice":{"type":"allowed_tools","allowed_tools":{"mode":"auto","tools":[]}}}',
    "a byte order mark": b'\xef\xbb\xbf{"model":"up",' + TURN + b"}",
    "nested deeply": b'{"model":"up",' + TURN + b',"x":' + b"[" * 90 + b"]" * 90 + b"}",
    "empty names": b'{"":"","model":"up",' + TURN + b',"metadata":{"":""}}',
}
OTHER: list[tuple[str, str, bytes, str]] = [
    ("POST", "/v1/embeddings", b'{"model": "emb", "input": ["a", "b"]}', "application/json"),
    ("POST", "/v1/embeddings", b'{"input" : "a" , "model":"up"}', "application/json"),
    ("POST", "/v1/moderations", b'{"input": "a"}', "application/json"),
    ("POST", "/v1/audio/speech", b'{"model": "tts", "input": "a"}', "application/json"),
    ("POST", "/v1/audio/transcriptions", FILE, MULTIPART),
    ("POST", "/v1/files", FILE, MULTIPART),
    ("GET", "/v1/files?limit=2&after=file-1", b"", ""),
    ("GET", "/v1/files/file-1/content", b"", ""),
    ("DELETE", "/v1/files/file-1", b"", ""),
    ("POST", "/v1/images/generations", b'{"prompt": "a"}', "application/json"),
    ("POST", "/v1/rerank", b'{"model": "r", "query": "a", "documents": ["b"]}', "application/json"),
    ("POST", "/v1/score", b'{"text_1": "a", "text_2": "b"}', "application/json"),
    ("POST", "/tokenize", b'{"prompt": "a"}', "application/json"),
    ("POST", "/v1/responses", b'{"model": "up", "input": "a"}', "application/json"),
    ("GET", "/v1/chat/completions/chat-1", b"", ""),
    ("POST", "/v1/batches", b'{"input_file_id": "file-1"}', "application/json"),
]


async def mirror(_: FakeUpstream, body: dict[str, Any], send: Any) -> None:
    """Answer with spaces and an order that no encoder would write."""
    content = b'{ "usage": {"completion_tokens" :7,"prompt_tokens":3}, "got":%d }\n' % len(
        str(body)
    )
    if body.get("stream"):
        await start(send, 200, (b"content-type", b"text/event-stream; charset=utf-8"))
        for piece in (b": hello\r\n\r\n", b"data:" + content, b"\nda", b"ta: [DONE]\n\n"):
            await body_part(send, piece)
        await body_part(send, b"", last=True)
        return
    headers = ((b"openai-processing-ms", b"12"), (b"x-ratelimit-remaining-tokens", b"5"))
    await start(send, 200, (b"content-type", b"application/json"), *headers)
    await body_part(send, content, last=True)


async def binary(_: FakeUpstream, __: dict[str, Any], send: Any) -> None:
    await start(send, 200, (b"content-type", b"audio/mpeg"), (b"content-length", b"4"))
    await body_part(send, b"\x00\xff\n\r", last=True)


def direct(up: FakeUpstream, method: str, path: str, content: bytes, kind: str) -> httpx2.Response:
    headers = {"content-type": kind} if kind else {}
    root = up.url.removesuffix("/v1")
    with httpx2.Client(base_url=root, trust_env=False, verify=False) as client:
        return client.request(method, path, content=content, headers=headers)


def through(server: Live, method: str, path: str, content: bytes, kind: str) -> httpx2.Response:
    headers = {"content-type": kind} if kind else {}
    with server.http() as client:
        return client.request(method, path, content=content, headers=headers)


def assert_equal(up: FakeUpstream, server: Live, *request: Any) -> None:
    """Send a request to the upstream itself and through the server, and compare everything."""
    up.clear_log()
    expected = direct(up, *request)
    answer = through(server, *request)
    assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    for name in ("content-type", "openai-processing-ms", "x-ratelimit-remaining-tokens"):
        assert answer.headers.get(name) == expected.headers.get(name)
    first, second = up.requests
    assert first == second
    assert up.raw[0] == up.raw[1]
    assert up.headers[0].get("content-type") == up.headers[1].get("content-type") or not request[2]


@pytest.fixture
def mirrored(up: FakeUpstream, serve_upstream: Serve) -> Live:
    """A server before an upstream that mirrors, which also accepts what is not JSON."""
    server = serve_upstream(extra="[limits]\nmax_upload_bytes = 100000\nmax_body_bytes = 4000\n")
    up.behave = lambda _, __: mirror
    return server


@pytest.mark.parametrize("path", [CHAT])
@pytest.mark.parametrize("fields", CHAT_FIELDS, ids=str)
def test_a_chat_request_goes_through_whole(
    up: FakeUpstream, mirrored: Live, path: str, fields: dict[str, Any]
) -> None:
    body = {"messages": USER, **fields, "model": "up"}
    content = json.dumps(body, ensure_ascii=False, indent=1).encode()
    assert_equal(up, mirrored, "POST", path, content, "application/json")


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_the_bytes_of_a_body_go_through_whole(
    up: FakeUpstream, mirrored: Live, content: bytes
) -> None:
    assert_equal(up, mirrored, "POST", CHAT, content, "application/json")


@pytest.mark.parametrize("fields", TEXT_FIELDS, ids=str)
def test_a_text_completion_goes_through_whole(
    up: FakeUpstream, mirrored: Live, fields: dict[str, Any]
) -> None:
    content = json.dumps({**fields, "model": "up"}, indent=1).encode()
    assert_equal(up, mirrored, "POST", TEXT, content, "application/json")


@pytest.mark.parametrize(("method", "path", "content", "kind"), OTHER)
def test_other_routes_go_through_whole(
    up: FakeUpstream, mirrored: Live, method: str, path: str, content: bytes, kind: str
) -> None:
    assert_equal(up, mirrored, method, path, content, kind)


def test_audio_comes_as_it_is(up: FakeUpstream, mirrored: Live) -> None:
    up.behave = lambda _, __: binary
    assert_equal(up, mirrored, "POST", "/v1/audio/speech", b"{}", "application/json")


@pytest.mark.parametrize(
    "fault",
    ["error_400", "error_404", "error_422", "error_429_long", "error_500", "error_502", "html"],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/embeddings"])
def test_the_upstreams_own_errors_come_back_whole(
    up: FakeUpstream, serve_upstream: Serve, fault: str, path: str
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: fault
    content = json.dumps({"model": "up", "messages": USER, "prompt": "x"}).encode()
    request = ("POST", path, content, "application/json")
    expected = direct(up, *request)
    answer = through(server, *request)
    assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    assert answer.headers.get("retry-after") == expected.headers.get("retry-after")


@pytest.mark.parametrize(
    ("fault", "status"), [("error_401", 502), ("redirect", 502), ("truncated", 502), ("reset", 502)]
)
def test_what_is_no_answer_is_an_error_of_this_server(
    up: FakeUpstream, serve_upstream: Serve, fault: str, status: int
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: fault
    answer = server.chat()
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    up.behave = lambda _, __: mirror
    assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/organization/projects",
        "/v1/load_lora_adapter",
        "/shutdown",
        "/v1/files/..%2f..%2fsecret",
        "/v1/files/%2e%2e/organization",
        "/v1/align/none",
    ],
)
def test_routes_that_administrate_the_upstream_are_not_passed_on(
    up: FakeUpstream, mirrored: Live, path: str
) -> None:
    assert mirrored.get(path).status_code == 404
    assert up.calls == 0


def test_a_client_never_chooses_the_key_or_the_organization(
    up: FakeUpstream, serve_upstream: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream-secret")
    server = serve_upstream('api_key_env = "UPSTREAM_KEY"')
    headers = {
        "authorization": "Bearer client",
        "openai-organization": "other",
        "x-api-key": "other",
        "cookie": "a=b",
        "openai-beta": "assistants=v2",
    }
    server.post({"input": "x"}, "/v1/embeddings", headers=headers)
    (sent,) = up.headers
    assert sent["authorization"] == "Bearer sk-upstream-secret"
    assert sent["openai-beta"] == "assistants=v2"
    assert not {"openai-organization", "x-api-key", "cookie"} & sent.keys()


@pytest.mark.parametrize("kind", ["application/json", MULTIPART])
def test_sizes_are_limited(up: FakeUpstream, mirrored: Live, kind: str) -> None:
    size = 4001 if kind == "application/json" else 100_001
    answer = through(mirrored, "POST", "/v1/files", b"{" + b" " * size, kind)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    allowed = through(mirrored, "POST", "/v1/files", b" " * 50_000, MULTIPART)
    assert allowed.status_code == 200
    assert len(up.raw[-1]) == 50_000


def test_an_upload_without_an_announced_size_is_limited_too(
    up: FakeUpstream, mirrored: Live
) -> None:
    def pieces() -> Any:
        for _ in range(12):
            yield b" " * 10_000

    with mirrored.http() as client:
        headers = {"content-type": MULTIPART}
        answer = client.post("/v1/files", content=pieces(), headers=headers)
    assert answer.status_code == 413
    assert up.until(lambda: up.running == 0)


def test_keys_rates_and_limits_hold_for_plain_requests(
    up: FakeUpstream, serve_upstream: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIN_KEYS", "right")
    extra = (
        '[server]\napi_keys_env = "PLAIN_KEYS"\n'
        "[limits]\nmax_completion_tokens = 400\nrequests_per_minute = 6\nmax_candidates = 4\n"
    )
    server = serve_upstream(extra=extra)
    headers = {"authorization": "Bearer right"}
    assert server.post({"input": "x"}, "/v1/embeddings").status_code == 401
    body = {"model": "up", "messages": USER}
    for fields, status in (
        ({"max_tokens": 401}, 400),
        ({"max_tokens": 401.0}, 400),
        ({"n": 5, "max_tokens": 1}, 400),
        ({"best_of": 5, "max_tokens": 1}, 400),
        ({"max_tokens": 100, "n": 4}, 200),
        ({"max_tokens": 1}, 200),
    ):
        assert server.post({**body, **fields}, headers=headers).status_code == status
    assert server.post(body, headers=headers).status_code == 429
    assert server.post({"input": "x"}, "/v1/embeddings", headers=headers).status_code == 429
    assert up.calls == 2


def test_the_usage_of_an_answer_is_counted_and_charged(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    server = serve_upstream(extra="[limits]\ncandidate_tokens_per_minute = 100000\n")
    up.behave = lambda _, __: mirror
    before = server.service.tokens.available("127.0.0.1")
    server.chat(max_tokens=50)
    server.chat(max_tokens=50, stream=True)
    assert server.until(lambda: server.metric("infer_align_tokens_total", kind="returned") == 14)
    assert server.metric("infer_align_tokens_total", kind="prompt") == 6
    assert before - server.service.tokens.available("127.0.0.1") <= 14


def test_a_client_that_leaves_ends_the_call(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: "drip"
    body = {"model": "up", "messages": USER, "stream": True}
    with server.http() as client, client.stream("POST", CHAT, json=body) as answer:
        assert next(answer.iter_text())
    assert up.until(lambda: up.running == 0)
    assert up.until(lambda: server.service.admission.running == 0)


def test_a_stream_that_breaks_off_ends_with_an_error(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: "truncated"
    answer = server.chat(stream=True)
    assert "half an" in answer.text
    last = json.loads(answer.text.rpartition("data: ")[2])
    assert last["error"]["code"]


@pytest.mark.parametrize("stream", [False, True])
def test_another_name_of_the_model_is_written_into_the_answer(
    up: FakeUpstream, serve_upstream: Serve, stream: bool
) -> None:
    up.numbers = [3]
    server = serve_upstream('model = "up"', '[server]\nserved_name = "mine"\n')
    answer = server.post({"model": "mine", "messages": USER, "stream": stream})
    assert '"model": "mine"' in answer.text
    assert '"up"' not in answer.text
    assert up.bodies[0]["model"] == "up"


@contextmanager
def access_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Yield a function that returns the access lines that were written in the block."""
    text = io.StringIO()
    logs.access.open(text, logs.JsonFormatter())
    try:
        yield lambda: [json.loads(line) for line in text.getvalue().splitlines()]
    finally:
        logs.access.close()


def test_an_upstreams_request_id_is_returned_and_logged(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    async def identified(_: FakeUpstream, __: Any, send: Any) -> None:
        await reply(send, 200, {"a": 1}, (b"x-request-id", b"req-7"), (b"set-cookie", b"a=b"))

    up.behave = lambda _, __: identified
    server = serve_upstream()
    with access_lines() as lines:
        answer = server.chat()
        assert server.until(lines)
        (line,) = lines()
    assert answer.headers.get_list("x-request-id") == ["req-7"]
    assert "set-cookie" not in answer.headers
    assert line["upstream_request_ids"] == ["req-7"]
    assert line["request_id"] != "req-7"


def test_a_clients_request_id_reaches_the_upstream(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream()
    named = {"x-request-id": "mine-1"}
    body = {"model": "up", "messages": USER}
    assert server.post(body, CHAT, headers=named).headers["x-request-id"] == "mine-1"
    assert up.headers[-1]["x-request-id"] == "mine-1"
    assert server.post({"model": "up"}, "/v1/embeddings", headers=named)
    assert up.headers[-1]["x-request-id"] == "mine-1"
    up.clear_log()
    body["align"] = {"best_of_n": {"n": 3}}
    assert server.post(body, CHAT, headers=named).status_code == 200
    ids = [headers["x-request-id"] for headers in up.headers]
    assert len(set(ids)) == len(ids) >= 1, "no two calls have the same id"
    assert all(each.startswith("mine-1.") for each in ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_access_line_has_the_model_and_the_tokens(
    up: FakeUpstream, serve_upstream: Serve, path: str, stream: bool
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: mirror
    with access_lines() as lines:
        body = {"messages": USER, "prompt": "x", "stream": stream}
        assert server.post(body, path).status_code == 200
        assert server.until(lines)
        (line,) = lines()
    names = ("model", "preset", "prompt_tokens", "completion_tokens")
    assert [line[name] for name in names] == [server.service.engine.model, None, 3, 7]
