"""Verdicts on answers, for routers that decide by them: approve, redo, reject, tie or abstain.

`/v1/align/verify` has the form of the outcome verifier that vLLM's semantic router defines
(vllm-project/semantic-router#2857). `/verify` is the older form that its AutoMix client calls, with
one answer and one threshold.

A verdict is evidence. It removes no candidate, and the caller decides what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from time import monotonic
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest, quote
from infer_align.flow.plan import Plan
from infer_align.objectives import std
from infer_align.types import Messages
from infer_align_server.reranking import ranking_keys, sigmoid
from infer_align_server.scoring import (
    ScoredTexts,
    align_settings,
    check_count,
    check_fields,
    score_texts,
    scoring_plan,
    usage_json,
)
from infer_align_server.service import Service

Disposition = Literal["approve", "redo", "reject", "tie", "abstain"]
Confidence = Annotated[float, Ge(0.0), Le(1.0)]
CandidateId = Annotated[str, Len(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits between the dispositions."""

    approve: Confidence = field(
        default=0.5, metadata={"description": "Lowest confidence that approves."}
    )
    reject: Confidence = field(
        default=0.1,
        metadata={
            "description": "Confidence below which the answers are rejected. Between the two "
            "thresholds the verdict is redo."
        },
    )
    tie: Confidence = field(
        default=0.0,
        metadata={
            "description": "The verdict is a tie if another answer is approved too, with a "
            "confidence at most this much lower. Equal texts never tie."
        },
    )
    max_std: Annotated[float, Ge(0.0)] | None = field(
        default=None,
        metadata={
            "description": "Abstain if the standard deviation of the members of a reward, for the "
            "best answer, is over this."
        },
    )


@dataclass(frozen=True, slots=True)
class CandidateAnswer:
    """One answer to verify. The id is opaque and comes back in the scores."""

    id: CandidateId = field(metadata={"description": "Name of the answer in the response."})
    content: str = field(metadata={"description": "The text of the answer."})


@dataclass(frozen=True, slots=True)
class Verification:
    """The body of /v1/align/verify, beside its model and its rewards."""

    task: Annotated[str, Len(min_length=1)] = field(
        metadata={"description": "The text that the answers answer."}
    )
    candidates: tuple[CandidateAnswer, ...] = field(
        metadata={"description": "The answers, each with an id of its own."}
    )
    trusted_context: str | None = field(
        default=None,
        metadata={"description": "Sources that can be trusted. Rewards read them before the task."},
    )
    thresholds: Thresholds = field(
        default_factory=Thresholds,
        metadata={"description": "The limits between the dispositions."},
    )
    confidence: Literal["sigmoid", "identity"] = field(
        default="sigmoid",
        metadata={
            "description": '"sigmoid" of the objective, or the objective itself: "identity" is for '
            "rewards whose scores are probabilities."
        },
    )


