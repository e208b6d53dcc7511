"""Top-k in torch: the definition of the kernel, and the implementation on CPU."""

from __future__ import annotations

import struct

import numpy as np
import torch
from numpy.typing import NDArray

# Tokens per tile, and the smallest vocabulary for which tiles take less time than one `topk`.
TILE = 16
SMALLEST_TILED = 4096
# Logits that are read beyond the k largest. They show which logits equal the last candidate.
# Rounded logits are often equal.
MORE = 1
MORE_IF_ROUNDED = 11
# A float32 number whose lowest bits are 0 comes from a 16-bit format. So many logits are looked at.
LOWEST_BITS = 0x1FFF
CHECKED = 2
# Number of keys that `top_candidates_by_key` makes at once, 16 bytes each.
KEYS_AT_ONCE = 2**23
# Ids are below this number, which fills the lower half of a key.
LARGEST_ID = 0xFFFFFFFF


def top_candidates(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k largest logits of each row; see `infer_align_kernels.top_candidates`."""
    more = MORE_IF_ROUNDED if _is_rounded(logits) else MORE
    values, ids = _largest(logits, min(k + more, logits.shape[1]))
    if values.shape[1] > 1 and _is_decreasing(_on_host(values)[:, : k + 1]):
        return ids[:, :k]
    if bool(values[:, 0].isnan().any()):
        return top_candidates(logits.masked_fill(logits.isnan(), -torch.inf), k)
    # topk leaves open which of the equal logits it selects, and their order.
    if values.shape[1] < logits.shape[1]:
        _select_equal(logits, values, ids, k)
    return _order_equal(values, ids)[:, :k]


def _is_rounded(logits: torch.Tensor) -> bool:
    """Return True if the logits were computed in 16 bits. Only a choice of speed depends on it."""
    if logits.dtype != torch.float32 or not logits.is_cpu or not len(logits):
        return True
    # Numbers of Python: two of them take a quarter of the time of an operation on arrays.
    first = logits[0, :CHECKED].tolist()
    bits = struct.unpack(f"<{len(first)}I", struct.pack(f"<{len(first)}f", *first))
    return not any(number & LOWEST_BITS for number in bits)


def _on_host(values: torch.Tensor) -> NDArray[np.float32]:
    """Return the values as an array; those in float32 on a CPU are not copied."""
    # Each call of torch costs as much as the whole comparison of a few rows, even a call that
    # changes nothing.
    if values.dtype != torch.float32:
        values = values.float()
    return values.numpy() if values.is_cpu else values.cpu().numpy()


def _is_decreasing(values: NDArray[np.float32]) -> bool:
    """Return True if the values of each row fall. Equal values and NaN do not."""
    is_smaller = values[:, 1:] < values[:, :-1]
    return bool(np.count_nonzero(is_smaller) == is_smaller.size)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest logits of each row and their ids, as `topk` does. [B, count] each.

    A large vocabulary is cut into tiles. The largest logits are in the tiles with the largest
    peaks, so `topk` reads the peaks and these tiles only. It takes ten times as long per number as
    the peaks do.
    """
    vocabulary = logits.shape[1]
    tiles = vocabulary // TILE
    if vocabulary < SMALLEST_TILED or count > tiles // TILE:
        return logits.topk(count, dim=1)
    # The tokens of a tile are `tiles` ids apart, so the peaks are reduced over a strided dimension.
    tiled = tiles * TILE
    peaks = logits[:, :tiled].reshape(-1, TILE, tiles).amax(dim=1)
    _, chosen = _largest(peaks, count)
    # Token n of tile i has the id i + n * tiles. [B, TILE, count]
    offsets = torch.arange(0, tiled, tiles, device=logits.device)[None, :, None]
    tile_ids = chosen[:, None, :] + offsets
    ids = tile_ids.flatten(1)
    if tiled < vocabulary:
        rest = torch.arange(tiled, vocabulary, device=logits.device)
        ids = torch.cat([ids, rest.expand(len(ids), -1)], dim=1)
    values, places = logits.gather(1, ids).topk(count, dim=1)
    return values, ids.gather(1, places)


def _select_equal(logits: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, k: int) -> None:
    """Take the lowest of the equal ids in rows where the last of the m logits equals candidate k.

    Args:
        logits: [B, V] without NaN.
        values: [B, m] the largest logits.
        ids: [B, m] their ids, overwritten in such rows.
        k: number of candidates, at most m.
    """
    count = values.shape[1]
    rows = (values[:, -1] == values[:, k - 1]).nonzero()[:, 0]
    if not len(rows):
        return
    smallest = values[rows, -1:]
    equal = logits[rows] == smallest
    counts = equal.sum(dim=1)
    pair_rows, pair_ids = equal.nonzero(as_tuple=True)
    # The pairs of a row stand together, by id. Number them after the larger logits of the row.
    first_pair = counts.cumsum(0) - counts
    larger = (values[rows] > smallest).sum(dim=1)
    numbers = torch.arange(len(pair_rows), device=logits.device)
    slots = numbers - first_pair[pair_rows] + larger[pair_rows]
    selected = slots < count
    selected_rows = rows[pair_rows[selected]]
    ids[selected_rows, slots[selected]] = pair_ids[selected]


def _order_equal(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the ids with those of equal values by id. [B, m] each; values are descending."""
    ascending, places = ids.sort(dim=1)
    order = values.gather(1, places).sort(dim=1, descending=True, stable=True).indices
    return ascending.gather(1, order)


def top_candidates_by_key(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Select the k largest logits without reading numbers back from the device.

    Each token gets a 64-bit key: the upper half orders by logit, the lower half by descending id.
    All keys of a row are different, so `topk` leaves nothing open. The rows are processed in
    groups, which limits the memory and does not change the result.
    """
    vocabulary = logits.shape[1]
    rows = max(1, KEYS_AT_ONCE // vocabulary)
    descending_ids = LARGEST_ID - torch.arange(vocabulary, device=logits.device)
    selected = []
    for start in range(0, len(logits), rows):
        group = logits[start : start + rows].float()
        clean = group.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        # Adding 0 turns -0 into 0.
        keys = clean.add_(0.0).view(torch.int32).long()
        # The bits of negative floats are in reverse order as integers.
        keys ^= (keys >> 63) & 0x7FFFFFFF
        keys = (keys << 32).bitwise_or_(descending_ids)
        selected.append(keys.topk(k, dim=1).indices)
    if not selected:
        return logits.new_empty((0, k), dtype=torch.int64)
    return torch.cat(selected)
