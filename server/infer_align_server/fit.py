"""`infer-align fit value`: the command line of `infer_align.fitting`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from infer_align.config import Config, override, registry
from infer_align.config.fitting import FitConfig
from infer_align.config.schema import parse
from infer_align.errors import ConfigError, nearest
from infer_align.objectives import Ensemble, Objective
from infer_align.rewards import start_reward
from infer_align_server import logs
from infer_align_server.arguments import configuration, positive_integer, seed

if TYPE_CHECKING:
    from infer_align.engines.transformers.engine import TransformersEngine
    from infer_align.fitting import FitReport
    from infer_align.fitting.samples_file import Conversation, SamplingConfig, ScoredReply

OUT = Console()
ERR = Console(stderr=True)

DEFAULT_REPLIES = 8
DEFAULT_MAX_TOKENS = 256
DEFAULT_SEED = 0
HELP_WIDTH = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fit value`; `--fit` sets the fields of `FitConfig`."""
    parser.add_argument(
        "--reward", required=True, metavar="NAME", help="Name of a configured reward."
    )
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help='JSON lines file. Each line is a string, {"prompt": ...} or {"messages": [...]}.',
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PATH",
        help="Output file; for a lookahead value, output folder.",
    )
    _add_replies(parser)
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Setting of the fit; may be repeated. The names are listed below.",
    )
    sections = [_describe_settings()]
    if parser.epilog:
        sections.insert(0, parser.epilog)
    parser.epilog = "\n\n".join(sections)


