"""JSON schemas of the responses. Tests validate real responses against them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}


def ref(name: str) -> Schema:
    """Return a reference to a schema of `components.schemas`."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    """Return a schema that also allows null."""
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Schema, **limits: object) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **limits}


def mapping(values: Schema) -> Schema:
    """Return the schema of an object whose names are arbitrary."""
    return {"type": "object", "additionalProperties": values}


def closed(**properties: Schema) -> Schema:
    """Return the schema of an object with exactly these properties."""
    return {**opened(**properties), "additionalProperties": False}


def opened(**properties: Schema) -> Schema:
    """Return the schema of an object with these properties, and optional ones of the engine."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _completion(kind: str, choice: Schema, report: Schema) -> Schema:
    head = opened(
        id=STRING,
        object={"const": kind},
        created=INTEGER,
        model=STRING,
        choices=array(choice, minItems=1),
    )
    return {
        **head,
        "properties": {**head["properties"], "usage": ref("Usage"), "align": report},
    }


def _with_optional(optional: Schema, **properties: Schema) -> Schema:
    """Return the schema of an object with these properties and optional ones, and no others."""
    schema = closed(**properties)
    return {**schema, "properties": {**schema["properties"], **optional}}


def _choice(**content: Schema) -> Schema:
    """Return the schema of a choice. Some upstreams leave out `logprobs`."""
    choice = opened(index=COUNT, **content, finish_reason=nullable(STRING))
    choice["properties"]["logprobs"] = nullable({"type": "object"})
    return choice


# Some upstreams leave out the content of a message that calls a tool.
_MESSAGE = opened(role={"const": "assistant"})
_MESSAGE["properties"]["content"] = nullable(STRING)
_CONFIDENCE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
_SCORE_FIELDS = {"index": COUNT, "objective": nullable(NUMBER), "scores": mapping(ref("Score"))}
_CANDIDATE = closed(
    **_SCORE_FIELDS,
    direction=nullable(mapping(NUMBER)),
    finish_reason=nullable(STRING),
    completion_tokens=COUNT,
    error=nullable(STRING),
)
_CANDIDATE["properties"] |= {"choice": {"type": "object"}}
_SCORE = closed(value=nullable(NUMBER), std=nullable(NUMBER), members=array(nullable(NUMBER)))
# "composed" is present only if the request composes rewards.
_SCORE["properties"] |= {"note": STRING, "composed": nullable(NUMBER)}
_SELECTION = closed(rule=STRING)
# Each rule reports what it computes.
_SELECTION["properties"] |= {
    "distribution": array(NUMBER),
    "condorcet": nullable(COUNT),
    "cycles": COUNT,
    "worst_case": nullable(NUMBER),
}
# Present only if the request has a direction or a profile, or selects or composes, or a reward has
# a report.
_OPTIONAL_REPORT = {
    "direction": mapping(NUMBER),
    "profile": ref("AppliedProfile"),
    "selection": _SELECTION,
    "reports": mapping({"type": "object"}),
}
_MODEL = closed(id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING)
_MODEL["properties"] |= {
    "root": STRING,
    "align": {"type": "object"},
    "body": {"type": "object"},
}

_SCALES = mapping(
    closed(
        scale=NUMBER,
        uncertainty=nullable(NUMBER),
        bounds=array(NUMBER, minItems=2, maxItems=2),
    )
)
_KNOWLEDGE = {
    "choices": COUNT,
    "weights": mapping(NUMBER),
    "uncertainty": mapping(nullable(NUMBER)),
    "bounds": mapping(array(NUMBER, minItems=2, maxItems=2)),
    "scales": _SCALES,
    "words": array(STRING),
}

