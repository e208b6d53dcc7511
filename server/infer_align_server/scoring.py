"""`/v1/align/score`: score candidates that the client sends; the second half of the flow alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from typing import Any, TypeGuard

from infer_align.config import registry
from infer_align.config.align import parse_align
from infer_align.errors import InvalidRequest, RewardFailed, nearest, quote
from infer_align.flow.discovery import when_discovered
from infer_align.flow.plan import SCORING_STAGES, Plan, make_scoring_plan
from infer_align.flow.request import Request, check_prompt
from infer_align.flow.response import Response, Timing
from infer_align.flow.scoring import score as score_candidates
from infer_align.flow.selection import rank_candidates
from infer_align.types import Candidate
from infer_align_server.service import Service
from infer_align_server.wire.completion import extras_json, scores_json
from infer_align_server.wire.encoding import number

# Settings of `align` that are about scores, beside the methods.
SETTINGS = ("rewards", "ensemble")


@cache
def align_keys() -> tuple[str, ...]:
    """Return the keys of `align` that the body of the request may contain."""
    methods = []
    for name in registry.methods.names():
        if registry.methods.get(name).stage in SCORING_STAGES:
            methods.append(name)
    return (*SETTINGS, *methods)


async def score(
    service: Service, body: Mapping[str, Any], caller: str = "", owner: str = ""
) -> dict[str, Any]:
    """Return the response of /v1/align/score: scores, objectives and the ranking.

    Args:
        service: The service.
        body: The body of the request.
        caller: The name of the caller, which pays.
        owner: The owner of the stored profile that the request may name.

    Raises:
        Unavailable: The server does not serve requests now.
        InvalidRequest: A field is missing, wrong or unknown.
        RewardFailed: No candidate could be scored.
    """
    texts = parse_candidates(service, body, ("model", "messages", "candidates", *align_keys()))
    request = await _request(service, body, owner)
    plan = await when_discovered(lambda: _plan(service, request, len(texts)))
    candidates = [_candidate(i, text) for i, text in enumerate(texts)]
    async with service.scoring(plan.scoring_tokens, caller) as count_usage:
        scores = await score_candidates(plan, candidates)
        count_usage(scores.usage)
        service.metrics.count_reward_calls(scores)
    selection = rank_candidates(plan, candidates, scores)
    if not selection.ranking:
        first_error = next(iter(selection.dropped.values()))
        raise RewardFailed(f"{selection.reason}; first: {first_error}")
    no_timing = Timing(0.0, 0.0, 0.0)
    response = Response(plan, tuple(candidates), scores, selection, no_timing)
    return {
        "object": "align.score",
        "ranking": list(selection.ranking),
        "reason": selection.reason,
        "candidates": [_candidate_json(response, i) for i in range(len(texts))],
        "usage": asdict(scores.usage),
        **extras_json(response),
    }


def _candidate(index: int, text: str) -> Candidate:
    return Candidate(index, {"message": {"role": "assistant", "content": text}})


def _candidate_json(response: Response, index: int) -> dict[str, Any]:
    return {
        "index": index,
        "objective": number(response.selection.objective[index]),
        "scores": scores_json(response, index),
        "error": response.selection.dropped.get(index),
    }


async def _request(service: Service, body: Mapping[str, Any], owner: str) -> Request:
    """Return the request with its profile. The keys of `align` are fields of the body itself."""
    messages = body.get("messages")
    check_prompt({"messages": messages}, "chat")
    preset = service.resolve_model(body.get("model")).preset
    settings = service.config.presets[preset] if preset else {}
    keys = {key: value for key, value in settings.items() if key in align_keys()}
    for key in align_keys():
        if body.get(key) is not None:
            keys[key] = body[key]
    request = Request({"messages": messages}, align=parse_align(keys, path=""), aligned=True)
    return await service.personalise(request, owner)


def _plan(service: Service, request: Request, n: int) -> Plan:
    """Plan the scoring of n candidates."""
    align = request.align
    if align.rewards is None and request.weights is not None:
        align = replace(align, rewards=request.weights)
    plan = make_scoring_plan(
        request.body["messages"],
        n,
        align,
        service.engine,
        service.rewards,
        service.default_rewards,
        service.config.methods,
    )
    return replace(plan, request=replace(plan.request, profile=request.profile))


def parse_candidates(
    service: Service, body: Mapping[str, Any], fields: tuple[str, ...]
) -> list[str]:
    """Return the texts of the candidates in a body.

    Args:
        service: The service, which must be ready.
        body: The body of the request.
        fields: The fields that the body may have.

    Raises:
        Unavailable: The service is not ready.
        InvalidRequest: There are no candidates, or too many, or the body has an unknown field.
    """
    service.require_ready()
    for name in body:
        if name not in fields:
            raise InvalidRequest(
                f"{name}: no such field; {nearest(name, fields)}", param=name, code="unknown_field"
            )
    candidates = body.get("candidates")
    if not _is_list_of_text(candidates):
        raise InvalidRequest(
            f"candidates: {quote(candidates)} is not allowed; must be a list of at least one "
            "string.",
            param="candidates",
        )
    limit = service.config.limits.max_candidates
    if len(candidates) > limit:
        raise InvalidRequest(
            f"candidates: {len(candidates)} candidates are over this server's limit of {limit}; "
            "send fewer.",
            param="candidates",
        )
    return candidates


def _is_list_of_text(value: object) -> TypeGuard[list[str]]:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) for text in value)
