"""Reward models inside vLLM: their scores are those of transformers, and failures stay where they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer_align.config.config import load
from infer_align.errors import ConfigError, Unavailable
from infer_align.rewards._scaling import Scaling
from infer_align.rewards.pooling import Pooling, PoolingReward
from infer_align.types import Candidate
from tests.engines.vllm.stepping import WARNINGS, environment

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    *WARNINGS,
]
ASK = [{"role": "user", "content": "What is the diet of the owl?"}]
TEXTS = [
    "The owl eats mice.",
    "mice",
    "",
    "The owl is brown and eats mice and sleeps by day . " * 12,
    "é你😀",
]
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 1 << 24,
    "block_size": 32,
}


def candidates(texts: list[str] = TEXTS) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
async def reward(pooling_model: Callable[[int], str]) -> AsyncIterator[PoolingReward]:
    """A model of one label and one of three."""
    with environment():
        reward = Pooling(
            models=(pooling_model(1), pooling_model(3)), max_length=64, options=OPTIONS
        ).load()
        await reward.start()
        yield reward
        await reward.close()


def direct(path: str, texts: list[str], limit: int = 64) -> np.ndarray[Any, Any]:
    """[labels, N] of one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        conversation = tokenizer.apply_chat_template(
            [*ASK, {"role": "assistant", "content": text}], tokenize=False
        )
        ids = tokenizer(conversation, add_special_tokens=False)["input_ids"][-limit:]
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0].double().numpy())
    return np.stack(rows, axis=1)


async def test_scores_are_those_of_transformers(
    reward: PoolingReward, pooling_model: Callable[[int], str]
) -> None:
    expected = np.concatenate([direct(pooling_model(1), TEXTS), direct(pooling_model(3), TEXTS)])
    marks = await reward.score(ASK, candidates())
    print(f"largest difference {np.abs(marks.values[0] - expected).max():.2g}")
    assert marks.values.shape == (1, 4, len(TEXTS))
    np.testing.assert_allclose(marks.values[0], expected, atol=1e-4)
    assert np.abs(expected).max() > 1, "not squeezed into probabilities"
    assert len(reward.members) == 4
    assert reward.members[1].endswith("#0")
    assert marks.notes[3] is not None
    assert marks.notes[3].startswith("truncated: read the last 64 of")
    assert marks.notes[0] is None


async def test_tokens_are_counted(
    reward: PoolingReward, pooling_model: Callable[[int], str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pooling_model(1))
    text = tokenizer.apply_chat_template(
        [*ASK, {"role": "assistant", "content": "mice"}], tokenize=False
    )
    expected = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (await reward.score(ASK, candidates(["mice"]))).usage.reward_tokens == 2 * expected


async def test_many_requests_at_once_and_one_that_left(reward: PoolingReward) -> None:
    alone = await reward.score(ASK, candidates())
    left = asyncio.create_task(reward.score(ASK, candidates()))
    await asyncio.sleep(0)
    left.cancel()
    together = await asyncio.gather(*(reward.score(ASK, candidates()) for _ in range(8)))
    assert left.cancelled() or left.cancelling()
    for marks in together:
        np.testing.assert_allclose(marks.values, alone.values, atol=1e-4)


async def test_what_the_template_refuses_is_not_scored(reward: PoolingReward) -> None:
    marks = await reward.score([{"role": "user", "content": "x"}], candidates(["fine", "a\ud800"]))
    assert np.isnan(marks.values[0, 0]).tolist() == [False, True]
    assert marks.notes[1]
    assert (await reward.score(ASK, [])).values.shape == (1, 4, 0)


@pytest.mark.slow
async def test_attributes_are_rows_and_a_closed_reward_says_so(
    pooling_model: Callable[[int], str],
) -> None:
    with environment():
        scaling = {"b": Scaling(mean=1.0, std=4.0)}
        reward = Pooling(
            model=pooling_model(3), attributes=("a", "b", "c"), scaling=scaling, options=OPTIONS
        ).load()
        await reward.start()
        marks = await reward.score(ASK, candidates())
        await reward.close()
    assert marks.values.shape == (3, 1, len(TEXTS))
    expected = direct(pooling_model(3), TEXTS, 256)
    expected[1] = (expected[1] - 1.0) / 4.0
    np.testing.assert_allclose(marks.values[:, 0], expected, atol=1e-4)
    with pytest.raises(Unavailable):
        await reward.score(ASK, candidates())


@pytest.mark.slow
async def test_wrong_attributes_and_a_model_without_labels_are_refused(
    pooling_model: Callable[[int], str],
) -> None:
    with environment():
        reward = Pooling(model=pooling_model(3), attributes=("a", "b"), options=OPTIONS).load()
        with pytest.raises(ConfigError, match="2 names for the 3 labels"):
            await reward.start()
        await reward.close()
        # vLLM would load it, with a head that it makes up.
        with pytest.raises(ConfigError, match="is no sequence classifier: it is LlamaForCausalLM"):
            await Pooling(model="demo", options=OPTIONS).load().start()


def test_a_section_takes_vllms_own_options(tmp_path: Any) -> None:
    file = tmp_path / "infer-align.toml"
    file.write_text(
        '[rewards.rm]\nkind = "pooling"\nmodel = "x"\ngpu_memory_utilization = 0.2\n[engine]\nkind = "fake"\n'
    )
    assert load(file).rewards["rm"].options == {"gpu_memory_utilization": 0.2}
    file.write_text(
        '[rewards.rm]\nkind = "pooling"\nmodel = "x"\ngpu_memory_utilisation = 0.2\n[engine]\nkind = "fake"\n'
    )
    with pytest.raises(ConfigError, match="did you mean 'gpu_memory_utilization'"):
        load(file)
    with pytest.raises(ConfigError, match="either model or models"):
        Pooling().load()
