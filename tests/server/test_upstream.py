"""The server in front of a real HTTP upstream: what arrives there, what comes back, what a fault becomes, what is left running."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infer_align import config as configuration
from tests.engines.openai.upstream import FakeUpstream, fake_upstream
from tests.server.conftest import Live, end, start

NUMBER = '[rewards.number]\nkind = "callable"\nfunction = "tests.server.scorers:number"\n'
USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def up() -> Iterator[FakeUpstream]:
    with fake_upstream() as app:
        yield app


@pytest.fixture
def told(up: FakeUpstream) -> Iterator[FakeUpstream]:
    """The upstream, forgetful of the last test."""
    up.reset()
    yield up
    up.behave = lambda _, __: "ok"


@pytest.fixture
def front(told: FakeUpstream, tmp_path: Path) -> Iterator[Callable[..., Live]]:
    """`front('n = "single"')`: a server before it."""
    lives: list[Live] = []

    def make(engine: str = "", extra: str = "", urls: str = "") -> Live:
        path = tmp_path / f"{len(lives)}.toml"
        probe = "" if "probe" in engine else "probe = false\n"
        path.write_text(
            f'[engine]\nkind = "openai"\nurls = [{urls or repr(told.url)}]\n{probe}{engine}\n{NUMBER}{extra}',
            encoding="utf-8",
        )
        lives.append(start(configuration.load(path)))
        return lives[-1]

    yield make
    for live in lives:
        hosts = live.service.engine.client.pool.hosts  # type: ignore[attr-defined]
        assert live.until(lambda hosts=hosts: not any(host.running for host in hosts)), (
            "every call gives its place back"
        )
        end(live)


def chat(live: Live, align: Any = None, **fields: Any) -> Any:
    body = {"model": "up", "messages": USER, **fields}
    return live.post(body if align is None else {**body, "align": align})


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


# --- what arrives ---

FULL = {
    "temperature": 0.3,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "max_completion_tokens": 17,
    "stop": ["END", "\n\n"],
    "logit_bias": {"42": -5},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object"}},
    },
    "tools": [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
        }
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "user": "someone",
    "metadata": {"a": "b"},
    "service_tier": "default",
    "min_p": 0.05,
    "chat_template_kwargs": {"enable_thinking": False},
    "custom_field": {"nested": [1, "ü", None]},
}
TURNS = [
    {"role": "developer", "content": "be brief", "name": "d"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "look"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "4"},
]


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 4}}])
@pytest.mark.parametrize("stream", [False, True])
def test_every_field_arrives_unchanged(
    told: FakeUpstream, front: Any, align: Any, stream: bool
) -> None:
    live = front()
    told.clear_log()
    answer = chat(live, align, **{**FULL, "messages": TURNS, "stream": stream, "seed": 12})
    assert answer.status_code == 200, answer.text
    (sent,) = told.bodies
    assert {key: sent[key] for key in FULL} == FULL
    assert sent["messages"] == TURNS
    assert (sent["model"], sent["seed"]) == ("up", 12)
    assert "align" not in sent
    ours = {"model", "messages", "seed", "n", "stream", "stream_options"}
    assert set(sent) - set(FULL) <= ours
    assert [key for key in sent if key in FULL] == list(FULL), "the order is kept"
    assert sent.get("n") == (4 if align else None)
    assert bool(sent.get("stream")) == (stream and not align), (
        "streamed only where somebody reads it"
    )


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 4}}])
def test_a_budget_of_tokens_makes_no_stream_of_what_is_none(
    told: FakeUpstream, front: Any, align: Any
) -> None:
    live = front(extra="[limits]\ncandidate_tokens_per_minute = 100000\n")
    told.clear_log()
    answer = chat(live, align)
    assert "stream" not in told.bodies[0]
    spent = 100_000 - live.service.tokens.available("127.0.0.1")
    assert spent <= answer.json()["usage"]["completion_tokens"]


def test_a_seed_that_nobody_gave_is_not_sent(told: FakeUpstream, front: Any) -> None:
    live = front()
    told.clear_log()
    answer = chat(live, {"best_of_n": {"n": 3}})
    assert answer.status_code == 200, answer.text
    assert "seed" not in told.bodies[0]


def test_single_calls_carry_their_own_seeds(told: FakeUpstream, front: Any) -> None:
    live = front('n = "single"')
    for _ in range(2):
        chat(live, {"best_of_n": {"n": 4}}, seed=5)
    seeds = [body["seed"] for body in told.bodies]
    assert seeds[0] == 5
    assert len(set(seeds[:4])) == 4
    assert sorted(seeds[:4]) == sorted(seeds[4:]), "same request, same seeds"


def test_the_key_goes_to_the_upstream_and_nowhere_else(
    told: FakeUpstream, front: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream-secret")
    live = front('api_key_env = "UPSTREAM_KEY"')
    told.clear_log()
    told.behave = lambda _, __: "error_401"
    answer = live.post(
        {"model": "up", "messages": USER},
        headers={"authorization": "Bearer client", "x-its-endpoint": "http://evil"},
    )
    assert told.headers[0]["authorization"] == "Bearer sk-upstream-secret"
    assert "x-its-endpoint" not in told.headers[0]
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_failed"
    assert "secret" not in answer.text
    told.behave = lambda _, __: "redirect"
    assert chat(live).status_code == 502


# --- n ---


@pytest.mark.parametrize(
    ("engine", "most", "refuse", "first", "then"),
    [
        ("", None, False, 1, 1),
        ('n = "native"', None, False, 1, 1),
        ('n = "single"', None, False, 5, 5),
        ("", 1, False, 5, 5),  # one call gives 1 of 5, four more for the rest; then five at once
        ("", 3, False, 3, 2),  # 3 of 5 and two alone; then 3 and 2
        (
            "",
            None,
            True,
            6,
            6,
        ),  # refused, then five alone; and again: what one request is refused says nothing of the next
        ('n = "native"', 3, False, 3, 3),
    ],
)
def test_n(
    told: FakeUpstream,
    front: Any,
    engine: str,
    most: int | None,
    refuse: bool,
    first: int,
    then: int,
) -> None:
    live = front(engine)
    for calls in (first, then):
        told.clear_log()
        told.max_choices, told.refuse_n = most, refuse
        answer = chat(live, {"best_of_n": {"n": 5}}).json()
        assert told.calls == calls
        assert answer["align"]["usage"]["engine_calls"] == calls
        assert answer["choices"][0]["message"]["content"] == "candidate 9"
        assert len(answer["align"]["candidates"]) == 5
        assert answer["usage"]["completion_tokens"] == 10
        assert sum(c["completion_tokens"] for c in answer["align"]["candidates"]) == 10


def test_n_without_a_selection_streams_every_choice(told: FakeUpstream, front: Any) -> None:
    chunks = events(chat(front(), n=3, stream=True).text)
    texts = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == ["candidate 3", "candidate 1", "candidate 9"]
    assert told.calls == 1


# --- what comes back ---


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 3}}])
def test_unknown_fields_come_back(told: FakeUpstream, front: Any, align: Any) -> None:
    told.extra, told.extra_choice = (
        {"system_fingerprint": "fp", "service_tier": "scale"},
        {"stop_reason": 7, "token_ids": [1, 2]},
    )
    body = chat(front(), align).json()
    assert (body["system_fingerprint"], body["service_tier"], body["model"]) == (
        "fp",
        "scale",
        "up",
    )
    assert body["choices"][0]["stop_reason"] == 7
    assert body["choices"][0]["token_ids"] == [1, 2]


@pytest.mark.parametrize("align", [None, {"best_of_n": {"n": 3}}])
def test_fields_of_the_last_piece_come_back_in_a_stream(
    told: FakeUpstream, front: Any, align: Any
) -> None:
    told.extra_choice = {"stop_reason": 7, "matched": {"rule": 1}}
    pieces = events(chat(front(), align, stream=True).text)
    found = [choice for piece in pieces for choice in piece["choices"] if "stop_reason" in choice]
    assert [(choice["stop_reason"], choice["matched"]) for choice in found] == [(7, {"rule": 1})]
    assert align or found[0]["finish_reason"] == "stop", (
        "with the end of the choice, as the upstream has them"
    )


@pytest.mark.parametrize("engine", ["", 'n = "single"'])
@pytest.mark.parametrize("stream", [False, True])
def test_details_of_the_usage_are_added_up(
    told: FakeUpstream, front: Any, engine: str, stream: bool
) -> None:
    told.usage_details = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = chat(front(engine), {"best_of_n": {"n": 3}}, **options)
    usage = events(answer.text)[-1]["usage"] if stream else answer.json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == (3 if engine else 1)
    assert usage["prompt_tokens_details"]["cached_tokens"] == (5 if engine else 4), (
        "no more than the prompt, which counts once"
    )
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 2


def test_tool_calls_through_a_selection(told: FakeUpstream, front: Any) -> None:
    """The chosen answer's calls come back as they are, in one piece and in a stream; it has no text."""
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [called]}
    told.answer = lambda _, body: {
        "choices": [
            {
                "index": i,
                "message": message if i else {"role": "assistant", "content": "candidate 1"},
                "finish_reason": "tool_calls",
            }
            for i in range(body.get("n", 1))
        ]
    }
    live = front(extra='[rewards.short]\nkind = "rules"\nwords_weight = -1.0\n')
    asked = {
        "align": {"best_of_n": {"n": 3}, "rewards": {"short": 1}},
        "tools": FULL["tools"],
        "messages": TURNS,
    }
    (choice,) = chat(live, **asked).json()["choices"]
    assert (choice["message"], choice["finish_reason"]) == (message, "tool_calls")
    deltas = [
        c for piece in events(chat(live, **asked, stream=True).text) for c in piece["choices"]
    ]
    (calls,) = [d["delta"]["tool_calls"] for d in deltas if d["delta"].get("tool_calls")]
    assert calls == [{"index": 0, **called}]
    assert deltas[-1]["finish_reason"] == "tool_calls"


