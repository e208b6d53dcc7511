"""Measure the embedded engine on two models: the demo's, and a real small one."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import record
from benchmarks.serving.rows import Row
from infer_align import config, quickstart
from infer_align.engines.transformers.engine import TransformersEngine


class Case(NamedTuple):
    """A model and the length of its answers."""

    name: str
    path: Path | None  # of its configuration; None is the demo's
    tokens: int


class Measured(NamedTuple):
    """The rows of all cases.

    Attributes:
        rows: the rows.
        setup: how they were measured.
        is_complete: False if the command line chose one case; then nothing is recorded.
    """

    rows: list[Row]
    setup: dict[str, Any]
    is_complete: bool


def record_cases(name: str, measured: Measured, baseline: str, setup: Mapping[str, Any]) -> None:
    """Write the result of a complete run; a run of one case is printed only.

    Args:
        name: of the result.
        measured: from `measure_cases`.
        baseline: description of the baseline.
        setup: what else describes the run.
    """
    if not measured.is_complete:
        return
    path = record(
        name,
        baseline=baseline,
        seed=0,
        rows=measured.rows,
        setup={**measured.setup, **setup},
    )
    print(f"wrote {path}")


def two_models(demo_tokens: int, small_tokens: int) -> tuple[Case, Case]:
    """Return the cases, with the length of the answers of each."""
    demo = Case("demo", None, demo_tokens)
    return demo, Case("SmolLM2-135M", quickstart.CONFIG, small_tokens)


async def started_engine(case: Case) -> TransformersEngine:
    """Return the running engine of a case. It has one thread."""
    engine = config.load(case.path, ["engine.threads=1"]).load_engine()
    if not isinstance(engine, TransformersEngine):
        raise TypeError(f"{case.name} is not served by the embedded engine")
    await engine.start()
    return engine


def measure_cases(
    description: str | None,
    rounds: int,
    cases: Sequence[Case],
    measure: Callable[[Case, int], Coroutine[Any, Any, list[Row]]],
) -> Measured:
    """Read the command line and measure its cases.

    Args:
        description: of the script, for its help.
        rounds: number of rounds, if the command line names none.
        cases: the cases.
        measure: returns the rows of one case and a number of rounds.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", choices=[case.name for case in cases])
    options = parser.parse_args()
    rows: list[Row] = []
    for case in cases:
        if options.only in (None, case.name):
            rows += asyncio.run(measure(case, options.rounds))
    tokens = {case.name: case.tokens for case in cases}
    setup = {"rounds": options.rounds, "tokens": tokens, "threads": 1}
    return Measured(rows, setup, options.only is None)
