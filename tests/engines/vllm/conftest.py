"""One real server over vLLM for the session, and the OpenAI SDK on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from infer_align import config as configuration
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
from tests.conftest import reads_vllm_server
from tests.engines.vllm.stepping import environment
from tests.server.conftest import Live, end, start

CONFIG = """
[server]
served_name = "owl"
api_keys_env = "VLLM_TEST_KEYS"
default_rewards = { quality = 1.0 }
[engine]
kind = "vllm"
model = "demo"
dtype = "float32"
enforce_eager = true
max_model_len = 1024
max_num_seqs = 64
block_size = 32
kv_cache_memory_bytes = 67_108_864
enable_auto_tool_choice = true
enable_prompt_tokens_details = true
tool_call_parser = "hermes"
tool_strict_level = "parameter"
reasoning_parser = "granite"
[engine.structured_outputs_config]
backend = "xgrammar"
enable_in_reasoning = true
disable_any_whitespace = true
[rewards.quality]
kind = "classifier"
models = ["demo/reward-0", "demo/reward-1"]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
[values.helpful]
kind = "head"
path = "demo/value-helpful.safetensors"
[presets.careful]
best_of_n = { n = 3 }
"""
# An upper bound for a slow machine; the tests wait for events, not for this time.
LIMIT_SECONDS = 180.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of the server last: an engine that starts later takes vLLM's metrics over."""
    items.sort(key=reads_vllm_server)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Run the server in a thread of this process; vLLM's workers are another process."""
    try:
        vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)
    path: Path = tmp_path_factory.mktemp("vllm") / "infer-align.toml"
    path.write_text(CONFIG, encoding="utf-8")
    with environment(VLLM_TEST_KEYS="sesame"):
        live = start(configuration.load(path), wait=False)
        assert live.until(live.service.settled.is_set, LIMIT_SECONDS)
        assert live.service.failure is None
        yield live
        end(live)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """Return the unmodified SDK."""
    with openai.OpenAI(
        base_url=live.base_url, api_key="sesame", max_retries=0, timeout=LIMIT_SECONDS
    ) as client:
        yield client


@pytest.fixture
def idle(live: Live) -> None:
    """Wait until vLLM runs no request."""
    assert live.until(lambda: not live.metric("vllm:num_requests_running"), LIMIT_SECONDS)
