"""Tests of structured outputs: every finished answer fits, whatever else the request asks for."""

from __future__ import annotations

import asyncio
import json
import math
import re
from datetime import datetime
from typing import Any

import jsonschema
import pytest
import torch

from infer_align.engines.transformers.form import AnswerForm
from infer_align.errors import InvalidRequest
from infer_align.steering import EstimateSchedule, Steering
from infer_align.types import Capability, Draw
from infer_align.values import head
from infer_align.values.head import HeadValue

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

WORD = {"type": "string", "maxLength": 6}
TREE = {"type": "object", "properties": {"name": WORD, "leaf": {"$ref": "#/$defs/leaf"}}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object", "properties": {"a": WORD, "b": {"type": "boolean"}}},
    "required": {
        "type": "object",
        "properties": {"a": WORD, "b": {"type": "integer", "minimum": -3, "maximum": 120}},
        "required": ["b", "a"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "in": {"type": "object", "properties": {"x": {"const": 5}}, "required": ["x"]},
            "list": {"type": "array", "items": {"enum": ["p", "q", 1, None]}, "maxItems": 4},
        },
        "required": ["in", "list"],
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "either": {"anyOf": [{"type": "null"}, WORD, {"type": "array", "maxItems": 0}]},
    "one of": {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 7, "maximum": 9}]},
    "reference": {
        **TREE,
        "required": ["name", "leaf"],
        "$defs": {"leaf": {"type": "object", "properties": {"n": {"enum": [1, 22]}}}},
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "date-time"},
    "address": {"type": "string", "format": "ipv4"},
    "range": {"type": "integer", "exclusiveMinimum": 10, "maximum": 1000, "multipleOf": 5},
    "number": {"type": "number", "minimum": 0.5, "maximum": 2.5},
    "merged": {
        "allOf": [
            {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
            {"properties": {"b": {"type": "null"}}, "required": ["b"]},
        ],
    },
    "map": {"type": "object", "additionalProperties": {"enum": [0, 1]}, "maxProperties": 2},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}],
        "items": False,
        "minItems": 2,
    },
}
CHECKER = jsonschema.FormatChecker()


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    described = {"name": "x", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def by(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


async def texts(engine: Any, request: Draw) -> list[str]:
    engine.check(request)
    candidates = await engine.generate(request)
    assert {candidate.finish_reason for candidate in candidates} == {"stop"}
    return [candidate.text for candidate in candidates]


async def test_a_slow_grammar_is_compiled_beside_other_requests(serving: Any, draw: Any) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": WORD}}}
    bodies = [
        by_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
        by_schema(SCHEMAS["nested"]),
        {"tools": [{"type": "function", "function": tool}]},
    ]
    async with serving() as engine:
        grammars, tokenizer = engine._started.grammars, engine._started.model.tokenizer
        for fields in bodies:
            request = draw(**fields)
            form = AnswerForm.read(request)
            assert not form.is_compiled(grammars, tokenizer)
            task = asyncio.create_task(engine.prepare(request.body, request.kind))
            await asyncio.sleep(0)
            assert not task.done(), "it does not hold the event loop"
            await task
            assert form.is_compiled(grammars, tokenizer)
        with pytest.raises(InvalidRequest, match="it takes over 2 seconds of computing"):
            engine.check(draw(**bodies[0]))
        # What is malformed, and what needs no grammar, is left to `check`.
        await engine.prepare({"messages": [], "response_format": 3}, "chat")
        await engine.prepare({"messages": []}, "chat")
    # An engine that was closed compiles nothing, and `sample` says so.
    await engine.prepare(draw(**by_schema(SCHEMAS["date"])).body, "chat")


@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_finished_answer_fits_its_schema(serving: Any, draw: Any, name: str) -> None:
    schema = SCHEMAS[name]
    validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKER)
    async with serving() as engine:
        assert Capability.STRUCTURED in engine.capabilities
        for temperature in (0.7, 2.0):
            fields = by_schema(schema) | {"temperature": temperature, "max_tokens": 200}
            request = draw(n=24, seed=3, **fields)
            engine.check(request)
            finished = 0
            for candidate in await engine.generate(request):
                assert candidate.finish_reason in {"stop", "length"}
                if candidate.finish_reason == "stop":
                    finished += 1
                    answer = json.loads(candidate.text)
                    validator.validate(answer)
                    if name == "time":
                        datetime.fromisoformat(answer)
                    assert "\n" not in candidate.text
                else:
                    assert candidate.completion_tokens == 200
            # The merged object is open: a random model adds properties to it.
            assert finished >= (1 if name == "merged" else 12)


REGEX = "[a-d]{3}(-[0-9]{2})?"


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        (by(regex=REGEX), lambda text: re.fullmatch(REGEX, text)),
        (
            by(choice=["yes", "no", "\u00e9\U0001f600 \\ \n"]),
            lambda text: text in {"yes", "no", "\u00e9\U0001f600 \\ \n"},
        ),
        (by(grammar='root ::= "a" ("b" | "c")+ "d"'), lambda text: re.fullmatch("a[bc]+d", text)),
        (by(grammar='start: "a" /[bc]+/ "d"'), lambda text: re.fullmatch("a[bc]+d", text)),
        (by(json_object=True), lambda text: isinstance(json.loads(text), dict)),
        (
            {"response_format": {"type": "json_object"}},
            lambda text: isinstance(json.loads(text), dict),
        ),
        (by(json={"enum": [1, "x"]}), lambda text: json.loads(text) in (1, "x")),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_every_kind_of_constraint_holds(
    serving: Any, draw: Any, constraint: dict[str, Any], fits: Any, kind: str
) -> None:
    async with serving() as engine:
        request = draw(n=16, kind=kind, max_tokens=220, **constraint)
        engine.check(request)
        candidates = await engine.generate(request)
        finished = [c for c in candidates if c.finish_reason == "stop"]
        assert len(finished) >= 8
        for candidate in finished:
            assert fits(candidate.text), candidate.text


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
async def test_both_families_of_tokenizers_are_constrained(
    serving: Any, draw: Any, language_model: Any, request: Any, name: str, architecture: str
) -> None:
    model = language_model(architecture, request.getfixturevalue(name))
    async with serving(model=model) as engine:
        for text in await texts(engine, draw(n=8, max_tokens=60, **by(regex=REGEX))):
            assert re.fullmatch(REGEX, text)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2, "top_p": 0.3},
    {"top_k": 1},
    {"min_p": 0.9},
    {"repetition_penalty": 1.8, "frequency_penalty": 2, "presence_penalty": -2},
    {"logit_bias": {"1": 100, "70": 100, "71": -100}},
    {"min_tokens": 30},
    {"ignore_eos": True},
    {"min_tokens": 30, "ignore_eos": True, "logit_bias": {"1": 100}},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
