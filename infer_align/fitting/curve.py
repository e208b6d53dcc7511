"""Measure steering on held-out prompts: reward against KL from the frozen model, over beta."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.engines.transformers import TransformersEngine
from infer_align.fitting.regression import Progress
from infer_align.fitting.samples import (
    Conversation,
    SamplingConfig,
    draw_candidates,
    score_candidates,
)
from infer_align.methods.vas import VAS
from infer_align.rewards import Reward
from infer_align.types import Array, Draw, Steering


@dataclass(frozen=True, slots=True)
class BetaPoint:
    """The result of steering with one beta on held-out prompts.

    Attributes:
        beta: weight of the value.
        reward: mean reward of the replies that could be scored; NaN for fewer than two of them.
        reward_se: standard error of `reward`.
        kl: mean KL from the frozen model, in nats per reply.
        kl_se: standard error of `kl`.
    """

    beta: float
    reward: float
    reward_se: float
    kl: float
    kl_se: float


async def reward_kl_curve(
    engine: TransformersEngine,
    reward: Reward,
    prompts: Sequence[Conversation],
    value: str,
    betas: Sequence[float],
    sampling: SamplingConfig,
    progress: Progress,
) -> tuple[BetaPoint, ...]:
    """Sample one steered reply to each prompt with each beta, and measure its reward and its KL.

    The KL of a reply is estimated by the sum over its tokens of log pi_beta - log pi_0. The reply
    to the i-th prompt has the seed `sampling.seed + i`, so equal prompts get different replies.

    Args:
        engine: started, with the value loaded.
        reward: started.
        prompts: the held-out prompts.
        value: name of the value in the engine.
        betas: the weights to try.
        sampling: maximum length, seed and objective of the replies.
        progress: called with a line of text after each beta.
    """
    points = []
    for beta in betas:
        vas = VAS({value: beta})
        steering = Steering(vas.beta, vas.top_k, vas.tail, vas.min_p)
        replies = []
        for i, messages in enumerate(prompts):
            seed = sampling.seed + i
            replies.append(_measure_reply(engine, reward, messages, steering, sampling, seed))
        rewards, kls = np.array(await asyncio.gather(*replies)).T
        finite_rewards = rewards[np.isfinite(rewards)]
        point = BetaPoint(beta, *_mean_and_error(finite_rewards), *_mean_and_error(kls))
        progress(f"beta {beta:g}: reward {point.reward:.3f}, KL {point.kl:.2f} nats")
        points.append(point)
    return tuple(points)


def _mean_and_error(values: Array) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


async def _measure_reply(
    engine: TransformersEngine,
    reward: Reward,
    messages: Conversation,
    steering: Steering,
    sampling: SamplingConfig,
    seed: int,
) -> tuple[float, float]:
    """Sample one steered reply and return its reward and its KL."""
    body = {"messages": messages, "max_tokens": sampling.max_tokens, "logprobs": True}
    (candidate,) = await draw_candidates(engine, Draw(body, 1, (seed,), steering=steering))
    entries = candidate.choice["logprobs"]["content"]
    kl = sum(entry["aligned_logprob"] - entry["logprob"] for entry in entries)
    (score,) = await score_candidates(reward, messages, [candidate], sampling.objective)
    return score, kl


def suggest_beta(points: Sequence[BetaPoint]) -> float:
    """Return the smallest beta whose reward is within one standard error of the best reward.

    A larger beta would cost more KL for no measurable gain. Without a scored point, return 0.
    """
    scored = [point for point in points if math.isfinite(point.reward)]
    if not scored:
        return 0.0
    best = max(scored, key=lambda point: point.reward)
    threshold = best.reward - best.reward_se
    return min((point.beta for point in scored if point.reward >= threshold), key=abs)


def beta_grid(largest: float) -> Iterator[float]:
    """Yield 0, which is the frozen model, then 1/16, 1/8, 1/4, 1/2 and all of the largest beta."""
    yield 0.0
    for halvings in range(4, -1, -1):
        yield largest / 2**halvings
