"""A collector in this process: a real HTTP server that decodes what OTLP/HTTP sends."""

# ruff: noqa: PLC0415 - the packages of the extra `otel` may be absent
from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.threaded_server import ThreadedServer

LIMIT_SECONDS = 60


class Collector:
    """An ASGI application that keeps spans and log records.

    Attributes:
        spans: {"name", "attributes", "span_id", "parent_id", "trace_id", "kind", "failed",
            "begin", "seconds", "text"} of each.
        events: {"name", "attributes", "span_id", "trace_id"} of each log record.
        headers: the headers of each request.
        resources: the attributes of each resource.
        status: the HTTP status of its answers; with another than 200 it keeps nothing, and asks to
            be tried again at once.
        is_awake: answers wait while it is not set.
        was_asked: set when a request arrives.
    """

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.resources: list[dict[str, Any]] = []
        self.port = 0
        self.status = 200
        self.is_awake = threading.Event()
        self.is_awake.set()
        self.was_asked = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        content = b""
        more = True
        while more:
            message = await receive()
            content += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.headers.append(headers)
        self.was_asked.set()
        await asyncio.to_thread(self.is_awake.wait, LIMIT_SECONDS)
        if headers.get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        # The status may change while this answers.
        status = self.status
        if status == 200:
            self._read(scope["path"], content)
        fields = [(b"content-type", b"application/x-protobuf"), (b"retry-after", b"0")]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b""})

    def _read(self, path: str, content: bytes) -> None:
        if path == "/v1/traces":
            self._read_spans(content)
        elif path == "/v1/logs":
            self._read_events(content)

    def _read_spans(self, content: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        request = trace_service_pb2.ExportTraceServiceRequest.FromString(content)
        for resource in request.resource_spans:
            self.resources.append(_attributes(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans += [_span(span) for span in scope.spans]

    def _read_events(self, content: bytes) -> None:
        from opentelemetry.proto.collector.logs.v1 import logs_service_pb2

        request = logs_service_pb2.ExportLogsServiceRequest.FromString(content)
        for resource in request.resource_logs:
            for scope in resource.scope_logs:
                for record in scope.log_records:
                    self.events.append(
                        {
                            "name": record.event_name,
                            "attributes": _attributes(record.attributes),
                            "span_id": record.span_id.hex(),
                            "trace_id": record.trace_id.hex(),
                        }
                    )


def _span(span: Any) -> dict[str, Any]:
    return {
        "name": span.name,
        "attributes": _attributes(span.attributes),
        "span_id": span.span_id.hex(),
        "parent_id": span.parent_span_id.hex(),
        "trace_id": span.trace_id.hex(),
        "kind": span.kind,
        "failed": span.status.code == 2,
        "begin": span.start_time_unix_nano,
        "seconds": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        "text": str(span),
    }


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    """Serve a collector on a free port."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    app = Collector()
    server = ThreadedServer(app, lifespan="off")
    app.port = server.port
    yield app
    app.is_awake.set()
    server.end()
