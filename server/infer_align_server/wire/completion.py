"""Write completions in the shape of OpenAI's API, with their `align` report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from infer_align.objectives import std
from infer_align.types import Candidate, Kind, Request, Response
from infer_align_server.wire.encoding import number

OBJECTS: dict[Kind, tuple[str, str, str]] = {  # id prefix, object of an answer, object of a chunk
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "completion": ("cmpl", "text_completion", "text_completion"),
}


def completion_json(
    response: Response, request: Request, head: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer of one request; `head` holds id, created and model."""
    body: dict[str, Any] = {
        **response.returned[0].response_fields,
        **head,
        "object": OBJECTS[request.kind][1],
        "choices": [
            {"index": i, **candidate.choice} for i, candidate in enumerate(response.returned)
        ],
        "usage": usage_json(response),
    }
    if request.aligned and request.details != "none":
        body["align"] = align_json(response, request)
    return body


def usage_json(response: Response) -> dict[str, Any]:
    """Each distinct prompt once, everything generated, and which part of it was returned."""
    generated = sum(c.completion_tokens for c in response.candidates)
    returned = sum(c.completion_tokens for c in response.returned)
    return {
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": response.prompt_tokens + generated,
        "completion_tokens_details": {
            **_details(response, "completion_tokens_details", generated),
            "accepted_prediction_tokens": returned,
            "rejected_prediction_tokens": generated - returned,
        },
        **(
            {"prompt_tokens_details": prompt}
            if (prompt := _details(response, "prompt_tokens_details", response.prompt_tokens))
            else {}
        ),
    }


def _details(response: Response, name: str, most: int) -> dict[str, int]:
    """What the engine's own usage tells apart, over all candidates; never more than the whole of which it is a part."""
    found: dict[str, int] = {}
    for candidate in response.candidates:
        usage = candidate.response_fields.get("usage")
        details = usage.get(name) if isinstance(usage, Mapping) else None
        for key, tokens in (details or {}).items():
            if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
                found[key] = min(most, found.get(key, 0) + tokens)
    return found


def align_json(response: Response, request: Request) -> dict[str, Any]:
    """What was drawn, how it scored, what was chosen and why."""
    selection, timing, direction = response.selection, response.timing, response.plan.direction
    extra: dict[str, Any] = {} if direction is None else {"direction": dict(direction)}
    if response.scores.reports:
        extra["reports"] = {name: dict(report) for name, report in response.scores.reports.items()}
    return {
        "methods": list(response.plan.methods),
        "selected": selection.ranking[0],
        "dropped": len(selection.dropped),
        "partial": response.partial,
        "reason": selection.reason,
        **extra,
        "candidates": [
            _candidate_json(candidate, response, request) for candidate in response.candidates
        ],
        "usage": {
            "engine_calls": sum(c.calls for c in response.candidates),
            "candidate_tokens": sum(c.completion_tokens for c in response.candidates),
            "saved_tokens": response.saved_tokens,
            **asdict(response.scores.spent),
        },
        "timing": {
            "generate_seconds": round(timing.generate_seconds, 6),
            "score_seconds": round(timing.score_seconds, 6),
            "total_seconds": round(timing.total_seconds, 6),
        },
    }


def _candidate_json(candidate: Candidate, response: Response, request: Request) -> dict[str, Any]:
    index = candidate.index
    direction = response.plan.draws[candidate.draw].direction
    described: dict[str, Any] = {
        "index": index,
        "objective": number(response.selection.objective[index]),
        "scores": scores_json(response, index),
        "direction": None if direction is None else dict(direction),
        "finish_reason": candidate.finish_reason,
        "completion_tokens": candidate.completion_tokens,
        "error": response.selection.dropped.get(index),
    }
    if request.details == "candidates":
        described["choice"] = dict(candidate.choice)
    return described


def scores_json(response: Response, index: int) -> dict[str, Any]:
    """Every reward's view of one candidate: its score, the members behind it, and how far they disagree."""
    scores: dict[str, Any] = {}
    for name, members in response.scores.members.items():
        column = members[:, [index]]
        scores[name] = {
            "value": number(response.selection.values[name][index]),
            "std": number(std(column)[0]),
            "members": [number(value) for value in column[:, 0].tolist()],
        }
        if note := response.scores.notes[name][index]:
            scores[name]["note"] = note
    return scores
