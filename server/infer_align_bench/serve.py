"""Run `infer-align bench serve`: apply a load to one endpoint or two, and report the result."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from infer_align.errors import AlignError, ConfigError
from infer_align_bench import prompts as datasets
from infer_align_bench.arguments import body_fields
from infer_align_bench.credentials import ApiKey, same_server
from infer_align_bench.endpoint import Endpoint
from infer_align_bench.load import Sender, apply_load
from infer_align_bench.plot import check_format, plot, require_matplotlib
from infer_align_bench.report import build_report
from infer_align_bench.runtime import INTERRUPTED, check_writable, loop_factory, stop_on_signals
from infer_align_bench.summary import GOALS
from infer_align_bench.tables import print_report
from infer_align_bench.types import ChatPrompt, Load, Run, Sample, Target

OUT = Console(width=max(80, Console().width))
ERR = Console(stderr=True)
DEFAULT_REQUESTS = 200
# Prompts of a synthetic dataset if the run has no number of requests.
SYNTHETIC_PROMPTS = 1000
# Warm-up requests, unless more are in flight at the same time.
MIN_WARMUP = 4
# Concurrency of the warm-up of an open loop.
MAX_WARMUP_CONCURRENCY = 8
# Index of the first warm-up request. Seeds follow from the index, so that no measured request has
# the seed of a warm-up request.
WARMUP_FIRST = 1_000_000_000


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the result.

    Returns:
        0, or 130 if the run was interrupted (the partial result is written).

    Raises:
        ConfigError: the options contradict each other, or a file cannot be read or written.
        AlignError: an endpoint cannot be reached, refuses the key, does not serve the model, or
            answers no request.
    """
    load = _load(options)
    targets = _targets(options)
    goals = _goals(options.goodput)
    prompts, dataset = _prompts(options, load)
    if options.no_stream and goals.keys() & {"ttft", "tpot"}:
        raise ConfigError(
            "--goodput: ttft and tpot need streaming; leave out --no-stream, or set a goal for e2e."
        )
    for path in (options.json, options.plot):
        if path:
            check_writable(path)
    if options.plot:
        require_matplotlib("--plot")
        check_format(options.plot, "--plot")
    warmup = options.warmup
    if warmup is None:
        warmup = max(MIN_WARMUP, load.concurrency or 1)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        measured, targets = runner.run(_measure(load, targets, prompts, warmup))
    if measured.interrupted and not measured.samples:
        _print_interrupt("nothing was measured, nothing is written.")
        return INTERRUPTED
    report = build_report(measured, targets, load, goals, dataset)
    _write(report, options)
    print_report(report, OUT)
    if measured.interrupted:
        _print_interrupt(_interrupt_summary(measured))
        return INTERRUPTED
    _require_answers(report, measured)
    return 0


async def _measure(
    load: Load, targets: Sequence[Target], prompts: Sequence[ChatPrompt], warmup: int
) -> tuple[Run, list[Target]]:
    """Warm up and run; return the run and the targets with their models."""
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        endpoints = []
        for target in targets:
            endpoint = Endpoint(target, load.timeout, load.seed)
            endpoints.append(await stack.enter_async_context(endpoint))
        for endpoint in endpoints:
            await endpoint.find_model()
        stack.enter_context(stop_on_signals(stop))
        senders = {endpoint.target.name: endpoint.send for endpoint in endpoints}
        if warmup:
            await _warm_up(load, prompts, senders, stop, warmup)
        total = load.requests * len(targets) if load.requests else None
        with _progress_bar(total) as on_sample:
            if stop.is_set():
                measured = Run((), 0.0, interrupted=True)
            else:
                measured = await apply_load(load, prompts, senders, stop, on_sample)
    return measured, [endpoint.target for endpoint in endpoints]


