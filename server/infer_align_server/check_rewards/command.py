"""The command line of `infer-align rewards check`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.config import Config
from infer_align.errors import ConfigError
from infer_align.types import Array
from infer_align_bench.plot import require_matplotlib
from infer_align_server import logs
from infer_align_server.arguments import configuration, positive_integer
from infer_align_server.check_rewards import recipe
from infer_align_server.check_rewards.chosen import (
    ChosenRewards,
    check_reward,
    choose_rewards,
    rubric_of,
    started,
)
from infer_align_server.check_rewards.export import as_json
from infer_align_server.check_rewards.page import (
    LABELS,
    SUMMARY_COLUMNS,
    CheckedRewards,
    render_page,
    summary_cells,
)
from infer_align_server.check_rewards.progress import ProgressLines
from infer_align_server.check_rewards.questions import (
    QuestionSet,
    RatedQuestion,
    read_questions,
    with_rated_pairs,
)
from infer_align_server.check_rewards.report import RATINGS, make_report
from infer_align_server.check_rewards.scoring import ScoredReward, score_questions
from infer_align_server.check_rewards.verdicts import judge_reward

# Problems of a file that are printed; the page has all of them.
MAX_PROBLEMS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rewards check` itself."""
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="JSON lines with a better and a worse answer to each prompt; may be .gz, .xz or .bz2.",
    )
    files.add_argument(
        "--pools",
        type=Path,
        metavar="FILE",
        help="JSON lines with several answers to each prompt and their ratings.",
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME",
        help="Reward to check; may be repeated. Default: every one that needs no engine.",
    )
    parser.add_argument(
        "--gold",
        metavar="REWARD",
        help="Configured reward that judges the answers in place of ratings.",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="Write one HTML page.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write all figures as JSON.")
    parser.add_argument(
        "--limit", type=positive_integer, metavar="N", help="Use N prompts, spread over the file."
    )
    text = "Use N answers of each pool, drawn once."
    parser.add_argument("--answers", type=positive_integer, metavar="N", help=text)
    parser.add_argument(
        "--attack-model",
        action="append",
        default=[],
        metavar="MODEL",
        help="Treat the answers of this model of the pools as an attack; may be repeated.",
    )


def run(options: argparse.Namespace, out: Console, log: Console) -> int:
    """Check the rewards, print a table and write the files that are named.

    Args:
        options: the arguments of the command.
        out: gets the results.
        log: gets the progress.

    Returns:
        The exit status: 0, or 1 if a reward scored nothing or reads other tokens than the recipe.

    Raises:
        ConfigError: an argument, the file or the configuration is wrong.
    """
    logs.switch_off_progress_bars()
    config = configuration(options)
    if options.pairs is None and options.pools is None:
        _refuse_options_of_files(options)
        return asyncio.run(recipe.run(config, options.reward, out))
    _check_options(options)
    questions = read_questions(
        options.pairs, options.pools, options.limit, options.answers, options.attack_model
    )
    checked = asyncio.run(_check(config, options, questions, ProgressLines(log)))
    # The figures are printed last, so that they are in sight.
    if options.html is not None:
        _write(options.html, render_page(checked))
        log.print(f"wrote {escape(str(options.html))}", highlight=False, soft_wrap=True)
    if options.json is not None:
        _write(options.json, json.dumps(as_json(checked), ensure_ascii=False, indent=1) + "\n")
        log.print(f"wrote {escape(str(options.json))}", highlight=False, soft_wrap=True)
    _print(checked, out)
    return int(any(report.unscored == report.answers for report in checked.reports))


def _refuse_options_of_files(options: argparse.Namespace) -> None:
    for name in ("gold", "html", "json", "limit", "answers", "attack_model"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option}: needs answers to check the rewards on; give a file with --pairs or "
                "--pools."
            )


