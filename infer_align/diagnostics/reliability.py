"""Measure how well a reward predicts gold, by level of the reward.

A reward may sort the bad answers well and the good ones at random. Best-of-n only uses the top, so
a low R² there means that a larger n buys nothing.

Source: Shen and Zhang, "Policy Filtration in RLHF to Fine-Tune LLM for Code Generation" (PF-PPO,
2409.06957), section 4: the coefficient of determination of the rewards and the actual scores on
filtered samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from infer_align.diagnostics.statistics import Statistic, clustered_mean, correlation
from infer_align.objectives import standard_scores
from infer_align.types import Array

LEVELS = 5


@dataclass(frozen=True, slots=True)
class RewardLevel:
    """The answers whose score lies between two quantiles."""

    low: float  # in standard deviations of the scores of a prompt
    high: float
    gold: Statistic  # above the mean of the prompt
    r_squared: float  # of a line from the score to gold within the level
    answers: int

    @property
    def noise(self) -> float:
        """Return the R² that random scores reach on average, 1 / (answers - 1)."""
        return 1 / (self.answers - 1) if self.answers > 1 else math.nan


def reliability(
    scores: Sequence[ArrayLike], gold: Sequence[ArrayLike], levels: int = LEVELS
) -> tuple[RewardLevel, ...]:
    """Return the levels of a reward, lowest first, each with about as many answers.

    Scores are standardised within a prompt, and gold is centred, because only the answers of one
    prompt compete. Equal scores never fall into two levels, so there may be fewer levels.

    Args:
        scores: G rows [N_g]; answers that are NaN are left out.
        gold: rows of the same lengths.
        levels: number of quantiles.
    """
    proxy, judged, prompts = _pooled(scores, gold)
    if not len(proxy):
        return ()
    edges = np.unique(np.quantile(proxy, np.linspace(0, 1, levels + 1)))
    if len(edges) < 2:
        return ()
    index = np.clip(np.searchsorted(edges, proxy, side="right") - 1, 0, len(edges) - 2)
    rows: list[RewardLevel] = []
    for i in range(len(edges) - 1):
        inside = index == i
        if inside.any():
            level = RewardLevel(
                low=float(edges[i]),
                high=float(edges[i + 1]),
                gold=clustered_mean(judged[inside], prompts[inside]),
                r_squared=correlation(proxy[inside], judged[inside]) ** 2,
                answers=int(inside.sum()),
            )
            rows.append(level)
    return tuple(rows)


def r_squared(scores: Sequence[ArrayLike], gold: Sequence[ArrayLike]) -> float:
    """Return R² over all answers, with scores standardised and gold centred within a prompt."""
    proxy, judged, _ = _pooled(scores, gold)
    return correlation(proxy, judged) ** 2


def _pooled(scores: Sequence[ArrayLike], gold: Sequence[ArrayLike]) -> tuple[Array, Array, Array]:
    """Return the scores, the gold and the prompt of every answer that has both."""
    proxies: list[Array] = [np.empty(0)]
    judged: list[Array] = [np.empty(0)]
    prompts: list[Array] = [np.empty(0)]
    for prompt, (row, truth) in enumerate(zip(scores, gold, strict=True)):
        x = np.asarray(row, dtype=np.float64)
        y = np.asarray(truth, dtype=np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.any():
            continue
        proxies.append(standard_scores(x[finite]))
        judged.append(y[finite] - y[finite].mean())
        prompts.append(np.full(int(finite.sum()), float(prompt)))
    return np.concatenate(proxies), np.concatenate(judged), np.concatenate(prompts)
