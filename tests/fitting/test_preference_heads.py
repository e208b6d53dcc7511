"""Heads are fitted to pairs, whatever part of the labels is wrong."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from scipy.special import expit

from infer_align.fitting.preference_heads import (
    FittedHeads,
    HeadSettings,
    Noise,
    PairFeatures,
    fit_head,
    fit_heads,
    hold_out,
    vote,
)

pytestmark = pytest.mark.slow

SIZE = 12


def make_pairs(
    count: int, seed: int = 0, wrong: float = 0.0, by_length: float = 0.0
) -> tuple[PairFeatures, np.ndarray]:
    """Return pairs whose labels come from one true head, and which labels are wrong."""
    random = np.random.default_rng(seed)
    head = np.random.default_rng(99).normal(size=SIZE)
    features = random.normal(size=(count, SIZE))
    log = random.normal(size=count)
    lengths = np.stack([log, 10 * log], axis=1)
    # The first feature says how long an answer is, beside what it says itself.
    features[:, 0] += by_length * log
    margin = features @ head + by_length * log
    sign = np.where(random.random(count) < expit(3 * margin), 1.0, -1.0)
    flipped = random.random(count) < wrong
    sign[flipped] *= -1
    pairs = PairFeatures(
        features * sign[:, None], lengths * sign[:, None], random.integers(0, count // 2, count)
    )
    return pairs, flipped


def right(fitted: FittedHeads, pairs: PairFeatures) -> float:
    return float((fitted.margins(pairs).mean(axis=0) > 0).mean())


def test_a_head_is_the_minimum_of_the_loss() -> None:
    pairs, _ = make_pairs(60)
    random = np.random.default_rng(1)
    targets, weights = random.integers(0, 2, 60).astype(float), random.random(60)
    head = fit_head(pairs.features, targets, weights, 0.1)
    residuals = weights / weights.sum() * (expit(pairs.features @ head) - targets)
    gradient = pairs.features.T @ residuals + 0.1 * head
    assert np.abs(gradient).max() < 1e-4


@pytest.mark.parametrize("noise", ["none", "vote", "exchange"])
def test_an_ensemble_learns_what_the_labels_follow(noise: Noise) -> None:
    pairs, _ = make_pairs(400)
    fitted = fit_heads(pairs, HeadSettings(3, noise=noise))
    unseen, _ = make_pairs(400, seed=1)
    assert fitted.weights.shape == (3, SIZE)
    assert right(fitted, unseen) > 0.75
    again = fit_heads(pairs, HeadSettings(3, noise=noise))
    assert (again.weights == fitted.weights).all()


def test_members_differ_by_their_seed() -> None:
    pairs, _ = make_pairs(200)
    fitted = fit_heads(pairs, HeadSettings(3))
    assert len(np.unique(fitted.weights.round(6), axis=0)) == 3
    assert (fitted.weights == 0).any()
    other = fit_heads(pairs, HeadSettings(3, seed=1))
    assert not np.allclose(other.weights, fitted.weights)
    (single,) = fit_heads(pairs, HeadSettings(1)).weights
    assert (single != 0).all()


def test_scores_are_log_odds_of_unseen_pairs() -> None:
    pairs, _ = make_pairs(600)
    unseen, _ = make_pairs(2000, seed=1)
    margins = fit_heads(pairs, HeadSettings(3)).margins(unseen).mean(axis=0)
    predicted = expit(np.abs(margins)).mean()
    assert predicted == pytest.approx((margins > 0).mean(), abs=0.05)


@pytest.mark.parametrize("noise", ["vote", "exchange"])
def test_wrong_labels_are_recognised(noise: Noise) -> None:
    pairs, wrong = make_pairs(800, wrong=0.2)
    fitted = fit_heads(pairs, HeadSettings(3, noise=noise, noise_rate=0.2))
    cleaning = fitted.cleaning
    suspected = (cleaning.targets == 0) if noise == "vote" else (cleaning.weights == 0)
    assert suspected.sum() > 50
    # A fifth of all labels is wrong.
    assert wrong[suspected].mean() > 0.4
    assert cleaning.flipped == (cleaning.targets == 0).sum()
    assert cleaning.halved == (cleaning.weights < 1).sum()


def test_a_vote_flips_clear_pairs_only() -> None:
    margins = np.array([[-2.0, -0.1, 1.0, 0.1], [-3.0, 0.2, 2.0, -0.2]])
    cleaning = vote(margins, 0.5)
    assert cleaning.targets.tolist() == [0, 1, 1, 1]
    assert cleaning.weights.tolist() == [1, 0.5, 1, 0.5]
    assert vote(margins, 0.2).flipped == 0


def test_length_is_regressed_out() -> None:
    pairs, _ = make_pairs(600, by_length=1.0)
    unseen, _ = make_pairs(1000, seed=1, by_length=1.0)
    correlations = []
    for length_free in (False, True):
        margins = fit_heads(pairs, HeadSettings(3, length_free=length_free)).margins(unseen)
        mean, length = margins.mean(axis=0), unseen.lengths[:, 0]
        correlations.append(mean @ length / np.sqrt(mean @ mean * (length @ length)))
    assert correlations[0] > 0.3
    assert abs(correlations[1]) < 0.12


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    prompts = [0, 1, 2, 3, 4] * 4
    testing = hold_out(prompts, 0.2, 0)
    assert testing.sum() == 4
    assert len({prompts[row] for row in np.flatnonzero(testing)}) == 1


def test_features_that_never_differ_are_no_problem() -> None:
    pairs, _ = make_pairs(100)
    flat = PairFeatures(pairs.features * 0, pairs.lengths * 0, pairs.prompts)
    fitted = fit_heads(flat, HeadSettings(2))
    assert not fitted.margins(flat).any()
