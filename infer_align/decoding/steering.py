"""Value-augmented sampling (VAS): the one place where value estimates change logits.

A step takes the k most likely tokens of each row, values them and adds beta times the centred
values to their logits. Rows with all of their tokens valued, or all that are likely enough, are in
`dense_steering.py`. Heads read the frozen model's hidden state; lookahead values read the
candidates with a value LM (`siblings.py`). Each engine decides which rows are steered by which
values and builds a `SteeringBatch`; `steer` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.dense_steering import DENSE, DenseSteering, add_dense
from infer_align.decoding.device import upload
from infer_align.decoding.fused_steering import FusedSteerer, FusedSteering, is_fused
from infer_align.decoding.kl_limit import KLLimit
from infer_align.decoding.siblings import ValueCache
from infer_align.methods.vas import reweight
from infer_align.types import Array
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
from infer_align_kernels import (
    add_candidate_shifts,
    reweight_logits,
    runs_triton,
    top_candidates,
)
from infer_align_kernels.top_candidates import MAX_CANDIDATES

NO_CACHES: Mapping[ValueLM, ValueCache] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class SteeringBatch:
    """Steering of one step: S rows, M values, at most k candidates per row.

    The record is valid while the rows stay the same.

    Attributes:
        rows: [S] indices of the steered rows of the logits; None if all rows are in the batch.
        values: the M values.
        users: for each value, the indices among the S rows that it steers; None for all S.
        beta: [S, M] weights; 0 where a value does not steer a row.
        unused_slots: [S, k] True in slots past the row's own top_k; None if no row has such slots.
        tail: [S] True where tokens outside the candidates are masked; "keep" if no row masks them.
        k: the largest top_k of the rows.
        uniform: True if every row has k candidates, is steered by every value and keeps its tail,
            and all values are heads. `steer` then skips checks when it writes in place.
        dense: the rows without a fixed number of candidates; None if there are none.
        fused: the rows that one call steers; None if there are none. They have no candidates here.
        kl_limit: the rows whose divergence from the frozen model is limited; None if none is.
        sibling_count: how many of the k candidates value LMs read: the largest top_k of the rows
            that a lookahead value steers; 0 if there are none.
    """

    rows: torch.Tensor | None
    values: tuple[Value, ...]
    users: tuple[torch.Tensor | None, ...]
    beta: torch.Tensor
    unused_slots: torch.Tensor | None
    tail: torch.Tensor | Literal["keep"]
    k: int
    uniform: bool = False
    dense: DenseSteering | None = None
    fused: FusedSteering | None = None
    kl_limit: KLLimit | None = None
    sibling_count: int = 0

    @classmethod
    def build(
        cls,
        values: Sequence[Value],
        beta: NDArray[np.float32],
        top_k: NDArray[np.int64],
        masked: NDArray[np.bool_],
        device: torch.device,
        rows: NDArray[np.int64] | None = None,
        min_p: NDArray[np.float32] | None = None,
        steerer: FusedSteerer | None = None,
        max_kl: NDArray[np.float32] | None = None,
    ) -> SteeringBatch:
        """Build the record from host arrays without waiting for the device.

        Args:
            values: the M values.
            beta: [S, M] weights.
            top_k: [S] candidates of each row; 0 for a row that is not steered, DENSE for a row
                without a fixed number of them.
            masked: [S] True where the tail is masked.
            device: where the logits are.
            rows: [S] indices of the rows in the logits; None for all.
            min_p: [S] for the rows that are DENSE: see `DenseSteering.build`. None if none is.
            steerer: what the fused call keeps between steps; None to steer without it. With it, all
                values are heads, and logits are overwritten.
            max_kl: [S] limits of each step's divergence in nats, inf for none; None for no limits.
        """
        kl_limit = KLLimit.build(max_kl, device, rows)
        dense = None
        if min_p is not None and (top_k == DENSE).any():
            dense = DenseSteering.build(values, beta, min_p, top_k == DENSE, masked, device, rows)
            top_k = np.where(top_k == DENSE, 0, top_k)
        fused = None
        if steerer is not None:
            heads = [value for value in values if isinstance(value, HeadValue)]
            fused = FusedSteering.build(steerer, heads, beta, top_k, masked, device, rows)
        if fused is not None:
            top_k = np.where(is_fused(top_k), 0, top_k)
        if not top_k.any() and (fused is not None or dense is not None):
            return cls.without_candidates(dense, fused, kl_limit)
        k = int(top_k.max())
        same_k = bool(top_k.min() == k)
        slots = np.arange(k)[None]
        heads_only = all(isinstance(value, HeadValue) for value in values)
        return cls(
            rows=None if rows is None else upload(rows, device),
            values=tuple(values),
            users=tuple(_users(column, device) for column in beta.T),
            beta=upload(beta, device),
            unused_slots=None if same_k else upload(slots >= top_k[:, None], device),
            tail=upload(masked, device) if masked.any() else "keep",
            k=k,
            uniform=heads_only and same_k and bool(beta.all()) and not masked.any(),
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
            sibling_count=_sibling_count(values, beta, top_k),
        )

    @classmethod
    def without_candidates(
        cls,
        dense: DenseSteering | None,
        fused: FusedSteering | None,
        kl_limit: KLLimit | None = None,
    ) -> SteeringBatch:
        """Return a batch of rows that are all in `dense` or in `fused`."""
        no_weights = torch.empty((0, 0))
        return cls(
            rows=None,
            values=(),
            users=(),
            beta=no_weights,
            unused_slots=None,
            tail="keep",
            k=0,
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
        )

    @classmethod
    def build_on_device(
        cls,
        values: Sequence[Value],
        beta: torch.Tensor,
        top_k: torch.Tensor,
        masked: torch.Tensor | None,
        k: int,
        min_p: torch.Tensor | None = None,
        steerer: FusedSteerer | None = None,
        max_kl: torch.Tensor | None = None,
    ) -> SteeringBatch:
        """Build the record for all rows of the logits from tensors that the host has not read.

        Rows with a top_k of 0 have no candidates, so their logits stay the same.

        Args:
            values: the M values.
            beta: [B, M] weights.
            top_k: [B] candidates of each row; DENSE for a row without a fixed number of them.
            masked: [B] True where the tail is masked; None if no row masks it.
            k: an upper bound of `top_k`; 0 if every steered row is DENSE.
            min_p: [B] for the rows that are DENSE; None if no row is.
            steerer: as for `build`.
            max_kl: [B] limits, inf for none; None if no row has one.
        """
        kl_limit = None if max_kl is None else KLLimit(None, max_kl)
        dense = None
        if min_p is not None:
            is_dense = top_k == DENSE
            dense = DenseSteering.build_on_device(values, beta, min_p, is_dense, masked)
        fused = None
        if steerer is not None and k and values:
            heads = [value for value in values if isinstance(value, HeadValue)]
            fused = FusedSteering.build_on_device(steerer, heads, beta, top_k, masked, k)
            top_k = torch.where(top_k > MAX_CANDIDATES, top_k, 0)
            if k <= MAX_CANDIDATES:
                return cls.without_candidates(dense, fused, kl_limit)
        slots = torch.arange(k, device=top_k.device)[None]
        return cls(
            rows=None,
            values=tuple(values),
            users=(None,) * len(values),
            beta=beta,
            unused_slots=slots >= top_k[:, None],
            tail="keep" if masked is None else masked,
            k=k,
            dense=dense,
            fused=fused,
            kl_limit=kl_limit,
        )

    def valid(self, candidates: torch.Tensor) -> torch.Tensor:
        """Return the candidates with -1 in slots past a row's own top_k. [S, k] -> [S, k]."""
        if self.unused_slots is None:
            return candidates
        return candidates.masked_fill(self.unused_slots, -1)


