"""Who is steered by what: the requests of a worker, on the host, and what a step does to their logits.

S rows are steered, by M values in use, over at most k candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.decoding.steering import SteeringBatch, upload
from infer_align.engines.vllm.steering import Terms
from infer_align.values.head import HeadValue

Indices = NDArray[np.int64]


class Bound(NamedTuple):
    """How one request is steered: by the values that were there when it joined."""

    weights: Mapping[int, float]  # column -> weight, none of them 0
    top_k: int
    mask: bool


class Slots:
    """The steering of each slot, and the values that they are steered by, one a column.

    A value that is replaced keeps its column for as long as a slot uses it.
    """

    def __init__(self, size: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._values: list[HeadValue | None] = []  # by column
        self._columns: dict[str, int] = {}  # name -> the column that new requests get
        self._beta = np.zeros((size, 0), np.float32)
        self._top_k = np.zeros(size, np.int64)  # 0 where the slot does not steer
        self._mask = np.zeros(size, np.bool_)
        self._layout: tuple[bytes, SteeringBatch | None] | None = (
            None  # of the latest step, with the rows that it was made for
        )
        self._state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = (
            None  # beta, top_k, mask on the device
        )

    @property
    def steered_any(self) -> bool:
        """Whether any slot steers, or did and has not been taken since."""
        return bool(self._top_k.any())

    def add(self, name: str, value: HeadValue) -> None:
        """Let slots that are filled from now on use a value."""
        used = {*np.flatnonzero(self._beta.any(axis=0)).tolist()} | {
            self._columns[n] for n in self._columns if n != name
        }
        self._values = [
            value if column in used else None for column, value in enumerate(self._values)
        ]
        if None not in self._values:
            self._values.append(None)
            self._beta = np.concatenate(
                [self._beta, np.zeros((len(self._beta), 1), np.float32)], axis=1
            )
        self._columns[name] = column = self._values.index(None)
        self._values[column] = value
        self._changed()

    def head(self, name: str) -> HeadValue:
        """The value of that name, as it is now.

        Raises:
            RuntimeError: it is not here; a request that is compared without it would be compared wrongly.
        """
        value = self._values[self._columns[name]] if name in self._columns else None
        if value is None:
            raise RuntimeError(
                f"a request is watched by {name!r}, which this worker has not loaded."
            )
        return value

    def bind(self, terms: Terms | None) -> Bound | None:
        """A request's terms with the values of this moment.

        Raises:
            RuntimeError: it names a value that is not here; answering it without would be another model's answer.
        """
        if terms is None:
            return None
        if missing := terms.beta.keys() - self._columns.keys():
            raise RuntimeError(
                f"a request is steered by {sorted(missing)}, which this worker has not loaded."
            )
        weights = {self._columns[name]: weight for name, weight in terms.beta.items()}
        return Bound(weights, min(terms.top_k, self._vocabulary), terms.mask)

    def put(self, slot: int, bound: Bound | None) -> None:
        """A request takes a slot, whoever had it before."""
        if bound is None and not self._top_k[slot]:
            return
        self._changed()
        self._beta[slot], self._top_k[slot], self._mask[slot] = 0.0, 0, False
        if bound is not None:
            self._beta[slot, [*bound.weights]] = [*bound.weights.values()]
            self._top_k[slot], self._mask[slot] = bound.top_k, bound.mask

    def replace(self, bound: Mapping[int, Bound]) -> None:
        """All slots at once."""
        for slot in {*np.flatnonzero(self._top_k).tolist(), *bound}:
            self.put(slot, bound.get(slot))

    def layout(self, slots: Sequence[int] | Indices) -> SteeringBatch | None:
        """The steering of a step whose rows belong to these slots; None where none steers. Made anew when something has changed."""
        key = np.asarray(slots, np.int64).tobytes()
        if self._layout is None or self._layout[0] != key:
            self._layout = key, self._make(np.asarray(slots, np.int64))
        return self._layout[1]

    def _make(self, slots: Indices) -> SteeringBatch | None:
        rows = np.flatnonzero(self._top_k[slots])
        if not len(rows):
            return None
        mine = slots[rows]
        columns = np.flatnonzero(self._beta[mine].any(axis=0))
        beta, top_k, mask = self._beta[np.ix_(mine, columns)], self._top_k[mine], self._mask[mine]
        return SteeringBatch.build(
            self._used(columns),
            beta,
            top_k,
            mask,
            self._device,
            rows=None if len(rows) == len(slots) else rows,
        )

    def expanded_layout(self, slots: Indices, owners: torch.Tensor) -> SteeringBatch | None:
        """The steering of a step in which a slot has several rows: [rows] the slot of each, on the device.

        All rows are in it: those of slots that do not steer have no candidates and come back as they were.
        """
        steered = slots[self._top_k[slots] > 0]
        if not len(steered):
            return None
        if self._state is None:
            self._state = (
                upload(self._beta, self._device),
                upload(self._top_k, self._device),
                upload(self._mask, self._device),
            )
        k = int(self._top_k[steered].max())
        columns = np.flatnonzero(self._beta[steered].any(axis=0))
        beta, top_k, mask = (state.index_select(0, owners) for state in self._state)
        return SteeringBatch(
            rows=None,
            values=self._used(columns),
            users=(None,) * len(columns),
            beta=beta.index_select(1, upload(columns, self._device)),
            beyond=torch.arange(k, device=owners.device)[None] >= top_k[:, None],
            tail=mask if self._mask[steered].any() else "keep",
            k=k,
        )

    def _used(self, columns: Iterable[int]) -> tuple[HeadValue, ...]:
        return tuple(value for column in columns if (value := self._values[column]) is not None)

    def _changed(self) -> None:
        self._layout = self._state = None
