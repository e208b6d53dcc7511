"""The client package: its types are the server's, and the server accepts its bodies."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import openai
import pytest

import infer_align_client
from infer_align.config import Limits, registry
from infer_align.config.align import SETTINGS
from infer_align.engines.fake import Fake
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request
from infer_align.rewards.rules import Rules
from infer_align_client import (
    Align,
    CandidateReport,
    Feedback,
    ProfileReport,
    Report,
    Score,
    SelectionReport,
    extra_body,
    report,
)
from infer_align_server import feedback as served_feedback
from infer_align_server.wire.response_schemas import SCHEMAS
from tests.methods.smallest import smallest_align

PACKAGE = Path(inspect.getfile(infer_align_client)).parent


def test_typed_feedback_is_the_servers() -> None:
    served = [field.name for field in dataclasses.fields(served_feedback.Feedback)]
    assert list(Feedback.__annotations__) == served


def test_align_has_every_key_of_the_server() -> None:
    assert set(Align.__annotations__) == {*registry.methods.names(), *SETTINGS}


def test_an_unknown_key_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(TypeError, match=r"'best_of'; allowed: adaptive, best_of_n, budget"):
        extra_body(best_of={"n": 2})  # type: ignore[call-arg]


def test_extra_body_holds_the_given_keys_and_nothing_else() -> None:
    assert extra_body() == {"align": {}}
    keys: dict[str, Any] = {
        "preset": "p",
        "rewards": {"short": 0.0},
        "ensemble": {"objective": "wco"},
        "budget": {"completion_tokens": 100},
        "details": "none",
    }
    for name in registry.methods.names():
        keys[name] = smallest_align(name)[name]
    assert set(keys) == set(Align.__annotations__)
    assert extra_body(**keys) == {"align": keys}
    for key, value in keys.items():
        assert extra_body(**{key: value}) == {"align": {key: value}}
    assert extra_body(best_of_n={}) == {"align": {"best_of_n": {}}}, "empty is a value"
    assert extra_body(preset=None) == {"align": {}}  # type: ignore[arg-type]


def test_the_server_takes_it() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    built = extra_body(
        best_of_n={"n": 3},
        rewards={"short": 1.0},
        ensemble={"objective": "mean"},
        budget={"completion_tokens": 15},
    )
    request = parse_request({**body, **built}, "chat", {})
    plan = make_plan(
        request, Fake().load(), {"short": Rules(words_weight=-1.0).load()}, {}, Limits(8, 1000)
    )
    assert (plan.candidates, plan.worst_case_tokens) == (3, 15)


def test_it_depends_on_the_standard_library_only() -> None:
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert modules <= {"__future__", "typing", "infer_align_client.parameters"}
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]


def required_keys() -> set[str]:
    """Return the keys that every report has; postponed annotations hide them from Python 3.11."""
    hints = typing.get_type_hints(Report, include_extras=True)
    return {
        name for name, hint in hints.items() if typing.get_origin(hint) is not typing.NotRequired
    }


@pytest.mark.parametrize(
    ("typed", "name"), [(Report, "Report"), (Score, "Score"), (ProfileReport, "AppliedProfile")]
)
def test_a_typed_report_has_every_field_of_the_schema(typed: Any, name: str) -> None:
    assert set(typed.__annotations__) == set(SCHEMAS[name]["properties"])


def test_the_parts_of_a_typed_report_have_every_field_of_the_schema() -> None:
    report_schema = SCHEMAS["Report"]
    assert set(report_schema["required"]) == required_keys()
    candidate = report_schema["properties"]["candidates"]["items"]
    assert set(CandidateReport.__annotations__) == set(candidate["properties"])
    selection = report_schema["properties"]["selection"]
    assert set(SelectionReport.__annotations__) == set(selection["properties"])


def test_a_report_is_what_the_server_writes(servers: Any) -> None:
    with openai.OpenAI(
        base_url=servers["numbers"].base_url, api_key="unused", max_retries=0
    ) as client:
        ask: Any = client.chat.completions.create
        user = [{"role": "user", "content": "x"}]
        answer = ask(
            model="fake",
            messages=user,
            extra_body=extra_body(best_of_n={"n": 3}, details="candidates"),
        )
        plain = ask(model="fake", messages=user)
    answered = report(answer)
    assert answered is not None
    assert set(answered) == required_keys()
    for candidate in answered["candidates"]:
        assert set(candidate) == set(CandidateReport.__annotations__)
        for score in candidate["scores"].values():
            assert set(score) <= set(Score.__annotations__)
    assert report(plain) is None
    assert report(object()) is None
