"""Who is steered by what: the requests of a worker, on the host, and what a step does to their logits.

S rows are steered, by M values in use, over at most k candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from infer_align.engines.vllm.steering import Terms
from infer_align.values.head import HeadValue
from infer_align_kernels import add_candidate_shifts, reweight_logits, top_candidates

Indices = NDArray[np.int64]


class Bound(NamedTuple):
    """How one request is steered: by the values that were there when it joined."""

    weights: Mapping[int, float]  # column -> weight, none of them 0
    top_k: int
    mask: bool


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One step's steering."""

    rows: torch.Tensor | None  # [S] of the logits; None for all of them
    values: tuple[HeadValue, ...]
    users: tuple[
        torch.Tensor | None, ...
    ]  # of each value, which of the S rows it steers; None for all
    beta: torch.Tensor  # [S, M]
    beyond: (
        torch.Tensor | None
    )  # [S, k] True past the row's own top_k; None where there are no such
    tail: torch.Tensor | Literal["keep"]  # [S] True where the tail is masked
    k: int
    whole: bool = False  # every row has k candidates and is steered by every value


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
        self._layout: tuple[bytes, Layout | None] | None = (
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

    def layout(self, slots: Sequence[int] | Indices) -> Layout | None:
        """The steering of a step whose rows belong to these slots; None where none steers. Made anew when something has changed."""
        key = np.asarray(slots, np.int64).tobytes()
        if self._layout is None or self._layout[0] != key:
            self._layout = key, self._make(np.asarray(slots, np.int64))
        return self._layout[1]

    def _make(self, slots: Indices) -> Layout | None:
        rows = np.flatnonzero(self._top_k[slots])
        if not len(rows):
            return None
        mine = slots[rows]
        columns = np.flatnonzero(self._beta[mine].any(axis=0))
        beta, top_k, mask = self._beta[np.ix_(mine, columns)], self._top_k[mine], self._mask[mine]
        k = int(top_k.max())
        users = [np.flatnonzero(column) for column in beta.T]
        return Layout(
            rows=None if len(rows) == len(slots) else self._upload(rows),
            values=self._used(columns),
            users=tuple(None if len(some) == len(rows) else self._upload(some) for some in users),
            beta=self._upload(beta),
            beyond=None if top_k.min() == k else self._upload(np.arange(k)[None] >= top_k[:, None]),
            tail=self._upload(mask) if mask.any() else "keep",
            k=k,
            whole=bool(top_k.min() == k and beta.all() and not mask.any()),
        )

    def expanded_layout(self, slots: Indices, owners: torch.Tensor) -> Layout | None:
        """The steering of a step in which a slot has several rows: [rows] the slot of each, on the device.

        All rows are in it: those of slots that do not steer have no candidates and come back as they were.
        """
        steered = slots[self._top_k[slots] > 0]
        if not len(steered):
            return None
        if self._state is None:
            self._state = (
                self._upload(self._beta),
                self._upload(self._top_k),
                self._upload(self._mask),
            )
        k = int(self._top_k[steered].max())
        columns = np.flatnonzero(self._beta[steered].any(axis=0))
        beta, top_k, mask = (state.index_select(0, owners) for state in self._state)
        return Layout(
            rows=None,
            values=self._used(columns),
            users=(None,) * len(columns),
            beta=beta.index_select(1, self._upload(columns)),
            beyond=torch.arange(k, device=owners.device)[None] >= top_k[:, None],
            tail=mask if self._mask[steered].any() else "keep",
            k=k,
        )

    def _used(self, columns: Iterable[int]) -> tuple[HeadValue, ...]:
        return tuple(value for column in columns if (value := self._values[column]) is not None)

    def _changed(self) -> None:
        self._layout = self._state = None

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return tensor.clone()  # the arrays change under a step that is still to come
        return tensor.pin_memory().to(self._device, non_blocking=True)


def steer(logits: torch.Tensor, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The rows of the layout reweighted, in place. [rows, V] float32, [rows, d] -> [rows, V]."""
    rows = layout.rows
    mine = logits if rows is None else logits.index_select(0, rows)
    states = (hidden if rows is None else hidden.index_select(0, rows)).float()
    candidates = top_candidates(mine, layout.k)
    values = _evaluate(candidates, states, layout.values, layout.users)
    slots = candidates if layout.beyond is None else candidates.masked_fill(layout.beyond, -1)
    if layout.whole and not mine.is_cuda:
        steered = add_candidate_shifts(mine, slots, values, layout.beta)
    else:
        steered = reweight_logits(mine, slots, values, layout.beta, layout.tail, out=mine)
    return steered if rows is None else logits.index_copy_(0, rows, steered)


def _evaluate(
    candidates: torch.Tensor,
    states: torch.Tensor,
    values: Sequence[HeadValue],
    users: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """[M, S, k] values of the candidates; what a row does not use is 0 and was not computed."""
    if len(values) == 1 and users[0] is None:
        return values[0].evaluate(states, candidates)[None]
    found = torch.zeros((len(values), *candidates.shape), device=candidates.device)
    for m, (value, some) in enumerate(zip(values, users, strict=True)):
        if some is None:
            found[m] = value.evaluate(states, candidates)
        else:
            found[m].index_copy_(
                0,
                some,
                value.evaluate(states.index_select(0, some), candidates.index_select(0, some)),
            )
    return found
