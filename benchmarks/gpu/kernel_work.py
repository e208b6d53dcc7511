"""The work of each launch that steers or draws, counted from its shapes and its machine code.

Numbers of instructions are those of one warp in the machine code for sm_90 (Triton 3.9): all
instructions, those of a loop once per turn. Branches that most programs skip are counted, so the
numbers are upper bounds. tests/benchmarks/test_expected_code.py counts them again.

Shapes: B rows, V vocabulary, k candidates, M values, r rank, d hidden size.
"""

from __future__ import annotations

import math

from benchmarks.gpu.hardware import (
    BANDWIDTH,
    BFLOAT16,
    FLOAT32,
    GAP,
    MICRO,
    TF32,
    Range,
    Work,
    compiled,
)

VOCABULARY = 128_256
RANK = 128
HIDDEN = 4096
FLOAT = 4
HALF = 2
# The tiles of `top_candidates`, and those of one program of its first kernel.
TILE = 64
TILES_PER_PROGRAM = 64
# The features that `steer_logits` multiplies at once.
FEATURES_AT_ONCE = 16
# Instructions: outside loops, and of one turn of each loop.
PEAKS = 225
SELECTION_OUTSIDE = 323
SELECTION_LOOPS = 101 + 154
STEERING_OUTSIDE = 549
STEERING_LOOPS = 104 + 155
# A turn per value, and in it one per 16 features.
STEERING_VALUE = 68
STEERING_FEATURES = 62
BARRIERS_PER_CANDIDATE = 8
# The two kernels for likely tokens (min_p): outside loops, per tile with a likely token, per value
# in it, and per 16 features of a value.
LIKELY_SUMS = (239, 153, 130, 119)
LIKELY_ADD = (340, 139, 136, 120)
DENSE_FLOAT32_OUTSIDE = 526
DENSE_FLOAT32_LOOP = 127
DENSE_BFLOAT16 = 691
HEAD_FLOAT32_OUTSIDE = 1245
HEAD_FLOAT32_LOOP = 117
HEAD_BFLOAT16 = 1377
HEAD_PICK_FLOAT32_OUTSIDE = 1376
HEAD_PICK_FLOAT32_LOOP = 145
HEAD_PICK_BFLOAT16 = 1957
CANDIDATES_TILE = 837
CANDIDATES_PICK = 1755
# The kernel that centres the shifts of the candidates: short, and bound by its waits.
SHIFT = 319
# Bytes that the L2 cache moves for a number that has no neighbours.
SECTOR = 32
# The four numbers of a tile in `value_reweight`.
STATISTICS = 4


def tile_peaks(rows: int) -> Work:
    """Return the work of the first kernel of top-k: one read of the float32 logits."""
    tiles = math.ceil(VOCABULARY / TILE)
    programs = rows * math.ceil(tiles / TILES_PER_PROGRAM)
    read = FLOAT * rows * VOCABULARY
    written = FLOAT * rows * tiles
    resources = compiled("tile_peaks", logits="*fp32", TILE=TILE)
    return Work(resources, programs, read + written, read, PEAKS, memory_waits=1, cache_waits=1)


def selection(rows: int, k: int) -> Work:
    """Return the work of the second kernel of top-k: one program per row."""
    read = FLOAT * rows * k * TILE
    peaks = FLOAT * rows * math.ceil(VOCABULARY / TILE)
    return Work(
        compiled("top_candidates", SLOTS=_slots(k), TILE=TILE),
        rows,
        read,
        read + peaks,
        SELECTION_OUTSIDE + SELECTION_LOOPS * k,
        memory_waits=1,
        cache_waits=2,
        barriers=BARRIERS_PER_CANDIDATE * k,
    )


