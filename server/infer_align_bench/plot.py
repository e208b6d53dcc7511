"""A run as a picture."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError


def need_matplotlib(flag: str) -> None:
    """Before the load, not after it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            f"{flag}: matplotlib is not installed; install it with: pip install 'infer-align[bench]'."
        ) from None


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Two panels: the share of requests answered within a time, and each request over the run. The title says who A and B are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(report["targets"]):
        samples = [s for s in report["samples"] if s["target"] == name and "error" not in s]
        for key, style in (("ended", "-"), ("first", "--")):
            values = sorted((s[key] - s["intended"]) * 1e3 for s in samples if s[key] is not None)
            shares = [(j + 1) / len(values) for j in range(len(values))]
            label = f"{name}: {'end to end' if key == 'ended' else 'first token'}"
            left.plot(values, shares, style, color=f"C{i}", label=label, drawstyle="steps-post")
        _scatter(right, samples, f"C{i}", name)
    left.set(xlabel="milliseconds", ylabel="share of answered requests", ylim=(0, 1.02))
    right.set(xlabel="seconds since the start", ylabel="end to end, milliseconds", ylim=(0, None))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.suptitle(
        "\n".join(
            [_load(report), *(named(name, target) for name, target in report["targets"].items())]
        ),
        fontsize=8,
    )
    figure.savefig(path, dpi=110)


def named(name: str, target: Mapping[str, Any]) -> str:
    """Who a target is, on one line of a title."""
    align = f", align {target['align']}" if target["align"] else ""
    failed = f", {target['requests']['failed']} failed" if target["requests"]["failed"] else ""
    # A dollar would begin a formula.
    return f"{name}: {target['base_url']}, {target['model']}{align}{failed}"[:160].replace(
        "$", "\\$"
    )


def _load(report: Mapping[str, Any]) -> str:
    load = report["load"]
    return (
        f"{load['rate']:g} requests / s, open loop"
        if load["loop"] == "open"
        else f"{load['concurrency']} under way, closed loop"
    )


def _scatter(axes: Any, samples: Sequence[Mapping[str, Any]], colour: str, name: str) -> None:
    axes.plot(
        [s["intended"] for s in samples],
        [(s["ended"] - s["intended"]) * 1e3 for s in samples],
        ".",
        color=colour,
        label=name,
    )
