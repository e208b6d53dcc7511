"""The body of /v1/align/feedback, and the choices that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from infer_align.errors import InvalidRequest, RewardFailed, nearest, quote
from infer_align.flow.choice_scores import text_hash
from infer_align.flow.request import check_prompt
from infer_align.flow.scorers import reward_names
from infer_align.methods.profile import Choice, Description, ProfileId, Weight
from infer_align.objectives import Ensemble
from infer_align.profiles.records import StoredChoice
from infer_align.types import Array
from infer_align_server.service import Service


@dataclass(frozen=True, slots=True)
class Feedback:
    """The body of /v1/align/feedback."""

    profile: ProfileId = field(
        metadata={"description": "Name of the profile. The first feedback makes it."}
    )
    messages: Annotated[tuple[dict[str, Any], ...], Len(min_length=1)] | None = field(
        default=None, metadata={"description": "The conversation that the answers belong to."}
    )
    candidates: tuple[str, ...] = field(
        default=(), metadata={"description": "The answers that the user saw."}
    )
    chosen: int | str | None = field(
        default=None, metadata={"description": "The better answer: its index, or its text."}
    )
    rejected: int | str | None = field(
        default=None,
        metadata={"description": "The other answer. Default: all candidates that were not chosen."},
    )
    rating: Annotated[float, Ge(-1.0), Le(1.0)] | None = field(
        default=None,
        metadata={
            "description": "How good `chosen` is beside the other candidates: 1 is better, -1 is "
            "worse, a number between counts for less."
        },
    )
    request_id: Annotated[str, Len(max_length=128)] | None = field(
        default=None,
        metadata={
            "description": "The request that produced the answers. The same choice counts once per "
            "request, so feedback that has it may be sent again."
        },
    )
    description: Description | None = field(
        default=None, metadata={"description": "A sentence about the user, to be kept."}
    )
    weights: dict[str, Weight] | None = field(
        default=None,
        metadata={"description": "{reward: weight}: where the weights start, to be kept."},
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """One choice of a feedback."""

    chosen: str
    rejected: str
    strength: float = 1.0


def check_weights(service: Service, weights: Mapping[str, float]) -> None:
    """Check that weights name configured rewards.

    Raises:
        InvalidRequest: one does not.
    """
    names = reward_names(service.rewards)
    for name in weights:
        if name not in names:
            raise InvalidRequest(
                f"weights.{name}: no such reward; {nearest(name, names)}", param=f"weights.{name}"
            )


def check_storable(sent: Feedback) -> None:
    """Refuse the one character that PostgreSQL does not store, with every store.

    The texts of choices are stored as JSON, which writes it as an escape.

    Raises:
        InvalidRequest: a field has it.
    """
    for name, text in (("description", sent.description), ("request_id", sent.request_id)):
        if text is not None and "\0" in text:
            raise InvalidRequest(
                f"{name}: {quote(text)} has the character U+0000, which cannot be stored; "
                "remove it.",
                param=name,
            )


def pairs_of(sent: Feedback, limit: int) -> list[Pair]:
    """Return the choices of a feedback.

    Raises:
        InvalidRequest: they are not complete.
    """
    if len(sent.candidates) > limit:
        raise InvalidRequest(
            f"candidates: {len(sent.candidates)} candidates are over this server's limit of "
            f"{limit}; send fewer.",
            param="candidates",
        )
    if sent.chosen is None:
        return []
    if sent.messages is None:
        raise InvalidRequest(
            "messages: is required: the conversation that the answers belong to.",
            param="messages",
        )
    check_prompt({"messages": list(sent.messages)}, "chat")
    chosen = _text(sent, "chosen", sent.chosen)
    rejected = _rejected(sent, chosen)
    rating = 1.0 if sent.rating is None else sent.rating
    if rating == 0:
        raise InvalidRequest(
            "rating: 0 says nothing; a number over 0 says better, below 0 worse.", param="rating"
        )
    if rating < 0:
        return [Pair(text, chosen, -rating) for text in rejected]
    return [Pair(chosen, text, rating) for text in rejected]


def _rejected(sent: Feedback, chosen: str) -> list[str]:
    """Return the answers that the chosen one is compared with.

    Raises:
        InvalidRequest: there is none.
    """
    if sent.rejected is None:
        rejected = [text for text in sent.candidates if text != chosen]
    elif sent.rating is None:
        rejected = [_text(sent, "rejected", sent.rejected)]
    else:
        raise InvalidRequest(
            "rating: is not allowed beside rejected; give one of them.", param="rating"
        )
    if rejected == [chosen]:
        raise InvalidRequest(
            "rejected: is the same text as chosen; give another answer.", param="rejected"
        )
    if not rejected:
        raise InvalidRequest(
            "rejected: is required: another answer than the chosen one, by its index in "
            "candidates or as text. A single answer cannot be compared.",
            param="rejected",
        )
    return rejected


def _text(sent: Feedback, name: str, answer: int | str) -> str:
    if isinstance(answer, str):
        return answer
    if not 0 <= answer < len(sent.candidates):
        raise InvalidRequest(
            f"{name}: {answer} is not allowed; must be a text, or the index of one of the "
            f"{len(sent.candidates)} candidates.",
            param=name,
        )
    return sent.candidates[answer]


async def score_pairs(
    service: Service, sent: Feedback, pairs: Sequence[Pair]
) -> list[StoredChoice]:
    """Return the choices as they are stored.

    Raises:
        RewardFailed: no reward could score them, and texts are not kept either.
    """
    if not pairs:
        return []
    messages = list(sent.messages or ())
    personaliser = service.personaliser
    features = personaliser.feedback_features()
    personaliser.check_conversation(features, messages, "messages")
    numbers: dict[str, int] = {}
    for pair in pairs:
        numbers.setdefault(pair.chosen, len(numbers))
        numbers.setdefault(pair.rejected, len(numbers))
    texts = list(numbers)
    scores = await service.choice_scores.score(features, messages, texts, Ensemble())
    keeps_text = personaliser.settings.store_text
    choices: list[StoredChoice] = []
    for pair in pairs:
        chosen = scores[numbers[pair.chosen]]
        rejected = scores[numbers[pair.rejected]]
        difference = pair.strength * (chosen - rejected)
        choices.append(_stored(sent, pair, features, difference, keeps_text=keeps_text))
    if not keeps_text and not any(choice.differences for choice in choices):
        raise RewardFailed(
            "chosen: no reward could score the answers, so nothing was learnt or stored. "
            f"[profiles] rewards: {', '.join(features) or 'none'}."
        )
    return choices


def failed_rewards(features: Sequence[str], choices: Sequence[StoredChoice]) -> dict[str, int]:
    """Return {reward: number of stored choices without its score}, without those of 0."""
    failed: dict[str, int] = {}
    for feature in features:
        count = sum(feature not in choice.differences for choice in choices)
        if count:
            failed[feature] = count
    return failed


def _stored(
    sent: Feedback, pair: Pair, features: Sequence[str], difference: Array, *, keeps_text: bool
) -> StoredChoice:
    differences: dict[str, float] = {}
    for feature, value in zip(features, difference.tolist(), strict=True):
        if math.isfinite(value):
            differences[feature] = value
    messages = tuple(sent.messages or ())
    return StoredChoice(
        differences=differences,
        chosen_hash=text_hash(pair.chosen),
        rejected_hash=text_hash(pair.rejected),
        messages_hash=text_hash(list(messages)),
        text=Choice(pair.chosen, pair.rejected, messages) if keeps_text else None,
        request_id=sent.request_id,
    )
