"""JSON schemas of what comes back; `wire`, `discovery` and `scoring` write it, and tests hold real answers to these."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}


def ref(name: str) -> Schema:
    """A schema of `components.schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    """Or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Schema, **limits: object) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **limits}


def mapping(values: Schema) -> Schema:
    """An object with names of the configuration's choosing."""
    return {"type": "object", "additionalProperties": values}


def closed(**properties: Schema) -> Schema:
    """An object that holds these, all of them, and nothing else."""
    return {**opened(**properties), "additionalProperties": False}


def opened(**properties: Schema) -> Schema:
    """An object that holds these, all of them, and whatever else the engine adds."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _answer(kind: str, choice: Schema) -> Schema:
    head = opened(
        id=STRING,
        object={"const": kind},
        created=INTEGER,
        model=STRING,
        choices=array(choice, minItems=1),
    )
    return {
        **head,
        "properties": {**head["properties"], "usage": ref("Usage"), "align": ref("Report")},
    }


def _also(optional: Schema, **properties: Schema) -> Schema:
    """An object that holds these, and may hold the optional ones."""
    whole = closed(**properties)
    return {**whole, "properties": {**whole["properties"], **optional}}


def _finished(**content: Schema) -> Schema:
    return opened(
        index=COUNT,
        **content,
        finish_reason=nullable(STRING),
        logprobs=nullable({"type": "object"}),
    )


_MESSAGE = opened(role={"const": "assistant"}, content=nullable(STRING))
_SCORED = {"index": COUNT, "objective": nullable(NUMBER), "scores": mapping(ref("Score"))}
_CANDIDATE = closed(
    **_SCORED,
    direction=nullable(mapping(NUMBER)),
    finish_reason=nullable(STRING),
    completion_tokens=COUNT,
    error=nullable(STRING),
)
_CANDIDATE["properties"] |= {"choice": {"type": "object"}}
_SCORE = closed(value=nullable(NUMBER), std=nullable(NUMBER), members=array(nullable(NUMBER)))
_SCORE["properties"] |= {"note": STRING}
_REPORTED = {
    "direction": mapping(NUMBER),
    "reports": mapping({"type": "object"}),
}  # where there is one
_MODEL = closed(id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING)
_MODEL["properties"] |= {"root": STRING, "align": {"type": "object"}}

SCHEMAS: dict[str, Schema] = {
    "Error": closed(
        error=closed(message=STRING, type=STRING, param=nullable(STRING), code=nullable(STRING))
    ),
    "ChatCompletion": _answer("chat.completion", _finished(message=_MESSAGE)),
    "Completion": _answer("text_completion", _finished(text=STRING)),
    "Passed": {
        "type": "object",
        "description": "what the engine, or its upstream, answers; passed on as it is",
    },
    "Event": {
        **opened(data=STRING),
        "description": "one server-sent event: a chunk as JSON, at the end [DONE]; comments between them while nothing is ready",
    },
    "Usage": opened(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        completion_tokens_details=opened(
            accepted_prediction_tokens=COUNT, rejected_prediction_tokens=COUNT
        ),
    ),
    "Report": _also(
        _REPORTED,
        methods=array(STRING),
        selected=COUNT,
        dropped=COUNT,
        partial=BOOLEAN,
        reason=STRING,
        candidates=array(_CANDIDATE),
        usage=mapping(COUNT),
        timing=mapping({"type": "number", "minimum": 0}),
    ),
    "Score": _SCORE,
    "Scores": _also(
        _REPORTED,
        object={"const": "align.score"},
        ranking=array(COUNT),
        reason=STRING,
        candidates=array(closed(**_SCORED, error=nullable(STRING))),
        usage=mapping(COUNT),
    ),
    "Judgements": closed(
        object={"const": "align.judge"},
        scale=COUNT,
        candidates=array(
            closed(
                index=COUNT,
                score=nullable(NUMBER),
                rescaled=nullable(NUMBER),
                win_rate=nullable(NUMBER),
                error=nullable(STRING),
            )
        ),
        pairs=array(
            closed(
                pair=array(COUNT, minItems=2, maxItems=2),
                relation=nullable({"enum": ["larger", "smaller", "equal"]}),
                orders=array(nullable(mapping(NUMBER))),
                error=nullable(STRING),
            )
        ),
        conflict_ratio=nullable(NUMBER),
        tie_rate=nullable(NUMBER),
        nontransitivity=mapping(nullable(NUMBER)),
        cycles=array(array(COUNT)),
        drop_rate=closed(score=nullable(NUMBER), pairwise=nullable(NUMBER)),
        usage=mapping(COUNT),
    ),
    "Model": _MODEL,
    "Models": closed(object={"const": "list"}, data=array(ref("Model"), minItems=1)),
    "Methods": closed(
        model=STRING,
        capabilities=array(STRING),
        methods=mapping(closed(description=STRING, parameters={"type": "object"})),
        rewards=mapping(
            closed(
                description=STRING,
                members=array(STRING),
                attributes=array(STRING),
                default_weight=NUMBER,
            )
        ),
        values=mapping(closed(description=STRING)),
        presets=mapping({"type": "object"}),
    ),
    "Health": closed(status={"const": "ok"}, model=STRING),
    "Ready": closed(ready=BOOLEAN, reason=nullable(STRING)),
}
