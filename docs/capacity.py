"""Make the tables of docs/scaling.md: GPUs and latency, computed by the cost model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from tables import table

from infer_align_bench.cost import Setting, capacity, roofline, seconds
from infer_align_bench.simulate import simulate

# The machine of docs/scaling.md: one H100 at 70% of its bandwidth and 50% of its arithmetic.
# It holds an 8B model in bfloat16 and three reward models of 0.6B parameters.
H100 = roofline(
    parameters=8e9,
    bandwidth=0.7 * 3.35e12,
    flops=0.5 * 989e12,
    cache_bytes=2 * 32 * 8 * 128 * 2,
    reward_parameters=3 * 0.6e9,
)
RATE = 1000
MAX_SEQUENCES = 512
ONE_ANSWER = Setting(concurrency=1, n=1, prompt_tokens=512, output_tokens=256)
BEST_OF_8 = replace(ONE_ANSWER, n=8, reward_tokens=8 * (512 + 256))


def scaling() -> str:
    """Return the GPUs for the rate of docs/scaling.md, by the cost model."""
    best_of_4 = replace(BEST_OF_8, n=4, reward_tokens=4 * (512 + 256))
    short = replace(BEST_OF_8, output_tokens=64, reward_tokens=8 * (512 + 64))
    cases = [
        ("one answer", ONE_ANSWER, math.inf),
        ("best of 8", BEST_OF_8, math.inf),
        ("best of 8, 10 s on average at most", BEST_OF_8, 10.0),
        ("best of 8, rewards on other GPUs", replace(BEST_OF_8, reward_tokens=0), math.inf),
        ("best of 4", best_of_4, math.inf),
        ("best of 8, answers of 64 tokens", short, math.inf),
    ]
    head = ["request", "under way on a GPU", "seconds a request"]
    head += ["requests / s of a GPU", f"GPUs for {RATE:,} / s"]
    rows = []
    for name, setting, limit in cases:
        planned = capacity(H100, setting, RATE, limit, MAX_SEQUENCES)
        row = [name, str(planned.concurrency), f"{planned.seconds:.1f}"]
        row += [f"{planned.requests_per_second:.2f}", str(planned.replicas)]
        rows.append(row)
    return table(head, rows)


def scaling_queue() -> str:
    """Return the latency under bursts, by the simulated queue of docs/scaling.md."""
    planned = capacity(H100, BEST_OF_8, RATE, max_sequences=MAX_SEQUENCES)

    def service_seconds(concurrency: int) -> float:
        return seconds(H100, replace(BEST_OF_8, concurrency=concurrency))

    rows = []
    for share in (0.99, 0.95, 0.9, 0.8, 0.7):
        replicas = math.ceil(planned.replicas / share)
        queue = simulate(service_seconds, RATE, replicas, planned.concurrency)
        utilization = RATE / planned.requests_per_second / replicas
        row = [str(replicas), f"{utilization:.0%}"]
        row += [f"{queue.p50:.1f}", f"{queue.p99:.1f}", f"{queue.waited:.0%}"]
        rows.append(row)
    head = ["GPUs", "of their throughput used", "p50, s", "p99, s", "requests that wait"]
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {"scaling": scaling, "scaling-queue": scaling_queue}
