"""The speed of an H200, and the range of time that a kernel should take on it.

A kernel has several kinds of work: bytes of memory, bytes from the L2 cache, instructions, products
of tensor cores, and chains of waits. Each would take a time of its own. The low end of the range
lets all of them overlap. The high end hides a kind of work only behind other programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.record import RESULTS

# Measured on one H200: bytes read and written per second by a copy, and FLOP/s of dense bfloat16.
# Float16 has the same rate.
BANDWIDTH = 4.21e12
BFLOAT16 = 790e12
# From the data sheet, or from published measurements of this generation.
PROCESSORS = 132
CLOCK = 1.755e9
# Published figures of the L2 cache go from the lower to the higher one, in bytes per second.
L2_BANDWIDTH = 5.5e12
FASTEST_L2 = 7.0e12
SCHEDULERS = 4
ISSUE = PROCESSORS * SCHEDULERS * CLOCK
EXPONENTIALS = PROCESSORS * 16 * CLOCK
FLOAT32 = PROCESSORS * 128 * 2 * CLOCK
REGISTERS = 65_536
SHARED_BYTES = 227 * 1024
# Shared memory of a program that the system takes.
RESERVED_BYTES = 1024
MAX_WARPS = 64
MAX_PROGRAMS = 32
WARP = 32
# The share of the rates, except for that of the L2 cache, that a kernel reaches.
BEST_SHARE = 0.9
USUAL_SHARE = 0.8
MICRO = 1e-6


class Range(NamedTuple):
    """A low and a high estimate in microseconds."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:  # type: ignore[override]
        """Return the range of one thing after the other."""
        return Range(self.low + other.low, self.high + other.high)

    def times(self, count: float) -> Range:
        """Return the range of `count` things, one after the other."""
        return Range(self.low * count, self.high * count)


NOTHING = Range(0.0, 0.0)
# One wait of a program, in microseconds: for memory, for the L2 cache, for a barrier; and one
# instruction of a warp after the other.
MEMORY_WAIT = Range(0.35, 0.7)
CACHE_WAIT = Range(0.2, 0.3)
BARRIER = Range(0.02, 0.06)
INSTRUCTION = Range(1 / CLOCK / MICRO, 2 / CLOCK / MICRO)
# The gap before a kernel in a CUDA graph.
GAP = Range(1.0, 1.5)


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one launch of a kernel.

    Attributes:
        resources: row of the compile report: registers, shared memory and warps of a program.
        programs: number of programs.
        memory_bytes: bytes from and to memory.
        cache_bytes: bytes from the L2 cache.
        instructions: of each warp.
        product_seconds: time of the products at the measured rate of the tensor cores.
        exponentials: number of them.
        memory_waits: of a program, one after the other.
        cache_waits: of a program, one after the other.
        barriers: of a program.
    """

    resources: Mapping[str, Any]
    programs: int
    memory_bytes: float
    cache_bytes: float
    instructions: float
    product_seconds: float = 0.0
    exponentials: float = 0.0
    memory_waits: float = 0.0
    cache_waits: float = 0.0
    barriers: float = 0.0

    @property
    def resident(self) -> int:
        """Return the number of programs that a processor holds at once."""
        warps = self.resources["num_warps"]
        registers = math.ceil(self.resources["registers"] / 8) * 8 * WARP * warps
        shared = self.resources["shared_bytes"] + RESERVED_BYTES
        limits = (REGISTERS // registers, SHARED_BYTES // shared, MAX_WARPS // warps, MAX_PROGRAMS)
        return int(min(limits))

    @property
    def waves(self) -> float:
        """Return how many programs follow each other in one place of a processor; at least 1."""
        return max(1.0, self.programs / (PROCESSORS * self.resident))

    @property
    def parts(self) -> dict[str, Range]:
        """Return the range of the time of each kind of work alone."""
        warps = self.resources["num_warps"] * self.programs
        return {
            "memory": _shares(self.memory_bytes / BANDWIDTH),
            "L2 cache": Range(
                self.cache_bytes / FASTEST_L2 / MICRO, self.cache_bytes / L2_BANDWIDTH / MICRO
            ),
            "instructions": _shares(warps * self.instructions / ISSUE),
            "tensor cores": _shares(self.product_seconds),
            "exponentials": _shares(self.exponentials / EXPONENTIALS),
        }

    @property
    def waits(self) -> Range:
        """Return the time of the chains of waits, all programs of a place one after the other."""
        program = MEMORY_WAIT.times(self.memory_waits) + CACHE_WAIT.times(self.cache_waits)
        program += BARRIER.times(self.barriers) + INSTRUCTION.times(self.instructions)
        return Range(program.low * self.waves, program.high * math.ceil(self.waves))

    @property
    def time(self) -> Range:
        """Return the range of the time, with the gap before the kernel."""
        low = max(part.low for part in self.parts.values())
        highs = [part.high for part in self.parts.values()]
        busiest = max(highs)
        high = busiest + (sum(highs) - busiest) / self.resident
        return Range(max(low, self.waits.low), max(high, self.waits.high)) + GAP

    @property
    def bound(self) -> str:
        """Return the kind of work that takes the longest in the high estimate."""
        name = max(self.parts, key=lambda part: self.parts[part].high)
        return "waits" if self.waits.high > self.parts[name].high else name


def _shares(seconds: float) -> Range:
    """Return the range in microseconds of work that takes `seconds` at its full rate."""
    return Range(seconds / BEST_SHARE / MICRO, seconds / USUAL_SHARE / MICRO)


def compiled(kernel: str, **constants: Any) -> Mapping[str, Any]:
    """Return the row of the compile report for a kernel on sm_90.

    Args:
        kernel: its name there.
        constants: compile-time arguments of the row; `logits` is the Triton type of its main input.

    Raises:
        LookupError: the report has no such row; write it again with compile_report.py.
    """
    report = json.loads((RESULTS / "kernels_compile.json").read_text(encoding="utf-8"))
    rows: Iterable[dict[str, Any]] = report["rows"]
    main_input = constants.pop("logits", None)
    for row in rows:
        if (row["kernel"], row["architecture"]) != (kernel, "sm_90"):
            continue
        if main_input not in {None, row["logits_or_query"]}:
            continue
        if constants.items() <= row["constants"].items():
            return row
    raise LookupError(
        f"kernels_compile.json: no row of {kernel} with {constants} for sm_90; run "
        "benchmarks/kernels/compile_report.py."
    )
