"""The connection to an OpenTelemetry collector: spans and events over OTLP/HTTP.

Without `[telemetry] endpoint` no package of OpenTelemetry is imported.
"""

# ruff: noqa: PLC0415 - the packages of the extra `otel` are imported only if they are needed
from __future__ import annotations

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from infer_align.config.server import Telemetry
from infer_align.errors import ConfigError
from infer_align.stages import Fail
from infer_align.urls import is_http_url, quote_url

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

log = logging.getLogger("infer_align")

SCOPE = "infer_align"
EVALUATION = "gen_ai.evaluation.result"
# At the end of the process, the time that sending the rest may take.
CLOSE_SECONDS = 3.0
# The methods that the conventions for HTTP know. Others could hold any text of a client.
METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"}
)
OTHER_METHOD = "_OTHER"


class Tracing:
    """The connection to the collector of one process.

    Args:
        settings: The section `[telemetry]`, with an endpoint.

    Raises:
        ConfigError: The packages of the extra `otel` are missing, or a setting is wrong.
    """

    def __init__(self, settings: Telemetry) -> None:
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._spans, self._events, self._exporters = _providers(settings)
        except ImportError as error:
            raise ConfigError(
                f"[telemetry] endpoint: needs a package that is not installed ({error.name}); "
                "install the extra: pip install 'infer-align[otel]'."
            ) from None
        self.captures_content = settings.capture_content
        self._tracer = self._spans.get_tracer(SCOPE)
        self._logger = self._events.get_logger(SCOPE)
        self._propagator = TraceContextTextMapPropagator()

    def server_span(self, headers: Headers, method: str) -> AbstractContextManager[Span]:
        """Return the block around a request; its span is current inside.

        Args:
            headers: The headers of the request; `traceparent` continues the caller's trace.
            method: The HTTP method.
        """
        from opentelemetry.trace import SpanKind

        method_name = method if method in METHODS else OTHER_METHOD
        return self._tracer.start_as_current_span(
            span_name(method),
            self._propagator.extract(_trace_context(headers)),
            SpanKind.SERVER,
            {"http.request.method": method_name},
            record_exception=False,
            set_status_on_exception=False,
        )

    @contextmanager
    def stage(self, name: str, attributes: Mapping[str, Any]) -> Iterator[Fail]:
        """Trace the stage inside the block as a child of the current span."""
        with self._tracer.start_as_current_span(
            name, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield lambda error_type: mark_failed(span, error_type)
            except BaseException as error:
                mark_failed(span, type(error).__name__)
                raise

    def current_span(self) -> Span:
        """Return the span of the block that runs."""
        from opentelemetry.trace import get_current_span

        return get_current_span()

    def headers(self) -> Mapping[str, str]:
        """Return the headers that continue the current span in another server."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def candidate(
        self, attributes: Mapping[str, Any], parent: Span, times: tuple[int, int], error_type: str
    ) -> Span:
        """Record a candidate that has been drawn as a child of its draw.

        Args:
            attributes: The attributes of its span.
            parent: The span of its draw.
            times: When drawing began and when the candidate ended, in ns of the system's clock.
            error_type: Why there is no whole answer; "" if there is one.
        """
        from opentelemetry.trace import SpanKind, set_span_in_context

        model = attributes.get("gen_ai.request.model", "")
        operation = attributes["gen_ai.operation.name"]
        span = self._tracer.start_span(
            f"{operation} {model}".rstrip(),
            set_span_in_context(parent),
            SpanKind.CLIENT,
            attributes,
            start_time=times[0],
        )
        if error_type:
            mark_failed(span, error_type)
        # The clock of the system may have stepped back.
        span.end(max(times))
        return span

    def evaluation(self, attributes: Mapping[str, Any], span: Span) -> None:
        """Send the event of one score, in the context of the span that it is about."""
        from opentelemetry.trace import set_span_in_context

        self._logger.emit(
            timestamp=time_ns(),
            context=set_span_in_context(span),
            event_name=EVALUATION,
            attributes=attributes,
        )

    def flush(self) -> None:
        """Send what waits to be sent, however long the collector takes."""
        self._spans.force_flush()
        self._events.force_flush()

    async def close(self) -> None:
        """Send what waits to be sent, for a bounded time, and end the threads that send.

        What the collector has not taken by then is lost. A collector that holds a connection
        without an answer holds its thread too. Such a thread ends with the process.
        """
        threads = []
        for provider in (self._spans, self._events):
            thread = threading.Thread(target=provider.shutdown, daemon=True)
            thread.start()
            threads.append(thread)
        if await asyncio.to_thread(_join_all, threads, monotonic() + CLOSE_SECONDS):
            return
        limit = {"seconds": CLOSE_SECONDS}
        log.warning("traces lost: the collector did not take them in time", extra=limit)
        for exporter in self._exporters:
            # It would go on trying for as long as its timeout.
            exporter.shutdown()


def _join_all(threads: Sequence[threading.Thread], deadline: float) -> bool:
    """Wait for the threads until the deadline; return True if all have ended."""
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    return not any(thread.is_alive() for thread in threads)


def span_name(method: str, route: str = "") -> str:
    """Return the name of a request's span by the conventions for HTTP."""
    return f"{method if method in METHODS else 'HTTP'} {route}".rstrip()


def _trace_context(headers: Headers) -> Mapping[str, list[str]]:
    """Return the headers of W3C's Trace Context. Two parents are as good as none."""
    parents = headers.getlist("traceparent")
    if len(parents) != 1:
        return {}
    return {"traceparent": parents, "tracestate": headers.getlist("tracestate")}


def mark_failed(span: Span, error_type: str) -> None:
    """Mark a span as failed, with the type only: a message may repeat a user's text."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def _providers(
    settings: Telemetry,
) -> tuple[TracerProvider, LoggerProvider, tuple[SpanExporter, LogRecordExporter]]:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    endpoint = _endpoint(settings)
    headers = _collector_headers(settings)
    resource = Resource.create(
        {
            "service.name": settings.service_name,
            "service.version": version("infer-align"),
            # Tells workers and replicas apart.
            "service.instance.id": str(uuid.uuid4()),
        }
    )
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    spans = TracerProvider(sampler, resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", headers=headers)
    spans.add_span_processor(BatchSpanProcessor(exporter))
    events = LoggerProvider(resource, shutdown_on_exit=False)
    log_exporter = OTLPLogExporter(f"{endpoint}/v1/logs", headers=headers)
    events.add_log_record_processor(BatchLogRecordProcessor(log_exporter))
    return spans, events, (exporter, log_exporter)


def _endpoint(settings: Telemetry) -> str:
    endpoint = (settings.endpoint or "").rstrip("/")
    if not is_http_url(endpoint):
        raise ConfigError(
            f"[telemetry] endpoint: {quote_url(endpoint)} is not allowed; must be a URL that "
            'begins with http:// or https://, such as "http://localhost:4318".'
        )
    return endpoint


def _collector_headers(settings: Telemetry) -> dict[str, str]:
    """Return the headers for the collector from the environment.

    Raises:
        ConfigError: The variable is not set, or holds something else.
    """
    if settings.headers_env is None:
        return {}
    text = os.environ.get(settings.headers_env)
    if not text:
        raise ConfigError(
            f"[telemetry] headers_env: the environment variable {settings.headers_env!r} is not "
            "set or empty; put the headers there, as name=value separated by commas."
        )
    headers = {}
    for pair in text.split(","):
        name, separator, value = pair.strip().partition("=")
        if not separator or not name:
            raise ConfigError(
                f"[telemetry] headers_env: {settings.headers_env} must hold name=value pairs "
                "separated by commas."
            )
        headers[name.strip()] = value.strip()
    return headers
