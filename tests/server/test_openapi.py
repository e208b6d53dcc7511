"""The OpenAPI document fits the routes, the accepted and refused requests, and the responses."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from infer_align import config as configuration
from infer_align.config import registry
from infer_align_server.openapi import OPERATIONS, STATUSES
from infer_align_server.routes import ROUTES
from infer_align_server.service import Service
from tests.engines.openai.upstream import fake_upstream
from tests.server.conftest import end, start

USER: Any = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SCORE = "/v1/align/score"


@pytest.fixture(scope="module")
def described(numbers: Any) -> dict[str, Any]:
    answer = numbers.get("/openapi.json")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


def validator(document: dict[str, Any], name: str) -> Any:
    resources: Any = Registry().with_resource(
        "doc", Resource.from_contents(document, default_specification=DRAFT202012)
    )
    text = json.dumps(document["components"]["schemas"][name]).replace(
        '"#/components', '"doc#/components'
    )
    return jsonschema.Draft202012Validator(json.loads(text), registry=resources)


def test_the_document_has_every_route_and_every_referenced_schema(
    described: dict[str, Any],
) -> None:
    assert {route.path for route in ROUTES} == {*OPERATIONS}
    # This engine does not serve the Responses API, and this server keeps no profiles.
    absent = ("/v1/responses", "/v1/align/feedback", "/v1/align/profiles")
    expected = {path for path in OPERATIONS if not path.startswith(absent)}
    assert {path.replace("{name}", "{name:path}") for path in described["paths"]} == expected
    schemas = described["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(described)
    assert "$defs" not in text
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= {*schemas}


def test_defaults_and_bounds_are_the_servers(
    serve: Any, numbers: Any, described: dict[str, Any]
) -> None:
    align = described["components"]["schemas"]["Align"]["properties"]
    best = align["best_of_n"]["anyOf"][0]["properties"]["n"]
    assert (best["default"], best["minimum"]) == (registry.methods.get("best_of_n")().n, 1)
    assert align["preset"]["anyOf"][0] == {"enum": ["best", "three"]}
    assert "number" in align["rewards"]["anyOf"][0]["propertyNames"]["enum"]
    assert "vas" not in align, "this engine cannot steer"
    few = (
        serve('[limits]\nmax_candidates = 3\n[engine]\nkind = "fake"\n').get("/openapi.json").json()
    )
    chat = few["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["n"]["maximum"] == 3 == few["x-limits"]["max_candidates"]
    assert few["components"]["schemas"]["Align"]["properties"]["preset"] == {"type": "null"}
    assert numbers.service.document is not None
    assert numbers.get("/openapi.json").content == numbers.service.document, "made once"


def test_the_document_follows_the_models_of_an_upstream(config_file: Any) -> None:
    """The document gets the models of an upstream that is reached after the start."""
    with fake_upstream() as up:
        path = config_file(
            f'[engine]\nkind = "openai"\nurls = ["{up.url}"]\n'
            "probe = false\nrecovery_seconds = 0.1\n"
        )
        up.models = []
        live = start(configuration.load(path))
        try:
            assert '"up"' not in live.get("/openapi.json").text
            up.models = [{"id": "up"}]
            assert live.until(lambda: live.get("/ready").status_code == 200)
            assert '"up"' in live.get("/openapi.json").text
        finally:
            end(live)


def test_the_document_needs_a_key_and_describes_it(
    serve: Any, monkeypatch: pytest.MonkeyPatch, config_file: Any
) -> None:
    monkeypatch.setenv("TEST_OPENAPI_KEYS", "k")
    live = serve('[server]\napi_keys_env = "TEST_OPENAPI_KEYS"\n[engine]\nkind = "fake"\n')
    assert live.get("/openapi.json").status_code == 401
    document = live.get("/openapi.json", headers={"authorization": "Bearer k"}).json()
    for path, item in document["paths"].items():
        (operation,) = item.values()
        assert ("security" in operation) == (path not in {"/health", "/ready", "/metrics"}), path
    assert "TEST_OPENAPI_KEYS" not in json.dumps(document)


def test_the_document_is_made_at_the_first_request(config_file: Any) -> None:
    service = Service(configuration.load(config_file('[engine]\nkind = "fake"\n')))
    assert service.document is None


TAKEN: list[tuple[str, str, dict[str, Any]]] = [
    ("ChatRequest", CHAT, {"messages": USER}),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "model": "fake@best",
            "n": 2,
            "seed": -1,
            "temperature": 0,
            "stop": ["x"],
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "model": None,
            "n": None,
            "stream": None,
            "align": None,
            "temperature": None,
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "align": {"best_of_n": {}, "rewards": {"number": 1}, "preset": None, "budget": None},
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "align": {"ensemble": {"objective": "wco"}, "details": "none"},
            "anything": [1],
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": [
                {"role": "assistant"},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ]
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {"messages": USER, "stream": True, "stream_options": {"include_usage": True}},
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "align": {
                "best_of_n": {"n": 3},
                "compose": {"number": {"shape": "rank"}, "gates": {"number": {"at_least": 2}}},
                "select": {"rule": "pessimistic", "beta": 0.5},
            },
        },
    ),
    (
        "ChatRequest",
        CHAT,
        {
            "messages": USER,
            "align": {"ensemble": {"objective": "mean", "uncertainty_weight": 0.1}},
        },
    ),
    ("CompletionRequest", TEXT, {"prompt": "", "max_tokens": 3}),
    ("CompletionRequest", TEXT, {"prompt": ["a", "b"], "align": {"best_of_n": {"n": 2}}}),
    (
        "ScoreRequest",
        SCORE,
        {"messages": USER, "candidates": ["1", "2"], "rewards": {"number": 1}, "model": None},
    ),
    (
        "ScoreRequest",
        SCORE,
        {
            "messages": USER,
            "candidates": ["1", "2"],
            "compose": {"number": {"shape": "par"}},
            "select": {"rule": "maxmin"},
        },
    ),
]
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("ChatRequest", CHAT, {}),
    ("ChatRequest", CHAT, {"messages": []}),
    ("ChatRequest", CHAT, {"messages": [{"content": "x"}]}),
    ("ChatRequest", CHAT, {"messages": [{"role": "user"}]}),
    ("ChatRequest", CHAT, {"messages": [{"role": "user", "content": None}]}),
    ("ChatRequest", CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("ChatRequest", CHAT, {"messages": USER, "model": "other"}),
    ("ChatRequest", CHAT, {"messages": USER, "n": 0}),
    ("ChatRequest", CHAT, {"messages": USER, "n": 129}),
    ("ChatRequest", CHAT, {"messages": USER, "seed": 2**63}),
    ("ChatRequest", CHAT, {"messages": USER, "temperature": 3}),
    ("ChatRequest", CHAT, {"messages": USER, "top_p": 0}),
    ("ChatRequest", CHAT, {"messages": USER, "stream_options": {}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"vas": {"beta": {"x": 1}}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"best_of_n": {"n": 0}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"best_of": {}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"rewards": {"nope": 1}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"rewards": {"number": -1}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"preset": "worst"}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"select": {"rule": "best"}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"select": {"margin": 0.25}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"compose": {"number": {"at": 0.5}}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"compose": {"nope": {}}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"compose": {"number": {"at": 2}}}}),
    ("ChatRequest", CHAT, {"messages": USER, "align": {"compose": {"gates": {"nope": {}}}}}),
    ("ChatRequest", CHAT, {"messages": USER, "stream": True, "stream_options": {"usage": True}}),
    ("CompletionRequest", TEXT, {"prompt": [1, -2]}),
    ("ScoreRequest", SCORE, {"messages": USER}),
    ("ScoreRequest", SCORE, {"messages": USER, "candidates": ["1"], "best_of_n": {}}),
]


@pytest.mark.parametrize(("schema", "path", "body"), TAKEN)
def test_allowed_requests_are_accepted(
    numbers: Any, described: dict[str, Any], schema: str, path: str, body: Any
) -> None:
    validator(described, schema).validate(body)
    assert numbers.post(body, path).status_code == 200


@pytest.mark.parametrize(("schema", "path", "body"), REFUSED)
def test_forbidden_requests_are_refused(
    numbers: Any, described: dict[str, Any], schema: str, path: str, body: Any
) -> None:
    assert not validator(described, schema).is_valid(body)
    assert numbers.post(body, path).status_code in {400, 404}


@pytest.mark.parametrize(("schema", "path", "body"), [*TAKEN, *REFUSED])
def test_answers_are_as_described(
    numbers: Any, described: dict[str, Any], schema: str, path: str, body: Any
) -> None:
    answer = numbers.post(body, path)
    responses = described["paths"][path]["post"]["responses"]
    assert str(answer.status_code) in responses, "each status is documented"
    media = answer.headers["content-type"].partition(";")[0]
    errors = responses[str(answer.status_code)]["content"][media]["schema"]
    if media == "application/json":
        validator(described, errors["$ref"].rpartition("/")[2]).validate(answer.json())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/v1/models/fake@best",
        "/v1/align/methods",
        "/openapi.json",
        "/health",
        "/ready",
    ],
)
def test_reading_is_as_described(numbers: Any, described: dict[str, Any], path: str) -> None:
    template = path if path in described["paths"] else "/v1/models/{name}"
    content = described["paths"][template]["get"]["responses"]["200"]["content"][
        "application/json"
    ]["schema"]
    validator(described, content["$ref"].rpartition("/")[2]).validate(numbers.get(path).json())


def test_every_documented_status_has_a_meaning() -> None:
    for operation in OPERATIONS.values():
        assert {*operation.statuses} <= {*STATUSES}


def test_a_missing_responses_api_is_named(numbers: Any) -> None:
    for answer in (
        numbers.post({"model": "fake", "input": "x"}, "/v1/responses"),
        numbers.get("/v1/responses/resp_1"),
    ):
        assert answer.status_code == 404
        assert (
            "does not serve the Responses API; use /v1/chat/completions"
            in answer.json()["error"]["message"]
        )
