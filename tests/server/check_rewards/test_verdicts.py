"""Each figure gets one sentence, and the worst one decides."""

from __future__ import annotations

import math

import pytest

from infer_align.diagnostics.overoptimisation import Trust
from infer_align.diagnostics.statistics import UNMEASURED, Statistic
from infer_align_server.check_rewards.report import (
    AttackFigures,
    CurveFigures,
    LengthFigures,
    PairFigures,
)
from infer_align_server.check_rewards.verdicts import (
    judge_attack,
    judge_attacks,
    judge_curve,
    judge_length,
    judge_pairs,
    percent,
)


def stat(value: float, error: float = 0.01) -> Statistic:
    return Statistic(value, error, 100, 50)


@pytest.mark.parametrize(
    ("accuracy", "same_length", "over_length", "level"),
    [
        (0.51, 0.6, 0.1, "bad"),
        (0.8, 0.51, 0.1, "bad"),
        (0.8, 0.6, 0.01, "careful"),
        (0.8, 0.6, 0.1, "good"),
    ],
)
def test_a_reward_must_know_more_than_the_length(
    accuracy: float, same_length: float, over_length: float, level: str
) -> None:
    pairs = PairFigures(stat(accuracy), stat(same_length), stat(0.7), stat(over_length), 0.0)
    assert judge_pairs(pairs).level == level


def curve(n: int, peak: int, fall: float, largest: int = 64) -> CurveFigures:
    result = Trust(n, peak, stat(0.3), stat(fall), largest)
    return CurveFigures("score", {}, {"score": result})


def test_the_curve_says_where_gold_peaks() -> None:
    rising = judge_curve(curve(64, 64, 0.0))
    assert rising.level == "good"
    falling = judge_curve(curve(8, 8, -0.2))
    assert falling.level == "careful"
    assert "peaks at n = 8" in falling.text
    flat = judge_curve(curve(8, 8, -0.01))
    assert flat.level == "good"
    assert "within the noise" in flat.text
    assert judge_curve(curve(1, 8, -0.2)).level == "bad"


def attack(name: str, beaten: float, chosen: float, over: Statistic = UNMEASURED) -> AttackFigures:
    return AttackFigures(name, stat(beaten), stat(chosen), over)


def test_an_attack_that_wins_is_a_hole() -> None:
    assert judge_attack(attack("praise", 0.1, 0.2)).level == "bad"
    assert judge_attack(attack("praise", 0.9, 0.0)).level == "bad"
    assert judge_attack(attack("padding", 0.1, 0.0, stat(0.9))).level == "careful"
    assert judge_attack(attack("hedging", 0.1, 0.0)).level == "good"
    suite = (attack("praise", 0.9, 0.0), attack("hedging", 0.1, 0.0))
    assert "praise" in judge_attacks(suite).text
    assert "hedging" not in judge_attacks(suite).text


@pytest.mark.parametrize(
    ("score", "ratings", "level"),
    [(0.6, 0.5, "good"), (0.8, 0.5, "careful"), (-0.4, 0.5, "careful"), (-0.1, 0.5, "good")],
)
def test_a_reward_may_like_length_as_much_as_the_ratings(
    score: float, ratings: float, level: str
) -> None:
    assert judge_length(LengthFigures(stat(score), stat(ratings))).level == level


def test_shares_are_written_with_their_error() -> None:
    assert percent(stat(0.612, 0.013)) == "61.2 ± 1.3 %"
    assert percent(Statistic(0.5, math.nan, 1, 1)) == "50.0 %"
    assert percent(UNMEASURED) == "-"
