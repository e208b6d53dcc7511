"""Value-augmented sampling (VAS): the one place where value estimates change logits.

A step takes the k most likely tokens of each row, values them and adds beta times the centred
values to their logits. Rows with all of their tokens valued, or all that are likely enough, are in
`dense_steering.py`. On a GPU, one call steers the rows of heads (`fused_steering.py`). Heads read
the frozen model's hidden state; lookahead values read the candidates with a value LM
(`siblings.py`). Each engine decides which rows are steered by which values and builds a
`SteeringBatch`; `steer` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from infer_align.decoding.dense_steering import add_dense
from infer_align.decoding.device import upload
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.methods.vas import reweight
from infer_align.types import Array
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
from infer_align_kernels import reweight_logits, top_candidates

NO_CACHES: Mapping[ValueLM, ValueCache] = MappingProxyType({})


class ValuedCandidates(NamedTuple):
    """The candidates of S rows and their values.

    Attributes:
        ids: [S, k] the k most likely tokens, also in slots past a row's own top_k.
        values: [M, S, k], 0 where a value does not steer a row.
    """

    ids: torch.Tensor
    values: torch.Tensor


def steer(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    caches: Mapping[ValueLM, ValueCache] = NO_CACHES,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """Reweight the logits of the steered rows.

    Args:
        logits: [B, V] float32, before temperature.
        hidden: [B, d] states that the output layer read.
        batch: the steering of these rows.
        caches: the cache of each value LM that steers a row. The members of a cache are indices
            among the S steered rows.
        in_place: True to write to `logits`; by default they stay unchanged.

    Returns:
        [B, V] logits. Rows that are not steered stay bit for bit the same.
    """
    valued = value_candidates(logits, hidden, batch, caches)
    return add_values(logits, hidden, batch, valued, in_place=in_place)


def value_candidates(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    caches: Mapping[ValueLM, ValueCache] = NO_CACHES,
) -> ValuedCandidates | None:
    """Select and value the candidates of the steered rows; see `steer` for the arguments.

    Returns:
        The candidates; None if every steered row is dense or fused, so that `add_dense` or
        `FusedSteering.add` steers it.
    """
    if not batch.k:
        return None
    rows = batch.rows
    frozen = logits if rows is None else logits.index_select(0, rows)
    ids = top_candidates(frozen, batch.k)
    # All weights are 0: there is nothing to add.
    if not batch.values:
        return ValuedCandidates(ids, torch.empty((0, *ids.shape), device=logits.device))
    states = hidden if rows is None else hidden.index_select(0, rows)
    return ValuedCandidates(ids, _evaluate(ids, states.float(), batch, caches))


def add_values(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    valued: ValuedCandidates | None,
    *,
    in_place: bool,
) -> torch.Tensor:
    """Add the values to the logits; see `steer` for the arguments. -> [B, V]."""
    limit = batch.kl_limit
    if limit is None:
        return _add_all_values(logits, hidden, batch, valued, in_place=in_place)
    frozen = limit.frozen(logits)
    steered = _add_all_values(logits, hidden, batch, valued, in_place=in_place)
    return limit.apply(frozen, steered)


def _add_all_values(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    valued: ValuedCandidates | None,
    *,
    in_place: bool,
) -> torch.Tensor:
    """Add the values of candidates, of dense rows and of fused rows. -> [B, V]."""
    if batch.dense is not None or batch.fused is not None:
        logits = logits if in_place else logits.clone()
        in_place = True
    if batch.dense is not None:
        add_dense(logits, hidden, batch.dense)
    if batch.fused is not None:
        batch.fused.add(logits, hidden)
    if valued is None or not batch.values:
        return logits
    return _add_to_candidates(logits, batch, valued, in_place=in_place)


def _add_to_candidates(
    logits: torch.Tensor, batch: SteeringBatch, valued: ValuedCandidates, *, in_place: bool
) -> torch.Tensor:
    rows = batch.rows
    steered = logits if rows is None else logits.index_select(0, rows)
    # A selection of rows is a copy already, so it can always be written to.
    may_overwrite = in_place or rows is not None
    steered = reweight_logits(
        steered,
        batch.valid(valued.ids),
        valued.values,
        batch.beta,
        batch.tail,
        out=steered if may_overwrite else None,
    )
    if rows is None:
        return steered
    if in_place:
        return logits.index_copy_(0, rows, steered)
    return logits.index_copy(0, rows, steered)


def _evaluate(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    caches: Mapping[ValueLM, ValueCache],
) -> torch.Tensor:
    """Value the candidates: [S, k] ids, [S, d] states -> [M, S, k].

    The result is 0 where a value does not steer a row.
    """
    first = batch.values[0]
    if len(batch.values) == 1 and batch.users[0] is None and isinstance(first, HeadValue):
        return first.evaluate(hidden, candidates)[None]
    # Each value LM reads its candidates once, for all values that it computes.
    count = batch.sibling_count
    siblings: dict[ValueLM, torch.Tensor] = {}
    members: dict[ValueLM, torch.Tensor] = {}
    for value_lm, cache in caches.items():
        members[value_lm] = upload(np.array(cache.members), candidates.device)
        read = candidates[:, :count].index_select(0, members[value_lm])
        siblings[value_lm] = cache.siblings(read)
    values = torch.zeros((len(batch.values), *candidates.shape), device=candidates.device)
    for m, (value, users) in enumerate(zip(batch.values, batch.users, strict=True)):
        lm = value.lm if isinstance(value, LookaheadValue) else None
        if isinstance(value, LookaheadValue) and lm is not None and lm in caches:
            values[m, :, :count].index_copy_(0, members[lm], siblings[lm][..., value.index])
        elif isinstance(value, HeadValue):
            values[m] = _evaluate_head(value, candidates, hidden, users)
    return values


def _evaluate_head(
    head: HeadValue, candidates: torch.Tensor, hidden: torch.Tensor, users: torch.Tensor | None
) -> torch.Tensor:
    """Value the candidates of the rows in `users` (None: all). -> [S, k], 0 in other rows."""
    if users is None:
        return head.evaluate(hidden, candidates)
    of_users = head.evaluate(hidden.index_select(0, users), candidates.index_select(0, users))
    return torch.zeros_like(candidates, dtype=of_users.dtype).index_copy_(0, users, of_users)


def steer_candidates(logits: Array, values: Array, beta: Sequence[float]) -> Array:
    """Reweight the logits of one row's k candidates in float64: [k], [M, k], [M] -> [k].

    For engines that know the logits of the candidates only, such as an upstream's.
    """
    slots = np.arange(len(logits))[None]
    steered: Array = reweight(logits[None], slots, values[:, None], beta)[0]
    return steered
