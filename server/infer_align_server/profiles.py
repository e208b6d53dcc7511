"""Stored profiles: feedback, what a profile knows, the next question, export and deletion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from infer_align.config.align import Align
from infer_align.config.schema import parse
from infer_align.errors import (
    InvalidRequest,
    RewardFailed,
    field_path,
    nearest,
    quote,
)
from infer_align.flow.applied_profile import LearnedScale
from infer_align.flow.personal import Personaliser
from infer_align.flow.personalised import Term, Terms
from infer_align.flow.request import check_prompt
from infer_align.objectives import Ensemble
from infer_align.profiles import next_question
from infer_align.profiles.records import StoredProfile
from infer_align.profiles.weights import Learned
from infer_align_server.answering import answer_all
from infer_align_server.feedback import (
    Feedback,
    check_storable,
    check_weights,
    failed_rewards,
    pairs_of,
    score_pairs,
)
from infer_align_server.service import Service
from infer_align_server.wire.completion import scales_json
from infer_align_server.wire.encoding import number

# Candidates that a question draws if the request brings none.
QUESTION_CANDIDATES = 8


async def feedback(
    service: Service, body: Mapping[str, Any], caller: str, owner: str
) -> dict[str, Any]:
    """Add a choice to a profile, and return what the profile knows then.

    A choice that is sent again with its `request_id` is not added again.

    Raises:
        InvalidRequest: a field is missing or wrong.
        RewardFailed: no reward could score the answers.
        StoreFailed: nothing was stored.
    """
    service.require_ready()
    sent = parse(Feedback, body, "")
    store = service.profiles.store("profile")
    check_weights(service, sent.weights or {})
    check_storable(sent)
    pairs = pairs_of(sent, service.config.limits.max_candidates)
    if not pairs and sent.description is None and sent.weights is None:
        raise InvalidRequest(
            "chosen: is required: the better answer, by its index in candidates or as text.",
            param="chosen",
        )
    async with service.scoring(0, caller):
        choices = await score_pairs(service, sent, pairs)
    addition = await store.add(owner, sent.profile, choices, sent.description, sent.weights)
    service.metrics.profile_choices.inc(addition.added)
    return {
        "object": "align.feedback",
        "profile": sent.profile,
        "added": addition.added,
        "failed": failed_rewards(service.personaliser.feedback_features(), addition.choices),
        **knowledge(service.personaliser, addition.profile),
    }


async def show(service: Service, owner: str, profile_id: str) -> dict[str, Any]:
    """Return what a profile knows, in words and numbers.

    Raises:
        UnknownProfile: the owner has none of this name.
    """
    stored = await service.profiles.load(owner, profile_id, "id")
    return {
        "object": "align.profile",
        "id": stored.id,
        "created_at": stored.created_at,
        "description": stored.description,
        **knowledge(service.personaliser, stored),
    }


async def remove(service: Service, owner: str, profile_id: str) -> dict[str, Any]:
    """Delete a profile with everything that it knows.

    Raises:
        UnknownProfile: the owner has none of this name.
    """
    await service.profiles.load(owner, profile_id, "id")
    await service.profiles.store("id").delete(owner, profile_id)
    return {"object": "align.profile.deleted", "id": profile_id, "deleted": True}


async def export(service: Service, owner: str, profile_id: str) -> dict[str, Any]:
    """Return everything that is stored of a profile.

    Raises:
        UnknownProfile: the owner has none of this name.
    """
    return export_json(await service.profiles.load(owner, profile_id, "id"))


def export_json(stored: StoredProfile) -> dict[str, Any]:
    """Return everything that is stored of a profile as JSON."""
    return {
        "object": "align.profile.export",
        "id": stored.id,
        "created_at": stored.created_at,
        "description": stored.description,
        "weights": dict(stored.weights),
        "total": stored.total,
        "choices": [asdict(choice) for choice in stored.choices],
    }


async def question(
    service: Service, body: Mapping[str, Any], caller: str, owner: str, profile_id: str
) -> dict[str, Any]:
    """Return the pair of candidates whose comparison says most about the user.

    The candidates stand in the body, or are drawn for its messages.

    Raises:
        UnknownProfile: the owner has none of this name.
        InvalidRequest: a field is missing or wrong.
    """
    service.require_ready()
    stored = await service.profiles.load(owner, profile_id, "id")
    check_prompt(body, "chat")
    texts = await _question_texts(service, body, caller)
    distinct = _distinct(texts, drawn=body.get("candidates") is None)
    personaliser = service.personaliser
    terms = _terms(personaliser, stored).learnt
    features = [term.feature for term in terms]
    personaliser.check_conversation(features, body["messages"], "messages")
    async with service.scoring(0, caller):
        compared = [texts[index] for index in distinct]
        scores = await service.choice_scores.score(features, body["messages"], compared, Ensemble())
    first, second = np.triu_indices(len(compared), 1)
    learned = personaliser.learn(
        personaliser.stored_rows(stored.choices, terms), terms, scores[first] - scores[second]
    )
    divided = scores / learned.spreads
    try:
        i, j = next_question(divided, learned.strengths, learned.covariance)
    except ValueError as error:
        raise RewardFailed(f"{error}") from None
    margin = float(learned.strengths @ (divided[i] - divided[j]))
    return {
        "object": "align.question",
        "pair": [distinct[i], distinct[j]],
        "answers": [compared[i], compared[j]],
        "candidates": list(texts),
        "probability": number(1 / (1 + math.exp(-max(-700.0, min(700.0, margin))))),
    }


async def _question_texts(service: Service, body: Mapping[str, Any], caller: str) -> Sequence[str]:
    """Return the candidates of a body, or draw some for its messages."""
    if body.get("align") is not None:
        raise InvalidRequest(
            "align: a question takes no align; it draws from the model as it is.", param="align"
        )
    if body.get("candidates") is None:
        drawing = {"n": QUESTION_CANDIDATES, **body}
        drawing.pop("candidates", None)
        model = service.resolve_model(body.get("model"))
        plans = await service.plan(drawing, "chat", model, caller=caller)
        responses = await answer_all(service, plans, caller=caller)
        return [candidate.text for candidate in responses[0].candidates if not candidate.error]
    allowed = ("model", "messages", "candidates")
    for name in body:
        if name not in allowed:
            field = field_path(name)
            raise InvalidRequest(
                f"{field}: no such field beside candidates; {nearest(name, allowed)}",
                param=field,
                code="unknown_field",
            )
    candidates = body["candidates"]
    limit = service.config.limits.max_candidates
    is_text = isinstance(candidates, list) and all(isinstance(text, str) for text in candidates)
    if not is_text or not 2 <= len(candidates) <= limit:
        raise InvalidRequest(
            f"candidates: {quote(candidates)} is not allowed; must be a list of 2 to {limit} "
            "strings.",
            param="candidates",
        )
    return list(candidates)


def _distinct(texts: Sequence[str], *, drawn: bool) -> list[int]:
    """Return the indices of the texts without those that repeat an earlier one.

    Raises:
        InvalidRequest: the texts of a request are all the same.
        RewardFailed: those that the model drew are.
    """
    indices = [index for index, text in enumerate(texts) if text not in texts[:index]]
    if len(indices) > 1:
        return indices
    if drawn:
        raise RewardFailed(
            "a question needs two answers that differ, and all that were drawn have one text "
            f"({len(texts)} of {len(texts)}); raise temperature or n, or send candidates."
        )
    raise InvalidRequest(
        f"candidates: the {len(texts)} texts are the same; a question needs two that differ.",
        param="candidates",
    )


def _terms(personaliser: Personaliser, stored: StoredProfile) -> Terms:
    """Return what a profile weighs if a request names nothing, and every trait from scale 0."""
    weights = personaliser.known_weights(stored.weights)
    start = {**personaliser.default_weights(), **weights}
    traits = dict.fromkeys(personaliser.settings.traits, 0.0)
    return personaliser.terms(Align(), start, "profile", traits)


def knowledge(personaliser: Personaliser, stored: StoredProfile) -> dict[str, Any]:
    """Return the weights of a profile, how certain they are, and the same in words."""
    terms = _terms(personaliser, stored)
    rows = personaliser.stored_rows(stored.choices, terms.learnt)
    learned = personaliser.learn(rows, terms.learnt)
    weights: dict[str, float] = {}
    uncertainty: dict[str, float | None] = {}
    bounds: dict[str, list[float]] = {}
    words: list[str] = []
    for t, term in enumerate(terms.learnt):
        if term.is_measure:
            continue
        weights[term.name] = float(learned.weights[t])
        uncertainty[term.name] = number(float(learned.deviations[t]))
        if not math.isnan(learned.low[t]):
            bounds[term.name] = [float(learned.low[t]), float(learned.high[t])]
        words.append(_in_words(term, learned, t))
    scales = personaliser.scales(terms, learned)
    words += [_scale_in_words(trait, scale) for trait, scale in scales.items()]
    return {
        "choices": stored.total,
        "weights": weights,
        "uncertainty": uncertainty,
        "bounds": bounds,
        "scales": scales_json(scales),
        "words": words,
    }


def _in_words(term: Term, learned: Learned, t: int) -> str:
    """Return one sentence about a weight."""
    weight = learned.weights[t]
    deviation = learned.deviations[t]
    if math.isnan(deviation):
        return f"{term.name}: no choice says anything about it; its weight is {weight:.3g}."
    change = weight - term.prior
    certainty = _certainty(change, deviation)
    direction = "more" if change > 0 else "less"
    if not change:
        return f"{term.name}: matters as it did at the start; its weight is {weight:.3g}."
    return (
        f"{term.name}: {certainty} matters {direction} than at the start; its weight is "
        f"{weight:.3g} and was {term.prior:.3g}."
    )


def _scale_in_words(trait: str, learned: LearnedScale) -> str:
    """Return one sentence about the scale of a trait."""
    if learned.uncertainty is None:
        return f"trait {trait}: no choice says anything about it."
    certainty = _certainty(learned.scale, learned.uncertainty)
    direction = "more" if learned.scale > 0 else "less"
    liked = f"{certainty} {direction} of it is liked"
    return f"trait {trait}: {liked}; its scale moves by {learned.scale:+.3g}."


def _certainty(change: float, deviation: float) -> str:
    """Return a word for how sure it is that a number has changed."""
    ratio = abs(change) / deviation if deviation else math.inf
    if ratio > 2:
        return "clearly"
    return "probably" if ratio > 0.5 else "perhaps"
