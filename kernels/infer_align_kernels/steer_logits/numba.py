"""Steering by heads on a CPU in one call, compiled by Numba.

A step of a small model takes a few milliseconds. Separate operations of torch cost a tenth of it,
most of that before they compute anything.

This module compiles its functions when it is first imported, which takes some seconds. It needs
Numba, which vLLM requires.
"""

# Numba has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from infer_align_kernels.numba_options import COMPILED
from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows

# Parts of a row, see `write_maxima`. Not fewer than the largest number of candidates.
LANES = 128
# The most steps of a search, see `bound_of_largest`.
BISECTIONS = 16


@njit("f4(f4)", **COMPILED)
def clean_logit(logit):
    """Return the logit, or -inf for NaN."""
    return np.float32(-np.inf) if np.isnan(logit) else logit


@njit("void(f4[::1], f4[::1])", **COMPILED)
def write_maxima(row, maxima):
    """Write the largest logit of each lane. NaN counts as -inf. [V] -> [LANES].

    Lane i holds every token whose id is i modulo LANES. So a processor compares neighbouring
    tokens at once, and never has to guess a branch.
    """
    for lane in range(LANES):
        maxima[lane] = -np.inf
    complete = len(row) // LANES * LANES
    for start in range(0, complete, LANES):
        block = row[start : start + LANES]
        for lane in range(LANES):
            maxima[lane] = block[lane] if block[lane] > maxima[lane] else maxima[lane]
    for token in range(complete, len(row)):
        maxima[token - complete] = max(maxima[token - complete], clean_logit(row[token]))


@njit("i8(f4[::1], f4)", **COMPILED)
def count_lanes(maxima, bound):
    """Return the number of lanes whose largest logit is at least `bound`."""
    count = np.int32(0)
    for lane in range(LANES):
        count += np.int32(maxima[lane] >= bound)
    return count


@njit("f4(f4[::1], i8)", **COMPILED)
def bound_of_largest(maxima, k):
    """Return a lower bound of the k largest logits, close to the smallest of them.

    If k lanes hold a logit of at least `bound`, the k largest logits are at least `bound`. Any
    such bound gives the same candidates, so the search may end early.

    Args:
        maxima: [LANES], see `write_maxima`.
        k: at most LANES.
    """
    low = np.float32(np.inf)
    high = np.float32(-np.inf)
    for maximum in maxima:
        high = max(high, maximum)
        if maximum > -np.inf:
            low = min(low, maximum)
    if count_lanes(maxima, low) < k:
        return np.float32(-np.inf)
    for _ in range(BISECTIONS):
        middle = low + (high - low) * np.float32(0.5)
        count = count_lanes(maxima, middle)
        if count >= k:
            low = middle
        else:
            high = middle
        if k <= count <= k + 2:
            break
    return low


@njit("i8(f4[::1], f4[::1], f4, i8[::1], i8[::1])", **COMPILED)
def collect(row, maxima, bound, lanes, ids):
    """Write the ids of all logits that are at least `bound`, lane by lane; return their number.

    Args:
        row: [V] logits. NaN is collected too.
        maxima: [LANES], see `write_maxima`.
        bound: the smallest logit.
        lanes: [LANES + 1] memory.
        ids: [V + 1], overwritten. The last place is memory.
    """
    used = 0
    # An id that does not count is overwritten by the next one. That is faster than a branch.
    for lane in range(LANES):
        lanes[used] = lane
        used += int(maxima[lane] >= bound)
    count = 0
    for i in range(used):
        for token in range(lanes[i], len(row), LANES):
            ids[count] = token
            count += int(not row[token] < bound)
    return count


@njit("void(i8[::1], f4[::1], i8, i8, f4)", **COMPILED)
def insert(ids, largest, place, token, logit):
    """Insert a token at `place` or before it: by descending logit, and equal ones by lower id."""
    while place > 0 and (
        logit > largest[place - 1] or (logit == largest[place - 1] and token < ids[place - 1])
    ):
        largest[place] = largest[place - 1]
        ids[place] = ids[place - 1]
        place -= 1
    largest[place] = logit
    ids[place] = token


@njit("void(f4[::1], i8[::1], f4[::1], f4[::1], i8[::1], i8[::1])", **COMPILED)
def select_largest(row, ids, largest, maxima, lanes, collected):
    """Write the ids of the k largest logits, largest first and equal ones by lower id.

    Args:
        row: [V] logits. NaN counts as -inf.
        ids: [k] ids, overwritten.
        largest: [k or more] memory.
        maxima: [LANES] memory.
        lanes: [LANES + 1] memory.
        collected: [V + 1] memory.
    """
    last = len(ids) - 1
    write_maxima(row, maxima)
    count = collect(row, maxima, bound_of_largest(maxima, len(ids)), lanes, collected)
    for i in range(count):
        token = collected[i]
        logit = clean_logit(row[token])
        if i <= last:
            insert(ids, largest, i, token, logit)
        elif logit > largest[last] or (logit == largest[last] and token < ids[last]):
            insert(ids, largest, last, token, logit)


