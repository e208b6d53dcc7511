"""Convert a draw's body to a request of vLLM. Each field is honoured or refused by name."""

from __future__ import annotations

from collections.abc import Hashable
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
# Fields that the check of sampling does not read.
UNCHECKED = IGNORED | {"messages", "prompt"}
# The most sets of sampling fields that are remembered as valid, and the longest text in one.
MAX_CHECKED = 1000
MAX_CHARACTERS = 100


class Bodies:
    """Checks and parses the bodies of draws, none of them twice.

    Both take a tenth of the time of a short request in the server's process.
    """

    def __init__(self, frontend: Frontend) -> None:
        """Parse with vLLM's OpenAI layer."""
        self._frontend = frontend
        # The latest body that was checked, until it is sampled.
        self._latest: tuple[Draw, BaseModel] | None = None
        # Sampling fields that vLLM takes. The requests of one program mostly have the same.
        self._checked: set[Hashable] = set()

    def check(self, draw: Draw) -> None:
        """Have vLLM parse and check the body.

        Raises:
            InvalidRequest: vLLM refuses a field, or would not read it.
        """
        request = parse_body(self._frontend, draw)
        fields = _sampling_fields(draw)
        if fields is None or fields not in self._checked:
            self._frontend.check(draw.kind, request)
        if fields is not None:
            if len(self._checked) >= MAX_CHECKED:
                self._checked.clear()
            self._checked.add(fields)
        self._latest = draw, request

    def take(self, draw: Draw) -> BaseModel:
        """Return the body as a request that only the caller has.

        Raises:
            InvalidRequest: as `check`.
        """
        if self._latest is None or not _is_same(self._latest[0], draw):
            return parse_body(self._frontend, draw)
        request = self._latest[1]
        self._latest = None
        return request


def _is_same(checked: Draw, draw: Draw) -> bool:
    """Return True if two draws have the same request of vLLM."""
    is_same = checked.body is draw.body and checked.kind == draw.kind
    return is_same and checked.deltas == draw.deltas


def _sampling_fields(draw: Draw) -> Hashable | None:
    """Return what vLLM's check reads; None if it holds lists, objects or long texts."""
    fields: list[Any] = [draw.kind]
    for name, value in draw.body.items():
        if name in UNCHECKED:
            continue
        is_long = isinstance(value, str) and len(value) > MAX_CHARACTERS
        if is_long or isinstance(value, list | dict):
            return None
        # The type counts: 1 equals True.
        fields.append((name, type(value), value))
    return tuple(fields)


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
