"""Top-k in Triton: one read of the logits, then one small program per row.

A row is cut into tiles. The first kernel reads the logits once and writes the largest logit of each
tile. The k largest logits stand in the k tiles with the largest ones, so the second kernel reads
only these tiles again.
"""

# Triton compiles the kernels and reads their signatures.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# A key is a logit as an integer of the same order. This one is below the key of every logit.
NO_KEY = tl.constexpr(-2147483648)
# Larger than every token id and tile index.
NO_INDEX = tl.constexpr(2147483647)
# The smallest tile, and the largest number of tiles, which are powers of two.
MIN_TILE = 64
MAX_TILES = 2048
# Tokens that one program of the first kernel reads.
BLOCK = 4096
PEAK_WARPS = 8


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles of a vocabulary. They depend on its size and on k alone, not on the batch.

    Attributes:
        tile: tokens per tile.
        tiles: tiles per row.
        slots: the candidates of a row, rounded up to a power of two.
    """

    tile: int
    tiles: int
    slots: int

    @property
    def tile_slots(self) -> int:
        """Return the tiles of a row, rounded up to a power of two."""
        return int(triton.next_power_of_2(self.tiles))

    @property
    def num_warps(self) -> int:
        """Return the warps of a program that selects: 32 keys per thread, or 64 for large tiles."""
        return 4 if self.slots * self.tile <= 4096 else 8


@triton.jit
def logit_keys(x):
    """Turn logits into integers of the same order. NaN counts as -inf, and -0 as 0."""
    # Only NaN differs from itself.
    x = tl.where(x != x, float("-inf"), x)  # noqa: PLR0124
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    # The bits of negative numbers are in reverse order as integers.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_logits(keys):
    """Turn keys back into logits."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def tile_peaks_kernel(
    logits,
    records,
    peaks,
    V,
    N,
    row_stride,
    record_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    HAS_RECORDS: tl.constexpr,
):
    """Write the largest key of TILES tiles of one row. Grid: (blocks of tiles, rows).

    A record begins with the row of the logits, and 0 for a row that is not read.
    """
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tokens = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    source = row
    end = V
    if HAS_RECORDS:
        source = tl.load(records + row * record_stride).to(tl.int64)
        end = tl.where(tl.load(records + row * record_stride + 1) != 0, V, 0)
    x = tl.load(logits + source * row_stride + tokens, mask=tokens < end, other=float("-inf"))
    peak = tl.max(logit_keys(x.to(tl.float32)), axis=1)
    tl.store(peaks + row * N + tiles, peak, mask=tiles < N)


@triton.jit
def select_tiles(peaks, row, N, count, SLOTS: tl.constexpr, TILES: tl.constexpr):
    """Return the `count` tiles with the largest peaks, equal ones by lower index.

    Slots without a tile hold N.
    """
    tiles = tl.arange(0, TILES)
    keys = tl.load(peaks + row * N + tiles, mask=tiles < N, other=NO_KEY)
    slots = tl.arange(0, SLOTS)
    selected = tl.zeros((SLOTS,), dtype=tl.int32) + N
    for slot in range(count):
        best = tl.max(keys, axis=0)
        tile = tl.min(tl.where(keys == best, tiles, NO_INDEX), axis=0)
        selected = tl.where((slots == slot) & (best > NO_KEY), tile, selected)
        keys = tl.where(tiles == tile, NO_KEY, keys)
    return selected


@triton.jit
def select_candidates(
    logits,
    peaks,
    row,
    source,
    V,
    N,
    row_stride,
    count,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Return the ids and the logits of a row's `count` largest logits, [SLOTS] each.

    Slots past `count` hold -1 and 0.

    A row's largest logits stand in the `count` tiles with the largest peaks: a logit in another
    tile has at least `count` peaks before it, which are larger, or equal with a lower id.
    """
    selected = select_tiles(peaks, row, N, count, SLOTS, TILES)
    tokens = selected[:, None] * TILE + tl.arange(0, TILE)[None, :]
    in_row = tokens < V
    x = tl.load(logits + source * row_stride + tokens, mask=in_row, other=0.0).to(tl.float32)
    keys = tl.where(in_row, logit_keys(x), NO_KEY)
    slots = tl.arange(0, SLOTS)
    ids = tl.full((SLOTS,), -1, dtype=tl.int32)
    best_keys = tl.zeros((SLOTS,), dtype=tl.int32)
    for slot in range(count):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        token = tl.min(tl.min(tl.where(keys == best, tokens, NO_INDEX), axis=1), axis=0)
        ids = tl.where(slots == slot, token, ids)
        best_keys = tl.where(slots == slot, best, best_keys)
        keys = tl.where(tokens == token, NO_KEY, keys)
    return ids, key_logits(best_keys)


@triton.jit
def top_candidates_kernel(
    logits,
    peaks,
    out,
    V,
    N,
    K,
    row_stride,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the ids of the K largest logits of one row. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    ids, _ = select_candidates(logits, peaks, row, row, V, N, row_stride, K, SLOTS, TILE, TILES)
    slots = tl.arange(0, SLOTS)
    tl.store(out + row * K + slots, ids.to(tl.int64), mask=slots < K)


def plan(vocabulary: int, k: int) -> Cut:
    """Cut a vocabulary for k candidates."""
    tile = max(MIN_TILE, triton.next_power_of_2(triton.cdiv(vocabulary, MAX_TILES)))
    return Cut(tile, triton.cdiv(vocabulary, tile), triton.next_power_of_2(k))


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Launch the kernels; see `infer_align_kernels.top_candidates`. k is at most MAX_CANDIDATES."""
    rows, vocabulary = logits.shape
    out = torch.empty((rows, k), dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    cut = plan(vocabulary, k)
    peaks = torch.empty((rows, cut.tiles), dtype=torch.int32, device=logits.device)
    write_tile_peaks(logits, None, peaks, cut)
    top_candidates_kernel[(rows,)](
        logits,
        peaks,
        out,
        vocabulary,
        cut.tiles,
        k,
        logits.stride(0),
        SLOTS=cut.slots,
        TILE=cut.tile,
        TILES=cut.tile_slots,
        num_warps=cut.num_warps,
    )
    return out


def write_tile_peaks(
    logits: torch.Tensor, records: torch.Tensor | None, peaks: torch.Tensor, cut: Cut
) -> None:
    """Write the largest key of each tile.

    Args:
        logits: [B, V]; the tokens of a row are contiguous.
        records: [S, 2 or more] int32: the row of the logits, and 0 for a row that is not read; None
            for all rows.
        peaks: [S, tiles] int32, overwritten.
        cut: how the vocabulary is cut.
    """
    tiles_at_once = max(1, BLOCK // cut.tile)
    grid = (triton.cdiv(cut.tiles, tiles_at_once), len(peaks))
    tile_peaks_kernel[grid](
        logits,
        # Any pointer will do without records: the kernel does not read it.
        peaks if records is None else records,
        peaks,
        logits.shape[1],
        cut.tiles,
        logits.stride(0),
        0 if records is None else records.stride(0),
        TILE=cut.tile,
        TILES=tiles_at_once,
        HAS_RECORDS=records is not None,
        num_warps=PEAK_WARPS,
    )
