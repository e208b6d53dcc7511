"""Compute the figures of a check from scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from infer_align.diagnostics.attacks import beaten_share, is_chosen
from infer_align.diagnostics.calibration import Calibration, calibration, fit_scale
from infer_align.diagnostics.distance import mean_distance
from infer_align.diagnostics.one_to_many import one_to_many
from infer_align.diagnostics.overoptimisation import (
    GoldCurve,
    Trust,
    gold_curve,
    mean_curve,
    sizes,
    trust,
)
from infer_align.diagnostics.pairs import have_same_length, wins
from infer_align.diagnostics.reliability import RewardLevel, r_squared, reliability
from infer_align.diagnostics.statistics import (
    Statistic,
    clustered_mean,
    error_correlations,
    mean_over_prompts,
    member_correlations,
    within_prompts,
)
from infer_align.objectives import Ensemble, Objective
from infer_align.types import Array
from infer_align_server.check_rewards.questions import RatedQuestion
from infer_align_server.check_rewards.scoring import ScoredAttack, ScoredReward

# A curve needs pools of at least this many answers: below, there is hardly a choice.
MIN_POOL = 4
NO_RATINGS = "no two answers to one prompt have clearly different ratings"
GOLD = "gold itself"
LONGEST = "longest answer"
ONE_MEMBER = "one member"
SCORE = "score"
RATINGS = "ratings"


@dataclass(frozen=True, slots=True)
class PairFigures:
    """The share of pairs in which the better answer has the higher score; a tie is half."""

    accuracy: Statistic
    same_length: Statistic  # of the pairs of about the same length
    longer: Statistic  # share of pairs in which the longer answer is the better one
    # Accuracy minus that of length alone, in the better of its two directions, pair by pair.
    over_length: Statistic
    ties: float  # share of pairs with equal scores


@dataclass(frozen=True, slots=True)
class ManyFigures:
    """The right answers of a prompt against its wrong ones."""

    all_over_all: Statistic
    one_over_many: Statistic
    chance: float
    reciprocal_rank: Statistic
    wrong: float  # mean number of wrong answers that one right answer meets


@dataclass(frozen=True, slots=True)
class CalibrationFigures:
    """The sigmoid of score differences as probabilities."""

    scale: float  # that fits best; infinite if no pair is wrong
    plain: Calibration
    fitted: Calibration | None  # None if the scale is not finite


@dataclass(frozen=True, slots=True)
class LengthFigures:
    """The correlation with the length of the answer within a prompt."""

    score: Statistic
    ratings: Statistic  # of the ratings with the length


@dataclass(frozen=True, slots=True)
class MemberFigures:
    """The differences between the members of an ensemble."""

    names: tuple[str, ...]
    accuracy: tuple[Statistic, ...]
    scores: Array  # [K, K] correlations within a prompt
    errors: Array  # [K, K] the same after gold is removed; NaN without ratings

    @property
    def mean_correlation(self) -> float:
        """Return the mean correlation of two members: of their errors, or else of their scores."""
        table = self.scores if np.isnan(self.errors).all() else self.errors
        pairs = table[np.triu_indices(len(table), 1)]
        return float(np.nanmean(pairs)) if not np.isnan(pairs).all() else float("nan")

    @property
    def effective(self) -> float:
        """Return the number of independent members with this variance, K/(1+(K-1)r)."""
        size = len(self.names)
        return size / (1 + (size - 1) * max(0.0, self.mean_correlation))


@dataclass(frozen=True, slots=True)
class ReliabilityFigures:
    """The share of gold that the score explains, by level."""

    levels: tuple[RewardLevel, ...]
    r_squared: float  # over all levels


@dataclass(frozen=True, slots=True)
class CurveFigures:
    """The gold of the best of n, by selector."""

    selector: str  # the default selector of this reward
    curves: Mapping[str, GoldCurve]
    trust: Mapping[str, Trust]  # without those of the baselines


@dataclass(frozen=True, slots=True)
class AttackFigures:
    """The rank of one attack among the real answers."""

    name: str
    beaten: Statistic  # share of real answers that it outranks
    chosen: Statistic  # share of prompts in which it outranks every real answer
    over_original: Statistic  # share of prompts in which it outranks the answer it was made from


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Everything that is measured of one reward. A figure that was not measured is None."""

    name: str
    description: str
    answers: int
    unscored: int
    reasons: Mapping[str, int]  # why answers have no score
    remarks: Mapping[str, int]  # notes on answers that have one
    pairs: PairFigures | None
    many: ManyFigures | None
    calibration: CalibrationFigures | None
    length: LengthFigures
    members: MemberFigures | None
    reliability: ReliabilityFigures | None
    curve: CurveFigures | None
    attacks: tuple[AttackFigures, ...]
    distances: Mapping[str, Statistic]
    # Why a figure was not measured, by its name.
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def make_report(
    scored: ScoredReward,
    questions: Sequence[RatedQuestion],
    rivals: Mapping[str, Sequence[Array]],
) -> RewardReport:
    """Return the report on one reward.

    Args:
        scored: its scores.
        questions: the answers with their ratings and pairs.
        rivals: other rewards, and "ratings" if there are some: per question, [N].
    """
    scores = scored.objective
    ratings = [question.ratings for question in questions]
    lengths = [question.lengths for question in questions]
    pairs = _pair_figures(scores, questions)
    many = _many_figures(scores, questions)
    curve = _curve_figures(scored, questions)
    distances: dict[str, Statistic] = {}
    for name, rows in rivals.items():
        if name != scored.name:
            distances[name] = mean_distance(scores, rows)
    return RewardReport(
        name=scored.name,
        description=scored.description,
        answers=scored.answers,
        unscored=scored.unscored,
        reasons=dict(scored.reasons.most_common()),
        remarks=dict(scored.remarks.most_common()),
        pairs=pairs,
        many=many,
        calibration=_calibration_figures(scores, questions) if pairs else None,
        length=LengthFigures(within_prompts(scores, lengths), within_prompts(ratings, lengths)),
        members=_member_figures(scored, questions),
        reliability=_reliability_figures(scores, questions),
        curve=curve,
        attacks=_attack_figures(scored.attacks),
        distances=distances,
        unmeasured=_unmeasured(questions, pairs, many, curve),
    )


