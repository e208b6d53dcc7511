"""Log-probabilities of given texts: prompts that are read once, and texts that are read after them.

A group of questions is read on three levels. Each level continues the keys and values of the one
before it:

    the common beginning of all prompts     one row, in parts
    the rest of each different prompt       a row per prompt
    the texts                               a row per text, several rows at a time

Every level stops after each forward pass, so that a decoding step can come between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.sequences import SequenceLogprobs
from infer_align.engines.transformers.model import Model, Step
from infer_align.engines.transformers.questions import Pending
from infer_align.engines.transformers.reading import common_length
from infer_align.errors import EngineFailed
from infer_align.types import Array
from infer_align.values.head import HeadValue

# Logits of a forward pass, as rows x columns x vocabulary. 64 MiB in float32.
LOGITS = 2**24


@dataclass(eq=False)
class SequenceQuestion(Pending[SequenceLogprobs]):
    """A prompt, and texts whose log-probabilities after it are requested.

    Attributes:
        ids: the prompt's tokens.
        texts: the tokens of each text.
        heads: the heads whose expectation after each text is requested, by name.
        logprobs: per text [T]; filled while it is read.
        estimates: per head [N]; filled while it is read.
        unread: the texts that were not read yet.
    """

    ids: list[int]
    texts: list[list[int]]
    heads: Mapping[str, HeadValue] = field(default_factory=dict)
    logprobs: list[Array] = field(init=False)
    estimates: dict[str, Array] = field(init=False)
    unread: set[int] = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.logprobs = [np.zeros(len(text)) for text in self.texts]
        self.estimates = {name: np.zeros(len(self.texts)) for name in self.heads}
        self.unread = {i for i, text in enumerate(self.texts) if text or self.heads}

    @property
    def text_tokens(self) -> int:
        """Return the number of tokens of all texts."""
        return sum(len(text) for text in self.texts)

    def finish(self) -> None:
        """Deliver the answer; from the scheduler's thread."""
        arrays = [*self.logprobs, *self.estimates.values()]
        if any(np.isnan(each).any() for each in arrays):
            self.deliver(
                EngineFailed(
                    "the model's logits are not finite; check its weights and its dtype.",
                    status=500,
                )
            )
            return
        self.deliver(
            SequenceLogprobs(tuple(self.logprobs), len(self.ids), self.text_tokens, self.estimates)
        )


@dataclass(eq=False, slots=True)
class _Row:
    """A row of a forward pass.

    Attributes:
        ids: all tokens of the row.
        source: keys and values of the row's beginning, in one row. Other rows may use it too.
        new: the number of tokens that the source lacks, or whose results are needed.
    """

    ids: list[int]
    source: RowCache
    new: int


@dataclass(eq=False, slots=True)
class _TextRow(_Row):
    """A row that reads a text.

    Attributes:
        question: its question.
        index: the index of the text.
    """

    question: SequenceQuestion
    index: int


@dataclass(eq=False, slots=True)
class _Read:
    """The result of one forward pass.

    Attributes:
        step: its logits and states.
        columns: the number of its columns.
        unread: the number of columns that are still to be read.
    """

    step: Step
    columns: int
    unread: int


RowT = TypeVar("RowT", bound=_Row)


def take_sequences(
    waiting: deque[SequenceQuestion], tokens: int, cells: int
) -> list[SequenceQuestion]:
    """Remove the first question and those that cost no more beside it than alone.

    Args:
        waiting: the questions; those of the group are removed.
        tokens: tokens of prompts that the others may add to the first one.
        cells: columns of the cache that all prompts may take.
    """
    first = waiting.popleft()
    group = [first]
    prompts = [first.ids]
    # The most similar prompts come first: a prompt without a common beginning ends the sharing.
    by_similarity = sorted(waiting, key=lambda other: -common_length(first.ids, other.ids))
    for question in by_similarity:
        together = _distinct([*prompts, question.ids])
        cost = _prompt_cost(together)
        if cost > _prompt_cost(prompts) + len(question.ids):
            continue
        if cost - len(first.ids) > tokens or cost > max(cells, len(first.ids)):
            continue
        group.append(question)
        prompts = together
        waiting.remove(question)
    return group


def _distinct(prompts: Sequence[list[int]]) -> list[list[int]]:
    by_tokens = {tuple(ids): ids for ids in prompts}
    return list(by_tokens.values())


