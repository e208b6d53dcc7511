"""The rows that step together, with their keys and values in every model that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering import SteeringBatch
from infer_align.engines.transformers.rows import Job, Row
from infer_align.values.lookahead import ValueLM


@dataclass(slots=True)
class RowBatch:
    """Rows with their keys and values in the frozen model and in the value LMs.

    Attributes:
        rows: the candidates that are decoded.
        cache: keys and values of the frozen model, one row per candidate.
        value_caches: keys and values of the value LMs; each holds some of the rows.
        steering: how the rows are steered; set by the scheduler, None if they are not.
    """

    rows: list[Row] = field(default_factory=list)
    cache: RowCache = field(default_factory=RowCache)
    value_caches: dict[ValueLM, ValueCache] = field(default_factory=dict)
    steering: SteeringBatch | None = None

    @classmethod
    def of_prompt(cls, job: Job, rows: list[Row]) -> RowBatch:
        """Return candidates of one job, each with a copy of the prompt's keys and values."""
        copies = [0] * len(rows)
        columns = len(job.prompt.ids)
        members = list(range(len(rows)))
        value_caches: dict[ValueLM, ValueCache] = {}
        for lm, cache in job.value_caches.items():
            copied = cache.take(copies, columns)
            value_caches[lm] = ValueCache(lm, members, [columns] * len(rows), copied)
        return cls(rows, job.cache.take(copies, columns), value_caches)

    def take(self, positions: Sequence[int]) -> RowBatch:
        """Return the rows at these positions, in this order."""
        if len(positions) == len(self.rows):
            return self
        rows = [self.rows[i] for i in positions]
        if not rows:
            return RowBatch()
        value_caches: dict[ValueLM, ValueCache] = {}
        for lm, value_cache in self.value_caches.items():
            remaining = value_cache.take(positions)
            if remaining.members:
                value_caches[lm] = remaining
        # The longest row spans the cache, except for tokens that the model has not read yet.
        unread = max(row.length for row in self.rows) - self.cache.length
        columns = max(row.length for row in rows) - unread
        return RowBatch(rows, self.cache.take(list(positions), columns), value_caches)

    def join(self, other: RowBatch) -> RowBatch:
        """Return these rows followed by the other's."""
        if not self.rows:
            return other
        if not other.rows:
            return self
        value_caches = dict(self.value_caches)
        for lm, value_cache in other.value_caches.items():
            shifted = value_cache.shifted(len(self.rows))
            value_caches[lm] = value_caches[lm].join(shifted) if lm in value_caches else shifted
        return RowBatch(self.rows + other.rows, self.cache.join(other.cache), value_caches)
