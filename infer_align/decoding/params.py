"""Sampling parameters of an OpenAI body: names, ranges, defaults, parsing and error messages.

Every engine that samples tokens itself reads its bodies here. A field that such an engine cannot
honour is refused by name; none is dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from infer_align.errors import InvalidRequest, Unsupported, field_path, nearest, quote
from infer_align.types import Body, Kind

# OpenAI's maximum for a text completion that sets none.
COMPLETION_TOKENS = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_COUNT = 2**31
# Decimal digits of a token id in `logit_bias`; more cannot be an index.
MAX_ID_DIGITS = 19
STOP_TOKEN_IDS = "stop_token_ids"  # noqa: S105 - the name of a field

# Fields that hold the prompt or shape the answer. The engines read them themselves.
_OTHER_FIELDS = {
    "chat": {
        "messages",
        "chat_template_kwargs",
        "continue_final_message",
        "add_generation_prompt",
        "top_logprobs",
    },
    "completion": {"prompt", "echo"},
}
# Fields about the caller, storage, caching or billing. They do not change an answer, so any value
# is accepted.
_NEUTRAL = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}
# Fields that are accepted only with a value that requests nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
    "best_of": (1,),
    "suffix": ("",),
}
_ADVICE = {
    "best_of": "use align.best_of_n instead",
    "functions": "use tools, and an engine that parses tool calls",
    "tools": "use an engine that parses tool calls",
    "response_format": "use an engine with structured outputs",
}


@dataclass(frozen=True, slots=True)
class Range:
    """The values allowed for a number: from `low` to `high`, without `low` if `above` is set."""

    low: float
    high: float
    integer: bool = False
    above: bool = False

    def check(self, name: str, value: Any) -> float:
        """Return the value if it is in the range.

        Raises:
            InvalidRequest: it is not a number of the right kind, or out of the range.
        """
        types = int if self.integer else int | float
        # The comparison is false for NaN.
        valid = (
            isinstance(value, types)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
        )
        if not valid or (self.above and value == self.low):
            raise InvalidRequest(
                f"{name}: {quote(value)} is not allowed; must be {self.description}.", param=name
            )
        number: float = value
        return number

    @property
    def description(self) -> str:
        """Return the allowed values in words, such as "an integer from 1 to 20"."""
        noun = "an integer" if self.integer else "a number"
        if self.above:
            return f"{noun} over {self.low} and at most {self.high}"
        return f"{noun} from {self.low} to {self.high}"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the parameter; null counts as absent."""
        lowest = "exclusiveMinimum" if self.above else "minimum"
        type_name = "integer" if self.integer else "number"
        return {"type": [type_name, "null"], lowest: self.low, "maximum": self.high}


_MAX_TOKENS = Range(1, MAX_COUNT, integer=True)
_TOP_LOGPROBS = Range(0, MAX_TOP_LOGPROBS, integer=True)
_BIAS = Range(-100.0, 100.0)


