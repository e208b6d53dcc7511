"""A reward that fails: drawn once, counted, logged with its traceback, and charged."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from infer_align_server import logs
from tests.server.conftest import NUMBERS

USER: Any = [{"role": "user", "content": "hello there"}]
KEY = "sk-a-secret-key-of-one-caller"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that reads the events that were logged since the last call."""
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    loggers = [logging.getLogger(), logging.getLogger("infer_align")]
    loggers.append(logging.getLogger("uvicorn.error"))
    before = [(each, each.handlers, each.propagate, each.level) for each in loggers]
    logs.configure("info")

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.getvalue().splitlines()]

    yield read
    logging.captureWarnings(capture=False)
    logs.access.close()
    for logger, handlers, propagate, level in before:
        logger.handlers = handlers
        logger.propagate = propagate
        logger.setLevel(level)


def named(name: str) -> str:
    """Return the configuration under a name: servers of the same text share their metrics."""
    return f"# {name}\n{NUMBERS}"


def align(reward: str, n: int = 3) -> dict[str, Any]:
    return {"align": {"best_of_n": {"n": n}, "rewards": {reward: 1}}}


@pytest.mark.parametrize("reward", ["broken", "silent"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_sdk_with_retries_draws_once(serve: Any, reward: str, stream: bool) -> None:
    live = serve(named(f"once {reward} {stream}"))
    with (
        openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=2) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.chat.completions.create(
            model="fake", messages=USER, stream=stream, extra_body=align(reward)
        )
    assert caught.value.status_code == 424
    assert caught.value.code == "reward_failed"
    assert caught.value.response.headers["x-should-retry"] == "false"
    route = "/v1/chat/completions"
    assert live.metric("infer_align_requests_total", route=route) == 1
    # Three candidates of two tokens.
    assert live.metric("infer_align_tokens_total", kind="rejected") == 6
    assert live.metric("infer_align_tokens_total", kind="prompt") == 2
    assert live.metric("infer_align_reward_failures_total", reward=reward) == 3
    assert live.metric("infer_align_reward_seconds_count", reward=reward) == 1


def test_scoring_given_candidates_is_not_repeated_either(serve: Any) -> None:
    live = serve(named("given candidates"))
    body = {"messages": USER, "candidates": ["candidate 1", "x"], "rewards": {"broken": 1}}
    answer = live.post(body, "/v1/align/score")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (424, "false")
    assert live.metric("infer_align_reward_failures_total", reward="broken") == 2


def test_a_reward_that_fails_on_some_candidates_is_logged_and_counted(
    serve: Any, events: Any
) -> None:
    live = serve(named("some candidates"))
    answer = live.post(
        {"messages": USER, **align("picky", 5)}, headers={"x-request-id": "the-request"}
    )
    assert answer.status_code == 200
    assert live.metric("infer_align_reward_failures_total", reward="picky") == 1
    (event,) = [event for event in events() if event["event"] == "reward failed"]
    assert event["reward"] == "picky"
    assert event["candidates"] == 1
    assert event["request_id"] == "the-request"
    assert "three is too much" in event["exception"]
    assert "fails_on_3" in event["exception"], "the traceback names the user's function"


def test_a_reward_that_scores_leaves_no_failure(serve: Any, events: Any) -> None:
    live = serve(named("no failure"))
    assert live.post({"messages": USER, **align("number")}).status_code == 200
    assert live.metric("infer_align_reward_seconds_count", reward="number") == 1
    assert live.metric("infer_align_reward_failures_total", reward="number") == 0
    assert not [event for event in events() if event["event"] == "reward failed"]


def test_a_request_that_fails_at_scoring_pays_for_its_tokens(serve: Any) -> None:
    live = serve(f"{NUMBERS}[limits]\ncandidate_tokens_per_minute = 1000\n")
    tokens = live.service.tokens
    # The clock stands still, so the bucket does not fill up meanwhile.
    tokens._clock = lambda: 0.0
    before = tokens.available("127.0.0.1")
    body = {"messages": USER, "max_tokens": 8, **align("broken")}
    assert live.post(body).status_code == 424
    assert before - tokens.available("127.0.0.1") == 6


def test_an_access_line_says_who_asked_for_what(
    serve: Any, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_ACCESS_KEYS", KEY)
    config = NUMBERS.replace("[server]\n", '[server]\napi_keys_env = "TEST_ACCESS_KEYS"\n')
    live = serve(config)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "mine"}
    body = {"model": "fake@best", "messages": USER}
    assert live.post(body, headers=headers).status_code == 200
    assert live.until(lambda: any(event["event"] == "request" for event in events()))
    (line,) = [event for event in events() if event["event"] == "request"]
    seconds = line.pop("seconds")
    assert seconds >= 0
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "infer_align.access",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "caller": "key 0",
        "model": "fake",
        "preset": "best",
        "methods": ["best_of_n"],
        "candidates": 5,
        "prompt_tokens": 2,
        "completion_tokens": 10,
    }
    assert KEY not in json.dumps(events())


def test_warnings_and_logs_of_libraries_are_json_lines(events: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(capture=True)
        warnings.warn("careful", stacklevel=1)
    logging.getLogger("transformers").warning("odd weights")
    logging.getLogger("asyncio").error("slow")
    assert {event["logger"] for event in events()} == {"py.warnings", "transformers", "asyncio"}


def test_lists_of_models_do_not_count_against_the_rate(serve: Any) -> None:
    live = serve(f"{NUMBERS}[limits]\nrequests_per_minute = 1\n")
    for path in ("/v1/models", "/v1/models/fake", "/v1/align/methods", "/health") * 3:
        assert live.get(path).status_code == 200
    assert live.post({"messages": USER}).status_code == 200
    assert live.post({"messages": USER}).status_code == 429
