"""Planted samples, a reward that records its calls, and an engine with a tiny random model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.engines.transformers import Transformers
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.fitting.regression import Replies
from infer_align.rewards import Messages, Reward, RewardScores
from infer_align.types import Candidate


class RecordingReward(Reward):
    """Score a text by a function, and record the prompt of each call."""

    def __init__(self, function: Callable[[str], float]) -> None:
        self.function = function
        self.prompts: list[str] = []

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        self.prompts.append(str(messages[-1]["content"]))
        scores = [self.function(candidate.text) for candidate in candidates]
        return RewardScores(np.array([[scores]]))


def letters_and_signs(text: str) -> float:
    """Count the characters that are not spaces."""
    return float(len(text.replace(" ", "")))


def planted(
    quality: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: int,
    seed: int,
    d: int,
    vocabulary: int,
) -> Replies:
    """Make 8 replies of one token per prompt, with a reward by state and token, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    n = 8 * prompts
    hidden = 3.0 + torch.randn(n, d, generator=generator) * torch.linspace(0.5, 2, d)
    tokens = torch.randint(0, vocabulary, (n,), generator=generator)
    rewards = 7.0 + quality(hidden, tokens) + 0.1 * torch.randn(n, generator=generator)
    return Replies(hidden, tokens, torch.arange(n), rewards, torch.arange(n) // 8)


@pytest.fixture(scope="session")
def plant() -> Callable[..., Replies]:
    return planted


@pytest.fixture
def recording_reward() -> Callable[..., RecordingReward]:
    """Return a function that makes a reward from a function of the text."""

    def make(function: Callable[[str], float] = letters_and_signs) -> RecordingReward:
        return RecordingReward(function)

    return make


@pytest.fixture(scope="session")
def nan_for() -> Callable[[str], float]:
    """Return a function that cannot score texts of odd length."""
    return lambda text: math.nan if len(text) % 2 else 1.0


@pytest.fixture(scope="session")
def engine(language_model: Callable[..., str]) -> Iterator[TransformersEngine]:
    """Start the engine once; each test uses it from its own event loop."""
    torch.set_num_threads(1)
    running = Transformers(model=language_model("Llama"), threads=1).load()
    asyncio.run(running.start())
    yield running
    asyncio.run(running.close())


@pytest.fixture(scope="session")
def prompts() -> list[Any]:
    return [[{"role": "user", "content": f"the cat {i}"}] for i in range(20)]


@pytest.fixture(scope="session")
def quiet() -> Callable[[str], None]:
    return lambda _: None
