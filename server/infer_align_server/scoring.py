"""Score candidates that somebody else generated: the second half of the flow alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infer_align.config.align import parse_align
from infer_align.errors import InvalidRequest, RewardFailed, Unavailable, nearest, quote
from infer_align.flow.plan import Plan, make_scoring_plan
from infer_align.flow.request import check_prompt
from infer_align.flow.response import Response, Timing
from infer_align.flow.scoring import score as score_candidates
from infer_align.flow.selection import rank_candidates
from infer_align.types import Candidate
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
        scores = await score_candidates(plan, candidates)
        told(scores.usage)
    selection = rank_candidates(plan, candidates, scores)
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
        "usage": asdict(scores.usage),
    }
    if plan.direction is not None:
        answer["direction"] = dict(plan.direction)
    if scores.reports:
        answer["reports"] = {name: dict(report) for name, report in scores.reports.items()}
    return answer


def _plan(service: Service, body: Mapping[str, Any], n: int) -> Plan:
    """Plan the scoring of n candidates. The keys of `align` stand in the body itself."""
    messages = body.get("messages")
    check_prompt({"messages": messages}, "chat")
    preset = service.resolve_model(body.get("model")).preset
    keys = dict(service.config.presets[preset]) if preset else {}
    keys |= {key: body[key] for key in ALIGN if body.get(key) is not None}
    align = parse_align({key: value for key, value in keys.items() if key in ALIGN}, path="")
    return make_scoring_plan(
        messages,
        n,
        align,
        service.engine,
        service.rewards,
        service.default_rewards,
        service.config.methods,
    )


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
            f"candidates: {quote(value)} is not allowed; must be a list of at least one string.",
            param="candidates",
        )
    if len(value) > most:
        raise InvalidRequest(
            f"candidates: {len(value)} are over this server's limit of {most}; send fewer.",
            param="candidates",
        )
    return value
