"""The steering of the requests in one worker, by slot.

vLLM's V1 model runner numbers requests by their row in the batch, the V2 runner by a slot that
stays the same. Here both numbers are called slots. The table is on the host, so nothing waits for
the device; the tensors of a step are made again only after a change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.dense_steering import DENSE
from infer_align.decoding.device import upload
from infer_align.decoding.fused_steering import FusedSteerer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.vllm.extra_args import SteeringRequest
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
from infer_align_kernels import steers_at_once

Indices = NDArray[np.int64]


class SlotSteering(NamedTuple):
    """The steering of one slot.

    Attributes:
        weights: weight of each value by its column in the table; none is 0.
        top_k: number of candidate tokens, at most the size of the vocabulary; DENSE if it is not
            fixed.
        mask_tail: True if all other tokens are masked.
        min_p: for a slot that is DENSE, the smallest share of the likeliest token's probability
            that is valued; 0 for all tokens.
        max_kl: largest divergence of one step in nats; inf for no limit.
    """

    weights: Mapping[int, float]
    top_k: int
    mask_tail: bool
    min_p: float = 0.0
    max_kl: float = np.inf


class LookaheadSlot(NamedTuple):
    """A slot of the latest batch that lookahead values steer.

    Attributes:
        slot: the slot.
        row: its row of the logits.
        position: its index among the steered rows.
        lms: the value LMs that read it.
    """

    slot: int
    row: int
    position: int
    lms: frozenset[ValueLM]


class _DeviceTable(NamedTuple):
    """The whole table on the device; the first dimension is the slots."""

    beta: torch.Tensor
    top_k: torch.Tensor
    mask_tail: torch.Tensor
    min_p: torch.Tensor
    max_kl: torch.Tensor


class SlotTable:
    """The steering of every slot. Each value has a column of weights.

    A value that is replaced keeps its column as long as a slot uses it.
    """

    def __init__(self, slots: int, vocabulary_size: int, device: torch.device) -> None:
        self._vocabulary_size = vocabulary_size
        self._device = device
        # One call steers all rows, where it is compiled for the device.
        self._steerer = FusedSteerer() if steers_at_once(device) else None
        # The value of each column; None for a free column.
        self._values: list[Value | None] = []
        # The column of each name, for requests that join from now on.
        self._columns: dict[str, int] = {}
        self._beta = np.zeros((slots, 0), np.float32)
        # 0 for a slot that is not steered.
        self._top_k = np.zeros(slots, np.int64)
        self._mask_tail = np.zeros(slots, np.bool_)
        self._min_p = np.zeros(slots, np.float32)
        self._max_kl = np.full(slots, np.inf, np.float32)
        # The latest batch, and the bytes of the slots for which it was made; None after a change.
        self._batch: SteeringBatch | None = None
        self._batch_key: bytes | None = None
        self._device_table: _DeviceTable | None = None
        # The slots of the latest batch that lookahead values steer.
        self.lookahead_slots: tuple[LookaheadSlot, ...] = ()

    @property
    def values(self) -> tuple[Value, ...]:
        """Return the values that new requests or current slots can use."""
        return tuple(value for value in self._values if value is not None)

    @property
    def any_steered(self) -> bool:
        """Return True if a slot is steered, or was and has not been assigned again."""
        return bool(self._top_k.any())

    def set_value(self, name: str, value: Value) -> None:
        """Use a value under this name for requests that join from now on."""
        column = self._free_column(name)
        self._columns[name] = column
        self._values[column] = value
        self._forget_tensors()

    def _free_column(self, replaced: str) -> int:
        """Free the columns without users; return the first one, or add one.

        Args:
            replaced: a name whose column no new request will use.
        """
        used = set(np.flatnonzero(self._beta.any(axis=0)).tolist())
        used.update(column for name, column in self._columns.items() if name != replaced)
        for column in range(len(self._values)):
            if column not in used:
                self._values[column] = None
        if None not in self._values:
            self._values.append(None)
            new_column = np.zeros((len(self._beta), 1), np.float32)
            self._beta = np.concatenate([self._beta, new_column], axis=1)
        return self._values.index(None)

    def head(self, name: str) -> HeadValue:
        """Return the current head of that name.

        Raises:
            RuntimeError: this worker has no such head. An estimate without it would be wrong.
        """
        column = self._columns.get(name)
        value = None if column is None else self._values[column]
        if not isinstance(value, HeadValue):
            raise RuntimeError(f"a request needs the head {name!r}, which this worker lacks.")
        return value

    def resolve(self, request: SteeringRequest | None) -> SlotSteering | None:
        """Resolve the names of a request to the current values.

        Raises:
            RuntimeError: this worker lacks a value. Sampling without it would be wrong.
        """
        if request is None:
            return None
        missing = request.beta.keys() - self._columns.keys()
        if missing:
            raise RuntimeError(
                f"a request is steered by the values {sorted(missing)}, which this worker lacks."
            )
        weights = {self._columns[name]: weight for name, weight in request.beta.items()}
        if request.top_k is None:
            return SlotSteering(
                weights, DENSE, request.mask_tail, request.min_p, max_kl=request.max_kl
            )
        top_k = min(request.top_k, self._vocabulary_size)
        return SlotSteering(weights, top_k, request.mask_tail, max_kl=request.max_kl)

    def has_lookahead(self, steering: SlotSteering | None) -> bool:
        """Return True if a lookahead value is among those of a steering."""
        columns = steering.weights if steering else ()
        return any(isinstance(self._values[column], LookaheadValue) for column in columns)

    def assign(self, slot: int, steering: SlotSteering | None) -> None:
        """Give a slot to a request, in place of the previous one."""
        if steering is None and not self._top_k[slot]:
            return
        self._forget_tensors()
        self._beta[slot] = 0.0
        self._top_k[slot] = 0
        self._mask_tail[slot] = False
        self._min_p[slot] = 0.0
        self._max_kl[slot] = np.inf
        if steering is None:
            return
        for column, weight in steering.weights.items():
            self._beta[slot, column] = weight
        self._top_k[slot] = steering.top_k
        self._mask_tail[slot] = steering.mask_tail
        self._min_p[slot] = steering.min_p
        self._max_kl[slot] = steering.max_kl

    def assign_all(self, steerings: Mapping[int, SlotSteering]) -> None:
        """Assign every slot; those without an entry are not steered."""
        steered = np.flatnonzero(self._top_k).tolist()
        for slot in {*steered, *steerings}:
            self.assign(slot, steerings.get(slot))

    def batch(self, slots: Sequence[int] | Indices) -> SteeringBatch | None:
        """Return the steering of a step with one row per slot; None if no row is steered.

        The result is kept until the table or the slots change.
        """
        indices = np.asarray(slots, np.int64)
        key = indices.tobytes()
        if self._batch_key != key:
            self._batch = self._build_batch(indices)
            self.lookahead_slots = self._find_lookahead(indices)
            self._batch_key = key
        return self._batch

    def _build_batch(self, slots: Indices) -> SteeringBatch | None:
        rows = np.flatnonzero(self._top_k[slots])
        if not len(rows):
            return None
        steered = slots[rows]
        columns = np.flatnonzero(self._beta[steered].any(axis=0))
        values = self._values_of(columns)
        heads_only = all(isinstance(value, HeadValue) for value in values)
        return SteeringBatch.build(
            values,
            self._beta[np.ix_(steered, columns)],
            self._top_k[steered],
            self._mask_tail[steered],
            self._device,
            rows=None if len(rows) == len(slots) else rows,
            min_p=self._min_p[steered],
            steerer=self._steerer if heads_only else None,
            max_kl=self._max_kl[steered],
        )

    def _find_lookahead(self, slots: Indices) -> tuple[LookaheadSlot, ...]:
        lms: dict[int, ValueLM] = {}
        for column, value in enumerate(self._values):
            if isinstance(value, LookaheadValue) and value.lm:
                lms[column] = value.lm
        if not lms:
            return ()
        users: list[LookaheadSlot] = []
        for position, row in enumerate(np.flatnonzero(self._top_k[slots]).tolist()):
            slot = int(slots[row])
            readers = frozenset(lm for column, lm in lms.items() if self._beta[slot, column])
            if readers:
                users.append(LookaheadSlot(slot, row, position, readers))
        return tuple(users)

    def expanded_batch(self, slots: Indices, row_slots: torch.Tensor) -> SteeringBatch | None:
        """Return the steering of a step in which a slot has several rows; None if none is steered.

        All rows are in the batch. Rows of slots that are not steered have no candidates, so their
        logits stay the same.

        Args:
            slots: the slots in the step, on the host.
            row_slots: [rows] the slot of each row, which only the device knows.
        """
        steered = slots[self._top_k[slots] != 0]
        if not len(steered):
            return None
        table = self._table_on_device()
        columns = np.flatnonzero(self._beta[steered].any(axis=0))
        beta = table.beta.index_select(0, row_slots)
        mask_tail = None
        if self._mask_tail[steered].any():
            mask_tail = table.mask_tail.index_select(0, row_slots)
        limits = self._min_p[steered]
        min_p = table.min_p.index_select(0, row_slots) if limits.any() else None
        max_kl = None
        if np.isfinite(self._max_kl[steered]).any():
            max_kl = table.max_kl.index_select(0, row_slots)
        return SteeringBatch.build_on_device(
            self._values_of(columns),
            beta.index_select(1, upload(columns, self._device)),
            table.top_k.index_select(0, row_slots),
            mask_tail,
            k=max(0, int(self._top_k[steered].max())),
            min_p=min_p,
            has_all=bool(((self._top_k[steered] == DENSE) & (limits == 0)).any()),
            steerer=self._steerer,
            max_kl=max_kl,
        )

    def _table_on_device(self) -> _DeviceTable:
        if self._device_table is None:
            self._device_table = _DeviceTable(
                upload(self._beta, self._device),
                upload(self._top_k, self._device),
                upload(self._mask_tail, self._device),
                upload(self._min_p, self._device),
                upload(self._max_kl, self._device),
            )
        return self._device_table

    def _values_of(self, columns: Iterable[int]) -> tuple[Value, ...]:
        values: list[Value] = []
        for column in columns:
            value = self._values[column]
            if value is not None:
                values.append(value)
        return tuple(values)

    def _forget_tensors(self) -> None:
        self._batch = None
        self._batch_key = None
        self._device_table = None
