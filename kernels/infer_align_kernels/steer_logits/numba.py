"""Steering by heads on a CPU in one call, compiled by Numba.

A step of a small model takes a few milliseconds. Separate operations of torch cost a tenth of it,
most of that before they compute anything.

This module compiles its functions when it is first imported, which takes some seconds. It needs
Numba, which vLLM requires.
"""

# Numba has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite.binding import ffi
from numba import njit

from infer_align_kernels.steer_logits.types import HeadTable, SteeredRows

# Logits that are compared with the smallest candidate at once. In most blocks, none is larger.
BLOCK = 16
# Sums may be reordered, so that a processor adds several numbers at once. Every row is summed in
# the same order, so it does not depend on its batch.
COMPILED = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc"},
    # The code is kept beside this file, where that is possible.
    "cache": os.access(Path(__file__).parent, os.W_OK),
}


def _answer_for_functions_only() -> None:
    """Let llvmlite's library no longer answer for `__dict__`, as if that were one of its functions.

    vLLM's CPU runner looks at `__dict__` of every object in every module, and would fail there.
    """
    library = type(ffi.lib)
    function = getattr(library, "__getattr__", None)
    if function is None:
        return

    def attribute(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return function(self, name)

    library.__getattr__ = attribute


_answer_for_functions_only()


@njit("f4(f4)", **COMPILED)
def clean_logit(logit):
    """Return the logit, or -inf for NaN."""
    return np.float32(-np.inf) if np.isnan(logit) else logit


@njit("b1(f4[::1], i8, i8, f4)", **COMPILED)
def has_larger(row, start, end, smallest):
    """Return True if a logit from `start` to `end` is larger than `smallest`."""
    is_larger = False
    # Without a branch, a processor compares several logits at once.
    for token in range(start, end):
        is_larger |= row[token] > smallest
    return is_larger


@njit("void(i8[::1], f4[::1], i8, i8, f4)", **COMPILED)
def insert(ids, largest, place, token, logit):
    """Insert a token at `place` or before it, so that the logits stay in descending order."""
    while place > 0 and logit > largest[place - 1]:
        largest[place] = largest[place - 1]
        ids[place] = ids[place - 1]
        place -= 1
    largest[place] = logit
    ids[place] = token


@njit("void(f4[::1], i8[::1], f4[::1])", **COMPILED)
def select_largest(row, ids, largest):
    """Write the ids of the k largest logits, largest first and equal ones by lower id.

    Args:
        row: [V] logits. NaN counts as -inf.
        ids: [k] ids, overwritten.
        largest: [k or more] memory.
    """
    last = len(ids) - 1
    for token in range(len(ids)):
        insert(ids, largest, token, token, clean_logit(row[token]))
    for start in range(len(ids), len(row), BLOCK):
        end = min(start + BLOCK, len(row))
        if has_larger(row, start, end, largest[last]):
            for token in range(start, end):
                if row[token] > largest[last]:
                    insert(ids, largest, last, token, row[token])


@njit("i8(f4[::1], f4, i8[::1])", **COMPILED)
def select_likely(row, log_min_p, ids):
    """Write the ids of the likely tokens; return their number. [V], [], [V]."""
    peak = np.float32(-np.inf)
    for logit in row:
        peak = max(peak, clean_logit(logit))
    smallest = peak + log_min_p
    count = 0
    for token in range(len(row)):
        if clean_logit(row[token]) >= smallest:
            ids[count] = token
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
    memory = np.empty(vocabulary, np.int64)
    shifts = np.empty(vocabulary, np.float32)
    for s in range(len(records)):
        for slot in range(out.shape[1]):
            out[s, slot] = -1
        count = records[s, 1]
        if count == 0:
            continue
        first = records[s, 0] * stride
        row = logits[first : first + vocabulary]
        if count < 0:
            count = select_likely(row, numbers[s, columns - 1], memory)
        else:
            select_largest(row, memory[:count], shifts)
            for slot in range(count):
                out[s, slot] = memory[slot]
        beta = numbers[s, columns:]
        strongest = np.float32(0)
        for weight in beta:
            strongest = max(strongest, abs(weight))
        if strongest > 0:
            ids, masked = memory[:count], records[s, 2] != 0
            steer_row(row, ids, features[s], table, beta, places, shifts[:count], masked)


def steer_logits(
    logits: torch.Tensor, features: torch.Tensor, heads: HeadTable, rows: SteeredRows
) -> torch.Tensor:
    """Steer each row; see `infer_align_kernels.steer_logits`."""
    out = torch.empty((len(features), rows.k), dtype=torch.int64)
    vocabulary, stride = logits.shape[1], logits.stride(0)
    if len(features):
        # Rows may be strided, so the memory of all rows is one array.
        memory = logits.as_strided(((len(logits) - 1) * stride + vocabulary,), (1,))
        states = features.contiguous().numpy()
        table, places = heads.packed
        steer_rows(
            memory.numpy(), vocabulary, stride, states, table, places, *rows.arrays, out.numpy()
        )
    return out
