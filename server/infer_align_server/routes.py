"""The routes of the public contract."""

from __future__ import annotations

import time
import uuid

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from infer_align.errors import UnknownModel, Unsupported, nearest
from infer_align.types import Kind
from infer_align_server import catalogue, scoring
from infer_align_server.service import Service
from infer_align_server.stream import EventStream, stream_options, until_client_leaves
from infer_align_server.wire import OBJECTS, completion_json, json_response, read_body


def service_of(http: HttpRequest) -> Service:
    """The process's service."""
    service: Service = http.app.state.service
    return service


def authorize(http: HttpRequest) -> Service:
    """The service, for a caller that may use it.

    Raises:
        Unauthorized, Overloaded: see `Service.authorize`.
    """
    service = service_of(http)
    service.authorize(http.headers.get("authorization", ""), http.client.host if http.client else "unknown")
    return service


async def chat_completions(http: HttpRequest) -> HttpResponse:
    """OpenAI chat, streaming and not, plus `align`."""
    return await _complete(http, "chat")


async def completions(http: HttpRequest) -> HttpResponse:
    """OpenAI text completion, plus `align`."""
    return await _complete(http, "completion")


async def _complete(http: HttpRequest, kind: Kind) -> HttpResponse:
    service = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    streaming = stream_options(body)
    request, plan = service.plan(body, kind)
    head = {
        "id": f"{OBJECTS[kind][0]}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": body.get("model") or service.model,
    }
    if streaming:
        return await EventStream(service, request, plan, head, streaming).open(http)
    response = await until_client_leaves(http.receive, service.answer(plan))
    return json_response(completion_json(response, request, head))


async def score(http: HttpRequest) -> HttpResponse:
    """Score given candidates, without generating anything."""
    service = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    return json_response(await until_client_leaves(http.receive, scoring.score(service, body)))


async def judge(http: HttpRequest) -> HttpResponse:
    """Judge given answers; named by the contract, and said to be missing until it is there."""
    authorize(http)
    raise Unsupported("/v1/align/judge: not available in this version; score candidates with /v1/align/score.")


async def models(http: HttpRequest) -> HttpResponse:
    """The served model, and one entry per preset."""
    service = authorize(http)
    return json_response({"object": "list", "data": [catalogue.model(service, name) for name in service.models()]})


async def model(http: HttpRequest) -> HttpResponse:
    """One of them."""
    service, name = authorize(http), http.path_params["name"]
    if name not in service.models():
        raise UnknownModel(f"model: {name!r} does not exist; {nearest(name, service.models())}", param="model")
    return json_response(catalogue.model(service, name))


async def methods(http: HttpRequest) -> HttpResponse:
    """What can be asked for here, with schemas."""
    return json_response(catalogue.methods(authorize(http)))


async def health(http: HttpRequest) -> HttpResponse:
    """The process is up."""
    return json_response({"status": "ok", "model": service_of(http).model})


async def ready(http: HttpRequest) -> HttpResponse:
    """Requests are served; 503 and the reason while they are not."""
    reason = service_of(http).unready()
    return json_response({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)


async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus exposition."""
    return HttpResponse(service_of(http).metrics.text(), media_type="text/plain; version=0.0.4")


# Plain routes: the bodies are OpenAI's, read by `wire` and `request`, so nothing is left for a framework to parse or to inject.
ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/align/score", score, methods=["POST"]),
    Route("/v1/align/judge", judge, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name:path}", model, methods=["GET"]),
    Route("/v1/align/methods", methods, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
]