def _sibling_count(
    values: Sequence[Value], beta: NDArray[np.float32], top_k: NDArray[np.int64]
) -> int:
    lookaheads = [isinstance(value, LookaheadValue) for value in values]
    rows = beta[:, lookaheads].any(axis=1)
    return int(top_k[rows].max(initial=0))


def _users(column: NDArray[np.float32], device: torch.device) -> torch.Tensor | None:
    if column.all():
        return None
    return upload(np.flatnonzero(column), device)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reweight the logits of the steered rows.

    Args:
        logits: [B, V] float32, before temperature.
        hidden: [B, d] states that the output layer read.
        batch: the steering of these rows.
        caches: the cache of each value LM that steers a row. The members of a cache are indices
            among the S steered rows.
        in_place: True to write to `logits`; by default they stay unchanged.

    Returns:
        [B, V] logits and [S, k] candidates. Rows that are not steered stay bit for bit the same.
    """
    valued = value_candidates(logits, hidden, batch, caches)
    return add_values(logits, hidden, batch, valued, in_place=in_place), valued.ids


def value_candidates(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    batch: SteeringBatch,
    caches: Mapping[ValueLM, ValueCache] = NO_CACHES,
) -> ValuedCandidates:
    """Select and value the candidates of the steered rows; see `steer` for the arguments."""
    rows = batch.rows
    if not batch.k:
        # Every steered row is dense or fused: `add_dense` or `FusedSteering.add` steers it.
        count = len(logits) if rows is None else len(rows)
        ids = torch.empty((count, 0), dtype=torch.int64, device=logits.device)
        return ValuedCandidates(ids, torch.empty((0, count, 0), device=logits.device))
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
    valued: ValuedCandidates,
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
    valued: ValuedCandidates,
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
    if not batch.values or not batch.k:
        return logits
    return _add_to_candidates(logits, batch, valued, in_place=in_place)


def _add_to_candidates(
    logits: torch.Tensor, batch: SteeringBatch, valued: ValuedCandidates, *, in_place: bool
) -> torch.Tensor:
    rows = batch.rows
    # The fast path has no masks and runs on the CPU only.
    if batch.uniform and in_place and not runs_triton(logits.device):
        return add_candidate_shifts(logits, valued.ids, valued.values, batch.beta, rows)
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
    for value_lm, cache in caches.items():
        siblings[value_lm] = cache.siblings(candidates[cache.members, :count])
    values = torch.zeros((len(batch.values), *candidates.shape), device=candidates.device)
    for m, (value, users) in enumerate(zip(batch.values, batch.users, strict=True)):
        lm = value.lm if isinstance(value, LookaheadValue) else None
        if isinstance(value, LookaheadValue) and lm is not None and lm in caches:
            values[m, caches[lm].members, :count] = siblings[lm][..., value.index]
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