def _prompt_cost(prompts: Sequence[list[int]]) -> int:
    """Return the number of tokens that reading different prompts takes."""
    shared = _shared_length(prompts)
    return shared + sum(len(ids) - shared for ids in prompts)


def _shared_length(prompts: Sequence[list[int]]) -> int:
    """Return the length of the common beginning. Of several prompts, each has a rest after it."""
    if len(prompts) == 1:
        return len(prompts[0])
    common = [common_length(prompts[0], ids) for ids in prompts[1:]]
    return min(*common, *(len(ids) - 1 for ids in prompts))


def read_sequences(
    model: Model, group: Sequence[SequenceQuestion], part: int, cells: int
) -> Iterator[int]:
    """Read the questions of a group; deliver each answer as soon as it is complete.

    Args:
        model: the frozen model.
        group: the questions.
        part: tokens that one forward pass may read.
        cells: rows x columns of the cache that a forward pass may take.

    Yields:
        The number of tokens of each forward pass.
    """
    waiting = [question for question in group if not question.answer.done()]
    for question in waiting:
        if not question.unread:
            question.finish()
    waiting = [question for question in waiting if question.unread]
    if not waiting:
        return
    prompts = _distinct([question.ids for question in waiting])
    caches = yield from _read_prompts(model, prompts, part, cells)
    sources = {tuple(ids): cache for ids, cache in zip(prompts, caches, strict=True)}
    rows: list[_TextRow] = []
    for question in waiting:
        rows += _text_rows(question, sources[tuple(question.ids)])
    yield from _read_texts(model, rows, part, cells)


def _text_rows(question: SequenceQuestion, source: RowCache) -> list[_TextRow]:
    rows: list[_TextRow] = []
    for index in sorted(question.unread):
        text = question.texts[index]
        # Nothing follows the last token, so it is read only for the heads.
        read = text if question.heads else text[:-1]
        # The first token of the text is predicted by the last one of the prompt.
        rows.append(_TextRow([*question.ids, *read], source, len(read) + 1, question, index))
    return rows


def _read_prompts(
    model: Model, prompts: Sequence[list[int]], part: int, cells: int
) -> Generator[int, None, list[RowCache]]:
    """Read different prompts: their common beginning once, then the rest of each.

    It yields as `read_sequences`, and takes its `part` and `cells`.

    Returns:
        The keys and values of each prompt, in one row.
    """
    shared = _shared_length(prompts)
    beginning = RowCache()
    for start in range(0, shared, part):
        end = min(start + part, shared)
        model.read([prompts[0][start:end]], beginning, [end])
        yield end - start
    if len(prompts) == 1:
        return [beginning]
    rows = [_Row(ids, beginning, len(ids) - shared) for ids in prompts]
    caches: dict[_Row, RowCache] = {}
    remaining: deque[_Row] = deque(sorted(rows, key=lambda row: -row.new))
    while remaining:
        batch = _take_batch(remaining, part, cells)
        cache = _beginnings(batch)
        for read in _read_new(model, batch, cache, part):
            yield read.columns * len(batch)
        for i, row in enumerate(batch):
            caches[row] = cache.take([i], len(row.ids))
    return [caches[row] for row in rows]


