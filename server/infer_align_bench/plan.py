"""Run `infer-align bench plan`: fit prices to results and plan the replicas for a rate."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infer_align.errors import ConfigError
from infer_align_bench.cluster import Cluster, plan_cluster
from infer_align_bench.cost import (
    Prices,
    Setting,
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
from infer_align_bench.price_table import PriceTable, TablePrices, load, shipped
from infer_align_bench.runtime import check_writable
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


@dataclass(frozen=True, slots=True)
class Priced:
    """Prices, the settings that they rest on, and what is known about their error."""

    prices: Prices
    settings: Sequence[Setting] = ()
    measured: Sequence[float] = ()
    validation: Mapping[str, Sequence[float]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def run(options: argparse.Namespace) -> int:
    """Fit the prices, validate them, plan the capacity and simulate the queue.

    Raises:
        ConfigError: a file is not a result, there are too few results, the planned request was not
            measured, or no number of replicas reaches the latency.
    """
    if options.json:
        check_writable(options.json)
    table = _table(options)
    priced = _fitted(options) if table is None else _tabulated(table)
    request = _planned_request(options, priced)
    max_sequences = options.max_sequences
    if table is None:
        refuse_unmeasured(priced.settings, request)
    else:
        max_sequences = min(max_sequences, int(table.prices.most_sequences))
    cluster = plan_cluster(options, priced.prices, request, max_sequences)
    warnings = list(priced.warnings)
    if table is None:
        loaded = replace(cluster.request, concurrency=cluster.planned.concurrency)
        warnings += extrapolation_warnings(priced.prices, priced.settings, loaded)
    _print_validation(priced.validation)
    _print_capacity(options, cluster)
    queues = _simulate_queues(options, priced.prices, cluster)
    _print_queues(options, cluster, queues)
    for warning in warnings:
        OUT.print(f"[yellow]{warning}[/]", highlight=False)
    if options.json:
        _write(options, priced, cluster, queues, warnings)
    return 0


def _write(
    options: argparse.Namespace,
    priced: Priced,
    cluster: Cluster,
    queues: Mapping[int, Simulated],
    warnings: Sequence[str],
) -> None:
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "prices_seconds": asdict(priced.prices),
        "errors": priced.validation,
        "doubts": warnings,
        "plan": asdict(cluster.planned),
        "cluster": {
            "hit_share": cluster.hit_share,
            "hit_share_without_affinity": cluster.hit_share_elsewhere,
            "judges": cluster.judges.replicas if cluster.judges else 0,
        },
        "simulated": [{"replicas": count, **asdict(queue)} for count, queue in queues.items()],
    }
    options.json.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def _table(options: argparse.Namespace) -> PriceTable | None:
    """Return the table of prices of the options, if they name one.

    Raises:
        ConfigError: there are results beside a table, or neither.
    """
    if options.prices is None:
        if not options.results:
            raise ConfigError(
                "bench plan: needs results of `bench serve --json`, or --prices with a table; "
                f"shipped: {', '.join(shipped())}."
            )
        return None
    if options.results or options.hold_out:
        raise ConfigError("--prices: takes the place of results; give one of them.")
    return load(options.prices)


def _fitted(options: argparse.Namespace) -> Priced:
    """Fit prices to results, and print them."""
    settings, measured = _read(options.results)
    prices = fit(settings, measured)
    held_out, held_out_measured = _read(options.hold_out)
    validation = {}
    if len(settings) >= MIN_LEAVE_ONE_OUT:
        validation["left out, one at a time"] = leave_one_out_errors(settings, measured)
    if held_out:
        validation["held out"] = errors(prices, held_out, held_out_measured)
    _print_prices(prices)
    labels = [""] * len(settings) + ["held out"] * len(held_out)
    _print_settings(prices, [*settings, *held_out], [*measured, *held_out_measured], labels)
    warnings = list(saturation_warnings(settings, measured))
    return Priced(prices, settings, measured, validation, warnings)


def _tabulated(table: PriceTable) -> Priced:
    """Print a table of prices."""
    OUT.print(f"{table.device}\n{table.model}\n{table.source}", highlight=False)
    rows = Table("sequences in a step", "milliseconds", "more if steered", box=None)
    steered = dict(table.prices.steered_steps)
    for sequences, step in table.prices.steps:
        more = f"{steered[sequences] * 1e3:.3g}" if sequences in steered else ""
        rows.add_row(f"{sequences:g}", f"{step * 1e3:.3g}", more)
    OUT.print(rows)
    _print_prices(table.prices)
    return Priced(table.prices, validation=table.errors)


def _planned_request(options: argparse.Namespace, priced: Priced) -> Setting:
    """Return the request of the options, for a load of one request in flight.

    Raises:
        ConfigError: steering has no price.
    """
    reward_tokens = options.reward_tokens
    candidates = options.n if options.mean_n is None else options.mean_n
    if reward_tokens is None:
        reward_tokens = 0
        # By default rewards read each candidate with its prompt.
        scored = any(setting.reward_tokens for setting in priced.settings)
        if scored or (not priced.settings and options.n > 1):
            reward_tokens = candidates * (options.prompt_tokens + options.output_tokens)
    if options.k and isinstance(priced.prices, TablePrices) and not priced.prices.steered_steps:
        raise ConfigError("--k: the table has no steered steps, so steering has no price.")
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
    options: argparse.Namespace, prices: Prices, cluster: Cluster
) -> dict[int, Simulated]:
    """Simulate a few numbers of replicas, and the smallest number that meets --p99."""

    def latency(in_flight: int) -> float:
        return seconds(prices, replace(cluster.request, concurrency=in_flight))

    slots = cluster.planned.concurrency
    traffic, judges = cluster.traffic, cluster.judges
    queues = {}
    for factor in SPARE_CAPACITY:
        count = math.ceil(cluster.planned.replicas * factor)
        queues[count] = simulate(latency, options.rate, count, slots, traffic, judges=judges)
    if options.p99 is not None:
        count, queue = replicas_for(
            latency, options.rate, slots, options.p99, traffic, judges=judges
        )
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(
                f"{path} is not a result of `bench serve --json`; measure one with that command."
            ) from None
        settings.append(setting)
        latencies.append(latency)
    return settings, latencies


def _print_prices(prices: Prices) -> None:
    table = Table("price", "microseconds", "of", box=None, header_style="dim")
    for name, value in asdict(prices).items():
        if value and name in UNITS:
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


def _print_capacity(options: argparse.Namespace, cluster: Cluster) -> None:
    planned = cluster.planned
    candidates = f"n = {options.n}"
    if options.mean_n is not None:
        candidates = f"n = {options.mean_n:g} on average, at most {options.n}"
    OUT.print(
        f"\n{options.rate:g} requests / s of {candidates}, "
        f"{options.prompt_tokens} + {options.output_tokens} tokens: "
        f"[bold]{planned.replicas} replicas[/] at the mean load, "
        f"each {planned.requests_per_second:.3g} requests / s with "
        f"{planned.concurrency} in flight, {planned.seconds:.3g} s a request",
        highlight=False,
    )
    if options.prefix_tokens:
        OUT.print(
            f"prefixes in the cache: {cluster.hit_share:.1%} of requests with --routing "
            f"{options.routing}, {cluster.hit_share_elsewhere:.1%} if routing ignores prefixes",
            highlight=False,
        )
    if cluster.judges is not None:
        OUT.print(
            f"[bold]{cluster.judges.replicas} judges[/] beside them, each at most "
            f"{options.judge_pool:.0%} busy",
            highlight=False,
        )


def _print_queues(
    options: argparse.Namespace, cluster: Cluster, queues: Mapping[int, Simulated]
) -> None:
    columns = ("replicas", "GPUs", "nodes", "mean load", "p50, s", "p99, s", "that wait")
    table = Table(*columns, box=None, header_style="dim")
    judges = cluster.judges.replicas if cluster.judges else 0
    for count, queue in queues.items():
        load = options.rate / cluster.planned.requests_per_second / count
        times = (f"{queue.p50:.3g}", f"{queue.p99:.3g}")
        if queue.growing:
            times = ("grows", "grows")
        gpus = (count + judges) * options.gpus_per_replica
        nodes = math.ceil(gpus / options.gpus_per_node)
        table.add_row(
            str(count), str(gpus), str(nodes), f"{load:.0%}", *times, f"{queue.waited:.0%}"
        )
    OUT.print(
        f"[dim]simulated: Poisson arrivals, routing {options.routing!r}, "
        f"lengths with spread {options.spread:g}; GPUs include the judges[/]"
    )
    OUT.print(table)
