"""The routes of the HTTP API. The first line of each endpoint's docstring is its OpenAPI summary.

The routes are Starlette's: FastAPI's own route class adds a tenth to the cost of a plain request
and would have nothing to parse, since request bodies go through whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from infer_align.errors import UnknownModel, nearest
from infer_align.flow.plan import worst_case
from infer_align.flow.request import check_placement
from infer_align.types import Kind
from infer_align_server import discovery, profile_routes, reranking, scoring_routes
from infer_align_server.answering import answer_all
from infer_align_server.authorization import authorize, owner_of, scope_of, service_of
from infer_align_server.engine_roles import Forwards
from infer_align_server.engine_routes import (
    ANY_PATH,
    ForwardedResponse,
    allowed_methods,
    engine_app,
    engine_match,
    json_fields,
    route_worst_case,
)
from infer_align_server.forwarding import (
    Cost,
    Upload,
    UpstreamResponse,
    completion_request,
    completion_worst_case,
    route_request,
    waiting_time,
)
from infer_align_server.model_choice import ModelChoice, refuse_preset
from infer_align_server.openapi import changing_facts, document
from infer_align_server.service import Service
from infer_align_server.wire.body import parse_body, read_bytes
from infer_align_server.wire.completion import OBJECTS, completion_json
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import dumps, json_response
from infer_align_server.wire.headers import headers_of
from infer_align_server.wire.stream import EventStream
from infer_align_server.wire.stream_options import stream_options


async def chat_completions(http: HttpRequest) -> HttpResponse:
    """Create a chat completion, optionally streamed and aligned with `align`."""
    return await _complete(http, "chat")


async def completions(http: HttpRequest) -> HttpResponse:
    """Create a text completion, optionally streamed and aligned with `align`."""
    return await _complete(http, "completion")


async def _complete(http: HttpRequest, kind: Kind) -> HttpResponse:
    service, caller = await authorize(http)
    content = await read_bytes(http, service.config.limits.max_body_bytes)
    body = parse_body(content)
    service.require_ready()
    model = service.resolve_model(body.get("model"))
    app = engine_app(service)
    if app and _is_plain(body, model):
        limits = service.config.limits
        check_placement(body)
        completed = service.complete_body(body, model)
        if completed != body:
            content = dumps(completed)
        tokens = worst_case(_with_best_of(completed), service.engine, limits)
        return ForwardedResponse(service, app, content, caller, tokens, json=True)
    if _is_plain(body, model) and service.forwarder is not None:
        return _forwarded_completion(http, kind, content, body, model, caller)
    streaming = stream_options(body)
    timeout = waiting_time(service, http)
    # A stream sets no deadline: each chunk and each comment starts the client's clock again.
    patience = None if streaming else timeout
    planning = service.plan(body, kind, model, owner_of(http), caller, patience)
    plans = await until_client_leaves(http.receive, planning)
    head = {
        "id": f"{OBJECTS[kind].id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model.name,
    }
    if streaming:
        stream = EventStream(service, plans, head, streaming, caller, timeout)
        return await stream.open(http)
    responses = await until_client_leaves(http.receive, answer_all(service, plans, caller=caller))
    return json_response(completion_json(responses, head))


def _is_plain(body: Mapping[str, Any], model: ModelChoice) -> bool:
    return model.preset is None and body.get("align") is None


def _forwarded_completion(
    http: HttpRequest,
    kind: Kind,
    content: bytes,
    body: Mapping[str, Any],
    model: ModelChoice,
    caller: str,
) -> UpstreamResponse:
    service = service_of(http)
    is_renamed = model.name != model.engine_model
    return UpstreamResponse(
        service,
        _forwarding_engine(service),
        completion_request(http, PATHS[kind], content, body, model),
        Cost(caller, completion_worst_case(service, body)),
        timeout=waiting_time(service, http),
        renamed=(model.engine_model, model.name) if is_renamed else None,
    )


def _forwarding_engine(service: Service) -> Forwards:
    """Return the engine if it passes requests on.

    Raises:
        HTTPException: It does not: there is no such route.
    """
    if service.forwarder is None:
        raise HTTPException(404)
    return service.forwarder


def _with_best_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the body with `n` raised to `best_of`: all of those candidates are generated."""
    if "best_of" not in body:
        return body
    counts = []
    for name in ("n", "best_of"):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            counts.append(value)
    return {**body, "n": max(counts)} if counts else body


async def responses(http: HttpRequest) -> HttpResponse:
    """Create a response with the Responses API of the engine or its upstream, without `align`."""
    service, caller = await authorize(http)
    content = await read_bytes(http, service.config.limits.max_body_bytes)
    body = parse_body(content)
    service.require_ready()
    tokens = route_worst_case(service, http.url.path, body)
    app = engine_app(service)
    if app:
        return ForwardedResponse(service, app, content, caller, tokens, json=True)
    engine = _forwarding_engine(service)
    model = service.resolve_model(body.get("model"))
    refuse_preset(model)
    request = completion_request(http, "/responses", content, body, model)
    return UpstreamResponse(service, engine, request, Cost(caller, tokens))


