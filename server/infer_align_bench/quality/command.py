"""Run `infer-align bench quality`: measure every setting of a grid and report what to use."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as TextTable

from infer_align.errors import AlignError, ConfigError
from infer_align_bench import prompts as datasets
from infer_align_bench.arguments import body_fields
from infer_align_bench.credentials import ApiKey, same_server
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.plot import require_matplotlib
from infer_align_bench.quality.advice import Advice, kl_warnings, make_advice, make_headline
from infer_align_bench.quality.answers import choose_answers
from infer_align_bench.quality.curve import COSTS, Cost, Mean, Point, Table, make_points
from infer_align_bench.quality.export import as_json
from infer_align_bench.quality.gold import load_scorer, uses_server
from infer_align_bench.quality.grid import Grid, read_grid
from infer_align_bench.quality.html import Results, render_page
from infer_align_bench.quality.notebook import FORMAT, Notebook
from infer_align_bench.quality.runner import MAX_CONSECUTIVE_FAILURES, Runner, Work, plan_work
from infer_align_bench.quality.selectors import (
    ServerNames,
    describe_gold_selection,
    read_names,
    selected_by_gold,
)
from infer_align_bench.runtime import INTERRUPTED, check_writable, loop_factory, stop_on_signals
from infer_align_bench.tables import number
from infer_align_bench.types import ChatPrompt, Target

SCHEMA = "infer-align/bench-quality/2"
OUT = Console(width=max(80, Console().width))
ERR = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The answers and failures of a run."""

    runner: Runner
    notebook: Notebook
    interrupted: bool
    names: ServerNames

    @property
    def failed(self) -> dict[str, int]:
        """Return the number of failed answers by setting, without the refused settings."""
        counts: dict[str, int] = {}
        for name, failures in self.runner.failures.items():
            if name not in self.runner.refused:
                counts[name] = len(failures)
        return counts

    @property
    def complete(self) -> bool:
        """Return True if every setting that is not refused has an answer to every prompt."""
        return not (self.interrupted or self.runner.lost or self.failed)


def run(options: argparse.Namespace) -> int:
    """Measure the missing answers and write a report on all of them.

    Returns:
        0; 1 if answers are missing; 130 if the run was interrupted.

    Raises:
        ConfigError: a file or an option is wrong.
        AlignError: the endpoint cannot be reached, or no setting could be measured.
    """
    grid = read_grid(options.grid)
    prompts = _prompts(options)
    notebook_path = options.notebook or options.report.with_suffix(".jsonl")
    require_matplotlib("--report")
    for path in (options.report, notebook_path, options.json):
        if path:
            check_writable(path)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        measurement = runner.run(_measure(options, grid, prompts, notebook_path))
    results = _results(options, grid, prompts, measurement)
    options.report.write_text(render_page(results), encoding="utf-8")
    if options.json:
        _write_json(options.json, results, measurement)
    _print_points(results.points)
    for warning in results.warnings:
        OUT.print(f"[bold red]warning:[/] {escape(warning)}", highlight=False)
    for name, reason in results.unmeasured.items():
        OUT.print(f"[yellow]{escape(name)}[/]: {escape(reason)}", highlight=False)
    ERR.print(f"written: {options.report}", highlight=False, markup=False)
    if not results.points and not measurement.interrupted:
        reason = next(iter(results.unmeasured.values()), "the scorer gave no answer a score")
        raise AlignError(f"no setting could be measured; first: {reason}")
    return _exit_code(measurement, notebook_path)


def _results(
    options: argparse.Namespace, grid: Grid, prompts: Sequence[ChatPrompt], measurement: Measurement
) -> Results:
    table = _table(options, grid, prompts, measurement)
    points = make_points(table, grid)
    target = measurement.runner.endpoint.target
    advice: dict[Cost, list[Advice]] = {
        cost: make_advice(table, points, options.seed, cost) for cost in COSTS
    }
    headline = make_headline(points, grid.baseline)
    selected = selected_by_gold(grid.cells, options.gold, measurement.names)
    warnings = describe_gold_selection(selected)
    warnings += kl_warnings(points, headline, advice, options.kl_limit)
    work = plan_work(grid.cells, prompts, 1, options.seed)
    facts = {
        "endpoint": target.place,
        "model": target.model,
        "gold": options.gold,
        "prompts": len(prompts),
        "draws per prompt": options.draws,
        "requests under way": options.concurrency,
        "seed": options.seed,
        "baseline": grid.baseline,
        "infer-align": version("infer-align"),
        "complete": measurement.complete,
    }
    return Results(
        points=points,
        advice=advice,
        headline=headline,
        unmeasured=_unmeasured(grid, points, measurement.runner),
        facts=facts,
        answers=choose_answers(grid.cells, prompts, work, measurement.notebook.rows),
        warnings=warnings,
    )


