"""Compare vLLM behind this server with `vllm serve`, and steering with plain decoding.

Both run the same model with the same options on the same machine, in alternating rounds of one run.
A figure is the median over the rounds of the ratio within a round, because machines get slower and
faster from one round to the next.
On a GPU, name a model, and its rewards and values with --config. Without a model, the benchmark
runs the embedded demo on vLLM's CPU build.

    python benchmarks/serving/vllm_engine.py [MODEL] [--rounds 5] [--scale 1.0] [--only steered]
        [--record NAME] [--set max_model_len=4096 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.record import record
from benchmarks.serving.client import closed_loop, serving
from benchmarks.serving.rows import Row, print_rows, row
from infer_align.config import override
from infer_align.demo import world
from infer_align.demo.locate import locate

# The module that `vllm serve` runs: the command does not find the CPU build under its package name.
# Neither server writes an access log.
RAW = (
    "-m",
    "vllm.entrypoints.launchers.api_server.entry",
    "--served-model-name",
    "demo",
    "--port",
    "{port}",
    "--disable-uvicorn-access-log",
)
OUR_SETTINGS = (
    "--set",
    "server.port={port}",
    "--set",
    "server.served_name=demo",
    "--set",
    "server.log_level=warning",
)
DEMO_CONFIG = "infer_align/demo/vllm.toml"
# Options for a CPU. Options for a GPU come from --set.
CPU_OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 27,
}
CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
LOADING_SECONDS = 900
ROUNDS = 11
RECORD = "vllm"
BEST_OF_8 = {"align": {"best_of_n": {"n": 8}, "rewards": {"quality": 1}}}
STEERED = {"align": {"vas": {"beta": {"helpful": 4.0}}}}
OUT = Console()


@dataclass(frozen=True)
class Comparison:
    """A request to our server, and the one that it is compared with."""

    what: str
    raw: dict[str, Any]
    ours: dict[str, Any]
    # The server that answers `raw`: "raw" is `vllm serve`, "ours" is ours.
    baseline: str
    concurrency: int
    # Requests of a round.
    requests: int
    target: str
    # True: compare requests per second; False: seconds per request.
    as_rate: bool


def comparisons() -> list[Comparison]:
    """Return everything that is compared."""
    question = world.prompts(1, seed=7)[0]
    messages = [{"role": "user", "content": question}]
    # An empty answer counts as a fault, and without a minimum the model may give one.
    body = {"model": "demo", "messages": messages, "max_tokens": 64, "min_tokens": 1}
    long = {**body, "max_tokens": 96, "ignore_eos": True}
    # A fixed length, so that best-of-8 and n=8 do the same work.
    fixed = {**body, "max_tokens": 40, "ignore_eos": True}
    return [
        Comparison(
            "requests per second without align at concurrency 16, ratio",
            raw=body,
            ours=body,
            baseline="raw",
            concurrency=16,
            requests=400,
            target="at least 0.97",
            as_rate=True,
        ),
        Comparison(
            "best-of-8 against n=8, wall time ratio",
            raw={**fixed, "n": 8},
            ours={**fixed, **BEST_OF_8},
            baseline="raw",
            concurrency=1,
            requests=16,
            target="at most 1.3",
            as_rate=False,
        ),
        Comparison(
            "32 concurrent best-of-8 against n=8, wall time ratio",
            raw={**fixed, "n": 8},
            ours={**fixed, **BEST_OF_8},
            baseline="raw",
            concurrency=32,
            requests=64,
            target="at most 1.3",
            as_rate=False,
        ),
        *(
            Comparison(
                f"requests of 96 tokens per second, 16 at once, steered against {name}, ratio",
                raw=long,
                ours={**long, **STEERED},
                baseline=baseline,
                concurrency=16,
                requests=96,
                target="at least 0.9",
                as_rate=True,
            )
            for baseline, name in (("ours", "plain"), ("raw", "vllm serve"))
        ),
    ]


@contextmanager
def servers(model: str, options: dict[str, Any], config: str) -> Iterator[dict[str, int]]:
    """Run `vllm serve` and our server with the same options, and yield their ports."""
    flags = []
    settings = []
    for key, value in options.items():
        flags += _vllm_flag(key, value)
        settings += ["--set", f"engine.{key}={_toml(value)}"]
    settings += ["--set", f"engine.model={model}"]
    ours = ["-m", "infer_align_server", "serve", config, *OUR_SETTINGS, *settings]
    raw = [*RAW, "--model", locate(model), *flags]
    with (
        serving(*raw, ready="/health", seconds=LOADING_SECONDS) as (raw_port, _),
        serving(*ours, seconds=LOADING_SECONDS) as (our_port, _),
    ):
        yield {"raw": raw_port, "ours": our_port}


def _vllm_flag(key: str, value: Any) -> list[str]:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def measure(ports: dict[str, int], comparison: Comparison, rounds: int, scale: float) -> Row:
    """Measure one comparison, and return its figure.

    The two sides alternate, and every second round begins with the other one.
    """
    concurrency = comparison.concurrency
    requests = max(concurrency, round(comparison.requests * scale))
    sides = [(ports[comparison.baseline], comparison.raw), (ports["ours"], comparison.ours)]
    for port, body in sides:
        asyncio.run(closed_loop(port, body, concurrency, concurrency))
    # Seconds per request of each round: the baseline, ours.
    measured: list[list[float]] = []
    for number in range(rounds):
        seconds = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            port, body = sides[side]
            _, duration = asyncio.run(closed_loop(port, body, concurrency, requests))
            seconds[side] = duration / requests
        measured.append(seconds)
    if comparison.as_rate:
        measured = [[1 / seconds for seconds in each] for each in measured]
    ratios = [ours / baseline for baseline, ours in measured]
    baseline, ours = (statistics.median(side) for side in zip(*measured, strict=True))
    low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
    figure = row(comparison.what, statistics.median(ratios), ours, baseline, comparison.target)
    return {**figure, "quartiles": [low, high]}


def main() -> None:
    """Measure and print; write the result of a run of full scale."""
    arguments = _arguments()
    options: dict[str, Any] = {}
    if arguments.set:
        for text in arguments.set:
            override(options, text)
    else:
        options |= CPU_OPTIONS
        os.environ.update(CPU_ENVIRONMENT)
    rows = []
    with servers(arguments.model, options, arguments.config) as ports:
        for comparison in comparisons():
            if arguments.only in comparison.what:
                rows.append(measure(ports, comparison, arguments.rounds, arguments.scale))
    print_rows(rows, OUT)
    name = arguments.record or (RECORD if arguments.scale >= 1 and not arguments.only else None)
    if name:
        setup = {
            "model": Path(arguments.model).name,
            "rounds": arguments.rounds,
            "options": options,
            "no_seed": "requests name no seed, as most do: vLLM draws its own, on both sides",
        }
        path = record(
            name,
            baseline="vllm serve, or plain decoding, in the same run",
            seed=None,
            rows=rows,
            setup=setup,
        )
        OUT.print("written:", path, highlight=False)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo", help="default: %(default)s")
    parser.add_argument(
        "--config",
        default=DEMO_CONFIG,
        help="configuration with a reward `quality` and a head `helpful`; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="factor of the numbers of requests; below 1 no result is written without --record",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="measure the comparisons with this in their name"
    )
    parser.add_argument(
        "--record", metavar="NAME", help="write the result under this name; default: vllm"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="option of vLLM for both servers; may be repeated",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
