"""The figures of a reward on held-out pairs."""

from __future__ import annotations

import numpy as np
import pytest

from infer_align.fitting.preference_report import accuracy, held_out_report


def test_accuracy_counts_ties_half() -> None:
    result = accuracy(np.array([1.0, 0.0, -1.0, 2.0]), [0, 1, 2, 3])
    assert result.value == 0.625
    assert result.pairs == 4
    assert result.low <= result.value <= result.high


def test_the_interval_is_over_prompts() -> None:
    random = np.random.default_rng(0)
    margins = np.repeat(random.normal(size=100), 20)
    alone = accuracy(margins, np.arange(2000))
    clustered = accuracy(margins, np.repeat(np.arange(100), 20))
    assert alone.value == clustered.value
    assert clustered.high - clustered.low > 3 * (alone.high - alone.low)
    # About 1.96 standard errors of a share on each side.
    half = (alone.high - alone.low) / 2
    assert half == pytest.approx(1.96 * np.sqrt(0.25 / 2000), rel=0.15)


def test_without_pairs_there_is_no_accuracy() -> None:
    result = accuracy(np.empty(0), [])
    assert np.isnan([result.value, result.low, result.high]).all()
    assert result.pairs == 0


def test_a_report_has_every_figure() -> None:
    margins = np.array([[1.0, -1.0, 2.0, 1.0], [2.0, 1.0, 1.0, 1.0]])
    lengths = [(10, 100), (100, 101), (50, 10), (20, 21)]
    report = held_out_report(margins, lengths, [0, 1, 2, 3])
    assert report.accuracy.value == 0.875
    assert report.length_matched.pairs == 2
    assert report.length_matched.value == 0.75
    assert report.shorter_wins.value == 0.75
    assert report.members == (0.75, 1.0)
    assert report.disagreement == 0.25
    assert -1 <= report.length_correlation <= 1
    assert report.member_correlation == pytest.approx(4 / np.sqrt(7 * 7))
    assert sum(entry.pairs for entry in report.calibration.bins) == 4


def test_a_single_member_has_no_correlation() -> None:
    report = held_out_report(np.ones((1, 3)), [(1, 2)] * 3, [0, 1, 2])
    assert np.isnan(report.member_correlation)
    assert report.disagreement == 0
