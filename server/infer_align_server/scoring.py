"""Score candidates that somebody else generated: the second half of the flow alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from infer_align.errors import InvalidRequest, RewardFailed, Unavailable, nearest, shown
from infer_align.flow.request import parse_request
from infer_align.flow.run import score as score_candidates
from infer_align.flow.selection import select
from infer_align.types import Candidate, Plan, Response, Timing
from infer_align_server.service import Service
from infer_align_server.wire.completion import scores_json
from infer_align_server.wire.encoding import number

ALIGN = ("rewards", "ensemble", "dpa", "trust_judge")
FIELDS = ("model", "messages", "candidates", *ALIGN)


async def score(service: Service, body: Mapping[str, Any], caller: str = "") -> dict[str, Any]:
    """The answer of /v1/align/score: every candidate's scores, its objective and the ranking, best first.

    Raises:
        InvalidRequest: a field is missing, wrong or unknown.
        RewardFailed: no candidate could be scored.
    """
    texts = candidates_of(service, body, FIELDS)
    plan = _plan(service, body, len(texts))
    candidates = [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]
    async with service.scoring(plan.scoring_tokens, caller) as told:
        scores = await score_candidates(plan, service.rewards, candidates)
        told(scores.spent)
    selection = select(plan, candidates, scores)
    if not selection.ranking:
        raise RewardFailed(f"{selection.reason}; first: {next(iter(selection.dropped.values()))}")
    response = Response(plan, tuple(candidates), scores, selection, Timing(0.0, 0.0, 0.0))
    answer: dict[str, Any] = {
        "object": "align.score",
        "ranking": list(selection.ranking),
        "reason": selection.reason,
        "candidates": [
            {
                "index": i,
                "objective": number(selection.objective[i]),
                "scores": scores_json(response, i),
                "error": selection.dropped.get(i),
            }
            for i in range(len(texts))
        ],
        "usage": asdict(scores.spent),
    }
    if plan.direction is not None:
        answer["direction"] = dict(plan.direction)
    if scores.reports:
        answer["reports"] = {name: dict(report) for name, report in scores.reports.items()}
    return answer


def _plan(service: Service, body: Mapping[str, Any], n: int) -> Plan:
    """How n candidates are scored, as of a best-of-n whose drawing is done: the same checks, the same ranking."""
    preset = service.resolve_model(body.get("model")).preset
    given = {
        **(service.config.presets[preset] if preset else {}),
        **{key: body[key] for key in ALIGN if body.get(key) is not None},
    }
    align = {key: value for key, value in given.items() if key in ALIGN}
    chat = {
        "messages": body.get("messages"),
        "align": {**align, "best_of_n": {"n": n}},
        "max_tokens": 1,
    }
    try:
        # Nothing is drawn; what judging costs is held against the limit below.
        unlimited = replace(service.config.limits.request, max_completion_tokens=sys.maxsize)
        return service.make_plan(parse_request(chat, "chat", service.config.presets), unlimited)
    except InvalidRequest as error:  # here the fields stand in the body itself
        where = (error.param or "").removeprefix("align.")
        raise type(error)(
            error.message.removeprefix("align."), param=where, code=error.code
        ) from None


def candidates_of(service: Service, body: Mapping[str, Any], fields: tuple[str, ...]) -> list[str]:
    """The texts that a body gives to look at.

    Raises:
        Unavailable: not ready.
        InvalidRequest: there are none, or too many, or a field of the body is unknown.
    """
    if reason := service.unready():
        raise Unavailable(f"{reason}; try again later.", retry_after=5)
    for name in body:
        if name not in fields:
            raise InvalidRequest(
                f"{name}: no such field; {nearest(name, fields)}", param=name, code="unknown_field"
            )
    value, most = body.get("candidates"), service.config.limits.max_candidates
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InvalidRequest(
            f"candidates: {shown(value)} is not allowed; must be a list of at least one string.",
            param="candidates",
        )
    if len(value) > most:
        raise InvalidRequest(
            f"candidates: {len(value)} are over this server's limit of {most}; send fewer.",
            param="candidates",
        )
    return value
