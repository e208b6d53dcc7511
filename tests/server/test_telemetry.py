"""Traces of real requests, as a collector in this process receives them over OTLP/HTTP."""

from __future__ import annotations

import re

import pytest

from infer_align import config as configuration
from infer_align.errors import ConfigError
from infer_align_server.collector import span_name
from infer_align_server.service import Service
from tests.server.tracing import ROUTE, ConfigFile, flush, traced


def test_a_best_of_five_is_one_trace_with_each_stage_candidate_and_score(
    config_file: ConfigFile,
) -> None:
    with traced(config_file) as (live, receiver):
        answer = live.chat({"best_of_n": {"n": 5}, "rewards": {"number": 1, "brevity": 0.5}})
        assert answer.status_code == 200
        flush(live)
    (request,) = receiver.named(ROUTE)
    assert request["parent_id"] == ""
    assert {span["trace_id"] for span in receiver.spans} == {request["trace_id"]}
    names = sorted(span["name"] for span in receiver.spans)
    stages = ["draw", "plan", "reward brevity", "reward number", "select"]
    assert names == sorted([ROUTE, *stages, *["chat fake"] * 5])
    for name in ("plan", "draw", "reward number", "select"):
        assert receiver.named(name)[0]["parent_id"] == request["span_id"], name
    (draw,) = receiver.named("draw")
    candidates = receiver.named("chat fake")
    assert {span["parent_id"] for span in candidates} == {draw["span_id"]}
    facts = request["attributes"]
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.request.model"] == "fake"
    assert facts["infer_align.selected"] == [2]
    assert facts["infer_align.reason"] == answer.json()["align"]["reason"]
    assert facts["http.response.status_code"] == 200
    output = [span["attributes"]["gen_ai.usage.output_tokens"] for span in candidates]
    assert sum(output) == facts["gen_ai.usage.output_tokens"]
    # Each score is an event in the span of its candidate.
    by_index = {span["attributes"]["infer_align.candidate.index"]: span for span in candidates}
    numbers = {}
    for event in receiver.events:
        assert event["name"] == "gen_ai.evaluation.result"
        index = event["attributes"]["infer_align.candidate.index"]
        assert event["span_id"] == by_index[index]["span_id"]
        if event["attributes"]["gen_ai.evaluation.name"] == "number":
            numbers[index] = event["attributes"]["gen_ai.evaluation.score.value"]
    assert numbers == {0: 3.0, 1: 1.0, 2: 9.0, 3: 9.0, 4: 5.0}
    assert len(receiver.events) == 10
    assert receiver.resources[0]["service.name"] == "infer-align"


def test_no_text_of_a_user_leaves_the_server_unless_the_operator_says_so(
    config_file: ConfigFile,
) -> None:
    messages = [{"role": "user", "content": "my secret question"}]
    align = {"best_of_n": {"n": 2}}
    with traced(config_file) as (live, receiver):
        live.chat(align, messages=messages)
        live.chat(align, messages=messages, temperature="my secret question")
        live.chat({"best_of_n": {"n": 2}, "rewards": {"broken": 1}}, messages=messages)
        body = {"query": "my secret question", "documents": ["candidate 3"]}
        live.post(body, "/v1/rerank")
        flush(live)
    everything = "".join(span["text"] for span in receiver.spans) + str(receiver.events)
    assert "secret" not in everything
    assert "candidate 3" not in everything
    with traced(config_file, settings="capture_content = true") as (live, receiver):
        live.chat(align, messages=messages)
        flush(live)
    attributes = receiver.named("chat fake")[0]["attributes"]
    part = '{"type": "text", "content": "my secret question"}'
    assert attributes["gen_ai.input.messages"] == f'[{{"role": "user", "parts": [{part}]}}]'
    assert "candidate" in attributes["gen_ai.output.messages"]


def test_what_fails_is_marked_with_its_type(config_file: ConfigFile) -> None:
    with traced(config_file) as (live, receiver):
        live.chat({"best_of_n": {"n": 2}, "rewards": {"broken": 1}})
        live.chat({"best_of_n": {"n": 0}})
        live.get("/health")
        flush(live)
    failed, refused = receiver.named(ROUTE)
    (reward,) = receiver.named("reward broken")
    assert reward["attributes"]["error.type"] == "RuntimeError"
    assert (reward["failed"], failed["failed"], refused["failed"]) == (True, False, False)
    assert failed["attributes"]["http.response.status_code"] == 424
    # The candidates were drawn, and are in the trace although nothing is returned.
    assert len(receiver.named("chat fake")) == 2
    assert refused["attributes"]["http.response.status_code"] == 400
    assert len(receiver.named(ROUTE)) == 2


def test_streams_adaptive_batches_and_prompt_lists_are_traced(config_file: ConfigFile) -> None:
    with traced(config_file) as (live, receiver):
        live.chat({"best_of_n": {"n": 2}}, stream=True)
        flush(live)
        assert len(receiver.named("chat fake")) == 2
        receiver.spans.clear()
        live.chat({"adaptive": {"max_n": 4, "batch": 2, "cost": 0}})
        flush(live)
        draws = {span["span_id"] for span in receiver.named("draw")}
        assert {span["parent_id"] for span in receiver.named("chat fake")} == draws
        assert len(draws) == 2
        receiver.spans.clear()
        body = {"prompt": ["a", "b"], "align": {"best_of_n": {"n": 2}}}
        assert live.post(body, "/v1/completions").status_code == 200
        flush(live)
        draws = {span["span_id"] for span in receiver.named("draw")}
        parents = [span["parent_id"] for span in receiver.named("text_completion fake")]
        assert sorted(parents) == sorted([*draws, *draws])