SCHEMAS: dict[str, Schema] = {
    "Error": closed(
        error=closed(
            message=STRING,
            type=STRING,
            param=nullable(STRING),
            # The status where vLLM answers by itself.
            code={"type": ["string", "integer", "null"]},
        )
    ),
    "ChatCompletion": _completion("chat.completion", _choice(message=_MESSAGE), ref("Report")),
    "Completion": _completion(
        "text_completion",
        _choice(text=STRING),
        # With several prompts there is one report per prompt.
        {"anyOf": [ref("Report"), closed(prompts=array(ref("Report"), minItems=2))]},
    ),
    "Passed": {
        "type": "object",
        "description": "The response of the engine or of its upstream, passed on unchanged.",
    },
    "Event": {
        **opened(data=STRING),
        "description": "One server-sent event: a chunk as JSON, and [DONE] at the end. Comments "
        "between events keep the connection open.",
    },
    "Usage": opened(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        # Null, or with other details, where vLLM answers by itself.
        completion_tokens_details={
            "type": ["object", "null"],
            "properties": {
                "accepted_prediction_tokens": COUNT,
                "rejected_prediction_tokens": COUNT,
            },
        },
    ),
    "Report": _with_optional(
        _OPTIONAL_REPORT,
        methods=array(STRING),
        selected=COUNT,
        dropped=COUNT,
        partial=BOOLEAN,
        reason=STRING,
        candidates=array(_CANDIDATE),
        usage=mapping(COUNT),
        timing=mapping({"type": "number", "minimum": 0}),
    ),
    "AppliedProfile": _with_optional(
        {"id": STRING, "scales": _SCALES, "failed": mapping(COUNT)},
        adapt=STRING,
        choices=COUNT,
        left_out=COUNT,
        weights=mapping(nullable(NUMBER)),
        uncertainty=mapping(nullable(NUMBER)),
        bounds=mapping(array(NUMBER, minItems=2, maxItems=2)),
    ),
    "Feedback": closed(
        object={"const": "align.feedback"},
        profile=STRING,
        added=COUNT,
        failed=mapping(COUNT),
        **_KNOWLEDGE,
    ),
    "Profile": {
        "anyOf": [
            closed(
                object={"const": "align.profile"},
                id=STRING,
                created_at=NUMBER,
                description=STRING,
                **_KNOWLEDGE,
            ),
            closed(object={"const": "align.profile.deleted"}, id=STRING, deleted=BOOLEAN),
        ]
    },
    "ProfileExport": closed(
        object={"const": "align.profile.export"},
        id=STRING,
        created_at=NUMBER,
        description=STRING,
        weights=mapping(NUMBER),
        total=COUNT,
        choices=array({"type": "object"}),
    ),
    "Question": closed(
        object={"const": "align.question"},
        pair=array(COUNT, minItems=2, maxItems=2),
        answers=array(STRING, minItems=2, maxItems=2),
        candidates=array(STRING),
        probability=NUMBER,
    ),
    "Score": _SCORE,
    "Scores": _with_optional(
        _OPTIONAL_REPORT,
        object={"const": "align.score"},
        ranking=array(COUNT),
        reason=STRING,
        candidates=array(closed(**_SCORE_FIELDS, error=nullable(STRING))),
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
                win_probability=nullable(NUMBER),
                orders=array(nullable(mapping(NUMBER))),
                error=nullable(STRING),
            )
        ),
        conflict_ratio=nullable(NUMBER),
        tie_rate=nullable(NUMBER),
        position_bias=nullable(NUMBER),
        nontransitivity=mapping(nullable(NUMBER)),
        cycles=array(array(COUNT)),
        drop_rate=closed(score=nullable(NUMBER), pairwise=nullable(NUMBER)),
        principles=array({"type": "object"}),
        judges=mapping({"type": "object"}),
        rubric=nullable({"type": "object"}),
        usage=mapping(COUNT),
    ),
    "Reranked": closed(
        id=STRING,
        model=STRING,
        results=array(
            _with_optional({"document": opened(text=STRING)}, index=COUNT, relevance_score=NUMBER)
        ),
        usage=mapping(COUNT),
        meta=_with_optional({"warnings": array(STRING)}, api_version=closed(version=STRING)),
    ),
    "Verdict": closed(
        object={"const": "align.verdict"},
        disposition={"enum": ["approve", "redo", "reject", "tie", "abstain"]},
        confidence=nullable(_CONFIDENCE),
        reason_codes=array(STRING, minItems=1),
        kind=STRING,
        version=STRING,
        scores=array(
            _with_optional({"flags": array(STRING)}, candidate_id=STRING, confidence=_CONFIDENCE)
        ),
        not_scored=mapping(STRING),
        usage=mapping(COUNT),
        latency_ms=COUNT,
    ),
    "Entailment": closed(
        confidence=_CONFIDENCE,
        should_escalate=BOOLEAN,
        verified_count=COUNT,
        total_samples=COUNT,
        threshold=_CONFIDENCE,
    ),
    "Model": _MODEL,
    "Models": closed(object={"const": "list"}, data=array(ref("Model"), minItems=1)),
    "Methods": closed(
        model=STRING,
        capabilities=array(STRING),
        unknown_capabilities=array(STRING),
        notes=array(STRING),
        methods=mapping(
            closed(
                description=STRING,
                stage=nullable(STRING),
                parameters={"type": "object"},
                available=BOOLEAN,
                reason=nullable(STRING),
                fix=STRING,
                note=STRING,
            )
        ),
        rewards=mapping(
            closed(
                description=STRING,
                members=array(STRING),
                attributes=array(STRING),
                default_weight=NUMBER,
                warnings=array(STRING),
                parameters=nullable({"type": "object"}),
                cost=STRING,
            )
        ),
        values=mapping(closed(description=STRING, warnings=array(STRING))),
        profiles=closed(kept=BOOLEAN, traits=mapping(STRING)),
        traits=mapping(closed(description=STRING)),
        presets=mapping({"type": "object"}),
        preset_bodies=mapping({"type": "object"}),
        limits=mapping({"type": "integer"}),
    ),
    "Health": closed(status={"const": "ok"}, model=STRING),
    "Ready": closed(ready=BOOLEAN, reason=nullable(STRING)),
}