@contextlib.contextmanager
def _progress_bar(total: int | None) -> Iterator[Callable[[Sample], None]]:
    """Show a progress bar; yield the callback that advances it by one sample."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=ERR, transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda _: bar.advance(task)


async def _warm_up(
    load: Load,
    prompts: Sequence[ChatPrompt],
    senders: Mapping[str, Sender],
    stop: asyncio.Event,
    requests: int,
) -> None:
    """Send a few requests that are not counted.

    Their prompts have a prefix and their seeds differ from those of the run, so that no cache of
    the endpoint holds a request that will be measured.

    Raises:
        AlignError: every request to a target failed.
    """
    warmup = Load(
        concurrency=load.concurrency or min(requests, MAX_WARMUP_CONCURRENCY),
        requests=requests,
        duration=min(load.duration or load.timeout, load.timeout),
        grace=load.grace,
        timeout=load.timeout,
        seed=load.seed,
        first=WARMUP_FIRST,
    )
    warmup_prompts = []
    for i, prompt in enumerate(prompts[: requests * len(senders)]):
        warmup_prompts.append(datasets.with_prefix(prompt, f"Warm-up {i}."))
    measured = await apply_load(warmup, warmup_prompts, senders, stop)
    answered = {sample.target for sample in measured.samples if sample.ok}
    failed = {sample.target for sample in measured.samples} - answered
    if failed:
        name = min(failed)
        error = _first_error(measured.samples, name)
        raise AlignError(f"every request of the warm-up failed at {name}: {error}")


def _require_answers(report: Mapping[str, Any], measured: Run) -> None:
    unanswered = []
    for name, target in report["targets"].items():
        if not target["requests"]["answered"]:
            unanswered.append(name)
    if unanswered:
        error = _first_error(measured.samples, unanswered[0])
        raise AlignError(f"no request to {' or '.join(unanswered)} was answered: {error}")


def _first_error(samples: Sequence[Sample], target: str) -> str:
    for sample in samples:
        if sample.target == target and not sample.ok:
            return f"{sample.error}: {sample.message}"
    return "no request was sent in the time of the run."


def _print_interrupt(text: str) -> None:
    ERR.print(f"[yellow]interrupted:[/] {text}", highlight=False)


def _interrupt_summary(measured: Run) -> str:
    unsent = ""
    if measured.unsent:
        unsent = f", and {measured.unsent} due requests had not been sent"
    return (
        f"{measured.abandoned} requests in flight were given up{unsent}; "
        "the result contains the other requests."
    )


def _write(report: Mapping[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        # Replace the file in one step, so that an interrupt never leaves half a file.
        partial = options.json.with_name(options.json.name + ".part")
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        partial.replace(options.json)
        ERR.print(f"written: {options.json}", highlight=False, markup=False)
    if options.plot:
        plot(report, options.plot)
        ERR.print(f"written: {options.plot}", highlight=False, markup=False)


def _load(options: argparse.Namespace) -> Load:
    if options.rate is not None and options.concurrency is not None:
        raise ConfigError(
            "--concurrency and --rate: only one of them is allowed; --concurrency keeps a number "
            "of requests in flight, --rate sends requests at a rate."
        )
    if options.max_in_flight is not None and options.rate is None:
        raise ConfigError(
            "--max-in-flight: only allowed with --rate; "
            "without it, --concurrency is the number of requests in flight."
        )
    requests = options.requests
    if not requests and not options.duration:
        requests = DEFAULT_REQUESTS
    return Load(
        concurrency=None if options.rate is not None else options.concurrency or 1,
        rate=options.rate,
        requests=requests,
        duration=options.duration,
        grace=options.grace,
        timeout=options.timeout,
        max_in_flight=options.max_in_flight,
        seed=options.seed,
    )


def _targets(options: argparse.Namespace) -> list[Target]:
    """Return the target of the options, and the second one if there is a comparison."""
    first = Target(
        name="A",
        base_url=options.base_url,
        model=options.model,
        align=options.align,
        body=body_fields(options),
        stream=not options.no_stream,
        key=ApiKey.from_environment(options.api_key_env),
    )
    compared = (options.against, options.against_model, options.against_align)
    if all(option is None for option in compared):
        return [first]
    url = options.against or options.base_url
    model = options.against_model
    if model is None and options.against is None:
        model = options.model
    env = options.against_api_key_env
    key = first.key
    if env is not None or not same_server(url, options.base_url):
        key = ApiKey.from_environment(env, "--against-api-key-env")
    second = replace(
        first, name="B", base_url=url, model=model, align=options.against_align, key=key
    )
    return [first, second]


def _goals(text: str | None) -> dict[str, float]:
    """Parse latency limits in milliseconds, such as "ttft:200,e2e:1000"."""
    goals = {}
    for part in (text or "").split(","):
        if not part:
            continue
        name, _, limit_text = part.strip().partition(":")
        try:
            limit = float(limit_text)
        except ValueError:
            limit = math.nan
        if name not in GOALS or not 0 < limit < math.inf:
            raise ConfigError(
                f"--goodput: {part!r} is not allowed; must be like ttft:200,e2e:1000, "
                f"with {', '.join(GOALS)} in milliseconds."
            )
        goals[name] = limit
    return goals


def _prompts(options: argparse.Namespace, load: Load) -> tuple[list[ChatPrompt], dict[str, Any]]:
    """Return the prompts of the dataset, and its description for the report."""
    if options.dataset == "demo":
        return datasets.demo(load.seed), {"name": "demo"}
    if options.dataset == "synthetic":
        lengths = {"input_tokens": options.input_tokens, "output_tokens": options.output_tokens}
        prompts = datasets.synthetic(load.requests or SYNTHETIC_PROMPTS, **lengths, seed=load.seed)
        return prompts, {"name": "synthetic", **lengths}
    return datasets.from_file(Path(options.dataset)), {"name": options.dataset}
