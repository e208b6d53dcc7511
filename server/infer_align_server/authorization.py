"""The service that a request is for, its caller, and the owner of the caller's profiles."""

from __future__ import annotations

import re

from starlette.requests import Request as HttpRequest

from infer_align_server.limits.api_keys import Caller
from infer_align_server.limits.key_file import Scope
from infer_align_server.service import Service
from infer_align_server.wire.headers import headers_of

# Routes of an engine or of an upstream that only answer. All others may change what is served, such
# as those that load adapters or put the engine to sleep.
_ANSWERS = re.compile(
    r"/v\d+/.*|/(tokenize|detokenize|pooling|classify|embed|generate|invocations)"
)
_CHANGES = re.compile(r"/v\d+/(load|unload)_lora_adapter")
_SCORES = re.compile(r"(/v\d+)?/(score|rerank)")


def service_of(http: HttpRequest) -> Service:
    """Return the service of the application that received the request."""
    service: Service = http.app.state.service
    return service


async def authorize(
    http: HttpRequest, scope: Scope | None = "generate", *, limited: bool = True
) -> tuple[Service, str]:
    """Return the service and the caller's name; see `Service.authorize`.

    Raises:
        Unauthorized: The API key is missing or wrong.
        Forbidden: The API key lacks the scope.
        Overloaded: The caller is over its rate limit.
        StorageFailed: The rate cannot be counted.
    """
    service = service_of(http)
    address = http.client.host if http.client else "unknown"
    authorization = headers_of(http).get("authorization", "")
    caller = await service.authorize(authorization, address, scope, limited=limited)
    http.state.caller = caller
    return service, caller.name


def owner_of(http: HttpRequest) -> str:
    """Return the owner of the profiles that an authorized request may use."""
    caller: Caller = http.state.caller
    return caller.owner


def scope_of(path: str) -> Scope:
    """Return the scope for a route of the engine's own application or of an upstream."""
    if _SCORES.fullmatch(path):
        return "score"
    if _ANSWERS.fullmatch(path) and not _CHANGES.fullmatch(path):
        return "generate"
    return "admin"
