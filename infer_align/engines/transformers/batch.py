"""The rows that step together, and what every model that reads them remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from infer_align.decoding.cache import RowCache
from infer_align.decoding.steering import Terms, ValueCache
from infer_align.engines.transformers.rows import Row
from infer_align.values.lookahead import ValueLM


@dataclass(slots=True)
class Batch:
    """Rows with their keys and values in the frozen model, and in the value LMs that steer some of them."""

    rows: list[Row] = field(default_factory=list)
    cache: RowCache = field(default_factory=RowCache)
    values: dict[ValueLM, ValueCache] = field(default_factory=dict)
    terms: Terms | None = None  # what the rows are steered by, from the first step that needs it

    def take(self, kept: Sequence[int]) -> Batch:
        """These of its rows."""
        if len(kept) == len(self.rows):
            return self
        rows = [self.rows[i] for i in kept]
        if not rows:
            return Batch()
        values = {lm: cache.take(rows) for lm, cache in self.values.items()}
        # The longest row spans the cache, short of the tokens that are yet to be fed.
        unfed = max(row.length for row in self.rows) - self.cache.length
        cache = self.cache.take([*kept], max(row.length for row in rows) - unfed)
        return Batch(rows, cache, {lm: cache for lm, cache in values.items() if cache.rows})

    def join(self, other: Batch) -> Batch:
        """Its rows, then the other's."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        values = dict(self.values)
        for lm, cache in other.values.items():
            values[lm] = values[lm].join(cache) if lm in values else cache
        return Batch(self.rows + other.rows, self.cache.join(other.cache), values)