async def stored_response(http: HttpRequest) -> HttpResponse:
    """Retrieve, list the input items of, cancel or delete a response stored by the upstream."""
    service, caller = await authorize(http)
    service.require_ready()
    content = await read_bytes(http, service.config.limits.max_body_bytes)
    app = engine_app(service)
    if app:
        return ForwardedResponse(service, app, content, caller)
    engine = _forwarding_engine(service)
    request = route_request(http, content, None)
    if request is None:
        raise HTTPException(404)
    return UpstreamResponse(service, engine, request, Cost(caller, generates=False))


async def upstream_route(http: HttpRequest) -> HttpResponse:
    """Pass on a request to another route of the upstreams, such as /v1/embeddings."""
    service, caller = await authorize(http, scope_of(http.url.path))
    service.require_ready()
    engine = _forwarding_engine(service)
    limits = service.config.limits
    if _is_upload(http):
        upload = Upload(http, limits.max_upload_bytes)
        request = route_request(http, upload.pieces(), None)
        if request is None:
            raise HTTPException(404)
        return UpstreamResponse(service, engine, request, Cost(caller), upload=upload)
    content = await read_bytes(http, limits.max_body_bytes)
    return _forwarded_json(http, content, caller)


def _forwarded_json(http: HttpRequest, content: bytes, caller: str) -> UpstreamResponse:
    """Return the upstream's answer to a request to one of its routes."""
    service = service_of(http)
    engine = _forwarding_engine(service)
    body = json_fields(content)
    model = _routed_model(service, body)
    if model and model.engine_model != body["model"]:
        content = dumps({**body, "model": model.engine_model})
    request = route_request(http, content, model.engine_model if model else None)
    if request is None:
        raise HTTPException(404)
    generates = http.method == "POST"
    tokens = route_worst_case(service, http.url.path, body) if generates else 0
    return UpstreamResponse(service, engine, request, Cost(caller, tokens, generates=generates))


def _is_upload(http: HttpRequest) -> bool:
    """Return True for a body that is not JSON: it may be large, and is passed on in pieces."""
    content_type = headers_of(http).get("content-type", "")
    return bool(content_type) and "json" not in content_type


def _routed_model(service: Service, body: Mapping[str, Any]) -> ModelChoice | None:
    """Return the model of a request to another route; None if any upstream may answer it.

    An upstream may serve models for embeddings or speech that it does not list.
    """
    name = body.get("model")
    if not isinstance(name, str):
        return None
    try:
        model = service.resolve_model(name)
    except UnknownModel:
        return None
    refuse_preset(model)
    return model


async def rerank(http: HttpRequest) -> HttpResponse:
    """Order documents by how well they answer a query, as the rewards see it."""
    service, caller = await authorize(http, "score")
    content = await read_bytes(http, service.config.limits.max_body_bytes)
    service.require_ready()
    if reranking.is_for_engine(service, json_fields(content)):
        app, match = engine_match(service, http.scope)
        if app and match is Match.FULL:
            return ForwardedResponse(service, app, content, caller, 0)
        if service.forwarder is not None and service.forwarder.passes(http.url.path):
            return _forwarded_json(http, content, caller)
    work = reranking.rerank(service, parse_body(content), caller, owner_of(http))
    return json_response(await until_client_leaves(http.receive, work))


async def models(http: HttpRequest) -> HttpResponse:
    """List the served models, with one further entry per preset."""
    service, _ = await authorize(http, None, limited=False)
    entries = [discovery.model(service, name) for name in service.models()]
    return json_response({"object": "list", "data": entries})


async def model(http: HttpRequest) -> HttpResponse:
    """Retrieve one model."""
    service, _ = await authorize(http, None, limited=False)
    name = http.path_params["name"]
    names = service.models()
    if name not in names:
        raise UnknownModel(f"model: {name!r} does not exist; {nearest(name, names)}", param="model")
    return json_response(discovery.model(service, name))


async def methods(http: HttpRequest) -> HttpResponse:
    """List the methods, rewards, values, traits and presets of this server, with JSON schemas."""
    service, _ = await authorize(http, None, limited=False)
    return json_response(discovery.methods(service))


async def openapi(http: HttpRequest) -> HttpResponse:
    """Describe this server as an OpenAPI 3.1 document."""
    service, _ = await authorize(http, None, limited=False)
    state = http.app.state
    facts = changing_facts(service)
    if service.document is None or getattr(state, "document_facts", None) != facts:
        text = dumps(document(service, ROUTES))
        if not service.settled.is_set():
            # Rewards may not know their attributes before they are loaded.
            return HttpResponse(text, media_type="application/json")
        service.document = text
        state.document_facts = facts
    return HttpResponse(service.document, media_type="application/json")


