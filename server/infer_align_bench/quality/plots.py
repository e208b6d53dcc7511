"""The curves of a report, as SVG that stands in the page itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from infer_align_bench.quality.curve import Point


def plots(found: Sequence[Point]) -> str:
    """Gold against tokens, seconds and the KL bound, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels: list[tuple[str, Callable[[Point], float | None]]] = [
        ("tokens spent per answer", lambda point: point.tokens),
        ("seconds per answer", lambda point: point.seconds),
        ("KL from the frozen model at most, nats", lambda point: point.cell.kl_bound),
    ]
    for i, (axes, (label, read)) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels, strict=True)):
        shown = [(value, point) for point in found if (value := read(point)) is not None]
        _panel(axes, shown, front=i == 0)
        axes.set_xlabel(label)
        if i < 2:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        if i == 0:
            axes.set_ylabel("gold, ± standard error")
            axes.legend(fontsize=7) if axes.get_legend_handles_labels()[0] else None
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "infer-align"}):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _panel(axes: Any, shown: Sequence[tuple[float, Point]], *, front: bool) -> None:
    """Every setting with its error; those on the front of tokens by name, the equal-budget family as a line."""
    for value, point in shown:
        colour = "C0" if point.front else "C1" if point.cell.equal_budget else "0.6"
        axes.errorbar(value, point.gold.value, point.gold.error, fmt="o", markersize=4, color=colour, elinewidth=0.8)
        if point.front:
            axes.annotate(point.cell.name, (value, point.gold.value), fontsize=6, xytext=(4, 4), textcoords="offset points")
    lines = [("equal-budget family", "C1", [pair for pair in shown if pair[1].cell.equal_budget])]
    if front:
        lines.append(("nothing cheaper is better", "C0", [pair for pair in shown if pair[1].front]))
    for label, colour, chosen in lines:
        line = sorted((value, point.gold.value) for value, point in chosen)
        if line:
            axes.plot([x for x, _ in line], [y for _, y in line], color=colour, linewidth=0.8, label=label)
