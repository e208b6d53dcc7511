"""Split the draws of a plan into the batches that are drawn one after the other.

A plan without a stop rule is one batch. With one, the draws that the methods wrote are the first
batch. Every further batch is spread over the draws so that their shares stay those of the first:
two draws of one candidate, `batch` 3 and at most 9 candidates give

    batch 0: 2 + 1     batch 1: 1 + 2     batch 2: 2 + 1     worst case: 5 + 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from infer_align.methods import StopRule
from infer_align.types import Draw

# The number of candidates of each draw, for each batch.
BatchSizes: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """The candidates of one draw that belong to one batch."""

    index: int  # of the draw in the plan
    draw: Draw  # reduced to these candidates
    first: int  # number of the first of them, over all batches of the plan


@dataclass(frozen=True, slots=True)
class CandidateBatch:
    """The candidates that are drawn at once, numbered on from the batch before."""

    shares: tuple[Share, ...]
    first: int  # number of its first candidate, over all batches of the plan

    @property
    def candidates(self) -> int:
        """Return the number of candidates."""
        return sum(share.draw.n for share in self.shares)


def plan_sizes(draws: Sequence[Draw], rule: StopRule, n_returned: int) -> BatchSizes:
    """Return the sizes of all batches, up to the worst case.

    Args:
        draws: the draws that the methods wrote.
        rule: the stop rule, which allows at least as many candidates as the draws have.
        n_returned: number of candidates to return; the first batch has at least as many.
    """
    weights = [draw.n for draw in draws]
    first = min(max(sum(weights), rule.batch, n_returned), rule.max_candidates)
    ends = [first, *range(first + rule.batch, rule.max_candidates, rule.batch)]
    if ends[-1] < rule.max_candidates:
        ends.append(rule.max_candidates)
    totals = [0] * len(draws)
    sizes: list[tuple[int, ...]] = []
    for end in ends:
        before = tuple(totals)
        while sum(totals) < end:
            _add_candidate(totals, weights)
        sizes.append(tuple(after - b for after, b in zip(totals, before, strict=True)))
    return tuple(sizes)


def _add_candidate(totals: list[int], weights: Sequence[int]) -> None:
    """Count one more candidate for the draw that is the furthest behind its weight."""
    draw = min(range(len(totals)), key=lambda d: (totals[d] / weights[d], d))
    totals[draw] += 1


def enlarge(draws: Sequence[Draw], sizes: BatchSizes) -> tuple[Draw, ...]:
    """Return the draws with the candidates of all batches."""
    enlarged: list[Draw] = []
    for d, draw in enumerate(draws):
        enlarged.append(replace(draw, n=sum(batch[d] for batch in sizes)))
    return tuple(enlarged)


def split(draws: Sequence[Draw], sizes: BatchSizes) -> tuple[CandidateBatch, ...]:
    """Return the batches of seeded draws; without sizes, one batch of everything."""
    sampled = [0] * len(draws)
    first = 0
    batches: list[CandidateBatch] = []
    for batch_sizes in sizes or (tuple(draw.n for draw in draws),):
        shares: list[Share] = []
        batch_first = first
        for d, n in enumerate(batch_sizes):
            if n:
                shares.append(Share(d, _cut(draws[d], sampled[d], n), first))
            sampled[d] += n
            first += n
        batches.append(CandidateBatch(tuple(shares), batch_first))
    return tuple(batches)


def _cut(draw: Draw, first: int, n: int) -> Draw:
    """Return a draw of n of the candidates, from `first` on."""
    if (n, first) == (draw.n, draw.first):
        return draw
    return replace(draw, n=n, seeds=draw.seeds[first : first + n], first=first)
