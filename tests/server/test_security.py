"""No request changes where API keys go or which method runs; keys are not logged or returned."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from infer_align import config as configuration
from infer_align_server.logs import REDACTED, JsonFormatter
from infer_align_server.serve import _uvicorn_config
from tests.engines.openai.upstream import FakeUpstream, Faults, fake_upstream, reply
from tests.engines.openai.upstream import start as start_answer
from tests.server.conftest import NUMBERS, USER, Live, end, start

KEY = "sk-upstream-secret"
SERVER_KEY = "the-servers-own-key"
CERTIFICATE = Path(__file__).parents[1] / "data" / "self_signed.pem"


class Leaks:
    """An upstream that repeats the received key in every part of an error."""

    @staticmethod
    async def key_in_200(_: FakeUpstream, __: Any, send: Any) -> None:
        await reply(send, 200, {"error": {"message": f"bad key {KEY}"}})

    @staticmethod
    async def key_cut(_: FakeUpstream, __: Any, send: Any) -> None:
        await start_answer(send, 200, (b"content-type", b"application/json"))
        await send(
            {"type": "http.response.body", "body": b"x" * 45 + KEY.encode()}
        )  # an excerpt ends in the middle of it

    @staticmethod
    async def key_in_fields(_: FakeUpstream, __: Any, send: Any) -> None:
        await reply(send, 400, {"error": {"message": "no", "param": KEY, "code": f"bad_{KEY}"}})


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    for name in ("key_in_200", "key_cut", "key_in_fields"):
        monkeypatch.setattr(Faults, name, vars(Leaks)[name], raising=False)
    with fake_upstream() as app:
        yield app


@pytest.fixture
def attacker() -> Iterator[tuple[str, list[bytes]]]:
    """A URL that no request may reach, and the bytes that it received."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    raw, _ = listener.accept()
                    with raw:
                        raw.settimeout(1)
                        with contextlib.suppress(OSError):
                            heard.append(raw.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", heard
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def front(
    up: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Live]]:
    """A server in front of the upstream, both with a key."""
    monkeypatch.setenv("TEST_UPSTREAM_KEY", KEY)
    monkeypatch.setenv("TEST_SERVER_KEYS", SERVER_KEY)
    lives: list[Live] = []

    def make(url: str = up.url, probe: str = "probe = false") -> Live:
        path = tmp_path / "front.toml"
        path.write_text(
            f'[server]\napi_keys_env = "TEST_SERVER_KEYS"\n'
            f'[engine]\nkind = "openai"\nurls = ["{url}"]\n'
            f'api_key_env = "TEST_UPSTREAM_KEY"\n{probe}\n'
            '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
        )
        lives.append(start(configuration.load(path)))
        return lives[-1]

    yield make
    for live in lives:
        end(live)


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """All log records of the test, at the level debug."""
    text = io.StringIO()
    root = logging.getLogger()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter())
    names = [None, *logging.Logger.manager.loggerDict]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.propagate = True
    root.addHandler(handler)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate


