"""The endpoints of stored profiles. The first line of each docstring is its OpenAPI summary."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from infer_align_server import profiles
from infer_align_server.authorization import authorize, owner_of
from infer_align_server.wire.body import read_body
from infer_align_server.wire.disconnect import until_client_leaves
from infer_align_server.wire.encoding import json_response


async def feedback(http: HttpRequest) -> HttpResponse:
    """Add a user's choice between answers to a profile."""
    service, caller = await authorize(http, "feedback")
    body = await read_body(http, service.config.limits.max_body_bytes)
    # A client that leaves does not undo its feedback.
    return json_response(await profiles.feedback(service, body, caller, owner_of(http)))


async def profile(http: HttpRequest) -> HttpResponse:
    """Return what a profile knows about its user, in words and numbers."""
    service, _ = await authorize(http, "feedback")
    return json_response(await profiles.show(service, owner_of(http), http.path_params["id"]))


async def delete_profile(http: HttpRequest) -> HttpResponse:
    """Delete a profile with everything that it knows."""
    service, _ = await authorize(http, "feedback")
    return json_response(await profiles.remove(service, owner_of(http), http.path_params["id"]))


async def export_profile(http: HttpRequest) -> HttpResponse:
    """Return everything that is stored of a profile."""
    service, _ = await authorize(http, "feedback")
    return json_response(await profiles.export(service, owner_of(http), http.path_params["id"]))


async def question(http: HttpRequest) -> HttpResponse:
    """Find the pair of answers whose comparison says most about the user of a profile."""
    service, caller = await authorize(http, "feedback")
    body = await read_body(http, service.config.limits.max_body_bytes)
    if body.get("candidates") is None:
        # The candidates are drawn.
        await authorize(http, "generate", limited=False)
    profile_id = http.path_params["id"]
    work = profiles.question(service, body, caller, owner_of(http), profile_id)
    return json_response(await until_client_leaves(http.receive, work))
