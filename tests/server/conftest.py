"""Servers on free ports over the fake engine, and clients for them.

A test never depends on the speed of the machine. It waits for a condition with `Live.until`, whose
limit only ends a test that fails. Work that must not end by itself takes an hour (`FOREVER`) or
waits for an event of `tests.server.scorers`.
"""

# ruff: noqa: PLC0415 - torch is loaded by the tests that want it
from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer_align import config as configuration
from infer_align.engines.fake import FakeEngine
from infer_align_server.app import create_app
from infer_align_server.service import Service
from infer_align_server.wire.protocol import BoundedProtocol
from tests.server import scorers
from tests.server.processes import Process
from tests.threaded_server import ThreadedServer

# The longest time to wait for anything, shorter than the timeout of one test.
LIMIT_SECONDS = 100
# Longer than any test: for work that ends only if it is cancelled.
FOREVER = 3600

# The script of most tests: candidate i is "candidate <number>", so a reward that reads the number
# gives a known ranking.
NUMBERS = """
[engine]
kind = "fake"
replies = [
    {text = "candidate 3"},
    {text = "candidate 1"},
    {text = "candidate 9"},
    {text = "candidate 9"},
    {text = "candidate 5"},
]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.broken]
kind = "callable"
function = "tests.server.scorers:fails"
[rewards.silent]
kind = "callable"
function = "tests.server.scorers:nan"
[rewards.picky]
kind = "callable"
function = "tests.server.scorers:fails_on_3"
[rewards.infinite]
kind = "callable"
function = "tests.server.scorers:infinite"
[rewards.constant]
kind = "callable"
function = "tests.server.scorers:constant"
[presets.best]
best_of_n = {n = 5}
ensemble = {objective = "mean"}
[presets.three]
best_of_n = {n = 3}
rewards = {number = 1.0}
[server]
default_rewards = {number = 1.0}
"""
USER = [{"role": "user", "content": "hello there"}]


@dataclass
class Live:
    """A running server, with access to its service."""

    base_url: str
    service: Service
    server: ThreadedServer

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.service.engine, FakeEngine)
        return self.service.engine

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    def http(self, **options: Any) -> httpx2.Client:
        # verify=False saves the set-up of TLS, which is slow and not used here.
        return httpx2.Client(
            base_url=self.root, timeout=LIMIT_SECONDS, trust_env=False, verify=False, **options
        )

    def post(
        self, body: object, path: str = "/v1/chat/completions", **options: Any
    ) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.http() as client:
            return client.post(path, content=content, **options)

    def chat(self, align: object = None, **fields: Any) -> httpx2.Response:
        body = {"model": self.service.model, "messages": USER, **fields}
        return self.post(body if align is None else {**body, "align": align})

    def get(self, path: str, **options: Any) -> httpx2.Response:
        with self.http() as client:
            return client.get(path, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of one sample; 0 if there is none yet."""
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def until(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        """Wait until a condition is true; return False if it is not within the limit."""
        end_time = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end_time:
                return False
            time.sleep(0.01)
        return True

    def idle(self, seconds: float = LIMIT_SECONDS) -> bool:
        """Wait until nothing runs, waits or holds a place; return False if something stays."""
        admission = self.service.admission

        def is_idle() -> bool:
            busy = (
                self.engine.running,
                admission.running,
                admission.queued,
                admission.running_tokens,
            )
            return not any(busy)

        return self.until(is_idle, seconds)


Serve = Callable[[str], Live]


def start(config: configuration.Config, *, wait: bool = True) -> Live:
    """Serve in a thread; with `wait`, return when loading has ended, well or not."""
    app = create_app(config)
    server = ThreadedServer(app, http=BoundedProtocol, timeout_graceful_shutdown=5)
    live = Live(f"http://127.0.0.1:{server.port}/v1", app.state.service, server)
    if wait:
        assert live.until(live.service.settled.is_set)
    return live


def end(live: Live) -> None:
    """Stop a server and wait for its end."""
    live.server.end()


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`config_file(toml)`: the path of a file with this text."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("config") / "infer-align.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def serve(config_file: Callable[[str], Path]) -> Iterator[Serve]:
    """`serve(toml)`: a running server with this configuration; equal texts share a server."""
    running: dict[str, Live] = {}

    def serve(text: str) -> Live:
        if text not in running:
            running[text] = start(configuration.load(config_file(text)))
        return running[text]

    yield serve
    for live in running.values():
        live.server.begin_end()
    for live in running.values():
        end(live)


@pytest.fixture
def command() -> Iterator[Callable[..., Process]]:
    """`command("MODEL", "--name", "x")`: a running `infer-align serve` on a free port."""
    processes: list[Process] = []

    def spawn(*arguments: str, fresh: bool = False, **environment: str) -> Process:
        process = Process("--port", "0", *arguments, fresh=fresh, **environment)
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
        process.wait()


@pytest.fixture
def process(
    config_file: Callable[[str], Path], command: Callable[..., Process]
) -> Callable[..., Process]:
    """`process(toml, "--set", ...)`: a running `infer-align serve` with this configuration."""

    def spawn(text: str, *arguments: str, **environment: str) -> Process:
        return command(str(config_file(text)), *arguments, **environment)

    return spawn


@pytest.fixture
def hold() -> Iterator[threading.Event]:
    """The event that the reward `tests.server.scorers:hanging` waits for; set after the test."""
    scorers.hold.clear()
    yield scorers.hold
    scorers.hold.set()


@pytest.fixture(scope="session")
def numbers(serve: Serve) -> Live:
    """The server with the configuration NUMBERS."""
    return serve(NUMBERS)


@pytest.fixture
def client(numbers: Live) -> Iterator[openai.OpenAI]:
    """The unchanged OpenAI SDK with the server `numbers`."""
    with openai.OpenAI(
        base_url=numbers.base_url, api_key="unused", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        yield client


@pytest.fixture
def framing_tokenizer(byte_level: Any) -> Callable[[str | None], Any]:
    """Return a function that makes a tokenizer that adds <pad> and </s> around a text.

    Its argument is the chat template.
    """

    def make(template: str | None) -> Any:
        from tokenizers import Tokenizer, processors
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 1)]
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", cls_token="<pad>"
        )
        fast.chat_template = template
        return fast

    return make
