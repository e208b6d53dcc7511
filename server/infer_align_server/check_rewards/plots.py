"""Plots of a check of rewards as SVG, which the page includes directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from infer_align.diagnostics.statistics import Statistic
from infer_align.types import Array
from infer_align_bench.page import plot_axes, svg
from infer_align_server.check_rewards.report import (
    GOLD,
    LONGEST,
    AttackFigures,
    CalibrationFigures,
    CurveFigures,
    ReliabilityFigures,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Line style of the baselines of a curve.
BASELINES = {LONGEST: ":", GOLD: "--"}


def draw_curve(figures: CurveFigures) -> str:
    """Return the gold of the best of n over the bound of KL, with n along the top."""
    figure, axes = plot_axes(7.5, 4.2)
    for index, (name, curve) in enumerate(figures.curves.items()):
        means, errors = _values_and_errors(curve.means)
        colour = "0.55" if name in BASELINES else f"C{index}"
        width = 2.2 if name == figures.selector else 1.2
        style = BASELINES.get(name, "-")
        axes.plot(curve.kl, means, style, color=colour, label=name, linewidth=width)
        if name == figures.selector:
            low, high = means - errors, means + errors
            axes.fill_between(curve.kl, low, high, color=colour, alpha=0.2, linewidth=0)
    _mark_trust(axes, figures)
    axes.set(xlabel="upper bound of KL from the model, nats", ylabel="mean gold of the best of n")
    axes.legend(fontsize=8)
    _label_sizes(axes, figures)
    return svg(figure)


def _values_and_errors(statistics: Sequence[Statistic]) -> tuple[Array, Array]:
    """Return the values and the standard errors of statistics."""
    values: list[float] = []
    errors: list[float] = []
    for each in statistics:
        values.append(each.value)
        errors.append(each.error)
    return np.array(values), np.array(errors)


def _mark_trust(axes: Axes, figures: CurveFigures) -> None:
    """Draw a line at the n up to which the reward can be trusted."""
    curve = figures.curves[figures.selector]
    n = figures.trust[figures.selector].n
    position = curve.kl[curve.n.index(n)]
    axes.axvline(position, color="0.3", linewidth=0.8)
    label = f" trust up to n = {n}" if n > 1 else " trust at no n"
    # The last size is at the right edge, so its label stands before the line.
    side = "right" if n == curve.n[-1] else "left"
    low, high = axes.get_ylim()
    axes.text(position, low + 0.03 * (high - low), label + " ", fontsize=8, ha=side)


def _label_sizes(axes: Axes, figures: CurveFigures) -> None:
    """Write the sizes n along the top, where they have room."""
    curve = figures.curves[figures.selector]
    top = axes.secondary_xaxis("top")
    ticks: list[float] = []
    labels: list[str] = []
    for n, position in zip(curve.n, curve.kl, strict=True):
        if not ticks or position - ticks[-1] > curve.kl[-1] / 18:
            ticks.append(position)
            labels.append(str(n))
    top.set_xticks(ticks, labels)
    top.set_xlabel("n")


def draw_calibration(figures: CalibrationFigures) -> str:
    """Return the predicted probability of the favourite against the share that was right."""
    figure, axes = plot_axes(4.6, 4.2)
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8, label="perfect")
    rows = {"as it is": figures.plain}
    if figures.fitted is not None:
        rows[f"scores x {figures.scale:.3g}"] = figures.fitted
    for name, report in rows.items():
        predicted: list[float] = []
        right: list[float] = []
        for entry in report.bins:
            predicted.append(entry.predicted)
            right.append(entry.right)
        axes.plot(predicted, right, "o-", label=name, markersize=4, linewidth=1)
    axes.set(xlabel="predicted probability that the favourite is better", ylabel="share right")
    axes.set_xlim(0.49, 1.01)
    axes.legend(fontsize=8)
    return svg(figure)


def draw_reliability(figures: ReliabilityFigures) -> str:
    """Return the gold and the R² of each level of the score."""
    figure, golds_axes = plot_axes(7.5, 3.2)
    shares_axes = golds_axes.twinx()
    names: list[str] = []
    shares: list[float] = []
    for level in figures.levels:
        names.append(f"{level.low:+.1f} to {level.high:+.1f}")
        shares.append(level.r_squared)
    places = range(len(names))
    golds, errors = _values_and_errors([level.gold for level in figures.levels])
    golds_axes.errorbar(places, golds, 2 * errors, fmt="o-", color="C0", markersize=4)
    shares_axes.bar(places, shares, width=0.4, color="C1", alpha=0.3)
    golds_axes.set_xticks(list(places), names)
    golds_axes.set_xlabel("score, in standard deviations of its prompt")
    golds_axes.set_ylabel("gold above its prompt's mean, ± 2 s.e.", color="C0")
    shares_axes.set_ylabel("R² within the level", color="C1")
    shares_axes.set_ylim(0, max(0.05, *shares) * 1.2)
    return svg(figure)


def draw_attacks(attacks: tuple[AttackFigures, ...]) -> str:
    """Return the share of real answers that each attack outranks, as bars."""
    figure, axes = plot_axes(7.5, 0.8 + 0.36 * len(attacks))
    names: list[str] = []
    beaten: list[float] = []
    chosen: list[float] = []
    # Bars are drawn from the bottom up.
    for each in reversed(attacks):
        names.append(each.name)
        beaten.append(each.beaten.value)
        chosen.append(each.chosen.value)
    axes.barh(names, beaten, height=0.6, color="C0", alpha=0.5, label="real answers it outranks")
    axes.plot(chosen, range(len(names)), "D", color="C3", label="prompts it would win")
    axes.axvline(0.5, color="0.5", linewidth=0.8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("share")
    axes.legend(fontsize=8)
    return svg(figure)
