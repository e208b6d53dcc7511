"""A real Prometheus scrapes a running server, and answers every query of the board and the alerts.

The tests are skipped where Prometheus is not installed.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from benchmarks.serving.ports import free_port
from tests.server.conftest import Live, Serve
from tests.server.processes import LOCAL
from tests.server.test_deploy import DEPLOY, board_queries

pytestmark = pytest.mark.slow

CONFIG = """
[engine]
kind = "fake"
replies = [{text = "candidate 3"}, {text = "candidate 9"}, {text = "no number"}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.wrong]
kind = "callable"
function = "tests.server.scorers:fails"
"""
HELLO = [{"role": "user", "content": "hello"}]
BEST = {"best_of_n": {"n": 2}, "rewards": {"number": 1.0, "wrong": 0.0}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "align": BEST}),
    ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
    ("/v1/rerank", {"model": "number", "query": "hello", "documents": ["1", "2"]}),
    (
        "/v1/align/verify",
        {"task": "hello", "candidates": ["1"], "rewards": {"number": 1.0}},
    ),
]
LIMIT_SECONDS = 60


@pytest.fixture(scope="module")
def live(serve: Serve) -> Live:
    """The server that is scraped."""
    return serve(CONFIG)


@pytest.fixture(scope="module")
def prometheus(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a Prometheus with the configuration of the composition."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    text = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    for old, new in (
        ("server:8000", live.root.removeprefix("http://")),
        ("scrape_interval: 15s", "scrape_interval: 200ms\n  evaluation_interval: 200ms"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        cwd=folder,
    )
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", **LOCAL) as http:
        yield http
    process.terminate()
    process.wait(LIMIT_SECONDS)


def read(prometheus: httpx2.Client, path: str, **parameters: str) -> Any:
    """Return what Prometheus answers; None while it does not."""
    try:
        answer = prometheus.get(f"/api/v1/{path}", params=parameters)
    except httpx2.HTTPError:
        return None
    if answer.status_code == 503:
        return None
    assert answer.json()["status"] == "success", answer.text
    return answer.json()["data"]


def send(live: Live) -> None:
    for path, body in REQUESTS:
        answer = live.post(body, path)
        assert answer.status_code == 200, answer.text


def test_every_query_of_the_board_has_a_figure(live: Live, prometheus: httpx2.Client) -> None:
    unanswered = set(board_queries())
    assert len(unanswered) > 10
    end = time.monotonic() + LIMIT_SECONDS
    while unanswered and time.monotonic() < end:
        send(live)
        for query in sorted(unanswered):
            data = read(prometheus, "query", query=query)
            if data is not None and data["result"]:
                unanswered.remove(query)
    assert unanswered == set()


def test_every_alert_is_evaluated_and_none_fires(live: Live, prometheus: httpx2.Client) -> None:
    states: list[tuple[str, str, str]] = [("", "unknown", "")]
    end = time.monotonic() + LIMIT_SECONDS
    while any(health == "unknown" for _, health, _ in states) and time.monotonic() < end:
        send(live)
        data = read(prometheus, "rules") or {"groups": [{"rules": []}]}
        rules = data["groups"][0]["rules"]
        states = [(rule["name"], rule["health"], rule.get("lastError", "")) for rule in rules] or [
            ("", "unknown", "")
        ]
    assert len(states) > 5
    assert [state for state in states if state[1] != "ok"] == []
    firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
    assert firing == []