@njit("i8(f4[::1], f4, f4[::1], i8[::1], i8[::1])", **COMPILED)
def select_likely(row, log_min_p, maxima, lanes, ids):
    """Write the ids of the likely tokens; return their number. See `select_largest`."""
    write_maxima(row, maxima)
    peak = np.float32(-np.inf)
    for maximum in maxima:
        peak = max(peak, maximum)
    smallest = peak + log_min_p
    collected = collect(row, maxima, smallest, lanes, ids)
    count = 0
    for i in range(collected):
        if clean_logit(row[ids[i]]) >= smallest:
            ids[count] = ids[i]
            count += 1
    return count


@njit("f4(i8, f4[::1], f4[:, ::1], f4[::1], i8[::1])", **COMPILED)
def weigh_values(token, features, table, beta, places):
    """Return the sum over m of beta_m times the value of a token; see `steer_row`."""
    heads = len(beta)
    total = np.float32(0)
    for m in range(heads):
        # A head of weight 0 is not read, so it may hold NaN.
        if beta[m] != 0:
            value = table[token, places[heads] + m]
            for place in range(places[m], places[m + 1]):
                value += table[token, place] * features[place]
            total += beta[m] * value
    return total


@njit("f4(f4[::1])", **COMPILED)
def finite_mean(numbers):
    """Return the mean of the finite numbers; 0 if there is none."""
    total = np.float32(0)
    count = 0
    for number in numbers:
        if np.isfinite(number):
            total += number
            count += 1
    return total / np.float32(max(count, 1))


@njit("void(f4[::1], i8[::1], f4[::1], f4[:, ::1], f4[::1], i8[::1], f4[::1], b1)", **COMPILED)
def steer_row(row, ids, features, table, beta, places, shifts, masked):
    """Add the centred, weighted values of the candidates to their logits.

    Args:
        row: [V] logits, overwritten.
        ids: [k] candidates.
        features: [d] of all heads.
        table: [V, d + M] weights of all heads, then their biases.
        beta: [M].
        places: [M + 1] where the features of each head begin, and their number.
        shifts: [k] memory.
        masked: True to set all other logits to -inf.
    """
    for c in range(len(ids)):
        shifts[c] = weigh_values(ids[c], features, table, beta, places)
    mean = finite_mean(shifts)
    for c in range(len(ids)):
        is_usable = np.isfinite(shifts[c])
        steered = clean_logit(row[ids[c]]) + (shifts[c] - mean)
        shifts[c] = steered if is_usable else np.float32(-np.inf)
    if masked:
        for token in range(len(row)):
            row[token] = -np.inf
    for c in range(len(ids)):
        row[ids[c]] = shifts[c]


@njit(
    "void(f4[::1], i8, i8, f4[:, ::1], f4[:, ::1], i8[::1], i4[:, ::1], f4[:, ::1], i8[:, ::1])",
    **COMPILED,
)
def steer_rows(logits, vocabulary, stride, features, table, places, records, numbers, out):
    """Steer every row; see `infer_align_kernels.steer_logits`.

    Args:
        logits: [memory of all rows], overwritten.
        vocabulary: V.
        stride: from a row of the logits to the next.
        features: [S, d].
        table: [V, d + M], see `steer_row`.
        places: [M + 1], see `steer_row`.
        records: [S, 4 + M] of `SteeredRows`, as int32. Their layout is read from their shape: the
            code that is kept would not notice a change of a constant in another file.
        numbers: the same as float32.
        out: [S, k] candidates, overwritten.
    """
    columns = records.shape[1] - (len(places) - 1)
    memory = np.empty(vocabulary + 1, np.int64)
    shifts = np.empty(vocabulary, np.float32)
    maxima = np.empty(LANES, np.float32)
    lanes = np.empty(LANES + 1, np.int64)
    for s in range(len(records)):
        for slot in range(out.shape[1]):
            out[s, slot] = -1
        count = records[s, 1]
        if count == 0:
            continue
        first = records[s, 0] * stride
        row = logits[first : first + vocabulary]
        if count < 0:
            count = select_likely(row, numbers[s, columns - 1], maxima, lanes, memory)
            ids = memory[:count]
        else:
            ids = out[s, :count]
            select_largest(row, ids, shifts, maxima, lanes, memory)
        beta = numbers[s, columns:]
        strongest = np.float32(0)
        for weight in beta:
            strongest = max(strongest, abs(weight))
        if strongest > 0:
            masked = records[s, 2] != 0
            steer_row(row, ids, features[s], table, beta, places, shifts[:count], masked)


def steer_logits(
    logits: torch.Tensor, features: torch.Tensor, heads: HeadTable, rows: SteeredRows
) -> torch.Tensor:
    """Steer each row; see `infer_align_kernels.steer_logits`."""
    # A call of NumPy takes less time than one of torch.
    out = np.empty((len(features), rows.k), np.int64)
    if len(features):
        table, places = heads.packed
        memory, vocabulary, stride = _memory_of(logits)
        states = features.contiguous().numpy()
        steer_rows(memory, vocabulary, stride, states, table, places, *rows.arrays, out)
    return torch.from_numpy(out)


def _memory_of(logits: torch.Tensor) -> tuple[NDArray[np.float32], int, int]:
    """Return the memory of all rows as one array, the vocabulary, and the stride of the rows."""
    rows, vocabulary = logits.shape
    if logits.is_contiguous():
        return logits.numpy().reshape(-1), vocabulary, vocabulary
    stride = logits.stride(0)
    return logits.as_strided(((rows - 1) * stride + vocabulary,), (1,)).numpy(), vocabulary, stride
