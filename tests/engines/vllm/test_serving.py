"""The server over vLLM, used through the OpenAI SDK.

Its answers are those of vLLM's own server, and best-of-n and steering support the same fields.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Coroutine
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align import demo
from infer_align.decoding.labels import LabelQuery, LabelTree
from infer_align.engines.transformers import Transformers
from infer_align.steering import EstimateSchedule
from infer_align.types import Candidate, Draw, Estimate
from tests.clients.test_open_webui import BODIES
from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.server.conftest import Live

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    # Warnings of vLLM itself: of the libraries that it imports, and when it reads its own field.
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]

QUESTION = [{"role": "user", "content": "What are the diet and the colour of the owl?"}]
KEY = {"Authorization": "Bearer sesame"}
BEST = {"align": {"best_of_n": {"n": 4}, "rewards": {"quality": 1}}}
STEERED = {"align": {"vas": {"beta": {"helpful": 4.0}}}}
ALIGNED = pytest.mark.parametrize("extra", [{}, BEST, STEERED], ids=["plain", "best-of-n", "vas"])
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["owl", "crow"]}, "legs": {"enum": [2, 4]}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "of an animal",
        "strict": True,
        "parameters": SCHEMA,
    },
}

NAMED = {"type": "function", "function": {"name": "look_up"}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path(demo.LM))


def no_white_space(tokenizer: Any) -> dict[str, int]:
    """Return a logit bias against white space; the demo would write nothing else into JSON."""
    return {str(token): -100 for token in tokenizer.convert_tokens_to_ids(["Ġ", "Ċ", "ĉ", "č"])}


def chat(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = {"model": "owl", "messages": QUESTION, "max_tokens": 24, **fields}
    return client.chat.completions.create(**body, extra_body=extra or {})


def post(live: Live, path: str, body: object, **options: Any) -> httpx2.Response:
    with live.http(headers=KEY) as client:
        return client.post(path, json=body, timeout=LIMIT_SECONDS, **options)


# --- requests without align ---


@pytest.mark.anyio
async def test_greedy_answers_equal_those_of_transformers(
    live: Live, client: openai.OpenAI
) -> None:
    engine = Transformers(threads=1).load()
    await engine.start()
    questions = [
        f"What is the {attribute} of the {animal}?"
        for attribute in ("diet", "colour")
        for animal in ("owl", "crow", "bee")
    ]
    for question in questions:
        messages = [{"role": "user", "content": question}]
        (expected,) = await engine.generate(
            Draw({"messages": messages, "temperature": 0, "max_tokens": 40}, seeds=(0,))
        )
        for extra in ({}, {"align": {"best_of_n": {"n": 1}}}):
            answer = chat(client, extra, messages=messages, temperature=0, max_tokens=40)
            assert answer.choices[0].message.content == expected.text
            assert answer.choices[0].finish_reason == expected.finish_reason
            assert answer.usage.prompt_tokens == expected.prompt_tokens
            assert answer.usage.completion_tokens == expected.completion_tokens
    await engine.close()


def test_vllms_fields_outside_the_choices_are_returned(live: Live) -> None:
    body = {
        "model": "owl",
        "messages": QUESTION,
        "max_tokens": 3,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "n": 2,
    }
    answer = post(live, "/v1/chat/completions", body).json()
    assert len(answer["choices"]) == 2
    assert (
        len(answer["prompt_token_ids"])
        == answer["usage"]["prompt_tokens"]
        == len(answer["prompt_logprobs"])
    )
    assert all(len(choice["token_ids"]) == 3 for choice in answer["choices"])
    assert answer["model"] == "owl"


def test_a_body_may_hold_several_prompts_or_token_ids(live: Live) -> None:
    for prompts in (["The owl", "The crow"], [[5, 300, 12], [7, 8]]):
        answer = post(
            live, "/v1/completions", {"model": "owl", "prompt": prompts, "max_tokens": 2}
        ).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_limits_also_hold_without_align(live: Live) -> None:
    refused = post(live, "/v1/chat/completions", {"model": "owl", "messages": QUESTION, "n": 129})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    refused = post(
        live, "/v1/completions", {"model": "owl", "prompt": ["x"] * 200, "max_tokens": 2}
    )
    assert refused.json()["error"]["code"] == "too_many_candidates"


# --- OpenAI's fields, without align and with two methods ---


@ALIGNED
def test_a_stream_holds_the_same_as_the_answer(
    client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    fields = {"seed": 5, "logprobs": True, "top_logprobs": 2}
    answer = chat(client, extra, **fields)
    stream_fields = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, extra, **fields, **stream_fields))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == answer.choices[0].message.content
    assert choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert reasons == [answer.choices[0].finish_reason]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [entry.token for part in logprobs for entry in part.content]
    assert tokens == [entry.token for entry in answer.choices[0].logprobs.content]
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    if extra:
        assert chunks[-1].align["methods"] == answer.align["methods"]


@ALIGNED
def test_a_seed_fixes_the_answer(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    texts = [chat(client, extra, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_candidates_differ_and_the_first_is_the_plain_answer(client: openai.OpenAI) -> None:
    extra = {"align": {**BEST["align"], "details": "candidates"}}
    best = chat(client, extra, seed=9)
    texts = [candidate["choice"]["message"]["content"] for candidate in best.align["candidates"]]
    assert len(set(texts)) > 1
    assert texts[0] == chat(client, seed=9).choices[0].message.content
    assert best.choices[0].message.content == texts[best.align["selected"]]
    objectives = [candidate["objective"] for candidate in best.align["candidates"]]
    assert best.align["selected"] == objectives.index(max(objectives))
    assert best.usage.completion_tokens == sum(
        candidate["completion_tokens"] for candidate in best.align["candidates"]
    )


@ALIGNED
def test_logprobs_and_stop_are_honoured(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    answer = chat(
        client, extra, logprobs=True, top_logprobs=3, seed=2, stop=[" owl", " crow"], max_tokens=40
    )
    choice = answer.choices[0]
    assert choice.logprobs.content
    assert all(
        len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in choice.logprobs.content
    )
    assert " owl" not in choice.message.content
    if choice.finish_reason == "stop":
        assert choice.stop_reason in {" owl", " crow", None}


@ALIGNED
def test_a_json_schema_is_honoured(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    for seed in range(2):
        answer = chat(client, extra, response_format=form, seed=seed, max_tokens=100)
        content = json.loads(answer.choices[0].message.content)
        assert content["animal"] in {"owl", "crow"}
        assert content["legs"] in {2, 4}


@ALIGNED
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_tool_is_called(
    client: openai.OpenAI, tokenizer: Any, extra: dict[str, Any], choice: Any
) -> None:
    fields = {
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 150,
        "seed": 3,
        "logit_bias": no_white_space(tokenizer),
    }
    answer = chat(client, extra, **fields)
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["animal"] in {"owl", "crow"}
    assert call.id


@ALIGNED
@pytest.mark.parametrize("strict", [True, None])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_is_streamed_as_a_call(
    client: openai.OpenAI, tokenizer: Any, extra: dict[str, Any], choice: Any, strict: bool | None
) -> None:
    # The server has a parser for reasoning, and the grammar leaves no room for any.
    function = {**TOOL["function"], "strict": strict}
    fields = {
        "tools": [{**TOOL, "function": function}],
        "tool_choice": choice,
        "max_tokens": 150,
        "seed": 3,
        "logit_bias": no_white_space(tokenizer),
    }
    whole = chat(client, extra, **fields).choices[0]
    choices = [c.choices[0] for c in chat(client, extra, stream=True, **fields) if c.choices]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    assert not "".join(choice.delta.content or "" for choice in choices)
    assert pieces[0].id
    assert pieces[0].function.name == "look_up"
    streamed = "".join(p.function.arguments or "" for p in pieces if p.index == pieces[0].index)
    arguments = json.loads(whole.message.tool_calls[0].function.arguments)
    assert json.loads(streamed) == arguments
    assert arguments["animal"] in {"owl", "crow"}
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert reasons == [whole.finish_reason]


def test_a_call_that_is_cut_is_no_text(client: openai.OpenAI) -> None:
    fields = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 3, "seed": 3}
    whole = chat(client, **fields).choices[0]
    choices = [c.choices[0] for c in chat(client, stream=True, **fields) if c.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == (whole.message.content or "")
    assert choices[-1].finish_reason == whole.finish_reason == "length"


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_stream_with_tools_equals_vllms_own(client: openai.OpenAI, choice: str) -> None:
    fields = {
        "tools": [TOOL],
        "tool_choice": choice,
        "seed": 3,
        "max_tokens": 60,
        "stream": True,
    }

    def joined(extra: dict[str, Any]) -> list[str]:
        """Return the text, the arguments and the names of the calls.

        The number of tokens per chunk depends on the load of the machine, so chunks are joined.
        """
        chunks = [chunk for chunk in chat(client, extra, **fields) if chunk.choices]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
        text = "".join(delta.content or "" for delta in deltas)
        arguments = "".join(call.arguments or "" for call in calls)
        return [text, arguments, *(call.name for call in calls if call.name)]

    assert joined({"align": {}}) == joined({}) != ["", ""]


def test_the_chosen_tool_call_is_streamed(client: openai.OpenAI, tokenizer: Any) -> None:
    fields = {
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 150,
        "seed": 3,
        "logit_bias": no_white_space(tokenizer),
    }
    calls = chat(client, BEST, **fields).choices[0].message.tool_calls
    chunks = list(chat(client, BEST, **fields, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    streamed = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in streamed] == [
        (call.function.name, call.function.arguments) for call in calls
    ]
    assert chunks[-1].choices[0].finish_reason in {"tool_calls", "stop"}


@ALIGNED
def test_reasoning_is_separated(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    regex = r"Here is my thought process: (yes|no) Here is my response: (owl|crow)"
    answer = chat(client, {**extra, "structured_outputs": {"regex": regex}}, max_tokens=120, seed=1)
    message = answer.choices[0].message
    assert message.reasoning.strip() in {"yes", "no"}
    assert message.content.strip() in {"owl", "crow"}


def test_a_preset_is_chosen_by_the_models_name(client: openai.OpenAI) -> None:
    answer = chat(client, model="owl@careful")
    assert answer.align["methods"] == ["best_of_n"]
    assert len(answer.align["candidates"]) == 3
    assert [model.id for model in client.models.list()] == ["owl", "owl@careful"]


@pytest.mark.parametrize("extra", [{}, BEST], ids=["plain", "best-of-n"])
def test_text_completions_are_answered_and_streamed(
    client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    fields = {"model": "owl", "prompt": "The owl", "max_tokens": 6, "logprobs": 2, "seed": 4}
    extra = {"align": {**extra["align"], "rewards": {"brevity": 1}}} if extra else {}
    answer = client.completions.create(**fields, extra_body=extra)
    assert answer.choices[0].text
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    chunks = list(client.completions.create(**fields, extra_body=extra, stream=True))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].text


def test_steering_changes_the_answer_and_zero_does_not(client: openai.OpenAI) -> None:
    def answer(extra: dict[str, Any]) -> str:
        choices = chat(client, extra, temperature=0, max_tokens=40).choices
        return str(choices[0].message.content)

    def steered(beta: float) -> str:
        return answer({"align": {"vas": {"beta": {"helpful": beta}}}})

    assert steered(0.0) == answer({})
    assert steered(-20.0) != answer({})


def test_all_methods_compose_in_one_request(client: openai.OpenAI) -> None:
    align = {
        "dpa": {"direction": {"helpfulness": 1.0, "verbosity": -0.3}},
        "rps": {"k": 3},
        "best_of_n": {"n": 2},
        "vas": {"beta": {"helpful": 3.0}},
        "early_stop": {"values": {"helpful": 1.0}, "after": 6},
        "rewards": {"quality": 1.0, "brevity": 0.1},
        "trust_judge": {"scale": 10, "criteria": "brief"},
        "ensemble": {"objective": "wco"},
        "budget": {"completion_tokens": 2000, "deadline_seconds": LIMIT_SECONDS},
    }
    answer = chat(client, {"align": align}, max_tokens=40, seed=2)
    report = answer.align
    assert {*report["methods"]} == {"dpa", "best_of_n", "rps", "early_stop", "vas", "trust_judge"}
    assert len(report["candidates"]) == 6
    finished = [c for c in report["candidates"] if not c["error"]]
    assert 1 <= len(finished) < 6
    for candidate in finished:
        scores = candidate["scores"].items()
        scored = {name for name, score in scores if score["value"] is not None}
        assert scored == {"quality", "brevity", "trust_judge"}
    assert len({tuple(c["direction"].values()) for c in report["candidates"]}) == 3
    assert report["usage"]["judge_calls"] >= len(finished)
    chunks = list(
        client.chat.completions.create(
            model="owl",
            messages=QUESTION,
            max_tokens=40,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"align": align},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0


# --- refused requests ---


@pytest.mark.parametrize("extra", [{}, BEST], ids=["plain", "best-of-n"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 7),
        ("stop", 5),
        ("max_tokens", 0),
        ("top_logprobs", 500),
        ("response_format", {"type": "json_schema"}),
        ("logit_bias", {"99999999": 1}),
        ("tools", [{"x": 1}]),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", []),
        ("messages", "x"),
        ("n", 0),
        ("seed", "x"),
        ("max_tokens", "x"),
        ("tool_choice", "sometimes"),
        ("min_p", 3),
    ],
)
def test_a_wrong_field_is_a_400_in_openais_shape(
    live: Live, extra: dict[str, Any], field: str, value: object
) -> None:
    fields = {"logprobs": True} if field == "top_logprobs" else {}
    answer = post(
        live,
        "/v1/chat/completions",
        {"model": "owl", "messages": QUESTION, "max_tokens": 8, **fields, **extra, field: value},
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert {"message", "type", "param", "code"} <= error.keys()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"align": {"vas": {"beta": {"helpfull": 1}}}}, "align.vas.beta.helpfull"),
        ({"align": {"vas": {"beta": {"helpful": 1}}}, "use_beam_search": True}, "use_beam_search"),
    ],
)
def test_a_field_that_align_cannot_honour_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    answer = post(
        live, "/v1/chat/completions", {"model": "owl", "messages": QUESTION, **BEST, **fields}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_prompt_over_the_context_is_a_400(live: Live) -> None:
    for extra in ({}, BEST):
        body = {
            "model": "owl",
            "messages": [{"role": "user", "content": "the owl " * 600}],
            "max_tokens": 4,
            **extra,
        }
        assert post(live, "/v1/chat/completions", body).status_code == 400


@pytest.mark.parametrize(
    "messages", [[{"role": "", "content": "0"}], [{"role": "user", "content": [{"type": "ü"}]}]]
)
@pytest.mark.parametrize(
    "align",
    [
        {"best_of_n": {"n": 2}, "rewards": {"brevity": 1}},
        {"best_of_n": {"n": 1}, "adaptive": {"max_n": 2, "batch": 1}, "rewards": {"brevity": 1}},
        {"best_of_n": {"n": 1}, "rewards": {"brevity": 1}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_vllm_refuses_is_named(
    live: Live, messages: Any, align: Any, stream: bool
) -> None:
    body = {"messages": messages, "align": align, "stream": stream}
    answer = post(live, "/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith("messages: ")


def test_an_unknown_model_is_a_404_and_an_unknown_key_a_401(live: Live) -> None:
    assert (
        post(live, "/v1/chat/completions", {"model": "no", "messages": QUESTION}).status_code == 404
    )
    assert live.post({"model": "owl", "messages": QUESTION}).status_code == 401


# --- vLLM's other routes ---


def test_vllms_other_routes_need_the_servers_key(live: Live) -> None:
    assert live.post({"model": "owl", "prompt": "The owl"}, "/tokenize").status_code == 401
    tokens = post(live, "/tokenize", {"model": "owl", "prompt": "The owl eats mice"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    words = post(live, "/detokenize", {"model": "owl", "tokens": tokens["tokens"]}).json()
    assert words["prompt"] == "The owl eats mice"
    assert live.get("/version", headers=KEY).json()["version"].startswith("0.32")
    # Errors have OpenAI's form, also for what vLLM's application does not serve.
    for answer, status in (
        (live.get("/v1/nothing", headers=KEY), 404),
        (live.get("/tokenize", headers=KEY), 405),
        (live.get("/v1/chat/completions", headers=KEY), 405),
        (post(live, "/v1/rerank", {"model": "no", "query": "a", "documents": ["b"]}), 404),
    ):
        assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_vllms_responses_api_answers(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="owl", input="What is the diet of the owl?", max_output_tokens=20, temperature=0
    )
    assert answer.output_text or answer.output


def test_the_metrics_hold_vllms_and_our_own(live: Live) -> None:
    text = live.get("/metrics").text
    assert "vllm:num_requests_running" in text
    assert "infer_align_requests_total" in text


# --- requests that end early ---

MAX_TOKENS = 480
LONG = {"model": "owl", "messages": QUESTION, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def is_idle(live: Live) -> bool:
    """Return True if vLLM has no request."""
    running = live.metric("vllm:num_requests_running")
    return not running and not live.metric("vllm:num_requests_waiting")


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "extra", [{"n": 16}, {"align": {"best_of_n": {"n": 16}}}], ids=["plain", "best-of-n"]
)
def test_when_a_client_leaves_vllm_generates_no_more(
    live: Live, extra: dict[str, Any], stream: bool
) -> None:
    generated = live.metric("vllm:generation_tokens_total")
    body = json.dumps({**LONG, **extra, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head.encode() + body)
        assert live.until(lambda: not is_idle(live), LIMIT_SECONDS)
    assert live.until(lambda: is_idle(live), LIMIT_SECONDS)
    assert live.until(lambda: live.service.admission.running == 0, LIMIT_SECONDS)
    generated = live.metric("vllm:generation_tokens_total") - generated
    assert generated < 16 * MAX_TOKENS, "the requests were aborted before their end"


@pytest.mark.usefixtures("idle")
def test_at_a_deadline_the_answer_is_the_best_so_far(live: Live) -> None:
    # The machine has to generate one token in this time, but not all of 60 x 480.
    align = {
        "best_of_n": {"n": 60},
        "rewards": {"brevity": 1},
        "budget": {"deadline_seconds": 1.5},
        "details": "candidates",
    }
    answer = post(live, "/v1/chat/completions", {**LONG, "align": align}).json()
    assert answer["align"]["partial"], answer["align"]["timing"]
    choices = [candidate["choice"] for candidate in answer["align"]["candidates"]]
    assert {choice["finish_reason"] for choice in choices if choice} == {"length"}
    assert answer["choices"][0]["message"]["content"]
    assert answer["align"]["usage"]["candidate_tokens"] < 60 * MAX_TOKENS
    assert live.until(lambda: is_idle(live), LIMIT_SECONDS)


@pytest.mark.usefixtures("idle")
def test_candidates_are_stopped_early_by_their_value_estimates(
    live: Live, client: openai.OpenAI
) -> None:
    align = {
        "best_of_n": {"n": 8},
        "early_stop": {"values": {"helpful": 1.0}, "after": 8},
        "rewards": {"quality": 1},
    }
    fields = {"seed": 3, "max_tokens": 200}
    answer = chat(client, {"align": align, "ignore_eos": True}, **fields)
    report = answer.align
    stopped = [candidate for candidate in report["candidates"] if candidate["error"]]
    first_round = "stopped early: after 8 tokens, estimate"
    assert [c["error"].startswith(first_round) for c in stopped].count(True) == 4
    assert len(stopped) == 7, "after 8, 16 and 32 tokens, half of the candidates are stopped"
    assert all(candidate["completion_tokens"] < 200 for candidate in stopped)
    assert report["candidates"][report["selected"]]["completion_tokens"] == 200
    assert report["usage"]["saved_tokens"] == 8 * 200 - answer.usage.completion_tokens
    assert live.until(lambda: is_idle(live), LIMIT_SECONDS)


@pytest.mark.usefixtures("idle")
def test_early_stopping_does_not_depend_on_the_order_of_arrival(client: openai.OpenAI) -> None:
    # Some candidates end by themselves while others are compared.
    align = {
        "best_of_n": {"n": 8},
        "early_stop": {"values": {"helpful": 1.0}, "after": 6},
        "rewards": {"quality": 1},
    }
    outcomes = set()
    for _ in range(15):
        report = chat(client, {"align": align}, max_tokens=60, seed=3).align
        stopped = tuple(bool(candidate["error"]) for candidate in report["candidates"])
        outcomes.add((report["selected"], stopped))
    assert len(outcomes) == 1


@pytest.mark.anyio
@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("deltas", [False, True])
async def test_one_candidate_is_stopped_and_the_others_go_on(live: Live, deltas: bool) -> None:
    draw = Draw(
        {"messages": QUESTION, "max_tokens": MAX_TOKENS, "ignore_eos": True},
        3,
        (1, 2, 3),
        estimates=EstimateSchedule({"helpful": 1.0}, 2),
        deltas=deltas,
    )

    async def sample() -> dict[int, Candidate]:
        """Stop candidate 1 when its first estimate arrives."""
        candidates = {}
        async with live.service.engine.sample(draw) as stream:
            async for event in stream:
                if isinstance(event, Estimate) and event.index == 1:
                    stream.stop(1)
                elif isinstance(event, Candidate):
                    candidates[event.index] = event
        return candidates

    candidates = await run_in_server(live, sample())
    assert candidates[1].interrupted
    assert 0 < candidates[1].completion_tokens < MAX_TOKENS
    assert candidates[1].finish_reason == "length"
    assert [candidates[i].completion_tokens for i in (0, 2)] == [MAX_TOKENS, MAX_TOKENS]
    assert not candidates[0].interrupted


@pytest.mark.anyio
@pytest.mark.parametrize(
    "labels", [("1", "5", "100"), tuple(map(str, range(1, 101))), ("12", "1234", "1299")], ids=len
)
async def test_label_probabilities_equal_those_of_transformers(
    live: Live, tokenizer: Any, labels: tuple[str, ...]
) -> None:
    query = LabelQuery(QUESTION, "Score: ", labels)
    result = await run_in_server(live, live.service.engine.read_labels(query))
    lm = AutoModelForCausalLM.from_pretrained(demo.path(demo.LM), dtype=torch.float32)
    prompt = [
        *tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"],
        *tokenizer.encode("Score: "),
    ]
    tree = LabelTree(tokenizer.get_vocab(), labels)
    expected = {}
    for path, tokens in tree.readings.items():
        with torch.inference_mode():
            logits = lm(torch.tensor([[*prompt, *path]])).logits[0, -1]
        logprobs = logits.double().log_softmax(-1)
        expected[path] = {token: float(logprobs[token]) for token in tokens}
    assert result.logprobs == pytest.approx(tree.logprobs(expected), abs=1e-4)
    assert result.prompt_tokens == len(prompt)
    assert result.calls == len(expected)


async def run_in_server(live: Live, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in the event loop of the server, where its engine lives."""
    loop = live.server.config.app.state.loading.get_loop()
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


