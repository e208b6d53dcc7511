"""Directions: the published vectors to the letter, and the client's own words kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align.config.schema import parse
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.methods import PlanDraft, Sections
from infer_align.methods.dpa import DPA, Prompting, prompt_weights, system_prompt, unit
from infer_align.objectives import project
from infer_align.types import Draw

ALIGN = {"dpa": {"direction": {"helpfulness": 1.0}}}

ORACLE = json.loads(
    (Path(__file__).parents[1] / "data" / "dpa_public.json").read_text(encoding="utf-8")
)
PAIR = ("helpfulness", "verbosity")
SENTENCE = system_prompt({"helpfulness": 1.0, "verbosity": 0.0})
weights = st.floats(-1e300, 1e300, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-300)
directions = st.dictionaries(
    st.text("abc", min_size=1, max_size=4), weights, min_size=1, max_size=6
).filter(lambda d: any(d.values()))


@pytest.mark.parametrize("case", ORACLE["prompt"], ids=lambda c: str(c["degrees"]))
def test_published_sentence(case: dict[str, Any]) -> None:
    angle = math.radians(case["degrees"])
    v = {"helpfulness": math.cos(angle), "verbosity": math.sin(angle)}
    assert system_prompt(v) == case["system_prompt"]
    assert prompt_weights(v) == {
        "helpfulness": case["weight_helpfulness"],
        "verbosity": case["weight_verbosity"],
    }
    np.testing.assert_allclose([*unit(v).values()], case["unit"], atol=1e-9)


@pytest.mark.parametrize("case", ORACLE["vector_to_weights"], ids=lambda c: c["id"])
def test_weights_of_a_vector(case: dict[str, Any]) -> None:
    v = dict(zip(PAIR, case["vector"], strict=True))
    np.testing.assert_allclose([*unit(v).values()], case["unit"], atol=1e-9)
    assert [*prompt_weights(v).values()] == [case["weight_helpfulness"], case["weight_verbosity"]]


@pytest.mark.parametrize("case", ORACLE["projection"], ids=lambda c: c["id"])
def test_projection(case: dict[str, Any]) -> None:
    outputs = np.array(case["rm_outputs_10"]).T[:, None]
    for name, helpfulness in (
        ("helpfulness=index9_ultrafeedback", 9),
        ("helpfulness=index0_helpsteer", 0),
    ):
        attributes = [f"output {i}" for i in range(10)]
        attributes[helpfulness], attributes[4] = PAIR
        scores = project(dict(zip(PAIR, case["unit"], strict=True)), outputs, attributes)
        np.testing.assert_allclose(scores[0], case["expected"][name]["projected"], atol=1e-9)
        assert int(scores[0].argmax()) == case["expected"][name]["argmax_first"]


@settings(deadline=None)
@given(directions, st.floats(1e-3, 1e3))
def test_a_direction_has_no_length(direction: dict[str, float], factor: float) -> None:
    v = unit(direction)
    assert math.isclose(math.hypot(*v.values()), 1.0, rel_tol=1e-12)
    assert list(v) == list(direction)
    scaled = {name: weight * factor for name, weight in direction.items()}
    if all(math.isfinite(w) and (w == 0) == (direction[name] == 0) for name, w in scaled.items()):
        np.testing.assert_allclose([*unit(scaled).values()], [*v.values()], atol=1e-12)
    assert all(abs(weight) <= 100 for weight in prompt_weights(direction).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"direction\.b"):
        unit({"a": 1.0, "b": value})


@pytest.mark.parametrize("direction", [{}, {"a": 0.0}, {"a": 0.0, "b": -0.0}])
def test_no_length_is_refused(direction: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no length"):
        unit(direction)


def test_half_is_rounded_to_even() -> None:
    assert [
        Prompting(("a",), scale=scale).weights({"a": 1.0})["a"] for scale in (1.5, 2.5, 3.5)
    ] == [2, 2, 4]


def test_attributes_that_are_not_named_weigh_nothing() -> None:
    assert system_prompt({"verbosity": -3.0}).endswith("helpfulness*0 + verbosity*-100")
    assert system_prompt({"verbosity": 1.0, "helpfulness": 1.0}).endswith(
        "helpfulness*71 + verbosity*71"
    ), "in the template's order"
    assert system_prompt({"warmth": 1.0}).endswith("= warmth*100")


def test_a_template_of_ones_own() -> None:
    prompting = Prompting(
        ("warmth", "depth", "brevity"),
        "Aim: {weights}.",
        "{attribute} {weight}",
        ", ",
        scale=10,
        decimals=1,
    )
    assert (
        prompting.sentence({"brevity": 3.0, "warmth": 4.0})
        == "Aim: warmth 8.0, depth 0.0, brevity 6.0."
    )


def planned(
    messages: list[dict[str, Any]], direction: dict[str, float], **settings: Any
) -> PlanDraft:
    plan = PlanDraft(
        (Draw({"messages": messages}),),
        messages=messages,
        sections=Sections(Prompting(**settings)),
    )
    return DPA(direction).apply(plan)


USER = {"role": "user", "content": "hello"}
PARTS = [{"type": "text", "text": "Be kind."}]


@pytest.mark.parametrize(
    ("messages", "conditioned"),
    [
        ([USER], [{"role": "system", "content": SENTENCE}, USER]),
        (
            [{"role": "system", "content": "Be kind."}, USER],
            [{"role": "system", "content": f"{SENTENCE}\n\nBe kind."}, USER],
        ),
        (
            [{"role": "system", "content": ""}, USER],
            [{"role": "system", "content": SENTENCE}, USER],
        ),
        (
            [{"role": "developer", "content": PARTS, "name": "x"}, USER],
            [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": f"{SENTENCE}\n\nBe kind."}],
                    "name": "x",
                },
                USER,
            ],
        ),
        (
            [
                USER,
                {"role": "assistant", "content": "hi"},
                {"role": "system", "content": "late"},
                USER,
            ],
            [
                {"role": "system", "content": SENTENCE},
                USER,
                {"role": "assistant", "content": "hi"},
                {"role": "system", "content": "late"},
                USER,
            ],
        ),
    ],
)
def test_it_stands_before_the_clients_own_words(messages: Any, conditioned: Any) -> None:
    before = json.dumps(messages)
    plan = planned(messages, {"helpfulness": 2.0})
    assert plan.draws[0].body["messages"] == conditioned
    assert plan.draws[0].direction == plan.direction == {"helpfulness": 1.0, "verbosity": 0.0}
    assert [*plan.messages] == messages, "what rewards read"
    assert json.dumps(messages) == before


def test_in_the_user_turn() -> None:
    plan = planned(
        [USER, {"role": "assistant", "content": "hi"}, USER], {"helpfulness": 1.0}, placement="user"
    )
    assert [m["content"] for m in plan.draws[0].body["messages"]] == [
        "hello",
        "hi",
        f"{SENTENCE}\n\nhello",
    ]


def test_attributes_of_rewards_are_known_too() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'verbosity'") as refused:
        planned([USER], {"verbosty": 1.0})
    assert refused.value.param == "align.dpa.direction.verbosty"
    plan = PlanDraft((Draw({"messages": [USER]}),), messages=[USER], attributes=("warmth",))
    assert DPA({"warmth": 1.0}).apply(plan).direction == {"warmth": 1.0}


def test_a_text_completion_has_no_place_for_it() -> None:
    plan = PlanDraft((Draw({"prompt": "x"}, kind="completion"),))
    with pytest.raises(InvalidRequest, match="/v1/chat/completions"):
        DPA({"helpfulness": 1.0}).apply(plan)


def test_a_projection_looks_at_what_weighs() -> None:
    values = np.array([[[1.0, 2.0]], [[np.nan, np.nan]], [[10.0, np.nan]]])
    np.testing.assert_array_equal(
        project({"a": 1.0, "b": 0.0}, values, ("a", "b", "c")), [[1.0, 2.0]]
    )
    np.testing.assert_array_equal(
        project({"a": 0.6, "c": 0.8}, values, ("a", "b", "c")), [[8.6, np.nan]]
    )
    with pytest.raises(ValueError, match="not scored"):
        project({"d": 1.0}, values, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"template": "Be {weight} nice"}, "{weights} in template"),
        ({"term": "x"}, "{attribute} and {weight} in term"),
        ({"attributes": ["a", "a"]}, "each attribute appears once"),
        ({"trained_range": {"wit": [0, 1]}}, "wit is [0.0, 1.0]"),
        ({"trained_range": {"verbosity": [0.5, 0.2]}}, "verbosity is [0.5, 0.2]"),
        ({"trained_range": {"verbosity": [0, 2]}}, "from -1 to 1"),
    ],
)
def test_a_sentence_that_would_not_say_the_direction_is_refused(section: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Prompting, section, "dpa", ConfigError)
    assert message in caught.value.message
