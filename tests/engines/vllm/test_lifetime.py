"""Starting, dying and ending: the real command, its worker processes, and what is left of them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
from tests.engines.vllm.stepping import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "server"))
CONFIG = str(ROOT / "infer_align/demo/vllm.toml")
ASK = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
    "max_tokens": 8,
}
BEST = {**ASK, "align": {"best_of_n": {"n": 4}}}
LONG = {**BEST, "max_tokens": 400, "ignore_eos": True, "align": {"best_of_n": {"n": 32}}}


class Process:
    """`infer-align serve` on vLLM, and all that it started."""

    def __init__(self, *settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        words = [
            word
            for setting in (f"server.port={self.port}", *settings)
            for word in ("--set", setting)
        ]
        self.log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - closed at the end
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "infer_align_server", "serve", CONFIG, *words],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": PATHS},
            cwd=ROOT,
            stderr=self.log,
            stdout=subprocess.DEVNULL,
        )
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60
        )
        self.seen: set[psutil.Process] = set()

    def get(self, path: str) -> httpx2.Response | None:
        try:
            return self.http.get(path)
        except httpx2.TransportError:
            return None

    def children(self) -> set[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.popen.pid).children(recursive=True))
        return {
            child
            for child in self.seen
            if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        }

    def until(self, condition: Callable[[], Any], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                return False
            self.children()
            time.sleep(0.05)
        return True

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)
        for child in self.children():
            child.kill()
        self.http.close()
        self.log.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    """`serve("engine.x=1", ...)`: a process, ended after the test."""
    try:
        vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)
    started: list[Process] = []

    def start(*settings: str) -> Process:
        started.append(Process(*settings))
        return started[-1]

    yield start
    for process in started:
        process.end()


def is_ready(process: Process) -> bool:
    answer = process.get("/ready")
    assert process.popen.poll() is None, process.said()
    return answer is not None and answer.status_code == 200


def test_a_worker_that_dies_is_noticed_and_nothing_is_left_at_the_end(
    serve: Callable[..., Process],
) -> None:
    process = serve()
    assert process.until(lambda: process.get("/health"), 60), "the server answers while vLLM loads"
    loading = process.get("/ready")
    assert loading is not None
    assert loading.status_code == 503
    assert loading.json()["reason"].startswith("the models are still loading (engine demo")
    assert process.http.post("/v1/chat/completions", json=ASK).status_code == 503
    assert process.until(lambda: is_ready(process), 240)
    for body in (ASK, BEST):
        assert process.http.post("/v1/chat/completions", json=body).status_code == 200

    workers = process.children()
    assert workers
    with process.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}):
        for worker in workers:
            worker.kill()
    assert process.until(lambda: not is_ready(process), 20)
    ready = process.get("/ready")
    assert ready is not None
    assert "died" in ready.json()["reason"]
    for body in (ASK, BEST, {**ASK, "stream": True}):
        refused = process.http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert "died" in refused.json()["error"]["message"]
    assert process.get("/health")

    process.popen.terminate()
    assert process.popen.wait(60) == 0
    assert process.until(lambda: not process.children(), 5), process.children()


def test_ended_while_it_works_it_leaves_no_process(serve: Callable[..., Process]) -> None:
    process = serve("server.drain_seconds=1")
    assert process.until(lambda: is_ready(process), 240)
    with process.http.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}):
        process.popen.terminate()
    assert process.popen.wait(60) == 0
    assert process.until(lambda: not process.children(), 5), process.children()
    assert "output_handler failed" not in process.said()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("engine.max_model_len=1000000", "max_model_len"),
        (
            "engine.kv_cache_memory_bytes=1000",
            "Engine core initialization failed",
        ),  # the worker finds out, and logs why
        ("engine.quantization=nonsense", "quantization"),
    ],
)
def test_what_cannot_start_ends_with_the_reason(
    serve: Callable[..., Process], setting: str, said: str
) -> None:
    process = serve(setting)
    assert process.until(lambda: process.popen.poll() is not None, 240), "it hangs"
    assert process.popen.returncode == 2
    assert re.search(said, process.said())
    assert "configuration:" in process.said()
    assert process.until(lambda: not process.children(), 5), process.children()


def test_told_to_stop_while_it_loads_it_does_not_wait_for_the_model(
    serve: Callable[..., Process],
) -> None:
    process = serve()
    assert process.until(process.children, 120), "the worker starts"
    started = time.monotonic()
    process.popen.terminate()
    assert process.popen.wait(30) == 0, process.said()
    assert time.monotonic() - started < 8
    assert process.until(lambda: not process.children(), 5), process.children()


def test_a_reward_engine_that_dies_is_noticed(
    serve: Callable[..., Process], pooling_model: Callable[[int], str]
) -> None:
    options = 'dtype = "float32", enforce_eager = true, kv_cache_memory_bytes = 33554432, max_model_len = 256, block_size = 32'
    process = serve(
        f'rewards.quality={{kind = "pooling", model = "{pooling_model(1)}", {options}}}'
    )
    assert process.until(lambda: is_ready(process), 300)
    assert process.http.post("/v1/chat/completions", json=BEST).status_code == 200, (
        "generator and reward side by side"
    )
    newest = max(process.children(), key=lambda child: child.create_time())
    newest.kill()
    assert process.until(lambda: not is_ready(process), 20)
    ready = process.get("/ready")
    assert ready is not None
    assert ready.json()["reason"].startswith("reward quality: vLLM's engine of")
    assert process.http.post("/v1/chat/completions", json=BEST).status_code == 503