async def test_sampling_parameters_never_break_the_form(
    serving: Any, draw: Any, sampling: dict[str, Any]
) -> None:
    async with serving() as engine:
        request = draw(n=8, seed=5, max_tokens=60, **sampling, **by(regex=REGEX))
        for text in await texts(engine, request):
            assert re.fullmatch(REGEX, text)


async def test_a_seed_gives_the_same_answer_beside_any_other_request(
    serving: Any, draw: Any
) -> None:
    constrained = draw(n=6, seed=9, max_tokens=80, **by(regex="[a-z ]{5,60}"))
    free = draw(n=6, seed=9, max_tokens=40)
    async with serving() as engine:
        alone = await texts(engine, constrained)
        free_alone = [c.choice for c in await engine.generate(free)]
        together = await asyncio.gather(
            engine.generate(free),
            engine.generate(constrained),
            engine.generate(draw(n=2, max_tokens=50, **by(choice=["a", "b"]))),
        )
        assert [c.text for c in together[1]] == alone
        assert [c.choice for c in together[0]] == free_alone, "a free row is not changed"
        assert len(set(alone)) > 1


async def test_max_tokens_cuts_with_length_and_a_stop_string_with_stop(
    serving: Any, draw: Any
) -> None:
    async with serving() as engine:
        (cut,) = await engine.generate(draw(max_tokens=3, **by(regex="[a-d]{40}")))
        assert (cut.finish_reason, cut.completion_tokens) == ("length", 3)
        assert re.fullmatch("[a-d]{3,40}", cut.text)
        request = draw(n=4, max_tokens=90, stop="X", **by(regex="[a-d]{4}X[a-d]{40}"))
        for text in await texts(engine, request):
            assert re.fullmatch("[a-d]{4}", text)
        # The last token that is allowed may complete the answer: it is then not cut.
        (last,) = await engine.generate(draw(max_tokens=1, **by(regex="[a-d]")))
        assert (last.finish_reason, last.completion_tokens) == ("stop", 1)


