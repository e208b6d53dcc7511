"""How consistent a judge is: scores against comparisons, and comparisons among each other. TrustJudge (2509.21117), section 2."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from infer_align.rewards.trust_judge.readings import EQUAL, LARGER, SMALLER, Relation

Relations = Mapping[tuple[int, int], Relation]  # (i, j), i < j: of i to j
_SIGN = {LARGER: 1, EQUAL: 0, SMALLER: -1}


def conflict_ratio(scores: Mapping[int, float], relations: Relations, tolerance: float = 0.0) -> float:
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

    It grows with k by construction.

    Args:
        relations: (i, j), i < j -> of i to j.
        k: size of the subsets, at least 3.

    Raises:
        ValueError: k is below 3.
    """
    if k < 3:
        raise ValueError(f"k: {k} is not allowed; must be at least 3.")
    total = bad = 0
    for subset in subsets(relations, k):
        total += 1
        triples = itertools.combinations(subset, 3)
        bad += any(triple_error(relations[i, j], relations[j, k_], relations[i, k_]) is not None for i, j, k_ in triples)
    return bad / total if total else math.nan


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
    found = []
    for i, j, k in subsets(relations, 3):
        ij, jk, ik = relations[i, j], relations[j, k], relations[i, k]
        if (ij, jk, ik) == (LARGER, LARGER, SMALLER):
            found.append((i, j, k))
        elif (ij, jk, ik) == (SMALLER, SMALLER, LARGER):
            found.append((i, k, j))
    return found


def subsets(relations: Relations, k: int) -> Iterator[tuple[int, ...]]:
    """The k-subsets of items, ascending, all of whose pairs were compared."""
    after: dict[int, set[int]] = {}
    for i, j in relations:
        after.setdefault(i, set()).add(j)

    def grow(chosen: tuple[int, ...], candidates: set[int]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == k:
            yield chosen
            return
        for item in sorted(candidates):
            yield from grow((*chosen, item), candidates & after.get(item, set()))

    yield from grow((), {*after} | {j for _, j in relations})
