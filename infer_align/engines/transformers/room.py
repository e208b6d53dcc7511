"""Count the tokens that a candidate may generate: in the context, and in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infer_align.decoding.params import limit_field
from infer_align.errors import InvalidRequest
from infer_align.types import Draw

SCALE = "align.guidance.scale"


@dataclass(frozen=True, slots=True)
class Room:
    """The limits of one candidate and its contexts.

    Attributes:
        context_length: maximum number of tokens of prompt and completion together.
        capacity: cells of the key-value cache, rows x columns.
        max_batch: rows that step together.
    """

    context_length: int
    capacity: int
    max_batch: int


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The fields of a request that hold its prompt, and its limit on the tokens of an answer."""

    prompt: str
    limit: str

    @classmethod
    def of(cls, draw: Draw) -> FieldNames:
        """Return the names of a draw's request."""
        prompt = "messages" if draw.kind == "chat" else "prompt"
        return cls(prompt, limit_field(draw.body, draw.kind))


def completion_tokens(
    fields: FieldNames,
    prompt_tokens: int,
    requested: int | None,
    default: int | None,
    room: Room,
) -> int:
    """Return the number of tokens that each candidate may generate.

    Args:
        fields: what the request calls its prompt and its limit, for messages.
        prompt_tokens: number of tokens of the prompt.
        requested: the limit that the client set; None if it set none.
        default: the server's own limit for requests that name none. It is shortened to what fits.
        room: the limits.

    Raises:
        InvalidRequest: prompt and completion do not fit the context or the cache.
    """
    available = room.context_length - prompt_tokens
    if (requested or 1) > available:
        param = fields.limit if available >= 1 else fields.prompt
        completion = f" and {requested} of completion" if requested else ""
        raise InvalidRequest(
            f"{param}: {prompt_tokens} tokens of prompt{completion} do not fit "
            f"the context of {room.context_length}; shorten the prompt or request fewer.",
            param=param,
            code="context_length_exceeded",
        )
    longest = min(available, room.capacity - prompt_tokens)
    max_tokens = requested or max(1, min(longest, default or longest))
    if prompt_tokens + max_tokens > room.capacity:
        raise InvalidRequest(
            f"{fields.limit}: a candidate of {prompt_tokens + max_tokens} tokens does "
            f"not fit the key-value cache of {room.capacity}; request fewer tokens, or raise "
            "[engine] kv_cache_gib.",
            param=fields.limit,
            code="context_length_exceeded",
        )
    return max_tokens


def guided_tokens(
    trait_tokens: Mapping[str, int], contexts: int, requested: int | None, maximum: int, room: Room
) -> int:
    """Return the number of tokens that a guided candidate may generate.

    Args:
        trait_tokens: tokens of the longest context of each trait, the request included.
        contexts: number of contexts, the request included.
        requested: the limit that the client set; None if it set none. Then the answer is shortened
            to what fits.
        maximum: tokens that the candidate may generate without guidance.
        room: the limits.

    Raises:
        InvalidRequest: a trait's prompt does not fit the context, or the contexts do not fit the
            batch or the cache together.
    """
    if contexts > room.max_batch:
        raise InvalidRequest(
            f"{SCALE}: a candidate with these traits takes {contexts} rows of the batch, one for "
            f"each prompt, over [engine] max_batch {room.max_batch}; use fewer traits, or raise "
            "max_batch.",
            param=SCALE,
        )
    minimum = requested or 1
    for trait, tokens in trait_tokens.items():
        if tokens + minimum > room.context_length:
            completion = f" and {requested} of completion" if requested else ""
            raise InvalidRequest(
                f"{SCALE}.{trait}: the request with this trait's prompt has {tokens} "
                f"tokens{completion}, which do not fit the context of {room.context_length}; "
                "shorten the prompts or request fewer.",
                param=f"{SCALE}.{trait}",
                code="context_length_exceeded",
            )
    longest = max(trait_tokens.values())
    columns = room.capacity // contexts
    if longest + minimum > columns:
        raise InvalidRequest(
            f"{SCALE}: {contexts} contexts of {longest + minimum} tokens do not fit the "
            f"key-value cache of {room.capacity}; use fewer traits, request fewer tokens, or raise "
            "[engine] kv_cache_gib.",
            param=SCALE,
            code="context_length_exceeded",
        )
    return min(maximum, room.context_length - longest, columns - longest)
