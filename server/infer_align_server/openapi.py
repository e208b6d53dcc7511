"""The OpenAPI document of a running server.

FastAPI cannot generate it: its schemas depend on the configuration of the process (models,
rewards, limits, the fields of the engine), and request bodies are passed through whole instead of
being parsed into models.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from starlette.routing import Route

from infer_align_server.engine_routes import serves_responses
from infer_align_server.request_schemas import request_schemas
from infer_align_server.service import Service
from infer_align_server.wire.response_schemas import (
    SCHEMAS,
    STRING,
    Schema,
    ref,
)

# The meaning of each status, on every route. docs/api.md has a table of it.
STATUSES = {
    400: "A field is wrong or unknown, a limit is exceeded, or the engine does not support the "
    "request. `param` names the field.",
    401: "The API key is missing or unknown.",
    403: "The API key lacks the scope that the route needs.",
    404: "There is no such model, preset, profile or route.",
    405: "The route does not have this method.",
    413: "The body is too large.",
    424: "The candidates were drawn, but none could be scored. The header `x-should-retry: false` "
    "keeps SDKs from drawing them again.",
    429: "The queue is full, or the caller is over its rate limit or its token budget. "
    "`Retry-After` says when to try again.",
    431: "The head of the request is too large.",
    500: "The server failed. Its log has the details under the request's id.",
    502: "Every candidate failed (with the status of the engine if it has one).",
    503: "The server is loading or shutting down, or its engine has failed.",
    504: "The deadline passed before there was anything to return.",
}
_ALL_ROUTES = (401, 403, 429, 431, 500)
_OPEN_ROUTES = (431, 500)
_WORK = (*_ALL_ROUTES, 400, 404, 413, 424, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Link:
    """An operation that goes on from the response of another one.

    Values are OpenAPI's runtime expressions, such as "$response.body#/id".

    Attributes:
        operation: The operationId of the next one.
        parameters: {parameter: value} of its path.
        body: {field: value} of its request.
    """

    operation: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """The schemas and statuses of one route.

    Attributes:
        request: The name of the schema of the request's body, if it has one.
        response: The name of the schema of a successful response, if it is JSON.
        statuses: The statuses of errors.
        streamed: True if the response may be a stream of events.
        needs_key: True if the route needs an API key.
        links: The operations that a successful response leads to.
    """

    request: str | None
    response: str | None
    statuses: tuple[int, ...]
    streamed: bool = False
    needs_key: bool = True
    links: tuple[Link, ...] = ()


_ID = "$response.body#/id"
_PROFILE = "$request.body#/profile"
_OF_PROFILE = (
    *(
        Link(operation, {"id": _PROFILE})
        for operation in ("retrieve_profile", "question", "export_profile", "delete_profile")
    ),
    Link("chat_completions", body={"align": {"profile": {"id": _PROFILE}}}),
)
_OF_RESPONSE = tuple(
    Link(operation, {"id": _ID})
    for operation in (
        "retrieve_response",
        "response_input_items",
        "cancel_response",
        "delete_response",
    )
)
_FIRST_MODEL = "$response.body#/data/0/id"
_OF_MODELS = (
    Link("model", {"name": _FIRST_MODEL}),
    Link("chat_completions", body={"model": _FIRST_MODEL}),
    Link("completions", body={"model": _FIRST_MODEL}),
)
_TO_FEEDBACK = (Link("feedback", body={"request_id": "$response.header.X-Request-Id"}),)
_OF_QUESTION = (
    Link("feedback", body={"profile": "$request.path.id", "candidates": "$response.body#/answers"}),
)

OPERATIONS: dict[str, Operation] = {
    "/v1/chat/completions": Operation(
        "ChatRequest", "ChatCompletion", _WORK, streamed=True, links=_TO_FEEDBACK
    ),
    "/v1/completions": Operation("CompletionRequest", "Completion", _WORK, streamed=True),
    "/v1/responses": Operation(
        "ResponsesRequest", "Passed", _WORK, streamed=True, links=_OF_RESPONSE
    ),
    "/v1/responses/{id}": Operation(None, "Passed", _WORK, streamed=True),
    "/v1/responses/{id}/input_items": Operation(None, "Passed", _WORK),
    "/v1/responses/{id}/cancel": Operation(None, "Passed", _WORK),
    "/v1/align/score": Operation("ScoreRequest", "Scores", _WORK),
    "/v1/align/judge": Operation("JudgeRequest", "Judgements", _WORK),
    "/v1/align/verify": Operation("VerifyRequest", "Verdict", _WORK),
    "/verify": Operation("EntailmentRequest", "Entailment", _WORK),
    "/v1/rerank": Operation("RerankRequest", "Reranked", _WORK),
    "/v1/align/feedback": Operation("FeedbackRequest", "Feedback", _WORK, links=_OF_PROFILE),
    "/v1/align/profiles/{id}": Operation(None, "Profile", _WORK),
    "/v1/align/profiles/{id}/export": Operation(None, "ProfileExport", _WORK),
    "/v1/align/profiles/{id}/question": Operation(
        "QuestionRequest", "Question", _WORK, links=_OF_QUESTION
    ),
    "/v1/models": Operation(None, "Models", _ALL_ROUTES, links=_OF_MODELS),
    "/v1/models/{name:path}": Operation(None, "Model", (*_ALL_ROUTES, 404)),
    "/v1/align/methods": Operation(None, "Methods", _ALL_ROUTES),
    "/openapi.json": Operation(None, "Document", _ALL_ROUTES),
    "/health": Operation(None, "Health", _OPEN_ROUTES, needs_key=False),
    "/ready": Operation(None, "Ready", _OPEN_ROUTES, needs_key=False),
    "/metrics": Operation(None, None, _OPEN_ROUTES, needs_key=False),
}
# Contained in the document only if the engine may serve it.
_RESPONSES_API = "/v1/responses"
# Described only where profiles are kept.
_PROFILE_ROUTES = ("/v1/align/feedback", "/v1/align/profiles")


def changing_facts(service: Service) -> tuple[object, ...]:
    """Return the facts of the document that can change while the server runs."""
    engine = service.engine
    capabilities = engine.capabilities, engine.unknown_capabilities
    return tuple(service.models()), capabilities, serves_responses(service)


def document(service: Service, routes: Iterable[Route]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a service as it is configured."""
    schemas = {
        **SCHEMAS,
        **request_schemas(service),
        "Document": {"type": "object", "required": ["openapi", "info", "paths"]},
    }
    schemas |= _extract_definitions(schemas)
    # pydantic refers to "#/$defs/"; in the document these schemas are components.
    text = json.dumps({"schemas": schemas}).replace('"#/$defs/', '"#/components/schemas/')
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "infer-align",
            "version": _version(),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "The OpenAI API of a frozen language model. The `align` object of a "
            "request says how the response is chosen while decoding.",
        },
        "paths": _paths(routes, service),
        "components": {
            **json.loads(text),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "x-limits": service.config.limits.numbers(),
    }


