"""LiteLLM's proxy in front of the server, with the configuration that docs/litellm.md explains."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.serving.ports import free_port
from tests import environments
from tests.server.conftest import Live, Serve
from tests.server.processes import LOCAL

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

RECIPE = Path(__file__).parents[2] / "deploy/litellm/config.yaml"
KEY, PROXY_KEY = "key-of-infer-align", "sk-key-of-the-proxy"
CONFIG = """
[server]
api_keys_env = "TEST_PROXY_KEYS"
[engine]
kind = "fake"
model = "demo"
replies = [{text = "candidate 3"}, {text = "candidate 1"}, {text = "candidate 9"}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[presets.careful]
best_of_n = {n = 3}
"""
QUESTION = {"messages": [{"role": "user", "content": "hello"}]}
START_SECONDS = 120


@pytest.fixture(scope="module")
def live(serve: Serve) -> Iterator[Live]:
    """The server, with a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PROXY_KEYS", KEY)
        yield serve(CONFIG)


@pytest.fixture(scope="module")
def proxy(live: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of LiteLLM's proxy before the server."""
    port = free_port()
    folder = tmp_path_factory.mktemp("litellm")
    variables = {
        **environments.variables(),
        "INFER_ALIGN_URL": live.base_url,
        "INFER_ALIGN_KEY": KEY,
        "LITELLM_MASTER_KEY": PROXY_KEY,
    }
    command = [environments.program("litellm", "litellm"), "--config", str(RECIPE)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=variables,
            stdout=output,
            stderr=output,
        )
    headers = {"authorization": f"Bearer {PROXY_KEY}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, **LOCAL) as http:
        try:
            wait_until_alive(http, process, log)
            yield http
        finally:
            process.terminate()
            process.wait(60)


def wait_until_alive(http: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if http.get("/health/liveliness").is_success:
                return
        except httpx2.HTTPError:
            time.sleep(0.2)
    raise AssertionError(log.read_text(encoding="utf-8")[-4000:])


def ask(proxy: httpx2.Client, model: str, **fields: Any) -> Any:
    answer = proxy.post("/v1/chat/completions", json={"model": model, **QUESTION, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    ("model", "fields", "text", "candidates"),
    [
        ("demo", {}, "candidate 3", None),
        ("demo-careful", {}, "candidate 9", 3),
        ("demo-best", {}, "candidate 9", 4),
        ("demo", {"align": {"best_of_n": {"n": 2}}}, "candidate 3", 2),
    ],
)
def test_each_model_of_the_recipe_answers(
    proxy: httpx2.Client, model: str, fields: dict[str, Any], text: str, candidates: int | None
) -> None:
    answer = ask(proxy, model, **fields)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["usage"]["completion_tokens"] == 2 * (candidates or 1)
    assert len(answer.get("align", {}).get("candidates", ())) == (candidates or 0)


def test_a_stream_is_the_chosen_answer(proxy: httpx2.Client) -> None:
    body = {"model": "demo-best", **QUESTION, "stream": True}
    answer = proxy.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    *events, end = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert end == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "candidate 9"


def test_a_refusal_names_the_field_to_the_client_of_the_proxy(proxy: httpx2.Client) -> None:
    body = {"model": "demo", **QUESTION, "align": {"best_of_n": {"n": "x"}}}
    answer = proxy.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "align.best_of_n.n"
    assert "align.best_of_n.n: 'x' is not allowed" in error["message"]


def test_documents_are_ranked_by_the_rewards(proxy: httpx2.Client) -> None:
    documents = ["candidate 1", "candidate 9"]
    body = {"model": "demo-rerank", "query": "hello", "documents": documents}
    answer = proxy.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    assert [each["index"] for each in answer.json()["results"]] == [1, 0]


def test_the_proxy_sends_the_key_of_the_server_and_not_its_own(
    proxy: httpx2.Client, live: Live
) -> None:
    assert live.post({**QUESTION}, headers={"authorization": f"Bearer {PROXY_KEY}"}).is_error
    ask(proxy, "demo")


def test_the_proxy_is_an_upstream_too(
    proxy: httpx2.Client, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PROXY_KEY", PROXY_KEY)
    url = str(proxy.base_url).rstrip("/")
    engine = f'[engine]\nkind = "openai"\nurls = ["{url}/v1"]\napi_key_env = "TEST_PROXY_KEY"\n'
    reward = CONFIG[CONFIG.index("[rewards.number]") :]
    front = serve(engine + reward)
    answer = front.post({"model": "demo", **QUESTION, "align": {"best_of_n": {"n": 3}}})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "candidate 9"