def test_a_number_that_is_too_large_is_the_clients_fault(told: FakeUpstream, front: Any) -> None:
    live = front()
    answer = live.post(
        b'{"model": "up", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1e400}}'
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias.5")
    deep = b'{"messages": ' + b"[" * 900 + b"1e400" + b"]" * 900 + b"}"
    assert live.post(deep).status_code == 400
    assert told.calls == 0


def test_what_nobody_could_count_is_refused(told: FakeUpstream, front: Any) -> None:
    answer = front().post({"model": "up", "prompt": "x", "best_of": 8}, "/v1/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")
    assert told.calls == 0


def test_completions(told: FakeUpstream, front: Any) -> None:
    live = front()
    answer = live.post({"prompt": "say"}, "/v1/completions").json()
    assert answer["choices"][0]["text"] == "candidate 3"
    chunks = events(live.post({"prompt": "say", "stream": True}, "/v1/completions").text)
    assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == "candidate 1"
    assert told.paths == ["/v1/completions"] * 2


def test_every_listed_model_is_served(told: FakeUpstream, front: Any) -> None:
    told.models = [{"id": "up"}, {"id": "org/other"}]
    live = front(extra="[presets.best]\nbest_of_n = {n = 2}\n")
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == [
        "up",
        "org/other",
        "up@best",
        "org/other@best",
    ]
    assert live.get("/v1/models/org/other@best").json()["root"] == "org/other"
    assert (
        live.post({"model": "org/other@best", "messages": USER}).json()["model"] == "org/other@best"
    )
    assert (told.bodies[-1]["model"], told.bodies[-1]["n"]) == ("org/other", 2)
    assert live.post({"messages": USER}).status_code == 200
    assert told.bodies[-1]["model"] == "up"
    assert live.post({"model": "nobody", "messages": USER}).status_code == 404


def test_a_served_name(told: FakeUpstream, front: Any) -> None:
    live = front('model = "up"', '[server]\nserved_name = "mine"\n')
    assert [m["id"] for m in live.get("/v1/models").json()["data"]] == ["mine"]
    assert live.post({"model": "mine", "messages": USER}).json()["model"] == "mine"
    assert told.bodies[-1]["model"] == "up"
    assert live.post({"model": "up", "messages": USER}).status_code == 404


# --- faults ---

ONE_OF_N = (
    "message_missing",
    "message_of_text",
    "infinite",
    "half_a_character",
    "choices_of_text",
)  # answers with one choice
ALWAYS = [  # fault, status, calls of a plain request, words of the message
    ("error_500", 500, 1, "the GPU is on fire"),
    ("error_400", 400, 1, "top_p is 7, which is too much"),
    ("error_404", 404, 1, "The model `up` does not exist."),
    ("error_422", 400, 1, "not a number"),
    ("error_429_long", 429, 1, "slow down"),
    ("error_502", 502, 1, "502"),
    ("error_503", 503, 3, "loading"),
    ("error_504", 504, 1, "too late"),
    ("redirect", 502, 1, "not followed"),
    ("garbage", 502, 1, "not JSON"),
    ("html", 502, 1, "not JSON"),
    ("error_in_200", 502, 1, "no credits left"),
    ("no_choices", 502, 1, "no choices"),
    ("truncated", 502, 1, "broke off"),
    ("reset", 502, 1, "lost"),
    ("message_missing", 502, 1, "without a message"),
    ("message_of_text", 502, 1, "without a message"),
    ("infinite", 502, 1, "without proper JSON"),
    ("half_a_character", 502, 1, "without proper JSON"),
    ("choices_of_text", 502, 1, "without anything in it"),
    ("a_list", 502, 1, "not an object"),
    ("sse_as_json", 502, 1, "not JSON"),
    ("error_429", 429, 3, "slow down"),
]


@pytest.mark.parametrize(("fault", "status", "calls", "words"), ALWAYS)
def test_a_fault_has_its_status_and_its_message(
    told: FakeUpstream, front: Any, fault: str, status: int, calls: int, words: str
) -> None:
    live = front()
    told.behave = lambda _, __: fault
    for align in (None, {"best_of_n": {"n": 4}}):
        told.clear_log()
        answer = chat(live, align)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        doubted = align is not None and status in {
            400,
            404,
        }  # is it n that is refused? one call more finds out
        stale = fault == "reset" and align is None  # over the connection that listed the models
        missing = 3 * (
            align is not None and fault in ONE_OF_N
        )  # what a call leaves out is drawn alone
        assert told.calls == calls + doubted + stale + missing
        assert told.until(lambda: told.running == 0, 1.0)
    if fault == "error_400":
        assert (error["param"], error["code"]) == ("top_p", "bad_top_p")
    if fault == "error_429_long":
        assert answer.headers["retry-after"] == "77"


@pytest.mark.parametrize(
    "fault",
    [f for f, *_ in ALWAYS if f not in {"no_choices", "garbage"}]
    + ["ended_early", "garbage_in_stream", "odd_in_stream"],
)
def test_a_fault_in_a_stream(told: FakeUpstream, front: Any, fault: str) -> None:
    live = front()
    told.behave = lambda _, __: fault
    answer = chat(live, stream=True)
    status = {name: status for name, status, *_ in ALWAYS}.get(fault, 502)
    if fault in {
        "truncated",
        "ended_early",
        "garbage_in_stream",
        "odd_in_stream",
    }:  # it had begun: the stream says how it ended
        assert answer.status_code == 200
        *pieces, last = events(answer.text)
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == "half an"
        assert "error" in last
        assert "[DONE]" not in answer.text
    else:
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert told.until(lambda: told.running == 0, 1.0)


@pytest.mark.parametrize("fault", ["error_429", "error_503", "reset"])
def test_what_is_safe_is_tried_again(told: FakeUpstream, front: Any, fault: str) -> None:
    live = front()
    told.behave = lambda call, _: fault if call == 0 else "ok"
    started = time.monotonic()
    body = chat(live, {"best_of_n": {"n": 4}}).json()
    assert told.calls == 2
    assert body["align"]["usage"]["engine_calls"] == 2
    assert body["align"]["dropped"] == 0
    assert time.monotonic() - started >= (1.0 if fault == "error_429" else 0.0), (
        "Retry-After is kept"
    )


@pytest.mark.parametrize("fault", ["error_502", "slow_reset"])
def test_what_may_have_been_done_is_not_done_again(
    told: FakeUpstream, front: Any, fault: str
) -> None:
    live = front()
    told.behave = lambda _, __: fault
    assert chat(live).status_code == 502
    assert told.calls == 1


@pytest.mark.parametrize(
    "fault",
    [
        "error_500",
        "garbage",
        "truncated",
        "error_504",
        "message_missing",
        "infinite",
        "half_a_character",
        "sse_as_json",
        "reset",
    ],
)
def test_some_of_n_fail(told: FakeUpstream, front: Any, fault: str) -> None:
    live = front('n = "single"')
    told.behave = lambda call, _: fault if call % 2 else "ok"
    answer = chat(live, {"best_of_n": {"n": 8}, "rewards": {"number": 1}})
    assert answer.status_code == 200, answer.text
    align = answer.json()["align"]
    assert told.calls == align["usage"]["engine_calls"]
    assert (
        told.calls == 8 or fault == "reset"
    )  # over a kept-alive connection that is tried once more
    assert align["dropped"] == 4 or fault == "reset"
    kept = [c["objective"] for c in align["candidates"] if c["error"] is None]
    assert len(kept) == 8 - align["dropped"]
    assert align["candidates"][align["selected"]]["objective"] == max(kept)
    assert told.until(lambda: told.running == 0, 1.0)


def test_flawed_choices_are_dropped_and_the_rest_counts(told: FakeUpstream, front: Any) -> None:
    """One call, eight choices, half of them malformed: the best of the others is the answer."""
    told.behave = lambda _, __: "half_flawed"
    answer = chat(front(), {"best_of_n": {"n": 8}})
    assert answer.status_code == 200, answer.text
    align = answer.json()["align"]
    assert (told.calls, align["dropped"], align["selected"]) == (1, 4, 2)
    assert sum("without" in (c["error"] or "") for c in align["candidates"]) == 4
    assert answer.json()["usage"]["completion_tokens"] == 12, (
        "minus five is no number of tokens: what the texts show counts"
    )


def test_of_a_stream_that_broke_what_was_finished_counts(told: FakeUpstream, front: Any) -> None:
    """A deadline makes it a stream: four of eight choices finish, then the connection is lost."""
    live = front()
    told.behave = lambda _, __: "half_then_broken"
    answer = chat(live, {"best_of_n": {"n": 8}, "budget": {"deadline_seconds": 20}})
    assert answer.status_code == 200, answer.text
    align = answer.json()["align"]
    assert (told.calls, align["dropped"], align["partial"]) == (1, 4, False)
    assert answer.json()["choices"][0]["message"]["content"] == "candidate 9"
    assert all("broke off" in c["error"] for c in align["candidates"] if c["error"])
    assert told.until(lambda: told.running == 0, 1.0)


def test_of_a_slow_drip_what_was_finished_counts(told: FakeUpstream, front: Any) -> None:
    """Four of eight choices finish, the others drip on until the deadline: they are cut, and take part with what they have."""
    live = front()
    told.behave = lambda _, __: "half_then_drip"
    answer = chat(live, {"best_of_n": {"n": 8}, "budget": {"deadline_seconds": 1.5}})
    assert answer.status_code == 200, answer.text
    align = answer.json()["align"]
    assert (told.calls, align["dropped"], align["partial"]) == (1, 0, True)
    assert [c["finish_reason"] for c in align["candidates"]] == ["stop"] * 4 + ["length"] * 4
    assert told.until(lambda: told.running == 0, 1.0)


def test_a_refused_n_is_no_verdict_on_n(told: FakeUpstream, front: Any) -> None:
    """vLLM refuses n over 1 at temperature 0; another takes 8 at most: that is those requests' fault, and no other's."""
    live = front()
    told.behave = lambda _, body: (
        "error_400" if body.get("n", 1) > 1 and body.get("temperature") == 0 else "ok"
    )
    calls = []
    for fields in ({}, {"temperature": 0}, {}):
        told.clear_log()
        assert chat(live, {"best_of_n": {"n": 8}}, **fields).status_code == 200
        calls.append(told.calls)
    assert calls == [1, 9, 1]
    told.behave = lambda _, body: "error_400" if body.get("n", 1) > 8 else "ok"
    calls = []
    for n in (4, 16, 4, 8):
        told.clear_log()
        answer = chat(live, {"best_of_n": {"n": n}})
        assert answer.json()["align"]["dropped"] == 0
        calls.append(told.calls)
    assert calls == [1, 4, 1, 1], "16 are refused, one is taken, the others come by eight and seven"


def test_what_was_ignored_once_is_asked_again(
    told: FakeUpstream, front: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("infer_align.engines.openai.batch_size.FORGET_SECONDS", 0.3)
    live = front()
    told.max_choices = 1
    chat(live, {"best_of_n": {"n": 4}})
    told.clear_log()
    told.max_choices = None
    chat(live, {"best_of_n": {"n": 4}})
    assert told.calls == 4, "remembered"
    time.sleep(0.4)
    told.clear_log()
    chat(live, {"best_of_n": {"n": 4}})
    assert told.calls == 1, "and forgotten"


def test_another_upstream_is_asked_instead(told: FakeUpstream, front: Any) -> None:
    with fake_upstream() as second:
        live = front('n = "single"', urls=f"'{told.url}', '{second.url}'")
        told.behave = lambda _, __: "error_429_long"  # alone, it would not be asked again
        body = chat(live, {"best_of_n": {"n": 6}}).json()
        assert body["align"]["dropped"] == 0
        assert body["align"]["usage"]["engine_calls"] == told.calls + second.calls == 6 + told.calls
        assert second.calls == 6


def test_one_that_is_gone_is_left_out_until_it_is_back(told: FakeUpstream, front: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = probe.getsockname()[1]
    live = front(
        "recovery_seconds = 0.2",
        urls=f"'http://127.0.0.1:{dead}/v1', {{url = '{told.url}', weight = 3}}",
    )
    assert live.get("/ready").status_code == 200
    assert [chat(live).json()["choices"][0]["message"]["content"] for _ in range(4)] == [
        f"candidate {n}" for n in (3, 1, 9, 9)
    ]
    dead_one, good = live.service.engine.client.pool.hosts  # type: ignore[attr-defined]
    assert dead_one.down_reason
    assert good.down_reason is None


def test_load_is_shared_by_weight(told: FakeUpstream, front: Any) -> None:
    with fake_upstream() as second:
        live = front('n = "single"', urls=f"{{url = '{told.url}', weight = 3}}, '{second.url}'")
        told.word_seconds = second.word_seconds = 0.1
        chat(live, {"best_of_n": {"n": 16}})
        assert (told.calls, second.calls) == (12, 4)


def test_max_concurrency_is_per_upstream(told: FakeUpstream, front: Any) -> None:
    live = front('n = "single"\nmax_concurrency = 2')
    told.word_seconds, most = 0.05, []
    behave = lambda _, __: most.append(told.running) or "ok"  # noqa: E731
    told.behave = behave
    assert chat(live, {"best_of_n": {"n": 7}}).json()["align"]["dropped"] == 0
    assert 2 <= max(most) <= 4, (
        "of 7; the upstream counts one that has answered until its connection knows"
    )


def test_without_an_upstream_it_is_not_ready_and_becomes_so(told: FakeUpstream, front: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = probe.getsockname()[1]
    live = front('model = "up"\nrecovery_seconds = 0.1', urls=f"'http://127.0.0.1:{dead}/v1'")
    ready = live.get("/ready")
    assert ready.status_code == 503
    assert "no connection" in ready.json()["reason"]
    answer = chat(live)
    assert answer.status_code == 503
    live.service.engine.client.pool.hosts[0].url = told.url  # type: ignore[attr-defined]
    assert live.until(lambda: live.get("/ready").status_code == 200)
    assert chat(live).status_code == 200


# --- nothing stays behind ---


def send(live: Live, body: Any) -> socket.socket:
    content = json.dumps({"model": "up", "messages": USER, **body}).encode()
    raw = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    raw.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return raw


@pytest.mark.parametrize("fault", ["hang", "drip", "error_429"])
@pytest.mark.parametrize(
    "body", [{}, {"stream": True}, {"align": {"best_of_n": {"n": 8}}}, {"n": 3}], ids=str
)
@pytest.mark.parametrize("engine", ["", 'n = "single"'])
def test_nothing_runs_after_the_client_left(
    told: FakeUpstream, front: Any, fault: str, body: Any, engine: str
) -> None:
    live = front(f"{engine}\nmax_retry_wait_seconds = 60")
    told.behave = lambda _, __: fault
    raw = send(live, body)
    assert told.until(lambda: told.calls > 0)
    time.sleep(0.2)
    raw.close()
    assert told.until(lambda: told.running == 0, 1.0), f"{told.running} still run"
    calls = told.calls
    time.sleep(1.0)
    assert told.calls == calls, "nor is anything tried again"
    assert live.until(lambda: live.service.admission.running == 0)
    assert not live.service.engine._drawings  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_keeps_what_has_come(told: FakeUpstream, front: Any, stream: bool) -> None:
    live = front()
    told.behave = lambda _, __: "drip"
    started = time.monotonic()
    answer = chat(live, {"budget": {"deadline_seconds": 0.8}}, stream=stream)
    assert time.monotonic() - started < 5.0
    assert answer.status_code == 200, answer.text
    assert "0 1 2" in answer.text.replace('"', "") or stream
    assert told.until(lambda: told.running == 0, 1.0)


def test_a_deadline_with_some_finished(told: FakeUpstream, front: Any) -> None:
    live = front('n = "single"')
    told.behave = lambda call, _: "hang" if call % 2 else "ok"
    body = chat(live, {"best_of_n": {"n": 6}, "budget": {"deadline_seconds": 4.0}}).json()
    assert body["align"]["partial"] is True
    assert body["align"]["dropped"] == 3
    assert told.until(lambda: told.running == 0, 1.0)


def test_a_deadline_with_nothing(told: FakeUpstream, front: Any) -> None:
    live = front()
    told.behave = lambda _, __: "hang"
    assert chat(live, {"budget": {"deadline_seconds": 0.5}}).status_code == 504
    assert told.until(lambda: told.running == 0, 1.0)


def test_the_clients_own_timeout_ends_it(told: FakeUpstream, front: Any) -> None:
    live = front()
    told.behave = lambda _, __: "hang"
    started = time.monotonic()
    answer = live.post({"model": "up", "messages": USER}, headers={"x-stainless-read-timeout": "1"})
    assert answer.status_code == 504
    assert time.monotonic() - started < 5.0
    assert told.until(lambda: told.running == 0, 1.0)


def test_the_engines_own_timeout(told: FakeUpstream, front: Any) -> None:
    live = front("timeout_seconds = 0.4")
    told.behave = lambda _, __: "hang"
    answer = chat(live)
    assert answer.status_code == 504
    assert told.calls == 1, "a timeout is not repeated: the work was done"


# --- all at once ---


def test_many_clients_many_faults_nothing_left(told: FakeUpstream, front: Any) -> None:
    """Every request is answered or left, and in the end nobody holds anything."""
    live = front("retries = 1\nmax_concurrency = 24")
    lot = random.Random(7)
    faults = ["ok"] * 6 + [
        "error_500",
        "error_503",
        "hang",
        "drip",
        "garbage",
        "truncated",
        "reset",
        "ended_early",
        "error_400",
    ]
    told.behave = lambda _, __: lot.choice(faults)
    bodies: list[Any] = [
        {},
        {"stream": True},
        {"n": 2},
        {"align": {"best_of_n": {"n": 4}}},
        {"stream": True, "align": {"best_of_n": {"n": 3}}},
    ]
    statuses: list[int] = []

    def client(seed: int) -> None:
        own = random.Random(seed)
        for _ in range(6):
            body = {**own.choice(bodies)}
            if own.random() < 0.4:
                raw = send(live, body)
                time.sleep(own.random() * 0.1)
                raw.close()
            else:
                align = {**body.pop("align", {}), "budget": {"deadline_seconds": 0.5}}
                statuses.append(chat(live, align, **body).status_code)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request was never answered"
    assert set(statuses) <= {200, 400, 500, 502, 503, 504}
    assert told.until(lambda: told.running == 0, 1.0), f"{told.running} run upstream"
    place = live.service.admission
    assert live.until(lambda: not (place.running or place.queued))
    assert not live.service.engine._drawings  # type: ignore[attr-defined]
