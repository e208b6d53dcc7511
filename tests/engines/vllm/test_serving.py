"""The server over vLLM, with the OpenAI SDK: what vLLM's own server would answer, and the same through best-of-n and steering."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Coroutine
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align import demo
from infer_align.decoding.labels import LabelTree
from infer_align.engines.transformers import Transformers
from infer_align.types import Candidate, Draw, LabelQuery
from tests.server.conftest import Live

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(300),
    # vLLM's own, of the libraries that it imports
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:max_tokens is deprecated:DeprecationWarning"
    ),  # vLLM reads its own field
]

ASK = [{"role": "user", "content": "What are the diet and the colour of the owl?"}]
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


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path(demo.LM))


def blanks(tokenizer: Any) -> dict[str, int]:
    """A bias against white space, which is all that the demo would write into a JSON object."""
    return {str(token): -100 for token in tokenizer.convert_tokens_to_ids(["Ġ", "Ċ", "ĉ", "č"])}


def chat(client: openai.OpenAI, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = {"model": "owl", "messages": ASK, "max_tokens": 24, **fields}
    return client.chat.completions.create(**body, extra_body=extra or {})


def post(live: Live, path: str, body: object, **options: Any) -> httpx2.Response:
    with live.http(headers=KEY) as client:
        return client.post(path, json=body, timeout=60, **options)


# --- without align: plain vLLM ---


@pytest.mark.anyio
async def test_greedy_equals_transformers(live: Live, client: openai.OpenAI) -> None:
    engine = Transformers(threads=1).load()
    await engine.start()
    questions = [
        f"What is the {what} of the {animal}?"
        for what in ("diet", "colour")
        for animal in ("owl", "crow", "bee")
    ]
    for question in questions:
        messages = [{"role": "user", "content": question}]
        (expected,) = await engine.generate(
            Draw({"messages": messages, "temperature": 0, "max_tokens": 40}, seeds=(0,))
        )
        for extra in ({}, {"align": {"best_of_n": {"n": 1}}}):
            found = chat(client, extra, messages=messages, temperature=0, max_tokens=40)
            assert found.choices[0].message.content == expected.text
            assert found.choices[0].finish_reason == expected.finish_reason
            assert found.usage.prompt_tokens == expected.prompt_tokens
            assert found.usage.completion_tokens == expected.completion_tokens
    await engine.close()


def test_what_vllm_answers_beside_the_choices_is_there(live: Live) -> None:
    body = {
        "model": "owl",
        "messages": ASK,
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


def test_several_prompts_and_token_ids(live: Live) -> None:
    for prompts in (["The owl", "The crow"], [[5, 300, 12], [7, 8]]):
        answer = post(
            live, "/v1/completions", {"model": "owl", "prompt": prompts, "max_tokens": 2}
        ).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]


def test_limits_hold_for_them_too(live: Live) -> None:
    refused = post(live, "/v1/chat/completions", {"model": "owl", "messages": ASK, "n": 129})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "n"
    refused = post(
        live, "/v1/completions", {"model": "owl", "prompt": ["x"] * 200, "max_tokens": 2}
    )
    assert refused.json()["error"]["code"] == "too_many_candidates"


# --- the whole OpenAI surface, three ways ---


@ALIGNED
def test_a_stream_says_what_the_answer_says(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    whole = chat(client, extra, seed=5, logprobs=True, top_logprobs=2)
    chunks = list(
        chat(
            client,
            extra,
            seed=5,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert (
        "".join(choice.delta.content or "" for choice in choices)
        == whole.choices[0].message.content
    )
    assert choices[0].delta.role == "assistant"
    assert [c.finish_reason for c in choices if c.finish_reason] == [whole.choices[0].finish_reason]
    said = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.token for entry in said] == [
        entry.token for entry in whole.choices[0].logprobs.content
    ]
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    if extra:
        assert chunks[-1].align["methods"] == whole.align["methods"]


@ALIGNED
def test_seeds(client: openai.OpenAI, extra: dict[str, Any]) -> None:
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
def test_logprobs_and_stop(client: openai.OpenAI, extra: dict[str, Any]) -> None:
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
def test_json_schema(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
    for seed in range(2):
        answer = chat(client, extra, response_format=form, seed=seed, max_tokens=100)
        found = json.loads(answer.choices[0].message.content)
        assert found["animal"] in {"owl", "crow"}
        assert found["legs"] in {2, 4}


@ALIGNED
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "look_up"}}],
    ids=["required", "named"],
)
def test_tools(client: openai.OpenAI, tokenizer: Any, extra: dict[str, Any], choice: Any) -> None:
    fields = {
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 150,
        "seed": 3,
        "logit_bias": blanks(tokenizer),
    }
    answer = chat(client, extra, **fields)
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["animal"] in {"owl", "crow"}
    assert call.id


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_stream_with_tools_is_vllms_own(client: openai.OpenAI, choice: str) -> None:
    def streamed(extra: dict[str, Any]) -> list[Any]:
        fields = {
            "tools": [TOOL],
            "tool_choice": choice,
            "seed": 3,
            "max_tokens": 60,
            "stream": True,
        }
        deltas = [
            chunk.choices[0].delta for chunk in chat(client, extra, **fields) if chunk.choices
        ]
        calls = [call.function for delta in deltas for call in delta.tool_calls or ()]
        # How many tokens a piece holds hangs on how busy the machine is; what they say together does not.
        said = [
            "".join(delta.content or "" for delta in deltas),
            "".join(call.arguments or "" for call in calls),
        ]
        return [*said, *(call.name for call in calls if call.name)]

    assert streamed({"align": {}}) == streamed({}) != ["", ""]


def test_the_chosen_tool_call_is_streamed(client: openai.OpenAI, tokenizer: Any) -> None:
    fields = {
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 150,
        "seed": 3,
        "logit_bias": blanks(tokenizer),
    }
    whole = chat(client, BEST, **fields).choices[0].message.tool_calls
    chunks = list(chat(client, BEST, **fields, stream=True))
    calls = [
        call
        for chunk in chunks
        if chunk.choices
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        (call.function.name, call.function.arguments) for call in whole
    ]
    assert chunks[-1].choices[0].finish_reason in {"tool_calls", "stop"}


@ALIGNED
def test_reasoning(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    regex = r"Here is my thought process: (yes|no) Here is my response: (owl|crow)"
    answer = chat(client, {**extra, "structured_outputs": {"regex": regex}}, max_tokens=120, seed=1)
    message = answer.choices[0].message
    assert message.reasoning.strip() in {"yes", "no"}
    assert message.content.strip() in {"owl", "crow"}


def test_a_preset_by_the_models_name(client: openai.OpenAI) -> None:
    answer = chat(client, model="owl@careful")
    assert answer.align["methods"] == ["best_of_n"]
    assert len(answer.align["candidates"]) == 3
    assert [model.id for model in client.models.list()] == ["owl", "owl@careful"]


@pytest.mark.parametrize("extra", [{}, BEST], ids=["plain", "best-of-n"])
def test_text_completion(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    fields = {"model": "owl", "prompt": "The owl", "max_tokens": 6, "logprobs": 2, "seed": 4}
    extra = {"align": {**extra["align"], "rewards": {"brevity": 1}}} if extra else {}
    answer = client.completions.create(**fields, extra_body=extra)
    assert answer.choices[0].text
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    chunks = list(client.completions.create(**fields, extra_body=extra, stream=True))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        == answer.choices[0].text
    )


def test_steering_changes_the_answer_and_zero_does_not(client: openai.OpenAI) -> None:
    plain = chat(client, temperature=0, max_tokens=40).choices[0].message.content
    zero = chat(
        client, {"align": {"vas": {"beta": {"helpful": 0.0}}}}, temperature=0, max_tokens=40
    )
    away = chat(
        client, {"align": {"vas": {"beta": {"helpful": -20.0}}}}, temperature=0, max_tokens=40
    )
    assert zero.choices[0].message.content == plain
    assert away.choices[0].message.content != plain


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
        "budget": {"completion_tokens": 2000, "deadline_seconds": 30},
    }
    answer = chat(client, {"align": align}, max_tokens=40, seed=2)
    report = answer.align
    assert {*report["methods"]} == {"dpa", "best_of_n", "rps", "early_stop", "vas", "trust_judge"}
    assert len(report["candidates"]) == 6
    alive = [c for c in report["candidates"] if not c["error"]]
    assert 1 <= len(alive) < 6
    for candidate in alive:
        assert {
            name for name, score in candidate["scores"].items() if score["value"] is not None
        } == {
            "quality",
            "brevity",
            "trust_judge",
        }
    assert len({tuple(c["direction"].values()) for c in report["candidates"]}) == 3
    assert report["usage"]["judge_calls"] >= len(alive)
    chunks = list(
        client.chat.completions.create(
            model="owl",
            messages=ASK,
            max_tokens=40,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"align": align},
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0


# --- what is refused ---


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
        {"model": "owl", "messages": ASK, "max_tokens": 8, **fields, **extra, field: value},
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
def test_what_could_not_be_honoured_with_align_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    answer = post(live, "/v1/chat/completions", {"model": "owl", "messages": ASK, **BEST, **fields})
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


def test_unknown_models_are_a_404_and_other_keys_a_401(live: Live) -> None:
    assert post(live, "/v1/chat/completions", {"model": "no", "messages": ASK}).status_code == 404
    assert live.post({"model": "owl", "messages": ASK}).status_code == 401


# --- vLLM's other routes ---


def test_other_routes_of_vllm_answer_behind_our_key(live: Live) -> None:
    assert live.post({"model": "owl", "prompt": "The owl"}, "/tokenize").status_code == 401
    tokens = post(live, "/tokenize", {"model": "owl", "prompt": "The owl eats mice"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    words = post(live, "/detokenize", {"model": "owl", "tokens": tokens["tokens"]}).json()
    assert words["prompt"] == "The owl eats mice"
    assert live.get("/version", headers=KEY).json()["version"].startswith("0.32")
    assert live.get("/v1/nothing", headers=KEY).status_code == 404
    assert live.get("/v1/chat/completions", headers=KEY).status_code == 405


def test_responses_of_vllm(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="owl", input="What is the diet of the owl?", max_output_tokens=20, temperature=0
    )
    assert answer.output_text or answer.output


def test_metrics_hold_both(live: Live) -> None:
    text = live.get("/metrics").text
    assert "vllm:num_requests_running" in text
    assert "infer_align_requests_total" in text


# --- what is left is dropped ---

LONG = {"model": "owl", "messages": ASK, "max_tokens": 480, "ignore_eos": True}


def running(live: Live) -> float:
    return live.metric("vllm:num_requests_running") + live.metric("vllm:num_requests_waiting")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "extra", [{"n": 16}, {"align": {"best_of_n": {"n": 16}}}], ids=["plain", "best-of-n"]
)
def test_when_a_client_leaves_vllm_runs_nothing_a_second_later(
    live: Live, extra: dict[str, Any], stream: bool
) -> None:
    body = json.dumps({**LONG, **extra, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert live.until(lambda: live.metric("vllm:num_requests_running") > 0, 5.0)
    left = time.monotonic()
    assert live.until(lambda: running(live) == 0, 1.0), (
        f"{running(live)} still run after {time.monotonic() - left:.2f} s"
    )
    assert live.until(lambda: live.service.admission.running == 0, 1.0)


@pytest.mark.usefixtures("quiet")
def test_a_deadline_answers_with_what_there_is(live: Live) -> None:
    align = {
        "best_of_n": {"n": 24},
        "rewards": {"brevity": 1},
        "budget": {"deadline_seconds": 0.5},
        "details": "candidates",
    }
    answer = post(live, "/v1/chat/completions", {**LONG, "align": align}).json()
    assert answer["align"]["partial"], answer["align"]["timing"]
    cut = [c["choice"] for c in answer["align"]["candidates"] if c["choice"]]
    assert {choice["finish_reason"] for choice in cut} == {"length"}
    assert answer["choices"][0]["message"]["content"]
    assert answer["align"]["usage"]["candidate_tokens"] < 24 * 480
    assert live.until(lambda: running(live) == 0, 1.0)


@pytest.mark.usefixtures("quiet")
def test_losers_are_stopped_early_by_their_value_estimates(
    live: Live, client: openai.OpenAI
) -> None:
    early = {"values": {"helpful": 1.0}, "after": 8}
    align = {"best_of_n": {"n": 8}, "early_stop": early, "rewards": {"quality": 1}}
    options: dict[str, Any] = {"model": "owl", "messages": ASK, "seed": 3, "max_tokens": 200}
    answer = client.chat.completions.create(
        **options, extra_body={"align": align, "ignore_eos": True}
    )
    report = answer.align  # type: ignore[attr-defined]
    stopped = [c for c in report["candidates"] if c["error"]]
    assert [
        c["error"].startswith("stopped early: after 8 tokens, estimate") for c in stopped
    ].count(True) == 4
    assert len(stopped) == 7, "8, 16 and 32 tokens: one is left"
    assert all(c["completion_tokens"] < 200 for c in stopped)
    assert report["candidates"][report["selected"]]["completion_tokens"] == 200
    assert report["usage"]["saved_tokens"] == 8 * 200 - answer.usage.completion_tokens  # type: ignore[union-attr]
    assert live.until(lambda: live.metric("vllm:num_requests_running") == 0, 1)


@pytest.mark.usefixtures("quiet")
def test_who_is_stopped_early_does_not_depend_on_who_was_quick(client: openai.OpenAI) -> None:
    align = {
        "best_of_n": {"n": 8},
        "early_stop": {"values": {"helpful": 1.0}, "after": 6},
        "rewards": {"quality": 1},
    }
    outcomes = set()
    for _ in range(15):
        report = chat(client, {"align": align}, max_tokens=60, seed=3).align
        outcomes.add((report["selected"], tuple(bool(c["error"]) for c in report["candidates"])))
    assert len(outcomes) == 1, "some of them end by themselves while others are compared"


@pytest.mark.anyio
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("deltas", [False, True])
async def test_one_candidate_is_stopped_and_the_others_go_on(live: Live, deltas: bool) -> None:
    draw = Draw(
        {"messages": ASK, "max_tokens": 400, "ignore_eos": True}, 3, (1, 2, 3), deltas=deltas
    )

    async def stopped() -> dict[int, Any]:
        found = {}
        async with live.service.engine.sample(draw) as stream:
            await asyncio.sleep(0.15)
            stream.stop(1)
            async for event in stream:
                if isinstance(event, Candidate):
                    found[event.index] = event
        return found

    found = await inside(live, stopped())
    assert found[1].interrupted
    assert 0 < found[1].completion_tokens < 400
    assert found[1].finish_reason == "length"
    assert [found[i].completion_tokens for i in (0, 2)] == [400, 400]
    assert not found[0].interrupted


@pytest.mark.anyio
@pytest.mark.parametrize(
    "labels", [("1", "5", "100"), tuple(map(str, range(1, 101))), ("12", "1234", "1299")], ids=len
)
async def test_labels_are_read_as_transformers_would(
    live: Live, tokenizer: Any, labels: tuple[str, ...]
) -> None:
    reading = await inside(
        live, live.service.engine.read_labels(LabelQuery(ASK, "Score: ", labels))
    )
    lm = AutoModelForCausalLM.from_pretrained(demo.path(demo.LM), dtype=torch.float32)
    prompt = [
        *tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"],
        *tokenizer.encode("Score: "),
    ]
    tree = LabelTree(tokenizer.get_vocab(), labels)
    read = {}
    for after, tokens in tree.readings.items():
        with torch.inference_mode():
            logprobs = lm(torch.tensor([[*prompt, *after]])).logits[0, -1].double().log_softmax(-1)
        read[after] = {token: float(logprobs[token]) for token in tokens}
    assert reading.logprobs == pytest.approx(tree.logprobs(read), abs=1e-4)
    assert reading.prompt_tokens == len(prompt)
    assert reading.calls == len(read)


async def inside(live: Live, work: Coroutine[Any, Any, Any]) -> Any:
    """In the server's own event loop, where its engine lives."""
    loop = live.server.config.app.state.loading.get_loop()
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
