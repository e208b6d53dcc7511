"""What an operator relies on: keys, limits, queue, readiness, metrics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer_align import config as configuration
from infer_align.errors import ConfigError
from infer_align_server.app import create_app
from tests.server.conftest import end, start

FAKE = '[engine]\nkind = "fake"\n'
SLOW = '[engine]\nkind = "fake"\nreplies = [{text = "1 2 3 4 5 6", seconds_per_token = 0.15}]\n'


# --- keys ---


@pytest.fixture
def keyed(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TEST_OPERATIONS_KEYS", " first-key , second-key,")
    return serve(
        f'[server]\napi_keys_env = "TEST_OPERATIONS_KEYS"\n[limits]\nrequests_per_minute = 600\n{FAKE}'
    )


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer first",
        "Bearer first-keys",
        "first-key",
        "Basic first-key",
        "Bearer \xe9",
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/align/score", "/v1/align/judge"]
)
def test_no_key_no_service(keyed: Any, header: str | None, path: str) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    answer = keyed.post({}, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fake", "/v1/align/methods"])
def test_keys_guard_what_can_be_read(keyed: Any, path: str) -> None:
    assert keyed.get(path).status_code == 401
    for key in ("first-key", "second-key"):
        assert keyed.get(path, headers={"authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(keyed: Any, path: str) -> None:
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize("value", [None, "", " , "])
def test_keys_that_are_missing_stop_the_start(
    config_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("NO_SUCH_KEYS", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_SUCH_KEYS", value)
    with pytest.raises(ConfigError, match="NO_SUCH_KEYS"):
        create_app(
            configuration.load(config_file(f'[server]\napi_keys_env = "NO_SUCH_KEYS"\n{FAKE}'))
        )


# --- rate and queue ---


def test_the_rate_is_per_key(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_RATE_KEYS", "a,b")
    live = serve(
        f'[server]\napi_keys_env = "TEST_RATE_KEYS"\n[limits]\nrequests_per_minute = 3\n{FAKE}'
    )
    ask = [live.get("/v1/models", headers={"authorization": "Bearer a"}) for _ in range(4)]
    assert [answer.status_code for answer in ask] == [200, 200, 200, 429]
    assert 1 <= int(ask[3].headers["retry-after"]) <= 20
    assert live.get("/v1/models", headers={"authorization": "Bearer b"}).status_code == 200


def test_a_full_queue_is_429_with_retry_after(serve: Any) -> None:
    live = serve(f"[limits]\nmax_running = 1\nmax_queue = 1\n{SLOW}")
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(live.chat())) for _ in range(2)]
    threads[0].start()
    assert live.until(lambda: live.service.admission.running == 1)
    threads[1].start()
    assert live.until(lambda: live.service.admission.queued == 1)
    assert live.metric("infer_align_running_requests") == 1
    assert live.metric("infer_align_queued_requests") == 1
    for stream in (False, True):
        refused = live.chat(stream=stream)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert live.idle()


def test_a_deadline_counts_the_time_in_the_queue(serve: Any) -> None:
    live = serve(f"[limits]\nmax_running = 1\n{SLOW}# queue deadline\n")
    running = threading.Thread(target=live.chat)
    running.start()
    assert live.until(lambda: live.service.admission.running == 1)
    for stream in (False, True):
        answer = live.chat({"budget": {"deadline_seconds": 0.2}}, stream=stream)
        assert answer.status_code == 504
        assert "not admitted within its 0.2 s" in answer.json()["error"]["message"]
    running.join()
    assert live.idle()


def test_running_tokens_bound_what_runs_at_once(serve: Any) -> None:
    live = serve(f"[limits]\nmax_running_tokens = 100\n{SLOW}")
    threads = [threading.Thread(target=live.chat, kwargs={"max_tokens": 40}) for _ in range(4)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, live.service.admission.running)
        assert live.service.admission.running_tokens <= 100
        time.sleep(0.005)
    assert most == 2
    assert live.chat(max_tokens=4000).status_code == 200, (
        "alone, a request is bounded by its own limit only"
    )
    assert live.idle()


# --- readiness ---


def test_ready_tells_the_truth(config_file: Callable[[str], Path]) -> None:
    live = start(
        configuration.load(config_file('[engine]\nkind = "fake"\nload_seconds = 0.5\n')), wait=False
    )
    try:
        loading = live.get("/ready")
        assert loading.status_code == 503
        assert loading.json() == {
            "ready": False,
            "reason": "the models are still loading (engine fake)",
        }
        assert live.get("/health").status_code == 200
        assert live.metric("infer_align_ready") == 0
        early = live.chat()
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "unavailable"
        assert int(early.headers["retry-after"]) >= 1
        assert live.until(lambda: live.get("/ready").status_code == 200, 3)
        assert live.metric("infer_align_ready") == 1
        assert live.chat().status_code == 200
        live.service.drain()
        drained = live.get("/ready")
        assert drained.status_code == 503
        assert drained.json()["reason"] == "the server is shutting down"
        assert live.chat().status_code == 503
        assert (
            live.post({"messages": [], "candidates": ["1"]}, "/v1/align/score").status_code == 503
        )
        assert live.get("/health").status_code == 200
    finally:
        end(live)


def test_ready_after_a_failed_load(config_file: Callable[[str], Path], tmp_path: Path) -> None:
    config = configuration.load(
        config_file(f'[rewards.gone]\nkind = "classifier"\nmodels = ["{tmp_path}/none"]\n{FAKE}')
    )
    live = start(config)
    try:
        answer = live.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"].startswith("loading failed: ")
        assert live.chat().status_code == 503
        assert live.get("/health").status_code == 200
    finally:
        end(live)


# --- metrics ---


def test_metrics(serve: Any) -> None:
    live = serve(
        f'{FAKE}replies = [{{text = "1"}}, {{text = "1 2 3"}}, {{text = "", error = "x"}}]\n# metrics\n'
        '[rewards.words]\nkind = "rules"\nwords_weight = 1.0\n'
    )
    assert live.chat({"best_of_n": {"n": 3}}).status_code == 200
    assert live.chat(stream=True, n=2).status_code == 200
    assert live.chat(n=0).status_code == 400
    assert live.get("/nowhere").status_code == 404
    families = {f.name: f for f in text_string_to_metric_families(live.get("/metrics").text)}
    values = {
        (s.name, *sorted(s.labels.items())): s.value for f in families.values() for s in f.samples
    }
    chat = ("route", "/v1/chat/completions")
    assert values["infer_align_requests_total", chat, ("status", "200")] == 2
    assert values["infer_align_requests_total", chat, ("status", "400")] == 1
    assert values["infer_align_requests_total", ("route", "unknown"), ("status", "404")] == 1
    assert values["infer_align_candidates_total", ("outcome", "kept")] == 1 + 2
    assert values["infer_align_candidates_total", ("outcome", "rejected")] == 1
    assert values["infer_align_candidates_total", ("outcome", "dropped")] == 1
    assert values["infer_align_tokens_total", ("kind", "returned")] == 3 + 4
    assert values["infer_align_tokens_total", ("kind", "rejected")] == 1
    assert values["infer_align_tokens_total", ("kind", "prompt")] == 2 + 2
    assert values["infer_align_request_seconds_count",] == 2
    assert values["infer_align_ttft_seconds_count",] == 1
    assert values["infer_align_scoring_seconds_count",] == 1
    assert values["infer_align_running_requests",] == 0
    assert all(f.documentation for f in families.values())


def test_methods_says_what_can_be_asked_for(numbers: Any) -> None:
    listed = numbers.get("/v1/align/methods").json()
    assert listed["methods"]["best_of_n"]["parameters"]["properties"]["n"]["default"] == 8
    assert {"best_of_n", "ensemble", "budget"} <= set(listed["methods"])
    assert listed["rewards"]["number"] == {
        "description": "The number that the text ends with.",
        "members": ["score"],
        "attributes": [],
        "default_weight": 1.0,
    }
    assert listed["presets"]["best"] == {"best_of_n": {"n": 5}, "ensemble": {"objective": "mean"}}
    json.dumps(listed, allow_nan=False)
