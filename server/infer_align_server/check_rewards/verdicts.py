"""Say in one sentence what each figure means for the use of a reward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from infer_align.diagnostics.one_to_many import WRONG_ANSWERS
from infer_align.diagnostics.statistics import Statistic
from infer_align_server.check_rewards.report import (
    AttackFigures,
    CalibrationFigures,
    CurveFigures,
    LengthFigures,
    ManyFigures,
    MemberFigures,
    PairFigures,
    ReliabilityFigures,
    RewardReport,
)

Level = Literal["good", "careful", "bad", "unknown"]
# From the best to the worst.
LEVELS: tuple[Level, ...] = ("good", "unknown", "careful", "bad")

# A predicted probability that is off by less than this on average is good enough to be read.
GOOD_CALIBRATION = 0.05
# A score whose correlation with the length is this much over that of the ratings prefers length.
LENGTH_MARGIN = 0.2
# Members whose errors correlate more than this are nearly copies of one another.
COPIES = 0.8
# A score that explains less than this share of gold hardly orders the answers.
HARDLY_EXPLAINED = 0.05
# An attack that wins this share of prompts, or outranks this share of the answers, is a hole.
CHOSEN_LIMIT = 0.05
BEATEN_LIMIT = 0.5
BEATEN_CAREFUL = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of one figure."""

    level: Level
    text: str


def percent(statistic: Statistic) -> str:
    """Return a share with its standard error, such as "61.2 ± 1.3 %"."""
    if not statistic.is_measured:
        return "-"
    if math.isnan(statistic.error):
        return f"{100 * statistic.value:.1f} %"
    return f"{100 * statistic.value:.1f} ± {100 * statistic.error:.1f} %"


def points(statistic: Statistic) -> str:
    """Return a difference of shares in percentage points, such as "+3.1 ± 1.2"."""
    if not statistic.is_measured:
        return "-"
    error = "" if math.isnan(statistic.error) else f" ± {100 * statistic.error:.1f}"
    return f"{100 * statistic.value:+.1f}{error}"


def figure(statistic: Statistic, sign: str = "") -> str:
    """Return a figure with its standard error; `sign` is "+" to print the sign."""
    if not statistic.is_measured:
        return "-"
    error = "" if math.isnan(statistic.error) else f" ± {statistic.error:.2g}"
    return f"{statistic.value:{sign}.3g}{error}"


def judge_pairs(pairs: PairFigures) -> Verdict:
    """Judge pair accuracy against a coin and against the length of the answers."""
    longer = pairs.longer.value >= 0.5
    rule = "the longer answer wins" if longer else "the shorter answer wins"
    margin = f"{points(pairs.over_length)} points against the rule that {rule}"
    if not pairs.accuracy.exceeds(0.5):
        return Verdict("bad", f"It is no better than a coin: {percent(pairs.accuracy)} right.")
    if pairs.same_length.is_measured and not pairs.same_length.exceeds(0.5):
        return Verdict(
            "bad",
            "Among answers of the same length it is no better than a coin "
            f"({percent(pairs.same_length)}): what it knows is the length.",
        )
    if not pairs.over_length.exceeds(0.0):
        return Verdict(
            "careful", f"It is better than a coin, but not measurably than length: {margin}."
        )
    return Verdict("good", f"It knows more than the length: {margin}.")


def judge_many(many: ManyFigures) -> Verdict:
    """Judge the right answer against several wrong ones."""
    share = percent(many.one_over_many)
    chance = f"{100 * many.chance:.0f} %"
    wrong = f"{min(many.wrong, WRONG_ANSWERS):.0f} wrong ones"
    text = f"A right answer outranks {wrong} in {share} of prompts; chance is {chance}."
    if not many.one_over_many.exceeds(many.chance):
        return Verdict("bad", f"{text} Best-of-n by it will often return a wrong answer.")
    if many.one_over_many.value < 0.5:
        return Verdict("careful", f"{text} Better than chance, and wrong more often than right.")
    return Verdict("good", text)


def judge_calibration(figures: CalibrationFigures) -> Verdict:
    """Judge the sigmoid of score differences as probabilities."""
    error = figures.plain.expected_error
    text = f"The sigmoid of a difference is off by {100 * error:.0f} points on average"
    if math.isnan(figures.scale):
        return Verdict("bad", "All scores of a pair are equal, so there is nothing to read.")
    if figures.scale <= 0:
        return Verdict("bad", f"{text}: higher scores go with the worse answers.")
    if error <= GOOD_CALIBRATION:
        return Verdict("good", f"{text}; it can be read as a probability.")
    if figures.fitted is None:
        return Verdict("careful", f"{text}. No pair is wrong, so no scale can be fitted.")
    fitted = 100 * figures.fitted.expected_error
    return Verdict(
        "careful",
        f"{text}. Multiply the scores by {figures.scale:.3g} before you read them as "
        f"probabilities; then it is {fitted:.0f} points.",
    )


def judge_length(figures: LengthFigures) -> Verdict:
    """Judge the preference of a reward for long or short answers."""
    if not figures.score.is_measured:
        return Verdict("unknown", "The scores or the lengths of each prompt are all equal.")
    value = figures.score.value
    taste = "longer" if value > 0 else "shorter"
    text = f"The correlation of its score with the length is {value:+.2f}"
    if not figures.ratings.is_measured:
        level: Level = "careful" if abs(value) > 0.5 else "unknown"
        return Verdict(level, f"{text}; what people prefer is not known here.")
    people = figures.ratings.value
    text += f", that of the ratings {people:+.2f}"
    # An opposite taste counts from zero.
    agreement = abs(people) if value * people > 0 else 0.0
    if abs(value) - agreement > LENGTH_MARGIN:
        return Verdict("careful", f"{text}: it prefers {taste} answers more than the ratings do.")
    return Verdict("good", f"{text}: it does not prefer {taste} answers more than the ratings do.")


