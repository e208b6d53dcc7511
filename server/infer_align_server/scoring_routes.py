"""The routes that score answers which the client sends."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align_server import judging, scoring, verifying
from infer_align_server.authorization import authorize, owner_of
from infer_align_server.wire.body import read_body
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import json_response


async def score(http: HttpRequest) -> HttpResponse:
    """Score candidates from the request without generating anything."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    work = scoring.score(service, body, caller, owner_of(http))
    return json_response(await until_client_leaves(http.receive, work))


async def judge(http: HttpRequest) -> HttpResponse:
    """Judge candidates from the request, one by one and in pairs."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    work = judging.judge(service, body, caller)
    return json_response(await until_client_leaves(http.receive, work))


async def verify(http: HttpRequest) -> HttpResponse:
    """Return a verdict on candidates from the request: approve, redo, reject, tie or abstain."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    work = verifying.verify(service, body, caller, owner_of(http))
    return json_response(await until_client_leaves(http.receive, work))


async def verify_entailment(http: HttpRequest) -> HttpResponse:
    """Verify one answer in the form that the AutoMix client of vLLM's semantic router calls."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    work = verifying.check_entailment(service, body, caller)
    return json_response(await until_client_leaves(http.receive, work))