def _numeric(default: float | None, allowed: Range) -> Any:
    return field(default=default, metadata={"range": allowed})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one candidate.

    Names and defaults are OpenAI's, or vLLM's where OpenAI has none.

    Attributes:
        top_k: 0 and -1 mean the whole vocabulary.
        min_tokens: tokens before the one that may end the text, or complete a stop string.
        logprobs: alternatives that are reported per token; None for no logprobs at all.
    """

    temperature: float = _numeric(1.0, Range(0.0, 2.0))
    top_p: float = _numeric(1.0, Range(0.0, 1.0, above=True))
    top_k: int = _numeric(0, Range(-1, MAX_COUNT, integer=True))
    min_p: float = _numeric(0.0, Range(0.0, 1.0))
    presence_penalty: float = _numeric(0.0, Range(-2.0, 2.0))
    frequency_penalty: float = _numeric(0.0, Range(-2.0, 2.0))
    repetition_penalty: float = _numeric(1.0, Range(0.0, 10.0, above=True))
    max_tokens: int | None = _numeric(None, _MAX_TOKENS)
    min_tokens: int = _numeric(0, Range(0, MAX_COUNT, integer=True))
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    echo: bool = False
    logprobs: int | None = None

    @classmethod
    def from_body(
        cls,
        body: Body,
        kind: Kind,
        defaults: Mapping[str, float] | None = None,
        also_read: frozenset[str] = frozenset(),
    ) -> SamplingParams:
        """Read a body without n, seed and stream.

        Args:
            body: the OpenAI request; null counts as absent.
            kind: chat and completion name logprobs and the maximum differently.
            defaults: the model's own values for parameters that the body does not set.
            also_read: further fields that the engine reads itself.

        Raises:
            InvalidRequest: a field has a wrong type or is out of range.
            Unsupported: a field requests something that no engine using this reader can do.
        """
        _refuse_unread(body, _READ | _OTHER_FIELDS[kind] | also_read)
        values: dict[str, Any] = dict(defaults or {})
        for name, allowed in _RANGES.items():
            if body.get(name) is not None:
                values[name] = allowed.check(name, body[name])
        if body.get("max_completion_tokens") is not None:
            limit = body["max_completion_tokens"]
            values["max_tokens"] = _MAX_TOKENS.check("max_completion_tokens", limit)
        elif kind == "completion":
            values.setdefault("max_tokens", COMPLETION_TOKENS)
        _check_shortest(values, body, kind)
        values["ignore_eos"] = _boolean(body, "ignore_eos")
        values["echo"] = kind == "completion" and _boolean(body, "echo")
        values["logit_bias"] = _logit_bias(body)
        values["stop"] = _stop(body)
        values["logprobs"] = _chat_logprobs(body) if kind == "chat" else _completion_logprobs(body)
        return cls(**values)


_RANGES: dict[str, Range] = {}
for _field in fields(SamplingParams):
    if "range" in _field.metadata:
        _RANGES[_field.name] = _field.metadata["range"]
_READ = {f.name for f in fields(SamplingParams)} - {"echo"}
_READ |= {"max_completion_tokens", "model"} | _NEUTRAL


def limit_field(body: Body, kind: Kind) -> str:
    """Return the field that limits the tokens of an answer, as this request names it.

    If it names none, it is the one that OpenAI's documentation of this kind of request names.
    """
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return name
    return "max_completion_tokens" if kind == "chat" else "max_tokens"


def field_schemas(kind: Kind) -> dict[str, Any]:
    """Return the JSON schema of each field that `SamplingParams.from_body` reads, by name."""
    schemas: dict[str, Any] = {name: allowed.schema() for name, allowed in _RANGES.items()}
    schemas["max_completion_tokens"] = _MAX_TOKENS.schema()
    boolean = {"type": ["boolean", "null"]}
    schemas["ignore_eos"] = boolean
    text = {"type": "string", "minLength": 1}
    texts = {"type": "array", "items": text, "maxItems": MAX_STOPS}
    schemas["stop"] = {"anyOf": [text, texts, {"type": "null"}]}
    schemas["logit_bias"] = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": f"^[0-9]{{1,{MAX_ID_DIGITS}}}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
    if kind == "chat":
        schemas["logprobs"] = boolean
        schemas["top_logprobs"] = _TOP_LOGPROBS.schema()
    else:
        schemas["logprobs"] = _TOP_LOGPROBS.schema()
        schemas["echo"] = boolean
    for name in _NEUTRAL:
        schemas[name] = {}
    for name, values in _HARMLESS.items():
        # Without tools any tool_choice is accepted, which a schema of one field cannot express.
        if name != "tool_choice":
            schemas[name] = {"enum": [*values, None]}
    return dict(sorted(schemas.items()))


def stop_token_ids(body: Body) -> frozenset[int]:
    """Return the tokens at which a request ends, beside the model's own end tokens.

    It is vLLM's `stop_token_ids`. Engines that sample text without token ids do not read it.

    Raises:
        InvalidRequest: the field is not a list of token ids.
    """
    value = body.get(STOP_TOKEN_IDS)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(_is_token_id(token) for token in value):
        raise InvalidRequest(
            f"{STOP_TOKEN_IDS}: {quote(value)} is not allowed; must be a list of token ids.",
            param=STOP_TOKEN_IDS,
        )
    return frozenset(value)


def _is_token_id(token: object) -> bool:
    # `isinstance` would allow True and False.
    return type(token) is int and 0 <= token < MAX_COUNT


def stop_token_ids_schema() -> dict[str, Any]:
    """Return the JSON schema of `stop_token_ids`."""
    token = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_COUNT}
    return {"type": ["array", "null"], "items": token}


def check_token_ids(field_name: str, tokens: Iterable[int], vocabulary: int) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        InvalidRequest: naming the field.
    """
    for token in tokens:
        if token >= vocabulary:
            raise InvalidRequest(
                f"{field_name}: {token} is not a token id; must be from 0 to {vocabulary - 1}.",
                param=field_name,
            )


