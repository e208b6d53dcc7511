"""The installed version of vLLM, its options and its share of the memory, without importing it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from infer_align.errors import ConfigError
from infer_align.vllm import package as vllm_package


@pytest.mark.parametrize(
    ("options", "engines", "share"),
    [
        ({}, 1, vllm_package.MEMORY_SHARE),
        ({"gpu_memory_utilization": 0.25}, 1, 0.25),
        ({"gpu_memory_utilization": "0.25"}, 3, 0.75),
        ({"kv_cache_memory_bytes": 0}, 2, 2 * vllm_package.MEMORY_SHARE),
        ({"kv_cache_memory_bytes": 1_000_000, "gpu_memory_utilization": 0.25}, 1, None),
    ],
)
def test_the_share_of_the_memory(options: dict[str, Any], engines: int, share: float) -> None:
    assert vllm_package.memory_share(options, engines) == pytest.approx(share)


INSTALLED = importlib.util.find_spec("vllm") is not None


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
def test_an_installed_version_is_the_supported_one() -> None:
    assert vllm_package.release(vllm_package.require()) in vllm_package.SUPPORTED


@pytest.mark.parametrize(
    ("version", "release"), [("0.32.0", "0.32"), ("0.33.1+cu130", "0.33"), ("0.34rc1", "0.34rc1")]
)
def test_a_release_is_the_first_two_numbers(version: str, release: str) -> None:
    assert vllm_package.release(version) == release


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_a_missing_installation_names_the_command() -> None:
    with pytest.raises(ConfigError, match=f"pip install 'vllm>={vllm_package.SUPPORTED[0]}"):
        vllm_package.require()


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
def test_its_options_are_known_without_importing_it() -> None:
    names = vllm_package.option_names()
    assert {"max_model_len", "tensor_parallel_size", "tool_call_parser"} <= names
    assert not names & vllm_package.RESERVED_OPTIONS
    assert not [name for name in names if name.startswith("_")]
