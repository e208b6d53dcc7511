"""`infer-align bench serve`: load on one endpoint, or on two beside each other, and what became of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infer_align.errors import AlignError, ConfigError
from infer_align_bench import load as loops
from infer_align_bench import prompts as datasets
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.figures import GOALS
from infer_align_bench.keys import Key, same_server
from infer_align_bench.plot import need_matplotlib, plot
from infer_align_bench.report import report
from infer_align_bench.show import show
from infer_align_bench.types import Load, Prompt, Run, Sample, Target

OUT = Console(width=max(80, Console().width))
ERR = Console(stderr=True)
INTERRUPTED = 130
WARMUP = 4  # requests, unless more are under way at once
WARMUP_FIRST = 1_000_000_000  # their index, and so their seed: no measured request has it


def run(options: argparse.Namespace) -> int:
    """Measure, print and keep; 0, 1 where no request was answered, 130 when interrupted with what there was.

    Raises:
        ConfigError: the options do not go together, or a file cannot be read or written.
        AlignError: an endpoint cannot be reached, refuses the key, or does not serve the model.
    """
    load, targets, goals = _load(options), _targets(options), _goals(options.goodput)
    prompts, dataset = _prompts(options, load)
    if options.no_stream and (goals.keys() & {"ttft", "tpot"}):
        raise ConfigError(
            "--goodput: ttft and tpot need streaming; leave out --no-stream, or set a goal for e2e."
        )
    for path in filter(None, (options.json, options.plot)):
        check_writable(path)
    if options.plot:
        need_matplotlib("--plot")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        warmup = max(WARMUP, load.concurrency or 1) if options.warmup is None else options.warmup
        measured, targets = runner.run(_measure(load, targets, prompts, warmup))
    if measured.interrupted and not measured.samples:
        ERR.print(
            "[yellow]interrupted:[/] nothing was measured, nothing is written.", highlight=False
        )
        return INTERRUPTED
    found = report(measured, targets, load, goals, dataset)
    _keep(found, options)
    show(found, OUT)
    if measured.interrupted:
        waited = f", {measured.unsent} that were due had not been sent" if measured.unsent else ""
        said = (
            f"{measured.abandoned} requests under way were given up{waited}; these are the others."
        )
        ERR.print(f"[yellow]interrupted:[/] {said}", highlight=False)
        return INTERRUPTED
    dead = [name for name, of in found["targets"].items() if not of["requests"]["answered"]]
    if dead:
        raise AlignError(
            f"no request to {' or '.join(dead)} was answered: {_first_error(measured.samples, dead[0])}"
        )
    return 0


async def _measure(
    load: Load, targets: Sequence[Target], prompts: Sequence[Prompt], warmup: int
) -> tuple[Run, list[Target]]:
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        endpoints = [
            await stack.enter_async_context(Endpoint(t, load.timeout, load.seed)) for t in targets
        ]
        for endpoint in endpoints:
            await endpoint.find_model()
        stack.enter_context(caught_signals(stop))
        senders = {endpoint.target.name: endpoint.send for endpoint in endpoints}
        if warmup:
            await _warm_up(load, prompts, senders, stop, warmup)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=ERR,
            transient=True,
        ) as bar:
            task = bar.add_task("measuring", total=load.requests and load.requests * len(targets))
            if stop.is_set():
                measured = Run((), 0.0, interrupted=True)
            else:
                measured = await loops.run(
                    load, prompts, senders, stop, lambda _: bar.advance(task)
                )
    return measured, [endpoint.target for endpoint in endpoints]


@contextlib.contextmanager
def caught_signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, until the end."""
    loop, caught = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for one in caught:
        loop.add_signal_handler(one, stop.set)
    try:
        yield
    finally:
        for one in caught:
            loop.remove_signal_handler(one)


