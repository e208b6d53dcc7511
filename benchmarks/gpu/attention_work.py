"""The time that sibling attention should take, and what the older version teaches.

A program walks over the columns of a prefix, some at a time. One step is a chain: a product, an
exponential, a product. On the older version, steps of a program took about 1.0 us, most of it
waiting.

Shapes: B rows, H query heads, Hkv key heads, k siblings, T columns, D numbers per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.gpu.hardware import (
    BANDWIDTH,
    BFLOAT16,
    GAP,
    ISSUE,
    MICRO,
    PROCESSORS,
    SCHEDULERS,
    Range,
    Work,
    compiled,
)

HALF = 2
# A prefix of the benchmark has between half of its columns and all of them.
MEAN_LENGTH = 0.75
# What a step waits beside its own instructions, in microseconds. The older version took 33 us for
# the 32 steps of the first shape: 0.8 us each beside 0.16 us of instructions.
STEP_WAIT = Range(0.6, 1.1)


class Shape(NamedTuple):
    """The sizes of a problem, in the order of the benchmark."""

    rows: int
    heads: int
    key_heads: int
    siblings: int
    columns: int
    dim: int

    @property
    def stacked(self) -> int:
        """Return the queries that share a key head."""
        return self.heads // self.key_heads * self.siblings

    @property
    def prefix_bytes(self) -> float:
        """Return the bytes of all keys and values."""
        numbers = 2 * self.rows * self.key_heads * self.columns * self.dim
        return HALF * MEAN_LENGTH * numbers

    @property
    def floor_us(self) -> float:
        """Return the time of the bytes that must move."""
        queries = 2 * self.rows * self.heads * self.siblings * self.dim
        siblings = 2 * self.rows * self.key_heads * self.siblings * self.dim
        return (self.prefix_bytes + HALF * (queries + siblings)) / BANDWIDTH / MICRO

    @property
    def product_us(self) -> float:
        """Return the time of the products at the measured rate of the tensor cores."""
        flops = 4 * self.rows * self.heads * self.siblings * self.columns * self.dim
        return MEAN_LENGTH * flops / BFLOAT16 / MICRO


SHAPES = (
    Shape(8, 32, 8, 20, 1024, 128),
    Shape(32, 32, 8, 20, 1024, 128),
    Shape(64, 32, 4, 64, 2048, 64),
)


@dataclass(frozen=True, slots=True)
class Version:
    """The tiles of one version of the kernel at one size of heads.

    Attributes:
        queries: stacked queries per program.
        columns: columns per step.
        instructions: of one warp in one step.
        resources: registers, shared memory and warps, as in the compile report.
    """

    queries: int
    columns: int
    instructions: float
    resources: dict[str, Any]


def present(shape: Shape) -> Version:
    """Return the present tiles for a shape. Its instructions are those of the loop for sm_90."""
    row = compiled("sibling_attention", QUERIES=128, D=shape.dim, IS_SPLIT=False)
    instructions = {64: 380.0, 128: 459.0}[shape.dim]
    return Version(128, 64, instructions, dict(row))


def older(shape: Shape) -> Version:
    """Return the tiles of the version that was measured: 64 queries, 32 columns, four warps.

    It issued 138 cycles of a processor for 1,000 scores. Three programs fitted in a processor at
    128 numbers per head, and five at 64.
    """
    cycles = 138 * 64 * 32 / 1000
    resident = {64: 5, 128: 3}[shape.dim]
    registers = 65_536 // (resident * 128) // 8 * 8
    resources = {"num_warps": 4, "registers": registers, "shared_bytes": 0}
    return Version(64, 32, cycles * SCHEDULERS / 4, resources)


def work(shape: Shape, version: Version) -> Work:
    """Return the work of all programs. Parts that only long prefixes have are left out."""
    blocks = math.ceil(shape.stacked / version.queries)
    programs = shape.rows * shape.key_heads * blocks
    padded = blocks * version.queries / shape.stacked
    scores = MEAN_LENGTH * shape.rows * shape.heads * shape.siblings * shape.columns * padded
    steps = MEAN_LENGTH * shape.columns / version.columns
    return Work(
        version.resources,
        programs,
        shape.floor_us * MICRO * BANDWIDTH,
        blocks * shape.prefix_bytes,
        steps * version.instructions,
        padded * shape.product_us * MICRO,
        exponentials=scores,
    )


def time(shape: Shape, version: Version) -> Range:
    """Return the range of the time: of all work, and of the steps one after the other."""
    total = work(shape, version)
    steps = shape.columns / version.columns
    # One program's instructions of a step, alone on its processor.
    issue = version.instructions * version.resources["num_warps"]
    issue *= PROCESSORS / ISSUE / MICRO
    is_one_wave = total.waves <= 1
    # In one wave, the longest program decides. In several, long and short ones mix.
    low_steps = steps if is_one_wave else total.waves * MEAN_LENGTH * steps
    high_steps = math.ceil(total.waves) * steps
    side_by_side = 1 if is_one_wave else total.resident
    steps_low = low_steps * (STEP_WAIT.low + issue)
    steps_high = high_steps * (STEP_WAIT.high + side_by_side * issue)
    least = max(part.low for part in total.parts.values())
    return Range(max(least, steps_low), steps_high) + GAP
