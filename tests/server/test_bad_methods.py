"""`guidance` and `select` without what they need are refused by name, before every engine."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

SECTIONS = """
[rewards.brief]
kind = "rules"
words_weight = -1.0
[rewards.kind]
kind = "rules"
regex = "please"
[traits.polite]
prompt = "Answer politely."
"""
TWO = {"best_of_n": {"n": 2}}
LONG = "very " * 1500

CASES: list[tuple[Any, str, str]] = [
    ({"guidance": {"scale": {"polit": 1}}}, "guidance.scale.polit", "did you mean 'polite'?"),
    ({"guidance": {"scale": {"polite": "NaN"}}}, "guidance.scale.polite", "'NaN' is not allowed"),
    (
        {"guidance": {"scale": {"x": 1}, "traits": {"x": {"prompt": ""}}}},
        "guidance.traits.x.prompt",
        "'' is not allowed; must be words",
    ),
    (
        {"guidance": {"scale": {"x": 1}, "traits": {"x": {"prompt": "a", "negative_prompt": " "}}}},
        "guidance.traits.x.negative_prompt",
        "' ' is not allowed; must be words",
    ),
    (
        {**TWO, "rewards": {"brief": 1}, "select": {"rule": "minimax"}},
        "select.rule",
        "this plan has brief alone; give several rewards a weight over 0, or add a judge",
    ),
    (
        {**TWO, "rewards": {"brief": 1}, "select": {"rule": "win_rate"}},
        "select.rule",
        'trust_judge = {"mode": "pairwise"}',
    ),
    (
        {**TWO, "rewards": {"brief": 1, "kin": 1}, "select": {"rule": "maxmin"}},
        "rewards.kin",
        "did you mean 'kind'?",
    ),
    (
        {
            **TWO,
            "rewards": {"brief": 1, "kind": 1},
            "select": {"rule": "lexicographic", "order": ["kind", "short"]},
        },
        "select.order",
        "needs 'short' among the rewards with a weight over 0",
    ),
    (
        {**TWO, "rewards": {"brief": 1}, "select": {"rule": "lexicographic", "margin": "NaN"}},
        "select.margin",
        "'NaN' is not allowed",
    ),
]


@pytest.fixture(scope="module")
def engines(serve: Any) -> dict[str, Any]:
    """A server before each kind of engine that starts without vLLM."""
    demo = serve(f'[engine]\nkind = "transformers"\nmodel = "demo"\n{SECTIONS}')
    upstream = f'[engine]\nkind = "openai"\nurls = "{demo.base_url}"\ntokenizer = "demo"\n'
    return {
        "fake": serve(f'[engine]\nkind = "fake"\n{SECTIONS}'),
        "transformers": demo,
        "openai": serve(upstream + SECTIONS),
    }


def refused(live: Any, keys: Any) -> Any:
    answer = live.chat(keys, max_tokens=4)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fake", "transformers", "openai"])
def test_bad_input_is_refused_by_name_before_every_engine(
    engines: dict[str, Any], kind: str
) -> None:
    for keys, param, words in CASES:
        error = refused(engines[kind], keys)
        assert error["param"] == f"align.{param}"
        assert error["message"].startswith(f"align.{param}: ")
        assert words in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "openai"])
def test_a_context_over_the_length_of_the_model_is_refused_by_name(
    engines: dict[str, Any], kind: str
) -> None:
    guidance = {"scale": {"long": 1}, "traits": {"long": {"prompt": LONG}}}
    error = refused(engines[kind], {"guidance": guidance})
    assert error["param"] == "align.guidance.scale.long"
    assert "tokens" in error["message"]
    assert "shorten" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fake", "transformers", "openai"])
def test_a_scale_that_is_no_json_number_is_refused(engines: dict[str, Any], kind: str) -> None:
    live = engines[kind]
    body = b'{"messages": [], "align": {"guidance": {"scale": {"polite": NaN}}}}'
    answer = live.post(body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_json", "align.guidance.scale.polite")
    assert "NaN is not a JSON number; write a finite number" in error["message"]


@pytest.mark.slow
def test_an_engine_that_guides_nothing_says_so(engines: dict[str, Any]) -> None:
    error = refused(engines["fake"], {"guidance": {"scale": {"polite": 1}}})
    assert error["param"] == "align.guidance"
    assert "the engine of 'fake' lacks" in error["message"]
