"""Write the check of rewards as one HTML page that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from infer_align.diagnostics.attacks import DESCRIPTIONS
from infer_align.diagnostics.calibration import Calibration
from infer_align_bench.page import document, table
from infer_align_server.check_rewards import verdicts
from infer_align_server.check_rewards.meanings import INTRODUCTION, MEANINGS, TITLES
from infer_align_server.check_rewards.plots import (
    draw_attacks,
    draw_calibration,
    draw_curve,
    draw_reliability,
)
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
from infer_align_server.check_rewards.verdicts import Verdict, figure, percent, points

STYLE = """
td:not(.name) { white-space: nowrap }
.verdict { border-left: 5px solid #999; padding: .3em .8em; background: #f6f6f6 }
.verdict.good { border-color: #2a8a3e } .verdict.careful { border-color: #d99a00 }
.verdict.bad { border-color: #c22f2f }
h2 { margin-top: 2.2em; border-bottom: 2px solid #ddd } h3 { margin-bottom: .2em }
"""
LABELS = {"good": "Good", "careful": "Careful", "bad": "Bad", "unknown": "Not known"}
SUMMARY_COLUMNS = (
    "reward",
    "trust up to n =",
    "pairs right",
    "same length",
    "better than length by",
    "worst attack",
    "verdict",
)
TEXT_COLUMNS = {
    "reward",
    "worst attack",
    "verdict",
    "attack",
    "what it does",
    "selector",
    "member",
    "",
    "what",
    "why",
    "rule",
}


@dataclass(frozen=True, slots=True)
class CheckedRewards:
    """Everything that a page shows."""

    reports: Sequence[RewardReport]
    # How the check was made, and what was left out.
    facts: Mapping[str, str]
    problems: Sequence[str]
    omitted: Mapping[str, str]


def render_page(checked: CheckedRewards) -> str:
    """Return the HTML page of a check."""
    return document("How far can these rewards be trusted?", _sections(checked), STYLE)


def _sections(checked: CheckedRewards) -> Iterator[str]:
    yield "<h1>How far can these rewards be trusted?</h1>"
    yield f"<p>{INTRODUCTION}</p>"
    yield summary_table(checked.reports)
    for report in checked.reports:
        yield from _reward(report)
    if any(report.distances for report in checked.reports):
        yield "<h2>Distances between rewards</h2>"
        yield f"<p>{MEANINGS['distances']}</p>"
        yield _distance_table(checked.reports)
    yield "<h2>Not measured</h2>"
    yield _omissions(checked)
    yield "<h2>Made with</h2>"
    rows = [(escape(name), escape(value)) for name, value in checked.facts.items()]
    yield table(("what", ""), rows, TEXT_COLUMNS)


def summary_table(reports: Sequence[RewardReport]) -> str:
    """Return the table with one row per reward."""
    rows = []
    for report in reports:
        row = [escape(cell) for cell in summary_cells(report)]
        row[0] = f'<a href="#{row[0]}">{row[0]}</a>'
        rows.append(row)
    return table(SUMMARY_COLUMNS, rows, TEXT_COLUMNS)


def summary_cells(report: RewardReport) -> tuple[str, ...]:
    """Return the row of one reward as plain text."""
    n = "-"
    if report.curve is not None:
        result = report.curve.trust[report.curve.selector]
        n = f"{result.n}{' or more' if result.is_limited_by_data else ''}"
    pairs = report.pairs
    attack = _worst_attack(report.attacks)
    verdict = verdicts.judge_reward(report)
    return (
        report.name,
        n,
        percent(pairs.accuracy) if pairs else "-",
        percent(pairs.same_length) if pairs else "-",
        points(pairs.over_length) if pairs else "-",
        f"{attack.name}: outranks {100 * attack.beaten.value:.0f} %" if attack else "-",
        f"{LABELS[verdict.level]}. {verdict.text}",
    )


def _worst_attack(attacks: Sequence[AttackFigures]) -> AttackFigures | None:
    measured = [each for each in attacks if each.beaten.is_measured]
    return max(measured, key=lambda each: each.beaten.value) if measured else None


def _reward(report: RewardReport) -> Iterator[str]:
    yield f'<h2 id="{escape(report.name)}">{escape(report.name)}</h2>'
    yield f"<p>{escape(report.description)}</p>"
    yield _verdict(verdicts.judge_reward(report))
    if report.curve is not None:
        yield from _figure("curve", _curve(report.curve), verdicts.judge_curve(report.curve))
    if report.pairs is not None:
        yield from _figure("pairs", _pairs(report.pairs), verdicts.judge_pairs(report.pairs))
    if report.many is not None:
        yield from _figure("many", _many(report.many), verdicts.judge_many(report.many))
    if report.reliability is not None:
        verdict = verdicts.judge_reliability(report.reliability)
        yield from _figure("reliability", _reliability(report.reliability), verdict)
    if report.attacks:
        verdict = verdicts.judge_attacks(report.attacks)
        yield from _figure("attacks", _attacks(report.attacks), verdict)
    if report.calibration is not None:
        verdict = verdicts.judge_calibration(report.calibration)
        yield from _figure("calibration", _calibration(report.calibration), verdict)
    yield from _figure("length", _length(report.length), verdicts.judge_length(report.length))
    if report.members is not None:
        verdict = verdicts.judge_members(report.members)
        yield from _figure("members", _members(report.members), verdict)


def _figure(name: str, content: str, verdict: Verdict) -> Iterator[str]:
    yield f"<h3>{TITLES[name]}</h3><p>{MEANINGS[name]}</p>"
    yield f"<figure>{content}</figure>"
    yield _verdict(verdict)


def _verdict(verdict: Verdict) -> str:
    label = LABELS[verdict.level]
    return f'<p class="verdict {verdict.level}"><b>{label}.</b> {escape(verdict.text)}</p>'


def _curve(figures: CurveFigures) -> str:
    columns = ("selector", "trust up to n =", "gold peaks at n =", "gain", "fall until the end")
    rows = []
    for name, result in figures.trust.items():
        largest = f"{result.n}{' or more' if result.is_limited_by_data else ''}"
        gain, fall = figure(result.gain, "+"), figure(result.fall, "+")
        rows.append((name, largest, str(result.peak), gain, fall))
    curve = figures.curves[figures.selector]
    note = f"{len(curve.gold)} prompts with at least {curve.n[-1]} answers each."
    return f"{draw_curve(figures)}{table(columns, rows, TEXT_COLUMNS)}<p class=note>{note}</p>"


def _pairs(pairs: PairFigures) -> str:
    columns = ("rule", "right", "pairs", "prompts")
    rows = []
    statistics = {
        "this reward": pairs.accuracy,
        "this reward, same length": pairs.same_length,
        "the longer answer wins": pairs.longer,
    }
    for name, statistic in statistics.items():
        rows.append((name, percent(statistic), str(statistic.count), str(statistic.prompts)))
    note = f"{100 * pairs.ties:.1f} % of pairs have equal scores; each counts as half."
    return f"{table(columns, rows, TEXT_COLUMNS)}<p class=note>{note}</p>"


def _many(many: ManyFigures) -> str:
    chance = f"{100 * many.chance:.0f} %"
    rows = [
        (
            "a right answer outranks 9 random wrong ones, or all",
            percent(many.one_over_many),
            chance,
        ),
        ("every right answer outranks every wrong one", percent(many.all_over_all), ""),
        ("mean reciprocal rank of a right answer", figure(many.reciprocal_rank), ""),
    ]
    return table(("what", "share", "chance"), rows, TEXT_COLUMNS)


def _reliability(figures: ReliabilityFigures) -> str:
    columns = ("score, s.d.", "gold above its prompt", "R²", "R² of noise", "answers")
    rows = []
    for level in figures.levels:
        rows.append(
            (
                f"{level.low:+.2f} to {level.high:+.2f}",
                figure(level.gold, "+"),
                "-" if math.isnan(level.r_squared) else f"{level.r_squared:.3f}",
                f"{level.noise:.3f}",
                str(level.answers),
            )
        )
    note = f"R² over all levels: {figures.r_squared:.3f}."
    return f"{draw_reliability(figures)}{table(columns, rows)}<p class=note>{note}</p>"


def _attacks(attacks: tuple[AttackFigures, ...]) -> str:
    columns = (
        "attack",
        "what it does",
        "outranks",
        "wins against all",
        "outranks its original",
        "verdict",
    )
    rows = []
    for each in attacks:
        rows.append(
            (
                escape(each.name),
                DESCRIPTIONS.get(each.name, "The answers of this model in the file."),
                percent(each.beaten),
                percent(each.chosen),
                percent(each.over_original),
                verdicts.judge_attack(each).text,
            )
        )
    return f"{draw_attacks(attacks)}{table(columns, rows, TEXT_COLUMNS)}"


def _calibration(figures: CalibrationFigures) -> str:
    parts = [draw_calibration(figures), _bins("As it is", figures.plain)]
    if figures.fitted is not None:
        parts.append(_bins(f"Scores multiplied by {figures.scale:.3g}", figures.fitted))
    return "".join(parts)


def _bins(title: str, report: Calibration) -> str:
    rows = []
    for entry in report.bins:
        rows.append(
            (
                f"{100 * entry.low:.0f} to {100 * entry.high:.0f} %",
                f"{100 * entry.predicted:.1f} %",
                f"{100 * entry.right:.1f} %",
                str(entry.pairs),
            )
        )
    note = f"{title}; mean error {100 * report.expected_error:.1f} points."
    return f"<p class=note>{note}</p>{table(('bin', 'predicted', 'right', 'pairs'), rows)}"


def _length(figures: LengthFigures) -> str:
    rows = [
        ("this reward", figure(figures.score, "+"), str(figures.score.prompts)),
        ("the ratings", figure(figures.ratings, "+"), str(figures.ratings.prompts)),
    ]
    return table(("what", "correlation with the length", "prompts"), rows, TEXT_COLUMNS)


def _members(figures: MemberFigures) -> str:
    correlations = figures.scores if math.isnan(figures.mean_correlation) else figures.errors
    rows = []
    for i, name in enumerate(figures.names):
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in correlations[i]]
        rows.append((escape(name), percent(figures.accuracy[i]), *cells))
    names = [escape(name) for name in figures.names]
    return table(("member", "pairs right", *names), rows, TEXT_COLUMNS)


def _distance_table(reports: Sequence[RewardReport]) -> str:
    names: dict[str, None] = {}
    for report in reports:
        names |= dict.fromkeys(report.distances)
    rows = []
    for report in reports:
        cells: list[str] = []
        for name in names:
            distance = report.distances.get(name)
            cells.append("" if distance is None else figure(distance))
        rows.append((escape(report.name), *cells))
    return table(("reward", *(escape(name) for name in names)), rows, TEXT_COLUMNS)


def _omissions(checked: CheckedRewards) -> str:
    rows: list[tuple[str, str]] = []
    for problem in checked.problems:
        line, _, reason = problem.partition(": ")
        rows.append((line, reason) if reason else ("file", problem))
    for report in checked.reports:
        for reason, count in report.reasons.items():
            rows.append((f"{report.name}: {count} answers not scored", reason))
        for remark, count in report.remarks.items():
            rows.append((f"{report.name}: a note on {count} scored answers", remark))
        for name, reason in report.unmeasured.items():
            rows.append((f"{report.name}: {TITLES[name]}", reason))
    rows += checked.omitted.items()
    if not rows:
        return "<p>Everything was measured.</p>"
    cells = [(escape(what), escape(why)) for what, why in rows]
    return table(("what", "why"), cells, TEXT_COLUMNS)