def _version() -> str:
    try:
        return version("infer-align")
    except PackageNotFoundError:
        # The package runs from a checkout that is not installed.
        return "0"


def _paths(routes: Iterable[Route], service: Service) -> dict[str, Any]:
    described = [route for route in routes if _is_served(route, service)]
    names = {route.name for route in described}
    paths: dict[str, Any] = {}
    for route in described:
        path = route.path.replace(":path}", "}")
        # GET before HEAD.
        method = min(route.methods or {"GET"})
        paths.setdefault(path, {})[method.lower()] = _operation(route, service, names)
    return paths


def _is_served(route: Route, service: Service) -> bool:
    """Return True if this server may serve a route, as it is configured."""
    if route.path.startswith(_RESPONSES_API):
        return serves_responses(service)
    return service.profiles.keeps or not route.path.startswith(_PROFILE_ROUTES)


def _operation(route: Route, service: Service, names: Collection[str]) -> dict[str, Any]:
    operation = OPERATIONS[route.path]
    responses = _success(operation, names)
    for status in sorted(operation.statuses):
        responses[str(status)] = _failure(status)
    if route.path == "/ready":
        responses["503"] = {"description": STATUSES[503], **_json(ref("Ready"))}
    fields: dict[str, Any] = {
        "operationId": route.name,
        "summary": (route.endpoint.__doc__ or "").partition("\n")[0],
        "responses": responses,
    }
    if operation.request:
        fields["requestBody"] = {"required": True, **_json(ref(operation.request))}
        responses["default"] = {
            "description": "The response of the engine, with its own status.",
            **_json(ref("Error")),
        }
    if "{name" in route.path:
        fields["parameters"] = [
            _path_parameter("name", {"type": "string", "examples": service.models()})
        ]
    if "{id" in route.path:
        fields["parameters"] = [_path_parameter("id", STRING)]
    if service.needs_key and operation.needs_key:
        fields["security"] = [{"key": []}]
    return fields


def _path_parameter(name: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _success(operation: Operation, names: Collection[str]) -> dict[str, Any]:
    if operation.response is None:
        content: dict[str, Any] = {"text/plain": {"schema": STRING}}
        return {"200": {"description": "Metrics in Prometheus's text format.", "content": content}}
    content = _json(ref(operation.response))["content"]
    if operation.streamed:
        content["text/event-stream"] = {"schema": ref("Event")}
    success: dict[str, Any] = {"description": "OK", "content": content}
    if operation.links:
        # A link may lead only to an operation that this server has.
        links = {link.operation: _link(link) for link in operation.links if link.operation in names}
        success |= {"links": links} if links else {}
    return {"200": success}


def _link(link: Link) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": link.operation}
    if link.parameters:
        described["parameters"] = dict(link.parameters)
    if link.body:
        described["requestBody"] = dict(link.body)
    return described


def _failure(status: int) -> dict[str, Any]:
    headers = {429: "Retry-After", 503: "Retry-After", 401: "WWW-Authenticate"}
    failure: dict[str, Any] = {"description": STATUSES[status], **_json(ref("Error"))}
    if status in headers:
        failure["headers"] = {headers[status]: {"schema": STRING}}
    return failure


def _json(schema: Schema) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _extract_definitions(schema: object) -> dict[str, Schema]:
    """Remove pydantic's `$defs` from a schema and return them."""
    definitions: dict[str, Schema] = {}
    if isinstance(schema, dict):
        definitions |= schema.pop("$defs", {})
        for child in [*schema.values(), *definitions.values()]:
            definitions |= _extract_definitions(child)
    elif isinstance(schema, list):
        for child in schema:
            definitions |= _extract_definitions(child)
    return definitions