def _read_texts(model: Model, rows: Sequence[_TextRow], part: int, cells: int) -> Iterator[int]:
    """Read texts after their prompts, and fill in what their questions ask for.

    It yields as `read_sequences`, and takes its `part` and `cells`.
    """
    tokens = max(1, min(part, LOGITS // model.vocabulary))
    remaining = deque(sorted(rows, key=lambda row: -row.new))
    while remaining:
        batch = _take_batch(remaining, part, cells)
        # The callers of some may have been cancelled meanwhile.
        batch = [row for row in batch if not row.question.answer.done()]
        for read in _read_new(model, batch, _beginnings(batch), tokens, all_results=True):
            _store(batch, read)
            yield read.columns * len(batch)
        _finish(batch)


def _read_new(
    model: Model, batch: Sequence[_Row], cache: RowCache, tokens: int, *, all_results: bool = False
) -> Iterator[_Read]:
    """Read the new tokens of a batch in parts: some columns of all rows in each forward pass.

    Rows end in the same column. A row with fewer tokens than columns begins with padding.

    Args:
        model: the frozen model.
        batch: the rows.
        cache: their beginnings; the keys and values of the new tokens are appended.
        tokens: tokens that one forward pass may read.
        all_results: True to get the results of every column; False for those of the last one.
    """
    if not batch:
        return
    width = max(row.new for row in batch)
    padded = [[0] * (width - len(row.ids)) + row.ids[-width:] for row in batch]
    ids = torch.tensor(padded, device=model.device)
    columns = max(1, tokens // len(batch))
    for start in range(0, width, columns):
        part = ids[:, start : start + columns]
        unread = width - start - part.shape[1]
        # Each row's tokens up to the end of this part. A part can be nothing but padding; it then
        # counts as one token, since a row without any would have nothing to attend to.
        lengths = [max(1, len(row.ids) - unread) for row in batch]
        results = part.shape[1] if all_results else 1
        step = model.forward_last(part, cache, lengths, results)
        yield _Read(step, part.shape[1], unread)


def _take_batch(remaining: deque[RowT], part: int, cells: int) -> list[RowT]:
    """Remove the rows of one forward pass. They come sorted, the one with most new tokens first."""
    batch = [remaining.popleft()]
    width = batch[0].new
    longest = len(batch[0].ids)
    while remaining:
        longest = max(longest, len(remaining[0].ids))
        rows = len(batch) + 1
        if rows * width > part or rows * longest > cells:
            break
        batch.append(remaining.popleft())
    return batch


def _beginnings(batch: Sequence[_Row]) -> RowCache:
    """Return the keys and values that a forward pass of these rows continues.

    Every row reads the same number of tokens, so that no row has a gap in the middle. A row with
    fewer new tokens reads some of its prompt again.
    """
    new = max((row.new for row in batch), default=0)
    lengths = [max(0, len(row.ids) - new) for row in batch]
    width = max(lengths, default=0)
    if not width:
        return RowCache()
    pieces: list[RowCache] = []
    start = 0
    for end in range(1, len(batch) + 1):
        source = batch[start].source
        if end == len(batch) or batch[end].source is not source:
            pieces.append(source.beginnings(lengths[start:end], width))
            start = end
    return RowCache.stack(pieces)


def _store(batch: Sequence[_TextRow], read: _Read) -> None:
    """Store the log-probabilities of the tokens that the columns of a forward pass predict."""
    logits = read.step.logits
    # For each row, the index in its text of the token that the first column predicts. It is below
    # 0 if the first columns predict tokens of the prompt.
    firsts: list[int] = []
    targets = torch.zeros(logits.shape[:2], dtype=torch.long)
    for i, row in enumerate(batch):
        text = row.question.texts[row.index]
        # The last column read predicts the token at `end - 1`: the logits of a token are those of
        # the token before it.
        end = len(row.ids) - read.unread - len(row.question.ids) + 1
        first = end - read.columns
        firsts.append(first)
        predicted = text[max(0, first) : max(0, end)]
        column = max(0, -first)
        targets[i, column : column + len(predicted)] = torch.tensor(predicted, dtype=torch.long)
    chosen = logits.gather(-1, targets.to(logits.device)[..., None])[..., 0]
    logprobs = (chosen - logits.logsumexp(dim=-1)).double().cpu().numpy()
    for row, first, values in zip(batch, firsts, logprobs, strict=True):
        stored = row.question.logprobs[row.index]
        start = max(0, first)
        end = min(len(stored), first + read.columns)
        if end > start:
            stored[start:end] = values[start - first : end - first]
    if not read.unread:
        _store_estimates(batch, read.step)


def _store_estimates(batch: Sequence[_TextRow], step: Step) -> None:
    """Store what heads expect after the last column, which is the end of every text."""
    # Each head with the rows that ask for it, and the name under which they do.
    users: dict[HeadValue, list[tuple[int, str]]] = {}
    for i, row in enumerate(batch):
        for name, head in row.question.heads.items():
            users.setdefault(head, []).append((i, name))
    for head, uses in users.items():
        rows = [i for i, _ in uses]
        expected = head.expected(step.hidden[rows, -1], step.logits[rows, -1])
        for (i, name), value in zip(uses, expected.tolist(), strict=True):
            row = batch[i]
            row.question.estimates[name][row.index] = value


def _finish(batch: Sequence[_TextRow]) -> None:
    """Deliver the answers that are complete now."""
    for row in batch:
        row.question.unread.discard(row.index)
        if not row.question.unread:
            row.question.finish()
