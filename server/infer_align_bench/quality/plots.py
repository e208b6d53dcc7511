"""The curves of a report, as SVG that stands in the page itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from infer_align_bench.quality.curve import Cost, Mean, Point

Read = Callable[[Point], Mean | None]


def numbered(found: Sequence[Point]) -> Iterator[tuple[int, Point]]:
    """Each setting with the number under which it stands in table and plots."""
    return enumerate(found, start=1)


def plots(found: Sequence[Point]) -> str:
    """Gold against tokens, seconds and the KL bound, as SVG; every point bears its setting's number."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels: list[tuple[str, Read, Cost | None]] = [
        ("tokens per answer, everything counted", lambda point: point.tokens, "tokens"),
        ("seconds per answer", lambda point: point.seconds, "seconds"),
        (
            "KL from the frozen model at most, nats",
            lambda p: None if p.kl_bound is None else Mean(p.kl_bound, 0.0),
            None,
        ),
    ]
    for i, (axes, (label, read, cost)) in enumerate(
        zip(figure.subplots(1, 3, sharey=True), panels, strict=True)
    ):
        _panel(
            axes,
            [
                (number, value, point)
                for number, point in numbered(found)
                if (value := read(point)) is not None
            ],
            cost,
        )
        axes.set_xlabel(label)
        if cost and any((value := read(point)) is not None and value.value > 0 for point in found):
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


def _panel(axes: Any, shown: Sequence[tuple[int, Mean, Point]], cost: Cost | None) -> None:
    """Every setting with its errors and number; the front of this panel's own cost, and the equal-budget family, as lines."""
    for number, mean, point in shown:
        colour = "C0" if cost in point.fronts else "C1" if point.cell.equal_budget else "0.6"
        across = mean.error if mean.error > 0 else None  # NaN is not
        axes.errorbar(
            mean.value,
            point.gold.value,
            point.gold.error,
            across,
            fmt="o",
            markersize=4,
            color=colour,
            elinewidth=0.8,
        )
        axes.annotate(
            str(number),
            (mean.value, point.gold.value),
            fontsize=7,
            xytext=(3, 3),
            textcoords="offset points",
        )
    lines = [("equal-budget family", "C1", [one for one in shown if one[2].cell.equal_budget])]
    if cost:
        lines.append(
            ("nothing cheaper is better", "C0", [one for one in shown if cost in one[2].fronts])
        )
    for label, colour, chosen in lines:
        line = sorted((mean.value, point.gold.value) for _, mean, point in chosen)
        if line:
            axes.plot(
                [x for x, _ in line], [y for _, y in line], color=colour, linewidth=0.8, label=label
            )
