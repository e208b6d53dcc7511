"""`/v1/rerank`: order documents by how well they answer a query, in the form of Cohere and Jina.

The query is the user's turn, and each document is an answer to it. Any configured reward or
ensemble scores them.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Len

from infer_align.config.schema import parse
from infer_align.errors import InvalidRequest, UnknownModel, Unsupported, nearest, quote
from infer_align.flow.request import whole_number
from infer_align.flow.scorers import reward_names
from infer_align_server.logs import describe
from infer_align_server.scoring import (
    ScoredTexts,
    align_keys,
    align_settings,
    check_count,
    check_fields,
    score_texts,
    scoring_plan,
    usage_json,
)
from infer_align_server.service import Service

_DOCUMENTS = 'a list of at least one string or {"text": string}'


@dataclass(frozen=True, slots=True)
class Reranking:
    """The settings of one request, beside its model, its documents and its rewards."""

    query: Annotated[str, Len(min_length=1)] = field(
        metadata={"description": "The text that the documents answer."}
    )
    top_n: Annotated[int, Ge(0)] | None = field(
        default=None,
        metadata={"description": "Number of results, the best first; 0 or null returns all."},
    )
    return_documents: bool = field(
        default=True, metadata={"description": "Repeat each document in its result."}
    )
    raw_scores: bool = field(
        default=False,
        metadata={
            "description": "Return the objective itself as relevance_score, instead of its sigmoid."
        },
    )


def ranking_keys() -> tuple[str, ...]:
    """Return the keys of `align` that the body may contain: all that change scores.

    `select` is left out: results stand in the order of their scores, as every client expects.
    """
    return tuple(key for key in align_keys() if key != "select")


def is_for_engine(service: Service, body: Mapping[str, Any]) -> bool:
    """Return True if a request is for the rerank route of the engine itself, if that has one.

    The request then names a model that is neither served nor a reward, or it names no rewards and
    this server has no default.
    """
    model = body.get("model")
    if isinstance(model, str) and model in reward_names(service.rewards):
        return False
    if any(body.get(key) is not None for key in ranking_keys()):
        return False
    if isinstance(model, str):
        try:
            if service.resolve_model(model).preset is not None:
                return False
        except UnknownModel:
            return True
    return not service.default_rewards


async def rerank(
    service: Service, body: Mapping[str, Any], caller: str, owner: str
) -> dict[str, Any]:
    """Return the response of /v1/rerank.

    Args:
        service: The service.
        body: The body of the request.
        caller: The name of the caller, which pays.
        owner: The owner of the stored profile that the request may name.

    Raises:
        Unavailable: The server does not serve requests now.
        InvalidRequest: A field is missing, wrong or unknown.
        Unsupported: There is no reward to score with.
        UnknownModel: `model` names neither a model nor a reward.
        RewardFailed: No document could be scored.
    """
    service.require_ready()
    fields = ("model", "documents", *Reranking.__dataclass_fields__, *ranking_keys())
    check_fields(body, fields)
    settings = {}
    for name in Reranking.__dataclass_fields__:
        if body.get(name) is not None:
            settings[name] = whole_number(body[name])
    reranking = parse(Reranking, settings, "")
    if "documents" not in body:
        raise InvalidRequest(f"documents: is required: {_DOCUMENTS}.", param="documents")
    texts = _texts(body["documents"])
    check_count("documents", len(texts), service.config.limits.max_documents)
    keys = align_settings(service, *_named_rewards(service, body))
    messages = [{"role": "user", "content": reranking.query}]
    plan = await scoring_plan(service, messages, keys, len(texts), owner)
    if any(scorer.stands_in for scorer in plan.scorers):
        raise Unsupported(
            "rewards: no reward scores by default here; name one as `model` or in `rewards`. "
            f"{nearest('', reward_names(service.rewards))}",
            param="rewards",
        )
    describe(documents=len(texts))
    scored = await score_texts(service, plan, texts, caller, "documents")
    service.metrics.documents.inc(len(texts))
    scored.check()
    scored = scored.passing()
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "model": body.get("model") or service.model,
        "results": _results(scored, reranking, body["documents"]),
        "usage": usage_json(scored.scores),
        "meta": _meta(scored),
    }


def _named_rewards(
    service: Service, body: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the body and the keys to read; a reward's name as `model` becomes its weight.

    Raises:
        InvalidRequest: Both `model` and `rewards` name rewards.
        UnknownModel: `model` names neither a model nor a reward.
    """
    names = reward_names(service.rewards)
    model = body.get("model")
    if not isinstance(model, str) or model in service.models():
        return body, ranking_keys()
    if model not in names:
        raise UnknownModel(
            f"model: {quote(model)} is neither a model nor a reward; "
            f"{nearest(model, [*service.models(), *names])}",
            param="model",
        )
    if body.get("rewards") is not None:
        raise InvalidRequest(
            f"rewards: is not allowed beside the model {quote(model)}, which is a reward itself; "
            "leave one of them out.",
            param="rewards",
        )
    return {**body, "model": None, "rewards": {model: 1.0}}, ranking_keys()


def _texts(documents: object) -> list[str]:
    """Return the text of each document.

    Raises:
        InvalidRequest: `documents` is not a list of texts and objects with a text.
    """
    if not isinstance(documents, list) or not documents:
        raise InvalidRequest(
            f"documents: {quote(documents)} is not allowed; must be {_DOCUMENTS}.",
            param="documents",
        )
    return [_text(document, f"documents[{i}]") for i, document in enumerate(documents)]


def _text(document: object, param: str) -> str:
    if isinstance(document, str):
        return document
    if not isinstance(document, Mapping):
        raise InvalidRequest(
            f'{param}: {quote(document)} is not allowed; must be a string or {{"text": string}}.',
            param=param,
        )
    if "text" not in document:
        raise InvalidRequest(f"{param}.text: is required: a string.", param=f"{param}.text")
    text = document["text"]
    if not isinstance(text, str):
        raise InvalidRequest(
            f"{param}.text: {quote(text)} is not allowed; must be a string.", param=f"{param}.text"
        )
    return text


def _results(
    scored: ScoredTexts, reranking: Reranking, documents: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return the results, the highest score first; equal scores in the order of the documents."""
    objective = scored.selection.objective
    order = sorted(scored.selection.ranking, key=lambda i: (-objective[i], i))
    results = []
    for i in order[: reranking.top_n or None]:
        value = objective[i] if reranking.raw_scores else sigmoid(objective[i])
        result: dict[str, Any] = {"index": i, "relevance_score": float(value)}
        if reranking.return_documents:
            document = documents[i]
            result["document"] = {"text": document} if isinstance(document, str) else document
        results.append(result)
    return results


def _meta(scored: ScoredTexts) -> dict[str, Any]:
    """Return the version of the API, and a warning for each document without a result."""
    meta: dict[str, Any] = {"api_version": {"version": "1"}}
    warnings = []
    for i, reason in sorted(scored.selection.dropped.items()):
        warnings.append(f"documents[{i}] has no result: {reason}")
    if warnings:
        meta["warnings"] = warnings
    return meta


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)) without overflow."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    power = math.exp(value)
    return power / (1.0 + power)
