"""The layers of value heads on a CPU, compiled by Numba.

For few rows and a small head, torch's operations cost more before and after they compute than
while they compute.

This module compiles its functions when it is first imported, which takes some seconds. It needs
Numba, which vLLM requires.
"""

# Numba has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numba import njit

from infer_align_kernels.numba_options import COMPILED

# The most weights of a head's layers. The product of larger ones is a task for torch: it splits the
# work over all cores, and reads each weight once for many rows.
MAX_WEIGHTS = 1 << 15
HALF_ROOT = np.float32(0.5**0.5)
# Outside of this, erf is 1 or -1 in float32.
ERF_LIMIT = np.float32(4.0)


@njit("f4(f4)", **COMPILED)
def gelu(x):
    """Return x times the normal distribution function of x, within 3e-7 of x.

    erf is a quotient of two polynomials, with the coefficients that Eigen uses for float32.
    A processor computes several at once, which a call of a mathematical library would prevent.
    """
    z = min(max(x * HALF_ROOT, -ERF_LIMIT), ERF_LIMIT)
    square = z * z
    numerator = np.float32(-2.72614225801306e-10)
    numerator = numerator * square + np.float32(2.77068142495902e-08)
    numerator = numerator * square + np.float32(-2.10102402082508e-06)
    numerator = numerator * square + np.float32(-5.69250639462346e-05)
    numerator = numerator * square + np.float32(-7.34990630326855e-04)
    numerator = numerator * square + np.float32(-2.95459980854025e-03)
    numerator = numerator * square + np.float32(-1.60960333262415e-02)
    divisor = np.float32(-1.45660718464996e-05)
    divisor = divisor * square + np.float32(-2.13374055278905e-04)
    divisor = divisor * square + np.float32(-1.68282697438203e-03)
    divisor = divisor * square + np.float32(-7.37332916720468e-03)
    divisor = divisor * square + np.float32(-1.42647390514189e-02)
    erf = z * numerator / divisor
    # At the limit, the quotient is not exactly 1.
    erf = np.float32(1.0) if z == ERF_LIMIT else erf
    erf = np.float32(-1.0) if z == -ERF_LIMIT else erf
    half = np.float32(0.5) * x
    return half + half * erf


@njit("void(f4[::1], f4[:, ::1], f4[::1])", **COMPILED)
def add_product(x, weights, out):
    """Add x times a matrix to `out`. [n], [n, m], [m].

    Four products are added at once, so that `out` is read and written a quarter as often.
    """
    complete = len(x) // 4 * 4
    for i in range(0, complete, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(len(out)):
            first = a * weights[i, j] + b * weights[i + 1, j]
            out[j] += first + c * weights[i + 2, j] + d * weights[i + 3, j]
    for i in range(complete, len(x)):
        for j in range(len(out)):
            out[j] += x[i] * weights[i, j]


@njit("void(f4[:, ::1], f4[:, ::1], f4[:, ::1], i8)", **COMPILED)
def write_linear(hidden, weights, out, place):
    """Write h P to the columns of `out` that begin at `place`. [S, d], [d, r], [S, columns]."""
    rank = weights.shape[1]
    for s in range(len(hidden)):
        features = out[s, place : place + rank]
        features[:] = 0
        add_product(hidden[s], weights, features)


@njit("void(f4[:, ::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1], i8)", **COMPILED)
def write_deep(hidden, first_layer, bias, second_layer, out, place):
    """Write gelu(h W1 + c1) W2 to the columns of `out` that begin at `place`.

    Args:
        hidden: [S, d].
        first_layer: [d, n].
        bias: [n].
        second_layer: [n, r].
        out: [S, columns].
        place: the first of r columns.
    """
    rank = second_layer.shape[1]
    activations = np.empty(len(bias), np.float32)
    for s in range(len(hidden)):
        activations[:] = bias
        add_product(hidden[s], first_layer, activations)
        for j in range(len(activations)):
            activations[j] = gelu(activations[j])
        features = out[s, place : place + rank]
        features[:] = 0
        add_product(activations, second_layer, features)


def are_small(heads: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    """Return True if the layers of each head, by name, have at most MAX_WEIGHTS weights."""
    return all(sum(layer.numel() for layer in head.values()) <= MAX_WEIGHTS for head in heads)


class CompiledLayers:
    """The layers of M heads, which turn hidden states to features."""

    def __init__(self, heads: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take the layers of each head: P, or W1, c1 and W2; float32 on a CPU."""
        # Of each head: the first of its columns, and its layers with an input per row.
        self._heads = []
        self._columns = 0
        for head in heads:
            names = ("P",) if "P" in head else ("W1", "c1", "W2")
            layers = [head[name].t().contiguous().numpy() for name in names]
            self._heads.append((self._columns, layers))
            self._columns += layers[-1].shape[1]

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute u(h) of all heads. [S, d] float32 -> [S, sum of ranks]."""
        states = hidden.contiguous().numpy()
        out = np.empty((len(states), self._columns), np.float32)
        for place, layers in self._heads:
            write = write_linear if len(layers) == 1 else write_deep
            write(states, *layers, out, place)
        return torch.from_numpy(out)
