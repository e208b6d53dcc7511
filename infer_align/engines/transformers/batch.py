"""The rows that step together, with their keys and values in every model that reads them.

A candidate takes one lane, that is one row of the frozen model's cache, per context: first that of
the request as it is, then those that guide it. Without guidance, lanes and candidates are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.guidance import CandidateGuidance, GuidanceBatch
from infer_align.decoding.siblings import ValueCache
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.transformers.rows import Job, Row
from infer_align.values.lookahead import ValueLM


@dataclass(slots=True)
class RowBatch:
    """Rows with their keys and values in the frozen model and in the value LMs.

    Attributes:
        rows: the candidates that are decoded.
        cache: keys and values of the frozen model, one row per lane.
        value_caches: keys and values of the value LMs; each holds some of the rows.
        steering: how the rows are steered; set by the scheduler, None if they are not.
        guidance: how the rows are guided; set by the scheduler, None if they are not.
    """

    rows: list[Row] = field(default_factory=list)
    cache: RowCache = field(default_factory=RowCache)
    value_caches: dict[ValueLM, ValueCache] = field(default_factory=dict)
    steering: SteeringBatch | None = None
    guidance: GuidanceBatch | None = None

    @property
    def is_guided(self) -> bool:
        """Return True if some candidate is guided."""
        return any(row.guidance is not None for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each lane, the newest one included."""
        lengths: list[int] = []
        for row in self.rows:
            lengths += row.lengths
        return lengths

    @property
    def newest(self) -> list[list[int]]:
        """Return the token that each lane reads next."""
        tokens: list[list[int]] = []
        for row in self.rows:
            tokens += [row.tokens[-1:]] * row.lanes
        return tokens

    def lanes(self, positions: Sequence[int]) -> list[int]:
        """Return the lanes of the candidates at these positions, in this order."""
        ends = list(accumulate(row.lanes for row in self.rows))
        lanes: list[int] = []
        for i in positions:
            lanes += range(ends[i] - self.rows[i].lanes, ends[i])
        return lanes

    def first_lanes(self) -> list[int]:
        """Return the lane of each candidate that reads the request as it is."""
        ends = accumulate(row.lanes for row in self.rows)
        return [end - row.lanes for end, row in zip(ends, self.rows, strict=True)]

    def split(self, of_lanes: Iterable[bool]) -> list[list[bool]]:
        """Return the items of all lanes as one list per candidate."""
        items = iter(of_lanes)
        return [list(islice(items, row.lanes)) for row in self.rows]

    def guidance_batch(self, device: torch.device) -> GuidanceBatch:
        """Build the guidance of these rows; at least one of them is guided."""
        first_lanes = self.first_lanes()
        guided: dict[int, CandidateGuidance] = {}
        for i, row in enumerate(self.rows):
            if row.guidance is not None:
                guided[i] = row.guidance
        return GuidanceBatch.build(guided, {i: first_lanes[i] for i in guided}, device)

    @classmethod
    def of_prompt(cls, job: Job, rows: list[Row]) -> RowBatch:
        """Return candidates of one job, each with a copy of the prompts' keys and values."""
        copies = [0] * len(rows)
        columns = len(job.prompt.ids)
        members = list(range(len(rows)))
        value_caches: dict[ValueLM, ValueCache] = {}
        for lm, cache in job.value_caches.items():
            copied = cache.take(copies, columns)
            value_caches[lm] = ValueCache(lm, members, [columns] * len(rows), copied)
        lanes = list(range(len(job.contexts))) * len(rows)
        return cls(rows, job.cache.take(lanes, job.longest_prompt), value_caches)

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
        lanes = self.lanes(positions)
        lengths = self.lengths
        # The longest lane spans the cache, except for tokens that the model has not read yet.
        unread = max(lengths) - self.cache.length
        columns = max(lengths[lane] for lane in lanes) - unread
        return RowBatch(rows, self.cache.take(lanes, columns), value_caches)

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
