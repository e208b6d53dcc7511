"""Label probabilities: prompts that are read once and answered by no token, side by side with what is decoded.

Questions that begin alike, as a judge's do, are one group: their common beginning is read once, the rest as one batch. Labels
of several tokens take another forward over the same keys and values, of all paths of all questions in the group.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.labels import LabelTree, Path
from infer_align.engines.transformers.model import Model
from infer_align.errors import EngineFailed

Read = dict[Path, dict[int, float]]  # after a path, token -> logprob


@dataclass(eq=False)
class Question:
    """One reading on its way. `answer` belongs to the event loop."""

    ids: list[int]
    tree: LabelTree
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    answer: asyncio.Future[Read] = field(init=False)

    def __post_init__(self) -> None:
        self.answer = self.loop.create_future()

    def tell(self, outcome: Read | Exception) -> None:
        """Answer it; from the event loop's thread only."""
        if self.answer.done():
            return  # whoever asked has left
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


def take_group(waiting: deque[Question], tokens: int, cells: int) -> list[Question]:
    """The first question, and those of the waiting ones that share at least half of it and fit.

    Args:
        waiting: those that are taken leave it.
        tokens: beside the common beginning, so many may be read.
        cells: of the cache, rows x columns.
    """
    group = [waiting.popleft()]
    shared, longest = len(group[0].ids) - 1, len(group[0].ids)
    for question in [*waiting]:
        common = min(shared, _common(group[0].ids, question.ids))
        width = max(longest, len(question.ids))
        if 2 * common < len(group[0].ids) - 1:
            continue
        if (len(group) + 1) * (width - common) > tokens or (len(group) + 1) * width > cells:
            break
        waiting.remove(question)
        group.append(question)
        shared, longest = common, width
    return group


def read_group(model: Model, group: Sequence[Question], part: int, cells: int) -> list[Read]:
    """The logprobs that each question's labels need.

    Args:
        model: the frozen model.
        group: questions, which begin alike where there are several.
        part: prompt tokens that are read in one forward.
        cells: of the cache, rows x columns, that the paths of labels may take at once.

    Raises:
        EngineFailed: the model's logits are not finite.
    """
    lengths = [len(question.ids) for question in group]
    shared = min(
        [min(lengths) - 1, *(_common(group[0].ids, question.ids) for question in group[1:])]
    )
    if len(group) == 1 and lengths[0] <= part:
        shared = 0
    start = RowCache()
    for done in range(0, shared, part):
        piece = group[0].ids[done : min(done + part, shared)]
        model.forward(torch.tensor([piece], device=model.device), start, [done + len(piece)])
    # Every row reads as many tokens, the shorter ones some of the beginning again: then no row has a gap in the middle.
    width = max(lengths) - shared
    cache = start.beginnings([max(0, length - width) for length in lengths])
    logprobs = _read(model, cache, [question.ids[-width:] for question in group], lengths)
    reads: list[Read] = [
        {(): _pick(row, q.tree.readings[()])} for row, q in zip(logprobs, group, strict=True)
    ]
    paths = sorted(
        ((i, path) for i, q in enumerate(group) for path in q.tree.readings if path),
        key=lambda item: len(item[1]),
    )
    for steps, alike in itertools.groupby(paths, key=lambda item: len(item[1])):
        waiting, rows = [*alike], max(1, cells // (cache.length + steps))
        while waiting:
            batch, waiting = waiting[:rows], waiting[rows:]
            of = [i for i, _ in batch]
            ends = [lengths[i] + steps for i in of]
            logprobs = _read(
                model, cache.take(of, cache.length), [list(path) for _, path in batch], ends
            )
            for (i, path), row in zip(batch, logprobs, strict=True):
                reads[i][path] = _pick(row, group[i].tree.readings[path])
    return reads


def _read(
    model: Model, cache: RowCache, tokens: Sequence[list[int]], lengths: list[int]
) -> torch.Tensor:
    """Append tokens to each row; -> [B, V] logprobs after the last."""
    width = max(len(row) for row in tokens)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device=model.device)
    logprobs = torch.log_softmax(model.forward(ids, cache, lengths).logits, dim=-1)
    if not logprobs.amax(dim=-1).isfinite().all():
        raise EngineFailed(
            "the model's logits are not finite; its weights or its dtype are at fault", status=500
        )
    return logprobs


def _pick(logprobs: torch.Tensor, tokens: Sequence[int]) -> dict[int, float]:
    return dict(zip(tokens, logprobs[list(tokens)].tolist(), strict=True))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
