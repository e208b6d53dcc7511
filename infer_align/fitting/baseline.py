"""Best-of-n from the replies that a fit has scored anyway: the baseline of every value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infer_align.fitting.curve import clustered_mean
from infer_align.fitting.samples_file import ScoredReply
from infer_align.methods.best_of_n import expected_best, kl_upper_bound

SIZES = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class BestOfPoint:
    """The result of best-of-n by the reward itself.

    Attributes:
        n: number of replies to choose from.
        reward: mean reward of the best reply, estimated without bias from all replies of a prompt.
        reward_se: standard error of `reward` over prompts.
        gain: mean difference to one reply.
        gain_se: standard error of `gain`.
        kl_bound: upper bound of the KL from the frozen model, in nats.
    """

    n: int
    reward: float
    reward_se: float
    gain: float
    gain_se: float
    kl_bound: float


def best_of_n(samples: Sequence[ScoredReply], prompts: Sequence[int]) -> tuple[BestOfPoint, ...]:
    """Return best-of-2, 4 and 8, as far as each prompt has as many replies.

    Args:
        samples: scored replies of the frozen model.
        prompts: indices of the prompts to use.
    """
    rewards: dict[int, list[float]] = {prompt: [] for prompt in prompts}
    for sample in samples:
        if sample.prompt in rewards:
            rewards[sample.prompt].append(sample.reward)
    groups = np.arange(len(rewards))
    means = np.array([np.mean(scores) for scores in rewards.values()])
    results = []
    for n in SIZES:
        if any(len(scores) < n for scores in rewards.values()):
            break
        best = np.array([expected_best(scores, scores, n) for scores in rewards.values()])
        result = BestOfPoint(
            n,
            *clustered_mean(best, groups),
            *clustered_mean(best - means, groups),
            kl_bound=kl_upper_bound(n),
        )
        results.append(result)
    return tuple(results)