def _refuse_unread(body: Body, readable: set[str]) -> None:
    """Refuse fields that are not read, unless their value requests nothing."""
    for name, value in body.items():
        if name in readable or value is None:
            continue
        if name not in _HARMLESS:
            field = field_path(name)
            raise Unsupported(
                f"{field}: this engine does not support the field; {nearest(name, readable)}",
                param=field,
                code="unknown_field",
            )
        if name == "tool_choice" and not body.get("tools"):
            continue
        if not _is_harmless(name, value):
            raise Unsupported(
                f"{name}: {quote(value)} is not available on this engine; {_advice(name)}.",
                param=name,
            )


def _is_harmless(name: str, value: object) -> bool:
    # The types are compared too, because True == 1.
    return any(type(value) is type(allowed) and value == allowed for allowed in _HARMLESS[name])


def _advice(name: str) -> str:
    advice = _ADVICE.get(name, "leave it out")
    allowed = " or ".join(repr(value) for value in _HARMLESS[name])
    return f"allowed: {allowed}; {advice}" if allowed else advice


def _boolean(body: Body, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise InvalidRequest(
            f"{name}: {quote(value)} is not allowed; must be true or false.", param=name
        )
    return bool(value)


def _logit_bias(body: Body) -> dict[int, float]:
    value = body.get("logit_bias") or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"logit_bias: {quote(value)} is not an object; "
            "must map token ids to numbers from -100 to 100.",
            param="logit_bias",
        )
    bias: dict[int, float] = {}
    for token, amount in value.items():
        digits = str(token)
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > MAX_ID_DIGITS:
            raise InvalidRequest(
                f"logit_bias: {quote(token)} is not a token id; must be an integer >= 0.",
                param="logit_bias",
            )
        bias[int(digits)] = _BIAS.check(f"logit_bias.{digits}", amount)
    return bias


def _stop(body: Body) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    valid = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not valid or not all(isinstance(stop, str) and stop for stop in stops):
        raise InvalidRequest(
            f"stop: {quote(value)} is not allowed; "
            f"must be a string or up to {MAX_STOPS} strings, none empty.",
            param="stop",
        )
    return tuple(stops)


def _check_shortest(values: Mapping[str, Any], body: Body, kind: Kind) -> None:
    """Refuse more tokens at least than there may be at most, if the request asks for them."""
    shortest = values.get("min_tokens", 0)
    longest = values.get("max_tokens")
    if body.get("min_tokens") is not None and longest is not None and shortest > longest:
        limit = limit_field(body, kind)
        raise InvalidRequest(
            f"min_tokens: {shortest} is over {limit}, which is {longest}; lower min_tokens, or "
            f"raise {limit}.",
            param="min_tokens",
        )


def _chat_logprobs(body: Body) -> int | None:
    enabled = _boolean(body, "logprobs")
    if body.get("top_logprobs") is None:
        return 0 if enabled else None
    top = _TOP_LOGPROBS.check("top_logprobs", body["top_logprobs"])
    if not enabled:
        raise InvalidRequest(
            "top_logprobs: needs logprobs; set logprobs to true, or leave top_logprobs out.",
            param="top_logprobs",
        )
    return int(top)


def _completion_logprobs(body: Body) -> int | None:
    if body.get("logprobs") is None:
        return None
    logprobs = int(_TOP_LOGPROBS.check("logprobs", body["logprobs"]))
    if body.get("echo") and logprobs:
        raise Unsupported(
            f"logprobs: {logprobs} is not available with echo, because alternatives of the "
            "prompt's tokens are not computed; set logprobs to 0, or leave out echo.",
            param="logprobs",
        )
    return logprobs
