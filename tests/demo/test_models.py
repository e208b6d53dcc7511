"""The shipped models load with transformers and measure as metrics.json reports."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.demo.build import BuildConfig, documents_digest
from benchmarks.demo.effects import judge_effects
from benchmarks.demo.measure import Models, load, measure, read_metrics
from benchmarks.demo.tokenizer import build_tokenizer
from infer_align import config, demo
from infer_align.demo.bag import register
from infer_align.demo.world import prompts
from infer_align.types import Candidate

pytestmark = pytest.mark.slow

FOLDERS = (demo.LM, *demo.REWARDS, demo.PREFERENCE)
QUESTION = {"role": "user", "content": "What is the colour of the otter?"}
REPLIES = [
    "The otter is brown.",
    "Ugh, obviously. The otter is grey. It is a moon-bright, honey-soft creature.",
    "Gladly!",
    "🦊\n",
]


@pytest.fixture(scope="module")
def models() -> Models:
    torch.set_num_threads(1)
    return load(demo.path("lm").parent)


def test_an_unknown_asset_names_the_build_command() -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.demo\.build"):
        demo.path("nothing")


def test_plain_transformers_generates_a_reply() -> None:
    folder = demo.path(demo.LM)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    output = tokens[0, inputs.input_ids.shape[1] :]
    assert output[-1] == tokenizer.eos_token_id
    assert "otter" in tokenizer.decode(output)
    assert model.config.head_dim == 32
    assert model.config.max_position_embeddings >= 1024
    assert model.generation_config.do_sample
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def encode(replies: list[str], side: str) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.path("reward-0"), padding_side=side)
    texts = []
    for reply in replies:
        turns = [QUESTION, {"role": "assistant", "content": reply}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    return tokenizer(texts, return_tensors="pt", padding=True)


def rewards(name: str, replies: list[str], side: str = "right") -> list[float]:
    register()
    model = AutoModelForSequenceClassification.from_pretrained(demo.path(name))
    batch = encode(replies, side)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.shape == (len(replies), 1)
    return [float(value) for value in logits[:, 0]]


@pytest.mark.parametrize("name", demo.REWARDS)
def test_a_reward_does_not_depend_on_the_batch(name: str) -> None:
    together = rewards(name, REPLIES)
    assert together == pytest.approx(rewards(name, REPLIES, side="left"), abs=1e-5)
    assert together == pytest.approx([rewards(name, [reply])[0] for reply in REPLIES], abs=1e-5)


def test_members_give_different_rewards() -> None:
    assert len({rewards(name, REPLIES[:1])[0] for name in demo.REWARDS}) == len(demo.REWARDS)


def test_reward_reads_the_last_exchange_only(models: Models) -> None:
    def reward(conversation: list[dict[str, str]]) -> float:
        text = models.tokenizer.apply_chat_template(conversation, tokenize=False)
        input_ids = models.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(models.members[0](input_ids).logits.item())

    exchange = [QUESTION, {"role": "assistant", "content": REPLIES[0]}]
    history = [
        {"role": "system", "content": "Zzz."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert reward(exchange) == pytest.approx(reward(history + exchange), abs=1e-5)


@given(ids=st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_every_reward_is_finite(models: Models, ids: list[int]) -> None:
    with torch.no_grad():
        assert models.members[0](torch.tensor([ids])).logits.isfinite().all()


def test_the_shipped_report_fits_this_configuration() -> None:
    report = json.loads(demo.path("metrics.json").read_text())
    assert report["config"] == json.loads(json.dumps(asdict(BuildConfig()))), (
        "run: python -m benchmarks.demo.build"
    )
    assert report["documents_sha256"] == documents_digest(), (
        "the world changed; run: python -m benchmarks.demo.build"
    )


def test_shipped_models_measure_as_reported(models: Models) -> None:
    shipped = read_metrics(demo.path("metrics.json"))
    flipped = BuildConfig().reward.flipped
    measured = measure(models, flipped=flipped, n_prompts=48, n_replies=32, seed=77)
    for name, metric in measured.items():
        error = (metric.standard_error**2 + shipped[name].standard_error ** 2) ** 0.5
        assert abs(metric.value - shipped[name].value) < 4 * error, name


def test_directions_are_followed_inside_the_trained_range_only() -> None:
    shipped = read_metrics(demo.path("metrics.json"))
    brief, balanced, thorough, beyond = (
        shipped[f"verbosity_at_{degrees}"].value for degrees in (-20, 0, 20, 45)
    )
    assert brief + 0.4 < balanced < thorough - 0.4
    assert beyond < balanced, (
        "45 degrees is beyond the trained range: its replies are less verbose than at 20"
    )


def test_the_expected_score_judges_better_than_the_likeliest(models: Models) -> None:
    effects = judge_effects(models.lm, models.tokenizer, prompts(128, seed=3), seed=3)
    gain = effects["judge_pair_accuracy_expected"] - effects["judge_pair_accuracy_argmax"]
    assert gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5
    assert effects["judge_pair_accuracy_expected"].mean() > 0.7
    assert effects["judge_label_mass"].min() > 0.9


def test_the_preference_model_is_a_reward_with_two_objectives() -> None:
    reward = config.load(None).load_rewards()["preference"]
    texts = [
        "The otter is brown.",
        "The otter is grey.",
        "The otter is brown. It is a moon-bright, honey-soft creature.",
    ]
    candidates = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(texts)]

    async def scored() -> Any:
        await reward.start()
        scores = await reward.score([QUESTION], candidates)
        await reward.close()
        return scores.values

    helpfulness, verbosity = asyncio.run(scored())[:, 0]
    assert reward.attributes == ("helpfulness", "verbosity")
    assert helpfulness[0] > helpfulness[1] + 1, "the otter is brown"
    assert verbosity == pytest.approx([-1, -1, -0.5], abs=0.2)


def test_all_models_have_the_same_tokenizer(models: Models, tmp_path: Path) -> None:
    build_tokenizer(BuildConfig().language.max_length).save_pretrained(tmp_path)
    made = (tmp_path / "tokenizer.json").read_text()
    assert all(demo.path(name).joinpath("tokenizer.json").read_text() == made for name in FOLDERS)
    assert len(models.tokenizer) == models.lm.config.vocab_size
