"""The real command: how it starts and ends, and how it survives the death of its workers."""

from __future__ import annotations

import json
import os
import re
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

from benchmarks.serving.ports import free_port
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
from tests.engines.vllm.conftest import LIMIT_SECONDS
from tests.engines.vllm.stepping import ENVIRONMENT

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "server"))
CONFIG = str(ROOT / "infer_align/demo/vllm.toml")
QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
    "max_tokens": 8,
}
BEST = {**QUESTION, "align": {"best_of_n": {"n": 4}}}
LONG_STREAM = {
    **QUESTION,
    "align": {"best_of_n": {"n": 32}},
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
}


class Process:
    """`infer-align serve` on vLLM, with all processes that it starts."""

    def __init__(self, *settings: str) -> None:
        self.port = free_port()
        arguments = ["--set", f"server.port={self.port}"]
        for setting in settings:
            arguments += ["--set", setting]
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - closed at the end
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "infer_align_server", "serve", CONFIG, *arguments],
            # vLLM logs as much as it does for operators.
            env={
                **os.environ,
                **ENVIRONMENT,
                "PYTHONPATH": PYTHONPATH,
                "VLLM_LOGGING_LEVEL": "INFO",
            },
            cwd=ROOT,
            stderr=self._log,
            stdout=subprocess.DEVNULL,
        )
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60
        )
        self._descendants: set[psutil.Process] = set()

    def get(self, path: str) -> httpx2.Response | None:
        try:
            return self.http.get(path)
        except httpx2.TransportError:
            return None

    def post(self, body: dict[str, Any]) -> httpx2.Response:
        return self.http.post("/v1/chat/completions", json=body)

    def children(self) -> set[psutil.Process]:
        """Return the descendants that run, also those whose parent has died."""
        with suppress(psutil.NoSuchProcess):
            self._descendants |= set(psutil.Process(self.popen.pid).children(recursive=True))
        return {child for child in self._descendants if is_running(child)}

    def until(self, condition: Callable[[], Any]) -> bool:
        """Wait until the condition is true; return False if it is not within a generous limit."""
        end = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if time.monotonic() > end:
                return False
            # A worker must be found while it is alive, to be missed afterwards.
            self.children()
            time.sleep(0.05)
        return True

    def is_ready(self) -> bool:
        response = self.get("/ready")
        assert self.popen.poll() is None, self.log()
        return response is not None and response.status_code == 200

    def unready_reason(self) -> str:
        response = self.get("/ready")
        assert response is not None
        assert response.status_code == 503
        return str(response.json()["reason"])

    def terminate(self) -> int:
        """Ask the server to end; return its exit status."""
        self.popen.terminate()
        return self.popen.wait(LIMIT_SECONDS)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def end(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)
        for child in self.children():
            child.kill()
        self.http.close()
        self._log.close()


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    """Return `serve("engine.x=1", ...)`, which starts a process that ends after the test."""
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


def test_a_dead_worker_is_noticed_and_no_process_stays(serve: Callable[..., Process]) -> None:
    process = serve()
    assert process.until(lambda: process.get("/health")), "the server answers while vLLM loads"
    assert process.unready_reason().startswith("the models are still loading (engine demo")
    assert process.post(QUESTION).status_code == 503
    assert process.until(process.is_ready)
    for body in (QUESTION, BEST):
        assert process.post(body).status_code == 200

    workers = process.children()
    assert workers
    with process.http.stream("POST", "/v1/chat/completions", json=LONG_STREAM):
        for worker in workers:
            worker.kill()
    assert process.until(lambda: not process.is_ready())
    assert "has stopped" in process.unready_reason()
    for body in (QUESTION, BEST, {**QUESTION, "stream": True}):
        refused = process.post(body)
        assert refused.status_code == 503
        assert "has stopped" in refused.json()["error"]["message"]
    assert process.get("/health")

    assert process.terminate() == 0
    assert process.until(lambda: not process.children()), process.children()
    check_log(process.log())


def check_log(text: str) -> None:
    """Check that records can be formatted, and that those of the server's process are JSON."""
    assert "Logging error" not in text
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    by_vllm = [event for event in events if event["logger"].startswith("vllm")]
    assert any("engine" in event["event"].lower() for event in by_vllm), by_vllm
    for event in events:
        assert not event.keys() & {"vllm_process_name", "fileinfo"}
    # The lines of text come from vLLM's other processes.
    assert "(MainProcess pid=" not in text
    assert "(APIServer pid=" not in text


def test_a_busy_server_ends_without_leaving_a_process(serve: Callable[..., Process]) -> None:
    process = serve("server.drain_seconds=1")
    assert process.until(process.is_ready)
    with process.http.stream("POST", "/v1/chat/completions", json=LONG_STREAM):
        process.popen.terminate()
    assert process.popen.wait(LIMIT_SECONDS) == 0
    assert process.until(lambda: not process.children()), process.children()
    assert "output_handler failed" not in process.log()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("engine.max_model_len=1000000", "max_model_len"),
        # The worker fails, and its own error is the reason.
        (
            "engine.kv_cache_memory_bytes=1000",
            "vLLM could not start: ValueError: .*cache.* Correct the options",
        ),
        ("engine.quantization=nonsense", "quantization"),
    ],
)
def test_a_server_that_cannot_start_ends_with_the_reason(
    serve: Callable[..., Process], setting: str, reason: str
) -> None:
    process = serve(setting)
    assert process.until(lambda: process.popen.poll() is not None), "it hangs"
    assert process.popen.returncode == 2
    assert re.search(reason, process.log()), process.log()[-3000:]
    assert "configuration:" in process.log()
    assert process.until(lambda: not process.children()), process.children()


def test_a_server_that_still_loads_ends_without_waiting_for_the_model(
    serve: Callable[..., Process],
) -> None:
    process = serve()
    assert process.until(process.children), "the worker starts"
    assert process.terminate() == 0, process.log()
    assert process.until(lambda: not process.children()), process.children()
    log = process.log()
    assert "engine demo" in log
    assert ": importing vLLM" in log
    assert "OpenAI layer" not in log, "the phase that follows the model is not reached"


def test_a_dead_reward_engine_is_noticed(
    serve: Callable[..., Process], pooling_model: Callable[[int], str]
) -> None:
    options = {
        "dtype": '"float32"',
        "enforce_eager": "true",
        "kv_cache_memory_bytes": "33554432",
        "max_model_len": "256",
        "block_size": "32",
    }
    fields = ", ".join(f"{name} = {value}" for name, value in options.items())
    model = pooling_model(1)
    process = serve(f'rewards.quality={{kind = "pooling", model = "{model}", {fields}}}')
    assert process.until(process.is_ready)
    assert process.post(BEST).status_code == 200, "the generator and the reward run together"
    newest = max(process.children(), key=lambda child: child.create_time())
    newest.kill()
    assert process.until(lambda: not process.is_ready())
    assert process.unready_reason().startswith("reward quality: vLLM's engine of")
    assert process.post(BEST).status_code == 503
