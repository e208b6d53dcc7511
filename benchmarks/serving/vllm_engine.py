"""vLLM behind this server, measured against `vllm serve`: the same model, options and machine, in alternating rounds of one run.

    python benchmarks/serving/vllm_engine.py [MODEL] [--rounds 5] [--scale 1.0] [--set max_model_len=4096 ...]

On a GPU give a model, and its rewards and values with --config; without, it is the embedded demo on vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from benchmarks.serving.client import closed_loop, serving
from infer_align.config.config import override
from infer_align.demo import world
from infer_align.demo.locate import locate

# What `vllm serve` runs; that command itself does not know the CPU build by its package's name.
RAW = (
    "-m",
    "vllm.entrypoints.launchers.api_server.entry",
    "--model",
    "{model}",
    "--served-model-name",
    "demo",
    "--port",
    "{port}",
    "--disable-uvicorn-access-log",
)
# Neither writes an access log.
OURS = (
    "-m",
    "infer_align_server",
    "serve",
    "{config}",
    "--set",
    "server.port={port}",
    "--set",
    "server.served_name=demo",
    "--set",
    "server.log_level=warning",
)
DEMO = "infer_align/demo/vllm.toml"
# What a CPU needs; a GPU's own are given with --set.
CPU = {
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
BEST = {"align": {"best_of_n": {"n": 8}, "rewards": {"quality": 1}}}
STEERED = {"align": {"vas": {"beta": {"helpful": 4.0}}}}
OUT = Console()

Seconds = Callable[[str, dict[str, Any], int, int], float]


@contextmanager
def servers(model: str, options: dict[str, Any], config: str) -> Iterator[dict[str, int]]:
    """`vllm serve` and ours, with the same options; -> their ports."""
    flags = [word for key, value in options.items() for word in _flag(key, value)]
    settings = [
        word for key, value in options.items() for word in ("--set", f"engine.{key}={_toml(value)}")
    ]
    ours = [
        *(part.replace("{config}", config) for part in OURS),
        "--set",
        f"engine.model={model}",
        *settings,
    ]
    raw = [part.replace("{model}", locate(model)) for part in RAW]
    loading = {"seconds": LOADING_SECONDS}
    with (
        serving(*raw, *flags, ready="/health", **loading) as (plain, _),
        serving(*ours, **loading) as (aligned, _),
    ):
        yield {"raw": plain, "ours": aligned}


def _flag(key: str, value: Any) -> list[str]:
    name = f"--{key.replace('_', '-')}"
    return (
        [name if value else f"--no-{name[2:]}"] if isinstance(value, bool) else [name, str(value)]
    )


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def measure(ports: dict[str, int], rounds: int, scale: float) -> list[dict[str, Any]]:
    """Every figure beside its baseline; medians over alternating rounds."""
    question = world.prompts(1, seed=7)[0]
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "max_tokens": 64}
    long = {**body, "max_tokens": 96, "ignore_eos": True}
    fixed = {**body, "max_tokens": 40, "ignore_eos": True}  # best-of-8 and n=8 do the same work
    # what, the raw request, ours, concurrency, requests, the aim, and whether more is better
    comparisons = [
        (
            "requests per second without align at concurrency 16, ratio",
            body,
            body,
            16,
            400,
            "at least 0.97",
            True,
        ),
        (
            "best-of-8 against n=8, wall time ratio",
            {**fixed, "n": 8},
            {**fixed, **BEST},
            1,
            16,
            "at most 1.3",
            False,
        ),
        (
            "32 concurrent best-of-8 against n=8, wall time ratio",
            {**fixed, "n": 8},
            {**fixed, **BEST},
            32,
            64,
            "at most 1.3",
            False,
        ),
        (
            "tokens per second of 16 requests, steered against plain, ratio",
            long,
            {**long, **STEERED},
            16,
            96,
            "at least 0.85",
            True,
        ),
    ]
    rows = []
    for what, raw, ours, concurrency, requests, target, rate in comparisons:
        count = max(concurrency, round(requests * scale))
        bodies = {"raw": raw, "ours": ours}
        for name, port in ports.items():  # to warm up
            asyncio.run(closed_loop(port, bodies[name], concurrency, concurrency))
        seconds: dict[str, list[float]] = {name: [] for name in ports}
        for _ in range(rounds):
            for name, port in ports.items():
                seconds[name].append(
                    asyncio.run(closed_loop(port, bodies[name], concurrency, count))[1] / count
                )
        mine, base = statistics.median(seconds["ours"]), statistics.median(seconds["raw"])
        figures = (base / mine, 1 / mine, 1 / base) if rate else (mine / base, mine, base)
        rows.append(
            {
                "what": what,
                **dict(zip(("value", "ours", "baseline"), figures, strict=True)),
                "target": target,
            }
        )
    return rows


def main() -> None:
    """Run it, and keep the result unless it was a small one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument(
        "--config",
        default=DEMO,
        help="with a reward called quality and a head called helpful; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the numbers of requests; below 1 nothing is written",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of vLLM's"
    )
    given = parser.parse_args()
    options: dict[str, Any] = {} if given.set else dict(CPU)
    for text in given.set:
        override(options, text)
    if not given.set:
        os.environ.update(CPU_ENVIRONMENT)
    with servers(given.model, options, given.config) as ports:
        rows = measure(ports, given.rounds, given.scale)
    table = Table("what", "value", "ours", "vllm serve", "aim")
    for row in rows:
        table.add_row(
            row["what"],
            *(f"{row[key]:.4g}" for key in ("value", "ours", "baseline")),
            row["target"],
        )
    OUT.print(table)
    if given.scale >= 1:
        setup = {
            "model": given.model,
            "rounds": given.rounds,
            "options": options,
            "no_seed": "requests name no seed, as most do: vLLM draws its own, on both sides",
        }
        path = record(
            "vllm", baseline="vllm serve in the same run", seed=None, rows=rows, setup=setup
        )
        OUT.print("written:", path, highlight=False)


if __name__ == "__main__":
    main()