def _add_replies(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about the replies and their scores."""
    parser.add_argument(
        "--objective",
        default=Ensemble().objective,
        choices=get_args(Objective),
        help="Objective over the members of the reward. Default: %(default)s.",
    )
    parser.add_argument(
        "--replies",
        type=positive_integer,
        metavar="N",
        help=f"Number of replies per prompt. Default: {DEFAULT_REPLIES}.",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_integer,
        metavar="N",
        help=f"Maximum number of tokens of a reply. Default: {DEFAULT_MAX_TOKENS}.",
    )
    parser.add_argument("--seed", type=seed, help=f"Random seed. Default: {DEFAULT_SEED}.")
    parser.add_argument(
        "--rescore",
        type=Path,
        metavar="SAMPLES",
        help="Samples file of an earlier fit (.samples.jsonl). Its replies are scored by this "
        "reward, so nothing is sampled again.",
    )


def _describe_settings() -> str:
    """Return the fields of `FitConfig` for the help text."""
    lines = ["settings of --fit, each with its default:"]
    for field in dataclasses.fields(FitConfig):
        lines.append(f"  {field.name} ({json.dumps(field.default)})")
        description = field.metadata["description"]
        lines += textwrap.wrap(
            description, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Fit a value, print its report and return the exit status.

    Raises:
        ConfigError: An argument, a prompt or the configuration is wrong.
        InvalidRequest: The engine or the reward refuses a prompt.
    """
    logs.switch_off_progress_bars()
    with _progress() as progress:
        report = asyncio.run(_fit(options, progress))
    _print_report(report, options.out)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield the function that reports progress: in one line of a terminal, or line by line."""
    if not ERR.is_terminal:
        started = monotonic()

        def print_line(description: str) -> None:
            text = f"{monotonic() - started:6.0f} s  {description}"
            ERR.print(text, highlight=False, markup=False, soft_wrap=True)

        print_line("loading")
        yield print_line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda description: bar.update(task, description=description)


async def _fit(options: argparse.Namespace, progress: Callable[[str], None]) -> FitReport:
    # Fails with the packages to install if the engine cannot be imported.
    registry.engines.get("transformers")
    from infer_align.fitting import check_numbers, fit_value
    from infer_align.fitting.samples import read_prompts

    config = configuration(options)
    prompts = read_prompts(options.prompts)
    _print_repeated(options.prompts, prompts)
    fit_config = parse(FitConfig, _settings(options.fit), "--fit", ConfigError)
    if options.reward not in config.rewards:
        hint = nearest(options.reward, config.rewards)
        raise ConfigError(f"--reward: {options.reward!r} is not configured; {hint}")
    engine = _engine(config)
    sampling, earlier = _sampling(options, engine.model, prompts)
    check_numbers(prompts, sampling.replies_per_prompt)
    reward = config.load_rewards()[options.reward]
    await engine.start()
    try:
        await start_reward(options.reward, reward)
        return await fit_value(
            engine, reward, prompts, sampling, fit_config, options.out, progress, earlier
        )
    finally:
        await reward.close()
        await engine.close()


def _print_repeated(path: Path, prompts: Sequence[Conversation]) -> None:
    """Print how many prompts occur more than once."""
    from infer_align.fitting.samples import group_prompts

    repeated = len(prompts) - len(set(group_prompts(prompts)))
    if repeated:
        text = (
            f"{path}: {repeated} prompts occur more than once; each occurrence is sampled, and "
            "equal prompts are held out together"
        )
        ERR.print(text, highlight=False, markup=False, soft_wrap=True)


def _engine(config: Config) -> TransformersEngine:
    """Return the configured engine, without values.

    Raises:
        ConfigError: It does not give hidden states.
    """
    from infer_align.engines.transformers.engine import TransformersEngine

    engine = config.load_engine()
    if not isinstance(engine, TransformersEngine):
        raise ConfigError(
            f"[engine] kind: {config.engine_kind!r} is not allowed here, because it does not give "
            "hidden states; set kind = 'transformers'."
        )
    # The fit needs no configured values, and the value to be fitted may be one of them.
    engine.values = {}
    return engine


def _sampling(
    options: argparse.Namespace, model: str, prompts: Sequence[Conversation]
) -> tuple[SamplingConfig, list[ScoredReply]]:
    """Return the settings of the replies, and the replies of `--rescore`.

    Raises:
        ConfigError: An argument contradicts the samples file.
        InvalidRequest: The samples file cannot be used.
    """
    from infer_align.fitting.samples_file import SamplingConfig, read_samples

    numbers = {
        "replies_per_prompt": options.replies,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
    }
    if options.rescore is None:
        defaults = (DEFAULT_REPLIES, DEFAULT_MAX_TOKENS, DEFAULT_SEED)
        for name, default in zip(numbers, defaults, strict=True):
            if numbers[name] is None:
                numbers[name] = default
        sampling = SamplingConfig(model, options.reward, options.objective, **numbers)
        return sampling, []
    if options.rescore.resolve() == options.out.with_suffix(".samples.jsonl").resolve():
        raise ConfigError(
            f"--rescore: {options.rescore} is the samples file of --out {options.out} itself; "
            "write the value to another path."
        )
    source, earlier = read_samples(options.rescore, prompts)
    flags = ("--replies", "--max-tokens", "--seed")
    for flag, (name, value) in zip(flags, numbers.items(), strict=True):
        recorded = getattr(source, name)
        if value is not None and value != recorded:
            raise ConfigError(
                f"{flag}: {value} is not allowed, because the replies of --rescore were sampled "
                f"with {recorded}; leave it out."
            )
    if source.model != model:
        raise ConfigError(
            f"--rescore: {options.rescore} has replies of {source.model!r}, but the engine's model "
            f"is {model!r}; a value is fitted to replies of its own model."
        )
    sampling = dataclasses.replace(source, reward=options.reward, objective=options.objective)
    return sampling, earlier


def _settings(pairs: list[str]) -> dict[str, Any]:
    """Return the settings of NAME=VALUE pairs, whose values are TOML."""
    table: dict[str, Any] = {}
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(
                f"--fit: {pair!r} is not allowed; must have the form NAME=VALUE, such as rank=32."
            )
        override(table, pair, "--fit")
    return table


def _print_report(report: FitReport, out: Path) -> None:
    held_out = report.held_out
    method = report.method if report.ridge is None else f"{report.method} {report.ridge:g}"
    _print(
        f"{out}: {report.samples} samples, fit by {method}; held out: R² {held_out.r2:.3f} "
        f"(last token {held_out.r2_last:.3f}), slope {held_out.slope:.2f}"
    )
    table = Table("replies", "reward", "± s.e.", "- beta 0", "± s.e.", "KL, nats", "± s.e.")
    for point in report.curve:
        name = f"beta {point.beta:.4g}"
        gains = ("", "") if point.beta == 0 else (f"{point.gain:+.3f}", f"{point.gain_se:.3f}")
        rewards = (f"{point.reward:.3f}", f"{point.reward_se:.3f}")
        table.add_row(name, *rewards, *gains, f"{point.kl:.2f}", f"{point.kl_se:.2f}")
    for best in report.best_of_n:
        rewards = (f"{best.reward:.3f}", f"{best.reward_se:.3f}")
        gains = (f"{best.gain:+.3f}", f"{best.gain_se:.3f}")
        table.add_row(f"best of {best.n}", *rewards, *gains, f"<= {best.kl_bound:.2f}", "")
    OUT.print(table)
    _print("The same held-out prompts in every row; differences are paired by prompt and seed.")
    for note in report.notes:
        _print(f"note: {note}")
    _print(f"align: {json.dumps({'vas': report.vas})}")
    _print(f"suggested beta: {report.suggested_beta:g}")


def _print(text: str) -> None:
    OUT.print(text, highlight=False, markup=False, soft_wrap=True)
