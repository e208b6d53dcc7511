"""The unchanged OpenAI SDK: its requests work, and errors become the SDK's exceptions."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

USER: Any = [{"role": "user", "content": "hello there"}]
BEST: Any = {"align": {"best_of_n": {"n": 5}}}


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER)
    assert answer.choices[0].message.content == "candidate 3"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    ) == (2, 2, 4)
    assert "align" not in (answer.model_extra or {})


def test_best_of_n_in_one_line(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=USER, extra_body={"align": {"best_of_n": {"n": 5}}}
    )
    assert answer.choices[0].message.content == "candidate 9"
    align = (answer.model_extra or {})["align"]
    assert align["selected"] == 2, "ties go to the lowest index"
    assert align["methods"] == ["best_of_n"]
    assert [c["objective"] for c in align["candidates"]] == [3, 1, 9, 9, 5]


def test_preset_by_model_name_only(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake@best", messages=USER)
    assert answer.choices[0].message.content == "candidate 9"
    assert answer.model == "fake@best"


def test_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="fake", messages=USER, stream=True) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "candidate 3"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert all(c.usage is None for c in chunks)
    assert len({c.id for c in chunks}) == 1


def test_stream_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert all(c.usage is None for c in chunks[:-1])


@pytest.mark.parametrize("usage", [False, True])
def test_stream_with_a_selection_ends_with_align(client: openai.OpenAI, usage: bool) -> None:
    options: Any = {"include_usage": usage}
    with client.chat.completions.create(
        model="fake", messages=USER, stream=True, stream_options=options, extra_body=BEST
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "candidate 9"
    aligned = [c for c in chunks if "align" in (c.model_extra or {})]
    assert aligned == [chunks[-1]]
    assert (chunks[-1].model_extra or {})["align"]["selected"] == 2


def test_stream_helper_of_the_sdk(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=USER, n=2) as stream:
        final = stream.until_done().get_final_completion()
    assert [c.message.content for c in final.choices] == ["candidate 3", "candidate 1"]


def test_stream_of_several_choices(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    ends = {}
    with client.chat.completions.create(model="fake", messages=USER, n=3, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ends[choice.index] = choice.finish_reason
    assert texts == {0: "candidate 3", 1: "candidate 1", 2: "candidate 9"}
    assert ends == {0: "stop", 1: "stop", 2: "stop"}


def test_n_without_align_is_plain_sampling(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, n=3)
    assert [c.message.content for c in answer.choices] == [
        "candidate 3",
        "candidate 1",
        "candidate 9",
    ]
    assert [c.index for c in answer.choices] == [0, 1, 2]


def test_n_with_best_of_n_returns_the_n_best(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, n=3, extra_body=BEST)
    assert [c.message.content for c in answer.choices] == [
        "candidate 9",
        "candidate 9",
        "candidate 5",
    ]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (6, 4)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="once upon", max_tokens=8)
    assert answer.choices[0].text == "candidate 3"
    best = client.completions.create(
        model="fake", prompt="once upon", max_tokens=8, extra_body=BEST
    )
    assert best.choices[0].text == "candidate 9"
    with client.completions.create(
        model="fake", prompt="once upon", max_tokens=8, stream=True, extra_body=BEST
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == "candidate 9"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["fake", "fake@best", "fake@three"]
    assert client.models.retrieve("fake@best").id == "fake@best"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("fake@worst")


async def _gather(base_url: str, count: int) -> list[str | None]:
    async with openai.AsyncOpenAI(
        base_url=base_url, api_key="unused", max_retries=0, timeout=60
    ) as client:

        async def one(i: int) -> str | None:
            if i % 2:
                answer = await client.chat.completions.create(
                    model="fake", messages=USER, seed=i, extra_body=BEST
                )
                return answer.choices[0].message.content
            text = ""
            async with await client.chat.completions.create(
                model="fake", messages=USER, stream=True
            ) as stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
            return text

        return await asyncio.gather(*(one(i) for i in range(count)))


@pytest.mark.slow
def test_64_async_clients_at_once(numbers: Any) -> None:
    texts = asyncio.run(_gather(numbers.base_url, 64))
    assert texts == ["candidate 3", "candidate 9"] * 32
    assert numbers.idle()


def test_tool_calls_pass_through_unchanged(serve: Any) -> None:
    function = '{name = "weather", arguments = "{\\"city\\": \\"Oslo\\"}"}'
    call = f'{{id = "call_1", type = "function", function = {function}}}'
    live = serve(
        f'[engine]\nkind = "fake"\nreplies = [{{text = "", tool_calls = [{call}]}}]\n'
        '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
    )
    tools: Any = [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    ]
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        for extra in ({}, {"align": {"best_of_n": {"n": 2}}}):
            answer = client.chat.completions.create(
                model="fake", messages=USER, tools=tools, tool_choice="auto", extra_body=extra
            )
            calls: Any = answer.choices[0].message.tool_calls
            assert answer.choices[0].finish_reason == "tool_calls"
            assert calls[0].function.name == "weather"
            assert calls[0].function.arguments == '{"city": "Oslo"}'
            assert live.engine.bodies[-1]["tools"] == tools
            assert live.engine.bodies[-1]["tool_choice"] == "auto"
            with client.chat.completions.stream(
                model="fake", messages=USER, tools=tools, extra_body=extra
            ) as stream:
                streamed: Any = stream.get_final_completion().choices[0]
            assert streamed.message.tool_calls[0].function.arguments == '{"city": "Oslo"}', (
                f"streamed with {extra}"
            )
            assert streamed.finish_reason == "tool_calls"


def test_fields_we_do_not_model_reach_the_engine(numbers: Any, client: openai.OpenAI) -> None:
    fields: Any = {
        "temperature": 0.3,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["never said"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": 1},
        "user": "me",
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "top_logprobs": 2,
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
    }
    unknown = {"min_p": 0.05, "guided_regex": "a+", "custom_field": {"deep": [1, 2]}}
    client.chat.completions.create(
        model="fake", messages=USER, **fields, extra_body={**unknown, **BEST}
    )
    sent = numbers.engine.bodies[-1]
    assert {key: sent[key] for key in [*fields, *unknown]} == {**fields, **unknown}
    assert "align" not in sent


def test_roles_and_history_are_kept(numbers: Any, client: openai.OpenAI) -> None:
    call: Any = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be kind"}, {"type": "text", "text": "always"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    client.chat.completions.create(model="fake", messages=messages, extra_body=BEST)
    assert numbers.engine.bodies[-1]["messages"] == messages


# --- errors, as the SDK's own classes ---


def test_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="fake", messages=USER, extra_body={"align": {"best_of": {"n": 5}}}
        )
    assert caught.value.param == "align.best_of"
    assert caught.value.code == "unknown_field"
    assert "did you mean 'best_of_n'?" in caught.value.message


def test_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="fake@bset", messages=USER)
    assert caught.value.code == "model_not_found"
    assert "did you mean 'fake@best'?" in caught.value.message


def test_authentication(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SDK_KEYS", "alpha, beta")
    live = serve('[server]\napi_keys_env = "TEST_SDK_KEYS"\n[engine]\nkind = "fake"\n')
    for key in ("alpha", "beta"):
        with openai.OpenAI(base_url=live.base_url, api_key=key, max_retries=0) as client:
            assert client.chat.completions.create(model="fake", messages=USER).choices
    with openai.OpenAI(base_url=live.base_url, api_key="alph", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="fake", messages=USER)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_rate_limit(serve: Any) -> None:
    live = serve('[limits]\nrequests_per_minute = 2\n[engine]\nkind = "fake"\n')
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        client.chat.completions.create(model="fake", messages=USER)
        client.chat.completions.create(model="fake", messages=USER)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="fake", messages=USER)
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (None, openai.InternalServerError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
        (400, openai.BadRequestError),
    ],
)
def test_an_engine_failure_keeps_its_status(
    serve: Any, status: int | None, error: type[openai.APIStatusError]
) -> None:
    usage = "" if status is None else f", status = {status}"
    live = serve(
        f'[engine]\nkind = "fake"\nreplies = [{{text = "", error = "the GPU fell off"{usage}}}]\n'
    )
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        with pytest.raises(error) as caught:
            client.chat.completions.create(model="fake", messages=USER)
        assert caught.value.status_code == (status or 502)
        assert "the GPU fell off" in caught.value.message
        assert caught.value.code == ("rate_limit_exceeded" if status == 429 else "engine_failed")


def test_a_failure_before_the_first_token_of_a_stream_has_its_own_status(serve: Any) -> None:
    selection = '[rewards.brevity]\nkind = "rules"\nwords_weight = -1.0\n'
    live = serve(
        '[engine]\nkind = "fake"\nreplies = [{text = "x", first_token_seconds = 3600}]\n'
        f"{selection}"
    )
    budget = {"align": {"budget": {"deadline_seconds": 0.2}}}
    client = openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0)
    with client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="fake", messages=USER, stream=True, extra_body=budget)
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(serve: Any) -> None:
    live = serve(
        '[engine]\nkind = "fake"\nreplies = [{text = "one two three", '
        'error = "the GPU fell off", seconds_per_token = 0.02}]\n'
    )
    text = ""
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        stream = iter(client.chat.completions.create(model="fake", messages=USER, stream=True))
        while text != "one two three":
            text += next(stream).choices[0].delta.content or ""
        with pytest.raises(openai.APIError, match="the GPU fell off"):
            next(stream)
    assert text == "one two three", "what was sampled before the failure arrives"
    assert live.idle()


def test_connection_error_is_the_sdks_too() -> None:
    client = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.APIConnectionError):
        client.models.list()
