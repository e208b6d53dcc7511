"""Caches of the value LMs that steer a running batch.

A lookahead value reads a row's k candidates in one forward. The candidates are siblings: each
attends to the row's tokens and to itself. After sampling, the column of the chosen candidate stays
in the cache and the others are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from infer_align.decoding.cache import RowCache
from infer_align.values.lookahead import ValueLM

# A value LM reads a prompt in parts of this many tokens.
PREFILL_TOKENS = 1024


def read_tokens(lm: ValueLM, ids: Sequence[int]) -> RowCache:
    """Read a prompt with a value LM. The cache holds one row."""
    cache = RowCache()
    device = lm.lm.device
    for start in range(0, len(ids), PREFILL_TOKENS):
        part = torch.tensor([ids[start : start + PREFILL_TOKENS]], device=device)
        positions = torch.arange(start, start + part.shape[1], device=device)
        lm.forward(part, cache, positions[None], None)
    return cache


@dataclass(slots=True)
class ValueCache:
    """Attention keys and values of one value LM, for the R rows that it steers.

    Attributes:
        lm: the value LM.
        members: for each row of the cache, its index among the steered rows. The embedded engine
            steers all rows, so there it is the index in the batch.
        lengths: tokens of each row, all of them in the cache. `choose` adds the sampled token.
        cache: keys and values, right-aligned.
        candidates: [R, k] the candidates, between `siblings` and `choose`.
        columns: [layers, 2, R, heads, k, dim] the candidates' keys and values in this time; None if
            they are the last columns of the cache.
    """

    lm: ValueLM
    members: list[int]
    lengths: list[int]
    cache: RowCache
    candidates: torch.Tensor = field(default_factory=lambda: torch.empty((0, 0)))
    columns: torch.Tensor | None = None

    def take(self, positions: Sequence[int]) -> ValueCache:
        """Return the rows at these positions of the batch, renumbered in the given order."""
        renumbered = {position: new for new, position in enumerate(positions)}
        rows: list[int] = []
        members: list[int] = []
        lengths: list[int] = []
        for row, member in enumerate(self.members):
            if member in renumbered:
                rows.append(row)
                members.append(renumbered[member])
                lengths.append(self.lengths[row])
        if not rows:
            return ValueCache(self.lm, [], [], RowCache())
        return ValueCache(self.lm, members, lengths, self.cache.take(rows, max(lengths)))

    def shifted(self, offset: int) -> ValueCache:
        """Return the same rows in a batch where each stands `offset` positions further down."""
        members = [member + offset for member in self.members]
        return ValueCache(self.lm, members, self.lengths, self.cache)

    def join(self, other: ValueCache) -> ValueCache:
        """Return these rows followed by the other's; members are positions in one batch."""
        if not self.members:
            return other
        if not other.members:
            return self
        return ValueCache(
            self.lm,
            self.members + other.members,
            self.lengths + other.lengths,
            self.cache.join(other.cache),
        )

    def siblings(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Value each candidate of each row by the H values of the LM: [R, k] ids -> [R, k, H].

        The candidates' columns are kept until `choose`, which has to follow before the next call.
        """
        self.candidates = token_ids
        values, self.columns = self.lm.siblings(token_ids, self.cache, self.lengths)
        return values

    def choose(self, chosen: torch.Tensor) -> None:
        """Keep the column of each row's sampled token and drop its siblings.

        Args:
            chosen: [R] sampled tokens. A token outside the candidates is read now.
        """
        is_chosen = self.candidates == chosen[:, None]
        # The offset of the chosen candidate among its siblings; 0 where none of them was chosen.
        offsets = is_chosen.int().argmax(dim=-1)
        if self.columns is None:
            self.cache.keep_one(self.cache.length - self.candidates.shape[1], offsets)
        else:
            self.cache.append_chosen(self.columns, offsets)
            self.columns = None
        earlier_columns = self.cache.length - 1
        unread = torch.nonzero(~is_chosen.any(dim=-1)).ravel().tolist()
        if unread:
            self._read(unread, earlier_columns, chosen)
        self.lengths = [length + 1 for length in self.lengths]

    def _read(self, rows: list[int], earlier_columns: int, chosen: torch.Tensor) -> None:
        """Replace the newest column of these rows by that of their sampled tokens.

        Args:
            rows: the rows of the cache.
            earlier_columns: columns before the newest one.
            chosen: [R] sampled tokens of all rows.
        """
        device = chosen.device
        patch = self.cache.take(rows, earlier_columns + 1)
        patch.drop_last()
        positions = torch.tensor([[self.lengths[row]] for row in rows], device=device)
        # Rows are right-aligned: a shorter one begins with padding.
        padding = earlier_columns - positions
        columns = torch.arange(earlier_columns + 1, device=device)
        mask = (columns[None] >= padding).long()
        self.lm.forward(chosen[rows, None], patch, positions, mask)
        self.cache.overwrite_last(rows, patch)


def keep_sampled_siblings(caches: Iterable[ValueCache], tokens: Sequence[int]) -> None:
    """Record the sampled tokens in every value cache of a batch.

    Args:
        caches: the value caches of the batch.
        tokens: [B] the sampled tokens.
    """
    for cache in caches:
        sampled = [tokens[member] for member in cache.members]
        cache.choose(torch.tensor(sampled, device=cache.candidates.device))
