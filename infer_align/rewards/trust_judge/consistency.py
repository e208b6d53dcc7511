"""Measure how far the scores and comparisons of a judge agree.

The two measures are those of TrustJudge (2509.21117), section 2. The *relation* of two items is the
judge's comparison of them: larger (better), equal or smaller. In shapes, N is the number of items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from infer_align.rewards.trust_judge.readings import EQUAL, LARGER, SMALLER, Relation

Relations = Mapping[tuple[int, int], Relation]  # (i, j), i < j -> relation of i to j
Signs = NDArray[np.int8]  # 1 is larger, 0 equal, -1 smaller
Mask = NDArray[np.bool_]

_SIGN = {LARGER: 1, EQUAL: 0, SMALLER: -1}


def conflict_ratio(
    scores: Mapping[int, float], relations: Relations, tolerance: float = 0.0
) -> float:
    """Return the share of pairs whose scores contradict their comparison (definition 2.1).

    It is NaN if no pair has both. Finer scores conflict more often with ties, so read the ratio
    together with the share of ties.

    Args:
        scores: item -> score; NaN is not scored.
        relations: (i, j), i < j -> relation of i to j.
        tolerance: a smaller difference of scores is equal.
    """
    usable = 0
    conflicts = 0
    for (i, j), compared in relations.items():
        first = scores.get(i, math.nan)
        second = scores.get(j, math.nan)
        difference = first - second
        if math.isnan(difference):
            continue
        usable += 1
        if _sign(difference, tolerance) != _SIGN[compared]:
            conflicts += 1
    return conflicts / usable if usable else math.nan


def _sign(difference: float, tolerance: float) -> int:
    """Return 1, 0 or -1; 0 for a difference below the tolerance."""
    if abs(difference) < tolerance:
        return 0
    return (difference > 0) - (difference < 0)


def nontransitivity(relations: Relations, k: int) -> float:
    """Return the share of k-subsets that hold an intransitive triple.

    Only subsets with every pair compared count; the share is NaN if there are none. It grows with k
    by construction. With N items it takes about N^(k+1) byte operations, which is seconds for 128
    items and k = 5.

    Args:
        relations: (i, j), i < j -> relation of i to j.
        k: size of the subsets, at least 3.

    Raises:
        ValueError: k is below 3.
    """
    if k < 3:
        raise ValueError(f"k: {k} is not allowed; must be at least 3.")
    _, sign, compared = _matrices(relations)
    total = _count_subsets(compared, [compared] * len(sign), k)
    transitive = [_transitive_triples(sign, i) for i in range(len(sign))]
    consistent = _count_subsets(compared, transitive, k)
    return (total - consistent) / total if total else math.nan


def cycles(relations: Relations) -> list[tuple[int, int, int]]:
    """Return the triples (i, j, k) in which i is better than j, j than k, and k than i.

    Each cycle appears once and starts at its lowest item. No item of a cycle can be called the
    best.
    """
    items, sign, _ = _matrices(relations)
    # `sign` is filled above its diagonal only, so this fills both halves.
    better = (sign - sign.T) > 0
    first_beats_second = better[:, :, None]
    second_beats_third = better[None, :, :]
    third_beats_first = better.T[:, None, :]
    is_cycle = first_beats_second & second_beats_third & third_beats_first
    triples: list[tuple[int, int, int]] = []
    for i, j, k in np.argwhere(is_cycle).tolist():
        if i < min(j, k):
            triples.append((items[i], items[j], items[k]))
    return triples


def _matrices(relations: Relations) -> tuple[list[int], Signs, Mask]:
    """Return the N items in ascending order, their [N, N] signs, and the pairs that were compared.

    Both matrices are filled above the diagonal.
    """
    items = sorted(set(itertools.chain.from_iterable(relations)))
    index = {item: i for i, item in enumerate(items)}
    sign = np.zeros((len(items), len(items)), np.int8)
    compared = np.zeros(sign.shape, np.bool_)
    for (first, second), relation in relations.items():
        place = (index[first], index[second])
        sign[place] = _SIGN[relation]
        compared[place] = True
    return items, sign, compared


def _transitive_triples(sign: Signs, i: int) -> Mask:
    """Return True where the comparisons of (i, j, k) are transitive: [N, N] over j < k.

    The relations of i to j and of j to k imply that of i to k, unless one of them is larger and the
    other smaller.
    """
    ij = sign[i][:, None]
    ik = sign[i][None, :]
    jk = sign
    implies_nothing = ij * jk < 0
    # If i and j are equal, i relates to k as j does. Otherwise i relates to k as it does to j.
    implied = np.where(ij != 0, ij, jk)
    return np.asarray(implies_nothing | (ik == implied))


def _count_subsets(pairs: Mask, triples: Sequence[Mask], k: int) -> int:
    """Count the k-subsets whose pairs and triples are all allowed.

    It takes each item i as the lowest of a subset and counts the (k - 1)-subsets that can join it.

    Args:
        pairs: [N, N], true for allowed pairs (i, j), i < j.
        triples: per item i, [N, N], true for allowed triples (i, j, k), i < j < k.
        k: size of the subsets.
    """
    if k == 2:
        return int(pairs.sum())
    count = 0
    for i in np.flatnonzero(pairs.any(axis=1)).tolist():
        # Only items that are compared with i can join its subsets.
        partners = pairs[i]
        rest = pairs & partners[:, None] & partners[None, :] & triples[i]
        count += _count_subsets(rest, triples, k - 1)
    return count
