"""The features for operators: API keys, limits, the queue, readiness and metrics."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer_align import config as configuration
from infer_align.engines.fake import Fake, FakeEngine
from infer_align.errors import ConfigError
from infer_align_server.app import create_app
from tests.server.conftest import LIMIT_SECONDS, end, start

FAKE = '[engine]\nkind = "fake"\n'
# The reward waits for the event `hold`, so a selection runs until the test sets it.
HANGING = (
    '[engine]\nkind = "fake"\nreplies = [{text = "one 2"}]\n'
    '[rewards.hanging]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
)
BEST_OF_TWO = {"best_of_n": {"n": 2}, "rewards": {"hanging": 1}}


# --- keys ---


@pytest.fixture
def keyed(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TEST_OPERATIONS_KEYS", " first-key , second-key,")
    return serve(
        '[server]\napi_keys_env = "TEST_OPERATIONS_KEYS"\n'
        f"[limits]\nrequests_per_minute = 600\n{FAKE}"
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
def test_a_request_without_a_valid_key_is_401(keyed: Any, header: str | None, path: str) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    answer = keyed.post({}, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fake", "/v1/align/methods"])
def test_listing_routes_need_a_key(keyed: Any, path: str) -> None:
    assert keyed.get(path).status_code == 401
    for key in ("first-key", "second-key"):
        assert keyed.get(path, headers={"authorization": f"bearer {key}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(keyed: Any, path: str) -> None:
    assert keyed.get(path).status_code == 200


@pytest.mark.parametrize("value", [None, "", " , "])
def test_missing_keys_stop_the_start(
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


def test_the_rate_limit_is_per_key(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_RATE_KEYS", "a,b")
    live = serve(
        f'[server]\napi_keys_env = "TEST_RATE_KEYS"\n[limits]\nrequests_per_minute = 3\n{FAKE}'
    )
    # The test moves the clock by hand, so that the bucket does not fill meanwhile.
    live.service._limits.requests._clock = lambda: 0.0
    body = {"messages": [{"role": "user", "content": "hello"}]}
    answers = [live.post(body, headers={"authorization": "Bearer a"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert live.post(body, headers={"authorization": "Bearer b"}).status_code == 200


def test_a_full_queue_is_429_with_retry_after(serve: Any, hold: threading.Event) -> None:
    live = serve(f"[limits]\nmax_running = 1\nmax_queue = 1\n{HANGING}")
    answers: list[httpx2.Response] = []

    def send() -> None:
        answers.append(live.chat(BEST_OF_TWO))

    threads = [threading.Thread(target=send) for _ in range(2)]
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
    hold.set()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    assert live.idle()


def test_a_deadline_includes_the_time_in_the_queue(serve: Any, hold: threading.Event) -> None:
    live = serve(f"[limits]\nmax_running = 1\n{HANGING}")
    running = threading.Thread(target=live.chat, args=(BEST_OF_TWO,))
    running.start()
    assert live.until(lambda: live.service.admission.running == 1)
    for stream in (False, True):
        answer = live.chat({"budget": {"deadline_seconds": 0.2}}, stream=stream)
        assert answer.status_code == 504
        assert "not admitted within its 0.2 s" in answer.json()["error"]["message"]
    hold.set()
    running.join()
    assert live.idle()


def test_running_tokens_bound_the_running_requests(serve: Any, hold: threading.Event) -> None:
    live = serve(f"[limits]\nmax_running_tokens = 100\n{HANGING}")
    admission = live.service.admission
    request = {"align": BEST_OF_TWO, "max_tokens": 20}
    threads = [threading.Thread(target=live.chat, kwargs=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert live.until(lambda: admission.running + admission.queued == 4)
    assert admission.running == 2
    assert admission.running_tokens <= 100
    hold.set()
    for thread in threads:
        thread.join()
    answer = live.chat(max_tokens=4000)
    assert answer.status_code == 200, "a request alone is bounded by its own limit only"
    assert live.idle()


# --- readiness ---


class GatedEngine(FakeEngine):
    """A fake engine whose loading waits for an event of the test."""

    def __init__(self, script: Fake) -> None:
        super().__init__(script)
        self.may_load = threading.Event()

    async def start(self) -> None:
        await asyncio.to_thread(self.may_load.wait)
        await super().start()


@dataclass(frozen=True)
class GatedSection:
    """The `[engine]` section of a GatedEngine."""

    def load(self) -> GatedEngine:
        return GatedEngine(Fake())


def test_ready_reports_loading_serving_and_draining() -> None:
    live = start(configuration.Config(engine=GatedSection(), engine_kind="fake"), wait=False)
    engine = live.engine
    assert isinstance(engine, GatedEngine)
    try:
        assert live.until(lambda: "engine" in live.get("/ready").text)
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
        engine.may_load.set()
        assert live.until(lambda: live.get("/ready").status_code == 200)
        assert live.metric("infer_align_ready") == 1
        assert live.chat().status_code == 200
        live.service.drain()
        drained = live.get("/ready")
        assert drained.status_code == 503
        assert drained.json()["reason"] == "the server is shutting down"
        # What arrives on an accepted connection is finished.
        assert live.chat().status_code == 200
        assert live.get("/health").status_code == 200
    finally:
        engine.may_load.set()
        end(live)


def test_the_drain_waits_for_a_request_that_is_planned(
    config_file: Callable[[str], Path], hold: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "infer_align")
    live = start(configuration.load(config_file(HANGING)))
    # The scores of the choice are a part of the plan, and the reward waits for `hold`.
    choice = {"chosen": "one 2", "rejected": "one 1"}
    align = {**BEST_OF_TWO, "profile": {"choices": [choice]}}
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(live.chat, align)
            assert live.until(lambda: live.service.open_requests == 1)
            closing = live.server.begin(live.service.close())
            # The end of the drain would be logged in the first round of the loop.
            live.server.begin(asyncio.sleep(0)).result(LIMIT_SECONDS)
            assert "drain started" in caplog.text
            assert "drain ended" not in caplog.text
            assert live.service.admission.running == live.service.preparing.running == 0
            hold.set()
            assert answer.result(LIMIT_SECONDS).status_code == 200
        closing.result(LIMIT_SECONDS)
        assert "drain ended" in caplog.text
        assert live.service.open_requests == 0
    finally:
        hold.set()
        end(live)


def test_ready_gives_the_reason_of_a_failed_load(
    config_file: Callable[[str], Path], tmp_path: Path
) -> None:
    text = f'[rewards.gone]\nkind = "classifier"\nmodels = ["{tmp_path}/none"]\n{FAKE}'
    live = start(configuration.load(config_file(text)))
    try:
        answer = live.get("/ready")
        assert answer.status_code == 503
        assert answer.json()["reason"].startswith("loading failed: ")
        assert live.chat().status_code == 503
        assert live.get("/health").status_code == 200
    finally:
        end(live)


# --- metrics ---


def test_metrics_count_requests_candidates_and_tokens(serve: Any) -> None:
    live = serve(
        f'{FAKE}replies = [{{text = "1"}}, {{text = "1 2 3"}}, {{text = "", error = "x"}}]\n'
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


def test_the_methods_route_lists_methods_rewards_and_presets(numbers: Any) -> None:
    listed = numbers.get("/v1/align/methods").json()
    assert listed["methods"]["best_of_n"]["parameters"]["properties"]["n"]["default"] == 8
    assert {"best_of_n", "ensemble", "budget"} <= set(listed["methods"])
    assert listed["rewards"]["number"] == {
        "description": "The number that the text ends with.",
        "members": ["score"],
        "attributes": [],
        "default_weight": 1.0,
        "parameters": None,
        "cost": "calls the function once per answer",
        "warnings": [],
    }
    assert listed["presets"]["best"] == {"best_of_n": {"n": 5}, "ensemble": {"objective": "mean"}}
    json.dumps(listed, allow_nan=False)