def _write_json(path: Path, results: Results, measurement: Measurement) -> None:
    report = {
        "schema": SCHEMA,
        **results.facts,
        "refused": measurement.runner.refused,
        "failed": measurement.failed,
        "warnings": list(results.warnings),
        **as_json(results.points, results.advice),
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _exit_code(measurement: Measurement, notebook_path: Path) -> int:
    """Print why the measurement is not complete, and return the exit code."""
    answers = len(measurement.notebook.rows)
    advice = escape(
        f"{answers} answers are kept in {notebook_path}; "
        "run the same command again to continue from there."
    )
    if measurement.interrupted:
        ERR.print(f"[yellow]interrupted:[/] {advice}", highlight=False)
        return INTERRUPTED
    if measurement.runner.lost:
        ERR.print(
            f"[red]given up:[/] {MAX_CONSECUTIVE_FAILURES} requests failed one after the other. "
            f"{advice}",
            highlight=False,
        )
        return 1
    failures = sum(measurement.failed.values())
    if failures:
        ERR.print(
            f"[red]not complete:[/] {failures} answers could not be received or scored. {advice}",
            highlight=False,
        )
        return 1
    return 0


def _table(
    options: argparse.Namespace, grid: Grid, prompts: Sequence[ChatPrompt], measurement: Measurement
) -> Table:
    """Return the scores of the answers that this run measures or found in the notebook."""
    runner = measurement.runner
    rows = measurement.notebook.rows
    work = plan_work(grid.cells, prompts, 1, options.seed)
    attempted = set()
    for name, failures in runner.failures.items():
        for failure in failures:
            attempted.add((name, failure.prompt))
    # Prompts that some setting has not answered yet, without a failure.
    pending = set()
    for item in work:
        name = item.cell.name
        answered = (item.key, 0) in rows or (name, item.prompt) in attempted
        if not answered and name not in runner.refused:
            pending.add(item.prompt)
    keys = {(item.cell.name, item.prompt): item.key for item in work}
    current_rows = (row for row in rows.values() if row.draw < options.draws)
    return Table(grid, current_rows, keys, pending, _shared_fields(options, prompts))


def _shared_fields(options: argparse.Namespace, prompts: Sequence[ChatPrompt]) -> set[str]:
    """Return the body fields that requests have under every setting."""
    names = set()
    for fields in (body_fields(options), *(prompt.body for prompt in prompts)):
        for name, value in fields.items():
            if value is not None:
                names.add(name)
    return names


def _unmeasured(grid: Grid, points: Sequence[Point], runner: Runner) -> dict[str, str]:
    """Return the reasons of missing figures, by setting."""
    missing = {point.cell.name: point.missing for point in points}
    reasons = {}
    for cell in grid.cells:
        name = cell.name
        if name in runner.refused:
            reasons[name] = f"refused: {runner.refused[name]}"
            continue
        failures = runner.failures.get(name, [])
        parts = []
        if failures:
            parts.append(f"{len(failures)} answers failed; first: {failures[0].reason}")
        if missing.get(name):
            parts.append(
                f"{missing[name]} prompts have no score, so it is on no front and in no advice"
            )
        if name not in missing and not failures:
            parts.append("no answer has a score")
        if parts:
            reasons[name] = "; ".join(parts)
    return reasons


async def _measure(
    options: argparse.Namespace, grid: Grid, prompts: Sequence[ChatPrompt], path: Path
) -> Measurement:
    target = Target(
        name="A",
        base_url=options.base_url,
        model=options.model,
        body=body_fields(options),
        stream=False,
        key=ApiKey.from_environment(options.api_key_env),
    )
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(Endpoint(target, options.timeout, options.seed))
        await endpoint.find_model()
        scoring_target = _scoring_target(options, target)
        scoring = await stack.enter_async_context(
            Endpoint(scoring_target, options.timeout, options.seed)
        )
        gold = load_scorer(options.gold, scoring)
        notebook = Notebook(path, _made_with(options, endpoint, scoring))
        runner = Runner(endpoint, gold, prompts, notebook)
        names = await _server_names(options, endpoint, scoring)
        work = plan_work(grid.cells, prompts, options.draws, options.seed)
        stop = asyncio.Event()
        stack.enter_context(stop_on_signals(stop))
        with _progress_bar(work, notebook) as advance:
            interrupted = await runner.run(work, options.concurrency, stop, advance)
    return Measurement(runner, notebook, interrupted, names)


async def _server_names(
    options: argparse.Namespace, endpoint: Endpoint, scoring: Endpoint
) -> ServerNames:
    """Return the rewards of the measured server, if it is the one that scores.

    Rewards of two servers may have one name and be different ones.
    """
    if not uses_server(options.gold) or scoring.target.place != endpoint.target.place:
        return ServerNames()
    return await read_names(endpoint)


def _scoring_target(options: argparse.Namespace, target: Target) -> Target:
    """Return the server that scores; it gets the measured server's key if it is the same."""
    url = options.gold_url or options.base_url
    env = options.gold_api_key_env
    key = target.key
    if env is not None or not same_server(url, options.base_url):
        key = ApiKey.from_environment(env, "--gold-api-key-env")
    return replace(target, base_url=url, key=key)


def _made_with(
    options: argparse.Namespace, endpoint: Endpoint, scoring: Endpoint
) -> dict[str, Any]:
    """Return everything that influences answers or scores, except for the settings."""
    return {
        "format": FORMAT,
        "endpoint": endpoint.target.place,
        "model": endpoint.target.model,
        "gold": options.gold,
        "gold endpoint": scoring.target.place if uses_server(options.gold) else None,
        "seed": options.seed,
        "body": body_fields(options),
    }


@contextlib.contextmanager
def _progress_bar(work: Sequence[Work], notebook: Notebook) -> Iterator[Callable[[], None]]:
    """Show a progress bar; yield the callback that advances it by one answer."""
    columns = (
        TextColumn("measuring"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    finished = sum((item.key, item.draw) in notebook.rows for item in work)
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("", total=len(work), completed=finished)
        yield lambda: bar.advance(task)


def _prompts(options: argparse.Namespace) -> list[ChatPrompt]:
    """Return the prompts without duplicates, which would count as independent prompts."""
    if options.prompts == "demo":
        prompts = datasets.demo(options.seed)
    else:
        prompts = datasets.from_file(Path(options.prompts))
    unique: dict[str, ChatPrompt] = {}
    for prompt in prompts:
        # A later duplicate equals the earlier one, whose place it takes.
        unique[json.dumps([prompt.messages, prompt.body], sort_keys=True)] = prompt
    duplicates = len(prompts) - len(unique)
    if duplicates:
        ERR.print(f"[yellow]{duplicates} duplicate prompts are left out.[/]", highlight=False)
    result = list(unique.values())
    if options.limit:
        result = result[: options.limit]
    if len(result) < 2:
        raise ConfigError(
            f"--prompts: {len(result)} prompt is too few for a standard error; give two or more."
        )
    return result


def _print_points(points: Sequence[Point]) -> None:
    columns = ("setting", "tokens", "seconds", "gold", "- baseline", "- equal budget", "KL, nats")
    table = TextTable(*columns, box=None, header_style="dim")
    for point in points:
        table.add_row(
            escape(point.cell.name),
            number(point.tokens.value) if point.tokens else "",
            number(point.seconds.value),
            _mean(point.gold),
            _mean(point.minus_baseline, "+"),
            _mean(point.minus_equal, "+"),
            _kl(point),
            style="bold" if point.front else None,
        )
    OUT.print(table)


def _kl(point: Point) -> str:
    if point.kl_bound:
        return f"<= {point.kl_bound:.2f}"
    return "0" if point.kl_bound == 0 else _mean(point.kl)


def _mean(mean: Mean | None, sign: str = "") -> str:
    """Format a mean and its standard error; `sign` is "+" to print the sign of the mean."""
    if mean is None:
        return ""
    return f"{mean.value:{sign}.{mean.decimals}f} ± {mean.error:.{mean.decimals}f}"