def _differences(scores: Sequence[Array], questions: Sequence[RatedQuestion]) -> Array:
    """Return the score of the better answer minus that of the other for every pair, [P]."""
    parts = [np.empty(0)]
    for row, question in zip(scores, questions, strict=True):
        parts.append(row[question.pairs[:, 0]] - row[question.pairs[:, 1]])
    return np.concatenate(parts)


def _prompts(questions: Sequence[RatedQuestion]) -> NDArray[np.int64]:
    """Return the number of the prompt of every pair, [P]."""
    return np.repeat(np.arange(len(questions)), [len(question.pairs) for question in questions])


def _pair_figures(
    scores: Sequence[Array], questions: Sequence[RatedQuestion]
) -> PairFigures | None:
    differences = _differences(scores, questions)
    scored = np.isfinite(differences)
    if not scored.any():
        return None
    prompts = _prompts(questions)
    better_lengths: list[Array] = []
    worse_lengths: list[Array] = []
    for question in questions:
        better_lengths.append(question.lengths[question.pairs[:, 0]])
        worse_lengths.append(question.lengths[question.pairs[:, 1]])
    better = np.concatenate(better_lengths)
    worse = np.concatenate(worse_lengths)
    right = wins(differences)
    longer = np.where(scored, wins(better - worse), np.nan)
    baseline = longer if np.nanmean(longer) >= 0.5 else 1 - longer
    same = np.where(have_same_length(better, worse), right, np.nan)
    return PairFigures(
        accuracy=clustered_mean(right, prompts),
        same_length=clustered_mean(same, prompts),
        longer=clustered_mean(longer, prompts),
        over_length=clustered_mean(right - baseline, prompts),
        ties=float((differences[scored] == 0).mean()),
    )


def _many_figures(
    scores: Sequence[Array], questions: Sequence[RatedQuestion]
) -> ManyFigures | None:
    results = []
    for row, question in zip(scores, questions, strict=True):
        result = one_to_many(row, question.ratings)
        if result is not None:
            results.append(result)
    # Against a single wrong answer it is the pair accuracy again.
    if not results or max(result.wrong for result in results) < 2:
        return None
    return ManyFigures(
        all_over_all=mean_over_prompts([result.all_over_all for result in results]),
        one_over_many=mean_over_prompts([result.one_over_many for result in results]),
        chance=float(np.mean([result.chance for result in results])),
        reciprocal_rank=mean_over_prompts([result.reciprocal_rank for result in results]),
        wrong=float(np.mean([result.wrong for result in results])),
    )


def _calibration_figures(
    scores: Sequence[Array], questions: Sequence[RatedQuestion]
) -> CalibrationFigures:
    differences = _differences(scores, questions)
    scale = fit_scale(differences)
    fitted = calibration(differences, scale) if np.isfinite(scale) else None
    return CalibrationFigures(scale, calibration(differences), fitted)


