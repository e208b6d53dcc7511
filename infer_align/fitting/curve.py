"""Measure steering on held-out prompts: reward against KL from the frozen model, over beta.

Every beta gets the same prompts and seeds. So betas are compared reply by reply, and the standard
errors are clustered by prompt, because the replies to one prompt are not independent.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infer_align.config.fitting import FitConfig
from infer_align.engines.transformers.engine import TransformersEngine
from infer_align.fitting.samples import draw_candidates, score_candidates
from infer_align.fitting.samples_file import Conversation, SamplingConfig
from infer_align.rewards import Reward
from infer_align.steering import Steering
from infer_align.types import Array, Draw

# [N] prompt of each reply.
Groups = NDArray[np.intp]

# A difference is measurable if it exceeds this number of standard errors.
SIGNIFICANT_ERRORS = 2.0
# A measured KL counts as within the limit up to this factor.
KL_TOLERANCE = 1.05


@dataclass(frozen=True, slots=True)
class BetaSample:
    """The replies with one beta to N prompts, which are the same for each beta.

    Attributes:
        beta: weight of the value.
        rewards: [N], NaN for a reply that could not be scored.
        kls: [N] sum over the tokens of log pi_beta - log pi_0, an estimate of KL in nats.
    """

    beta: float
    rewards: Array
    kls: Array

    @property
    def kl(self) -> float:
        """Return the mean KL in nats per reply."""
        return float(np.mean(self.kls))


@dataclass(frozen=True, slots=True)
class BetaPoint:
    """The result of steering with one beta on held-out prompts.

    Attributes:
        beta: weight of the value.
        reward: mean reward of the replies that could be scored.
        reward_se: standard error of `reward`, clustered by prompt as all errors here.
        kl: mean KL from the frozen model, in nats per reply.
        kl_se: standard error of `kl`.
        gain: mean difference to the reward with beta 0, for the same prompts and seeds.
        gain_se: standard error of `gain`.
        unscored: number of replies that could not be scored.
    """

    beta: float
    reward: float
    reward_se: float
    kl: float
    kl_se: float
    gain: float
    gain_se: float
    unscored: int

    @property
    def is_measurable(self) -> bool:
        """Return True if the gain is larger than two of its standard errors."""
        return self.gain > SIGNIFICANT_ERRORS * self.gain_se


class Steered:
    """Replies to the held-out prompts, steered by one value with any beta."""

    def __init__(
        self,
        engine: TransformersEngine,
        reward: Reward,
        prompts: Sequence[Conversation],
        value: str,
        config: FitConfig,
        sampling: SamplingConfig,
    ) -> None:
        """Keep what all betas share.

        Args:
            engine: started, with the value loaded.
            reward: started.
            prompts: the held-out prompts, which the replies use in turn.
            value: name of the value in the engine.
            config: number of replies, and the form of steering.
            sampling: maximum length, seed and objective of the replies.
        """
        self._engine = engine
        self._reward = reward
        self._prompts = prompts
        self._value = value
        self._config = config
        self._sampling = sampling

    @property
    def groups(self) -> Groups:
        """Return the index of the prompt of each reply, [N]."""
        return np.arange(self._config.curve_replies) % len(self._prompts)

    async def run(self, beta: float, count: int | None = None) -> BetaSample:
        """Sample and score the first `count` replies with this beta; default: all of them.

        The i-th reply has the seed `sampling.seed + i`.
        """
        vas = self._config.vas(self._value, beta)
        steering = Steering(vas.beta, vas.top_k, vas.tail, vas.min_p)
        replies = []
        for i in range(count or self._config.curve_replies):
            messages = self._prompts[i % len(self._prompts)]
            replies.append(self._measure_reply(messages, steering, self._sampling.seed + i))
        rewards, kls = np.array(await asyncio.gather(*replies)).T
        return BetaSample(beta, rewards, kls)

    async def _measure_reply(
        self, messages: Conversation, steering: Steering, seed: int
    ) -> tuple[float, float]:
        """Sample one steered reply and return its reward and its KL."""
        sampling = self._sampling
        body = {"messages": messages, "max_tokens": sampling.max_tokens, "logprobs": True}
        draw = Draw(body, 1, (seed,), steering=steering)
        (candidate,) = await draw_candidates(self._engine, draw)
        entries = candidate.choice["logprobs"]["content"]
        kl = sum(entry["aligned_logprob"] - entry["logprob"] for entry in entries)
        (score,) = await score_candidates(self._reward, messages, [candidate], sampling.objective)
        return score, kl


def clustered_mean(values: Array, groups: Groups) -> tuple[float, float]:
    """Return the mean of the finite values and its standard error, clustered by group.

    Args:
        values: [N], NaN where there is none.
        groups: [N] group of each value.

    Returns:
        The mean, NaN without a value; the error, NaN for fewer than two groups.
    """
    is_finite = np.isfinite(values)
    used, members = values[is_finite], groups[is_finite]
    if not used.size:
        return math.nan, math.nan
    mean = float(used.mean())
    _, index = np.unique(members, return_inverse=True)
    sums = np.bincount(index, weights=used - mean)
    if len(sums) < 2:
        return mean, math.nan
    variance = len(sums) / (len(sums) - 1) * float(sums @ sums) / used.size**2
    return mean, math.sqrt(variance)


def make_points(samples: Sequence[BetaSample], groups: Groups) -> tuple[BetaPoint, ...]:
    """Return the point of each beta.

    Args:
        samples: replies to the same prompts with the same seeds; one has beta 0.
        groups: [N] prompt of each reply.
    """
    frozen = next(sample for sample in samples if sample.beta == 0)
    points = []
    for sample in samples:
        point = BetaPoint(
            sample.beta,
            *clustered_mean(sample.rewards, groups),
            *clustered_mean(sample.kls, groups),
            *clustered_mean(sample.rewards - frozen.rewards, groups),
            unscored=int((~np.isfinite(sample.rewards)).sum()),
        )
        points.append(point)
    return tuple(points)


def suggest_beta(samples: Sequence[BetaSample], groups: Groups, kl_limit: float) -> float:
    """Return the smallest beta that is as good as the best one within a limit of KL.

    The best beta has the largest mean reward. A smaller one is as good if it loses at most one
    standard error of the paired difference. If the best beta is not measurably better than 0, by
    two standard errors, the suggestion is 0.

    Args:
        samples: replies to the same prompts with the same seeds; one has beta 0.
        groups: [N] prompt of each reply.
        kl_limit: largest KL in nats per reply.
    """
    points = make_points(samples, groups)
    usable: list[tuple[BetaPoint, BetaSample]] = []
    for point, sample in zip(points, samples, strict=True):
        if point.kl <= KL_TOLERANCE * kl_limit and math.isfinite(point.gain):
            usable.append((point, sample))
    if not usable:
        return 0.0
    best, best_sample = max(usable, key=lambda pair: pair[0].gain)
    if not best.is_measurable:
        return 0.0
    suggested = best.beta
    for point, sample in usable:
        loss, error = clustered_mean(best_sample.rewards - sample.rewards, groups)
        if point.beta != 0 and loss <= error and abs(point.beta) < abs(suggested):
            suggested = point.beta
    return suggested
