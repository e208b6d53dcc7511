"""The sampling fields of an OpenAI body, read once for the engines that sample themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from infer_align.errors import InvalidRequest, Unsupported, nearest, shown
from infer_align.types import Body, Kind

# OpenAI's maximum for a text completion that sets none.
COMPLETION_TOKENS = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

# Read by the engines beside the sampling parameters.
_PROMPT = {
    "chat": {"messages", "chat_template_kwargs", "top_logprobs"},
    "completion": {"prompt", "echo"},
}
# Say who asks, or how to store, cache and bill, not what to answer: nothing here acts on them, at any value.
_NEUTRAL = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
}
# Fields whose listed values ask for nothing; any other value asks for what these engines cannot do.
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
    "best_of": "ask for align.best_of_n instead",
    "functions": "use tools, and an engine that parses tool calls",
    "tools": "use an engine that parses tool calls",
    "response_format": "use an engine with structured outputs",
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one candidate is sampled; names and defaults are OpenAI's, or vLLM's where OpenAI has none."""

    temperature: float = field(default=1.0, metadata={"low": 0.0, "high": 2.0})
    top_p: float = field(default=1.0, metadata={"low": 0.0, "high": 1.0, "open": True})
    top_k: int = field(default=0, metadata={"low": -1, "high": 2**31})  # 0 and -1: all
    min_p: float = field(default=0.0, metadata={"low": 0.0, "high": 1.0})
    presence_penalty: float = field(default=0.0, metadata={"low": -2.0, "high": 2.0})
    frequency_penalty: float = field(default=0.0, metadata={"low": -2.0, "high": 2.0})
    repetition_penalty: float = field(
        default=1.0, metadata={"low": 0.0, "high": 10.0, "open": True}
    )
    max_tokens: int | None = field(default=None, metadata={"low": 1, "high": 2**31})
    min_tokens: int = field(default=0, metadata={"low": 0, "high": 2**31})
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    echo: bool = False
    logprobs: int | None = (
        None  # how many alternatives per token are reported; None: no logprobs at all
    )

    @classmethod
    def from_body(
        cls, body: Body, kind: Kind, defaults: Mapping[str, float] | None = None
    ) -> SamplingParams:
        """Read a body without n, seed and stream.

        Args:
            body: the OpenAI request; null counts as absent.
            kind: chat and completion name logprobs and the maximum differently.
            defaults: the model's own, used where the body is silent.

        Raises:
            InvalidRequest: a field has a wrong type or is out of range.
            Unsupported: a field asks for something that no engine using this reader can do; nothing is dropped in silence.
        """
        _refuse_unread(body, kind)
        values: dict[str, Any] = {**(defaults or {})}
        for name, (rule, whole) in _RULES.items():
            if body.get(name) is not None:
                values[name] = _number(body, name, rule, whole=whole)
        if body.get("max_completion_tokens") is not None:
            values["max_tokens"] = _number(
                body, "max_completion_tokens", {"low": 1, "high": 2**31}, whole=True
            )
        elif kind == "completion":
            values.setdefault("max_tokens", COMPLETION_TOKENS)
        values["ignore_eos"] = _flag(body, "ignore_eos")
        values["echo"] = kind == "completion" and _flag(body, "echo")
        values["logit_bias"] = _logit_bias(body)
        values["stop"] = _stop(body)
        values["logprobs"] = _chat_logprobs(body) if kind == "chat" else _completion_logprobs(body)
        return cls(**values)


_RULES = {
    f.name: (f.metadata, str(f.type).startswith("int"))
    for f in fields(SamplingParams)
    if f.metadata
}
_READ = (
    {f.name for f in fields(SamplingParams)} - {"echo"}
    | {"max_completion_tokens", "model"}
    | _NEUTRAL
)


def field_schemas(kind: Kind) -> dict[str, Any]:
    """JSON schemas of the fields that `SamplingParams.from_body` takes, n, seed and stream aside."""
    schemas: dict[str, Any] = {
        name: _number_schema(rule, whole=whole) for name, (rule, whole) in _RULES.items()
    }
    schemas["max_completion_tokens"] = schemas["max_tokens"]
    schemas["ignore_eos"] = {"type": ["boolean", "null"]}
    text = {"type": "string", "minLength": 1}
    schemas["stop"] = {
        "anyOf": [text, {"type": "array", "items": text, "maxItems": MAX_STOPS}, {"type": "null"}]
    }
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    schemas["logit_bias"] = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,19}$"},
        "additionalProperties": bias,
    }
    top = _number_schema({"low": 0, "high": MAX_TOP_LOGPROBS}, whole=True)
    if kind == "chat":
        schemas |= {"logprobs": {"type": ["boolean", "null"]}, "top_logprobs": top}
    else:
        schemas |= {"logprobs": top, "echo": {"type": ["boolean", "null"]}}
    schemas |= {name: {} for name in _NEUTRAL}
    schemas |= {
        name: {"enum": [*values, None]}
        for name, values in _HARMLESS.items()
        if name != "tool_choice"
    }
    return dict(sorted(schemas.items()))


