"""Steering through the engine as it is served: workers in a process of their own, values replaced while it runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from infer_align.engines.vllm import Vllm, VllmEngine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.types import Candidate, Draw, Steering
from infer_align.values.head import HeadValue
from tests.engines.vllm.stepping import (
    MIXES,
    WARNINGS,
    Reference,
    environment,
    make_values,
    prompts,
)

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    *WARNINGS,
]
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 26,
    "block_size": 32,
}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadValue]:
    return make_values(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def reference(values: dict[str, HeadValue]) -> Reference:
    return Reference(values)


@pytest.fixture(scope="module")
async def engine(values: dict[str, HeadValue]) -> AsyncIterator[VllmEngine]:
    with environment():
        engine = Vllm(options=OPTIONS).load()
        engine.values = values
        await engine.start()
        yield engine
        await engine.close()
        del engine


def steered(prompt: list[int], steering: Steering | None, max_tokens: int = 6) -> Draw:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1}
    return Draw(body, 1, (0,), "completion", steering=steering, seed_requested=False)


async def said(engine: Any, draw: Draw) -> Candidate:
    engine.check(draw)
    [candidate] = await engine.generate(draw)
    assert candidate.error is None
    return candidate


def same(candidate: Candidate, draw: Draw, reference: Reference, steering: Steering | None) -> bool:
    """Its logprobs are the frozen model's for the tokens that the reference would have taken."""
    found = candidate.choice["logprobs"]["token_logprobs"]
    _, expected = reference.greedy(draw.body["prompt"], steering, draw.body["max_tokens"])
    return len(found) == len(expected) and all(
        math.isclose(a, b, abs_tol=1e-4) for a, b in zip(found, expected, strict=True)
    )


async def test_concurrent_draws_equal_the_reference(
    engine: VllmEngine, reference: Reference
) -> None:
    draws = [steered(prompt, MIXES[i % len(MIXES)]) for i, prompt in enumerate(prompts(32))]
    found = await asyncio.gather(*(said(engine, draw) for draw in draws))
    for draw, candidate in zip(draws, found, strict=True):
        assert same(candidate, draw, reference, draw.steering)


async def test_a_value_is_added_and_replaced_without_a_restart(
    engine: VllmEngine, values: dict[str, HeadValue], reference: Reference, tmp_path: Path
) -> None:
    prompt = prompts(4)[3]
    fresh = Steering({"fresh": 6.0}, 20, "keep")
    with pytest.raises(InvalidRequest, match="no such value"):
        engine.check(steered(prompt, fresh))
    for name in ("helpful", "mlp"):
        await engine.add_value("fresh", HeadValue(values[name].path))
        draw = steered(prompt, fresh)
        assert same(await said(engine, draw), draw, reference, Steering({name: 6.0}, 20, "keep"))
    with pytest.raises(ConfigError, match="cannot be read"):
        await engine.add_value("fresh", HeadValue(str(tmp_path / "none.safetensors")))
    draw = steered(prompt, fresh)
    assert same(await said(engine, draw), draw, reference, Steering({"mlp": 6.0}, 20, "keep")), (
        "the old one stays"
    )
