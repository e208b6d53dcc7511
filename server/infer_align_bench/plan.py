"""Run `infer-align bench plan`: fit prices to results and plan the replicas for a rate."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
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
    leave_one_out_errors,
    seconds,
)
from infer_align_bench.extrapolation import (
    extrapolation_warnings,
    refuse_unmeasured,
    saturation_warnings,
)
from infer_align_bench.simulate import Simulated, replicas_for, simulate

OUT = Console(width=max(80, Console().width))
SCHEMA = "infer-align/bench-plan/2"
# Numbers of replicas that are simulated, as multiples of those for the mean load.
SPARE_CAPACITY = (1.0, 1.1, 1.25, 1.5)
# Fewest results for which each is also predicted from the others.
MIN_LEAVE_ONE_OUT = 4
UNITS = {
    "fixed": "a request, of any kind",
    "step": "a decoding step, of any batch size",
    "sequence": "a sequence in a step",
    "attention": "a token of context in a step",
    "prefill": "a prompt token",
    "steered_step": "a steered step, in addition",
    "steer": "a valued token in a step",
    "reward": "a token that rewards read",
    "judge": "a token of the judge",
}


def run(options: argparse.Namespace) -> int:
    """Fit the prices, validate them, plan the capacity and simulate the queue.

    Raises:
        ConfigError: a file is not a result, there are too few results, the planned request was not
            measured, or no number of replicas reaches the latency.
    """
    settings, measured = _read(options.results)
    prices = fit(settings, measured)
    held_out, held_out_measured = _read(options.hold_out)
    validation = {}
    if len(settings) >= MIN_LEAVE_ONE_OUT:
        validation["left out, one at a time"] = leave_one_out_errors(settings, measured)
    if held_out:
        validation["held out"] = errors(prices, held_out, held_out_measured)
    request = _planned_request(options, settings)
    refuse_unmeasured(settings, request)
    planned = capacity(prices, request, options.rate, options.latency, options.max_sequences)
    loaded = replace(request, concurrency=planned.concurrency)
    warnings = [
        *saturation_warnings(settings, measured),
        *extrapolation_warnings(prices, settings, loaded),
    ]
    _print_prices(prices)
    labels = [""] * len(settings) + ["held out"] * len(held_out)
    _print_settings(prices, [*settings, *held_out], [*measured, *held_out_measured], labels)
    _print_validation(validation)
    _print_capacity(options, planned)
    queues = _simulate_queues(options, prices, request, planned)
    _print_queues(options, planned, queues)
    for warning in warnings:
        OUT.print(f"[yellow]{warning}[/]", highlight=False)
    if options.json:
        simulated = [{"replicas": count, **asdict(queue)} for count, queue in queues.items()]
        plan: dict[str, Any] = {
            "schema": SCHEMA,
            "prices_seconds": asdict(prices),
            "errors": validation,
            "doubts": warnings,
            "plan": asdict(planned),
            "simulated": simulated,
        }
        options.json.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return 0


def _planned_request(options: argparse.Namespace, settings: Sequence[Setting]) -> Setting:
    """Return the request of the options, for a load of one request in flight."""
    reward_tokens = options.reward_tokens
    if reward_tokens is None:
        reward_tokens = 0
        # By default rewards read each candidate with its prompt.
        if any(setting.reward_tokens for setting in settings):
            reward_tokens = options.n * (options.prompt_tokens + options.output_tokens)
    return Setting(
        concurrency=1,
        n=options.n,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        k=options.k,
        reward_tokens=reward_tokens,
        judge_tokens=options.judge_tokens,
    )


def _simulate_queues(
    options: argparse.Namespace, prices: Prices, request: Setting, planned: Capacity
) -> dict[int, Simulated]:
    """Simulate a few numbers of replicas, and the smallest number that meets --p99."""

    def latency(in_flight: int) -> float:
        return seconds(prices, replace(request, concurrency=in_flight))

    slots = planned.concurrency
    queues = {}
    for factor in SPARE_CAPACITY:
        count = math.ceil(planned.replicas * factor)
        queues[count] = simulate(latency, options.rate, count, slots, options.spread)
    if options.p99 is not None:
        count, queue = replicas_for(latency, options.rate, slots, options.p99, options.spread)
        queues[count] = queue
        OUT.print(f"[bold]{count} replicas[/] for 99% within {options.p99:g} s", highlight=False)
    return dict(sorted(queues.items()))


def _read(paths: Sequence[Path]) -> tuple[list[Setting], list[float]]:
    """Read results; return their settings and mean latencies in seconds."""
    settings = []
    latencies = []
    for path in paths:
        try:
            report: Any = json.loads(path.read_text(encoding="utf-8"))
            setting, latency = from_report(report, str(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path} is not a result of `bench serve --json`; measure one with that command."
            ) from None
        settings.append(setting)
        latencies.append(latency)
    return settings, latencies


def _print_prices(prices: Prices) -> None:
    table = Table("price", "microseconds", "of", box=None, header_style="dim")
    for name, value in asdict(prices).items():
        if value:
            table.add_row(name, f"{value * 1e6:.4g}", UNITS[name])
    OUT.print(table)


def _print_settings(
    prices: Prices,
    settings: Sequence[Setting],
    measured: Sequence[float],
    labels: Sequence[str],
) -> None:
    columns = ("in flight", "n", "prompt", "output", "k", "measured, ms", "predicted, ms", "")
    table = Table(*columns, box=None, header_style="dim")
    for setting, latency, label in zip(settings, measured, labels, strict=True):
        values = (
            setting.concurrency,
            setting.n,
            setting.prompt_tokens,
            setting.output_tokens,
            setting.k,
            latency * 1e3,
            seconds(prices, setting) * 1e3,
        )
        table.add_row(*(f"{value:.4g}" for value in values), label)
    OUT.print(table)


def _print_validation(validation: Mapping[str, Sequence[float]]) -> None:
    for label, relative_errors in validation.items():
        sizes = np.abs(relative_errors)
        OUT.print(
            f"error of settings {label}: mean {sizes.mean():.1%}, worst {sizes.max():.1%}",
            highlight=False,
        )


def _print_capacity(options: argparse.Namespace, planned: Capacity) -> None:
    OUT.print(
        f"\n{options.rate:g} requests / s of n = {options.n}, "
        f"{options.prompt_tokens} + {options.output_tokens} tokens: "
        f"[bold]{planned.replicas} replicas[/] at the mean load, "
        f"each {planned.requests_per_second:.3g} requests / s with "
        f"{planned.concurrency} in flight, {planned.seconds:.3g} s a request",
        highlight=False,
    )


def _print_queues(
    options: argparse.Namespace, planned: Capacity, queues: Mapping[int, Simulated]
) -> None:
    columns = ("replicas", "mean load", "p50, s", "p99, s", "that wait")
    table = Table(*columns, box=None, header_style="dim")
    for count, queue in queues.items():
        load = options.rate / planned.requests_per_second / count
        times = (f"{queue.p50:.3g}", f"{queue.p99:.3g}")
        if queue.growing:
            times = ("grows", "grows")
        table.add_row(str(count), f"{load:.0%}", *times, f"{queue.waited:.0%}")
    OUT.print(
        "[dim]simulated: Poisson arrivals, each sent to the replica with the fewest requests, "
        f"lengths with spread {options.spread:g}[/]"
    )
    OUT.print(table)