# The threshold of /verify where a request names none.
THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class EntailmentCheck:
    """The body of /verify."""

    question: Annotated[str, Len(min_length=1)] = field(
        metadata={"description": "The text that the answer answers."}
    )
    answer: str = field(metadata={"description": "The answer."})
    threshold: Confidence | None = field(
        default=None,
        metadata={"description": "Lowest confidence that needs no escalation. Default: 0.5."},
    )
    context: str | None = field(
        default=None, metadata={"description": "Sources that can be trusted."}
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """The disposition of a request, with its evidence."""

    disposition: Disposition
    reason_code: str
    # The confidence of the best answer; None if there is none.
    confidence: float | None = None


async def verify(
    service: Service, body: Mapping[str, Any], caller: str, owner: str
) -> dict[str, Any]:
    """Return the response of /v1/align/verify.

    Args:
        service: The service.
        body: The body of the request.
        caller: The name of the caller, which pays.
        owner: The owner of the stored profile that the request may name.

    Raises:
        Unavailable: The server does not serve requests now.
        InvalidRequest: A field is missing, wrong or unknown. Without candidates its code is
            `no_candidate`.
        RewardFailed: No answer could be scored because a reward failed.
    """
    start = monotonic()
    service.require_ready()
    names = tuple(Verification.__dataclass_fields__)
    check_fields(body, ("model", *names, *ranking_keys()))
    verification = _parse(service, {name: body[name] for name in names if _has(body, name)})
    texts = [candidate.content for candidate in verification.candidates]
    keys = align_settings(service, body, ranking_keys())
    messages = _messages(verification.task, verification.trusted_context)
    plan = await scoring_plan(service, messages, keys, len(texts), owner)
    scored = await score_texts(service, plan, texts, caller)
    if scored.scores.errors:
        scored.check()
    scored = scored.passing()
    confidences = _confidences(scored, verification.confidence)
    verdict = decide(scored, confidences, verification.thresholds)
    service.metrics.verdicts.labels(verdict.disposition).inc()
    return {
        "object": "align.verdict",
        "disposition": verdict.disposition,
        "confidence": verdict.confidence,
        "reason_codes": [verdict.reason_code],
        "kind": _kind(plan),
        "version": _version(plan),
        "scores": _scores(verification, scored, confidences),
        "not_scored": _not_scored(verification, scored, confidences),
        "usage": usage_json(scored.scores),
        "latency_ms": round((monotonic() - start) * 1000),
    }


async def check_entailment(
    service: Service, body: Mapping[str, Any], caller: str
) -> dict[str, Any]:
    """Return the response of /verify: the confidence of one answer by the default rewards.

    Raises:
        Unavailable: The server does not serve requests now.
        InvalidRequest: A field is missing, wrong or unknown.
        RewardFailed: The answer could not be scored.
    """
    service.require_ready()
    names = tuple(EntailmentCheck.__dataclass_fields__)
    check_fields(body, names)
    check = parse(EntailmentCheck, {name: body[name] for name in names if _has(body, name)}, "")
    messages = _messages(check.question, check.context)
    plan = await scoring_plan(service, messages, {}, 1, "")
    scored = await score_texts(service, plan, [check.answer], caller, "answer")
    scored.check()
    confidence = sigmoid(scored.selection.objective[0])
    threshold = THRESHOLD if check.threshold is None else check.threshold
    accepted = confidence >= threshold
    service.metrics.verdicts.labels("approve" if accepted else "redo").inc()
    return {
        "confidence": confidence,
        "should_escalate": not accepted,
        "verified_count": int(accepted),
        "total_samples": 1,
        "threshold": threshold,
    }


def decide(
    scored: ScoredTexts, confidences: Mapping[int, float], thresholds: Thresholds
) -> Finding:
    """Return the verdict on scored answers.

    Args:
        scored: The answers with their scores.
        confidences: {index: confidence} of the answers that have one.
        thresholds: The limits between the dispositions.
    """
    if not confidences:
        return Finding("abstain", "not_scored")
    best = max(confidences, key=lambda i: (confidences[i], -i))
    confidence = confidences[best]
    if thresholds.max_std is not None and _disagreement(scored, best) > thresholds.max_std:
        return Finding("abstain", "members_disagree", confidence)
    if confidence < thresholds.reject:
        return Finding("reject", "below_reject_threshold", confidence)
    if confidence < thresholds.approve:
        return Finding("redo", "below_threshold", confidence)
    texts = [candidate.choice["message"]["content"] for candidate in scored.candidates]
    lowest = max(thresholds.approve, confidence - thresholds.tie)
    for i, other in confidences.items():
        if other >= lowest and texts[i] != texts[best]:
            return Finding("tie", "within_tie_margin", confidence)
    return Finding("approve", "above_threshold", confidence)


def _has(body: Mapping[str, Any], name: str) -> bool:
    return body.get(name) is not None


def _parse(service: Service, fields: Mapping[str, Any]) -> Verification:
    """Return the parsed body. A candidate may be a plain text: its index is then its id.

    Raises:
        InvalidRequest: A field is missing or wrong.
    """
    candidates = fields.get("candidates")
    if candidates is None or candidates == []:
        raise InvalidRequest(
            f"candidates: {quote(candidates)} is not allowed; must be a list of at least one "
            'string or {"id": string, "content": string}.',
            param="candidates",
            code="no_candidate",
        )
    if isinstance(candidates, list):
        check_count("candidates", len(candidates), service.config.limits.max_candidates)
        named = []
        for i, candidate in enumerate(candidates):
            named.append(_named(i, candidate))
        fields = {**fields, "candidates": named}
    verification = parse(Verification, fields, "")
    _check_ids(verification.candidates)
    thresholds = verification.thresholds
    if thresholds.reject > thresholds.approve:
        raise InvalidRequest(
            f"thresholds.reject: {thresholds.reject} is over thresholds.approve "
            f"({thresholds.approve}); it must not be higher.",
            param="thresholds.reject",
        )
    return verification


def _named(index: int, candidate: object) -> Mapping[str, Any]:
    """Return a candidate as an object; the index of a plain text is its id.

    Raises:
        InvalidRequest: It is neither a text nor an object.
    """
    if isinstance(candidate, str):
        return {"id": str(index), "content": candidate}
    if not isinstance(candidate, Mapping):
        param = f"candidates.{index}"
        raise InvalidRequest(
            f"{param}: {quote(candidate)} is not allowed; must be a string or "
            '{"id": string, "content": string}.',
            param=param,
        )
    return candidate


def _check_ids(candidates: Sequence[CandidateAnswer]) -> None:
    first_index: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        if candidate.id in first_index:
            raise InvalidRequest(
                f"candidates.{i}.id: {quote(candidate.id)} is also the id of "
                f"candidates.{first_index[candidate.id]}; each needs its own.",
                param=f"candidates.{i}.id",
            )
        first_index[candidate.id] = i


def _messages(task: str, trusted_context: str | None) -> Messages:
    """Return the conversation that rewards read; the context is the system's turn."""
    messages = [{"role": "user", "content": task}]
    if trusted_context:
        messages.insert(0, {"role": "system", "content": trusted_context})
    return messages


def _confidences(scored: ScoredTexts, form: Literal["sigmoid", "identity"]) -> dict[int, float]:
    """Return {index: confidence} of the answers that have one from 0 to 1."""
    confidences = {}
    for i in sorted(scored.selection.ranking):
        objective = scored.selection.objective[i]
        confidence = sigmoid(objective) if form == "sigmoid" else objective
        if 0 <= confidence <= 1:
            confidences[i] = confidence
    return confidences


def _disagreement(scored: ScoredTexts, index: int) -> float:
    """Return the largest deviation of the members of a reward for one answer."""
    deviations = [0.0]
    for members in scored.scores.members.values():
        deviations.append(float(std(members[:, [index]])[0]))
    return max(deviations)


def _kind(plan: Plan) -> str:
    """Return the semantics of the verdict in the router's words; those of a judge come first."""
    if any(scorer.reward.compares_pairs for scorer in plan.scorers):
        return "pairwise_comparator"
    if any(scorer.reward.worst_case_tokens(1) for scorer in plan.scorers):
        return "llm_judge"
    if any(scorer.reward.relative for scorer in plan.scorers):
        return "peer_consistency"
    return "outcome_reward_model"


def _version(plan: Plan) -> str:
    """Return this package's version and the rewards, for audits."""
    try:
        number = version("infer-align")
    except PackageNotFoundError:
        # The package runs from a checkout that is not installed.
        number = "0"
    return f"infer-align/{number} " + "+".join(sorted(scorer.name for scorer in plan.scorers))


def _scores(
    verification: Verification, scored: ScoredTexts, confidences: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Return the score of each answer that has one, in the order of the request."""
    scores = []
    for i, confidence in confidences.items():
        entry: dict[str, Any] = {
            "candidate_id": verification.candidates[i].id,
            "confidence": confidence,
        }
        flags = [f"{name}: {notes[i]}" for name, notes in scored.scores.notes.items() if notes[i]]
        if flags:
            entry["flags"] = flags
        scores.append(entry)
    return scores


def _not_scored(
    verification: Verification, scored: ScoredTexts, confidences: Mapping[int, float]
) -> dict[str, str]:
    """Return {id: reason} of the answers without a confidence."""
    reasons = {}
    for i, candidate in enumerate(verification.candidates):
        if i not in confidences:
            out_of_range = f"the objective {scored.selection.objective[i]:.3g} is not from 0 to 1"
            reasons[candidate.id] = scored.selection.dropped.get(i, out_of_range)
    return reasons
