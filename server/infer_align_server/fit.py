"""`infer-align fit value`: the command around `infer_align.fitting`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from infer_align.config import config as configuration
from infer_align.config import registry
from infer_align.errors import ConfigError, nearest

if TYPE_CHECKING:
    from infer_align.fitting import FitReport

OUT = Console()
ERR = Console(stderr=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is fitted, to what, and where it goes; the rest are the fields of `FitConfig`, by `--fit NAME=VALUE`."""
    parser.add_argument("--reward", required=True, help="a configured reward")
    parser.add_argument(
        "--prompts", required=True, type=Path, help='JSON lines: a string, or {"messages": [...]}'
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the value's file, or folder for a lookahead value"
    )
    parser.add_argument(
        "--objective",
        default="uwo",
        choices=("mean", "wco", "uwo"),
        help="over the reward's members; default: %(default)s",
    )
    parser.add_argument(
        "--replies", type=_positive, default=8, help="per prompt; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=_positive, default=256, help="of a reply; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="kind, method, rank, ridge, width, epochs, gamma, lam, value_model, ...",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a whole number from 1")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Fit, and print what is known of the value.

    Raises:
        ConfigError, InvalidRequest: what is wrong, by name.
    """
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=ERR,
        transient=True,
    ) as bar:
        task = bar.add_task("loading", total=None)
        report = asyncio.run(_fit(options, lambda what: bar.update(task, description=what)))
    _print(report, options.out)
    return 0


async def _fit(options: argparse.Namespace, progress: Any) -> FitReport:
    registry.engines.get("transformers")  # says what to install where it cannot be imported
    from infer_align.config.schema import parse
    from infer_align.engines.transformers import TransformersEngine
    from infer_align.fitting import FitConfig, fit_value
    from infer_align.fitting.samples import SamplingConfig, read_prompts

    config = configuration.load(options.config, options.set)
    prompts = read_prompts(options.prompts)
    fitting = parse(FitConfig, _settings(options.fit), "--fit", ConfigError)
    if options.reward not in config.rewards:
        raise ConfigError(
            f"--reward: {options.reward!r} is not configured; {nearest(options.reward, config.rewards)}"
        )
    engine, reward = config.load_engine(), config.load_rewards()[options.reward]
    if not isinstance(engine, TransformersEngine):
        raise ConfigError(
            f"[engine] kind: {config.engine_kind!r} does not show its states; values are fitted on kind = 'transformers'."
        )
    engine.values = {}  # not needed, and one of them may be what is about to be made
    await engine.start()
    try:
        await reward.start()
        how = SamplingConfig(
            engine.model,
            options.reward,
            options.objective,
            options.replies,
            options.max_tokens,
            options.seed,
        )
        return await fit_value(engine, reward, prompts, how, fitting, options.out, progress)
    finally:
        await reward.close()
        await engine.close()


def _settings(pairs: list[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--fit {pair!r}: not of the form NAME=VALUE, such as rank=32.")
        configuration.override(table, pair)
    return table


def _print(report: FitReport, out: Path) -> None:
    held = report.held_out
    OUT.print(
        f"{out}: {report.samples} samples; held out: R² {held.r2:.3f} (last token {held.r2_last:.3f}), slope {held.slope:.2f}",
        highlight=False,
        markup=False,
    )
    table = Table("beta", "reward", "± s.e.", "KL, nats", "± s.e.")
    for point in report.curve:
        table.add_row(*(f"{value:.3g}" for value in dataclasses.astuple(point)))
    OUT.print(table)
    OUT.print(f"suggested beta: {report.suggested_beta:g}", highlight=False)
