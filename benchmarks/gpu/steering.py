"""Measure steering and best-of-n in vLLM on the server of held_server.py, against plain decoding.

The variants alternate within one run. A run ends before its limit, with as many rounds as fit.

    python -m benchmarks.gpu.steering --concurrency 32 [--seconds 50] [--tiny]
    python -m benchmarks.gpu.steering --best-of 8
    python -m benchmarks.gpu.steering --lookahead
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import held_server
from benchmarks.gpu.models import HEADS, LOOKAHEAD
from benchmarks.record import record
from benchmarks.serving.client import closed_loop
from benchmarks.serving.rows import Row, ratio_row

PLAIN = "plain"
TOP_K = 20
BETA = 0.5
TOKENS = 128
TINY_TOKENS = 6
PROMPT = "What do owls eat?"
# Goals of the ratio to plain decoding, by concurrency, for one value; several values have another.
ONE_VALUE = {1: "at least 0.99", 32: "at least 0.98", 256: "at least 0.97"}
SEVERAL_VALUES = "at least 0.96"
MAX_ROUNDS = 9


def body(tokens: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a request that samples a fixed number of tokens."""
    messages = [{"role": "user", "content": PROMPT}]
    sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    return {"model": "lm", "messages": messages, **sampling, **fields}


def steered(tokens: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the body of a request that these values steer."""
    vas = {"beta": dict.fromkeys(names, BETA), "top_k": TOP_K}
    return body(tokens, align={"vas": vas})


def head_bodies(tokens: int) -> dict[str, dict[str, Any]]:
    """Return plain decoding, and steering by one, two and four heads."""
    return {
        PLAIN: body(tokens),
        "one value": steered(tokens, HEADS[:1]),
        "two values": steered(tokens, HEADS[:2]),
        "four values": steered(tokens, HEADS),
    }


def lookahead_bodies(tokens: int) -> dict[str, dict[str, Any]]:
    """Return plain decoding, and steering by a value LM."""
    return {PLAIN: body(tokens), "lookahead": steered(tokens, (LOOKAHEAD,))}


def best_of_bodies(tokens: int, n: int) -> dict[str, dict[str, Any]]:
    """Return n answers, and the best of n."""
    return {PLAIN: body(tokens, n=n), f"best of {n}": body(tokens, align={"best_of_n": {"n": n}})}


def measure(
    port: int, bodies: Mapping[str, dict[str, Any]], concurrency: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds per batch of requests in each round, by variant.

    Args:
        port: of the server.
        bodies: the request of each variant.
        concurrency: requests at once, and requests per variant and round.
        seconds: time of all rounds; the first round runs in any case.
    """
    started = time.monotonic()
    for each in bodies.values():
        asyncio.run(closed_loop(port, each, concurrency, concurrency))
    # The round after the first use of each variant counts.
    spent = time.monotonic() - started
    rounds: dict[str, list[float]] = {name: [] for name in bodies}
    while len(rounds[PLAIN]) < MAX_ROUNDS:
        for name, each in bodies.items():
            _, duration = asyncio.run(closed_loop(port, each, concurrency, concurrency))
            rounds[name].append(duration)
        longest = max(spent, sum(durations[-1] for durations in rounds.values()))
        if time.monotonic() - started + longest > seconds:
            break
    return rounds


def rate_rows(rounds: Mapping[str, list[float]], tokens: int, concurrency: int) -> list[Row]:
    """Return the tokens per second of each variant over those of plain decoding."""
    rates = {}
    for name, durations in rounds.items():
        rates[name] = concurrency * tokens / statistics.median(durations)
    goals = {"one value": ONE_VALUE.get(concurrency, ""), "lookahead": "at least 0.5"}
    rows = []
    for name, rate in rates.items():
        if name != PLAIN:
            what = f"{name} against plain at concurrency {concurrency}, tokens per second"
            rows.append(ratio_row(what, rate, rates[PLAIN], goals.get(name, SEVERAL_VALUES)))
    return rows


def best_of_rows(rounds: Mapping[str, list[float]]) -> list[Row]:
    """Return the time of the best of n over that of n answers."""
    plain = statistics.median(rounds[PLAIN])
    rows = []
    for name, durations in rounds.items():
        if name != PLAIN:
            what = f"{name} against as many answers, wall time"
            rows.append(ratio_row(what, statistics.median(durations), plain, "at most 1.05"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part and write its record.

    Raises:
        SystemExit: there is no server.
    """
    options = _options(arguments)
    server = held_server.find(options.folder)
    if server is None:
        raise SystemExit("no server: run `python -m benchmarks.gpu.held_server start` first.")
    tokens = TINY_TOKENS if options.tiny else TOKENS
    concurrency = options.concurrency
    if options.best_of:
        name = f"gpu_best_of_{options.best_of}"
        rounds = measure(
            server.port, best_of_bodies(tokens, options.best_of), concurrency, options.seconds
        )
        rows = best_of_rows(rounds)
    else:
        kind = "lookahead" if options.lookahead else "vas"
        bodies = lookahead_bodies(tokens) if options.lookahead else head_bodies(tokens)
        name = f"gpu_{kind}_{concurrency}"
        rounds = measure(server.port, bodies, concurrency, options.seconds)
        rows = rate_rows(rounds, tokens, concurrency)
    setup = {
        "model": f"a Llama of the shape {server.size}, random weights",
        "tokens": tokens,
        "concurrency": concurrency,
        "seconds_by_round": rounds,
        "no_seed": "requests name no seed, as most do",
    }
    path = record(
        name, baseline="plain decoding in the same run", seed=None, rows=rows, setup=setup
    )
    print(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure steering in vLLM on a held server.")
    parser.add_argument("--concurrency", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--best-of", type=int, default=0, metavar="N", help="measure best of N")
    parser.add_argument("--lookahead", action="store_true", help="measure the value LM")
    parser.add_argument("--seconds", type=float, default=45.0, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="few tokens, for a CPU")
    parser.add_argument("--folder", type=Path, default=held_server.DEFAULT_FOLDER)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
