"""JSON schemas of the bodies of requests, as this server is configured."""

from __future__ import annotations

from collections.abc import Mapping

from infer_align.config.schema import json_schema
from infer_align.flow.scorers import reward_names
from infer_align.flow.seeds import SEED_RANGE
from infer_align.types import Kind
from infer_align_server.align_schema import align_schema, having, judge_settings
from infer_align_server.feedback import Feedback
from infer_align_server.judging import Judging, judge_names
from infer_align_server.reranking import Reranking, ranking_keys
from infer_align_server.scoring import align_keys
from infer_align_server.service import Service
from infer_align_server.verifying import EntailmentCheck, Verification
from infer_align_server.wire.response_schemas import STRING, Schema, array, nullable, opened, ref
from infer_align_server.wire.stream_options import StreamOptions


def request_schemas(service: Service) -> dict[str, Schema]:
    """Return the schema of the body of each route, by the names that the document gives them."""
    align = align_schema(service, "chat")
    align_fields: dict[str, Schema] = {}
    for key in align_keys():
        if key in align["properties"]:
            align_fields[key] = align["properties"][key]
    model = {"enum": [*service.models(), None]}
    max_candidates = service.config.limits.max_candidates
    common = {
        "model": model,
        "messages": ref("Messages"),
        "candidates": array(STRING, minItems=1, maxItems=max_candidates),
    }
    prompt = _prompt(max_candidates)
    return {
        "Align": align,
        "TextAlign": align_schema(service, "completion"),
        "Message": _message(),
        "Messages": array(ref("Message"), minItems=1),
        "ChatRequest": _completion_request(service, "chat", model, messages=ref("Messages")),
        "CompletionRequest": _completion_request(service, "completion", model, prompt=prompt),
        "ResponsesRequest": {
            "type": "object",
            "properties": {"model": {"enum": [*service.names, None]}, "align": {"type": "null"}},
        },
        "ScoreRequest": _candidates_request({**common, **align_fields}),
        "JudgeRequest": _judge_request(service, common),
        "RerankRequest": _rerank_request(service, align_fields),
        "VerifyRequest": _verify_request(service, align_fields),
        "EntailmentRequest": json_schema(EntailmentCheck),
        "FeedbackRequest": _feedback_request(service),
        "QuestionRequest": _question_request(common),
    }


def _question_request(common: Mapping[str, Schema]) -> Schema:
    """Return the schema of the next question of a profile, whose candidates may be drawn."""
    candidates = {**common["candidates"], "minItems": 2}
    return {
        "type": "object",
        "properties": {**common, "candidates": nullable(candidates), "align": {"type": "null"}},
        "required": ["messages"],
        # Candidates that are sent are not drawn, so no field of a completion is read.
        "if": having("candidates"),
        "then": {"propertyNames": {"enum": [*common]}},
    }


def _judge_request(service: Service, common: Mapping[str, Schema]) -> Schema:
    """Return the schema of /v1/align/judge."""
    judging = judge_settings(json_schema(Judging))
    judge = {"enum": judge_names(service.rewards)}
    schema = _candidates_request({**common, **judging["properties"], "judge": judge})
    return {**schema, "allOf": judging["allOf"]}


def _prompt(max_candidates: int) -> Schema:
    """Return the schema of `prompt`: text or token ids, one or several."""
    tokens = array({"type": "integer", "minimum": 0}, minItems=1)
    texts = array(STRING, minItems=1, maxItems=max_candidates)
    token_lists = array(tokens, minItems=1, maxItems=max_candidates)
    return {"anyOf": [STRING, tokens, texts, token_lists]}


