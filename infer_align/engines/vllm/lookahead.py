"""The keys and values of value LMs in one worker of vLLM, for requests that lookahead values steer.

vLLM's own cache holds the frozen model's keys and values. A value LM has its own cache here, one
row per request. A row is made from the token ids of its request when the request joins the batch:
vLLM's prefix cache, its chunks of prompts and its preemption need no other treatment. After that,
each step appends the sampled token, whose key and value the step before has computed.

A request that is not in a step loses its row. So the caches never hold more than the requests of
the latest step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.device import upload
from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.values.lookahead import ValueLM


class TokenHistory(ABC):
    """The tokens of one request since it joined the batch: its prompt and what it has generated.

    Histories are compared by identity: a request that joins again, after a preemption, has another
    one.
    """

    @abstractmethod
    def read(self, first: int, last: int) -> torch.Tensor:
        """Return the tokens from position `first` up to `last`, without it. [last - first]."""

    @staticmethod
    @abstractmethod
    def read_newest(histories: Sequence[Any], lengths: Sequence[int]) -> torch.Tensor:
        """Return the last of so many tokens of each history of this class, in one operation. [n].

        Args:
            histories: n histories of one worker.
            lengths: the number of tokens of each, at least 1.
        """


@dataclass(frozen=True, slots=True, eq=False)
class HostHistory(TokenHistory):
    """Token ids on the host, as in vLLM's V1 runner.

    Attributes:
        prompt: the prompt.
        output: the generated tokens, a list that vLLM appends to.
        device: where the value LMs are.
    """

    prompt: Sequence[int]
    output: Sequence[int]
    device: torch.device

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt) + len(self.output)

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return the tokens from position `first` up to `last`, without it. [last - first]."""
        start = len(self.prompt)
        tokens = [*self.prompt[first:last], *self.output[max(0, first - start) : last - start]]
        return torch.tensor(tokens[: last - first], device=self.device)

    @staticmethod
    def read_newest(histories: Sequence[HostHistory], lengths: Sequence[int]) -> torch.Tensor:
        """Return the last of so many tokens of each history. [n]."""
        tokens = []
        for history, length in zip(histories, lengths, strict=True):
            place = length - 1 - len(history.prompt)
            tokens.append(history.output[place] if place >= 0 else history.prompt[place])
        return upload(np.array(tokens, np.int64), histories[0].device)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceHistory(TokenHistory):
    """Token ids in a table that only the device can read in time, as in vLLM's V2 runner.

    Attributes:
        table: [slots, length] the tokens of all requests.
        slot: the row of this request.
    """

    table: torch.Tensor
    slot: int

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return the tokens from position `first` up to `last`, without it. [last - first]."""
        return self.table[self.slot, first:last].long()

    @staticmethod
    def read_newest(histories: Sequence[DeviceHistory], lengths: Sequence[int]) -> torch.Tensor:
        """Return the last of so many tokens of each history. [n]."""
        table = histories[0].table
        places = np.array([[history.slot for history in histories], lengths])
        slots, ends = upload(places, table.device)
        return table[slots, ends - 1].long()


class LookaheadRow(NamedTuple):
    """A row of a step that lookahead values steer.

    Attributes:
        position: its index among the steered rows.
        history: its tokens.
        length: the number of its tokens.
        lms: the value LMs that read it.
    """

    position: int
    history: TokenHistory
    length: int
    lms: frozenset[ValueLM]


@dataclass(frozen=True, slots=True)
class _Reading:
    """The cache of one value LM, and the request of each of its rows."""

    cache: ValueCache
    histories: tuple[TokenHistory, ...]


class LookaheadCaches:
    """The caches of all value LMs of one worker."""

    def __init__(self) -> None:
        self._readings: dict[ValueLM, _Reading] = {}

    @property
    def rows(self) -> int:
        """Return the number of rows in all caches together."""
        return sum(len(reading.histories) for reading in self._readings.values())

    def clear(self) -> None:
        """Free all rows. Requests that continue are read again."""
        self._readings.clear()

    def prepare(self, rows: Sequence[LookaheadRow]) -> Mapping[ValueLM, ValueCache]:
        """Return caches with all tokens of these rows; free those of all other requests.

        Every cache of the latest step must have valued its candidates: their columns hold the
        tokens that were sampled since.

        Args:
            rows: the rows of the step that lookahead values steer.
        """
        users: dict[ValueLM, list[LookaheadRow]] = {}
        for row in rows:
            for lm in row.lms:
                users.setdefault(lm, []).append(row)
        readings: dict[ValueLM, _Reading] = {}
        for lm, lm_rows in users.items():
            readings[lm] = _advance(lm, self._readings.pop(lm, None), lm_rows)
        self._readings = readings
        return {lm: reading.cache for lm, reading in readings.items()}


def _advance(lm: ValueLM, previous: _Reading | None, rows: Sequence[LookaheadRow]) -> _Reading:
    """Return the cache of a value LM for the rows of this step."""
    parts: list[_Reading] = []
    if previous is not None:
        parts = _continued(previous, rows)
    continued: set[TokenHistory] = set()
    for part in parts:
        continued.update(part.histories)
    joining = [row for row in rows if row.history not in continued]
    return _joined(parts + _read(lm, joining))


def _continued(previous: _Reading, rows: Sequence[LookaheadRow]) -> list[_Reading]:
    """Return the rows whose requests have one more token than before, or the same tokens.

    A request without a new token is one whose prompt vLLM still reads: its sample was dropped.
    """
    present = {row.history: row for row in rows}
    cache = previous.cache
    # Any candidate will do for the rows that have no new token.
    chosen = cache.candidates[:, 0]
    grown: list[int] = []
    waiting: list[int] = []
    for index, history in enumerate(previous.histories):
        row = present.get(history)
        growth = row.length - cache.lengths[index] if row else -1
        if row and growth == 1:
            grown.append(index)
        elif growth == 0:
            waiting.append(index)
    if not grown and not waiting:
        return []
    lengths = [*cache.lengths]
    if grown:
        histories = [previous.histories[index] for index in grown]
        new_lengths = [lengths[index] + 1 for index in grown]
        newest = type(histories[0]).read_newest(histories, new_lengths)
        places = upload(np.array(grown), chosen.device)
        chosen = chosen.index_copy(0, places, newest)
    cache.choose(chosen)
    parts = []
    if grown:
        parts.append(_kept(previous, grown, present))
    if waiting:
        waiting_lengths = [lengths[index] for index in waiting]
        # Drop the column that `choose` has added.
        patch = cache.cache.take(waiting, 1 + max(waiting_lengths))
        patch.drop_last()
        waiters = tuple(previous.histories[index] for index in waiting)
        members = [present[history].position for history in waiters]
        parts.append(_Reading(ValueCache(cache.lm, members, waiting_lengths, patch), waiters))
    return parts


def _kept(
    previous: _Reading, indices: list[int], present: Mapping[TokenHistory, LookaheadRow]
) -> _Reading:
    """Return some rows of a cache, which is copied only if others leave it."""
    cache = previous.cache
    histories = tuple(previous.histories[index] for index in indices)
    members = [present[history].position for history in histories]
    lengths = [cache.lengths[index] for index in indices]
    columns = cache.cache
    if len(indices) < len(previous.histories):
        columns = columns.take(indices, max(lengths))
    return _Reading(ValueCache(cache.lm, members, lengths, columns), histories)


def _read(lm: ValueLM, rows: Sequence[LookaheadRow]) -> list[_Reading]:
    """Read the tokens of requests that have joined. Equal texts are read once."""
    texts: dict[tuple[int, ...], list[LookaheadRow]] = {}
    for row in rows:
        text = tuple(row.history.read(0, row.length).tolist())
        texts.setdefault(text, []).append(row)
    parts = []
    for text, users in texts.items():
        columns: RowCache = read_tokens(lm, text)
        if len(users) > 1:
            columns = columns.take([0] * len(users), len(text))
        members = [row.position for row in users]
        cache = ValueCache(lm, members, [len(text)] * len(users), columns)
        parts.append(_Reading(cache, tuple(row.history for row in users)))
    return parts


def _joined(parts: list[_Reading]) -> _Reading:
    """Return the rows of all parts in one cache.

    Parts are joined in pairs, so that P parts copy each row about log2(P) times.
    """
    while len(parts) > 1:
        pairs: list[_Reading] = []
        for first, second in zip(parts[::2], parts[1::2], strict=False):
            cache = first.cache.join(second.cache)
            pairs.append(_Reading(cache, first.histories + second.histories))
        # An odd number of parts has one without a partner.
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]
