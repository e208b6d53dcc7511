"""A draw's body as vLLM reads it: every field is honoured or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer_align.errors import Unsupported, nearest
from infer_align.types import Draw

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

# Say who asks or how to store and bill, not what to answer: vLLM does not read them, and nothing is lost.
NEUTRAL = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "store",
    "service_tier",
}
# Said beside a draw's body, or answered beside the choices, where an answer of several candidates has no place for it.
ELSEWHERE = {
    "use_beam_search": "which searches where candidates are sampled",
    "prompt_logprobs": "which are answered beside the choices",
    "kv_transfer_params": "which are answered beside the choices",
    "return_prompt_text": "which is answered beside the choices",
}


def parsed(frontend: Frontend, draw: Draw, **fields: object) -> Any:
    """The draw's body as vLLM reads it.

    Raises:
        InvalidRequest: vLLM refuses it, or would leave a field of it unread.
    """
    from infer_align.vllm.openai import request_fields  # noqa: PLC0415 - vLLM is running by now

    known = request_fields(draw.kind)
    body = {name: value for name, value in draw.body.items() if name not in NEUTRAL}
    for name, value in body.items():
        if name in ELSEWHERE and value not in (None, False):
            raise Unsupported(
                f"{name}: is not available with align, {ELSEWHERE[name]}; leave out one.",
                param=name,
            )
        if name not in known:
            raise Unsupported(
                f"{name}: vLLM does not know the field; {nearest(name, known)}",
                param=name,
                code="unknown_field",
            )
    model = (
        body["model"] if body.get("model") in frontend.variants else frontend.model
    )  # not a preset's name
    return frontend.request(draw.kind, {**body, "model": model, **fields})
