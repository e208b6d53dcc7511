"""An upstream's answer reaches the client with all of its fields."""

from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import pytest

from tests.engines.openai.upstream import JSON, SSE, FakeUpstream, body_part, start
from tests.server.conftest import USER
from tests.server.upstream.conftest import Serve, content_of, events_of
from tests.server.upstream.test_request import FIELDS, TURNS

BEST_OF_3 = {"best_of_n": {"n": 3}}


@pytest.mark.parametrize("align", [None, BEST_OF_3])
def test_unknown_fields_are_returned(up: FakeUpstream, serve_upstream: Serve, align: Any) -> None:
    up.extra = {"system_fingerprint": "fp", "service_tier": "scale"}
    up.extra_choice = {"stop_reason": 7, "token_ids": [1, 2]}
    body = serve_upstream().chat(align).json()
    assert body["model"] == "up"
    assert up.extra.items() <= body.items()
    assert up.extra_choice.items() <= body["choices"][0].items()


@pytest.mark.parametrize("align", [None, BEST_OF_3])
def test_fields_of_the_last_chunk_are_returned_in_a_stream(
    up: FakeUpstream, serve_upstream: Serve, align: Any
) -> None:
    up.extra = {"system_fingerprint": "fp", "service_tier": "scale"}
    up.extra_choice = {"stop_reason": 7, "matched": {"rule": 1}}
    chunks = events_of(serve_upstream().chat(align, stream=True))
    assert up.extra.items() <= chunks[-1].items()
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    (last,) = [choice for choice in choices if "stop_reason" in choice]
    assert (last["stop_reason"], last["matched"]) == (7, {"rule": 1})
    if align is None:
        assert last["finish_reason"] == "stop", "as in the upstream's own stream"


@pytest.mark.parametrize(
    ("engine", "reasoning_tokens", "cached_tokens"),
    # The cached tokens of three calls are at most those of the prompt, which counts once.
    [("", 1, 4), ('n = "single"', 3, 5)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_details_of_the_usage_are_added_up(
    up: FakeUpstream,
    serve_upstream: Serve,
    engine: str,
    reasoning_tokens: int,
    cached_tokens: int,
    stream: bool,
) -> None:
    up.usage_details = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    server = serve_upstream(engine)
    if stream:
        answer = server.chat(BEST_OF_3, stream=True, stream_options={"include_usage": True})
        usage = events_of(answer)[-1]["usage"]
    else:
        usage = server.chat(BEST_OF_3).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == reasoning_tokens
    assert usage["prompt_tokens_details"]["cached_tokens"] == cached_tokens
    assert usage["completion_tokens_details"]["accepted_prediction_tokens"] == 2


TOOL_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"x": 1, "y": 2}'},
}
CALLING = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}


