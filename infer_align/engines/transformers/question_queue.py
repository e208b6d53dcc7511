"""The questions that wait for the scheduler's thread, and the order in which they are read."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence

from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.reading import Measured, Question, read_group, take_group
from infer_align.engines.transformers.sequences import (
    SequenceQuestion,
    read_sequences,
    take_sequences,
)
from infer_align.errors import AlignError, EngineFailed

log = logging.getLogger("infer_align")

AnyQuestion = Question | SequenceQuestion


class QuestionQueue:
    """Questions that wait for the scheduler's thread."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._labels: deque[Question] = deque()
        self._sequences: deque[SequenceQuestion] = deque()
        # The sequences that are being read. A long reading is spread over several calls of `read`.
        self._group: list[SequenceQuestion] = []
        self._passes: Iterator[int] = iter(())
        # Both kinds take turns at being first.
        self._sequences_first = False

    def __len__(self) -> int:
        return len(self._labels) + len(self._sequences) + len(self._group)

    def add(self, question: AnyQuestion) -> None:
        """Append a question."""
        if isinstance(question, Question):
            self._labels.append(question)
        else:
            self._sequences.append(question)

    def read(self, tokens: int, cells: int) -> None:
        """Answer questions until `tokens` tokens have been read.

        Args:
            tokens: tokens to be read. No forward pass of sequences reads more.
            cells: rows x columns of the cache that a forward pass may take.
        """
        remaining = tokens
        readers = [self._read_labels, self._read_sequences]
        if self._sequences_first:
            readers.reverse()
        self._sequences_first = not self._sequences_first
        for reader in readers:
            remaining = reader(remaining, tokens, cells)

    def fail(self, error: AlignError) -> None:
        """Answer all questions with an error."""
        for question in self._labels:
            question.deliver(error)
        for sequence in (*self._sequences, *self._group):
            sequence.deliver(error)

    def _read_labels(self, remaining: int, tokens: int, cells: int) -> int:
        """Read groups of label questions; return the tokens that may still be read."""
        while remaining > 0 and self._labels:
            candidates = take_group(self._labels, remaining, cells)
            group = [question for question in candidates if not question.answer.done()]
            if group:
                remaining -= sum(len(question.ids) for question in group)
                for question, outcome in zip(
                    group, self._outcomes(group, tokens, cells), strict=True
                ):
                    question.deliver(outcome)
        return remaining

    def _outcomes(
        self, group: Sequence[Question], tokens: int, cells: int
    ) -> Sequence[Measured | Exception]:
        try:
            return read_group(self._model, group, tokens, cells)
        # The model's code may raise anything.
        except Exception as error:
            return [_failure(error)] * len(group)

    def _read_sequences(self, remaining: int, tokens: int, cells: int) -> int:
        """Go on with the sequences; return the tokens that may still be read."""
        while remaining > 0 and (self._group or self._sequences):
            if not self._group:
                self._group = take_sequences(self._sequences, tokens, cells)
                self._passes = read_sequences(self._model, self._group, tokens, cells)
            remaining -= self._read_pass()
        return remaining

    def _read_pass(self) -> int:
        """Run one forward pass of the current group; return the number of its tokens."""
        try:
            return next(self._passes)
        except StopIteration:
            self._end_group()
        # The model's code may raise anything.
        except Exception as error:
            for question in self._group:
                question.deliver(_failure(error))
            self._end_group()
        return 0

    def _end_group(self) -> None:
        # This frees the keys and values of the prompts.
        self._passes = iter(())
        self._group = []


def _failure(error: Exception) -> AlignError:
    if isinstance(error, AlignError):
        return error
    log.error("a reading failed", exc_info=error)
    return EngineFailed(f"the engine failed: {error}", status=500)
