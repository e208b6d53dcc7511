"""Completions in the format of OpenAI's API, with the `align` report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from infer_align.flow.applied_profile import AppliedProfile, LearnedScale
from infer_align.flow.request import Request
from infer_align.flow.response import Response
from infer_align.objectives import std
from infer_align.types import Candidate, Kind, ScoringUsage
from infer_align_server.wire.encoding import number


class ObjectNames(NamedTuple):
    """The names of the objects that one route returns."""

    id_prefix: str
    completion: str
    chunk: str


OBJECTS: dict[Kind, ObjectNames] = {
    "chat": ObjectNames("chatcmpl", "chat.completion", "chat.completion.chunk"),
    "completion": ObjectNames("cmpl", "text_completion", "text_completion"),
}


def completion_json(responses: Sequence[Response], head: Mapping[str, Any]) -> dict[str, Any]:
    """Return the response to one request as JSON.

    Args:
        responses: The responses of the flow, one per prompt.
        head: The fields `id`, `created` and `model`.
    """
    request = responses[0].plan.request
    returned = returned_candidates(responses)
    choices = [{"index": i, **candidate.choice} for i, candidate in enumerate(returned)]
    body: dict[str, Any] = {
        **returned[0].response_fields,
        **head,
        "object": OBJECTS[request.kind].completion,
        "choices": choices,
        "usage": total_usage_json(responses),
    }
    if has_report(request):
        body["align"] = report_json(responses)
    return body


def returned_candidates(responses: Sequence[Response]) -> list[Candidate]:
    """Return the selected candidates of each prompt, in the order of the prompts."""
    candidates: list[Candidate] = []
    for response in responses:
        candidates += response.returned
    return candidates


def report_json(responses: Sequence[Response]) -> dict[str, Any]:
    """Return the `align` report of a request; with several prompts, one report per prompt."""
    if len(responses) == 1:
        return align_json(responses[0])
    return {"prompts": [align_json(response) for response in responses]}


def total_usage_json(responses: Sequence[Response]) -> dict[str, Any]:
    """Return OpenAI's usage object of a request, summed over its prompts."""
    totals: dict[str, Any] = {}
    for response in responses:
        _add_usage(totals, usage_json(response))
    return totals


def _add_usage(totals: dict[str, Any], usage: Mapping[str, Any]) -> None:
    """Add numbers, and those of the objects below, to the totals."""
    for name, value in usage.items():
        if isinstance(value, Mapping):
            _add_usage(totals.setdefault(name, {}), value)
        else:
            totals[name] = totals.get(name, 0) + value


def has_report(request: Request) -> bool:
    """Return True if the response to a request contains the `align` report."""
    return request.aligned and request.align.details != "none"


def usage_json(response: Response) -> dict[str, Any]:
    """Return OpenAI's usage object of one prompt.

    Each distinct prompt counts once. The tokens of all candidates count as generated; those of
    the returned ones are the accepted prediction tokens.
    """
    generated = sum(candidate.completion_tokens for candidate in response.candidates)
    returned = sum(candidate.completion_tokens for candidate in response.returned)
    usage: dict[str, Any] = {
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": response.prompt_tokens + generated,
        "completion_tokens_details": {
            **_details(response, "completion_tokens_details", generated),
            "accepted_prediction_tokens": returned,
            "rejected_prediction_tokens": generated - returned,
        },
    }
    prompt_details = _details(response, "prompt_tokens_details", response.prompt_tokens)
    if prompt_details:
        usage["prompt_tokens_details"] = prompt_details
    return usage


def _details(response: Response, name: str, limit: int) -> dict[str, int]:
    """Return one details object of the engine's usage, summed over the candidates.

    No sum exceeds `limit`, the total of which it is a part.
    """
    totals: dict[str, int] = {}
    for candidate in response.candidates:
        usage = candidate.response_fields.get("usage")
        details = usage.get(name) if isinstance(usage, Mapping) else None
        for key, tokens in (details or {}).items():
            if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
                totals[key] = min(limit, totals.get(key, 0) + tokens)
    return totals


def align_json(response: Response) -> dict[str, Any]:
    """Return the `align` report: the candidates, their scores and the selection."""
    report: dict[str, Any] = {
        "methods": list(response.plan.methods),
        "selected": response.selection.ranking[0],
        "dropped": len(response.selection.dropped),
        "partial": response.partial,
        "reason": response.reason,
        **extras_json(response),
        "candidates": _candidates_json(response),
        "usage": align_usage_json(response),
        "timing": {
            "generate_seconds": round(response.timing.generate_seconds, 6),
            "score_seconds": round(response.timing.score_seconds, 6),
            "total_seconds": round(response.timing.total_seconds, 6),
        },
    }
    return report