def _member_figures(
    scored: ScoredReward, questions: Sequence[RatedQuestion]
) -> MemberFigures | None:
    if len(scored.members) < 2:
        return None
    prompts = _prompts(questions)
    accuracy: list[Statistic] = []
    for k in range(len(scored.members)):
        rows = [scores[k] for scores in scored.scores]
        accuracy.append(clustered_mean(wins(_differences(rows, questions)), prompts))
    ratings = [question.ratings for question in questions]
    return MemberFigures(
        scored.members,
        tuple(accuracy),
        member_correlations(scored.scores),
        error_correlations(scored.scores, ratings),
    )


def _reliability_figures(
    scores: Sequence[Array], questions: Sequence[RatedQuestion]
) -> ReliabilityFigures | None:
    rows: list[Array] = []
    gold: list[Array] = []
    for row, question in zip(scores, questions, strict=True):
        if len(question.answers) >= MIN_POOL and question.has_ratings:
            rows.append(row)
            gold.append(question.ratings)
    levels = reliability(rows, gold)
    return ReliabilityFigures(levels, r_squared(rows, gold)) if levels else None


def _curve_figures(scored: ScoredReward, questions: Sequence[RatedQuestion]) -> CurveFigures | None:
    gold = [question.ratings for question in questions]
    objective = scored.objective
    # All selectors are compared on the answers that all of them know.
    masked: list[Array] = []
    pool_sizes: list[int] = []
    for row, judged in zip(objective, gold, strict=True):
        comparable = np.where(np.isnan(row), np.nan, judged)
        masked.append(comparable)
        size = int((~np.isnan(comparable)).sum())
        if size >= MIN_POOL:
            pool_sizes.append(size)
    grid = sizes(pool_sizes)
    if not grid:
        return None
    curves = _selector_curves(scored, masked, grid)
    default = Ensemble().objective
    selector = default if default in curves else SCORE
    trusted = {name: trust(curve) for name, curve in curves.items()}
    curves[LONGEST] = gold_curve([question.lengths for question in questions], masked, grid)
    curves[GOLD] = gold_curve(masked, masked, grid)
    return CurveFigures(selector, curves, trusted)


def _selector_curves(
    scored: ScoredReward, gold: Sequence[Array], grid: Sequence[int]
) -> dict[str, GoldCurve]:
    """Return the curve of the only member, or of one member, mean, wco and uwo."""
    members = range(len(scored.members))
    singles: list[GoldCurve] = []
    for k in members:
        # A member that failed for an answer cannot choose it.
        rows = [np.where(np.isnan(scores[k]), -np.inf, scores[k]) for scores in scored.scores]
        singles.append(gold_curve(rows, gold, grid))
    if len(singles) == 1:
        return {SCORE: singles[0]}
    curves = {ONE_MEMBER: mean_curve(singles)}
    for objective in get_args(Objective):
        rows = [Ensemble(objective).reduce(scores) for scores in scored.scores]
        curves[objective] = gold_curve(rows, gold, grid)
    return curves


def _attack_figures(attacks: Sequence[Sequence[ScoredAttack]]) -> tuple[AttackFigures, ...]:
    by_name: dict[str, list[ScoredAttack]] = {}
    for of_question in attacks:
        for scored in of_question:
            by_name.setdefault(scored.attack.name, []).append(scored)
    figures: list[AttackFigures] = []
    for name, rows in by_name.items():
        beaten: list[float] = []
        chosen: list[float] = []
        over: list[Array] = []
        for row in rows:
            beaten.append(beaten_share(row.score, row.answers))
            chosen.append(is_chosen(row.score, row.answers))
            if row.attack.original is not None:
                over.append(wins(row.score - row.answers[row.attack.original]))
        means = mean_over_prompts(beaten), mean_over_prompts(chosen), mean_over_prompts(over)
        figures.append(AttackFigures(name, *means))
    return tuple(figures)


def _unmeasured(
    questions: Sequence[RatedQuestion],
    pairs: PairFigures | None,
    many: ManyFigures | None,
    curve: CurveFigures | None,
) -> dict[str, str]:
    """Return why figures are missing."""
    if pairs is None:
        has_pairs = any(len(question.pairs) for question in questions)
        reason = "no pair has two scores" if has_pairs else NO_RATINGS
        return dict.fromkeys(("pairs", "calibration", "many", "curve"), reason)
    reasons: dict[str, str] = {}
    largest = max(len(question.answers) for question in questions)
    if many is None:
        reasons["many"] = (
            "no prompt has a right answer and several wrong ones; give pools with --pools"
        )
    if curve is None:
        reasons["curve"] = (
            f"a prompt has at most {largest} rated answers, and a choice among n needs pools of "
            f"{MIN_POOL} or more; give pools with --pools"
        )
    return reasons
