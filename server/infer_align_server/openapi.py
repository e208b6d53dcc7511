"""The OpenAPI document of this very server: its models, rewards and limits, its methods from their dataclasses.

Made when it is first asked for, then kept while the server is the same: an upstream's models come and go.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from starlette.routing import Route

from infer_align.config import registry
from infer_align.config.schema import json_schema
from infer_align.flow.request import MAX_WEIGHT, SEED_RANGE, Details, reward_names
from infer_align.objectives import Ensemble
from infer_align.types import Budget, Kind
from infer_align_server.engine_routes import serves_responses
from infer_align_server.judging import Judging
from infer_align_server.scoring import ALIGN
from infer_align_server.service import Service
from infer_align_server.wire.response_schemas import SCHEMAS, STRING, Schema, array, nullable, ref
from infer_align_server.wire.stream_options import StreamOptions

# What each status means, wherever it is answered; also the table of docs/api.md.
STATUSES = {
    400: "a field is wrong or unknown, a limit is exceeded, or the engine cannot do what is asked; `param` names the field",
    401: "the key is missing or unknown",
    404: "no such model, preset, or route",
    405: "not a method of the route",
    413: "the body is too large",
    429: "the queue is full, or the key is over its rate or its budget of tokens; `Retry-After` says when to come back",
    431: "the head of the request is too large",
    500: "the server failed; its log has the request id",
    502: "every candidate failed (the engine's own status where it has one), or nothing could be scored",
    503: "loading, draining, or the engine has died",
    504: "the deadline passed with nothing to answer",
}
_ALWAYS = (401, 429, 431, 500)
_WORK = (400, 404, 413, 502, 503, 504)
# Route -> the schema of its request, that of its answer, and the statuses beside those of every route.
OPERATIONS: dict[str, tuple[str | None, str | None, tuple[int, ...]]] = {
    "/v1/chat/completions": ("ChatRequest", "ChatCompletion", (*_ALWAYS, *_WORK)),
    "/v1/completions": ("CompletionRequest", "Completion", (*_ALWAYS, *_WORK)),
    "/v1/responses": ("ResponsesRequest", "Passed", (*_ALWAYS, *_WORK)),
    "/v1/responses/{id}": (None, "Passed", (*_ALWAYS, *_WORK)),
    "/v1/responses/{id}/input_items": (None, "Passed", (*_ALWAYS, *_WORK)),
    "/v1/responses/{id}/cancel": (None, "Passed", (*_ALWAYS, *_WORK)),
    "/v1/align/score": ("ScoreRequest", "Scores", (*_ALWAYS, *_WORK)),
    "/v1/align/judge": ("JudgeRequest", "Judgements", (*_ALWAYS, *_WORK)),
    "/v1/models": (None, "Models", _ALWAYS),
    "/v1/models/{name:path}": (None, "Model", (*_ALWAYS, 404)),
    "/v1/align/methods": (None, "Methods", _ALWAYS),
    "/openapi.json": (None, "Document", _ALWAYS),
    "/health": (None, "Health", (431, 500)),
    "/ready": (None, "Ready", (431, 500)),
    "/metrics": (None, None, (431, 500)),
}
_OPEN = ("/health", "/ready", "/metrics")  # asked without a key
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/responses/{id}")
_RESPONSES = "/v1/responses"  # described only where the engine serves it, or may


def changing_facts(service: Service) -> tuple[object, ...]:
    """What the document says of the server that can change while it runs."""
    return tuple(service.models()), service.engine.capabilities, serves_responses(service)


def document(service: Service, routes: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1, true of `service` as it is configured."""
    schemas = {
        **SCHEMAS,
        **_requests(service),
        "Document": {"type": "object", "required": ["openapi", "info", "paths"]},
    }
    served = [
        route
        for route in routes
        if not route.path.startswith(_RESPONSES) or serves_responses(service)
    ]
    text = json.dumps({"schemas": {**schemas, **_definitions(schemas)}}).replace(
        '"#/$defs/', '"#/components/schemas/'
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "infer-align",
            "version": _version(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "The OpenAI API over a frozen model, with `align`: how the answer is chosen while decoding.",
        },
        "paths": _paths(served, service),
        "components": {
            **json.loads(text),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "x-limits": dataclasses.asdict(service.config.limits),
    }


def _version() -> str:
    try:
        return version("infer-align")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0"


def _path(route: Route) -> str:
    return route.path.replace(":path}", "}")


def _paths(routes: Iterable[Route], service: Service) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(_path(route), {}).update(_operation(route, service))
    return paths


def _operation(route: Route, service: Service) -> dict[str, Any]:
    request, answer, statuses = OPERATIONS[route.path]
    method = next(iter(sorted(route.methods or {"GET"})))  # GET before HEAD
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0],
        "responses": {
            **_success(route.path, answer),
            **{str(status): _failure(status) for status in sorted(statuses)},
        },
    }
    if route.path == "/ready":
        operation["responses"]["503"] = {"description": STATUSES[503], **_json(ref("Ready"))}
    if request:
        operation["requestBody"] = {"required": True, **_json(ref(request))}
        operation["responses"]["default"] = {
            "description": "what the engine answered, with its own status",
            **_json(ref("Error")),
        }
    if "{name" in route.path:
        operation["parameters"] = [
            {
                "name": "name",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "examples": service.models()},
            }
        ]
    if "{id" in route.path:
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": STRING}]
    if service.config.server.api_keys_env and route.path not in _OPEN:
        operation["security"] = [{"key": []}]
    return {method.lower(): operation}