# --- lists of prompts ---


@pytest.mark.parametrize("extra", [{}, BEST, STEERED], ids=["plain", "best-of-n", "vas"])
def test_a_list_of_prompts_is_answered_in_order(
    client: openai.OpenAI, extra: dict[str, Any]
) -> None:
    prompts = ["the owl eats", "The crow is"]
    fields: dict[str, Any] = {"model": "owl", "max_tokens": 6, "seed": 3, "extra_body": extra}
    together = client.completions.create(prompt=prompts, **fields)
    alone = [client.completions.create(prompt=prompt, **fields) for prompt in prompts]
    assert [choice.index for choice in together.choices] == [0, 1]
    texts = [choice.text for choice in together.choices]
    assert texts == [answer.choices[0].text for answer in alone]
    chunks = client.completions.create(prompt=prompts, stream=True, **fields)
    streamed = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts


# --- requests of clients ---


@pytest.mark.parametrize("shape", BODIES)
def test_requests_of_open_webui_are_answered(live: Live, shape: str) -> None:
    answer = post(live, "/v1/chat/completions", {"model": "owl", **BODIES[shape]})
    assert answer.status_code == 200, answer.text
    if BODIES[shape]["stream"]:
        assert answer.text.rstrip().endswith("data: [DONE]")
    else:
        assert answer.json()["choices"][0]["message"]["role"] == "assistant"
