"""vLLM's own spans, as children of the stages that ask vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from infer_align import stages
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
from tests.engines.vllm.stepping import ENVIRONMENT, WARNINGS
from tests.server.collector import Collector, collector
from tests.server.processes import LOCAL, Process
from tests.server.tracing import CALLER, ROUTE, TRACE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), *WARNINGS]

CONFIG = """
[engine]
kind = "vllm"
model = "demo"
dtype = "float32"
enforce_eager = true
max_model_len = 1024
block_size = 32
kv_cache_memory_bytes = 67_108_864
otlp_traces_endpoint = "{url}/v1/traces"
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[rewards.judge]
kind = "trust_judge"
[telemetry]
endpoint = "{url}"
sample_ratio = 0.0
"""
QUESTION = {
    "messages": [{"role": "user", "content": "What is the diet of the owl?"}],
    "max_tokens": 4,
}
REWARDS = {"brevity": 1, "judge": 0}
BEST_OF_2 = {**QUESTION, "align": {"best_of_n": {"n": 2}, "rewards": REWARDS}}
# What vLLM calls the span of one of its requests.
VLLM_SPAN = "llm_request"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Collector]]:
    """A server in a process of its own: vLLM's tracer is one for the whole process."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    try:
        vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)
    with collector() as receiver:
        path: Path = tmp_path_factory.mktemp("tracing") / "infer-align.toml"
        path.write_text(CONFIG.format(url=receiver.url), encoding="utf-8")
        variables = {
            **ENVIRONMENT,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "PYTHONWARNINGS": "default",
        }
        server = Process("--port", "0", str(path), fresh=True, **variables)
        yield server, receiver
        if server.popen.poll() is None:
            server.popen.kill()
            server.wait()


@pytest.mark.slow
def test_spans_of_vllm_are_children_of_the_stage_that_asks(
    traced: tuple[Process, Collector],
) -> None:
    server, receiver = traced
    url = f"{server.url()}/v1/chat/completions"
    # A request that nobody traces, and requests whose caller traces them.
    assert httpx2.post(url, json=BEST_OF_2, **LOCAL).status_code == 200
    for body in (BEST_OF_2, {**BEST_OF_2, "stream": True}, QUESTION):
        answer = httpx2.post(url, json=body, headers={"traceparent": CALLER}, **LOCAL)
        assert answer.status_code == 200, answer.text
    # The end of the process sends what waits to be sent.
    server.popen.terminate()
    assert server.wait() == 0
    spans = {span["span_id"]: span for span in receiver.spans}
    asked = receiver.named(VLLM_SPAN)
    assert {span["trace_id"] for span in asked} == {TRACE}
    parents = [spans[span["parent_id"]]["name"] for span in asked]
    # Two candidates in each of two draws, their judgements, and a plain request.
    assert parents.count("draw") == 4
    assert parents.count(ROUTE) == 1
    assert parents.count("reward judge") >= 4
    assert set(parents) == {"draw", ROUTE, "reward judge"}
    for span in asked:
        parent = spans[span["parent_id"]]
        assert parent["begin"] <= span["begin"] <= parent["begin"] + parent["seconds"] * 1e9


class FakeAsyncLLM:
    """What the proxy reads of an engine; keeps the options of each request."""

    def __init__(self, endpoint: str | None) -> None:
        observability = SimpleNamespace(otlp_traces_endpoint=endpoint)
        self.vllm_config = SimpleNamespace(observability_config=observability)
        self.options: list[dict[str, Any]] = []

    def generate(self, prompt: object, params: object, request_id: str, **options: Any) -> None:
        self.options.append(options)


class CountingWatcher:
    """Counts how often the headers of a trace are made."""

    def __init__(self) -> None:
        self.count = 0

    def headers(self) -> dict[str, str]:
        self.count += 1
        return {"traceparent": CALLER}


@pytest.fixture
def proxy() -> Callable[..., Any]:
    try:
        vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)
    from infer_align.vllm.openai import EngineProxy  # noqa: PLC0415 - imports vLLM

    return EngineProxy


def test_headers_are_made_only_for_a_vllm_that_traces(proxy: Callable[..., Any]) -> None:
    watcher = CountingWatcher()
    token = stages.watcher.set(watcher)  # type: ignore[arg-type]
    try:
        for endpoint, passed in ((None, {}), ("http://c", {"trace_headers": watcher.headers()})):
            engine = FakeAsyncLLM(endpoint)
            watcher.count = 0
            proxy(engine).generate("x", SimpleNamespace(), "1")
            assert engine.options == [passed]
            assert watcher.count == len(passed)
    finally:
        stages.watcher.reset(token)
    # Nobody watches: what vLLM read from the client's headers stays.
    engine = FakeAsyncLLM("http://c")
    proxy(engine).generate("x", SimpleNamespace(), "1", trace_headers={"traceparent": "client's"})
    assert engine.options == [{"trace_headers": {"traceparent": "client's"}}]
