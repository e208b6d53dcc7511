"""`infer-align bench plan`: prices from measurements, how far they can be trusted, and the replicas for a rate and a latency."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infer_align.errors import ConfigError
from infer_align_bench.cost import (
    Capacity,
    Prices,
    Setting,
    capacity,
    errors,
    fit,
    from_report,
    left_out,
    seconds,
)
from infer_align_bench.doubt import doubted, refuse_unmeasured, saturated
from infer_align_bench.simulate import replicas_for, simulate

OUT = Console(width=max(80, Console().width))
HEAD_ROOM = (1.0, 1.1, 1.25, 1.5)  # times the replicas of the mean load
UNITS = {
    "fixed": "a request, whatever it asks",
    "step": "a decoding step, whatever its batch",
    "sequence": "a sequence in a step",
    "attention": "a token of context in a step",
    "prefill": "a prompt token",
    "steered_step": "a steered step, in addition",
    "steer": "a valued token in a step",
    "reward": "a token that rewards read",
    "judge": "a token of the judge",
}


def run(options: argparse.Namespace) -> int:
    """Fit, validate, predict, simulate.

    Raises:
        ConfigError: a file is no result, there are too few, something is asked that was not measured, or a latency cannot be kept.
    """
    settings, measured = _read(options.results)
    prices = fit(settings, measured)
    held, truth = _read(options.hold_out)
    checked = {"left out, one at a time": left_out(settings, measured)} if len(settings) > 3 else {}
    if held:
        checked["held out"] = errors(prices, held, truth)
    rewarded = (
        options.n * (options.prompt_tokens + options.output_tokens)
        if any(s.reward_tokens for s in settings)
        else 0
    )
    asked = Setting(
        1,
        options.n,
        options.prompt_tokens,
        options.output_tokens,
        options.k,
        rewarded if options.reward_tokens is None else options.reward_tokens,
        options.judge_tokens,
    )
    refuse_unmeasured(settings, asked)
    planned = capacity(prices, asked, options.rate, options.latency, options.max_sequences)
    doubts = [
        *saturated(settings, measured),
        *doubted(prices, settings, replace(asked, concurrency=planned.concurrency)),
    ]
    _show(prices, [*settings, *held], [*measured, *truth], checked, len(settings))
    OUT.print(
        f"\n{options.rate:g} requests / s of n = {options.n}, {options.prompt_tokens} + {options.output_tokens} tokens: "
        f"[bold]{planned.replicas} replicas[/] at the mean load, each {planned.requests_per_second:.3g} requests / s with "
        f"{planned.concurrency} under way, {planned.seconds:.3g} s a request",
        highlight=False,
    )
    queues = _queues(options, prices, asked, planned)
    for doubt in doubts:
        OUT.print(f"[yellow]{doubt}[/]", highlight=False)
    if options.json:
        made: dict[str, Any] = {
            "schema": "infer-align/bench-plan/2",
            "prices_seconds": asdict(prices),
            "errors": checked,
            "doubts": doubts,
        }
        made |= {"plan": asdict(planned), "simulated": queues}
        options.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


def _queues(
    options: argparse.Namespace, prices: Prices, asked: Setting, planned: Capacity
) -> list[dict[str, Any]]:
    """Latency with a few numbers of replicas, and with the fewest that keep --p99; simulated, printed."""

    def alone(under_way: int) -> float:
        return seconds(prices, replace(asked, concurrency=under_way))

    load = planned.concurrency
    found = {
        count: simulate(alone, options.rate, count, load, options.spread)
        for count in sorted({math.ceil(planned.replicas * more) for more in HEAD_ROOM})
    }
    if options.p99 is not None:
        needed, queue = replicas_for(alone, options.rate, load, options.p99, options.spread)
        found[needed] = queue
        OUT.print(f"[bold]{needed} replicas[/] for 99% within {options.p99:g} s", highlight=False)
    table = Table(
        "replicas", "mean load", "p50, s", "p99, s", "that wait", box=None, header_style="dim"
    )
    for count, queue in sorted(found.items()):
        used = options.rate / planned.requests_per_second / count
        times = ("grows", "grows") if queue.growing else (f"{queue.p50:.3g}", f"{queue.p99:.3g}")
        table.add_row(str(count), f"{used:.0%}", *times, f"{queue.waited:.0%}")
    OUT.print(
        f"[dim]simulated: Poisson arrivals, the replica with the fewest requests, lengths by {options.spread:g}[/]"
    )
    OUT.print(table)
    return [{"replicas": count, **asdict(queue)} for count, queue in sorted(found.items())]


def _read(paths: Sequence[Path]) -> tuple[list[Setting], list[float]]:
    found = []
    for path in paths:
        try:
            report: Any = json.loads(path.read_text(encoding="utf-8"))
            found.append(from_report(report, str(path)))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{path} is no result of `bench serve --json`.") from None
    return [setting for setting, _ in found], [value for _, value in found]


def _show(
    prices: Prices,
    settings: Sequence[Setting],
    measured: Sequence[float],
    checked: dict[str, list[float]],
    fitted: int,
) -> None:
    table = Table("price", "microseconds", "of", box=None, header_style="dim")
    for name, value in asdict(prices).items():
        if value:
            table.add_row(name, f"{value * 1e6:.4g}", UNITS[name])
    OUT.print(table)
    table = Table(
        "under way",
        "n",
        "prompt",
        "output",
        "k",
        "measured, ms",
        "predicted, ms",
        "",
        box=None,
        header_style="dim",
    )
    for i, (s, value) in enumerate(zip(settings, measured, strict=True)):
        cells = (
            s.concurrency,
            s.n,
            s.prompt_tokens,
            s.output_tokens,
            s.k,
            value * 1e3,
            seconds(prices, s) * 1e3,
        )
        table.add_row(*(f"{cell:.4g}" for cell in cells), "" if i < fitted else "held out")
    OUT.print(table)
    for what, found in checked.items():
        size = np.abs(found)
        OUT.print(
            f"error of settings {what}: mean {size.mean():.1%}, worst {size.max():.1%}",
            highlight=False,
        )
