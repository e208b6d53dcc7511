"""`infer-align bench plan`: prices from measurements, how far they can be trusted, and the replicas for a rate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infer_align.errors import ConfigError
from infer_align_bench.cost import Prices, Setting, capacity, errors, fit, from_report, left_out, seconds

OUT = Console(width=max(110, Console().width))
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
    """Fit, validate, predict.

    Raises:
        ConfigError: a file is no result, there are too few, or the latency cannot be kept.
    """
    settings, measured = _read(options.results)
    prices = fit(settings, measured)
    held, truth = _read(options.hold_out)
    checked = {"left out, one at a time": left_out(settings, measured)} if len(settings) > 3 else {}
    if held:
        checked["held out"] = errors(prices, held, truth)
    rewarded = options.n * (options.prompt_tokens + options.output_tokens) if any(s.reward_tokens for s in settings) else 0
    asked = Setting(
        1, options.n, options.prompt_tokens, options.output_tokens, options.k,
        rewarded if options.reward_tokens is None else options.reward_tokens, options.judge_tokens,
    )  # fmt: skip
    _check_priced(prices, asked)
    planned = capacity(prices, asked, options.rate, options.latency, options.max_sequences)
    _show(prices, [*settings, *held], [*measured, *truth], checked, len(settings))
    OUT.print(
        f"\n{options.rate:g} requests / s of n = {options.n}, {options.prompt_tokens} + {options.output_tokens} tokens: "
        f"[bold]{planned.replicas} replicas[/], each {planned.requests_per_second:.3g} requests / s with {planned.concurrency} "
        f"under way, {planned.seconds:.3g} s a request",
        highlight=False,
    )
    if options.json:
        made = {"schema": "infer-align/bench-plan/1", "prices_seconds": asdict(prices), "errors": checked, "plan": asdict(planned)}
        options.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


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


def _check_priced(prices: Prices, asked: Setting) -> None:
    """A thing that no measurement held has no price: to plan with it for nothing would be a lie."""
    for field, price, flag in (
        ("k", "steer", "steered"),
        ("reward_tokens", "reward", "scored"),
        ("judge_tokens", "judge", "judged"),
    ):
        extra = prices.steered_step if field == "k" else 0.0
        if getattr(asked, field) and not getattr(prices, price) + extra:
            OUT.print(f"[yellow]no cost was found for {field}: measure {flag} requests too; it is planned as if it were free.[/]")


def _show(
    prices: Prices, settings: Sequence[Setting], measured: Sequence[float], checked: dict[str, list[float]], fitted: int
) -> None:
    table = Table("price", "microseconds", "of", box=None, header_style="dim")
    for name, value in asdict(prices).items():
        if value:
            table.add_row(name, f"{value * 1e6:.4g}", UNITS[name])
    OUT.print(table)
    table = Table("under way", "n", "prompt", "output", "k", "measured, ms", "predicted, ms", "", box=None, header_style="dim")
    for i, (s, value) in enumerate(zip(settings, measured, strict=True)):
        cells = (s.concurrency, s.n, s.prompt_tokens, s.output_tokens, s.k, value * 1e3, seconds(prices, s) * 1e3)
        table.add_row(*(f"{cell:.4g}" for cell in cells), "" if i < fitted else "held out")
    OUT.print(table)
    for what, found in checked.items():
        size = np.abs(found)
        OUT.print(f"error of settings {what}: mean {size.mean():.1%}, worst {size.max():.1%}", highlight=False)
