"""The routes that score answers which the client sends."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align_server import judging, scoring, verifying
from infer_align_server.authorization import authorize, owner_of, service_of
from infer_align_server.wire.body import read_body
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import json_response

Json = Mapping[str, Any]
# What answers the body of an authorized request.
Work = Callable[[Json], Coroutine[Any, Any, Json]]


async def score(http: HttpRequest) -> HttpResponse:
    """Score candidates from the request without generating anything."""
    service, caller = await authorize(http, "score")
    work = partial(scoring.score, service, caller=caller, owner=owner_of(http))
    return await _answer(http, work)


async def judge(http: HttpRequest) -> HttpResponse:
    """Judge candidates from the request, one by one and in pairs."""
    service, caller = await authorize(http, "score")
    return await _answer(http, partial(judging.judge, service, caller=caller))


async def verify(http: HttpRequest) -> HttpResponse:
    """Return a verdict on candidates from the request: approve, redo, reject, tie or abstain."""
    service, caller = await authorize(http, "score")
    work = partial(verifying.verify, service, caller=caller, owner=owner_of(http))
    return await _answer(http, work)


async def verify_entailment(http: HttpRequest) -> HttpResponse:
    """Verify one answer in the form that the AutoMix client of vLLM's semantic router calls."""
    service, caller = await authorize(http, "score")
    return await _answer(http, partial(verifying.check_entailment, service, caller=caller))


async def _answer(http: HttpRequest, work: Work) -> HttpResponse:
    """Return the result of work on the body of a request, which ends when the client leaves."""
    body = await read_body(http, service_of(http).config.limits.max_body_bytes)
    return json_response(await until_client_leaves(http.receive, work(body)))
