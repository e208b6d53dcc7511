"""The routes of the public contract."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from infer_align.errors import UnknownModel, Unsupported, nearest
from infer_align.flow.request import worst_case
from infer_align.types import Kind
from infer_align_server import discovery, judging, scoring
from infer_align_server.forward import Forwarded, Relayed, Relays, fields_of, sampled_at_most
from infer_align_server.limits.client_timeout import client_timeout, with_client_deadline
from infer_align_server.openapi import changing_facts, document
from infer_align_server.service import Service
from infer_align_server.wire.body import parse_body, read_body, read_bytes
from infer_align_server.wire.completion import OBJECTS, completion_json
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps, json_response
from infer_align_server.wire.stream import EventStream
from infer_align_server.wire.stream_options import stream_options


def service_of(http: HttpRequest) -> Service:
    """The process's service."""
    service: Service = http.app.state.service
    return service


def authorize(http: HttpRequest) -> tuple[Service, str]:
    """The service, and who asks; for a caller that may use it.

    Raises:
        Unauthorized, Overloaded: see `Service.authorize`.
    """
    service = service_of(http)
    return service, service.authorize(
        http.headers.get("authorization", ""), http.client.host if http.client else "unknown"
    )


async def chat_completions(http: HttpRequest) -> HttpResponse:
    """OpenAI chat, streaming and not, plus `align`."""
    return await _complete(http, "chat")


async def completions(http: HttpRequest) -> HttpResponse:
    """OpenAI text completion, plus `align`."""
    return await _complete(http, "completion")


async def _complete(http: HttpRequest, kind: Kind) -> HttpResponse:
    service, caller = authorize(http)
    received = await read_bytes(http, service.config.limits.max_body_bytes)
    body = parse_body(received)
    if app := service.unaligned(body):
        tokens = worst_case(_with_best_of(body), service.engine, service.config.limits.request)
        return Forwarded(service, app, received, caller, tokens, json=True)
    streaming = stream_options(body)
    request, plan = service.plan(body, kind)
    patience = client_timeout(http.headers) if service.config.server.honour_client_timeout else None
    head = {
        "id": f"{OBJECTS[kind][0]}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.get("model") or service.model,
    }
    if streaming:
        return await EventStream(service, request, plan, head, streaming, caller, patience).open(
            http
        )
    response = await until_client_leaves(
        http.receive, service.answer(with_client_deadline(plan, patience), caller=caller)
    )
    return json_response(completion_json(response, request, head))


def _with_best_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body as it is to be counted: `best_of` samples as many as it says, however few come back."""
    given = [
        value
        for name in ("n", "best_of")
        if isinstance(value := body.get(name), int) and not isinstance(value, bool)
    ]
    return {**body, "n": max(given)} if "best_of" in body and given else body


async def responses(http: HttpRequest) -> HttpResponse:
    """OpenAI's Responses API, where the engine or its upstream serves it; without `align`."""
    service, caller = authorize(http)
    received = await read_bytes(http, service.config.limits.max_body_bytes)
    body = parse_body(received)
    service.require_ready()
    tokens = sampled_at_most(service, http.url.path, body)
    if app := service.engine.app():
        return Forwarded(service, app, received, caller, tokens, json=True)
    if not isinstance(service.engine, Relays):
        raise HTTPException(404)
    name, preset = service.resolve(body.get("model"))
    if preset is not None:
        raise Unsupported(
            f"model: the preset {preset!r} is for /v1/chat/completions and /v1/completions.",
            param="model",
        )
    if body.get("model") != name or "align" in body:
        received = dumps(
            {**{key: value for key, value in body.items() if key != "align"}, "model": name}
        )
    return Relayed(service, service.engine, ("POST", "/responses", received, name), caller, tokens)


