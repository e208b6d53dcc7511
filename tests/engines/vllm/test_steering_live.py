"""Steering through the engine as it is served: workers in another process, values replaced live."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from infer_align.engines.vllm import Vllm, VllmEngine
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.steering import Steering
from infer_align.types import Candidate, Draw
from infer_align.values import head
from infer_align.values.head import HeadValue
from tests.engines.vllm.stepping import (
    STEERINGS,
    WARNINGS,
    Reference,
    environment,
    make_values,
    prompts,
)

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
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HeadValue]:
    return make_values(tmp_path_factory.mktemp("values"))


@pytest.fixture(scope="module")
def reference(heads: dict[str, HeadValue]) -> Reference:
    return Reference(heads)


@pytest.fixture(scope="module")
async def engine(heads: dict[str, HeadValue]) -> AsyncIterator[VllmEngine]:
    with environment():
        engine = Vllm(options=OPTIONS).load()
        engine.values = heads
        await engine.start()
        yield engine
        await engine.close()
        del engine


def make_draw(prompt: list[int], steering: Steering | None) -> Draw:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 6, "logprobs": 1}
    return Draw(body, 1, (0,), "completion", steering=steering, seed_requested=False)


async def generate(engine: VllmEngine, draw: Draw) -> Candidate:
    engine.check(draw)
    [candidate] = await engine.generate(draw)
    assert candidate.error is None
    return candidate


def equals_reference(
    candidate: Candidate, draw: Draw, reference: Reference, steering: Steering | None
) -> bool:
    """Compare the frozen model's logprobs of the tokens with those of the reference's tokens."""
    logprobs = candidate.choice["logprobs"]["token_logprobs"]
    _, expected = reference.greedy(draw.body["prompt"], steering, draw.body["max_tokens"])
    if len(logprobs) != len(expected):
        return False
    pairs = zip(logprobs, expected, strict=True)
    return all(math.isclose(a, b, abs_tol=1e-4) for a, b in pairs)


async def test_concurrent_draws_equal_the_reference(
    engine: VllmEngine, reference: Reference
) -> None:
    draws = [
        make_draw(prompt, STEERINGS[i % len(STEERINGS)]) for i, prompt in enumerate(prompts(32))
    ]
    candidates = await asyncio.gather(*(generate(engine, draw) for draw in draws))
    for draw, candidate in zip(draws, candidates, strict=True):
        assert equals_reference(candidate, draw, reference, draw.steering)


async def test_a_value_is_added_and_replaced_without_a_restart(
    engine: VllmEngine, heads: dict[str, HeadValue], reference: Reference, tmp_path: Path
) -> None:
    draw = make_draw(prompts(4)[3], Steering({"fresh": 6.0}, 20, "keep"))
    with pytest.raises(InvalidRequest, match="no such value"):
        engine.check(draw)
    for name in ("helpful", "mlp"):
        await engine.add_value("fresh", HeadValue(heads[name].path))
        candidate = await generate(engine, draw)
        assert equals_reference(candidate, draw, reference, Steering({name: 6.0}, 20, "keep"))
    with pytest.raises(ConfigError, match="cannot be read"):
        await engine.add_value("fresh", HeadValue(str(tmp_path / "none.safetensors")))
    candidate = await generate(engine, draw)
    by_mlp = Steering({"mlp": 6.0}, 20, "keep")
    assert equals_reference(candidate, draw, reference, by_mlp), "the previous value stays"


@pytest.fixture(scope="module")
def other_head(tmp_path_factory: pytest.TempPathFactory, heads: dict[str, HeadValue]) -> HeadValue:
    """Return a head that was fitted on a model of the same shape, with other weights."""
    tensors, metadata = head.read(heads["helpful"].path)
    numbers = {
        name: [2 * x for x in part] for name, part in json.loads(metadata["fingerprint"]).items()
    }
    path = tmp_path_factory.mktemp("other") / "value.safetensors"
    save_file(tensors, path, {**metadata, "fingerprint": json.dumps(numbers)})
    return HeadValue(str(path))


async def test_a_head_of_another_model_is_refused(
    engine: VllmEngine, other_head: HeadValue
) -> None:
    with pytest.raises(ConfigError, match=r"are others: embedding, (.*, )?norm\."):
        await engine.add_value("fresh", other_head)
    assert engine.value("helpful").warnings == ()
    [warning] = engine.value("mlp").warnings
    assert "no fingerprint" in warning


@pytest.mark.slow
async def test_a_head_of_another_model_is_refused_at_the_start(
    heads: dict[str, HeadValue], other_head: HeadValue
) -> None:
    with environment():
        engine = Vllm(options={**OPTIONS, "dtype": "bfloat16"}).load()
        engine.values = {"helpful": heads["helpful"], "other": other_head}
        with pytest.raises(ConfigError) as raised:
            await engine.start()
        await engine.close()
        del engine
    assert raised.value.message.startswith(other_head.path)
