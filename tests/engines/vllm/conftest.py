"""One real server over vLLM for the session, and the OpenAI SDK on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from infer_align import config as configuration
from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package
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
max_model_len = 512
max_num_seqs = 64
block_size = 32
kv_cache_memory_bytes = 67_108_864
enable_auto_tool_choice = true
tool_call_parser = "hermes"
reasoning_parser = "granite"
structured_outputs_config = { backend = "xgrammar", enable_in_reasoning = true, disable_any_whitespace = true }
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
LOADING_SECONDS = 180


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The server; its frontend is here, its workers are one more process."""
    try:
        vllm_package.require()
    except ConfigError as error:
        pytest.skip(error.message)
    path: Path = tmp_path_factory.mktemp("vllm") / "infer-align.toml"
    path.write_text(CONFIG, encoding="utf-8")
    with environment(VLLM_TEST_KEYS="sesame"):
        live = start(configuration.load(path), wait=False)
        assert live.until(live.service.settled.is_set, LOADING_SECONDS)
        assert live.service.failure is None
        yield live
        end(live)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    """The SDK, unchanged."""
    with openai.OpenAI(
        base_url=live.base_url, api_key="sesame", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture
def quiet(live: Live) -> None:
    """Nothing runs in vLLM when the test begins."""
    end_of_wait = time.monotonic() + 5
    while live.metric("vllm:num_requests_running"):
        assert time.monotonic() < end_of_wait
        time.sleep(0.05)
