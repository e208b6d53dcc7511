"""The context of a trace, from the caller through the server to whatever it calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.collector import Collector
from tests.server.conftest import USER, Live
from tests.server.tracing import CALLER, PARENT, ROUTE, TRACE, ConfigFile, flush, traced
from tests.server.upstream.conftest import Serve
from tests.server.upstream.test_discovery import numbered

ALIGNED = {"messages": USER, "align": {"best_of_n": {"n": 2}}}
JUDGED = """
[rewards.judge]
kind = "trust_judge"
[rewards.pool]
kind = "upstream"
urls = "{root}"
"""


@contextmanager
def gateway(
    config_file: ConfigFile, text: str = "", probe: str = "false"
) -> Iterator[tuple[Live, Collector, FakeUpstream]]:
    """Serve in front of an upstream, with a collector."""
    with fake_upstream() as up:
        engine = f'[engine]\nkind = "openai"\nurls = ["{up.url}"]\nprobe = {probe}\n'
        rewards = '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
        root = up.url.removesuffix("/v1")
        text = engine + rewards + text.format(root=root)
        with traced(config_file, text) as (live, receiver):
            up.clear_log()
            yield live, receiver, up


def test_a_trace_is_continued_from_the_caller_to_the_upstream(config_file: ConfigFile) -> None:
    with gateway(config_file) as (live, receiver, up):
        body = {"model": "up", "messages": USER}
        headers = {"traceparent": CALLER, "tracestate": "vendor=1", "baggage": "user=secret"}
        live.post({**body, "align": {"best_of_n": {"n": 2}}}, headers=headers)
        aligned = up.headers[-1]
        live.post(body, headers=headers)
        plain = up.headers[-1]
        flush(live)
        requests = receiver.named(ROUTE)
        assert [span["parent_id"] for span in requests] == [PARENT, PARENT]
        assert {span["trace_id"] for span in receiver.spans} == {TRACE}
        (draw,) = receiver.named("draw")
        assert aligned["traceparent"] == f"00-{TRACE}-{draw['span_id']}-01"
        assert plain["traceparent"] == f"00-{TRACE}-{requests[1]['span_id']}-01"
        assert aligned["tracestate"] == plain["tracestate"] == "vendor=1"
        # Baggage may hold anything, and the upstream may be another company's.
        assert "baggage" not in aligned
        assert "baggage" not in plain


def test_the_share_of_traced_requests_is_the_callers_or_the_configured_one(
    config_file: ConfigFile,
) -> None:
    with traced(config_file, settings="sample_ratio = 0.0") as (live, receiver):
        align = {"best_of_n": {"n": 2}}
        assert live.chat(align).status_code == 200
        flush(live)
        assert receiver.spans == receiver.events == []
        assert live.post(ALIGNED, headers={"traceparent": CALLER}).status_code == 200
        flush(live)
        assert {span["trace_id"] for span in receiver.spans} == {TRACE}
        assert len(receiver.events) == 2


def test_a_trace_that_the_caller_does_not_keep_is_not_kept_here(config_file: ConfigFile) -> None:
    with gateway(config_file) as (live, receiver, up):
        unsampled = CALLER[:-2] + "00"
        for body in (ALIGNED, {"model": "up", "messages": USER}):
            assert live.post(body, headers={"traceparent": unsampled}).status_code == 200
            # The trace still goes on, so that every server decides alike.
            _, trace, parent, flags = up.headers[-1]["traceparent"].split("-")
            assert (trace, flags) == (TRACE, "00")
            assert parent != PARENT
        flush(live)
        assert receiver.spans == receiver.events == []


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "no parent": [("traceparent", "garbage")],
    "zeros": [("traceparent", f"00-{'0' * 32}-{'0' * 16}-01")],
    "version ff": [("traceparent", "ff" + CALLER[2:])],
    "upper case": [("traceparent", CALLER.upper())],
    "too long": [("traceparent", f"{CALLER}-{'x' * 5000}")],
    "two parents": [("traceparent", CALLER), ("traceparent", CALLER.replace("b7ad", "c7ad"))],
    "state only": [],
}


@pytest.mark.parametrize("headers", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_parent_begins_a_new_trace(
    config_file: ConfigFile, headers: list[tuple[str, str]]
) -> None:
    with gateway(config_file) as (live, receiver, up):
        for body in (ALIGNED, {"model": "up", "messages": USER}):
            sent = [*headers, ("tracestate", "vendor=1")]
            assert live.post(body, headers=sent).status_code == 200
        flush(live)
        requests = receiver.named(ROUTE)
        assert [span["parent_id"] for span in requests] == ["", ""]
        assert TRACE not in {span["trace_id"] for span in requests}
        for request, received in zip(requests, up.headers, strict=True):
            assert received["traceparent"].split("-")[1] == request["trace_id"]
            # A state without its parent means nothing.
            assert "tracestate" not in received


def test_a_state_in_several_headers_is_one(config_file: ConfigFile) -> None:
    with gateway(config_file) as (live, _, up):
        states = [("tracestate", "a=1"), ("tracestate", "b=2"), ("traceparent", CALLER)]
        live.post({"model": "up", "messages": USER}, headers=states)
        assert up.headers[-1]["tracestate"] == "a=1,b=2"
        live.post(ALIGNED, headers=[("tracestate", "not a state"), ("traceparent", CALLER)])
        assert "tracestate" not in up.headers[-1]
        assert up.headers[-1]["traceparent"].split("-")[1] == TRACE


def test_judges_and_rewards_of_upstreams_are_called_in_their_stage(
    config_file: ConfigFile,
) -> None:
    def answer(path: str, body: Any) -> Any:
        if path == "/classify":
            return {"data": [{"index": 0, "probs": [1.0]}]}
        return numbered(path, body)

    with gateway(config_file, JUDGED, probe='"lazy"') as (live, receiver, up):
        up.answer = answer
        align = {"best_of_n": {"n": 2}, "rewards": {"judge": 0, "pool": 0, "number": 1}}
        # The first request also finds out what the upstream can do. Scores do not matter here.
        for _ in range(2):
            up.clear_log()
            answered = live.post({**ALIGNED, "align": align})
            assert answered.status_code == 200, answered.text
        flush(live)
        stages = {span["span_id"]: span["name"] for span in receiver.spans}
        called: dict[str, set[str]] = {}
        for path, headers in zip(up.paths, up.headers, strict=True):
            stage = stages[headers["traceparent"].split("-")[2]]
            called.setdefault(path, set()).add(stage)
        assert called["/classify"] == {"reward pool"}
        assert called["/v1/chat/completions"] == {"draw", "reward judge"}


def test_a_server_without_telemetry_passes_on_what_the_client_sent(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    live = serve_upstream()
    assert live.service.tracing is None
    headers = {"traceparent": CALLER, "tracestate": "vendor=1"}
    live.post({"model": "up", "messages": USER}, headers=headers)
    assert up.headers[-1]["traceparent"] == CALLER
    assert up.headers[-1]["tracestate"] == "vendor=1"
    live.post(ALIGNED, headers=headers)
    assert "traceparent" not in up.headers[-1]