def steering(rows: int, k: int, values: int) -> Work:
    """Return the work of the kernel that selects, values, centres and adds."""
    chosen = selection(rows, k)
    gathered = FLOAT * rows * k * RANK * values
    turns = math.ceil(RANK / FEATURES_AT_ONCE)
    instructions = STEERING_OUTSIDE + STEERING_LOOPS * k
    instructions += values * (STEERING_VALUE + STEERING_FEATURES * turns)
    return Work(
        compiled("steer_logits", SLOTS=_slots(k), TILE=TILE),
        rows,
        chosen.memory_bytes + gathered,
        chosen.cache_bytes + gathered,
        instructions,
        # Each turn reads rows of a head, and waits for them.
        memory_waits=chosen.memory_waits + values * (turns + 1),
        cache_waits=chosen.cache_waits + 2 + 2 * values,
        barriers=chosen.barriers + 8 + 4 * values,
    )


def likely(rows: int, tokens: int, values: int) -> tuple[Work, Work]:
    """Return the work of the two kernels that value and add the likely tokens of each row (min_p).

    Args:
        rows: steered rows.
        tokens: likely tokens of a row, each in a tile of its own.
        values: heads.
    """
    tiles = math.ceil(VOCABULARY / TILE)
    groups = math.ceil(tiles / TILES_PER_PROGRAM)
    # A program has the tiles of one group, and most groups have few likely tokens.
    busy = tokens / groups
    turns = math.ceil(RANK / FEATURES_AT_ONCE)
    moved = FLOAT * rows * tokens * (TILE + RANK * values)
    works: list[Work] = []
    for kernel, numbers in (("steer_likely_sums", LIKELY_SUMS), ("steer_likely", LIKELY_ADD)):
        outside, per_tile, per_value, per_turn = numbers
        instructions = per_tile + values * (per_value + per_turn * turns)
        work = Work(
            compiled(kernel, TILE=TILE),
            rows * groups,
            moved,
            # Every program reads the peaks of its whole row.
            moved + FLOAT * rows * groups * tiles,
            outside + busy * instructions,
            memory_waits=busy * (1 + values * (turns + 1)),
            cache_waits=6,
            barriers=4 + 6 * busy,
        )
        works.append(work)
    return works[0], works[1]


def features(rows: int, values: int) -> Range:
    """Return the time of the cast of the hidden states and of the product of all heads, float32.

    The product is torch's. How it is cut among the processors is not known here: this is the least
    certain figure of a step.
    """
    flops = 2 * rows * HIDDEN * RANK * values
    moved = FLOAT * HIDDEN * (RANK * values + 2 * rows)
    least = max(flops / FLOAT32, moved / BANDWIDTH) / MICRO
    product = Range(5.0 + 1.5 * least, 15.0 + 4 * least)
    cast = (HALF + FLOAT) * rows * HIDDEN / BANDWIDTH / MICRO
    return product + Range(1.0 + cast, 2.0 + 2 * cast) + GAP.times(2)


def float32_logits(rows: int) -> Range:
    """Return the time that vLLM adds to steered steps: a copy in float32, which its sampler reads.

    Without steering its sampler reads the bfloat16 logits.
    """
    moved = (HALF + FLOAT + FLOAT - HALF) * rows * VOCABULARY
    seconds = moved / BANDWIDTH / MICRO
    return Range(seconds / 0.9, seconds / 0.7) + GAP


def dense(rows: int, *, half: bool) -> Work:
    """Return the work of adding a head's values to all float32 logits in place."""
    logits = FLOAT * rows * VOCABULARY
    weight = (HALF if half else FLOAT) * VOCABULARY * RANK
    blocks = math.ceil(rows / 64)
    tokens = 128 if half else 64
    # Each program reads the features of its rows too.
    read = logits + blocks * weight * (1 + 64 / tokens)
    steps = RANK // 16
    instructions = DENSE_FLOAT32_OUTSIDE + DENSE_FLOAT32_LOOP * steps
    return Work(
        compiled("value_reweight_add_head", TOKENS=tokens),
        blocks * math.ceil(VOCABULARY / tokens),
        2 * logits + weight,
        read,
        DENSE_BFLOAT16 if half else instructions,
        _product_seconds(rows, half=half),
        # The loop of the float32 form loads two turns ahead.
        memory_waits=2 if half else 3,
        cache_waits=1,
        barriers=7 if half else 7 + 3 * steps,
    )


