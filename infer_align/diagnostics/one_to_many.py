"""Compare the right answers of a prompt with all wrong ones at once.

Best-of-n meets many wrong answers, and one of them with a high score is enough to lose. Accuracy on
single pairs does not show that: a reward that is right in 90 % of independent pairs ranks one right
answer over nine wrong ones in .9^9 = 39 % of prompts.

Source: Kim et al., "Evaluating Robustness of Reward Models for Mathematical Reasoning" (RewardMATH,
2410.01729), section 3: one right answer, nine wrong ones, and the mean reciprocal rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.types import Array

# Wrong answers per right one, in the paper.
WRONG_ANSWERS = 9


@dataclass(frozen=True, slots=True)
class OneToMany:
    """The right answers of one prompt against its wrong ones."""

    # 1 if the lowest right answer scores higher than the highest wrong one, else 0.
    all_over_all: float
    # Probability that a right answer scores higher than all of `wrong` random wrong ones.
    one_over_many: float
    chance: float  # of the same for random scores
    reciprocal_rank: float  # of a right answer among all wrong ones
    wrong: int


def one_to_many(
    scores: ArrayLike, ratings: ArrayLike, wrong_answers: int = WRONG_ANSWERS
) -> OneToMany | None:
    """Compare the right answers of one prompt with its wrong ones.

    The answers with the highest rating are right. Those below the middle of the lowest and the
    highest rating are wrong. Ties count as lost.

    The probability over all draws of k of the m wrong answers, b of which score lower, is
    C(b, k) / C(m, k); nothing is drawn.

    Args:
        scores: [N]; answers that are NaN are left out.
        ratings: [N]; answers that are NaN are left out.
        wrong_answers: k, or all wrong answers if there are fewer.

    Returns:
        None if all answers have the same rating.
    """
    proxy = np.asarray(scores, dtype=np.float64)
    gold = np.asarray(ratings, dtype=np.float64)
    present = ~np.isnan(proxy) & ~np.isnan(gold)
    proxy = proxy[present]
    gold = gold[present]
    if not len(gold) or gold.min() == gold.max():
        return None
    right = proxy[gold == gold.max()]
    wrong = proxy[gold < gold.min() / 2 + gold.max() / 2]
    below = (wrong[None, :] < right[:, None]).sum(axis=1)
    k = min(wrong_answers, len(wrong))
    return OneToMany(
        all_over_all=float(right.min() > wrong.max()),
        one_over_many=float(_subset_probability(below, len(wrong), k).mean()),
        chance=1 / (k + 1),
        reciprocal_rank=float((1 / (1 + len(wrong) - below)).mean()),
        wrong=k,
    )


def _subset_probability(below: Array, total: int, k: int) -> Array:
    """Return C(b, k) / C(total, k) as a product of k factors, which cannot overflow."""
    drawn = np.arange(k)
    factors = np.clip((below[:, None] - drawn) / (total - drawn), 0.0, 1.0)
    return np.asarray(factors.prod(axis=1))
