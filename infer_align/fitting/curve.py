"""What steering earns and what it costs: reward against KL from the frozen model, over beta."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.engines.transformers import TransformersEngine
from infer_align.fitting.samples import (
    Conversation,
    Progress,
    SamplingConfig,
    draw_candidates,
    score_candidates,
)
from infer_align.methods.vas import VAS
from infer_align.rewards import Reward
from infer_align.types import Array, Draw, Steering


@dataclass(frozen=True, slots=True)
class BetaPoint:
    """What steering with one beta did on held-out prompts."""

    beta: float
    reward: float  # of the replies that could be scored; NaN where fewer than two could
    reward_se: float
    kl: float  # nats per reply, from the frozen model
    kl_se: float


async def reward_kl_curve(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    value: str,
    betas: Sequence[float],
    how: SamplingConfig,
    progress: Progress,
) -> tuple[BetaPoint, ...]:
    """Reward of one steered reply per prompt, and its KL from the frozen model: the sum over tokens of log pi_beta - log pi_0.

    Of two equal prompts the replies differ: their seeds do.
    """
    points = []
    for beta in betas:
        results = await asyncio.gather(
            *(
                _steered(engine, reward, messages, value, beta, how, how.seed + i)
                for i, messages in enumerate(prompts)
            )
        )
        rewards, kls = np.array(results).T
        points.append(
            BetaPoint(beta, *_mean_and_error(rewards[np.isfinite(rewards)]), *_mean_and_error(kls))
        )
        progress(f"beta {beta:g}: reward {points[-1].reward:.3f}, KL {points[-1].kl:.2f} nats")
    return tuple(points)


def _mean_and_error(values: Array) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


async def _steered(
    engine: TransformersEngine,
    reward: Reward,
    messages: Conversation,
    value: str,
    beta: float,
    how: SamplingConfig,
    seed: int,
) -> tuple[float, float]:
    vas = VAS({value: beta})
    steering = Steering(vas.beta, vas.top_k, vas.tail)
    body = {"messages": messages, "max_tokens": how.max_tokens, "logprobs": True}
    (candidate,) = await draw_candidates(engine, Draw(body, 1, (seed,), steering=steering))
    entries = candidate.choice["logprobs"]["content"]
    kl = sum(entry["aligned_logprob"] - entry["logprob"] for entry in entries)
    (value_of_reply,) = await score_candidates(reward, messages, [candidate], how.objective)
    return value_of_reply, kl


def suggest_beta(curve: Sequence[BetaPoint]) -> float:
    """The smallest beta whose reward is within one standard error of the best: what lies beyond it costs KL and earns nothing."""
    scored = [point for point in curve if math.isfinite(point.reward)]
    if not scored:
        return 0.0
    best = max(scored, key=lambda point: point.reward)
    return min((p.beta for p in scored if p.reward >= best.reward - best.reward_se), key=abs)


def beta_grid(largest: float) -> Iterator[float]:
    """A grid that doubles, from a 16th of the largest, behind 0: the frozen model itself."""
    yield 0.0
    yield from (largest / 2**i for i in range(4, -1, -1))
