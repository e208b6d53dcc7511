"""Traces of requests that break off, and collectors that are slow, gone or back again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align import config as configuration
from infer_align_server import collector as connection
from tests.server.collector import Collector, collector
from tests.server.conftest import NUMBERS, USER, Live, end, start
from tests.server.processes import LIMIT_SECONDS, LOCAL, Process
from tests.server.test_disconnect import DECODE, PREFILL, script, send
from tests.server.tracing import ROUTE, ConfigFile, flush, traced

BEST_OF_2 = {"best_of_n": {"n": 2}}


def ended(live: Live, receiver: Collector) -> bool:
    """Return True once the span of the request has arrived."""
    flush(live)
    return bool(receiver.named(ROUTE))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [PREFILL, DECODE], ids=["mid-prefill", "mid-decode"])
def test_a_client_that_leaves_ends_every_span(
    config_file: ConfigFile, reply: str, stream: bool
) -> None:
    text = script(f'{{text = "at once 1"}}, {reply}')
    with traced(config_file, text) as (live, receiver):
        raw = send(live, {"stream": stream, "align": BEST_OF_2})
        assert live.until(lambda: live.engine.running == 1)
        raw.close()
        assert live.idle()
        assert live.until(lambda: ended(live, receiver))
        (request,) = receiver.named(ROUTE)
        (draw,) = receiver.named("draw")
        assert request["attributes"]["error.type"] == "disconnected"
        assert draw["attributes"]["error.type"] == "CancelledError"
        assert request["failed"]
        assert draw["failed"]
        first, second = sorted(
            receiver.named("chat fake"),
            key=lambda span: span["attributes"]["infer_align.candidate.index"],
        )
        # What was drawn is in the trace, and what was not has its reason.
        assert not first["failed"]
        assert first["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]
        assert second["failed"]
        assert second["attributes"]["error.type"] == "CancelledError"
        assert {first["parent_id"], second["parent_id"]} == {draw["span_id"]}


def test_a_client_that_leaves_while_rewards_score_ends_their_spans(
    config_file: ConfigFile, hold: threading.Event
) -> None:
    text = script('{text = "candidate 1"}')
    with traced(config_file, text) as (live, receiver):
        raw = send(live, {"align": {**BEST_OF_2, "rewards": {"hanging": 1}}})
        assert live.until(lambda: live.engine.sampled == 2 and live.service.admission.running)
        raw.close()
        assert live.idle()
        # The thread of the reward, for which the server would wait.
        hold.set()
        assert live.until(lambda: ended(live, receiver))
        assert receiver.named("reward hanging")[0]["failed"]
        assert [span["failed"] for span in receiver.named("chat fake")] == [False, False]
        assert not receiver.named("draw")[0]["failed"]
        assert not receiver.named("select")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("align", [None, BEST_OF_2])
def test_an_engine_that_fails_marks_the_candidates_and_the_request(
    config_file: ConfigFile, align: Any, stream: bool
) -> None:
    text = script('{text = "one", error = "the GPU is gone"}')
    with traced(config_file, text) as (live, receiver):
        answer = live.chat(align, stream=stream)
        flush(live)
    (request,) = receiver.named(ROUTE)
    assert "the GPU is gone" in answer.text
    assert "the GPU is gone" not in str(receiver.spans)
    assert request["failed"]
    assert request["attributes"]["error.type"] in {"502", "EngineFailed"}
    candidates = receiver.named("chat fake")
    assert len(candidates) == (2 if align else 1)
    assert {span["attributes"]["error.type"] for span in candidates} == {"failed"}


@contextmanager
def silent_collector() -> Iterator[str]:
    """Accept connections, and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def no_collector() -> Iterator[str]:
    """Refuse connections: the port is bound, and nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("broken", [silent_collector, no_collector])
def test_a_dead_collector_delays_neither_answers_nor_the_end(
    config_file: ConfigFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: Any,
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(connection, "CLOSE_SECONDS", 0.05)
    # The queue overflows.
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    # The end would wait for as long as this if it waited for the collector.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    earlier = set(threading.enumerate())
    with broken() as url:
        text = f'{NUMBERS}\n[telemetry]\nendpoint = "{url}"\n'
        live = start(configuration.load(config_file(text)))
        try:
            for _ in range(5):
                assert live.chat(BEST_OF_2).status_code == 200
            senders = [each for each in new_threads(earlier) if "OtelBatch" in each.name]
        finally:
            end(live)
        assert "traces lost" in caplog.text
        # The process does not wait for them either.
        assert len(senders) == 2
        assert all(sender.daemon for sender in new_threads(earlier))
    # Nothing holds a connection open now, so that no thread is left.
    for thread in new_threads(earlier):
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()


def new_threads(earlier: set[threading.Thread]) -> set[threading.Thread]:
    return set(threading.enumerate()) - earlier


def test_a_collector_that_is_slow_delays_no_answer(config_file: ConfigFile) -> None:
    with traced(config_file) as (live, receiver):
        receiver.is_awake.clear()
        assert live.chat(BEST_OF_2).status_code == 200
        sending = threading.Thread(target=flush, args=(live,))
        sending.start()
        assert receiver.was_asked.wait(60)
        # The collector has been asked, and does not answer. Requests go on.
        for _ in range(5):
            assert live.chat(BEST_OF_2).status_code == 200
        assert receiver.spans == []
        receiver.is_awake.set()
        sending.join()
        flush(live)
        assert len(receiver.named(ROUTE)) == 6
        assert len(receiver.named("chat fake")) == len(receiver.events) == 12


def test_a_collector_that_comes_back_gets_everything(config_file: ConfigFile) -> None:
    with traced(config_file) as (live, receiver):
        receiver.status = 503
        sending = threading.Thread(target=flush, args=(live,))
        for _ in range(3):
            assert live.chat(BEST_OF_2).status_code == 200
        receiver.is_awake.clear()
        sending.start()
        assert receiver.was_asked.wait(60)
        # It has refused, or is about to; the next try succeeds.
        assert live.until(lambda: bool(receiver.headers))
        receiver.status = 200
        receiver.is_awake.set()
        sending.join()
        assert len(receiver.named(ROUTE)) == 3
        assert len(receiver.events) == 6


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_lost_when_the_server_ends(
    config_file: ConfigFile, tmp_path: Path, workers: int
) -> None:
    """The spans of requests that run while the server drains arrive too, from each worker."""
    hold_file = tmp_path / "go"
    with collector() as receiver:
        text = (
            f'[engine]\nkind = "fake"\n[server]\nworkers = {workers}\n'
            '[rewards.held]\nkind = "callable"\n'
            'function = "tests.server.scorers:held_by_a_file"\n'
            f'[telemetry]\nendpoint = "{receiver.url}"\n'
        )
        path = str(config_file(text))
        server = Process("--port", "0", path, fresh=True, TEST_HOLD_FILE=str(hold_file))
        try:
            url = server.url()
            body = {"messages": USER, "align": {**BEST_OF_2, "rewards": {"held": 1}}}
            threads = [threading.Thread(target=post, args=(url, body)) for _ in range(6)]
            for thread in threads:
                thread.start()
            running = "infer_align_running_requests"
            while sample(url, running) < 6:
                threads[0].join(0.02)
            server.popen.terminate()
            server.log.find("drain started")
            hold_file.touch()
            for thread in threads:
                thread.join()
            assert server.wait() == 0
        finally:
            if server.popen.poll() is None:
                server.popen.kill()
                server.wait()
    assert len(receiver.named(ROUTE)) == 6
    assert not any(span["failed"] for span in receiver.spans)
    assert len(receiver.named("chat fake")) == len(receiver.events) == 12
    instances = {resource["service.instance.id"] for resource in receiver.resources}
    assert len(instances) <= workers


def post(url: str, body: object) -> None:
    response = httpx2.post(f"{url}/v1/chat/completions", json=body, **LOCAL)
    assert response.status_code == 200, response.text


def sample(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics", **LOCAL).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
