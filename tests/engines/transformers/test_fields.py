"""Tests of the request fields that the engine honours or refuses, and of logprobs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from infer_align.decoding.text import token_bytes
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.types import Draw

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def one(engine, finish, request):
    (candidate,), deltas = await finish(engine, request)
    return candidate, deltas


async def test_max_tokens_min_tokens_and_ignore_eos(serving, draw, finish):
    async with serving() as engine:
        # The bias makes the end of sequence the first token.
        bias = {"1": 100.0}
        candidate, _ = await one(engine, finish, draw(logit_bias=bias, max_tokens=9))
        assert (candidate.finish_reason, candidate.completion_tokens, candidate.text) == (
            "stop",
            1,
            "",
        )
        candidate, _ = await one(engine, finish, draw(logit_bias=bias, max_tokens=9, min_tokens=4))
        assert (candidate.finish_reason, candidate.completion_tokens) == ("stop", 5)
        candidate, _ = await one(
            engine, finish, draw(logit_bias=bias, max_tokens=9, ignore_eos=True)
        )
        assert (candidate.finish_reason, candidate.completion_tokens, candidate.text) == (
            "length",
            9,
            "",
        )
        candidate, _ = await one(
            engine, finish, draw(max_completion_tokens=3, max_tokens=9, ignore_eos=True)
        )
        assert candidate.completion_tokens == 3
        candidate, _ = await one(engine, finish, draw(kind="completion", ignore_eos=True))
        assert candidate.completion_tokens == 16, "OpenAI's default for text completions"
        candidate, _ = await one(engine, finish, draw(ignore_eos=True))
        assert candidate.prompt_tokens + candidate.completion_tokens == engine.context_length


async def test_a_stop_string_within_min_tokens_does_not_count(serving, draw, finish):
    fields = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "logit_bias": {"65": 100}}
    async with serving() as engine:
        complete, _ = await one(engine, finish, draw("sun", **fields))
        letter = complete.text[0]
        assert complete.text == letter * 20
        for minimum in (0, 1, 4, 19, 20):
            body = draw("sun", **fields, stop=[letter * 2], min_tokens=minimum)
            candidate, _ = await one(engine, finish, body)
            # One more token than the minimum completes the stop string, which is two tokens long.
            length = max(2, minimum + 1)
            expected = (letter * (length - 2), "stop") if length <= 20 else (letter * 20, "length")
            assert (candidate.text, candidate.finish_reason) == expected, minimum
            assert candidate.completion_tokens == min(length, 20)


async def test_a_stop_string_ends_the_text_and_is_not_streamed(serving, draw, finish):
    async with serving() as engine:
        complete, _ = await one(
            engine,
            finish,
            draw("sun", temperature=0, max_tokens=60, ignore_eos=True, logit_bias={"65": 9}),
        )
        text = complete.text
        stop = text[10:14]
        candidate, deltas = await one(
            engine,
            finish,
            draw(
                "sun",
                temperature=0,
                max_tokens=60,
                ignore_eos=True,
                logit_bias={"65": 9},
                stop=[stop, "never"],
            ),
        )
    assert (
        candidate.text
        == text[: text.find(stop)]
        == "".join(d.choice["delta"]["content"] for d in deltas)
    )
    assert candidate.finish_reason == "stop"
    assert not candidate.interrupted


async def test_penalties_change_the_answer_like_those_of_transformers(serving, draw, finish):
    async with serving() as engine:
        fields = {"kind": "completion", "temperature": 0, "max_tokens": 30, "ignore_eos": True}
        candidate, _ = await one(engine, finish, draw("the cat", repetition_penalty=1.5, **fields))
        ids = engine.frozen.tokenizer("the cat", return_tensors="pt")["input_ids"]
        ids = ids.to(engine.frozen.device)
        out = engine.frozen.lm.generate(
            ids,
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=1.5,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert candidate.text == engine.frozen.tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True
        )
        penalised, _ = await one(
            engine, finish, draw("the cat", frequency_penalty=2, presence_penalty=2, **fields)
        )
        plain, _ = await one(engine, finish, draw("the cat", **fields))
        assert penalised.text != plain.text


async def test_sampling_defaults_of_the_model_are_used_if_the_body_sets_none(
    tmp_path, serving, draw, finish, language_model
):
    shutil.copytree(language_model(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "do_sample": True, "top_k": 1, "temperature": 0.7}
        )
    )
    async with serving(model=str(tmp_path)) as engine:
        fields = {"max_tokens": 12, "ignore_eos": True}
        greedy, _ = await one(engine, finish, draw(temperature=0, **fields))
        assert (await one(engine, finish, draw(seed=5, **fields)))[0].text == greedy.text
        assert (await one(engine, finish, draw(seed=5, top_k=0, temperature=2, **fields)))[
            0
        ].text != greedy.text


def expected_logprobs(engine, prompt: str, entries) -> torch.Tensor:
    """Return [T, V] logprobs of a separate forward pass over the prompt and the answer."""
    tokenizer = engine.frozen.tokenizer
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = [next(i for i in range(len(tokenizer)) if same(tokenizer, i, e)) for e in entries]
    with torch.inference_mode():
        ids = torch.tensor([prompt_ids + tokens], device=engine.frozen.device)
        logits = engine.frozen.lm(ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).cpu(), tokens


def same(tokenizer, token: int, entry) -> bool:
    return list(token_bytes(tokenizer, token)) == entry["bytes"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.3, "top_k": 4, "logit_bias": {"70": 3.0}, "repetition_penalty": 1.3}],
)
async def test_chat_logprobs_are_the_frozen_models_own(serving, draw, finish, fields):
    async with serving() as engine:
        request = draw(
            "sun", n=2, max_tokens=20, ignore_eos=True, logprobs=True, top_logprobs=5, **fields
        )
        candidates, deltas = await finish(engine, request)
        for candidate in candidates:
            entries = candidate.choice["logprobs"]["content"]
            assert len(entries) == candidate.completion_tokens
            logprobs, tokens = expected_logprobs(engine, "<user>sun</s><assistant>", entries)
            torch.testing.assert_close(
                torch.tensor([e["logprob"] for e in entries]),
                logprobs[range(len(tokens)), tokens],
                atol=1e-4,
                rtol=1e-4,
            )
            for entry, row in zip(entries, logprobs, strict=True):
                best = torch.tensor([t["logprob"] for t in entry["top_logprobs"]])
                torch.testing.assert_close(best, row.topk(5).values, atol=1e-4, rtol=1e-4)
            data = b"".join(
                bytes(e["bytes"]) for e in entries if e["token"] not in {"</s>", "<pad>"}
            )
            assert data.decode(errors="replace") == candidate.text
            own_deltas = [d for d in deltas if d.index == candidate.index]
            assert "".join(d.choice["delta"]["content"] for d in own_deltas) == candidate.text
            assert [e for d in own_deltas for e in d.choice["logprobs"]["content"]] == entries


async def test_completion_logprobs(serving, draw, finish):
    async with serving() as engine:
        request = draw("sun", kind="completion", max_tokens=20, ignore_eos=True, logprobs=3)
        candidate, deltas = await one(engine, finish, request)
        logprobs = candidate.choice["logprobs"]
        assert {len(v) for v in logprobs.values()} == {20}
        # No two parts of characters share a name, so no alternative is lost.
        assert all(len(top) == 3 for top in logprobs["top_logprobs"])
        assert logprobs["text_offset"][0] == 0
        streamed = [d.choice["logprobs"] for d in deltas]
        for key, values in logprobs.items():
            assert [v for part in streamed for v in part[key]] == values
        without, _ = await one(
            engine, finish, draw("sun", kind="completion", max_tokens=2, logprobs=0)
        )
        assert without.choice["logprobs"]["top_logprobs"] is None
        assert len(without.choice["logprobs"]["token_logprobs"]) == without.completion_tokens


async def test_echo_repeats_the_prompt_in_text_and_stream(serving, draw, finish):
    async with serving() as engine:
        fields = {"kind": "completion", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        plain, _ = await one(engine, finish, draw("the cat", **fields))
        candidate, deltas = await one(engine, finish, draw("the cat", echo=True, **fields))
        assert candidate.text == "the cat" + plain.text == "".join(d.choice["text"] for d in deltas)
        ended, deltas = await one(
            engine,
            finish,
            draw("the cat", echo=True, logit_bias={"1": 100}, **{**fields, "ignore_eos": False}),
        )
        assert ended.text == "the cat" == "".join(d.choice["text"] for d in deltas)


async def test_text_parts_are_joined(serving, draw, finish):
    async with serving() as engine:
        joined, _ = await one(engine, finish, draw("the cat", temperature=0, max_tokens=10))
        parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
        body = {
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 10,
        }
        assert (await one(engine, finish, Draw(body, 1, (0,))))[0].text == joined.text


def message(content, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("body", "kind", "param", "words"),
    [
        ({"prompt": ""}, "completion", "prompt", "empty"),
        ({"prompt": "a\ud800"}, "completion", "prompt", "Unicode"),
        (message("a\ud800"), "chat", "messages", "Unicode"),
        (message("hello", role="wizard"), "chat", "messages", "roles are system, user, assistant"),
        (
            message([{"type": "image_url", "image_url": {"url": "x"}}]),
            "chat",
            "messages[0].content",
            "image_url",
        ),
        (message([{"type": "text", "text": 5}]), "chat", "messages[0].content", "string"),
        (message([{"type": "text"}]), "chat", "messages[0].content", "string"),
        ({**message("a"), "chat_template_kwargs": 5}, "chat", "chat_template_kwargs", "object"),
        (
            {**message("a"), "chat_template_kwargs": {"chat_template": "x"}},
            "chat",
            "chat_template_kwargs",
            "kwargs.chat_template",
        ),
        (
            {**message("a"), "chat_template_kwargs": {"tokenize": True}},
            "chat",
            "chat_template_kwargs",
            "tokenize",
        ),
        ({**message("a"), "logit_bias": {"300000": 1}}, "chat", "logit_bias", "300000"),
    ],
)
async def test_prompts_that_cannot_be_read_are_refused_by_name(serving, body, kind, param, words):
    async with serving() as engine:
        with pytest.raises(InvalidRequest) as refused:
            engine.sample(Draw(body, 1, (0,), kind))
    assert refused.value.param == param
    assert words in refused.value.message


async def test_template_variables_reach_the_template(
    serving, draw, finish, byte_level, language_model, tmp_path
):
    shutil.copytree(language_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ 1 // zero }}{{ messages[0].content }}")
    async with serving(model=str(tmp_path)) as engine:
        with pytest.raises(InvalidRequest, match="refused"):
            # The template raises ZeroDivisionError, which is not an error of jinja.
            engine.sample(draw("hello", chat_template_kwargs={"zero": 0}))
        candidate, _ = await one(
            engine, finish, draw("hello", chat_template_kwargs={"zero": 1}, max_tokens=1)
        )
        assert candidate.prompt_tokens == len(byte_level("1hello")["input_ids"])
        (tmp_path / "chat_template.jinja").write_text("")
    (tmp_path / "chat_template.jinja").unlink()
    async with serving(model=str(tmp_path)) as engine:
        with pytest.raises(InvalidRequest, match="no chat template"):
            engine.sample(draw("hello"))
        assert (await one(engine, finish, draw("hello", kind="completion", max_tokens=1)))[
            0
        ].completion_tokens == 1


REFUSED = {
    "functions": [{"name": "f"}],
    "audio": {"voice": "alloy"},
    "modalities": ["text", "audio"],
    "store": True,
    "service_tier": "flex",
    "best_of": 3,
    "suffix": "end",
    "prediction": {"type": "content"},
    "web_search_options": {},
    "unknown_field": 1,
    "echo": True,
    "prompt": "x",
    "guided_json": {},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_fields_that_the_engine_cannot_honour_are_refused(serving, draw, name):
    async with serving() as engine:
        with pytest.raises(Unsupported) as refused:
            engine.check(draw(**{name: REFUSED[name]}))
    assert refused.value.param == name
    assert refused.value.message.startswith(f"{name}:")


async def test_fields_that_request_nothing_are_accepted(serving, draw):
    neutral = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "best_of": 1,
        "audio": None,
    }
    async with serving() as engine:
        engine.check(draw(**neutral))
        for name in ("top_logprobs", "messages", "chat_template_kwargs"):
            with pytest.raises(InvalidRequest):
                engine.check(draw(kind="completion", **{name: 1}))
        with pytest.raises(InvalidRequest, match="logprobs: 1 is not available with echo"):
            engine.check(draw(kind="completion", echo=True, logprobs=1))


OUT_OF_RANGE = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", 2),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "9"),
    ("max_tokens", [1]),
    ("max_completion_tokens", 0),
    ("min_tokens", -1),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("ignore_eos", "yes"),
    ("stop", ""),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", ["x"] * 17),
    ("stop", 5),
    ("logit_bias", [1]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logprobs", 3),
    ("top_logprobs", 3),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=lambda v: str(v)[:20])
async def test_values_out_of_range_are_refused_by_name(serving, draw, name, value):
    async with serving() as engine:
        with pytest.raises(InvalidRequest) as refused:
            engine.check(draw(**{name: value}))
        # The worst case is computed before the body is checked.
        assert engine.worst_case_tokens({"messages": [], name: value}) >= 1
    assert refused.value.param == name
    assert len(refused.value.message) < 300


async def test_the_developer_role_is_rendered_as_system_if_the_template_has_none(serving, finish):
    async with serving() as engine:
        user = {
            "role": "user",
            "content": [{"type": "text", "text": "su"}, {"type": "text", "text": "n"}],
        }
        developer, system = (
            Draw(
                {"messages": [{"role": role, "content": "be brief"}, user], "max_tokens": 4},
                seeds=(1,),
            )
            for role in ("developer", "system")
        )
        assert engine.frozen.render(developer) == engine.frozen.render(system)
        assert "<system>be brief</s><user>sun</s>" in engine.frozen.render(developer).text


@pytest.mark.parametrize("prompt", ["a b", "a b ", "ab."])
async def test_a_text_completion_keeps_the_space_before_its_first_word(
    prompt, serving, draw, finish, language_model, byte_fallback
):
    async with serving(model=language_model(tokenizer=byte_fallback)) as engine:
        tokenizer = engine.frozen.tokenizer
        first = tokenizer.convert_tokens_to_ids("▁a")
        fields = {
            "max_tokens": 4,
            "temperature": 0,
            "logit_bias": {str(first): 100},
            "ignore_eos": True,
        }
        request = draw(prompt, kind="completion", logprobs=0, **fields)
        (candidate,), deltas = await finish(engine, request)
        text = candidate.choice["text"]
        assert text == " a" * 4
        assert "".join(delta.choice["text"] for delta in deltas) == text
        logprobs = candidate.choice["logprobs"]
        assert "".join(logprobs["tokens"]) == text
        assert logprobs["text_offset"] == [0, 2, 4, 6]
        request = draw(prompt, kind="completion", echo=True, **fields)
        (echoed,), _ = await finish(engine, request)
        assert echoed.choice["text"] == prompt + text
        request = draw(prompt, kind="completion", stop=" a a", **fields)
        (stopped,), _ = await finish(engine, request)
        assert (stopped.choice["text"], stopped.finish_reason) == ("", "stop")
        # A turn of a chat begins a text.
        (turn,), _ = await finish(engine, draw(prompt, **fields))
        assert turn.text == "a a a a"


@pytest.mark.parametrize("begun", ["a b", "a b ", "ab."])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"continue_final_message": True}, " a a a a"),
        ({"continue_final_message": True, "add_generation_prompt": False}, " a a a a"),
        ({"continue_final_message": False}, "a a a a"),
        ({}, "a a a a"),
    ],
)
async def test_a_continued_turn_keeps_the_space_before_its_first_word(
    begun, fields, text, serving, finish, language_model, byte_fallback
):
    async with serving(model=language_model(tokenizer=byte_fallback)) as engine:
        first = engine.frozen.tokenizer.convert_tokens_to_ids("▁a")
        messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": begun}]
        body = {
            "messages": messages,
            "max_tokens": 4,
            "temperature": 0,
            "logit_bias": {str(first): 100},
            "ignore_eos": True,
            **fields,
        }
        (candidate,), deltas = await finish(engine, Draw(body, seeds=(1,)))
        assert candidate.text == text
        assert "".join(delta.choice["delta"].get("content", "") for delta in deltas) == text
