"""The reward kind `value`: what a head expects at the last token of each answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from infer_align.engines.fake import Fake, Reply
from infer_align.engines.openai import OpenAI
from infer_align.engines.transformers import Transformers
from infer_align.errors import ConfigError, Unsupported
from infer_align.rewards.value import ValueRewardSection
from infer_align.types import Candidate
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

pytestmark = pytest.mark.anyio
ASK = [{"role": "user", "content": "What do owls eat?"}]
HELPFUL = "demo/value-helpful.safetensors"
TEXTS = ("Owls eat mice.", "m", "")


def chat(*texts: str) -> list[Candidate]:
    return [
        Candidate(i, {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"})
        for i, text in enumerate(texts)
    ]


def completions(*texts: str) -> list[Candidate]:
    return [Candidate(i, {"text": text, "finish_reason": "stop"}) for i, text in enumerate(texts)]


@pytest.fixture
async def engine() -> Any:
    engine = Transformers(model="demo", dtype="float32").load()
    engine.values = {"helpful": HeadValue(HELPFUL)}
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
def reward(engine: Any) -> Any:
    reward = ValueRewardSection("helpful").load()
    reward.engines = {"served": engine}
    return reward


@torch.inference_mode()
def expected(engine: Any, text: str) -> float:
    """Return the head's expectation after a text, by one forward pass."""
    model = engine.frozen
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    logits = model.lm(torch.tensor([ids], device=model.device)).logits[:, -1]
    return float(engine.value("helpful").expected(model.states(ids)[-1:], logits))


async def test_a_score_is_the_expectation_at_the_last_token(reward, engine):
    await reward.start()
    reward.check("align.rewards.good")
    scores = await reward.score(ASK, chat(*TEXTS))
    begun = engine.frozen.tokenizer.apply_chat_template(
        ASK, tokenize=False, add_generation_prompt=True
    )
    after_prompt = [expected(engine, begun + text) for text in TEXTS]
    np.testing.assert_allclose(scores.values, [[after_prompt]], atol=1e-4)
    assert scores.usage.reward_tokens > 15
    assert scores.notes == ()


async def test_a_completion_is_read_after_its_prompt(reward, engine):
    prompt = [{"role": "user", "content": "the owl"}]
    scores = await reward.score(prompt, completions(" eats", " is"))
    after_prompt = [expected(engine, "the owl eats"), expected(engine, "the owl is")]
    np.testing.assert_allclose(scores.values, [[after_prompt]], atol=1e-4)
    alone = await reward.score([], completions("the owl eats"))
    np.testing.assert_allclose(alone.values[0, 0, 0], after_prompt[0], atol=1e-4)


async def test_an_answer_without_an_estimate_is_not_scored():
    engine = Fake(replies=(Reply("good", estimates={"helpful": 2.0}), Reply("bad"))).load()
    await engine.start()
    reward = ValueRewardSection("helpful").load()
    reward.engines = {"served": engine}
    scores = await reward.score(ASK, chat("good", "bad"))
    assert scores.values[0, 0, 0] == 2.0
    assert np.isnan(scores.values[0, 0, 1])
    assert scores.notes == (None, "the value 'helpful' gave no estimate")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helpfull", r"value: 'helpfull' is not configured; known: helpful, slow"),
        ("slow", r"value: 'slow' cannot estimate .* kind head can: helpful"),
    ],
)
async def test_a_value_that_is_missing_or_cannot_estimate_is_refused_at_start(name, message):
    engine = Transformers(model="demo").load()
    slow = LookaheadValue(Lookahead("demo/value-lm"))
    engine.values = {"helpful": HeadValue(HELPFUL), "slow": slow}
    reward = ValueRewardSection(name).load()
    reward.engines = {"served": engine}
    with pytest.raises(ConfigError, match=message):
        await reward.start()


def test_an_engine_that_reads_no_values_is_refused_by_name():
    reward = ValueRewardSection("helpful").load()
    reward.engines = {"served": OpenAI(urls=("http://localhost:9/v1",)).load()}
    with pytest.raises(Unsupported, match=r"align\.rewards\.good: .* kind transformers") as caught:
        reward.check("align.rewards.good")
    assert caught.value.param == "align.rewards.good"
