"""Score texts that the client sends; the second half of the flow alone.

`/v1/align/score` returns all scores. `/v1/rerank` and `/v1/align/verify` use the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from infer_align.config import registry
from infer_align.config.align import parse_align
from infer_align.config.schema import join
from infer_align.errors import InvalidRequest, RewardFailed, nearest, quote
from infer_align.flow.cost import read_in_texts
from infer_align.flow.discovery import when_discovered
from infer_align.flow.limits import check_judging
from infer_align.flow.plan import SCORING_STAGES, Plan, make_scoring_plan
from infer_align.flow.request import Request, check_prompt
from infer_align.flow.response import Response, Timing
from infer_align.flow.scoring import score as score_candidates
from infer_align.flow.selection import hold_gates, rank_candidates
from infer_align.types import Candidate, Scores, Selection
from infer_align_server.service import Service
from infer_align_server.telemetry import send_evaluations
from infer_align_server.wire.completion import extras_json, scores_json, scoring_usage_json
from infer_align_server.wire.encoding import number

# Settings of `align` that are about scores, beside the methods.
SETTINGS = ("rewards", "ensemble")


@dataclass(frozen=True, slots=True)
class ScoredTexts:
    """Texts with their scores and their ranking.

    Attributes:
        plan: The plan that scored them.
        candidates: The texts as candidates, in their order.
        scores: The scores of all rewards.
        selection: The ranking. It is empty if no text could be scored.
    """

    plan: Plan
    candidates: tuple[Candidate, ...]
    scores: Scores
    selection: Selection

    def check(self) -> None:
        """Check that something could be scored.

        Raises:
            RewardFailed: No text has a score.
        """
        if not self.selection.ranking:
            first_error = next(iter(self.selection.dropped.values()))
            raise RewardFailed(f"{self.selection.reason}; first: {first_error}")

    def passing(self) -> ScoredTexts:
        """Return the same without a rank for texts that miss a gate, also if all of them do.

        The flow has to return an answer, so it takes the one that misses by the least. A search or
        a verdict need not take any.
        """
        return replace(self, selection=hold_gates(self.plan, self.selection))


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
    check_prompt(body, "chat")
    messages = body["messages"]
    keys = align_settings(service, body, align_keys())
    plan = await scoring_plan(service, messages, keys, len(texts), owner)
    scored = await score_texts(service, plan, texts, caller)
    scored.check()
    no_timing = Timing(0.0, 0.0, 0.0)
    response = Response(plan, scored.candidates, scored.scores, scored.selection, no_timing)
    candidates = []
    for index, scores in enumerate(scores_json(response)):
        candidates.append(_candidate_json(scored.selection, index, scores))
    return {
        "object": "align.score",
        "ranking": list(scored.selection.ranking),
        "reason": scored.selection.reason,
        "candidates": candidates,
        "usage": scoring_usage_json(scored.scores.usage),
        **extras_json(response),
    }


def align_settings(
    service: Service, body: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Return the keys of `align` that a body has as fields, over those of its model's preset.

    Args:
        service: The service.
        body: The body of the request; its `model` may name a preset.
        names: The keys that are read.

    Raises:
        UnknownModel: There is no such model or preset.
    """
    preset = service.resolve_model(body.get("model")).preset
    settings = service.config.presets[preset] if preset else {}
    keys = {key: value for key, value in settings.items() if key in names}
    for key in names:
        if body.get(key) is not None:
            keys[key] = body[key]
    return keys


async def scoring_plan(
    service: Service, messages: object, keys: Mapping[str, Any], n: int, owner: str
) -> Plan:
    """Return the plan that scores n answers to a conversation.

    Args:
        service: The service.
        messages: The conversation.
        keys: The keys of `align`, as `align_settings` returns them.
        n: The number of answers.
        owner: The owner of the stored profile that the keys may name.

    Raises:
        InvalidRequest: A key is wrong, or a reward cannot score these messages.
    """
    align = parse_align(keys, path="")
    parsed = Request({"messages": messages}, align=align, aligned=True)
    request = await service.personalise(parsed, owner)
    return await when_discovered(lambda: _plan(service, request, n))


async def score_texts(
    service: Service, plan: Plan, texts: Sequence[str], caller: str, field: str = "candidates"
) -> ScoredTexts:
    """Score the texts with a plan, admitted, charged and counted as one request.

    Args:
        service: The service.
        plan: Who scores, and how.
        texts: The candidates.
        caller: The name of the caller, which pays for the tokens.
        field: The field of the request that holds the texts, for messages.

    Raises:
        InvalidRequest: The worst case of the judges is over the limit of one request.
        Overloaded: The queue is full, or the caller's token budget is used up.
    """
    check_judging(plan.scoring_tokens, len(texts), field, service.config.limits)
    candidates = tuple(_candidate(i, text) for i, text in enumerate(texts))
    reading_tokens = read_in_texts(plan, candidates)
    async with service.scoring(plan.scoring_tokens, caller, reading_tokens) as count_usage:
        scores = await score_candidates(plan, candidates)
        count_usage(scores.usage)
        service.metrics.count_reward_calls(scores)
    send_evaluations(scores)
    return ScoredTexts(plan, candidates, scores, rank_candidates(plan, candidates, scores))


def usage_json(scores: Scores) -> dict[str, int]:
    """Return the tokens of scoring under OpenAI's names."""
    usage = scores.usage
    prompt_tokens = usage.reward_tokens + usage.judge_prompt_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": usage.judge_completion_tokens,
        "total_tokens": prompt_tokens + usage.judge_completion_tokens,
    }


def check_fields(body: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a field that the route does not have.

    Raises:
        InvalidRequest: Naming the field and the nearest one.
    """
    for name in body:
        if name not in names:
            param = join("", name)
            raise InvalidRequest(
                f"{param}: no such field; {nearest(name, names)}", param=param, code="unknown_field"
            )


def _candidate(index: int, text: str) -> Candidate:
    return Candidate(index, {"message": {"role": "assistant", "content": text}})


def _candidate_json(selection: Selection, index: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "index": index,
        "objective": number(selection.objective[index]),
        "scores": scores,
        "error": selection.dropped.get(index),
    }


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
    check_fields(body, fields)
    expected = "a list of at least one string"
    if "candidates" not in body:
        raise InvalidRequest(f"candidates: is required: {expected}.", param="candidates")
    candidates = body["candidates"]
    if not isinstance(candidates, list) or not candidates:
        raise InvalidRequest(
            f"candidates: {quote(candidates)} is not allowed; must be {expected}.",
            param="candidates",
        )
    check_count("candidates", len(candidates), service.config.limits.max_candidates)
    for index, candidate in enumerate(candidates):
        if not isinstance(candidate, str):
            param = f"candidates.{index}"
            raise InvalidRequest(
                f"{param}: {quote(candidate)} is not allowed; must be a string, the text of an "
                "answer.",
                param=param,
            )
    return candidates


def check_count(field: str, count: int, limit: int) -> None:
    """Check the number of texts of a request.

    Raises:
        InvalidRequest: There are more than the limit allows; `param` is the field.
    """
    if count > limit:
        raise InvalidRequest(
            f"{field}: {count} {field} are over this server's limit of {limit}; send fewer.",
            param=field,
        )
