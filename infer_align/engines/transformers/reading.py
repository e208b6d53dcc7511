"""Label probabilities: prompts that are read once, between two decoding steps, and sample nothing.

A judge answers with one of a few labels, such as "4". A label is one token or several. The tokens
of its beginning are a *path*. For each path, the log-probabilities of the tokens that may follow
are measured here, and `LabelTree` makes probabilities of labels from them.

Questions with a common beginning, such as those of a judge, are one group. The beginning is read
once and the rest as one batch. Paths are read after that, over the same keys and values: all paths
of one length, of all questions of the group, in one forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.labels import LabelTree, Path
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.questions import Pending
from infer_align.errors import EngineFailed

# For each path, the log-probability in nats of each token that may follow it.
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

    Returns:
        The group, in the order of the questions.
    """
    first = waiting.popleft()
    group = [first]
    # The last token is always read anew: the labels' logits are those after it.
    shared = len(first.ids) - 1
    longest = len(first.ids)
    for question in list(waiting):
        common = min(shared, common_length(first.ids, question.ids))
        if 2 * common < len(first.ids) - 1:
            continue
        width = max(longest, len(question.ids))
        rows = len(group) + 1
        # The questions are served in their order, so the first that does not fit ends the group.
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
    """Return the length of the common beginning that is read first, in tokens.

    It is 0 for a single question that one forward pass can read.
    """
    lengths = [len(question.ids) for question in group]
    if len(group) == 1 and lengths[0] <= part:
        return 0
    common = [common_length(group[0].ids, question.ids) for question in group[1:]]
    return min([min(lengths) - 1, *common])


def _read_paths(
    model: Model, group: Sequence[Question], cache: RowCache, cells: int, measured: list[Measured]
) -> None:
    """Read the paths of all questions and add their logprobs to `measured`.

    Args:
        model: the frozen model.
        group: the questions.
        cache: keys and values of the questions, one row each.
        cells: rows x columns of the cache that the paths may take at once.
        measured: the logprobs of each question, extended here.
    """
    for length, paths in _paths_by_length(group).items():
        rows = max(1, cells // (cache.length + length))
        for start in range(0, len(paths), rows):
            batch = paths[start : start + rows]
            questions = [i for i, _ in batch]
            tokens = [list(path) for _, path in batch]
            lengths = [len(group[i].ids) + length for i in questions]
            # Each path continues its question, so its row begins with a copy of the question's.
            copies = cache.take(questions, cache.length)
            logprobs = _read(model, copies, tokens, lengths)
            for (i, path), row in zip(batch, logprobs, strict=True):
                measured[i][path] = _select(row, group[i].tree.readings[path])


def _paths_by_length(group: Sequence[Question]) -> dict[int, list[tuple[int, Path]]]:
    """Return the paths of all questions by their number of tokens, the shortest first.

    Each path stands with the index of its question. The empty path is left out: it is the question
    itself.
    """
    paths: dict[int, list[tuple[int, Path]]] = {}
    for i, question in enumerate(group):
        for path in question.tree.readings:
            if path:
                paths.setdefault(len(path), []).append((i, path))
    return dict(sorted(paths.items()))


def _read(
    model: Model, cache: RowCache, tokens: Sequence[list[int]], lengths: list[int]
) -> torch.Tensor:
    """Append tokens to each row; return the logprobs after the last one: [B, V], in nats.

    Args:
        model: the frozen model.
        cache: the B rows; their new keys and values are appended.
        tokens: the new tokens of each row, equally many.
        lengths: the tokens of each row, with the new ones.

    Raises:
        EngineFailed: the model's logits are not finite.
    """
    logprobs = torch.log_softmax(model.read(tokens, cache, lengths).logits, dim=-1)
    if not logprobs.amax(dim=-1).isfinite().all():
        raise EngineFailed(
            "the model's logits are not finite; check its weights and its dtype.", status=500
        )
    return logprobs


def _select(logprobs: torch.Tensor, tokens: Sequence[int]) -> dict[int, float]:
    """Return the logprobs of some tokens: [V] -> {token: logprob}."""
    return dict(zip(tokens, logprobs[list(tokens)].tolist(), strict=True))


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the beginning that two prompts share, in tokens."""
    for i, (token, other_token) in enumerate(zip(one, other, strict=False)):
        if token != other_token:
            return i
    return min(len(one), len(other))
