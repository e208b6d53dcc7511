"""The routes of the public contract."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align.errors import UnknownModel, Unsupported, nearest
from infer_align.types import Kind
from infer_align_server import catalogue, scoring
from infer_align_server.service import Service
from infer_align_server.stream import EventStream, stream_options, until_client_leaves
from infer_align_server.wire import OBJECTS, completion_json, json_response, read_body

router = APIRouter()


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


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(http: HttpRequest) -> Any:
    """OpenAI chat, streaming and not, plus `align`."""
    return await _complete(http, "chat")


@router.post("/v1/completions", response_model=None)
async def completions(http: HttpRequest) -> Any:
    """OpenAI text completion, plus `align`."""
    return await _complete(http, "completion")


async def _complete(http: HttpRequest, kind: Kind) -> Any:
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


@router.post("/v1/align/score", response_model=None)
async def score(http: HttpRequest) -> HttpResponse:
    """Score given candidates, without generating anything."""
    service = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    return json_response(await until_client_leaves(http.receive, scoring.score(service, body)))


@router.post("/v1/align/judge", response_model=None)
async def judge(http: HttpRequest) -> HttpResponse:
    """Judge given answers; named by the contract, and said to be missing until it is there."""
    authorize(http)
    raise Unsupported("/v1/align/judge: not available in this version; score candidates with /v1/align/score.")


@router.get("/v1/models", response_model=None)
async def models(http: HttpRequest) -> HttpResponse:
    """The served model, and one entry per preset."""
    service = authorize(http)
    return json_response({"object": "list", "data": [catalogue.model(service, name) for name in service.models()]})


@router.get("/v1/models/{name:path}", response_model=None)
async def model(http: HttpRequest, name: str) -> HttpResponse:
    """One of them."""
    service = authorize(http)
    if name not in service.models():
        raise UnknownModel(f"model: {name!r} does not exist; {nearest(name, service.models())}", param="model")
    return json_response(catalogue.model(service, name))


@router.get("/v1/align/methods", response_model=None)
async def methods(http: HttpRequest) -> HttpResponse:
    """What can be asked for here, with schemas."""
    return json_response(catalogue.methods(authorize(http)))


@router.get("/health", response_model=None)
async def health(http: HttpRequest) -> HttpResponse:
    """The process is up."""
    return json_response({"status": "ok", "model": service_of(http).model})


@router.get("/ready", response_model=None)
async def ready(http: HttpRequest) -> HttpResponse:
    """Requests are served; 503 and the reason while they are not."""
    reason = service_of(http).unready()
    return json_response({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)


@router.get("/metrics", response_model=None)
async def metrics(http: HttpRequest) -> HttpResponse:
    """Prometheus exposition."""
    return HttpResponse(service_of(http).metrics.text(), media_type="text/plain; version=0.0.4")
