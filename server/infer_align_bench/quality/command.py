"""`infer-align bench quality`: every setting of a grid on the same prompts, scored, compared, and what to use."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop
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
from rich.table import Table as Printed

from infer_align.errors import AlignError, ConfigError
from infer_align_bench import prompts as datasets
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.keys import Key, same_server
from infer_align_bench.plot import need_matplotlib
from infer_align_bench.quality import grid as grids
from infer_align_bench.quality.advice import advice, headline
from infer_align_bench.quality.cells import FORMAT, PATIENCE, Notebook, Runner, work
from infer_align_bench.quality.curve import COSTS, Mean, Point, Table, points
from infer_align_bench.quality.export import as_json
from infer_align_bench.quality.gold import scorer, served
from infer_align_bench.quality.html import page
from infer_align_bench.serve import INTERRUPTED, caught_signals, check_writable
from infer_align_bench.show import number
from infer_align_bench.types import Prompt, Target

SCHEMA = "infer-align/bench-quality/2"
OUT = Console(width=max(80, Console().width))
ERR = Console(stderr=True)


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, report on what there is; 1 where an answer is missing in the end, 130 when interrupted.

    Raises:
        ConfigError: a file or an option is wrong.
        AlignError: the endpoint cannot be reached, or nothing could be measured.
    """
    grid, prompts = grids.read(options.grid), _prompts(options)
    notebook_path = options.notebook or options.report.with_suffix(".jsonl")
    need_matplotlib("--report")
    for path in filter(None, (options.report, notebook_path, options.json)):
        check_writable(path)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        interrupted, notebook, done = runner.run(_measure(options, grid, prompts, notebook_path))
    table = _table(options, grid, prompts, notebook, done)
    found = points(table, grid)
    failed = {name: len(said) for name, said in done.failures.items() if name not in done.refused}
    complete = not (interrupted or done.lost or failed)
    facts = {
        "endpoint": done.endpoint.target.place,
        "model": done.endpoint.target.model,
        "gold": options.gold,
        "prompts": len(prompts),
        "draws per prompt": options.draws,
        "requests under way": options.concurrency,
        "seed": options.seed,
        "baseline": grid.baseline,
        "infer-align": version("infer-align"),
        "complete": complete,
    }
    advised = {cost: advice(table, found, options.seed, cost) for cost in COSTS}
    unmeasured = _unmeasured(grid, found, done)
    options.report.write_text(
        page(found, advised, headline(found, grid.baseline), unmeasured, facts), encoding="utf-8"
    )
    if options.json:
        made = {
            "schema": SCHEMA,
            **facts,
            "refused": done.refused,
            "failed": failed,
            **as_json(found, advised),
        }
        options.json.write_text(
            json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    _show(found, unmeasured)
    ERR.print(f"written: {options.report}", highlight=False, markup=False)
    if not found and not interrupted:
        first = next(iter(unmeasured.values()), "the scorer had no opinion on any answer")
        raise AlignError(f"no setting could be measured; first: {first}")
    return _ended(
        interrupted,
        done,
        sum(failed.values()),
        f"{len(notebook.rows)} answers are kept in {notebook_path}",
    )


def _ended(interrupted: bool, done: Runner, failed: int, kept: str) -> int:  # noqa: FBT001 - a fact, no switch
    again = f"{kept}; the same command goes on from there."
    if interrupted:
        ERR.print(f"[yellow]interrupted:[/] {escape(again)}", highlight=False)
        return INTERRUPTED
    if done.lost:
        ERR.print(
            f"[red]given up:[/] {PATIENCE} requests failed one after the other. {escape(again)}",
            highlight=False,
        )
    elif failed:
        ERR.print(
            f"[red]not complete:[/] {failed} answers could not be had or scored. {escape(again)}",
            highlight=False,
        )
    return 1 if done.lost or failed else 0


def _table(
    options: argparse.Namespace,
    grid: grids.Grid,
    prompts: list[Prompt],
    notebook: Notebook,
    done: Runner,
) -> Table:
    """The answers that this run asked for; prompts that not every setting has been asked yet are pending."""
    wanted = work(grid.cells, prompts, 1, options.seed)
    tried = {(name, one.prompt) for name, found in done.failures.items() for one in found}
    pending = {
        one.prompt
        for one in wanted
        if (one.key, 0) not in notebook.rows
        and one.cell.name not in done.refused
        and (one.cell.name, one.prompt) not in tried
    }
    keys = {(one.cell.name, one.prompt): one.key for one in wanted}
    rows = (row for row in notebook.rows.values() if row.draw < options.draws)
    fields = {
        name
        for fields in (_body(options), *(prompt.body for prompt in prompts))
        for name, v in fields.items()
        if v is not None
    }
    return Table(grid, rows, keys, pending, fields)


def _unmeasured(grid: grids.Grid, found: list[Point], done: Runner) -> dict[str, str]:
    """Settings without figures, or without some of them, and why."""
    missing = {point.cell.name: point.missing for point in found}
    said: dict[str, str] = {}
    for cell in grid.cells:
        failures = done.failures.get(cell.name, [])
        if cell.name in done.refused:
            said[cell.name] = f"refused: {done.refused[cell.name]}"
            continue
        parts = [f"{len(failures)} answers failed; first: {failures[0].why}"] if failures else []
        if missing.get(cell.name):
            parts.append(
                f"{missing[cell.name]} prompts have no score, so it is on no front and in no advice"
            )
        if cell.name not in missing and not failures:
            parts.append("no answer has a score")
        if parts:
            said[cell.name] = "; ".join(parts)
    return said


def _body(options: argparse.Namespace) -> dict[str, Any]:
    return (
        {"max_tokens": options.max_tokens, **options.body}
        if options.max_tokens
        else dict(options.body)
    )


async def _measure(
    options: argparse.Namespace, grid: grids.Grid, prompts: list[Prompt], path: Path
) -> tuple[bool, Notebook, Runner]:
    body = _body(options)
    key, env = Key.named(options.api_key_env), options.gold_api_key_env
    target = Target("A", options.base_url, options.model, None, body, stream=False, key=key)
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(Endpoint(target, options.timeout, options.seed))
        await endpoint.find_model()
        url = options.gold_url or options.base_url
        if env is not None or not same_server(url, options.base_url):
            key = Key.named(env, "--gold-api-key-env")
        judging = replace(target, base_url=url, key=key)
        judge = await stack.enter_async_context(Endpoint(judging, options.timeout, options.seed))
        # What would give other answers or other scores; a notebook of anything else is not gone on with.
        made_with = {
            "format": FORMAT,
            "endpoint": endpoint.target.place,
            "model": endpoint.target.model,
            "gold": options.gold,
            "gold endpoint": judge.target.place if served(options.gold) else None,
            "seed": options.seed,
            "body": body,
        }
        gold = scorer(options.gold, judge)
        notebook = Notebook(path, made_with)
        runner = Runner(endpoint, gold, prompts, notebook)
        wanted = work(grid.cells, prompts, options.draws, options.seed)
        stop = asyncio.Event()
        stack.enter_context(caught_signals(stop))
        columns = (
            TextColumn("measuring"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=ERR, transient=True) as bar:
            done = sum((one.key, one.draw) in notebook.rows for one in wanted)
            task = bar.add_task("", total=len(wanted), completed=done)
            interrupted = await runner.run(
                wanted, options.concurrency, stop, lambda: bar.advance(task)
            )
    return interrupted, notebook, runner


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """Each prompt once: asked twice, it would pass for two that are drawn from the population."""
    found = (
        datasets.demo(options.seed)
        if options.prompts == "demo"
        else datasets.from_file(Path(options.prompts))
    )
    once = list(
        {
            json.dumps([prompt.messages, prompt.body], sort_keys=True): prompt for prompt in found
        }.values()
    )
    if len(once) < len(found):
        ERR.print(
            f"[yellow]{len(found) - len(once)} prompts stand twice and are asked once.[/]",
            highlight=False,
        )
    if options.limit:
        once = once[: options.limit]
    if len(once) < 2:
        raise ConfigError("--prompts: one prompt says nothing of the next; give two or more.")
    return once


def _show(found: list[Point], unmeasured: Mapping[str, str]) -> None:
    table = Printed(
        "setting",
        "tokens",
        "seconds",
        "gold",
        "- baseline",
        "- equal budget",
        box=None,
        header_style="dim",
    )
    for point in found:
        means = (point.tokens, point.seconds)
        cells = [
            escape(point.cell.name),
            *("" if mean is None else number(mean.value) for mean in means),
            _mean(point.gold),
        ]
        cells += [_mean(mean, "+") for mean in (point.minus_baseline, point.minus_equal)]
        table.add_row(*cells, style="bold" if point.front else None)
    OUT.print(table)
    for name, why in unmeasured.items():
        OUT.print(f"[yellow]{escape(name)}[/]: {escape(why)}", highlight=False)


def _mean(mean: Mean | None, sign: str = "") -> str:
    return (
        ""
        if mean is None
        else f"{mean.value:{sign}.{mean.decimals}f} ± {mean.error:.{mean.decimals}f}"
    )
