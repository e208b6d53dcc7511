"""VAS inside the running batch: which rows are steered, by which values, and what their value LMs remember.

A step of steered rows: top-k of the logits ─ values of the k (heads: one gather; value LMs: one forward over all siblings) ─
reweighted logits ─ sampler ─ the sibling that was chosen stays in the value LM's cache. Rows that do not steer are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from infer_align.decoding.cache import RowCache
from infer_align.engines.transformers.rows import Job, Row
from infer_align.types import Draw
from infer_align.values import Frozen, Value, check_values
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
from infer_align_kernels import reweight_logits, top_candidates

# A row's prompt is read by the value LM in parts of this many tokens.
PREFILL_TOKENS = 1024


@dataclass(slots=True)
class ValueCache:
    """One value LM's keys and values for the rows of a batch that it values: all tokens of each, the newest included."""

    lm: ValueLM
    rows: list[Row]
    cache: RowCache

    def take(self, rows: Sequence[Row]) -> ValueCache:
        """Those of its rows that are among these."""
        among = {id(row) for row in rows}
        kept = [i for i, row in enumerate(self.rows) if id(row) in among]
        columns = max((self.rows[i].length for i in kept), default=0)
        return ValueCache(
            self.lm,
            [self.rows[i] for i in kept],
            self.cache.take(kept, columns) if kept else RowCache(),
        )

    def join(self, other: ValueCache) -> ValueCache:
        """Its rows, then the other's."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        return ValueCache(self.lm, self.rows + other.rows, self.cache.join(other.cache))

    def siblings(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Values after each candidate of each row: [B, k] ids -> [B, k, H]. Leaves the candidates' columns for `choose`."""
        columns, device = self.cache.length, token_ids.device
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        k = token_ids.shape[1]
        prefix = torch.arange(columns, device=device)[None] >= (columns - lengths)[:, None]
        own = torch.eye(k, dtype=torch.bool, device=device)
        mask = torch.cat(
            [prefix[:, None].expand(-1, k, -1), own.expand(len(self.rows), -1, -1)], dim=-1
        )
        return self.lm.forward(token_ids, self.cache, lengths[:, None].expand(-1, k), mask[:, None])

    def choose(self, token_ids: torch.Tensor, chosen: torch.Tensor) -> None:
        """Keep the column of each row's chosen token. [B, k] the candidates just valued, [B] the tokens sampled."""
        columns = self.cache.length - token_ids.shape[1]
        match = token_ids == chosen[:, None]
        self.cache.keep_one(columns, match.int().argmax(dim=-1))
        if (
            outside := torch.nonzero(~match.any(dim=-1)).ravel().tolist()
        ):  # from the tail: nobody has read that token yet
            patch = self.cache.take(outside, columns + 1)
            patch.drop_last()
            positions = torch.tensor(
                [[self.rows[i].length] for i in outside], device=token_ids.device
            )
            ends = positions + 1
            mask = (
                torch.arange(columns + 1, device=token_ids.device)[None] >= columns + 1 - ends
            ).long()
            self.lm.forward(chosen[outside, None], patch, positions, mask)
            self.cache.overwrite_last(outside, patch)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the rows of a batch are steered by, as tensors: made once, for as long as the rows stay the same. M values are used."""

    values: tuple[Value, ...]
    users: tuple[list[int] | None, ...]  # of each value, the rows that it steers; None for all
    beta: torch.Tensor  # [B, M]
    beyond: (
        torch.Tensor | None
    )  # [B, k] True for slots past the row's own top_k; None where there are none
    tail: torch.Tensor | Literal["keep"]  # [B] True where the tail is masked
    k: int


class Steerer:
    """The values of one engine.

    Attributes:
        cell_bytes: keys and values that a token takes in all value LMs together.
    """

    def __init__(self, frozen: Frozen) -> None:
        self.cell_bytes = 0
        self._frozen = frozen
        self._shared: dict[object, Any] = {}
        self._values: dict[str, Value] = {}

    def add(self, name: str, value: Value) -> None:
        """Load a value and let requests use it.

        Raises:
            ConfigError: it does not fit the frozen model.
        """
        value.start(self._frozen, self._shared)
        # New mappings, not new entries: the scheduler's thread may be in the middle of a step over the old ones.
        self._values = {**self._values, name: value}
        used = {id(v.lm) for v in self._values.values() if isinstance(v, LookaheadValue)}
        self._shared = {key: found for key, found in self._shared.items() if id(found) in used}
        self.cell_bytes = sum(
            lm.cell_bytes for lm in self._shared.values() if isinstance(lm, ValueLM)
        )

    def value(self, name: str) -> Value:
        """The value of that name.

        Raises:
            KeyError: no such value.
        """
        return self._values[name]

    def check(self, draw: Draw) -> None:
        """Refuse values that are not configured, or cannot be watched.

        Raises:
            InvalidRequest: naming the value and the nearest.
        """
        check_values(draw, self._values)

    def bind(
        self, draw: Draw
    ) -> tuple[tuple[tuple[Value, float], ...], tuple[tuple[HeadValue, float], ...]]:
        """The values that a draw is steered by and watched by, with their weights; it keeps these, also when one is replaced."""
        beta = draw.steering.beta if draw.steering else {}
        weights = draw.estimates.values if draw.estimates else {}
        watched = ((self._values[name], weight) for name, weight in weights.items() if weight)
        return (
            tuple((self._values[name], weight) for name, weight in beta.items() if weight),
            tuple((value, weight) for value, weight in watched if isinstance(value, HeadValue)),
        )

    def prefill(self, job: Job) -> dict[ValueLM, RowCache]:
        """Read a prompt with the value LMs that its draw needs; -> their caches of one row."""
        caches: dict[ValueLM, RowCache] = {}
        ids = job.prompt.ids
        for value, _ in job.steered_by:
            if not isinstance(value, LookaheadValue) or value.lm is None or value.lm in caches:
                continue
            cache = caches[value.lm] = RowCache()
            for start in range(0, len(ids), PREFILL_TOKENS):
                part = torch.tensor(
                    [ids[start : start + PREFILL_TOKENS]], device=self._frozen.device
                )
                positions = torch.arange(start, start + part.shape[1], device=part.device)[None]
                value.lm.forward(part, cache, positions, None)
        return caches

    def terms(self, rows: Sequence[Row]) -> Terms:
        """What these rows are steered by; at least one of them is."""
        steerings = [row.job.draw.steering for row in rows]
        values = list(dict.fromkeys(value for row in rows for value, _ in row.job.steered_by))
        weights = [[dict(row.job.steered_by).get(value, 0.0) for value in values] for row in rows]
        users = [[i for i, row in enumerate(weights) if row[m]] for m in range(len(values))]
        used = [min(s.top_k, self._frozen.vocabulary) if s else 0 for s in steerings]
        k, device = max(used), self._frozen.device
        masked = [s is not None and s.tail == "mask" for s in steerings]
        return Terms(
            values=tuple(values),
            users=tuple(None if len(found) == len(rows) else found for found in users),
            beta=torch.tensor(weights, device=device).view(len(rows), len(values)),
            beyond=None
            if min(used) == k
            else torch.arange(k, device=device)[None] >= torch.tensor(used, device=device)[:, None],
            tail=torch.tensor(masked, device=device) if any(masked) else "keep",
            k=k,
        )

    def steer(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        terms: Terms,
        rows: Sequence[Row],
        caches: Mapping[ValueLM, ValueCache],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, V] logits, [B, d] states -> the reweighted logits and [B, k] the candidates; rows that do not steer as they were."""
        candidates = top_candidates(logits, terms.k)
        if not terms.values:  # every weight is 0
            return logits, candidates
        values = _evaluate(candidates, hidden, terms, rows, caches)
        slots = candidates if terms.beyond is None else candidates.masked_fill(terms.beyond, -1)
        return reweight_logits(logits, slots, values, terms.beta, terms.tail), candidates

    def estimates(
        self, logits: torch.Tensor, hidden: torch.Tensor, rows: Sequence[Row]
    ) -> list[tuple[Row, float]]:
        """What those of the rows that are due are expected to be worth, by the values that they are watched by."""
        due = [i for i, row in enumerate(rows) if row.is_due]
        if not due:
            return []
        weights = [dict(rows[i].job.watched_by) for i in due]
        found = torch.zeros(len(due), device=logits.device)
        for value in {value for own in weights for value in own}:
            own = torch.tensor([own.get(value, 0.0) for own in weights], device=logits.device)
            found += own * value.expected(hidden[due].float(), logits[due])
        return list(zip((rows[i] for i in due), found.tolist(), strict=True))

    def choose(
        self,
        tokens: list[int],
        candidates: torch.Tensor,
        rows: Sequence[Row],
        caches: Mapping[ValueLM, ValueCache],
    ) -> None:
        """Tell the value LMs which token each row took."""
        place = {id(row): i for i, row in enumerate(rows)}
        for cache in caches.values():
            members = [place[id(row)] for row in cache.rows]
            cache.choose(
                candidates[members],
                torch.tensor([tokens[i] for i in members], device=candidates.device),
            )


def _evaluate(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    terms: Terms,
    rows: Sequence[Row],
    caches: Mapping[ValueLM, ValueCache],
) -> torch.Tensor:
    """[M, B, k] values of the candidates; what a row does not use is 0 and was not computed."""
    place = {id(row): i for i, row in enumerate(rows)} if caches else {}
    read: dict[ValueLM, tuple[list[int], torch.Tensor]] = {}
    for lm, cache in caches.items():
        members = [place[id(row)] for row in cache.rows]
        read[lm] = members, cache.siblings(candidates[members])
    first = terms.values[0]
    if len(terms.values) == 1 and terms.users[0] is None and isinstance(first, HeadValue):
        return first.evaluate(hidden, candidates)[None]
    values = torch.zeros((len(terms.values), *candidates.shape), device=candidates.device)
    for m, (value, users) in enumerate(zip(terms.values, terms.users, strict=True)):
        if isinstance(value, LookaheadValue) and value.lm:
            members, found = read[value.lm]
            values[m, members] = found[..., value.index]
        elif isinstance(value, HeadValue) and users is None:
            values[m] = value.evaluate(hidden, candidates)
        elif isinstance(value, HeadValue):
            values[m, users] = value.evaluate(hidden[users], candidates[users])
    return values
