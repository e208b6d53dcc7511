"""The application: routes, errors in OpenAI's shape, one log line and one count per request."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer_align.config.config import Config
from infer_align.engines import Engine
from infer_align.errors import AlignError
from infer_align_server.logs import access
from infer_align_server.routes import ENGINE_ROUTE, ROUTES
from infer_align_server.service import Progress, Service
from infer_align_server.wire.disconnect import ClientLeft
from infer_align_server.wire.errors import error_response

log = logging.getLogger("infer_align")

# What nginx calls "client closed request": nobody reads it, but logs and metrics should tell it from a success.
CLIENT_LEFT = 499


def create_app(config: Config, progress: Progress = lambda _: None) -> FastAPI:
    """The server as an ASGI application; models load while it already answers /health and /ready.

    Raises:
        ConfigError: the configuration cannot be served; what fails while loading stops the process.
    """
    service = Service(config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.loading = asyncio.create_task(service.start(progress))
        try:
            yield
        finally:
            app.state.loading.cancel()
            await service.close()

    app = FastAPI(
        title="infer-align", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.service = service
    app.router.routes.extend(ROUTES)
    if type(service.engine).app is not Engine.app:
        app.router.routes.append(ENGINE_ROUTE)
    app.add_exception_handler(AlignError, _on_align_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(Observed, service=service)
    return app


class Observed:
    """Gives each request an id, counts it, logs it, and turns what nobody foresaw into an OpenAI error."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, request_id = monotonic(), 0, _request_id(scope)

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except (
            ClientLeft,
            ClientDisconnect,
        ):  # before the answer, in the middle of it, or while sending the body
            status = CLIENT_LEFT
        except Exception:
            log.exception("failed", extra={"request_id": request_id})
            if not status:
                await error_response(AlignError("the server failed; its log has the request id."))(
                    scope, receive, observed_send
                )
        finally:
            self._count(scope, status, request_id, monotonic() - started)

    def _count(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unknown")
        status = status or CLIENT_LEFT
        if status == CLIENT_LEFT:
            self._service.metrics.disconnects.inc()
        self._service.metrics.requests.labels(route, str(status)).inc()
        access.info(
            "request",
            extra={
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            },
        )


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex


async def _on_align_error(_: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, AlignError)
    return error_response(error)


async def _on_http_error(http: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    what = {404: "no such route", 405: "not a method of this route"}.get(
        error.status_code, str(error.detail)
    )
    if error.status_code == 404 and re.match(r"/v1/responses(/|$)", http.url.path):
        what = "this engine does not serve the Responses API; use /v1/chat/completions"
    raised = AlignError(
        f"{http.method} {http.url.path}: {what}.",
        status=error.status_code,
        code=f"http_{error.status_code}",
    )
    raised.type = "invalid_request_error"
    response = error_response(raised)
    response.headers.update(error.headers or {})  # a 405 says which methods are allowed
    return response
