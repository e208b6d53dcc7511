"""The routes that score answers which the client sends."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align_server import judging, scoring, verifying
from infer_align_server.authorization import authorize, owner_of
from infer_align_server.service import Service
from infer_align_server.wire.body import read_body
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import json_response

Json = Mapping[str, Any]
# What answers the body of a caller: `work(service, body, caller)`.
Work = Callable[[Service, Json, str], Coroutine[Any, Any, Json]]


async def score(http: HttpRequest) -> HttpResponse:
    """Score candidates from the request without generating anything."""
    return await _answer(http, partial(scoring.score, owner=owner_of(http)))


async def judge(http: HttpRequest) -> HttpResponse:
    """Judge candidates from the request, one by one and in pairs."""
    return await _answer(http, judging.judge)


async def verify(http: HttpRequest) -> HttpResponse:
    """Return a verdict on candidates from the request: approve, redo, reject, tie or abstain."""
    return await _answer(http, partial(verifying.verify, owner=owner_of(http)))


async def verify_entailment(http: HttpRequest) -> HttpResponse:
    """Verify one answer in the form that the AutoMix client of vLLM's semantic router calls."""
    return await _answer(http, verifying.check_entailment)


async def _answer(http: HttpRequest, work: Work) -> HttpResponse:
    """Return the result of work on the body of a request, which ends when the client leaves."""
    service, caller = authorize(http)
    body = await read_body(http, service.config.limits.max_body_bytes)
    return json_response(await until_client_leaves(http.receive, work(service, body, caller)))