def _rerank_request(service: Service, align_fields: Mapping[str, Schema]) -> Schema:
    """Return the schema of /v1/rerank. A model of the engine's own is passed on to it."""
    document = {"anyOf": [STRING, opened(text=STRING)]}
    documents = array(document, minItems=1, maxItems=service.config.limits.max_documents)
    settings = json_schema(Reranking)
    names = [*service.models(), *reward_names(service.rewards)]
    fields = {
        "model": {"type": "string", "examples": names},
        **{key: align_fields[key] for key in ranking_keys() if key in align_fields},
    }
    properties = {name: nullable(schema) for name, schema in fields.items()}
    # A reward as the model takes the place of the rewards.
    reward_as_model = {
        "required": ["model"],
        "properties": {"model": {"enum": reward_names(service.rewards)}},
    }
    return {
        **settings,
        "properties": {
            **settings["properties"],
            **_optional_settings(settings),
            "documents": documents,
            **properties,
        },
        "required": [*settings["required"], "documents"],
        "if": reward_as_model,
        "then": {"properties": {"rewards": {"type": "null"}}},
    }


def _optional_settings(schema: Schema) -> dict[str, Schema]:
    """Return the fields that have a default; null stands for it."""
    optional = {}
    for name, field in schema["properties"].items():
        if name not in schema["required"]:
            optional[name] = nullable(field)
    return optional


def _feedback_request(service: Service) -> Schema:
    """Return the schema of /v1/align/feedback: a choice, or something to keep about the user."""
    schema = json_schema(Feedback)
    properties = dict(schema["properties"])
    limit = service.config.limits.max_candidates
    rewards = {"propertyNames": {"enum": reward_names(service.rewards)}}
    properties["messages"] = nullable(ref("Messages"))
    properties["candidates"] = {**properties["candidates"], "maxItems": limit}
    properties["weights"] = {**properties["weights"], **rewards}
    properties["rating"] = {**properties["rating"], "not": {"const": 0}}
    something = [having(name) for name in ("chosen", "description", "weights")]
    return {
        **schema,
        "properties": properties,
        "anyOf": something,
        "not": {"allOf": [having("rating"), having("rejected")]},
        "if": having("chosen"),
        "then": {
            **having("messages"),
            "anyOf": [having("rejected"), having("candidates", {"minItems": 2})],
        },
    }


def _verify_request(service: Service, align_fields: Mapping[str, Schema]) -> Schema:
    """Return the schema of /v1/align/verify, whose candidates may be plain texts."""
    schema = json_schema(Verification)
    properties = schema["properties"]
    candidate = {"anyOf": [STRING, properties["candidates"]["items"]]}
    limit = service.config.limits.max_candidates
    fields = {
        "model": {"enum": [*service.models(), None]},
        **{key: align_fields[key] for key in ranking_keys() if key in align_fields},
    }
    optional = {name: nullable(each) for name, each in fields.items()}
    optional |= _optional_settings(schema)
    candidates = array(candidate, minItems=1, maxItems=limit)
    return {**schema, "properties": {**properties, "candidates": candidates, **optional}}


def _candidates_request(fields: Mapping[str, Schema]) -> Schema:
    """Return the schema of a request with `messages`, `candidates` and optional fields."""
    required = ["messages", "candidates"]
    properties = {}
    for name, schema in fields.items():
        properties[name] = schema if name in required else nullable(schema)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _completion_request(service: Service, kind: Kind, model: Schema, **prompt: Schema) -> Schema:
    """Return the schema of one of OpenAI's completion requests.

    It contains the fields that this server or the engine checks. The engine forwards any other
    field or refuses it.
    """
    max_candidates = service.config.limits.max_candidates
    server_fields = {
        "model": model,
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": max_candidates},
        "seed": {"type": ["integer", "null"], "minimum": -SEED_RANGE, "maximum": SEED_RANGE - 1},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": nullable(json_schema(StreamOptions)),
        "align": nullable(ref("Align" if kind == "chat" else "TextAlign")),
    }
    has_options = {
        "required": ["stream_options"],
        "properties": {"stream_options": {"type": "object"}},
    }
    is_streamed = {"required": ["stream"], "properties": {"stream": {"const": True}}}
    return {
        "type": "object",
        "properties": {**service.engine.field_schemas(kind), **prompt, **server_fields},
        "required": list(prompt),
        "if": has_options,
        "then": is_streamed,
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
