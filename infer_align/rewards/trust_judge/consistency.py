"""How consistent a judge is: scores against comparisons, and comparisons among each other. TrustJudge (2509.21117), section 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from infer_align.rewards.trust_judge.readings import EQUAL, LARGER, SMALLER, Relation

Relations = Mapping[tuple[int, int], Relation]  # (i, j), i < j: of i to j
_SIGN = {LARGER: 1, EQUAL: 0, SMALLER: -1}


def conflict_ratio(
    scores: Mapping[int, float], relations: Relations, tolerance: float = 0.0
) -> float:
    """Share of pairs whose scores say otherwise than their comparison (definition 2.1); NaN where no pair has both.

    Finer scores conflict more often where comparisons are ties: a ratio is to be read beside the share of ties.

    Args:
        scores: item -> score; NaN is not scored.
        relations: (i, j), i < j -> of i to j.
        tolerance: scores nearer than this are equal.
    """
    usable = conflicts = 0
    for (i, j), related in relations.items():
        difference = scores.get(i, math.nan) - scores.get(j, math.nan)
        if math.isnan(difference):
            continue
        usable += 1
        sign = 0 if abs(difference) < tolerance else (difference > 0) - (difference < 0)
        conflicts += sign != _SIGN[related]
    return conflicts / usable if usable else math.nan


def nontransitivity(relations: Relations, k: int) -> float:
    """Share of the k-subsets, all of whose pairs were compared, that hold an intransitive triple; NaN where there is none.

    It grows with k by construction. With N items it takes about N^(k+1) byte operations: seconds for 128 and k = 5.

    Args:
        relations: (i, j), i < j -> of i to j.
        k: size of the subsets, at least 3.

    Raises:
        ValueError: k is below 3.
    """
    if k < 3:
        raise ValueError(f"k: {k} is not allowed; must be at least 3.")
    _, sign, compared = _matrices(relations)
    total = _subsets(compared, [compared] * len(sign), k)
    consistent = _subsets(compared, [_consistent(sign, i) for i in range(len(sign))], k)
    return (total - consistent) / total if total else math.nan


def _matrices(relations: Relations) -> tuple[list[int], NDArray[np.int8], NDArray[np.bool_]]:
    """The N items, ascending; [N, N] of 1, 0, -1 and which pairs were compared, both above the diagonal."""
    items = sorted({item for pair in relations for item in pair})
    place = {item: i for i, item in enumerate(items)}
    sign = np.zeros((len(items), len(items)), np.int8)
    compared = np.zeros(sign.shape, np.bool_)
    for (i, j), related in relations.items():
        sign[place[i], place[j]] = _SIGN[related]
        compared[place[i], place[j]] = True
    return items, sign, compared


def _consistent(sign: NDArray[np.int8], i: int) -> NDArray[np.bool_]:
    """[N, N] over j < k: whether the triple (i, j, k) contradicts nothing; `triple_error`, for all at once."""
    first, third = sign[i][:, None], sign[i][None, :]
    return np.asarray((first * sign < 0) | (third == np.where(first != 0, first, sign)))


def _subsets(pairs: NDArray[np.bool_], triples: Sequence[NDArray[np.bool_]], k: int) -> int:
    """How many k-subsets have all their pairs in `pairs` and all their triples (i, j, k) in `triples[i][j, k]`."""
    if k == 2:
        return int(pairs.sum())
    found = 0
    for i in np.flatnonzero(pairs.any(axis=1)).tolist():
        beside = pairs[i]
        found += _subsets(pairs & beside[:, None] & beside[None, :] & triples[i], triples, k - 1)
    return found


def triple_error(ij: Relation, jk: Relation, ik: Relation) -> str | None:
    """Whether three comparisons contradict each other: "circle", strictly against what two imply; "equal", a tie against it."""
    first, second, third = _SIGN[ij], _SIGN[jk], _SIGN[ik]
    if first * second < 0:  # i and k are both better, or both worse, than j: they may stand anyhow
        return None
    implied = first or second
    if third == implied:
        return None
    return "circle" if third and third == -implied else "equal"


def cycles(relations: Relations) -> list[tuple[int, int, int]]:
    """Triples (i, j, k) with i over j over k over i, each once, starting at its lowest: none of them can be called the best."""
    items, sign, _ = _matrices(relations)
    over = (sign - sign.T) > 0
    found = np.argwhere(over[:, :, None] & over[None, :, :] & over.T[:, None, :])
    return [(items[i], items[j], items[k]) for i, j, k in found.tolist() if i < min(j, k)]
