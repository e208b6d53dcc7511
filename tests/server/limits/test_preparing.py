"""The queue of requests whose grammars are compiled: it is bounded, fair, and clients may leave it.

The thread that compiles waits for an event, so the tests decide when it goes on.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from infer_align.decoding.constraint import Constraint, ConstraintCompiler
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.flow.plan import Plan
from tests.server.conftest import LIMIT_SECONDS, USER, Live

pytestmark = pytest.mark.slow

CLIENT_TIMEOUT = "x-stainless-read-timeout"
CONFIG = """
[engine]
kind = "transformers"
model = "demo"
[limits]
max_running = 2
max_queue = 1
"""


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    return serve(CONFIG)


def schema(name: str) -> Any:
    """Return a response format that no other test asks for."""
    described = {"name": name, "schema": {"enum": [name]}, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def engine_of(live: Live) -> TransformersEngine:
    assert isinstance(live.service.engine, TransformersEngine)
    return live.service.engine


def is_compiled(live: Live, name: str) -> bool:
    return engine_of(live).is_prepared({"messages": USER, **schema(name)}, "chat")


@contextmanager
def held(live: Live) -> Iterator[None]:
    """Let no grammar be compiled inside the block."""
    go_on = threading.Event()
    busy = engine_of(live)._grammar_thread.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()
        assert busy.result()


@contextmanager
def compiled_by(
    live: Live, make: type[ConstraintCompiler] = ConstraintCompiler
) -> Iterator[ConstraintCompiler]:
    """Let another compiler compile inside the block."""
    engine = engine_of(live)
    before = engine._started
    assert before is not None
    model = engine.frozen
    compiler = make(model.tokenizer, model.vocabulary, model.eos)
    engine._started = before._replace(grammars=compiler)
    try:
        yield compiler
    finally:
        engine._started = before


def send(live: Live, name: str, *headers: str, **fields: Any) -> socket.socket:
    """Send a request without reading its response."""
    content = json.dumps({"messages": USER, **schema(name), **fields}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: test", *headers]
    head = "\r\n".join([*lines, f"Content-Length: {len(content)}"])
    raw = socket.create_connection(("127.0.0.1", live.port), timeout=60)
    raw.sendall(head.encode() + b"\r\n\r\n" + content)
    return raw


def waits(live: Live, running: int, queued: int) -> bool:
    preparing = live.service.preparing
    return live.until(lambda: (preparing.running, preparing.queued) == (running, queued))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_the_queue(live: Live, stream: bool) -> None:
    before = live.metric("infer_align_disconnects_total")
    first, second = f"first-{stream}", f"second-{stream}"
    with held(live):
        one = send(live, first, stream=stream)
        assert waits(live, 1, 0)
        two = send(live, second, stream=stream)
        assert waits(live, 1, 1)
        assert live.metric("infer_align_queued_requests") == 2
        two.close()
        assert waits(live, 1, 0)
        one.close()
        assert waits(live, 0, 0)
        assert live.until(lambda: live.metric("infer_align_disconnects_total") == before + 2)
    assert live.chat(**schema(f"last-{stream}")).status_code == 200
    assert not is_compiled(live, first)
    assert not is_compiled(live, second)


def test_the_queue_is_bounded(live: Live) -> None:
    with held(live):
        clients = [send(live, "bound-0")]
        # As many wait as may run and wait behind it.
        for i in (1, 2):
            assert waits(live, 1, i - 1)
            clients.append(send(live, f"bound-{i}"))
        assert waits(live, 1, 2)
        refused = live.chat(**schema("bound-3"))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert "1 request is being prepared and 2 are waiting" in refused.text
        assert float(refused.headers["retry-after"]) >= 1
        # Requests whose grammars are known, and those without any, do not wait.
        assert live.chat(max_tokens=1).status_code == 200
    for client in clients:
        assert client.recv(12) == b"HTTP/1.1 200"
        client.close()


def test_a_deadline_ends_the_wait(live: Live) -> None:
    with held(live):
        late = live.chat({"budget": {"deadline_seconds": 0.05}}, **schema("late"))
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert "not compiled within its 0.05 s" in late.text
        assert waits(live, 0, 0)
    assert live.chat(**schema("after")).status_code == 200
    assert not is_compiled(live, "late")


def test_the_clients_timeout_ends_the_wait_unless_it_streams(live: Live) -> None:
    body = {"messages": USER, **schema("hasty")}
    with held(live):
        stream = send(live, "patient", f"{CLIENT_TIMEOUT}: 0.05", stream=True)
        assert waits(live, 1, 0)
        late = live.post(body, headers={CLIENT_TIMEOUT: "0.1"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert "not compiled within its 0.09 s" in late.text
        assert waits(live, 1, 0)
    assert stream.recv(12) == b"HTTP/1.1 200"
    stream.close()
    assert not is_compiled(live, "hasty")


def test_the_wait_is_a_part_of_the_clients_timeout(live: Live) -> None:
    body = {"messages": USER, **schema("waited")}

    def begin_plan(**fields: Any) -> Future[list[Plan]]:
        model = live.service.resolve_model(None)
        plan = live.service.plan({**body, **fields}, "chat", model, client_timeout=600.0)
        return live.server.begin(plan)

    with held(live):
        planning = begin_plan()
        assert waits(live, 1, 0)
    (waited,) = planning.result(LIMIT_SECONDS)
    assert waited.deadline_seconds is not None
    assert 0 < waited.deadline_seconds < 598
    (at_once,) = begin_plan().result(LIMIT_SECONDS)
    assert at_once.deadline_seconds == 598
    (own,) = begin_plan(align={"budget": {"deadline_seconds": 900}}).result(LIMIT_SECONDS)
    assert own.deadline_seconds == 900, "the request's own deadline stands"


class BrokenCompiler(ConstraintCompiler):
    """The compiler, on a machine that does not answer in time."""

    def _compile(self, text: str) -> Constraint | str:
        raise TimeoutError("the machine does not answer")


@pytest.mark.parametrize("align", [None, {"budget": {"deadline_seconds": 3600}}])
def test_a_timeout_of_the_engine_is_not_the_deadline(live: Live, align: Any) -> None:
    with compiled_by(live, BrokenCompiler):
        failed = live.chat(align, **schema("broken"))
    assert failed.status_code == 500, failed.text
    assert "not compiled within" not in failed.text
    assert waits(live, 0, 0)


class CountingCompiler(ConstraintCompiler):
    """The compiler, which counts what it compiles."""

    compiled = 0

    def _compile(self, text: str) -> Constraint | str:
        self.compiled += 1
        return super()._compile(text)


def test_equal_schemas_are_compiled_once(live: Live) -> None:
    with compiled_by(live, CountingCompiler) as compiler, ThreadPoolExecutor(3) as pool:
        with held(live):
            answers = [pool.submit(lambda: live.chat(**schema("equal"))) for _ in range(3)]
            assert waits(live, 1, 2)
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert isinstance(compiler, CountingCompiler)
    assert compiler.compiled == 1