async def _warm_up(
    load: Load,
    prompts: Sequence[Prompt],
    senders: Mapping[str, loops.Sender],
    stop: asyncio.Event,
    requests: int,
) -> None:
    """A closed loop of a few requests, not counted; where all of them fail, so will the rest.

    Their prompts begin otherwise than any that is measured, and so do their seeds: no cache holds what will be asked.
    """
    places = load.concurrency or min(requests, 8)
    bound = min(load.duration or load.timeout, load.timeout)
    before = Load(
        places, None, requests, bound, load.grace, load.timeout, seed=load.seed, first=WARMUP_FIRST
    )
    marked = [
        datasets.marked(prompt, f"Warm-up {i}.")
        for i, prompt in enumerate(prompts[: requests * len(senders)])
    ]
    done = await loops.run(before, marked, senders, stop)
    for name in sorted({sample.target for sample in done.samples}):
        if not any(sample.ok for sample in done.samples if sample.target == name):
            raise AlignError(
                f"every request of the warm-up failed at {name}: {_first_error(done.samples, name)}"
            )


def _first_error(samples: Sequence[Sample], target: str) -> str:
    first = next((sample for sample in samples if sample.target == target and not sample.ok), None)
    return f"{first.error}: {first.message}" if first else "none was sent in the time given."


def _keep(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        partial = options.json.with_name(options.json.name + ".part")
        partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(options.json)
        ERR.print(f"written: {options.json}", highlight=False, markup=False)
    if options.plot:
        plot(found, options.plot)
        ERR.print(f"written: {options.plot}", highlight=False, markup=False)


def check_writable(path: Path) -> None:
    """Before the load, not after it."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written; its folder must exist.")


def _load(options: argparse.Namespace) -> Load:
    if options.rate is not None and options.concurrency is not None:
        raise ConfigError(
            "--concurrency and --rate: one of them; a closed loop keeps so many requests under way, an open loop sends at a rate."
        )
    if options.max_in_flight is not None and options.rate is None:
        raise ConfigError(
            "--max-in-flight: only with --rate; in a closed loop --concurrency says it."
        )
    requests = options.requests or (None if options.duration else 200)
    concurrency = None if options.rate is not None else options.concurrency or 1
    return Load(
        concurrency,
        options.rate,
        requests,
        options.duration,
        options.grace,
        options.timeout,
        options.max_in_flight,
        options.seed,
    )


def _targets(options: argparse.Namespace) -> list[Target]:
    body = (
        {"max_tokens": options.max_tokens, **options.body} if options.max_tokens else options.body
    )
    key = Key.named(options.api_key_env)
    ours = Target(
        "A", options.base_url, options.model, options.align, body, not options.no_stream, key
    )
    if all(
        getattr(options, name) is None for name in ("against", "against_model", "against_align")
    ):
        return [ours]
    url, env = options.against or options.base_url, options.against_api_key_env
    model = options.against_model or (options.model if options.against is None else None)
    other = (
        key
        if env is None and same_server(url, options.base_url)
        else Key.named(env, "--against-api-key-env")
    )
    return [
        ours,
        replace(ours, name="B", base_url=url, model=model, align=options.against_align, key=other),
    ]


def _goals(text: str | None) -> dict[str, float]:
    """Milliseconds by name, from "ttft:200,e2e:1000"."""
    goals = {}
    for part in filter(None, (text or "").split(",")):
        name, _, limit = part.strip().partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not 0 < goals[name] < math.inf:
            raise ConfigError(
                f"--goodput: {part!r} is not allowed; must be like ttft:200,e2e:1000, of {', '.join(GOALS)}, in ms."
            )
    return goals


def _prompts(options: argparse.Namespace, load: Load) -> tuple[list[Prompt], dict[str, Any]]:
    lengths = {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
    if options.dataset == "demo":
        return datasets.demo(load.seed), {"name": "demo"}
    if options.dataset == "synthetic":
        return datasets.synthetic(
            load.requests or 1000, options.input_tokens, options.output_tokens, load.seed
        ), {
            "name": "synthetic",
            **lengths,
        }
    return datasets.from_file(Path(options.dataset)), {"name": options.dataset}