async def stored_response(http: HttpRequest) -> HttpResponse:
    """A response that the upstream has stored: read, with its input items, deleted, or cancelled."""
    service, caller = authorize(http)
    service.require_ready()
    received = await read_bytes(http, service.config.limits.max_body_bytes)
    if app := service.engine.app():
        return Forwarded(service, app, received, caller)
    if not isinstance(service.engine, Relays) or not re.fullmatch(
        r"[\w-]{1,200}", http.path_params["id"], re.ASCII
    ):
        raise HTTPException(404)
    query = urlencode(http.query_params.multi_items())
    path = http.url.path.removeprefix("/v1") + (f"?{query}" if query else "")
    return Relayed(service, service.engine, (http.method, path, received or None, None), caller)


async def score(http: HttpRequest) -> HttpResponse:
    """Score given candidates, without generating anything."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    return json_response(
        await until_client_leaves(http.receive, scoring.score(service, body, caller))
    )


async def judge(http: HttpRequest) -> HttpResponse:
    """Judge given answers, one by one and in pairs."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    return json_response(
        await until_client_leaves(http.receive, judging.judge(service, body, caller))
    )


async def models(http: HttpRequest) -> HttpResponse:
    """The served model, and one entry per preset."""
    service, _ = authorize(http)
    return json_response(
        {"object": "list", "data": [discovery.model(service, name) for name in service.models()]}
    )


async def model(http: HttpRequest) -> HttpResponse:
    """One of them."""
    (service, _), name = authorize(http), http.path_params["name"]
    if name not in service.models():
        raise UnknownModel(
            f"model: {name!r} does not exist; {nearest(name, service.models())}", param="model"
        )
    return json_response(discovery.model(service, name))


async def methods(http: HttpRequest) -> HttpResponse:
    """What can be asked for here, with schemas."""
    service, _ = authorize(http)
    return json_response(discovery.methods(service))


async def openapi(http: HttpRequest) -> HttpResponse:
    """What the server takes and gives, as OpenAPI 3.1."""
    service, _ = authorize(http)
    made, what = getattr(http.app.state, "described", None), changing_facts(service)
    if service.document is None or made != what:
        text = dumps(document(service, ROUTES))
        if not service.settled.is_set():  # before that, rewards may not know their attributes
            return HttpResponse(text, media_type="application/json")
        service.document, http.app.state.described = text, what
    return HttpResponse(service.document, media_type="application/json")


async def health(http: HttpRequest) -> HttpResponse:
    """The process is up."""
    return json_response({"status": "ok", "model": service_of(http).model})


async def ready(http: HttpRequest) -> HttpResponse:
    """Requests are served; 503 and the reason while they are not."""
    reason = service_of(http).unready()
    return json_response(
        {"ready": reason is None, "reason": reason}, 200 if reason is None else 503
    )


async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus exposition."""
    service = service_of(http)
    return HttpResponse(
        service.metrics.text() + service.engine.exposition(), media_type="text/plain; version=0.0.4"
    )


async def engine_route(http: HttpRequest) -> HttpResponse:
    """What is no route of ours and may be one of the engine's own."""
    service, caller = authorize(http)
    service.require_ready()
    app = service.engine.app()
    if app is None:
        raise HTTPException(404)
    received = await read_bytes(http, service.config.limits.max_body_bytes)
    tokens = (
        sampled_at_most(service, http.url.path, fields_of(received))
        if http.method == "POST"
        else None
    )
    return Forwarded(service, app, received, caller, tokens)


# Plain routes: the bodies are OpenAI's, read by `wire` and `request`, so nothing is left for a framework to parse or to inject.
ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/responses", responses, methods=["POST"]),
    Route("/v1/responses/{id}", stored_response, methods=["GET"], name="retrieve_response"),
    Route("/v1/responses/{id}", stored_response, methods=["DELETE"], name="delete_response"),
    Route(
        "/v1/responses/{id}/input_items",
        stored_response,
        methods=["GET"],
        name="response_input_items",
    ),
    Route("/v1/responses/{id}/cancel", stored_response, methods=["POST"], name="cancel_response"),
    Route("/v1/align/score", score, methods=["POST"]),
    Route("/v1/align/judge", judge, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name:path}", model, methods=["GET"]),
    Route("/v1/align/methods", methods, methods=["GET"]),
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]

# Added where the engine serves more than this contract names.
ENGINE_ROUTE = Route(
    "/{path:path}", engine_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
)