def align_usage_json(response: Response) -> dict[str, int]:
    """Return the cost of the methods; guided requests also report the tokens of their contexts."""
    calls = 0
    tokens = 0
    for candidate in response.candidates:
        calls += candidate.calls
        tokens += candidate.completion_tokens
    usage = {
        "engine_calls": calls,
        "candidate_tokens": tokens,
        "saved_tokens": response.saved_tokens,
        **scoring_usage_json(response.scores.usage),
    }
    if any(draw.guidance for draw in response.plan.draws):
        usage["context_tokens"] = response.context_tokens
    return usage


def scoring_usage_json(usage: ScoringUsage) -> dict[str, int]:
    """Return the cost of scoring; `engine_tokens` only if a reward had an engine read."""
    fields: dict[str, int] = asdict(usage)
    if not usage.engine_tokens:
        del fields["engine_tokens"]
    return fields


def extras_json(response: Response) -> dict[str, Any]:
    """Return what the response says beside its candidates, as far as it has it."""
    extras: dict[str, Any] = {}
    if response.selection.rule and {"select", "compose"} & set(response.plan.methods):
        extras["selection"] = selection_json(response)
    profile = response.plan.request.profile
    if profile is not None:
        extras["profile"] = profile_json(profile)
    if response.plan.direction is not None:
        extras["direction"] = dict(response.plan.direction)
    if response.scores.reports:
        reports = response.scores.reports
        extras["reports"] = {name: dict(report) for name, report in reports.items()}
    return extras


def profile_json(profile: AppliedProfile) -> dict[str, Any]:
    """Return what a profile changed: the weights, how certain they are, and their bounds."""
    weights: dict[str, float | None] = {}
    for name, weight in profile.weights.items():
        weights[name] = number(weight)
    bounds: dict[str, list[float]] = {}
    for name, ends in profile.bounds.items():
        bounds[name] = list(ends)
    fields: dict[str, Any] = {
        "adapt": profile.adapt,
        "choices": profile.choices,
        "left_out": profile.left_out,
        "weights": weights,
        "uncertainty": dict(profile.uncertainty),
        "bounds": bounds,
    }
    if profile.scales:
        fields["scales"] = scales_json(profile.scales)
    if profile.failed:
        fields["failed"] = dict(profile.failed)
    return fields if profile.id is None else {"id": profile.id, **fields}


def scales_json(scales: Mapping[str, LearnedScale]) -> dict[str, Any]:
    """Return the scales of traits that were learnt."""
    by_trait: dict[str, Any] = {}
    for trait, learned in scales.items():
        by_trait[trait] = {
            "scale": learned.scale,
            "uncertainty": learned.uncertainty,
            "bounds": list(learned.bounds),
        }
    return by_trait


def _candidates_json(response: Response) -> list[dict[str, Any]]:
    pairs = zip(response.candidates, scores_json(response), strict=True)
    return [_candidate_json(candidate, scores, response) for candidate, scores in pairs]


def _candidate_json(
    candidate: Candidate, scores: Mapping[str, Any], response: Response
) -> dict[str, Any]:
    index = candidate.index
    direction = response.plan.draws[candidate.draw].direction
    fields: dict[str, Any] = {
        "index": index,
        "objective": number(response.selection.objective[index]),
        "scores": scores,
        "direction": None if direction is None else dict(direction),
        "finish_reason": candidate.finish_reason,
        "completion_tokens": candidate.completion_tokens,
        "error": response.selection.dropped.get(index),
    }
    if response.plan.request.align.details == "candidates":
        fields["choice"] = dict(candidate.choice)
    return fields


def selection_json(response: Response) -> dict[str, Any]:
    """Return what `select` and `compose` did, as far as the rule computes it."""
    selection = response.selection
    report: dict[str, Any] = {"rule": selection.rule}
    if selection.distribution is not None:
        report["distribution"] = list(selection.distribution)
    if selection.pairwise:
        report |= {"condorcet": selection.condorcet, "cycles": selection.cycles}
    if selection.worst_case is not None:
        report["worst_case"] = number(selection.worst_case)
    return report


def _composed_json(response: Response, name: str, index: int) -> dict[str, Any]:
    """Return the score of one candidate after its shape, if the request composes rewards."""
    composed = response.selection.composed.get(name)
    return {} if composed is None else {"composed": number(composed[index])}


def scores_json(response: Response) -> list[dict[str, Any]]:
    """Return the scores of each candidate: {reward: value, deviation and member scores}."""
    by_candidate: list[dict[str, Any]] = [{} for _ in response.candidates]
    for name, members in response.scores.members.items():
        values = response.selection.values[name].tolist()
        deviations = std(members).tolist()
        by_member = members.T.tolist()
        notes = response.scores.notes[name]
        for index, scores in enumerate(by_candidate):
            scores[name] = {
                "value": number(values[index]),
                **_composed_json(response, name, index),
                "std": number(deviations[index]),
                "members": [number(value) for value in by_member[index]],
            }
            if notes[index]:
                scores[name]["note"] = notes[index]
    return by_candidate
