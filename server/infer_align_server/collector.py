"""The connection to an OpenTelemetry collector: spans and events over OTLP/HTTP.

Without `[telemetry] endpoint` no package of OpenTelemetry is imported.
"""

# ruff: noqa: PLC0415 - the packages of the extra `otel` are imported only if they are needed
from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import time_ns
from typing import TYPE_CHECKING, Any

from infer_align.config.server import Telemetry
from infer_align.errors import ConfigError
from infer_align.stages import Fail
from infer_align.types import Candidate

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SCOPE = "infer_align"
EVALUATION = "gen_ai.evaluation.result"
# At the end of the process, the time that sending the rest may take, in seconds.
CLOSE_SECONDS = 3.0


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

            self._span_exporter, self._event_exporter = _exporters(settings)
            self._spans, self._events = _providers(
                settings, self._span_exporter, self._event_exporter
            )
        except ImportError as error:
            raise ConfigError(
                f"[telemetry] endpoint: needs a package that is not installed ({error.name}); "
                "install the extra: pip install 'infer-align[otel]'."
            ) from None
        self.captures_content = settings.capture_content
        self._tracer = self._spans.get_tracer(SCOPE)
        self._logger = self._events.get_logger(SCOPE)
        self._propagator = TraceContextTextMapPropagator()

    def server_span(self, headers: Mapping[str, str], method: str) -> AbstractContextManager[Span]:
        """Return the block around a request; its span is current inside.

        Args:
            headers: The headers of the request; `traceparent` continues the caller's trace.
            method: The HTTP method.
        """
        from opentelemetry.trace import SpanKind

        return self._tracer.start_as_current_span(
            method,
            self._propagator.extract(headers),
            SpanKind.SERVER,
            {"http.request.method": method},
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
        self,
        candidate: Candidate,
        attributes: Mapping[str, Any],
        parent: Span,
        times: tuple[int, int],
    ) -> Span:
        """Record a candidate that has been drawn as a child of its draw.

        Args:
            candidate: The candidate.
            attributes: The attributes of its span.
            parent: The span of its draw.
            times: When drawing began and when the candidate ended, in ns of the system's clock.
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
        if candidate.error is not None:
            mark_failed(span, "interrupted" if candidate.interrupted else "failed")
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
        """Send what waits to be sent; blocks until it is sent or has failed."""
        self._spans.force_flush()
        self._events.force_flush()

    async def close(self) -> None:
        """Send what waits to be sent, for a bounded time, and end the threads that send."""
        sending: dict[asyncio.Task[None], OTLPSpanExporter | OTLPLogExporter] = {
            asyncio.create_task(asyncio.to_thread(self._spans.shutdown)): self._span_exporter,
            asyncio.create_task(asyncio.to_thread(self._events.shutdown)): self._event_exporter,
        }
        _, late = await asyncio.wait(sending, timeout=CLOSE_SECONDS)
        for task in late:
            # The SDK takes no time limit. Its exporter waits between tries, and ends that here.
            sending[task].shutdown()  # type: ignore[no-untyped-call]
        await asyncio.gather(*sending)


def mark_failed(span: Span, error_type: str) -> None:
    """Mark a span as failed, with the type only: a message may repeat a user's text."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", error_type)
    span.set_status(StatusCode.ERROR)


def _exporters(settings: Telemetry) -> tuple[OTLPSpanExporter, OTLPLogExporter]:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    endpoint = _endpoint(settings)
    headers = _collector_headers(settings)
    return (
        OTLPSpanExporter(f"{endpoint}/v1/traces", headers=headers),
        OTLPLogExporter(f"{endpoint}/v1/logs", headers=headers),
    )


def _providers(
    settings: Telemetry, span_exporter: OTLPSpanExporter, event_exporter: OTLPLogExporter
) -> tuple[TracerProvider, LoggerProvider]:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource.create({"service.name": settings.service_name})
    sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
    spans = TracerProvider(sampler, resource, shutdown_on_exit=False)
    spans.add_span_processor(BatchSpanProcessor(span_exporter))
    events = LoggerProvider(resource, shutdown_on_exit=False)
    events.add_log_record_processor(BatchLogRecordProcessor(event_exporter))
    return spans, events


def _endpoint(settings: Telemetry) -> str:
    endpoint = (settings.endpoint or "").rstrip("/")
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"[telemetry] endpoint: {settings.endpoint!r} is not allowed; must be a URL that "
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
            f"[telemetry] headers_env: the environment variable {settings.headers_env} is not set."
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