def _number_schema(rule: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    lowest = "exclusiveMinimum" if rule.get("open") else "minimum"
    return {
        "type": ["integer" if whole else "number", "null"],
        lowest: rule["low"],
        "maximum": rule["high"],
    }


def _refuse_unread(body: Body, kind: Kind) -> None:
    read = _READ | _PROMPT[kind]
    for name, value in body.items():
        if name in read or value is None:
            continue
        if name not in _HARMLESS:
            raise Unsupported(
                f"{name}: this engine does not know the field; {nearest(name, read)}",
                param=name,
                code="unknown_field",
            )
        harmless = any(
            type(value) is type(v) and value == v for v in _HARMLESS[name]
        )  # true is not 1
        if not harmless and not (name == "tool_choice" and not body.get("tools")):
            allowed = " or ".join(repr(v) for v in _HARMLESS[name])
            advice = (
                f"allowed: {allowed}; {_ADVICE.get(name, 'leave it out')}"
                if allowed
                else "leave it out"
            )
            raise Unsupported(
                f"{name}: {shown(value)} is not available on this engine; {advice}.", param=name
            )


def _number(body: Body, name: str, rule: Mapping[str, Any], *, whole: bool) -> float:
    value = body[name]
    kinds = int if whole else int | float
    low, high = rule["low"], rule["high"]
    in_range = (
        isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
    )  # NaN is in no range
    if not in_range or (rule.get("open") and value == low):
        bounds = f"over {low} and at most {high}" if rule.get("open") else f"from {low} to {high}"
        noun = "an integer" if whole else "a number"
        raise InvalidRequest(
            f"{name}: {shown(value)} is not allowed; must be {noun} {bounds}.", param=name
        )
    number: float = value
    return number


def _flag(body: Body, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise InvalidRequest(
            f"{name}: {shown(value)} is not allowed; must be true or false.", param=name
        )
    return bool(value)


def _logit_bias(body: Body) -> dict[int, float]:
    value = body.get("logit_bias") or {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"logit_bias: {shown(value)} is not an object; allowed: {{token id: -100 to 100}}.",
            param="logit_bias",
        )
    bias = {}
    for token, amount in value.items():
        if not (str(token).isdecimal() and len(str(token)) < 20):
            raise InvalidRequest(
                f"logit_bias: {shown(token)} is not a token id; must be an integer >= 0.",
                param="logit_bias",
            )
        bias[int(token)] = _number(
            {"x": amount, "logit_bias": amount},
            "logit_bias",
            {"low": -100.0, "high": 100.0},
            whole=False,
        )
    return bias


def _stop(body: Body) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    good = (
        isinstance(stops, list)
        and len(stops) <= MAX_STOPS
        and all(isinstance(s, str) and s for s in stops)
    )
    if not good:
        raise InvalidRequest(
            f"stop: {shown(value)} is not allowed; must be a string or up to {MAX_STOPS} strings, none empty.",
            param="stop",
        )
    return tuple(stops)


def _chat_logprobs(body: Body) -> int | None:
    wanted = _flag(body, "logprobs")
    if body.get("top_logprobs") is None:
        return 0 if wanted else None
    top = _number(body, "top_logprobs", {"low": 0, "high": MAX_TOP_LOGPROBS}, whole=True)
    if not wanted:
        raise InvalidRequest(
            "top_logprobs: needs logprobs; set logprobs to true, or leave top_logprobs out.",
            param="top_logprobs",
        )
    return int(top)


def _completion_logprobs(body: Body) -> int | None:
    if body.get("logprobs") is None:
        return None
    if body.get("echo"):
        raise Unsupported(
            "echo: is not available with logprobs, as the prompt's are not computed; leave out one.",
            param="echo",
        )
    return int(_number(body, "logprobs", {"low": 0, "high": MAX_TOP_LOGPROBS}, whole=True))
