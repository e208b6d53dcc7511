"""Guidance by prompts over HTTP: the embedded demo, used from the OpenAI SDK."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import infer_align
from infer_align.demo import world

pytestmark = pytest.mark.slow

QUESTIONS = world.prompts(6, seed=12)


@pytest.fixture(scope="module")
def live(serve: Callable[[str], Any]) -> Any:
    demo = Path(infer_align.__file__).parent / "demo" / "infer-align.toml"
    return serve(demo.read_text(encoding="utf-8"))


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0, timeout=60) as sdk:
        yield sdk


def ask(client: openai.OpenAI, align: Any, question: str = QUESTIONS[0], **fields: Any) -> Any:
    options = {"model": "demo", "max_tokens": 48, "seed": 3, **fields}
    return client.chat.completions.create(
        messages=[{"role": "user", "content": question}], extra_body={"align": align}, **options
    )


def helpful(scale: float, **fields: Any) -> dict[str, Any]:
    return {"guidance": {"scale": {"helpful": scale}}, **fields}


def report(answer: Any) -> Any:
    return answer.model_extra["align"]


def gold(client: openai.OpenAI, scale: float) -> float:
    scores: list[float] = []
    for question in QUESTIONS:
        answer = ask(client, helpful(scale), question, n=6)
        messages = [{"role": "user", "content": question}]
        scores += [world.gold_reward(messages, c.message.content) for c in answer.choices]
    return statistics.mean(scores)


def test_the_scale_steers_away_asks_and_goes_beyond_asking(client: openai.OpenAI) -> None:
    away, frozen, asked, beyond = (gold(client, scale) for scale in (-1.0, 0.0, 1.0, 2.5))
    assert away < frozen < asked < beyond


def test_the_report_has_the_traits_and_the_cost(client: openai.OpenAI) -> None:
    answer = ask(client, helpful(2.0))
    align = report(answer)
    assert align["methods"] == ["guidance"]
    assert align["reason"] == "one draw, guided by helpful 2"
    context = align["usage"]["context_tokens"] - answer.usage.completion_tokens
    assert context > answer.usage.prompt_tokens, "the trait's prompt, read once"
    candidates = report(ask(client, helpful(2.0, best_of_n={"n": 5})))["usage"]
    assert candidates["context_tokens"] == context + candidates["candidate_tokens"]
    assert "context_tokens" not in report(ask(client, {"best_of_n": {"n": 2}}))["usage"]


def test_scale_0_is_the_frozen_model_and_costs_nothing(client: openai.OpenAI) -> None:
    zero = ask(client, helpful(0.0))
    assert zero.choices[0].message.content == ask(client, {}).choices[0].message.content
    assert report(zero)["reason"] == "one draw, nothing to compare"
    assert "context_tokens" not in report(zero)["usage"]


def test_a_request_brings_its_own_traits(client: openai.OpenAI) -> None:
    sentence = "weighted rating = helpfulness*98 + verbosity*17"
    guidance = {
        "scale": {"mine": 2.0, "helpful": -0.5},
        "traits": {"mine": {"prompt": sentence, "negative_prompt": "weighted rating ="}},
    }
    align = report(ask(client, {"guidance": guidance}))
    assert align["reason"] == "one draw, guided by mine 2, helpful -0.5"


def test_guidance_composes_with_the_other_methods(client: openai.OpenAI) -> None:
    align = helpful(
        1.5,
        dpa={"direction": {"helpfulness": 1.0, "verbosity": 0.0}},
        rps={"k": 3},
        best_of_n={"n": 2},
        vas={"beta": {"brief": 1.0, "helpful-lookahead": 1.0}},
        rewards={"quality": 1.0, "gold": 0.0},
    )
    answer = ask(client, align)
    again = ask(client, align)
    assert answer.choices[0].message.content == again.choices[0].message.content
    assert len(report(answer)["candidates"]) == 6
    assert set(report(answer)["methods"]) == set(align) - {"rewards"}
    assert report(answer)["usage"]["context_tokens"] > 0
    both = report(ask(client, helpful(1.0, vas={"beta": {"brief": 2.0}})))
    assert both["reason"] == "one draw, guided by helpful 1, steered by vas with beta brief 2"


def test_a_guided_stream_is_the_guided_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"stop": ["."], "logprobs": True}
    whole = ask(client, helpful(2.0), **fields)
    chunks = list(ask(client, helpful(2.0), stream=True, **fields))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].model_extra["align"]["usage"]["context_tokens"] > 0
    entries = whole.choices[0].logprobs.content
    assert any(e.logprob != e.model_extra["aligned_logprob"] for e in entries)


def test_what_is_steered_with_weights_of_0_reports_what_others_do(client: openai.OpenAI) -> None:
    for align in (helpful(0.0), {"vas": {"beta": {"brief": 0.0}}}):
        answer = ask(client, align, logprobs=True)
        entries = answer.choices[0].logprobs.content
        frozen = [entry.logprob for entry in entries]
        assert [e.model_extra["aligned_logprob"] for e in entries] == pytest.approx(frozen)
        assert answer.choices[0].message.content == ask(client, {}).choices[0].message.content


def test_structured_outputs_tools_and_continued_turns_are_guided(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = ask(client, helpful(20.0), response_format=form, max_tokens=200)
    assert json.loads(answer.choices[0].message.content)["a"] in {1, 2}
    function = {"name": "look_up", "parameters": schema}
    called = ask(
        client,
        helpful(-20.0),
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        max_tokens=200,
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["a"] in {1, 2}
    extra = {"align": helpful(2.0), "continue_final_message": True}
    continued = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": "Happy to"},
        ],
        max_tokens=20,
        temperature=0,
        extra_body=extra,
    )
    assert continued.choices[0].message.content.startswith(" help")


def test_a_text_completion_is_guided(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo",
        prompt="What does the owl eat?",
        max_tokens=12,
        n=2,
        seed=1,
        extra_body={"align": helpful(2.0)},
    )
    assert len(answer.choices) == 2
    assert report(answer)["usage"]["context_tokens"] > 24


@pytest.mark.parametrize(
    ("guidance", "param", "words"),
    [
        ({"scale": {"helpfull": 1.0}}, "align.guidance.scale.helpfull", "did you mean 'helpful'"),
        ({"scale": {"helpful": "NaN"}}, "align.guidance.scale.helpful", "number"),
        ({"scale": {"helpful": 21}}, "align.guidance.scale.helpful", "20"),
        ({"scale": {}}, "align.guidance.scale", "1"),
        (
            {"scale": {"a": 1}, "traits": {"a": {"prompt": " "}}},
            "align.guidance.traits.a.prompt",
            "words",
        ),
        (
            {"scale": {"a": 1}, "traits": {"a": {"prompt": "? " * 2000}}},
            "align.guidance.scale.a",
            "tokens and 48 of completion, which do not fit the context of",
        ),
    ],
)
def test_bad_input_is_refused_by_name(
    client: openai.OpenAI, live: Any, guidance: Any, param: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, {"guidance": guidance})
    assert refused.value.param == param
    assert words in refused.value.message


def test_traits_are_listed_and_their_tokens_are_counted(client: openai.OpenAI, live: Any) -> None:
    listed = live.get("/v1/align/methods").json()
    assert listed["traits"]["helpful"]["description"].startswith("More facts")
    assert listed["methods"]["guidance"]["available"]
    assert "guide" in listed["capabilities"]
    before = live.metric("infer_align_tokens_total", kind="context")
    tokens = report(ask(client, helpful(1.0)))["usage"]["context_tokens"]
    assert live.metric("infer_align_tokens_total", kind="context") == before + tokens