def test_answers_of_the_client_have_scores_in_the_span_of_their_request(
    config_file: ConfigFile,
) -> None:
    with traced(config_file) as (live, receiver):
        live.post({"query": "q", "documents": ["is 1", "is 2"]}, "/v1/rerank")
        flush(live)
    (request,) = receiver.named("POST /v1/rerank")
    assert {event["span_id"] for event in receiver.events} == {request["span_id"]}
    values = [e["attributes"]["gen_ai.evaluation.score.value"] for e in receiver.events]
    assert values == [1.0, 2.0]


def test_the_key_of_the_collector_comes_from_the_environment(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_COLLECTOR", "x-key=abc123, x-team = align")
    settings = 'headers_env = "TEST_COLLECTOR"\nservice_name = "answers"'
    with traced(config_file, settings=settings) as (live, receiver):
        live.chat()
        flush(live)
        assert "abc123" in live.service.config.secrets()
    assert receiver.headers[0]["x-key"] == "abc123"
    assert receiver.headers[0]["x-team"] == "align"
    assert receiver.resources[0]["service.name"] == "answers"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('endpoint = "collector:4318"', "must be a URL"),
        ('endpoint = "http://c"\nheaders_env = "TEST_NO_SUCH_VARIABLE"', "is not set"),
        ('endpoint = "http://c"\nheaders_env = "TEST_BAD_HEADERS"', "name=value"),
        ("sample_ratio = 2", "telemetry.sample_ratio"),
        ("endpont = 3", "endpoint"),
    ],
)
def test_a_wrong_setting_is_named(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, settings: str, message: str
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("TEST_BAD_HEADERS", "abc")
    text = f'[engine]\nkind = "fake"\n[telemetry]\n{settings}\n'
    with pytest.raises(ConfigError, match=re.escape(message)):
        Service(configuration.load(config_file(text)))


def test_attributes_follow_the_conventions(config_file: ConfigFile) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "frequency_penalty": 0.25,
        "presence_penalty": 1,
        "seed": 11,
        "n": 2,
        "stop": ["a word of the user"],
    }
    with traced(config_file) as (live, receiver):
        assert live.chat({"best_of_n": {"n": 3}}, **fields).status_code == 200
        assert live.chat({"best_of_n": {"n": 2}}, stream=True).status_code == 200
        live.get("/nothing/here")
        flush(live)
    several, streamed = (span["attributes"] for span in receiver.named(ROUTE))
    assert several["gen_ai.provider.name"] == "infer_align"
    assert several["gen_ai.request.choice.count"] == 2
    assert "gen_ai.request.stream" not in several
    assert streamed["gen_ai.request.stream"] is True
    assert "gen_ai.request.choice.count" not in streamed
    candidate = receiver.named("chat fake")[0]["attributes"]
    assert candidate["gen_ai.operation.name"] == "chat"
    assert candidate["gen_ai.provider.name"] == "infer_align"
    assert candidate["gen_ai.response.finish_reasons"] == ["stop"]
    requested = {name: value for name, value in candidate.items() if "gen_ai.request" in name}
    assert requested == {
        "gen_ai.request.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.frequency_penalty": 0.25,
        "gen_ai.request.presence_penalty": 1,
        "gen_ai.request.seed": 11,
    }
    # A path that is no route is a text of the client.
    (lost,) = receiver.named("GET")
    assert "http.route" not in lost["attributes"]
    assert lost["attributes"]["http.response.status_code"] == 404
    assert receiver.resources[0]["service.instance.id"]


def test_a_method_that_nobody_knows_is_no_name() -> None:
    assert span_name("POST", "/v1/rerank") == "POST /v1/rerank"
    assert span_name("MY-SECRET") == "HTTP"


def test_a_score_that_is_missing_has_the_type_of_its_error(config_file: ConfigFile) -> None:
    rewards = {"picky": 1, "silent": 0}
    for capture in ("false", "true"):
        with traced(config_file, settings=f"capture_content = {capture}") as (live, receiver):
            assert live.chat({"best_of_n": {"n": 2}, "rewards": rewards}).status_code == 200
            flush(live)
        events = {}
        for event in receiver.events:
            facts = event["attributes"]
            key = (facts["gen_ai.evaluation.name"], facts["infer_align.candidate.index"])
            events[key] = facts
        # The candidates are "candidate 3" and "candidate 1"; the reward cannot read the first.
        assert events["picky", 0]["error.type"] == "RuntimeError"
        assert "gen_ai.evaluation.score.value" not in events["picky", 0]
        assert events["picky", 1]["gen_ai.evaluation.score.value"] == 1.0
        assert "error.type" not in events["picky", 1]
        assert events["silent", 1]["error.type"] == "not_scored"
        explanation = events["picky", 0].get("gen_ai.evaluation.explanation")
        assert explanation == ("RuntimeError: three is too much" if capture == "true" else None)