def _check_options(options: argparse.Namespace) -> None:
    """Refuse wrong options before anything is loaded."""
    if options.pools is None:
        for name in ("answers", "attack_model"):
            if getattr(options, name):
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option}: is about the answers of pools; give --pools.")
    if options.html is not None:
        require_matplotlib("--html")
    for option, path in (("--html", options.html), ("--json", options.json)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(
                f"{option}: {str(path)!r} cannot be written; name a file in a folder that exists."
            )


async def _check(
    config: Config, options: argparse.Namespace, questions: QuestionSet, progress: ProgressLines
) -> CheckedRewards:
    chosen = choose_rewards(config, config.load_rewards(), options.reward, options.gold)
    answers = sum(len(question.answers) for question in questions.questions)
    progress.say(f"{len(questions.questions)} prompts with {answers} answers")
    async with started(config, chosen.sections, progress) as rewards:
        for name in chosen.checked:
            check_reward("--reward", name, rewards[name.partition(".")[0]])
        if chosen.gold is not None:
            check_reward("--gold", chosen.gold, rewards[chosen.gold.partition(".")[0]])
        scored: dict[str, ScoredReward] = {}
        sections = {name.partition(".")[0] for name in chosen.checked}
        for name, reward in rewards.items():
            section = config.rewards.get(name)
            rubric = rubric_of(section) if name in sections else None
            rows = await score_questions(name, reward, questions.questions, progress, rubric)
            scored |= {row.name: row for row in rows}
    return _checked(chosen, scored, questions)


def _checked(
    chosen: ChosenRewards, scored: Mapping[str, ScoredReward], questions: QuestionSet
) -> CheckedRewards:
    """Compute the figures of every reward."""
    rated = questions.questions
    gold = _named(chosen.gold, scored) if chosen.gold else []
    if gold:
        rated = _judged(rated, gold[0].objective, questions.source)
    rivals: dict[str, Sequence[Array]] = {name: row.objective for name, row in scored.items()}
    if not gold and any(question.has_ratings for question in rated):
        rivals[RATINGS] = [question.ratings for question in rated]
    reports = []
    for name in chosen.checked:
        for row in _named(name, scored):
            reports.append(make_report(row, rated, rivals))
    return CheckedRewards(reports, _facts(chosen, questions), questions.problems, chosen.omitted)


def _named(name: str, scored: Mapping[str, ScoredReward]) -> list[ScoredReward]:
    """Return the reward of a name, or all attributes of it."""
    if name in scored:
        return [scored[name]]
    return [row for title, row in scored.items() if title.startswith(f"{name}.")]


def _judged(
    questions: Sequence[RatedQuestion], gold: Sequence[Array], source: str
) -> tuple[RatedQuestion, ...]:
    """Return the questions with the scores of a gold reward as ratings.

    Pairs of a file keep their labels; those of pools follow the ratings.
    """
    judged: list[RatedQuestion] = []
    for question, row in zip(questions, gold, strict=True):
        judged.append(replace(question, ratings=row))
    return tuple(judged) if source == "pairs" else with_rated_pairs(judged)


def _facts(chosen: ChosenRewards, questions: QuestionSet) -> dict[str, str]:
    counts = [len(question.answers) for question in questions.questions]
    pairs = sum(len(question.pairs) for question in questions.questions)
    gold = f"the reward {chosen.gold}" if chosen.gold else "the ratings of the file"
    if not chosen.gold and questions.source == "pairs":
        gold = "1 for a chosen answer, 0 for a rejected one"
    return {
        "prompts": f"{len(counts)} of {questions.total} in the file",
        "answers": f"{sum(counts)}, {np.median(counts):.0f} per prompt in the median",
        "pairs": f"{pairs}, from a file of {questions.source}",
        "gold": gold,
        "infer-align": version("infer-align"),
        "numpy": np.__version__,
    }


def _write(path: Path, text: str) -> None:
    """Write a file at once: a reader never sees half of it.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}.") from error


def _print(checked: CheckedRewards, out: Console) -> None:
    """Print a table of all rewards, and then the verdict on each."""
    table = Table(*SUMMARY_COLUMNS[:-1])
    for report in checked.reports:
        table.add_row(*(escape(cell) for cell in summary_cells(report)[:-1]))
    out.print(table)
    for report in checked.reports:
        verdict = judge_reward(report)
        text = f"{report.name}: {LABELS[verdict.level]}. {verdict.text}"
        out.print(escape(text), highlight=False, soft_wrap=True)
        for reason, count in report.reasons.items():
            text = f"{report.name}: {count} of {report.answers} answers were not scored: {reason}"
            out.print(escape(text), highlight=False, soft_wrap=True)
        for remark, count in report.remarks.items():
            text = (
                f"{report.name}: {count} of {report.answers} answers have a note such as: {remark}"
            )
            out.print(escape(text), highlight=False, soft_wrap=True)
    for name, reason in checked.omitted.items():
        out.print(escape(f"{name} was not checked: {reason}"), highlight=False, soft_wrap=True)
    for problem in checked.problems[:MAX_PROBLEMS]:
        out.print(escape(problem), highlight=False, soft_wrap=True)
    if len(checked.problems) > MAX_PROBLEMS:
        rest = len(checked.problems) - MAX_PROBLEMS
        text = f"and {rest} more problems; {len(checked.problems)} in all"
        out.print(text, highlight=False)