def _success(path: str, answer: str | None) -> dict[str, Any]:
    if path == "/metrics":
        return {
            "200": {
                "description": "Prometheus exposition",
                "content": {"text/plain": {"schema": STRING}},
            }
        }
    if answer is None:
        return {}
    content = _json(ref(answer))["content"]
    if path in _STREAMED:
        content |= {"text/event-stream": {"schema": ref("Event")}}
    return {"200": {"description": "OK", "content": content}}


def _failure(status: int) -> dict[str, Any]:
    headers = {429: "Retry-After", 503: "Retry-After", 401: "WWW-Authenticate"}
    extra = {"headers": {headers[status]: {"schema": STRING}}} if status in headers else {}
    return {"description": STATUSES[status], **extra, **_json(ref("Error"))}


def _json(schema: Schema) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


# --- what is asked ---


def _requests(service: Service) -> dict[str, Schema]:
    align = _align(service)
    scored = {key: align["properties"][key] for key in ALIGN if key in align["properties"]}
    model = {"enum": [*service.models(), None]}
    candidates = array(STRING, minItems=1, maxItems=service.config.limits.max_candidates)
    given = {"model": model, "messages": ref("Messages"), "candidates": candidates}
    return {
        "Align": align,
        "Message": _message(),
        "Messages": array(ref("Message"), minItems=1),
        "ChatRequest": _request(service, "chat", model, messages=ref("Messages")),
        "CompletionRequest": _request(service, "completion", model, prompt=STRING),
        "ResponsesRequest": {
            "type": "object",
            "properties": {"model": model, "align": {"type": "null"}},
        },
        "ScoreRequest": _about_candidates({**given, **scored}),
        "JudgeRequest": _about_candidates({**given, **json_schema(Judging)["properties"]}),
    }


def _about_candidates(fields: Mapping[str, Schema]) -> Schema:
    nulls = {
        name: field if name in {"messages", "candidates"} else nullable(field)
        for name, field in fields.items()
    }
    return {
        "type": "object",
        "properties": nulls,
        "required": ["messages", "candidates"],
        "additionalProperties": False,
    }


def _request(service: Service, kind: Kind, model: Schema, **prompt: Schema) -> Schema:
    """A body of OpenAI's: what is read here and by the engine. Further fields are the engine's to forward or refuse by name."""
    own = {
        "model": model,
        "n": {
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": service.config.limits.max_candidates,
        },
        "seed": {"type": ["integer", "null"], "minimum": -SEED_RANGE, "maximum": SEED_RANGE - 1},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": nullable(json_schema(StreamOptions)),
        "align": nullable(ref("Align")),
    }
    fields = {**service.engine.field_schemas(kind), **prompt, **own}
    options = {"required": ["stream_options"], "properties": {"stream_options": {"type": "object"}}}
    streamed = {"required": ["stream"], "properties": {"stream": {"const": True}}}
    return {
        "type": "object",
        "properties": fields,
        "required": list(prompt),
        "if": options,
        "then": streamed,
    }


def _message() -> Schema:
    part = {
        "type": "object",
        "required": ["type"],
        "properties": {"type": STRING},
        "if": {"properties": {"type": {"const": "text"}}},
        "then": {"required": ["text"], "properties": {"text": STRING}},
    }
    content = {"anyOf": [STRING, array(part)]}
    return {
        "type": "object",
        "required": ["role"],
        "properties": {"role": STRING, "content": nullable(content)},
        "if": {"properties": {"role": {"const": "assistant"}}},
        "else": {"required": ["content"], "properties": {"content": content}},
    }


def _align(service: Service) -> Schema:
    methods = {name: registry.methods.get(name) for name in registry.methods.names()}
    able = {
        name: json_schema(cls)
        for name, cls in methods.items()
        if cls.needs <= service.engine.capabilities
    }
    weight = {"type": "number", "minimum": 0, "maximum": MAX_WEIGHT}
    names = reward_names(service.rewards)
    settings: dict[str, Schema] = {
        "preset": {"enum": list(service.config.presets)},
        "rewards": {
            "type": "object",
            "propertyNames": {"enum": names},
            "additionalProperties": weight,
        },
        "ensemble": json_schema(Ensemble),
        "budget": json_schema(Budget),
        "details": {"enum": list(get_args(Details))},
    }
    keys = {name: nullable(schema) for name, schema in {**able, **settings}.items()}
    if not service.config.presets:
        keys["preset"] = {"type": "null"}
    return {"type": "object", "properties": keys, "additionalProperties": False}


def _definitions(schema: object) -> dict[str, Schema]:
    """What pydantic has put under `$defs`, taken out, for `components`."""
    found: dict[str, Schema] = {}
    if isinstance(schema, dict):
        found |= schema.pop("$defs", {})
        for child in [*schema.values(), *found.values()]:
            found |= _definitions(child)
    elif isinstance(schema, list):
        for child in schema:
            found |= _definitions(child)
    return found
