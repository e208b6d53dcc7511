"""Reward models inside vLLM: scores equal those of transformers, and failures stay separate."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infer_align.config import load
from infer_align.errors import ConfigError, Unavailable
from infer_align.rewards._scaling import Scaling
from infer_align.rewards.pooling import Pooling, PoolingReward
from infer_align.types import Candidate
from tests.engines.vllm.stepping import WARNINGS, environment

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.anyio,
    pytest.mark.timeout(300),
    *WARNINGS,
]
QUESTION = [{"role": "user", "content": "What is the diet of the owl?"}]
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
    """Return one candidate per text."""
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}})
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
async def reward(pooling_model: Callable[[int], str]) -> AsyncIterator[PoolingReward]:
    """Start an ensemble of a model with one label and a model with three."""
    with environment():
        reward = Pooling(
            models=(pooling_model(1), pooling_model(3)), max_length=64, options=OPTIONS
        ).load()
        await reward.start()
        yield reward
        await reward.close()


def transformers_logits(path: str, texts: list[str], max_length: int = 64) -> np.ndarray[Any, Any]:
    """Return [labels, N] logits, of one conversation at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        conversation = tokenizer.apply_chat_template(
            [*QUESTION, {"role": "assistant", "content": text}], tokenize=False
        )
        ids = tokenizer(conversation, add_special_tokens=False)["input_ids"][-max_length:]
        with torch.inference_mode():
            rows.append(model(torch.tensor([ids])).logits[0].double().numpy())
    return np.stack(rows, axis=1)


async def test_scores_equal_those_of_transformers(
    reward: PoolingReward, pooling_model: Callable[[int], str]
) -> None:
    logits = [transformers_logits(pooling_model(labels), TEXTS) for labels in (1, 3)]
    expected = np.concatenate(logits)
    scores = await reward.score(QUESTION, candidates())
    print(f"largest difference {np.abs(scores.values[0] - expected).max():.2g}")
    assert scores.values.shape == (1, 4, len(TEXTS))
    np.testing.assert_allclose(scores.values[0], expected, atol=1e-4)
    assert np.abs(expected).max() > 1, "logits, not probabilities"
    assert len(reward.members) == 4
    assert reward.members[1].endswith("#0")
    assert scores.notes[3] is not None
    assert scores.notes[3].startswith("truncated: read the last 64 of")
    assert scores.notes[0] is None


async def test_tokens_are_counted(
    reward: PoolingReward, pooling_model: Callable[[int], str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pooling_model(1))
    text = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": "mice"}], tokenize=False
    )
    expected = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    scores = await reward.score(QUESTION, candidates(["mice"]))
    assert scores.usage.reward_tokens == 2 * expected


async def test_a_cancelled_request_does_not_affect_the_others(reward: PoolingReward) -> None:
    alone = await reward.score(QUESTION, candidates())
    cancelled = asyncio.create_task(reward.score(QUESTION, candidates()))
    await asyncio.sleep(0)
    cancelled.cancel()
    together = await asyncio.gather(*(reward.score(QUESTION, candidates()) for _ in range(8)))
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    for scores in together:
        np.testing.assert_allclose(scores.values, alone.values, atol=1e-4)


async def test_a_text_that_the_tokenizer_refuses_is_not_scored(reward: PoolingReward) -> None:
    scores = await reward.score([{"role": "user", "content": "x"}], candidates(["fine", "a\ud800"]))
    assert np.isnan(scores.values[0, 0]).tolist() == [False, True]
    assert scores.notes[1]
    assert (await reward.score(QUESTION, [])).values.shape == (1, 4, 0)


@pytest.mark.slow
async def test_attributes_are_rows_and_a_closed_reward_is_unavailable(
    pooling_model: Callable[[int], str],
) -> None:
    with environment():
        scaling = {"b": Scaling(mean=1.0, std=4.0)}
        reward = Pooling(
            model=pooling_model(3), attributes=("a", "b", "c"), scaling=scaling, options=OPTIONS
        ).load()
        await reward.start()
        scores = await reward.score(QUESTION, candidates())
        await reward.close()
    assert scores.values.shape == (3, 1, len(TEXTS))
    expected = transformers_logits(pooling_model(3), TEXTS, 256)
    expected[1] = (expected[1] - 1.0) / 4.0
    np.testing.assert_allclose(scores.values[:, 0], expected, atol=1e-4)
    with pytest.raises(Unavailable):
        await reward.score(QUESTION, candidates())


@pytest.mark.slow
async def test_wrong_attributes_and_a_model_without_labels_are_refused(
    pooling_model: Callable[[int], str],
) -> None:
    with environment():
        reward = Pooling(model=pooling_model(3), attributes=("a", "b"), options=OPTIONS).load()
        with pytest.raises(ConfigError, match="2 names for the 3 labels"):
            await reward.start()
        await reward.close()
        # vLLM would load this model with a head of random weights.
        with pytest.raises(ConfigError, match="is no sequence classifier: it is LlamaForCausalLM"):
            await Pooling(model="demo", options=OPTIONS).load().start()


def remove(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a change that removes a weight."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return change


def widen_head(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = torch.zeros(3, weights["score.weight"].shape[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("score.weight"), "has no weights for score.weight"),
        (remove("model.layers.0.mlp.up_proj.weight"), "no weights for model.layers.0.mlp.up_proj"),
        (remove("model.norm.weight"), "no weights for model.norm.weight"),
        (widen_head, r"score.weight \(saved \[3, "),
    ],
)
async def test_a_checkpoint_that_lacks_weights_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    pooling_model: Callable[[int], str],
    tmp_path: Path,
) -> None:
    shutil.copytree(pooling_model(1), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with environment(), pytest.raises(ConfigError, match=message):
        await Pooling(model=str(tmp_path), options=OPTIONS).load().start()


@pytest.mark.slow
async def test_classes_need_a_meaning_and_one_label_is_scored_by_its_log_odds(
    pooling_model: Callable[[int], str], tmp_path: Path
) -> None:
    shutil.copytree(pooling_model(3), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["id2label"] = {"0": "bad", "1": "fair", "2": "good"}
    config["label2id"] = {"bad": 0, "fair": 1, "good": 2}
    file.write_text(json.dumps(config))
    path = str(tmp_path)
    with environment():
        reward = Pooling(model=path, options=OPTIONS).load()
        with pytest.raises(ConfigError, match=r'labels bad, fair, good.*label = "good"'):
            await reward.start()
        await reward.close()
        reward = Pooling(model=path, label="fair", options=OPTIONS).load()
        await reward.start()
        scores = await reward.score(QUESTION, candidates())
        await reward.close()
    logits = torch.from_numpy(transformers_logits(path, TEXTS, 256))
    expected = torch.logit(torch.softmax(logits, 0)[1])
    np.testing.assert_allclose(scores.values[0, 0], expected.numpy(), atol=1e-4)


SECTION = """
[rewards.rm]
kind = "pooling"
model = "x"
{option} = 0.2
[engine]
kind = "fake"
"""


def test_a_section_takes_vllms_own_options(tmp_path: Path) -> None:
    file = tmp_path / "infer-align.toml"
    file.write_text(SECTION.format(option="gpu_memory_utilization"))
    assert load(file).rewards["rm"].options == {"gpu_memory_utilization": 0.2}
    file.write_text(SECTION.format(option="gpu_memory_utilisation"))
    with pytest.raises(ConfigError, match="did you mean 'gpu_memory_utilization'"):
        load(file)
    with pytest.raises(ConfigError, match="either model or models"):
        Pooling().load()
