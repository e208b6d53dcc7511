"""`infer-align fit value`: the command line of `infer_align.fitting`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from infer_align.config import override, registry
from infer_align.errors import ConfigError, nearest
from infer_align.objectives import Ensemble, Objective
from infer_align.rewards import start_reward
from infer_align_server.arguments import configuration

if TYPE_CHECKING:
    from infer_align.fitting import FitReport

OUT = Console()
ERR = Console(stderr=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit value`; `--fit` sets the fields of `FitConfig`."""
    parser.add_argument("--reward", required=True, help="Name of a configured reward.")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help='JSON lines file. Each line is a string or {"messages": [...]}.',
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="Output file; for a lookahead value, output folder.",
    )
    parser.add_argument(
        "--objective",
        default=Ensemble().objective,
        choices=get_args(Objective),
        help="Objective over the members of the reward. Default: %(default)s.",
    )
    parser.add_argument(
        "--replies",
        type=_positive_integer,
        default=8,
        help="Number of replies per prompt. Default: %(default)s.",
    )
    parser.add_argument(
        "--max-tokens",
        type=_positive_integer,
        default=256,
        help="Maximum number of tokens of a reply. Default: %(default)s.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed. Default: %(default)s.")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Setting of the fit; may be repeated. Names: kind, method, rank, ridge, width, "
        "epochs, gamma, lam, value_model, largest_beta, curve_replies.",
    )


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; must be an integer of at least 1"
        )
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Fit a value, print its report and return the exit status.

    Raises:
        ConfigError: An argument, a prompt or the configuration is wrong.
        InvalidRequest: The engine or the reward refuses a prompt.
    """
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=ERR,
        transient=True,
    ) as bar:
        task = bar.add_task("loading", total=None)

        def progress(description: str) -> None:
            bar.update(task, description=description)

        report = asyncio.run(_fit(options, progress))
    _print_report(report, options.out)
    return 0


async def _fit(options: argparse.Namespace, progress: Callable[[str], None]) -> FitReport:
    # Fails with the packages to install if the engine cannot be imported.
    registry.engines.get("transformers")
    from infer_align.config.schema import parse
    from infer_align.engines.transformers import TransformersEngine
    from infer_align.fitting import FitConfig, fit_value
    from infer_align.fitting.samples import SamplingConfig, read_prompts

    config = configuration(options)
    prompts = read_prompts(options.prompts)
    fit_config = parse(FitConfig, _settings(options.fit), "--fit", ConfigError)
    if options.reward not in config.rewards:
        hint = nearest(options.reward, config.rewards)
        raise ConfigError(f"--reward: {options.reward!r} is not configured; {hint}")
    engine = config.load_engine()
    reward = config.load_rewards()[options.reward]
    if not isinstance(engine, TransformersEngine):
        raise ConfigError(
            f"[engine] kind: {config.engine_kind!r} is not allowed here, because it does not give "
            "hidden states; set kind = 'transformers'."
        )
    # The fit needs no configured values, and the value to be fitted may be one of them.
    engine.values = {}
    await engine.start()
    try:
        await start_reward(options.reward, reward)
        sampling = SamplingConfig(
            model=engine.model,
            reward=options.reward,
            objective=options.objective,
            replies_per_prompt=options.replies,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        return await fit_value(engine, reward, prompts, sampling, fit_config, options.out, progress)
    finally:
        await reward.close()
        await engine.close()


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Return the settings of NAME=VALUE pairs, whose values are TOML."""
    table: dict[str, Any] = {}
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(
                f"--fit: {pair!r} is not allowed; must have the form NAME=VALUE, such as rank=32."
            )
        override(table, pair)
    return table


def _print_report(report: FitReport, out: Path) -> None:
    held_out = report.held_out
    OUT.print(
        f"{out}: {report.samples} samples; held out: R² {held_out.r2:.3f} "
        f"(last token {held_out.r2_last:.3f}), slope {held_out.slope:.2f}",
        highlight=False,
        markup=False,
    )
    table = Table("beta", "reward", "± s.e.", "KL, nats", "± s.e.")
    for point in report.curve:
        table.add_row(*(f"{value:.3g}" for value in dataclasses.astuple(point)))
    OUT.print(table)
    OUT.print(f"suggested beta: {report.suggested_beta:g}", highlight=False)