def hostile(url: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return every part of a request that could name another upstream, key or method."""
    host = url.removeprefix("http://").removesuffix("/v1")
    headers = {
        "X-ITS-Endpoint": url,
        "X-Endpoint": url,
        "X-Upstream": url,
        "X-Base-Url": url,
        "X-Align": '{"best_of_n": {"n": 8}}',
        "Host": host,
        "X-Forwarded-Host": host,
        "Forwarded": f"host={host}",
        "X-Original-Url": url,
        "X-Rewrite-Url": url,
        "OpenAI-Organization": url,
        "X-Api-Key": "other",
        "Api-Key": "other",
        "Proxy-Authorization": "Basic other",
        "X-Forwarded-For": "10.0.0.1",
        "X-Http-Method-Override": "DELETE",
    }
    fields = dict.fromkeys(
        ("base_url", "api_base", "url", "urls", "endpoint", "model_base_url", "upstream", "host"),
        url,
    )
    return headers, {
        **fields,
        "api_key": "other",
        "api_key_env": "PATH",
        "optillm_approach": "bon",
        "extra_headers": headers,
    }


def test_no_header_or_field_changes_where_the_key_goes(
    up: FakeUpstream, front: Any, attacker: Any
) -> None:
    live = front()
    url, heard = attacker
    headers, fields = hostile(url)
    with logged() as text:
        for body in ({}, {"align": {"best_of_n": {"n": 3}}}, {"stream": True}):
            request = {"model": "up", "messages": USER, **fields, **body}
            answer = live.post(
                request, headers={**headers, "authorization": f"Bearer {SERVER_KEY}"}
            )
            assert answer.status_code == 200, answer.text
            assert KEY not in answer.text + str(answer.headers)
            assert SERVER_KEY not in answer.text + str(answer.headers)
    assert heard == []
    assert set(up.paths) == {"/v1/chat/completions"}
    for sent in up.headers:
        assert sent["authorization"] == f"Bearer {KEY}", (
            "the upstream's own key, and never the client's"
        )
        assert not {name.lower() for name in headers} - {"host"} & sent.keys()
        assert sent["host"] == up.url.removeprefix("http://").removesuffix("/v1")
    for raw in up.raw:
        assert SERVER_KEY.encode() not in raw
    assert KEY not in text.getvalue()
    assert SERVER_KEY not in text.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "error_401",
        "error_500",
        "garbage",
        "reset",
        "redirect",
        "key_in_200",
        "key_cut",
        "key_in_fields",
    ],
)
def test_keys_are_neither_logged_nor_returned_when_something_fails(
    up: FakeUpstream, front: Any, fault: str
) -> None:
    live = front()
    up.behave = lambda _, __: fault
    with logged() as text:
        for body in (
            {},
            {"align": {"best_of_n": {"n": 2}, "details": "candidates"}},
            {"stream": True},
        ):
            request = {"model": "up", "messages": USER, **body}
            answer = live.post(request, headers={"authorization": f"Bearer {SERVER_KEY}"})
            # Without `align`, a malformed answer is passed on as it is.
            is_passed_on = "align" not in body and fault in {"garbage", "key_in_200", "key_cut"}
            assert answer.status_code >= 400 or is_passed_on, answer.text
            assert KEY[:9] not in answer.text + str(answer.headers), (
                "not even where the upstream says it, nor a part of it"
            )
            refused = live.post(request, headers={"authorization": "Bearer a-wrong-key"})
            assert refused.status_code == 401
            assert "a-wrong-key" not in refused.text
        for path in (
            "/v1/models",
            "/v1/align/methods",
            "/openapi.json",
            "/health",
            "/ready",
            "/metrics",
        ):
            answer = live.get(path, headers={"authorization": f"Bearer {SERVER_KEY}"})
            for name in (KEY, SERVER_KEY, "TEST_UPSTREAM_KEY", "TEST_SERVER_KEYS"):
                assert name not in answer.text, path
    for secret in (KEY, SERVER_KEY, "a-wrong-key"):
        assert secret not in text.getvalue()


def test_a_redirect_is_not_followed_with_the_key(
    up: FakeUpstream, front: Any, attacker: Any
) -> None:
    up.behave = lambda _, __: "redirect"
    answer = front().post(
        {"model": "up", "messages": USER}, headers={"authorization": f"Bearer {SERVER_KEY}"}
    )
    assert answer.status_code == 502
    assert attacker[1] == []


def test_an_upstream_with_an_untrusted_certificate_is_refused(front: Any, tmp_path: Path) -> None:
    """TLS certificates are verified: a self-signed one gets no request and therefore no key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    with (
                        plain,
                        contextlib.suppress(OSError),
                        context.wrap_socket(plain, server_side=True) as raw,
                    ):
                        heard.append(raw.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        live = front(
            f"https://127.0.0.1:{listener.getsockname()[1]}/v1", 'probe = false\nmodel = "up"'
        )
        answer = live.post(
            {"model": "up", "messages": USER}, headers={"authorization": f"Bearer {SERVER_KEY}"}
        )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert answer.status_code in {502, 503}, answer.text
    assert "certificate" in answer.text.lower()
    assert not [text for text in heard if text], "it received no request"


def test_the_addresses_of_upstreams_are_not_revealed(front: Any) -> None:
    """Routes without a key and error messages contain no address and no port."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = str(closed.getsockname()[1])
    live = front(f"http://127.0.0.1:{port}/v1", 'probe = false\nmodel = "up"')
    for answer in (
        live.get("/ready"),
        live.post({"messages": USER}, headers={"authorization": f"Bearer {SERVER_KEY}"}),
    ):
        assert answer.status_code == 503
        assert port not in answer.text
        assert "127.0.0.1" not in answer.text


def test_no_header_changes_the_caller(config_file: Any) -> None:
    """Limits use the address of the connection: any client can write X-Forwarded-For."""
    options = _uvicorn_config(
        configuration.load(config_file('[engine]\nkind = "fake"\n')), FastAPI()
    )
    assert options.proxy_headers is False


# --- what runs ---

WORDS = [
    '<align>{"best_of_n": {"n": 5}}</align>',
    "<optillm_approach>bon</optillm_approach>",
    '{"align": {"best_of_n": {"n": 5}}}',
    '"}], "align": {"best_of_n": {"n": 5}}, "x": [{"y": "',
    "@best",
    "align: best_of_n",
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant"])
def test_no_text_of_a_message_chooses_a_method(numbers: Any, words: str, role: str) -> None:
    before = numbers.engine.sampled
    for message in (
        {"role": role, "content": words},
        {"role": role, "content": [{"type": "text", "text": words}]},
    ):
        answer = numbers.chat(messages=[message, *USER])
        assert answer.status_code == 200, answer.text
        assert "align" not in answer.json()
        assert numbers.engine.bodies[-1]["messages"][0] == message, (
            "and it reaches the model as it is"
        )
    assert numbers.engine.sampled == before + 2


def test_align_counts_in_one_place_only(numbers: Any) -> None:
    align = {"best_of_n": {"n": 5}}
    before = numbers.engine.sampled
    inside = {"role": "user", "content": "x", "align": align, "name": json.dumps(align)}
    for fields in (
        {"messages": [inside]},
        {"metadata": {"align": json.dumps(align)}},
        {"extra_body": {"align": align}},
        {"user": json.dumps({"align": align})},
        {"Align": align},
        {"preset": "best"},
    ):
        answer = numbers.chat(**fields)
        assert answer.status_code == 200, answer.text
        assert "align" not in answer.json()
    assert numbers.chat(best_of_n={"n": 5}).status_code == 400
    assert numbers.engine.sampled == before + 6
    with numbers.http() as http:
        answer = http.post(
            "/v1/chat/completions?align=best&model=fake@best",
            json={"messages": USER},
            headers={"align": "best", "x-preset": "best"},
        )
    assert "align" not in answer.json()
    twice = (
        b'{"messages": [{"role": "user", "content": "x"}], '
        b'"align": {"best_of_n": {"n": 5}}, "align": null}'
    )
    assert "align" not in numbers.post(twice).json(), (
        "of two, the last counts, as JSON readers have it"
    )


def test_a_request_without_a_valid_key_spends_nothing(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_SECURITY_KEYS", SERVER_KEY)
    live = serve(f'{NUMBERS}api_keys_env = "TEST_SECURITY_KEYS"\n')
    for key in ("sk-anything", "anything", SERVER_KEY[:-1], f"{SERVER_KEY}x", SERVER_KEY.upper()):
        answer = live.post({"messages": USER}, headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 401
    assert live.engine.sampled == 0


# --- logs ---


def line(*secrets: str, message: str, **extra: object) -> str:
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "x", **extra})
    return JsonFormatter(secrets).format(record)


def test_secrets_are_redacted_wherever_they_stand() -> None:
    text = line(
        "sk-1",
        "sk-12",
        'a"b',
        message="key sk-12 and sk-1",
        headers={"authorization": "Bearer unknown"},
        odd='a"b',
    )
    assert json.loads(text)["event"] == f"key {REDACTED} and {REDACTED}"
    assert json.loads(text)["headers"] == {"authorization": f"Bearer {REDACTED}"}
    assert json.loads(text)["odd"] == REDACTED
    try:
        raise RuntimeError("the key is sk-12, sent as bearer abc.def")
    except RuntimeError as error:
        text = line("sk-12", message="failed", exc_info=(type(error), error, error.__traceback__))
    assert "sk-12" not in text
    assert "abc.def" not in text


def test_the_configuration_knows_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_A", "one, two")
    monkeypatch.setenv("TEST_B", "three")
    path = tmp_path / "x.toml"
    path.write_text(
        '[server]\napi_keys_env = "TEST_A"\n[engine]\nkind = "openai"\n'
        'urls = ["http://127.0.0.1:1/v1"]\napi_key_env = "TEST_B"\n'
    )
    assert configuration.load(path).secrets() == {"one, two", "one", "two", "three"}
    path.write_text('[engine]\nkind = "fake"\n')
    assert configuration.load(path).secrets() == set()
