"""Label probabilities: prompts that are read once, between two decoding steps, and sample nothing.

Questions with a common beginning, such as those of a judge, are one group. The beginning is read
once and the rest as one batch. Labels of several tokens need one more forward pass per token, over
the same keys and values, for all paths of all questions of the group.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.labels import LabelTree, Path
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.questions import Pending
from infer_align.errors import EngineFailed

# Path -> {token: logprob}.
Measured = dict[Path, dict[int, float]]


@dataclass(eq=False)
class Question(Pending[Measured]):
    """A prompt whose label probabilities are requested.

    Attributes:
        ids: the prompt's tokens.
        tree: the paths that spell the labels.
    """

    ids: list[int]
    tree: LabelTree

    def __post_init__(self) -> None:
        super().__init__()


def take_group(waiting: deque[Question], tokens: int, cells: int) -> list[Question]:
    """Remove the first question and those that share at least half of it and fit.

    Args:
        waiting: the questions; those of the group are removed.
        tokens: tokens that the group may have after its common beginning.
        cells: rows x columns of the cache that the group may take.
    """
    first = waiting.popleft()
    group = [first]
    shared = len(first.ids) - 1
    longest = len(first.ids)
    for question in list(waiting):
        common = min(shared, common_length(first.ids, question.ids))
        width = max(longest, len(question.ids))
        if 2 * common < len(first.ids) - 1:
            continue
        rows = len(group) + 1
        if rows * (width - common) > tokens or rows * width > cells:
            break
        waiting.remove(question)
        group.append(question)
        shared = common
        longest = width
    return group


def read_group(model: Model, group: Sequence[Question], part: int, cells: int) -> list[Measured]:
    """Return the logprobs that the labels of each question need.

    Args:
        model: the frozen model.
        group: questions with a common beginning.
        part: prompt tokens that one forward pass may read.
        cells: rows x columns of the cache that the paths of labels may take at once.

    Raises:
        EngineFailed: the model's logits are not finite.
    """
    lengths = [len(question.ids) for question in group]
    shared = _shared_length(group, part)
    beginning = RowCache()
    for start in range(0, shared, part):
        end = min(start + part, shared)
        model.read([group[0].ids[start:end]], beginning, [end])
    # Every row reads the same number of tokens, so that no row has a gap in the middle. Shorter
    # rows read some of the beginning again.
    width = max(lengths) - shared
    cache = beginning.beginnings([max(0, length - width) for length in lengths])
    logprobs = _read(model, cache, [question.ids[-width:] for question in group], lengths)
    measured: list[Measured] = []
    for row, question in zip(logprobs, group, strict=True):
        measured.append({(): _select(row, question.tree.readings[()])})
    _read_paths(model, group, cache, cells, measured)
    return measured


def _shared_length(group: Sequence[Question], part: int) -> int:
    """Return the length of the common beginning that is read first."""
    lengths = [len(question.ids) for question in group]
    if len(group) == 1 and lengths[0] <= part:
        return 0
    common = [common_length(group[0].ids, question.ids) for question in group[1:]]
    return min([min(lengths) - 1, *common])


def _read_paths(
    model: Model, group: Sequence[Question], cache: RowCache, cells: int, measured: list[Measured]
) -> None:
    """Read the paths of all questions and add their logprobs to `measured`."""
    paths: list[tuple[int, Path]] = []
    for i, question in enumerate(group):
        paths += [(i, path) for path in question.tree.readings if path]
    paths.sort(key=lambda item: len(item[1]))
    for steps, of_length in itertools.groupby(paths, key=lambda item: len(item[1])):
        same_length = list(of_length)
        rows = max(1, cells // (cache.length + steps))
        for start in range(0, len(same_length), rows):
            batch = same_length[start : start + rows]
            questions = [i for i, _ in batch]
            lengths = [len(group[i].ids) + steps for i in questions]
            copies = cache.take(questions, cache.length)
            logprobs = _read(model, copies, [list(path) for _, path in batch], lengths)
            for (i, path), row in zip(batch, logprobs, strict=True):
                measured[i][path] = _select(row, group[i].tree.readings[path])


def _read(
    model: Model, cache: RowCache, tokens: Sequence[list[int]], lengths: list[int]
) -> torch.Tensor:
    """Append tokens to each row; return the logprobs after the last one. [B, V]."""
    logprobs = torch.log_softmax(model.read(tokens, cache, lengths).logits, dim=-1)
    if not logprobs.amax(dim=-1).isfinite().all():
        raise EngineFailed(
            "the model's logits are not finite; check its weights and its dtype.", status=500
        )
    return logprobs


def _select(logprobs: torch.Tensor, tokens: Sequence[int]) -> dict[int, float]:
    return dict(zip(tokens, logprobs[list(tokens)].tolist(), strict=True))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    for i, (token, other_token) in enumerate(zip(one, other, strict=False)):
        if token != other_token:
            return i
    return min(len(one), len(other))
