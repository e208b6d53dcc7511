"""Plots of a quality report as SVG, which the page includes directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infer_align_bench.page import svg
from infer_align_bench.quality.curve import Cost, Mean, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot of gold against a cost."""

    label: str
    read: Callable[[Point], Mean | None]
    # The cost whose front is drawn, on a logarithmic axis.
    cost: Cost | None


def _kl(point: Point) -> Mean | None:
    """Return the bound of best-of-n, or the estimate of a steered setting."""
    return point.kl if point.kl_bound is None else Mean(point.kl_bound, 0.0)


PANELS = (
    Panel("tokens per answer, everything counted", lambda point: point.tokens, "tokens"),
    Panel("seconds per answer", lambda point: point.seconds, "seconds"),
    Panel("KL from the frozen model, nats; a bound for best-of-n", _kl, None),
)


@dataclass(frozen=True, slots=True)
class Marker:
    """One setting in a plot."""

    number: int
    x: Mean
    point: Point


def numbered(points: Sequence[Point]) -> Iterator[tuple[int, Point]]:
    """Yield each setting with its number in the table and in the plots."""
    return enumerate(points, start=1)


def draw_plots(points: Sequence[Point]) -> str:
    """Return the SVG of gold against tokens, seconds and the KL.

    Every marker has the number of its setting.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, panel in zip(panels, PANELS, strict=True):
        _draw_panel(axes, panel, points)
    first = panels[0]
    first.set_ylabel("gold, ± standard error")
    handles, _ = first.get_legend_handles_labels()
    if handles:
        first.legend(fontsize=7)
    return svg(figure)


def _draw_panel(axes: Axes, panel: Panel, points: Sequence[Point]) -> None:
    """Draw every setting with its errors and number, and lines through the front and the family."""
    markers = []
    for number, point in numbered(points):
        x = panel.read(point)
        if x is not None:
            markers.append(Marker(number, x, point))
    for marker in markers:
        _draw_marker(axes, marker, panel.cost)
    family = [marker for marker in markers if marker.point.cell.equal_budget]
    _draw_line(axes, family, "equal-budget family", "C1")
    if panel.cost:
        front = [marker for marker in markers if panel.cost in marker.point.fronts]
        _draw_line(axes, front, "nothing cheaper is better", "C0")
    axes.set_xlabel(panel.label)
    if panel.cost and any(marker.x.value > 0 for marker in markers):
        _use_log_scale(axes)


def _draw_marker(axes: Axes, marker: Marker, cost: Cost | None) -> None:
    colour = "0.6"
    if cost in marker.point.fronts:
        colour = "C0"
    elif marker.point.cell.equal_budget:
        colour = "C1"
    # A comparison with NaN is false: then there is no error bar.
    x_error = marker.x.error if marker.x.error > 0 else None
    gold = marker.point.gold
    axes.errorbar(
        marker.x.value,
        gold.value,
        gold.error,
        x_error,
        fmt="o",
        markersize=4,
        color=colour,
        elinewidth=0.8,
    )
    axes.annotate(
        str(marker.number),
        (marker.x.value, gold.value),
        fontsize=7,
        xytext=(3, 3),
        textcoords="offset points",
    )


def _draw_line(axes: Axes, markers: Sequence[Marker], label: str, colour: str) -> None:
    """Connect the markers from left to right."""
    if not markers:
        return
    line = sorted((marker.x.value, marker.point.gold.value) for marker in markers)
    x, y = zip(*line, strict=True)
    axes.plot(x, y, color=colour, linewidth=0.8, label=label)


def _use_log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