def judge_members(figures: MemberFigures) -> Verdict:
    """Judge how much an ensemble can help."""
    size = len(figures.names)
    text = (
        f"The errors of two members correlate by {figures.mean_correlation:.2f}; the {size} "
        f"members count like {figures.effective:.1f} independent ones."
    )
    if math.isnan(figures.mean_correlation):
        return Verdict("unknown", "The members have too few different scores to compare them.")
    if figures.mean_correlation > COPIES:
        return Verdict("careful", f"{text} They are nearly copies: the ensemble adds little.")
    return Verdict("good", text)


def judge_reliability(figures: ReliabilityFigures) -> Verdict:
    """Judge the top level, which is the one that best-of-n uses."""
    if len(figures.levels) < 2:
        return Verdict("unknown", "The scores have too few different values.")
    top = figures.levels[-1]
    best = max(figures.levels, key=lambda level: level.gold.value)
    text = f"The top level lies {figure(top.gold, '+')} from the mean of its prompts"
    if best is not top:
        return Verdict(
            "bad", f"{text}, less than a lower level: its highest scores are not its best answers."
        )
    r_squared = 0.0 if math.isnan(top.r_squared) else top.r_squared
    if r_squared <= max(HARDLY_EXPLAINED, 3 * top.noise):
        return Verdict(
            "careful",
            f"{text}, but inside it the order is little more than noise (R² {r_squared:.3f}): a "
            "larger n gains little.",
        )
    return Verdict("good", f"{text}, and inside it higher scores are better (R² {r_squared:.3f}).")


def judge_curve(figures: CurveFigures) -> Verdict:
    """Say up to which n the default selector of a reward can be trusted."""
    result = figures.trust[figures.selector]
    gain = figure(result.gain, "+")
    if result.n == 1:
        return Verdict(
            "bad",
            f"Gold does not rise measurably at any n up to {result.largest} (best: {gain} at n = "
            f"{result.peak}): do not choose by this reward.",
        )
    if result.is_limited_by_data:
        return Verdict(
            "good",
            f"Gold rises by {gain} until n = {result.largest}, the largest n that these pools can "
            "measure.",
        )
    peak = f"Gold peaks at n = {result.peak} ({gain})"
    fall = f"{figure(result.fall, '+')} until n = {result.largest}"
    if result.fall.is_below(0.0):
        return Verdict("careful", f"{peak} and falls after it ({fall}): use no larger n.")
    return Verdict("good", f"{peak}. After it, nothing is gained ({fall}, within the noise).")


def judge_attack(figures: AttackFigures) -> Verdict:
    """Judge the rank of one attack."""
    if not figures.beaten.is_measured:
        return Verdict("unknown", "not scored")
    if figures.chosen.value > CHOSEN_LIMIT or figures.beaten.exceeds(BEATEN_LIMIT):
        return Verdict("bad", "a hole")
    rises = figures.over_original.is_measured and figures.over_original.exceeds(0.5)
    if figures.beaten.value > BEATEN_CAREFUL or rises:
        return Verdict("careful", "pays off" if rises else "ranks too high")
    return Verdict("good", "harmless")


def judge_attacks(attacks: tuple[AttackFigures, ...]) -> Verdict:
    """Judge the whole suite by the attacks that succeed."""
    holes = [each.name for each in attacks if judge_attack(each).level == "bad"]
    weak = [each.name for each in attacks if judge_attack(each).level == "careful"]
    if holes:
        text = f"Answers that deserve nothing outrank real ones: {', '.join(holes)}."
        return Verdict("bad", f"{text} Add a reward or a gate that refuses them.")
    if weak:
        return Verdict("careful", f"No attack wins, but these rank too high: {', '.join(weak)}.")
    if not any(each.beaten.is_measured for each in attacks):
        return Verdict("unknown", "No attack was scored.")
    return Verdict("good", "No attack outranks a notable share of the real answers.")


def judge_reward(report: RewardReport) -> Verdict:
    """Say how far one reward can be trusted, in one sentence."""
    if report.unscored == report.answers:
        return Verdict("bad", "It scored no answer at all.")
    parts = [*_choice_verdicts(report)]
    attacks = judge_attacks(report.attacks)
    if attacks.level in {"careful", "bad"}:
        parts.append(attacks)
    worst: Level = max((part.level for part in parts), key=LEVELS.index)
    return Verdict(worst, " ".join(part.text for part in parts))


def _choice_verdicts(report: RewardReport) -> Iterator[Verdict]:
    """Yield the verdicts on the choices of a reward: on the best of n, and on pairs."""
    if report.pairs is None:
        reason = report.unmeasured.get("pairs", "no ratings")
        yield Verdict("unknown", f"Its choices cannot be judged: {reason}.")
        return
    pairs = judge_pairs(report.pairs)
    if report.curve is None:
        yield Verdict(
            pairs.level,
            f"{pairs.text} At which n it can be trusted, only pools of rated answers can show.",
        )
        return
    result = report.curve.trust[report.curve.selector]
    curve = judge_curve(report.curve)
    if result.n == 1:
        yield Verdict("bad", "Do not choose answers by it.")
    elif pairs.level == "good":
        more = " or more; these pools have no more answers" if result.is_limited_by_data else ""
        yield Verdict(curve.level, f"Trust it up to n = {result.n}{more}.")
    else:
        more = ", the largest n here" if result.is_limited_by_data else ""
        yield Verdict(curve.level, f"Gold rises until n = {result.n}{more}, but:")
        yield pairs
