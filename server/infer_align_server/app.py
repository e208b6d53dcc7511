"""The ASGI application: its routes, its errors in OpenAI's format, one log line per request."""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import TypeAlias

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer_align.config.config import Config
from infer_align.errors import AlignError, Unavailable
from infer_align.upstream.trace import CallTrace, trace
from infer_align_server.direct_routes import DirectRoutes
from infer_align_server.engine_routes import allowed_methods
from infer_align_server.loading import Progress
from infer_align_server.logs import access, access_fields
from infer_align_server.playground import page_routes
from infer_align_server.routes import ENGINE_ROUTE, ROUTES, UPSTREAM_ROUTE
from infer_align_server.service import Service
from infer_align_server.sharing import Sharing
from infer_align_server.traced_app import TracedApp
from infer_align_server.wire.disconnect import ClientLeft, connection_of, watched
from infer_align_server.wire.errors import error_response

log = logging.getLogger("infer_align")

# The status of nginx for "client closed request". No client receives it. In logs and metrics it
# separates these requests from successful ones.
CLIENT_LEFT = 499
CUT_OFF = (
    "The server is shutting down, and the answer was not ready within [server] drain_seconds; send "
    "the request again."
)
# Headers of responses that scripts of web pages may read.
EXPOSED_HEADERS = ("x-request-id", "retry-after", "openai-processing-ms", "openai-version")
# Characters of a path that are compared with the routes, and how alike the two must be.
MAX_COMPARED = 80
SIMILARITY = 0.85
_SAFE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
Header: TypeAlias = tuple[bytes, bytes]


def create_app(
    config: Config,
    progress: Progress = lambda _: None,
    sharing: Sharing | None = None,
    *,
    load_first: bool = False,
) -> FastAPI:
    """Return the server as an ASGI application.

    The application answers /health and /ready while it still loads its models. If loading fails,
    /ready says why.

    Args:
        config: The configuration of the process.
        progress: Called with a short description of each thing that is being loaded.
        sharing: What this process shares with the other workers; None if there are none.
        load_first: Accept no connection before loading has ended.

    Raises:
        ConfigError: The configuration cannot be served.
    """
    service = Service(config, sharing)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.loading = asyncio.create_task(service.start(progress))
        try:
            if load_first:
                await service.settled.wait()
            yield
        finally:
            app.state.loading.cancel()
            await service.close()

    app = FastAPI(
        title="infer-align",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.service = service
    app.router.routes.extend([*ROUTES, *page_routes(config.server)])
    if service.app_engine is not None:
        app.router.routes.append(ENGINE_ROUTE)
    if service.forwarder is not None:
        app.router.routes.append(UPSTREAM_ROUTE)
    app.exception_handler(AlignError)(_on_align_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.router.redirect_slashes = False
    app.add_middleware(DirectRoutes, routes=ROUTES, on_error=_on_error)
    if service.tracing is not None:
        # Inside the log, which sets the fields that the trace reads.
        app.add_middleware(TracedApp, tracing=service.tracing)
    app.add_middleware(RequestLog, service=service)
    _allow_origins(app, config.server.allowed_origins)
    return app


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let the web pages of these origins call the server.

    The middleware is outside of all others: a preflight has no key, and errors need the headers
    too. Without origins it is absent and costs nothing.
    """
    if not origins:
        return
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.rstrip("/") for origin in origins],
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )


class RequestLog:
    """Middleware that gives each request an id, logs it and counts it.

    It also turns an unexpected exception, and the end of the drain, into an error in OpenAI's
    format.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        start = monotonic()
        request_id = _request_id(scope)
        fields: dict[str, object] = {"request_id": request_id}
        access_fields.set(fields)
        calls = CallTrace(request_id)
        trace.set(calls)
        watched.set(connection_of(scope))
        status = 0
        self._service.open_requests += 1

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_request_id(message.get("headers", ()), request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (ClientLeft, ClientDisconnect):
            # The client left before the response, during it, or while it sent the body.
            status = CLIENT_LEFT
        except (asyncio.CancelledError, Exception) as error:
            failure = _log_failure(error, request_id)
            if not status:
                await error_response(failure)(scope, receive, send_with_id)
        finally:
            self._service.open_requests -= 1
            if calls.upstream_ids:
                fields["upstream_request_ids"] = calls.upstream_ids
            self._record(scope, status or CLIENT_LEFT, fields, monotonic() - start)

    def _record(self, scope: Scope, status: int, fields: dict[str, object], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        if status == CLIENT_LEFT:
            self._service.metrics.disconnects.inc()
        self._service.metrics.count_request(route, status)
        fields["method"] = scope["method"]
        fields["route"] = route
        fields["status"] = status
        fields["seconds"] = round(seconds, 4)
        access.write(fields)


def _log_failure(error: BaseException, request_id: str) -> AlignError:
    """Log why a request gets no answer; return what its client is told."""
    if isinstance(error, asyncio.CancelledError):
        # uvicorn cancels what still runs at the end of the drain.
        log.warning("cut off: the drain has ended", extra={"request_id": request_id})
        return Unavailable(CUT_OFF, retry_after=1)
    log.exception("failed", extra={"request_id": request_id})
    return AlignError("The server failed. Its log has the details under this request's id.")


def _with_request_id(headers: Iterable[Header], request_id: str) -> list[Header]:
    """Return the headers with a request id; an upstream's own id stays."""
    result = list(headers)
    for name, _ in result:
        if name == b"x-request-id":
            return result
    result.append((b"x-request-id", request_id.encode()))
    return result


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is safe to log, else a new one."""
    for name, value in reversed(scope["headers"]):
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if _SAFE_ID.fullmatch(text):
                return text
            break
    # Not from `random`: a model or a reward may seed it, and ids would repeat.
    return os.urandom(16).hex()


async def _on_error(http: HttpRequest, error: AlignError | HTTPException) -> HttpResponse:
    if isinstance(error, AlignError):
        return error_response(error)
    return await _on_http_error(http, error)


async def _on_align_error(_: HttpRequest, error: AlignError) -> HttpResponse:
    return error_response(error)


def _meant_route(http: HttpRequest) -> str:
    """Return a clause with the route that a wrong path most likely means, or nothing."""
    path = http.url.path[:MAX_COMPARED]
    paths = {getattr(route, "path", "") for route in http.app.routes}
    if f"/v1{path}" in paths:
        return f"; use /v1{path}: the base URL of a client ends in /v1"
    if path.startswith("/v1/v1/"):
        return f"; use {path.removeprefix('/v1')}: the base URL of a client has /v1 once"
    similar = difflib.get_close_matches(path, paths, n=1, cutoff=SIMILARITY)
    return f"; the nearest one is {similar[0]}" if similar else ""


async def _on_http_error(http: HttpRequest, error: HTTPException) -> HttpResponse:
    reason = str(error.detail)
    if error.status_code == 405:
        reason = "this route does not have this method"
    elif error.status_code == 404 and re.match(r"/v1/responses(/|$)", http.url.path):
        reason = "this engine does not serve the Responses API; use /v1/chat/completions"
    elif error.status_code == 404:
        reason = f"there is no such route{_meant_route(http)}"
    align_error = AlignError(
        f"{http.method} {http.url.path}: {reason}.",
        status=error.status_code,
        code=f"http_{error.status_code}",
    )
    align_error.type = "invalid_request_error"
    response = error_response(align_error)
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        # The router names the methods of the first route with this path, not of all.
        response.headers["Allow"] = ", ".join(sorted(allowed_methods(http)))
    return response