async def test_deltas_add_up_and_a_text_completion_repeats_its_prompt(
    serving: Any, draw: Any, finish: Any
) -> None:
    async with serving() as engine:
        request = draw(n=3, max_tokens=60, **by(regex=REGEX))
        candidates, deltas = await finish(engine, request)
        for candidate in candidates:
            pieces = [d.choice["delta"]["content"] for d in deltas if d.index == candidate.index]
            assert "".join(pieces) == candidate.text
            assert re.fullmatch(REGEX, candidate.text)
        request = draw("the cat ", kind="completion", echo=True, max_tokens=60, **by(regex=REGEX))
        (text,) = await texts(engine, request)
        assert re.fullmatch("the cat " + REGEX, text)


async def test_logprobs_are_those_of_the_allowed_tokens(serving: Any, draw: Any) -> None:
    fields = {"logprobs": True, "top_logprobs": 20, "max_tokens": 60}
    async with serving() as engine:
        (candidate,) = await engine.generate(draw(**fields, **by(regex="[ab]{6}")))
    entries = candidate.choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == candidate.text
    for entry in entries:
        possible = [top for top in entry["top_logprobs"] if top["logprob"] > -9999]
        assert all(set(top["token"]) <= set("ab") for top in possible)
        assert sum(math.exp(top["logprob"]) for top in possible) == pytest.approx(1, abs=1e-5)


async def test_steering_chooses_among_the_allowed_tokens_only(
    serving: Any, draw: Any, tmp_path: Any
) -> None:
    async with serving() as engine:
        frozen = engine.frozen.frozen("tiny")
    generator = torch.Generator().manual_seed(1)
    matrices = {
        "P": torch.randn(4, frozen.hidden_size, generator=generator),
        "E": torch.randn(frozen.vocabulary, 4, generator=generator),
        "b": torch.zeros(frozen.vocabulary),
    }
    head.write(tmp_path / "head.safetensors", matrices, frozen, {})
    values = {"head": HeadValue(str(tmp_path / "head.safetensors"))}
    body = draw(n=8, max_tokens=60, **by(regex="[a-z]{3}-[0-9]{2}")).body
    seeds = tuple(range(8))
    async with serving(values=values) as engine:
        plain = await texts(engine, Draw(body, 8, seeds))
        for tail in ("keep", "mask"):
            for top_k in (3, 20, 400):
                steering = Steering({"head": 3.0}, top_k, tail)
                steered = await texts(engine, Draw(body, 8, seeds, steering=steering))
                assert steered != plain
                for text in steered:
                    assert re.fullmatch("[a-z]{3}-[0-9]{2}", text)
        schedule = EstimateSchedule({"head": 1.0}, 1)
        request = Draw(body, 2, (0, 1), estimates=schedule, deltas=True)
        async with engine.sample(request) as stream:
            estimates = [event.value async for event in stream if hasattr(event, "value")]
        assert estimates
        assert all(math.isfinite(value) for value in estimates)


async def test_a_stopped_candidate_ends_where_it_is(serving: Any, draw: Any) -> None:
    async with serving() as engine:
        request = draw(n=2, max_tokens=200, **by(regex="[a-z]{600}"))
        async with engine.sample(request) as stream:
            stopped = []
            async for event in stream:
                stream.stop()
                stopped.append(event)
        candidates = [event for event in stopped if hasattr(event, "interrupted")]
        assert {candidate.finish_reason for candidate in candidates} == {"length"}
        assert all(candidate.interrupted for candidate in candidates)


WRONG = {
    "response_format.json_schema.schema": by_schema({"type": "nope"}),
    "structured_outputs.regex": by(regex="(a"),
    "structured_outputs.choice": by(choice=[]),
    "structured_outputs": by(regex="a", json={}),
}


@pytest.mark.parametrize("param", WRONG)
async def test_a_wrong_constraint_is_refused_before_anything_is_drawn(
    serving: Any, draw: Any, param: str
) -> None:
    async with serving() as engine:
        with pytest.raises(InvalidRequest) as refused:
            engine.check(draw(**WRONG[param]))
    assert refused.value.param == param


async def test_a_row_that_cannot_go_on_fails_alone(serving: Any, draw: Any) -> None:
    # With one item per row of the grammar llguidance gives up while it reads the answer.
    hard = by(regex="(?s:(.*a){30}(.*b){30})")
    async with serving() as engine:
        failed, fine = await asyncio.gather(
            engine.generate(draw(n=2, max_tokens=200, **hard)),
            engine.generate(draw(n=2, max_tokens=40, **by(choice=["a", "b"]))),
        )
        assert {candidate.text for candidate in fine} <= {"a", "b"}
        for candidate in failed:
            assert candidate.error is None or candidate.status == 400
