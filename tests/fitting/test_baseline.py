"""Test best-of-n from the scored replies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from infer_align.fitting.baseline import best_of_n
from infer_align.fitting.samples_file import ScoredReply


def replies(rewards: dict[int, list[float]]) -> list[ScoredReply]:
    samples = []
    for prompt, scores in rewards.items():
        samples += [ScoredReply(prompt, "", "text", "stop", score) for score in scores]
    return samples


def test_the_estimate_is_the_mean_over_all_subsets() -> None:
    rewards = {0: [1.0, 5.0, 2.0, 2.0], 1: [0.0, -3.0, 7.0, 1.0], 2: [9.0, 9.0, 9.0, 9.0]}
    two, four = best_of_n(replies(rewards), [0, 1])
    expected = [
        np.mean([max(pair) for pair in itertools.combinations(rewards[prompt], 2)])
        for prompt in (0, 1)
    ]
    assert two.reward == pytest.approx(np.mean(expected))
    assert two.reward_se == pytest.approx(np.std(expected, ddof=1) / math.sqrt(2))
    assert two.gain == pytest.approx(np.mean(expected) - np.mean([2.5, 1.25]))
    assert (four.n, four.reward) == (4, 6.0)
    assert four.kl_bound == pytest.approx(math.log(4) - 3 / 4)


def test_sizes_without_enough_replies_are_left_out() -> None:
    rewards = {i: [float(j) for j in range(8)] for i in range(3)}
    assert [best.n for best in best_of_n(replies(rewards), [0, 1, 2])] == [2, 4, 8]
    assert best_of_n(replies({0: [1.0], 1: [2.0]}), [0, 1]) == ()
