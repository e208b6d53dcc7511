"""Planted samples, rewards that can be counted, and the transformers engine on a tiny random model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from infer_align.engines.transformers import Transformers, TransformersEngine
from infer_align.fitting.regression import Replies
from infer_align.rewards import Messages, Reward, RewardScores
from infer_align.types import Candidate


class Counted(Reward):
    """Scores a text by a function, and remembers for which prompts it was asked."""

    def __init__(self, of: Callable[[str], float]) -> None:
        self.of = of
        self.asked: list[str] = []

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        self.asked.append(str(messages[-1]["content"]))
        return RewardScores(np.array([[[self.of(c.text) for c in candidates]]]))


def planted(
    quality: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: int,
    seed: int,
    d: int,
    vocabulary: int,
) -> Replies:
    """Replies of one token each, 8 to a prompt, whose reward is a function of state and token, and noise."""
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
def counted() -> Callable[..., Counted]:
    """`counted(len)`: a reward by a function of the text; by default its number of characters that are not spaces."""
    return lambda of=lambda text: float(len(text.replace(" ", ""))): Counted(of)


@pytest.fixture(scope="session")
def nan_for() -> Callable[[str], float]:
    """A reward that cannot score some texts."""
    return lambda text: math.nan if len(text) % 2 else 1.0


@pytest.fixture(scope="session")
def engine(language_model: Callable[..., str]) -> Iterator[TransformersEngine]:
    """Started once; each test runs it from an event loop of its own."""
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