async def health(http: HttpRequest) -> HttpResponse:
    """Check that the process is running."""
    return json_response({"status": "ok", "model": service_of(http).model})


async def ready(http: HttpRequest) -> HttpResponse:
    """Check that requests are served; 503 with the reason if they are not."""
    reason = service_of(http).unready()
    status = 200 if reason is None else 503
    return json_response({"ready": reason is None, "reason": reason}, status)


async def metrics(http: HttpRequest) -> HttpResponse:
    """Return the metrics in Prometheus's text format."""
    service = service_of(http)
    text = service.metrics.text() + service.engine.exposition()
    return HttpResponse(text, media_type="text/plain; version=0.0.4")


async def engine_route(http: HttpRequest) -> HttpResponse:
    """Forward a request to another route of the engine's own application."""
    service, caller = await authorize(http, scope_of(http.url.path))
    service.require_ready()
    app, match = engine_match(service, http.scope)
    if app is None or match is not Match.FULL:
        raise HTTPException(405 if allowed_methods(http) else 404)
    content = await read_bytes(http, service.config.limits.max_body_bytes)
    tokens = None
    if http.method == "POST":
        tokens = route_worst_case(service, http.url.path, json_fields(content))
    return ForwardedResponse(service, app, content, caller, tokens)


class RecordedRoute(Route):
    """A route that puts itself into the scope, where the log and the metrics read its path.

    FastAPI does this for its own routes only, and Starlette does it in newer versions only.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request to this path."""
        scope["route"] = self
        await super().handle(scope, receive, send)


PATHS: Mapping[Kind, str] = {"chat": "/chat/completions", "completion": "/completions"}

ROUTES = [
    RecordedRoute("/v1/chat/completions", chat_completions, methods=["POST"]),
    RecordedRoute("/v1/completions", completions, methods=["POST"]),
    RecordedRoute("/v1/responses", responses, methods=["POST"]),
    RecordedRoute("/v1/responses/{id}", stored_response, methods=["GET"], name="retrieve_response"),
    RecordedRoute(
        "/v1/responses/{id}", stored_response, methods=["DELETE"], name="delete_response"
    ),
    RecordedRoute(
        "/v1/responses/{id}/input_items",
        stored_response,
        methods=["GET"],
        name="response_input_items",
    ),
    RecordedRoute(
        "/v1/responses/{id}/cancel", stored_response, methods=["POST"], name="cancel_response"
    ),
    RecordedRoute("/v1/rerank", rerank, methods=["POST"]),
    RecordedRoute("/v1/align/score", scoring_routes.score, methods=["POST"]),
    RecordedRoute("/v1/align/judge", scoring_routes.judge, methods=["POST"]),
    RecordedRoute("/v1/align/verify", scoring_routes.verify, methods=["POST"]),
    RecordedRoute("/verify", scoring_routes.verify_entailment, methods=["POST"]),
    RecordedRoute("/v1/align/feedback", profile_routes.feedback, methods=["POST"]),
    RecordedRoute(
        "/v1/align/profiles/{id}",
        profile_routes.profile,
        methods=["GET"],
        name="retrieve_profile",
    ),
    RecordedRoute("/v1/align/profiles/{id}", profile_routes.delete_profile, methods=["DELETE"]),
    RecordedRoute("/v1/align/profiles/{id}/export", profile_routes.export_profile, methods=["GET"]),
    RecordedRoute("/v1/align/profiles/{id}/question", profile_routes.question, methods=["POST"]),
    RecordedRoute("/v1/models", models, methods=["GET"]),
    RecordedRoute("/v1/models/{name:path}", model, methods=["GET"]),
    RecordedRoute("/v1/align/methods", methods, methods=["GET"]),
    RecordedRoute("/openapi.json", openapi, methods=["GET"]),
    RecordedRoute("/health", health, methods=["GET"]),
    RecordedRoute("/ready", ready, methods=["GET"]),
    RecordedRoute("/metrics", metrics, methods=["GET"]),
]

# Added if the engine has an application of its own, after all other routes.
ENGINE_ROUTE = RecordedRoute(
    ANY_PATH, engine_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
)


class UpstreamRoute(RecordedRoute):
    """All routes that the engine passes on; any other path stays unknown."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Return a full match for a path that is passed on."""
        forwarder = scope["app"].state.service.forwarder if "app" in scope else None
        if forwarder is not None and forwarder.passes(scope.get("path", "")):
            return super().matches(scope)
        return Match.NONE, {}


# Added if the engine passes requests on, after all other routes.
UPSTREAM_ROUTE = UpstreamRoute(
    ANY_PATH, upstream_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]
)
