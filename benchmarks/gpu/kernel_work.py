"""The work of each launch that steers or draws, counted from its shapes and its machine code.

Numbers of instructions are those of one warp in the machine code for sm_90 (Triton 3.9): all
instructions, those of a loop once per turn. Branches that most programs skip are counted, so the
numbers are upper bounds. tests/benchmarks/test_expected_code.py counts them again.

Shapes: B rows, V vocabulary, k candidates, M values, r rank, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu.hardware import (
    BANDWIDTH,
    BFLOAT16,
    FLOAT32,
    GAP,
    MICRO,
    WARP,
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
# The kernels that multiply by a head: once for a tile of tokens, and for each 64 rows.
DENSE_FLOAT32 = (767, 610)
DENSE_BFLOAT16 = (156, 476)
HEAD_FLOAT32 = (778, 1393)
HEAD_BFLOAT16 = (184, 1037)
HEAD_TOKENS = 64
HEAD_ROWS = 64
# The kernel that splits the features of rows in two parts each.
SPLIT = 91
SPLIT_ROWS = 4
HEAD_PICK_FLOAT32 = 1701
HEAD_PICK_BFLOAT16 = 1603
# A program that sums tiles: alone, for 32 candidates that it looks at, and for one in its tiles.
CANDIDATES_TILE_FLOAT32 = 468
CANDIDATES_TILE_BFLOAT16 = 432
CANDIDATES_LOOK = 21
CANDIDATES_FOUND = 70
CANDIDATES_TOKENS = 512
CANDIDATES_GROUP = 8
# Without its loops, and the loops, which have one turn for up to 32 candidates.
CANDIDATES_PICK = 933 + 825
# Bytes that the L2 cache moves for a number that has no neighbours.
SECTOR = 32
# The numbers of a tile in `value_reweight`: by a head, and by candidates.
STATISTICS = 4
CANDIDATES_STATISTICS = 2


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
    outside, turn = DENSE_BFLOAT16 if half else DENSE_FLOAT32
    turns = math.ceil(rows / HEAD_ROWS)
    return Work(
        _head_resources("value_reweight_add_head", half=half),
        math.ceil(VOCABULARY / HEAD_TOKENS),
        2 * logits + _head_bytes(half=half),
        logits + _head_bytes(half=half) + _feature_bytes(rows, half=half),
        outside + turn * turns,
        _product_seconds(rows, half=half),
        # First the head. Then each turn waits for features, for their rows, and for logits.
        memory_waits=1 + turns,
        cache_waits=2 * turns,
        barriers=1 + 6 * turns,
    )


def head_tile(rows: int, *, half: bool) -> Work:
    """Return the work of the kernel that reads the logits for a draw by a head's values."""
    logits = (HALF if half else FLOAT) * rows * VOCABULARY
    outside, turn = HEAD_BFLOAT16 if half else HEAD_FLOAT32
    turns = math.ceil(rows / HEAD_ROWS)
    tiles = math.ceil(VOCABULARY / HEAD_TOKENS)
    return Work(
        _head_resources("value_reweight_head_tile", half=half),
        tiles,
        logits + _head_bytes(half=half) + STATISTICS * FLOAT * rows * tiles,
        logits + _head_bytes(half=half) + _feature_bytes(rows, half=half),
        outside + turn * turns,
        _product_seconds(rows, half=half),
        exponentials=2 * rows * VOCABULARY,
        # As in the dense form.
        memory_waits=1 + turns,
        cache_waits=2 * turns,
        barriers=1 + 17 * turns,
    )


def feature_split(rows: int) -> Work:
    """Return the work of the kernel that splits the features for a float32 head."""
    moved = FLOAT * rows * RANK
    return Work(
        compiled("value_reweight_split"),
        math.ceil(rows / SPLIT_ROWS),
        2 * moved,
        moved,
        SPLIT,
        memory_waits=1,
        barriers=1,
    )


def head_pick(rows: int, *, half: bool) -> Work:
    """Return the work of the kernel that draws by a head's values."""
    tiles = math.ceil(VOCABULARY / HEAD_TOKENS)
    read = (HALF if half else FLOAT) * rows * HEAD_TOKENS * RANK
    return Work(
        compiled("value_reweight_head_pick", logits="*bf16" if half else "*fp32"),
        rows,
        STATISTICS * FLOAT * rows * tiles + read,
        # The four numbers of a tile lie side by side.
        SECTOR * rows * tiles + read,
        HEAD_PICK_BFLOAT16 if half else HEAD_PICK_FLOAT32,
        memory_waits=2,
        cache_waits=3,
        barriers=35,
    )


def candidates_tile(rows: int, candidates: int, *, half: bool) -> Work:
    """Return the work of the kernel that reads the logits for a draw by candidates."""
    logits = (HALF if half else FLOAT) * rows * VOCABULARY
    tiles = math.ceil(VOCABULARY / CANDIDATES_TOKENS)
    groups = math.ceil(tiles / CANDIDATES_GROUP)
    looks = math.ceil(candidates / WARP)
    found = candidates / groups
    instructions = CANDIDATES_TILE_BFLOAT16 if half else CANDIDATES_TILE_FLOAT32
    instructions += CANDIDATES_LOOK * looks
    return Work(
        compiled("value_reweight_candidates_tile", logits=_logits_type(half=half), SLOTS=32),
        # One more program per row writes the logits of the candidates.
        rows * (1 + groups),
        logits + CANDIDATES_STATISTICS * FLOAT * rows * tiles,
        logits,
        instructions + CANDIDATES_FOUND * found,
        exponentials=rows * VOCABULARY,
        memory_waits=1,
        cache_waits=looks,
        barriers=3,
    )


def candidates_pick(rows: int, *, half: bool) -> Work:
    """Return the work of the kernel that draws by candidates."""
    tiles = math.ceil(VOCABULARY / CANDIDATES_TOKENS)
    logits = (HALF if half else FLOAT) * rows * CANDIDATES_TOKENS
    return Work(
        compiled("value_reweight_candidates_pick", logits=_logits_type(half=half)),
        rows,
        logits,
        CANDIDATES_STATISTICS * FLOAT * rows * tiles + logits,
        CANDIDATES_PICK,
        memory_waits=1,
        # Numbers of the row, those of its tiles, and three times its candidates.
        cache_waits=5,
        barriers=31,
    )


def _logits_type(*, half: bool) -> str:
    return "*bf16" if half else "*fp32"


def _head_resources(kernel: str, *, half: bool) -> Mapping[str, Any]:
    return compiled(kernel, RANK=RANK, IS_SPLIT=not half)


def _head_bytes(*, half: bool) -> float:
    """Return the bytes of the head, which each tile of tokens reads once."""
    return (HALF if half else FLOAT) * VOCABULARY * RANK


def _feature_bytes(rows: int, *, half: bool) -> float:
    """Return the bytes of features that all tiles of tokens read from the L2 cache.

    Both parts of a split number have as many bytes as the number.
    """
    tiles = math.ceil(VOCABULARY / HEAD_TOKENS)
    return tiles * (HALF if half else FLOAT) * rows * RANK


def _product_seconds(rows: int, *, half: bool) -> float:
    """Return the time of the products: three for a float32 head, in float16, which is as fast."""
    products = 1 if half else 3
    return products * 2 * rows * VOCABULARY * RANK / BFLOAT16


def _slots(k: int) -> int:
    """Return k, rounded up to a power of two."""
    return int(1 << (k - 1).bit_length())