def head_tile(rows: int, *, half: bool) -> Work:
    """Return the work of the first kernel of a draw by a head's values."""
    size = HALF if half else FLOAT
    logits = size * rows * VOCABULARY
    weight = size * VOCABULARY * RANK
    blocks = math.ceil(rows / 64)
    tokens = 128 if half else 64
    tiles = math.ceil(VOCABULARY / tokens)
    steps = RANK // 16
    return Work(
        compiled(
            "value_reweight_head_tile",
            logits="*bf16" if half else "*fp32",
            TOKENS=tokens,
        ),
        blocks * tiles,
        logits + weight + STATISTICS * FLOAT * rows * tiles,
        logits + blocks * weight * (1 + 64 / tokens),
        HEAD_BFLOAT16 if half else HEAD_FLOAT32_OUTSIDE + HEAD_FLOAT32_LOOP * steps,
        _product_seconds(rows, half=half),
        exponentials=2 * rows * VOCABULARY,
        # The loop of the float32 form waits in each turn for what it has just loaded.
        memory_waits=3 if half else steps + 2,
        cache_waits=1,
        barriers=18 if half else 14 + 3 * steps,
    )


def head_pick(rows: int, *, half: bool) -> Work:
    """Return the work of the second kernel of a draw by a head's values."""
    tokens = 128 if half else 64
    numbers = STATISTICS * rows * math.ceil(VOCABULARY / tokens)
    steps = 1 if half else RANK // 16
    instructions = HEAD_PICK_FLOAT32_OUTSIDE + HEAD_PICK_FLOAT32_LOOP * steps
    return Work(
        compiled(
            "value_reweight_head_pick",
            logits="*bf16" if half else "*fp32",
            TOKENS=tokens,
        ),
        rows,
        FLOAT * numbers,
        SECTOR * numbers,
        HEAD_PICK_BFLOAT16 if half else instructions,
        memory_waits=1 + steps,
        cache_waits=3,
        barriers=35,
    )


def candidates_tile(rows: int, *, half: bool) -> Work:
    """Return the work of the kernel that reads the logits for a draw by candidates."""
    logits = (HALF if half else FLOAT) * rows * VOCABULARY
    return Work(
        compiled("value_reweight_candidates_tile", TOKENS=4096),
        rows * math.ceil(VOCABULARY / 4096),
        logits,
        logits,
        CANDIDATES_TILE,
        # About half of the tiles hold one of 20 candidates, and take a second sum.
        exponentials=1.5 * rows * VOCABULARY,
        memory_waits=1,
        cache_waits=4,
        barriers=4,
    )


def candidates_pick(rows: int) -> Work:
    """Return the work of the kernel that draws by candidates."""
    numbers = STATISTICS * rows * math.ceil(VOCABULARY / 4096)
    return Work(
        compiled("value_reweight_candidates_pick", TOKENS=4096),
        rows,
        FLOAT * rows * 4096,
        SECTOR * numbers + FLOAT * rows * 4096,
        CANDIDATES_PICK,
        memory_waits=1,
        cache_waits=7,
        barriers=31,
    )


def candidates_shift(rows: int) -> Work:
    """Return the work of the kernel that centres the shifts of the candidates."""
    resources = compiled("value_reweight_shift", SLOTS=64, SCATTER=False)
    return Work(resources, rows, 0.0, 0.0, SHIFT, cache_waits=6, barriers=3)


def _product_seconds(rows: int, *, half: bool) -> float:
    flops = 2 * rows * VOCABULARY * RANK
    # A float32 product is three products of TF32.
    return flops / BFLOAT16 if half else 3 * flops / TF32


def _slots(k: int) -> int:
    """Return k, rounded up to a power of two."""
    return int(1 << (k - 1).bit_length())
