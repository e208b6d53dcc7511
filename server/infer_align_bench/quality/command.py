"""`infer-align bench quality`: every setting of a grid on the same prompts, scored, compared, and what to use."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import uvloop
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Printed

from infer_align.errors import AlignError, ConfigError
from infer_align_bench import prompts as datasets
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.keys import Key, same_server
from infer_align_bench.plot import need_matplotlib
from infer_align_bench.quality import grid as grids
from infer_align_bench.quality.cells import Notebook, Runner, work
from infer_align_bench.quality.curve import COSTS, Mean, Point, Table, advice, as_json, points
from infer_align_bench.quality.gold import scorer
from infer_align_bench.quality.html import page
from infer_align_bench.serve import INTERRUPTED, caught_signals, check_writable
from infer_align_bench.types import Prompt, Target

SCHEMA = "infer-align/bench-quality/1"
OUT = Console(width=max(120, Console().width))
ERR = Console(stderr=True)


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, report on what there is; 1 where no setting could be measured, 130 when interrupted.

    Raises:
        ConfigError: a file or an option is wrong.
        AlignError: the endpoint or the scorer failed.
    """
    grid, prompts = grids.read(options.grid), _prompts(options)
    notebook_path = options.notebook or options.report.with_suffix(".jsonl")
    need_matplotlib("--report")
    for path in filter(None, (options.report, notebook_path, options.json)):
        check_writable(path)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        interrupted, notebook, done, model = runner.run(_measure(options, grid, prompts, notebook_path))
    keys = {(one.cell.name, one.prompt): one.key for one in work(grid.cells, prompts, 1, options.seed)}
    table = Table(grid, (row for row in notebook.rows.values() if row.draw < options.draws), keys)
    found = points(table, grid)
    advised = {cost: advice(table, found, options.seed, cost) for cost in COSTS}
    facts = {
        "endpoint": done.endpoint.target.place, "model": model, "gold": options.gold, "prompts": len(prompts),
        "draws per prompt": options.draws, "requests under way": options.concurrency, "seed": options.seed,
        "baseline": grid.baseline, "infer-align": version("infer-align"), "complete": not interrupted,
    }  # fmt: skip
    failed = {name: len(said) for name, said in done.failed.items()}
    options.report.write_text(page(found, advised, done.refused, failed, facts), encoding="utf-8")
    if options.json:
        made = {"schema": SCHEMA, **facts, "refused": done.refused, "failed": failed, **as_json(found, advised)}
        options.json.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _show(found, done)
    ERR.print(f"written: {options.report}", highlight=False, markup=False)
    if interrupted:
        kept = f"{len(notebook.rows)} answers are kept in {notebook_path}; the same command goes on from there."
        ERR.print(f"[yellow]interrupted:[/] {escape(kept)}", highlight=False)
        return INTERRUPTED
    if not found:
        said = [*done.refused.values(), *(failures[0] for failures in done.failed.values())]
        first = said[0] if said else "the scorer had no opinion on any answer"
        raise AlignError(f"no setting could be measured; first: {first}")
    return 0


async def _measure(
    options: argparse.Namespace, grid: grids.Grid, prompts: list[Prompt], path: Path
) -> tuple[bool, Notebook, Runner, str | None]:
    body = {"max_tokens": options.max_tokens, **options.body} if options.max_tokens else options.body
    key, env = Key.named(options.api_key_env), options.gold_api_key_env
    target = Target("A", options.base_url, options.model, None, body, stream=False, key=key)
    async with contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(Endpoint(target, options.timeout, options.seed))
        await endpoint.find_model()
        url = options.gold_url or options.base_url
        if env is not None or not same_server(url, options.base_url):
            key = Key.named(env, "--gold-api-key-env")
        judging = replace(target, base_url=url, key=key)
        gold = scorer(options.gold, await stack.enter_async_context(Endpoint(judging, options.timeout, options.seed)))
        made_with = {"model": endpoint.target.model, "gold": options.gold, "seed": options.seed, "body": body}
        notebook = Notebook(path, made_with)
        runner = Runner(endpoint, gold, prompts, notebook)
        wanted = work(grid.cells, prompts, options.draws, options.seed)
        stop = asyncio.Event()
        stack.enter_context(caught_signals(stop))
        columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=ERR, transient=True) as bar:
            done = sum((one.key, one.draw) in notebook.rows for one in wanted)
            task = bar.add_task("", total=len(wanted), completed=done)
            interrupted = await runner.run(wanted, options.concurrency, stop, lambda: bar.advance(task))
    return interrupted, notebook, runner, endpoint.target.model


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    found = datasets.demo(options.seed) if options.prompts == "demo" else datasets.from_file(Path(options.prompts))
    if options.limit:
        found = found[: options.limit]
    if len(found) < 2:
        raise ConfigError("--prompts: one prompt says nothing of the next; give two or more.")
    return found


def _show(found: list[Point], done: Runner) -> None:
    heads = ("setting", "tokens", "seconds", "KL at most", "gold", "- baseline", "- greedy", "- equal budget")
    table = Printed(*heads, box=None, header_style="dim")
    for point in found:
        kl = "" if point.cell.kl_bound is None else f"{point.cell.kl_bound:.2f}"
        means = (point.gold, point.minus_baseline, point.minus_greedy, point.minus_equal)
        cells = [escape(point.cell.name), f"{point.tokens:.3g}", f"{point.seconds:.3g}", kl, *(_mean(mean) for mean in means)]
        table.add_row(*cells, style="bold" if point.front else None)
    OUT.print(table)
    for name, why in done.refused.items():
        OUT.print(f"[yellow]{escape(name)}[/]: refused: {escape(why)}", highlight=False)
    for name, said in done.failed.items():
        OUT.print(f"[red]{escape(name)}[/]: {len(said)} requests failed; first: {escape(said[0])}", highlight=False)


def _mean(mean: Mean | None) -> str:
    return "" if mean is None else f"{mean.value:+.{mean.decimals}f} ± {mean.error:.{mean.decimals}f}"
