"""Middleware that calls the endpoint of a fixed path without a search for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infer_align.errors import AlignError

# Makes the response for an error that has a status.
OnError: TypeAlias = Callable[[HttpRequest, AlignError | HTTPException], Awaitable[HttpResponse]]


class DirectRoutes:
    """Calls the endpoints of routes without path parameters; all other requests go on.

    The layers of FastAPI and Starlette would find the same endpoint. To pass through them takes a
    tenth of the time of a request that is passed on.

    Args:
        app: The application, for all other requests.
        routes: The routes. Those with path parameters are left to the application.
        on_error: Makes the response for an error that has a status.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[Route], on_error: OnError) -> None:
        self._app = app
        self._on_error = on_error
        self._routes: dict[tuple[str, str], Route] = {}
        for route in routes:
            if "{" in route.path:
                continue
            for method in route.methods or ():
                self._routes.setdefault((method, route.path), route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        route = None
        if scope["type"] == "http":
            route = self._routes.get((scope["method"], scope["path"]))
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        http = HttpRequest(scope, receive, send_and_note)
        try:
            response = await route.endpoint(http)
            await response(scope, receive, send_and_note)
        except (AlignError, HTTPException) as error:
            if started:
                raise RuntimeError("the response failed after it had started") from error
            response = await self._on_error(http, error)
            await response(scope, receive, send)
