"""Guidance by prompts: the one place where the logits of several contexts become one.

A guided candidate is read in several contexts: the request as it is, and the same conversation with
the prompts of traits in it. Each engine decides which rows of its forward pass are contexts of
which candidate and builds a `GuidanceBatch`; `guide_rows` does the arithmetic. The formula and its
float64 reference stand in `infer_align.methods.guidance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from infer_align.methods.guidance import INFINITE_DIFFERENCE


@dataclass(frozen=True, slots=True)
class ContextPair:
    """One trait of a candidate: its scale, and the numbers of its two contexts.

    Context 0 is the request as it is.
    """

    scale: float
    positive: int
    negative: int


@dataclass(frozen=True, slots=True)
class CandidateGuidance:
    """The guidance of one candidate.

    Attributes:
        pairs: its traits.
        contexts: number of its contexts, the request included.
        min_p: a token is masked if it is below min_p times the likeliest token in every context.
            0 masks none.
    """

    pairs: tuple[ContextPair, ...]
    contexts: int
    min_p: float


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """One trait of each candidate that has so many: U candidates.

    Attributes:
        users: [U] numbers of the candidates among the guided ones.
        scale: [U, 1] scales of the traits.
        positive: [U] their contexts, as numbers among the contexts that are read.
        negative: [U] their negative contexts.
    """

    users: torch.Tensor
    scale: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GuidanceBatch:
    """Guidance of one step: G guided candidates with L contexts together.

    The record is valid while the rows stay the same.

    Attributes:
        rows: [G] indices of the guided candidates among all candidates.
        contexts: [L] indices of their contexts among the rows of the forward pass.
        turns: the first traits of all candidates, then their second traits, and so on. So a
            candidate's sum has the same order whatever else is in the batch.
        log_min_p: [G, 1] logarithm of each candidate's min_p; -inf masks nothing.
        context_log_min_p: [L, 1] the same for each context.
    """

    rows: torch.Tensor
    contexts: torch.Tensor
    turns: tuple[_Turn, ...]
    log_min_p: torch.Tensor
    context_log_min_p: torch.Tensor

    @classmethod
    def build(
        cls,
        candidates: Mapping[int, CandidateGuidance],
        first_rows: Mapping[int, int],
        device: torch.device,
    ) -> GuidanceBatch:
        """Build the record.

        Args:
            candidates: the guidance of each guided candidate, by its index among all candidates.
            first_rows: the row of the forward pass that reads context 0 of each of them. Its other
                contexts follow in their order.
            device: where the logits are.
        """
        rows: list[int] = []
        limits: list[float] = []
        turns: list[list[tuple[int, float, int, int]]] = []
        for g, (index, guidance) in enumerate(candidates.items()):
            offset = len(rows)
            first = first_rows[index]
            rows += range(first, first + guidance.contexts)
            limits += [_log(guidance.min_p)] * guidance.contexts
            for t, pair in enumerate(guidance.pairs):
                if t == len(turns):
                    turns.append([])
                entry = (g, pair.scale, offset + pair.positive, offset + pair.negative)
                turns[t].append(entry)
        own_limits = [_log(guidance.min_p) for guidance in candidates.values()]
        return cls(
            rows=torch.tensor(list(candidates), device=device),
            contexts=torch.tensor(rows, device=device),
            turns=tuple(_turn(entries, device) for entries in turns),
            log_min_p=torch.tensor(own_limits, device=device)[:, None],
            context_log_min_p=torch.tensor(limits, device=device)[:, None],
        )


def _log(min_p: float) -> float:
    return math.log(min_p) if min_p > 0 else -math.inf


def _turn(entries: list[tuple[int, float, int, int]], device: torch.device) -> _Turn:
    users, scales, positive, negative = zip(*entries, strict=True)
    return _Turn(
        torch.tensor(users, device=device),
        torch.tensor(scales, device=device)[:, None],
        torch.tensor(positive, device=device),
        torch.tensor(negative, device=device),
    )


def guide_rows(
    logits: torch.Tensor, context_logits: torch.Tensor, batch: GuidanceBatch
) -> torch.Tensor:
    """Guide the logits of the guided candidates.

    The argument stays unchanged, and so do the candidates that are not guided, bit for bit. A
    forbidden token (-inf) stays forbidden. The likeliest token of a candidate's own logits is
    plausible, so at least one token stays allowed.

    Args:
        logits: [B, V] float32 of the candidates, after constraints, penalties, biases and bans.
        context_logits: [C, V] float32 of the frozen model for all rows of the forward pass.
        batch: the guidance of these candidates.

    Returns:
        [B, V] float32; implausible tokens are -inf.
    """
    logprobs = torch.log_softmax(context_logits.index_select(0, batch.contexts), dim=-1)
    guided = logits.index_select(0, batch.rows)
    # Read before the sums change the logits in place.
    plausible = _plausible(guided, batch.log_min_p)
    plausible_in_context = _plausible(logprobs, batch.context_log_min_p)
    for turn in batch.turns:
        difference = logprobs[turn.positive].sub_(logprobs[turn.negative])
        # Two impossible tokens do not differ.
        difference.nan_to_num_(nan=0.0, posinf=INFINITE_DIFFERENCE, neginf=-INFINITE_DIFFERENCE)
        guided.index_add_(0, turn.users, difference.mul_(turn.scale))
        either = plausible_in_context[turn.positive] | plausible_in_context[turn.negative]
        plausible[turn.users] |= either
    guided.masked_fill_(~plausible, -torch.inf)
    return logits.index_copy(0, batch.rows, guided)


def _plausible(logits: torch.Tensor, log_min_p: torch.Tensor) -> torch.Tensor:
    """Return the tokens that are at least min_p times as likely as the likeliest. [R, V]."""
    return logits >= logits.amax(dim=-1, keepdim=True) + log_min_p
