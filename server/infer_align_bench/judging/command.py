"""Run `infer-align bench judge`: judge given pairs and compare with the given preferences."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infer_align.errors import AlignError, ConfigError
from infer_align.preferences import (
    PreferencePair,
    conversation_key,
    pair_remarks,
    read_preferences,
)
from infer_align_bench.credentials import ApiKey
from infer_align_bench.endpoint import Endpoint, error_of
from infer_align_bench.judging.figures import Accuracy, JudgedPair, accuracies, biases
from infer_align_bench.runtime import check_writable, loop_factory
from infer_align_bench.types import Target

SCHEMA = "infer-align/bench-judge/1"
OUT = Console(width=max(80, Console().width))
ERR = Console(stderr=True)


def run(options: argparse.Namespace) -> int:
    """Judge the pairs and print how often the judge is right.

    Returns:
        0, or 1 if some pairs could not be judged.

    Raises:
        ConfigError: the file or an option is wrong.
        AlignError: the endpoint cannot be reached, or no pair could be judged.
    """
    for name in ("messages", "candidates"):
        if name in options.body:
            raise ConfigError(f"--body: {name} are those of the pairs; leave them out.")
    preferences = read_preferences(Path(options.pairs))
    pairs = preferences.pairs[: options.limit]
    problems = [*pair_remarks(pairs), *preferences.problems]
    for problem in problems:
        _print_problem(f"{options.pairs}: {problem}", "yellow")
    if options.json:
        check_writable(options.json)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        judged, failures = runner.run(_judge_all(options, pairs))
    if not judged:
        reason = next(iter(failures), "there is none")
        raise AlignError(f"no pair could be judged; first: {reason}")
    report = _report(options, judged, failures, problems)
    _print_report(accuracies(judged), report)
    if options.json:
        text = json.dumps(report, indent=1, default=str, allow_nan=False) + "\n"
        options.json.write_text(text, encoding="utf-8")
    return 1 if failures else 0


async def _judge_all(
    options: argparse.Namespace, pairs: Sequence[PreferencePair]
) -> tuple[list[JudgedPair], Counter[str]]:
    """Return the judged pairs, and the number of the others by reason."""
    key = ApiKey.from_environment(options.api_key_env)
    target = Target(name="A", base_url=options.base_url, model=options.model, stream=False, key=key)
    judged: list[JudgedPair] = []
    failures: Counter[str] = Counter()
    free = asyncio.Semaphore(options.concurrency)
    async with Endpoint(target, options.timeout, 0) as endpoint:
        await endpoint.find_model()

        async def judge(pair: PreferencePair) -> None:
            async with free:
                status, answer = await _judge(endpoint, options, pair)
            if status != 200:
                error = error_of(answer)
                message = error.get("message") if isinstance(error, dict) else error
                failures[f"status {status}: {endpoint.redact(str(message))}"] += 1
                return
            prompt = conversation_key(pair.messages)
            judged.append(JudgedPair(prompt, pair.chosen, pair.rejected, answer))

        await asyncio.gather(*(judge(pair) for pair in pairs))
    return judged, failures


async def _judge(
    endpoint: Endpoint, options: argparse.Namespace, pair: PreferencePair
) -> tuple[int, Any]:
    body = {
        "model": endpoint.target.model,
        "messages": list(pair.messages),
        "candidates": [pair.chosen, pair.rejected],
        **options.body,
    }
    return await endpoint.call("align/judge", body)


def _report(
    options: argparse.Namespace,
    judged: Sequence[JudgedPair],
    failures: Counter[str],
    problems: Sequence[str],
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, each in accuracies(judged).items():
        figures[name] = None if each is None else {**asdict(each), "verdict": each.verdict}
    usage: Counter[str] = Counter()
    incomplete: Counter[str] = Counter()
    for pair in judged:
        usage.update(pair.answer["usage"])
        if pair.error is not None:
            incomplete[pair.error] += 1
    return {
        "schema": SCHEMA,
        "pairs_file": options.pairs,
        "body": options.body,
        "pairs": len(judged),
        "prompts": len({pair.prompt for pair in judged}),
        "accuracy": figures,
        "bias": biases(judged),
        "failures": dict(failures),
        "incomplete": dict(incomplete),
        "problems": list(problems),
        "usage": dict(usage),
    }


def _print_report(shares: dict[str, Accuracy | None], report: dict[str, Any]) -> None:
    table = Table("preferred by", "right", "ties", "pairs", "", box=None, header_style="dim")
    for name, share in shares.items():
        if share is not None:
            right = f"{share.value:.3f}"
            if share.error is not None:
                right += f" ± {share.error:.3f}"
            verdict = "" if name == "the longer answer" else share.verdict
            table.add_row(name, right, f"{share.ties:.2f}", str(share.pairs), verdict)
    OUT.print(table)
    for name, value in report["bias"].items():
        if value is not None:
            OUT.print(f"{name}: {value:.3f}", highlight=False)
    OUT.print(f"calls: {report['usage'].get('judge_calls', 0)}", highlight=False)
    for reason, count in report["failures"].items():
        _print_problem(f"{count} pairs could not be judged: {reason}", "red")
    for reason, count in report["incomplete"].items():
        _print_problem(f"{count} pairs lack a score or a comparison: {reason}", "red")


def _print_problem(text: str, style: str) -> None:
    ERR.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