def first_speaks_others_call(_: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer with a text in the first choice and a tool call in the others."""
    choices = []
    for i in range(body.get("n", 1)):
        message = CALLING if i else {"role": "assistant", "content": "candidate 1"}
        choices.append({"index": i, "message": message, "finish_reason": "tool_calls"})
    return {"choices": choices}


def test_tool_calls_of_the_selected_candidate_are_returned(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    up.answer = first_speaks_others_call
    # Rewards read a call as text, and this one is longer than the answer.
    server = serve_upstream(extra='[rewards.long]\nkind = "rules"\nwords_weight = 1.0\n')
    align = {**BEST_OF_3, "rewards": {"long": 1}}
    fields = {"tools": FIELDS["tools"], "messages": TURNS}
    (choice,) = server.chat(align, **fields).json()["choices"]
    assert (choice["message"], choice["finish_reason"]) == (CALLING, "tool_calls")
    chunks = events_of(server.chat(align, **fields, stream=True))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    (calls,) = [delta["tool_calls"] for delta in deltas if delta.get("tool_calls")]
    assert calls == [{"index": 0, **TOOL_CALL}]
    assert choices[-1]["finish_reason"] == "tool_calls"


def answers_briefly(_: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer with what some servers leave out: logprobs, and the content beside a tool call."""
    message = {"role": "assistant", "tool_calls": [TOOL_CALL]}
    choices = []
    for i in range(body.get("n", 1)):
        choices.append({"index": i, "message": message, "finish_reason": "tool_calls"})
    return {"choices": choices}


def test_the_document_of_the_api_fits_an_answer_that_leaves_fields_out(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    up.answer = answers_briefly
    server = serve_upstream(extra='[rewards.long]\nkind = "rules"\nwords_weight = 1.0\n')
    answer = server.chat({**BEST_OF_3, "rewards": {"long": 1}}, tools=FIELDS["tools"]).json()
    assert answer["choices"][0]["message"] == answers_briefly("", {})["choices"][0]["message"]
    document = server.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    root = {**schema, "components": document["components"]}
    jsonschema.Draft202012Validator(root).validate(answer)


def speaks(_: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer with audio alone, as models that speak do; the second choice says the most."""
    choices = []
    for i, said in zip(range(body.get("n", 1)), ("yes", "yes it is", "no"), strict=False):
        audio = {"id": f"a{i}", "data": "AAAA", "expires_at": 1, "transcript": said}
        message = {"role": "assistant", "content": None, "audio": audio}
        choices.append({"index": i, "message": message, "finish_reason": "stop"})
    return {"choices": choices}


def test_rewards_read_what_an_answer_of_audio_says(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.answer = speaks
    server = serve_upstream(extra='[rewards.long]\nkind = "rules"\nwords_weight = 1.0\n')
    align = {**BEST_OF_3, "rewards": {"long": 1}}
    body = server.chat(align, modalities=["text", "audio"]).json()
    assert [candidate["objective"] for candidate in body["align"]["candidates"]] == [1, 3, 1]
    message = body["choices"][0]["message"]
    assert (message["content"], message["audio"]["transcript"]) == (None, "yes it is")


def filters(_: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer as an upstream with a content filter, which empties the first choice."""
    choices = []
    for i in range(body.get("n", 1)):
        message = {"role": "assistant", "content": f"words number {i}" if i else None}
        reason = "stop" if i else "content_filter"
        choices.append({"index": i, "message": message, "finish_reason": reason})
    return {"choices": choices}


def test_a_filtered_choice_does_not_win(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.answer = filters
    server = serve_upstream(extra='[rewards.brief]\nkind = "rules"\nwords_weight = -1.0\n')
    body = server.chat({**BEST_OF_3, "rewards": {"brief": 1}}).json()
    assert body["choices"][0]["message"]["content"] == "words number 1"
    assert body["align"]["dropped"] == 1
    error = body["align"]["candidates"][0]["error"]
    assert error == "cut by a content filter before its first word"
    single = server.chat({"rewards": {"brief": 1}}).json()["choices"][0]
    assert (single["message"]["content"], single["finish_reason"]) == (None, "content_filter")


def test_text_completions_are_forwarded(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream()
    answer = server.post({"prompt": "say"}, "/v1/completions").json()
    assert answer["choices"][0]["text"] == "candidate 3"
    chunks = events_of(server.post({"prompt": "say", "stream": True}, "/v1/completions"))
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "candidate 1"
    assert up.paths == ["/v1/completions"] * 2


def test_every_listed_model_is_served(up: FakeUpstream, serve_upstream: Serve) -> None:
    up.models = [{"id": "up"}, {"id": "org/other"}]
    server = serve_upstream(extra="[presets.best]\nbest_of_n = {n = 2}\n")
    models = server.get("/v1/models").json()["data"]
    names = ["up", "org/other", "up@best", "org/other@best"]
    assert [model["id"] for model in models] == names
    assert server.get("/v1/models/org/other@best").json()["root"] == "org/other"
    answer = server.post({"model": "org/other@best", "messages": USER})
    assert answer.json()["model"] == "org/other@best"
    assert (up.bodies[-1]["model"], up.bodies[-1]["n"]) == ("org/other", 2)
    assert server.post({"messages": USER}).status_code == 200
    assert up.bodies[-1]["model"] == "up"
    assert server.post({"model": "nobody", "messages": USER}).status_code == 404


def test_a_preset_wins_over_a_listed_model_of_its_name(
    up: FakeUpstream, serve_upstream: Serve
) -> None:
    # The upstream may be another server of this kind, with presets of its own.
    up.models = [{"id": "up"}, {"id": "up@best"}, {"id": "up@other"}, {"id": ""}]
    server = serve_upstream(extra="[presets.best]\nbest_of_n = {n = 2}\n")
    models = server.get("/v1/models").json()["data"]
    names = ["up", "up@best", "up@other", "up@best@best", "up@other@best"]
    assert [model["id"] for model in models] == names
    assert [model.get("root") for model in models] == [None, "up", None, "up@best", "up@other"]
    answer = server.post({"model": "up@best", "messages": USER})
    assert answer.json()["align"]["methods"] == ["best_of_n"]
    assert (up.bodies[-1]["model"], up.bodies[-1]["n"]) == ("up", 2)
    for name, sent in (("up@other", "up@other"), ("up@best@best", "up@best")):
        assert server.post({"model": name, "messages": USER}).status_code == 200
        assert up.bodies[-1]["model"] == sent


def test_a_model_is_served_under_another_name(up: FakeUpstream, serve_upstream: Serve) -> None:
    server = serve_upstream('model = "up"', '[server]\nserved_name = "mine"\n')
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["mine"]
    assert server.post({"model": "mine", "messages": USER}).json()["model"] == "mine"
    assert up.bodies[-1]["model"] == "up"
    assert server.post({"model": "up", "messages": USER}).status_code == 404


BOM = b"\xef\xbb\xbf"


async def marked(_: FakeUpstream, body: dict[str, Any], send: Any) -> None:
    """Answer with a byte order mark before the JSON, or refuse a temperature in the same way."""
    answer: dict[str, Any] = {"error": {"message": "too hot", "param": "temperature"}}
    if "temperature" not in body:
        message = {"role": "assistant", "content": "candidate 3"}
        answer = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    await start(send, 400 if "temperature" in body else 200, JSON)
    await body_part(send, BOM + json.dumps(answer).encode(), last=True)


@pytest.mark.parametrize("align", [None, {}, {"best_of_n": {"n": 2}}])
def test_a_byte_order_mark_before_json_is_skipped(
    up: FakeUpstream, serve_upstream: Serve, align: Any
) -> None:
    server = serve_upstream()
    up.behave = lambda _, __: marked
    assert content_of(server.chat(align)) == "candidate 3"
    refused = server.chat(align, temperature=9)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "too hot"


@pytest.mark.parametrize("align", [None, {}])
def test_a_byte_order_mark_before_the_body_of_a_request_is_skipped(
    up: FakeUpstream, serve_upstream: Serve, align: Any
) -> None:
    body = json.dumps({"model": "up", "messages": USER, "align": align}).encode()
    assert content_of(serve_upstream().post(BOM + body)) == "candidate 3"
    assert up.bodies[0]["messages"] == USER


class Lines:
    """A stream whose lines have another end; its last part waits for the reader."""

    def __init__(self, line_end: str, begin: bytes = b"") -> None:
        self.line_end = line_end
        self.begin = begin

    async def __call__(self, app: FakeUpstream, _: dict[str, Any], send: Any) -> None:
        first = {"model": "up", "choices": [{"index": 0, "delta": {"content": "candidate"}}]}
        ending = {"index": 0, "delta": {"content": " 3"}, "finish_reason": "stop"}
        last = {"model": "up", "choices": [ending]}
        await start(send, 200, SSE)
        await body_part(send, self.begin + self._event(json.dumps(first)))
        await app.pause()
        await body_part(send, self._event(json.dumps(last)) + self._event("[DONE]"), last=True)

    def _event(self, data: str) -> bytes:
        return f"data: {data}{self.line_end}{self.line_end}".encode()


@pytest.mark.parametrize(
    "behaviour", [Lines("\r"), Lines("\r\n"), Lines("\r", BOM)], ids=["cr", "cr lf", "bom"]
)
@pytest.mark.parametrize(("name", "align"), [("up", {}), ("mine", {}), ("mine", None)])
def test_every_end_of_a_line_is_read_as_it_arrives(
    up: FakeUpstream, serve_upstream: Serve, behaviour: Lines, name: str, align: Any
) -> None:
    server = serve_upstream('model = "up"', f'[server]\nserved_name = "{name}"\n')
    up.behave = lambda _, __: behaviour
    up.reader_is_ready = threading.Event()
    body = {"model": name, "messages": USER, "stream": True, "align": align}
    text = ""
    with server.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for piece in answer.iter_text():
            text += piece
            # The first event must have passed before the upstream sends the second.
            if "candidate" in text:
                up.reader_is_ready.set()
    assert text.count(f'"{name}"') >= 2
    assert '" 3"' in text
    assert "[DONE]" in text
