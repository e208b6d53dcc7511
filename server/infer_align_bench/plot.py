"""Plot a run into a PNG file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infer_align.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TITLE = 160
# Line style and label of each latency.
CURVES = {"ended": ("-", "end to end"), "first": ("--", "first token")}


def require_matplotlib(flag: str) -> None:
    """Check before the measurement that matplotlib is installed.

    Raises:
        ConfigError: it is not installed; the message names `flag`, which needs it.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            f"{flag}: matplotlib is not installed; "
            "install it with: pip install 'infer-align[bench]'."
        ) from None


def check_format(path: Path, flag: str) -> None:
    """Check before the measurement that matplotlib can write a file with this suffix.

    Raises:
        ConfigError: it cannot; the message names `flag`, which needs it.
    """
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    suffix = path.suffix.removeprefix(".")
    if suffix and suffix.lower() not in formats:
        raise ConfigError(
            f"{flag}: {str(path)!r} is not allowed; the name must end with .png, or with one of "
            f"{', '.join(sorted(formats))}."
        )


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the distribution of latencies, and the latency of each request over the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    distribution_axes, request_axes = figure.subplots(1, 2)
    for i, name in enumerate(report["targets"]):
        samples = []
        for sample in report["samples"]:
            if sample["target"] == name and "error" not in sample:
                samples.append(sample)
        _draw_distribution(distribution_axes, samples, f"C{i}", name)
        _draw_requests(request_axes, samples, f"C{i}", name)
    distribution_axes.set(
        xlabel="milliseconds", ylabel="share of answered requests", ylim=(0, 1.02)
    )
    request_axes.set(
        xlabel="seconds since the start", ylabel="end to end, milliseconds", ylim=(0, None)
    )
    distribution_axes.legend(fontsize=8)
    request_axes.legend(fontsize=8)
    titles = [_load_title(report)]
    for name, target in report["targets"].items():
        titles.append(_target_title(name, target))
    figure.suptitle("\n".join(titles), fontsize=8)
    figure.savefig(path, dpi=110)


def _target_title(name: str, target: Mapping[str, Any]) -> str:
    """Describe a target in one line."""
    title = f"{name}: {target['base_url']}, {target['model']}"
    if target["align"]:
        title += f", align {target['align']}"
    if target["requests"]["failed"]:
        title += f", {target['requests']['failed']} failed"
    # matplotlib reads an unescaped dollar sign as the begin of a formula.
    return title[:MAX_TITLE].replace("$", "\\$")


def _load_title(report: Mapping[str, Any]) -> str:
    load = report["load"]
    if load["loop"] == "open":
        return f"{load['rate']:g} requests / s, open loop"
    return f"{load['concurrency']} requests in flight, closed loop"


def _draw_distribution(
    axes: Axes, samples: Sequence[Mapping[str, Any]], colour: str, name: str
) -> None:
    """Draw the share of requests that are answered within a time."""
    for key, (style, label) in CURVES.items():
        latencies = []
        for sample in samples:
            if sample[key] is not None:
                latencies.append((sample[key] - sample["intended"]) * 1e3)
        latencies.sort()
        shares = [(i + 1) / len(latencies) for i in range(len(latencies))]
        axes.plot(
            latencies,
            shares,
            style,
            color=colour,
            label=f"{name}: {label}",
            drawstyle="steps-post",
        )


def _draw_requests(
    axes: Axes, samples: Sequence[Mapping[str, Any]], colour: str, name: str
) -> None:
    """Draw the latency of each request at its due time."""
    due = [sample["intended"] for sample in samples]
    latencies = [(sample["ended"] - sample["intended"]) * 1e3 for sample in samples]
    axes.plot(due, latencies, ".", color=colour, label=name)
