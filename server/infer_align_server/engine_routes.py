"""Requests that the engine answers itself, without our flow.

These are requests without `align`, other routes of the engine, and the Responses API of an
upstream. They go through admission and the token budget like every other request. Their worst
case is the token limit that the request itself names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

from infer_align.engines import App
from infer_align.errors import InvalidRequest, Unsupported
from infer_align_server.limits.token_budget import charged
from infer_align_server.logs import describe
from infer_align_server.service import Service
from infer_align_server.token_meter import TokenMeter

# These routes always generate. A request to another route generates only if it names a limit.
# Without a limit, such a request is charged by the usage in its response.
GENERATING = re.compile(r"/v1/(responses|messages)/?")
# The path of the routes that pass on whatever no other route answers.
ANY_PATH = "/{path:path}"
LIMIT_FIELDS = ("max_output_tokens", "max_completion_tokens", "max_tokens")


def engine_app(service: Service) -> App | None:
    """Return the engine's own application if it has one and has started."""
    return None if service.app_engine is None else service.app_engine.app()


def engine_match(service: Service, scope: Scope) -> tuple[App | None, Match]:
    """Return the engine's own application, and if one of its routes matches a request.

    A path that it does not have is left to this server, whose errors have OpenAI's form. An
    application that is no Starlette application decides for itself.
    """
    app = engine_app(service)
    if app is None:
        return None, Match.NONE
    routes = getattr(app, "routes", None)
    if routes is None:
        return app, Match.FULL
    matches = [route.matches(scope)[0] for route in routes]
    return app, max(matches, key=lambda match: match.value, default=Match.NONE)


def allowed_methods(http: HttpRequest) -> set[str]:
    """Return the methods of all routes that have the path of a request, the engine's included."""
    routes = [*http.app.routes, *getattr(engine_app(http.app.state.service), "routes", ())]
    methods: set[str] = set()
    for route in routes:
        if not isinstance(route, Route) or route.path == ANY_PATH:
            continue
        if route.matches(http.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return methods


def serves_responses(service: Service) -> bool:
    """Return True if the engine may serve the Responses API."""
    return engine_app(service) is not None or service.forwarder is not None


def route_worst_case(service: Service, path: str, body: Mapping[str, Any]) -> int:
    """Return the largest number of tokens that a request to a route of the engine can generate.

    It is 0 if the request names no limit and the route is not known to generate.

    Raises:
        InvalidRequest: The limit in the request is over the limit of this server.
        Unsupported: The request contains `align`.
    """
    if body.get("align") is not None:
        raise Unsupported(
            "align: only allowed on /v1/chat/completions and /v1/completions; leave it out here.",
            param="align",
        )
    names = [name for name in LIMIT_FIELDS if _is_positive_integer(body.get(name))]
    if names:
        name = names[0]
        tokens = int(body[name])
    elif GENERATING.fullmatch(path):
        name = LIMIT_FIELDS[0]
        tokens = service.engine.worst_case_tokens({**body, "messages": []})
    else:
        return 0
    limit = service.config.limits.max_completion_tokens
    if tokens > limit:
        raise InvalidRequest(
            f"{name}: the worst case is {tokens} tokens, over this server's limit of {limit}; "
            f"set {name} to {limit} or less.",
            param=name,
            code="over_limit",
        )
    return tokens


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def json_fields(content: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object; an empty mapping for any other content."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


class ForwardedResponse(HttpResponse):
    """The response of the engine's application, passed on byte for byte.

    Args:
        service: The service whose admission and token budget the request uses.
        app: The engine's application.
        body: The request's body.
        caller: The caller that pays for the tokens.
        worst_case: The largest number of tokens it can generate. None if it generates nothing;
            then the usage in the response is not charged.
        json: Forward the body with the content type of JSON, also if the client sent another.
    """

    def __init__(
        self,
        service: Service,
        app: App,
        body: bytes,
        caller: str,
        worst_case: int | None = None,
        *,
        json: bool = False,
    ) -> None:
        super().__init__()
        self._service = service
        self._app = app
        self._unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._caller = caller
        self._generates = worst_case is not None
        self._worst_case = worst_case or 0
        self._json = json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the engine respond.

        Raises:
            Overloaded: The queue is full, or the caller's token budget is used up.
        """

        async def replay() -> Message:
            return self._unread.pop() if self._unread else await receive()

        headers = scope["headers"]
        if self._json:
            headers = [(name, value) for name, value in headers if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
        forwarded = {**scope, "headers": headers}
        async with charged(self._service.tokens, self._caller, self._worst_case) as charge:
            meter = TokenMeter(send)
            async with self._service.admission.admit(self._worst_case, caller=self._caller):
                charge.start(None)
                try:
                    await self._app(forwarded, replay, meter.send)
                finally:
                    describe(**meter.usage())
            charge.spent = meter.tokens(self._worst_case) if self._generates else 0
