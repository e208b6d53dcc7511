"""Convert a draw's body to a request of vLLM. Each field is honoured or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer_align.errors import Unsupported, field_path, nearest
from infer_align.types import Draw

if TYPE_CHECKING:
    from pydantic import BaseModel

    from infer_align.vllm.openai import Frontend

# Fields about the client, storage or billing. vLLM does not read them, and they do not change the
# answer.
IGNORED = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "store",
    "service_tier",
}
# Fields that vLLM supports only without `align`, each with the reason.
UNSUPPORTED = {
    "use_beam_search": "which searches where candidates are sampled",
    "prompt_logprobs": "because vLLM would compute them again for every candidate",
    "kv_transfer_params": "because they belong to one request of vLLM",
}
STREAM_FIELDS = {"stream": True, "stream_options": {"include_usage": True}}


def parse_body(frontend: Frontend, draw: Draw) -> BaseModel:
    """Return the draw's body as a request of vLLM, which streams if the draw needs deltas.

    Raises:
        InvalidRequest: vLLM refuses the body, or would not read one of its fields.
    """
    field_names = frontend.field_names(draw.kind)
    body: dict[str, Any] = {}
    for name, value in draw.body.items():
        if name in IGNORED:
            continue
        if name in UNSUPPORTED and value not in (None, False):
            raise Unsupported(
                f"{name}: is not available with align, {UNSUPPORTED[name]}; remove one of the two.",
                param=name,
            )
        if name not in field_names:
            field = field_path(name)
            raise Unsupported(
                f"{field}: vLLM has no such field; {nearest(name, field_names)}",
                param=field,
                code="unknown_field",
            )
        body[name] = value
    # The name in the body may be that of a preset.
    if body.get("model") not in frontend.lora_names:
        body["model"] = frontend.model
    if draw.deltas:
        body |= STREAM_FIELDS
    return frontend.parse(draw.kind, body)
