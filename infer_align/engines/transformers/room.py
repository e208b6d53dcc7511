"""Count the tokens that a candidate may generate: in the context, and in the cache."""

from __future__ import annotations

from infer_align.errors import InvalidRequest
from infer_align.types import Kind


def completion_tokens(
    kind: Kind,
    prompt_tokens: int,
    requested: int | None,
    *,
    default: int | None,
    context_length: int,
    capacity: int,
) -> int:
    """Return the number of tokens that each candidate may generate.

    Args:
        kind: of the request, for the name of the field in the message.
        prompt_tokens: number of tokens of the prompt.
        requested: the limit in the body.
        default: the limit that the server writes into the body of a request that names none. It is
            shortened to what fits, because the client did not ask for it.
        context_length: maximum of prompt and completion together.
        capacity: the same, as the key-value cache sets it.

    Raises:
        InvalidRequest: prompt and completion do not fit the context or the cache.
    """
    if requested == default:
        requested = None
    available = context_length - prompt_tokens
    if (requested or 1) > available:
        prompt_field = "messages" if kind == "chat" else "prompt"
        completion = f" and {requested} of completion" if requested else ""
        raise InvalidRequest(
            f"max_completion_tokens: {prompt_tokens} tokens of prompt{completion} do not fit "
            f"the context of {context_length}; shorten the prompt or request fewer.",
            param="max_completion_tokens" if available >= 1 else prompt_field,
            code="context_length_exceeded",
        )
    longest = min(available, capacity - prompt_tokens)
    max_tokens = requested or max(1, min(longest, default or longest))
    if prompt_tokens + max_tokens > capacity:
        raise InvalidRequest(
            f"max_completion_tokens: a candidate of {prompt_tokens + max_tokens} tokens does "
            f"not fit the key-value cache of {capacity}; request fewer tokens, or raise "
            "[engine] kv_cache_gib.",
            param="max_completion_tokens",
            code="context_length_exceeded",
        )
    return max_tokens
