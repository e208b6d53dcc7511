"""Rewards that read with the embedded engine, against one forward pass of each complete text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from infer_align.engines.transformers import Transformers  # noqa: E402
from infer_align.rewards import Reward  # noqa: E402
from infer_align.rewards.density_ratio import DensityRatio  # noqa: E402
from infer_align.rewards.follow_up import FollowUp  # noqa: E402
from infer_align.rewards.likelihood import Likelihood  # noqa: E402
from infer_align.types import Candidate  # noqa: E402

pytestmark = pytest.mark.anyio
QUESTION = "What is the diet of the owl?"
ASK = [{"role": "user", "content": QUESTION}]
TEXTS = ("The diet of the owl is mice.", "Go away.", "Mice!")
PROMPT = "Answer kindly."


@pytest.fixture
async def engine() -> AsyncIterator[Any]:
    engine = Transformers(model="demo", dtype="float32").load()
    await engine.start()
    yield engine
    await engine.close()


@torch.inference_mode()
def forced(engine: Any, prompt: str, text: str) -> np.ndarray[Any, Any]:
    """Return the logprobs of a text after a rendered prompt, by one forward pass."""
    model = engine.frozen

    def ids(part: str) -> list[int]:
        tokens: list[int] = model.tokenizer(part, add_special_tokens=False)["input_ids"]
        return tokens

    first, rest = ids(prompt), ids(text)
    logits = model.lm(torch.tensor([[*first, *rest]]), use_cache=False).logits
    logprobs = torch.log_softmax(logits[0, len(first) - 1 : -1].double(), dim=-1)
    return np.asarray(logprobs[range(len(rest)), rest].numpy())


async def scores(engine: Any, reward: Reward) -> list[float]:
    reward.engines = {"served": engine}
    await reward.start()
    candidates = [Candidate(i, {"message": {"content": text}}) for i, text in enumerate(TEXTS)]
    scored = await reward.score(ASK, candidates)
    assert not any(scored.notes), scored.notes
    assert scored.usage.reward_tokens > 0
    values: list[float] = scored.values[0, 0].tolist()
    return values


@pytest.mark.parametrize("per_token", [False, True])
async def test_the_ratio_is_the_difference_of_teacher_forced_sums(
    engine: Any, per_token: bool
) -> None:
    got = await scores(engine, DensityRatio(prompt=PROMPT, per_token=per_token).load())
    turn = f"<|user|>{QUESTION}<|end|><|assistant|>"
    expected = []
    for text in TEXTS:
        better = forced(engine, f"<|system|>{PROMPT}<|end|>{turn}", text)
        worse = forced(engine, turn, text)
        ratio = better.sum() - worse.sum()
        expected.append(ratio / len(better) if per_token else ratio)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert len({round(value, 3) for value in got}) == len(TEXTS)


async def test_the_reference_is_read_as_the_end_of_the_answer(engine: Any) -> None:
    reward = Likelihood(lead=" It eats").load().with_parameters({"reference": "mice."})
    got = await scores(engine, reward)
    expected = []
    for text in TEXTS:
        prompt = f"<|user|>{QUESTION}<|end|><|assistant|>{text} It eats"
        expected.append(forced(engine, prompt, " mice.").sum())
    np.testing.assert_allclose(got, expected, atol=1e-4)


async def test_next_turns_are_read_as_the_users(engine: Any) -> None:
    got = await scores(engine, FollowUp(satisfied=("Thanks.",), dissatisfied=("No way.",)).load())
    expected = []
    for text in TEXTS:
        turns = f"<|user|>{QUESTION}<|end|><|assistant|>{text}<|end|><|user|>"
        satisfied, dissatisfied = forced(engine, turns, "Thanks."), forced(engine, turns, "No way.")
        expected.append(satisfied.mean() - dissatisfied.mean())
    np.testing.assert_allclose(got, expected, atol=1e-4)
