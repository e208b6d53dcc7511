"""Probabilities of labels from next-token probabilities, for every way a tokenizer can spell them.

If each label is one token, the distribution after the prompt suffices. A tokenizer that splits "85"
into digits needs another distribution after "8", and "8" itself counts only if no further digit
follows. All spellings are summed: "100" may be "100", "10" + "0" or "1" + "0" + "0".

Space around a label does not count: " A", "A " and "A" are one label, and their probabilities are
summed. Upper and lower case differ.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infer_align.errors import Unsupported
from infer_align.types import Messages

# Token ids that follow the prompt.
Path = tuple[int, ...]

# White space as vocabularies write it: SentencePiece marks a space with one character, and
# byte-level vocabularies write each byte as a character. Labels are ASCII, so none contains these.
_WRITTEN_SPACES = ("▁", "Ġ", "Ċ", "ĉ", "č", "Âł")
# Spaces that tokens of a vocabulary may begin or end with.
_SPACES = (" ", "\n", "\t", "\r", "\xa0", *_WRITTEN_SPACES)
_SPACE = rf"(?:\s|{'|'.join(_WRITTEN_SPACES)})+"
_LEADING_SPACE = re.compile(rf"\A{_SPACE}")
_TRAILING_SPACE = re.compile(rf"{_SPACE}\Z")


@dataclass(frozen=True, slots=True)
class LabelQuery:
    """A question of a judge to an engine: the probability of each label as the next words."""

    messages: Messages
    prefix: str  # the beginning of the assistant's turn, such as "Score: ["; labels continue it
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """The model's own distribution over labels, at temperature 1 and before any penalty."""

    # label -> nats; -inf if the label cannot be produced, or the engine does not show it
    logprobs: Mapping[str, float]
    prompt_tokens: int = 0
    calls: int = 1  # one-token calls; 1 if every label is one token


def bare_label(text: str) -> str:
    """Return a label without the white space around it, in any spelling of vocabularies."""
    return without_trailing_space(_LEADING_SPACE.sub("", text))


def without_trailing_space(text: str) -> str:
    """Return a text without the white space at its end, in any spelling of vocabularies."""
    return _TRAILING_SPACE.sub("", text)


def merge_labels(logprobs: Mapping[str, float]) -> dict[str, float]:
    """Return the logprob of each label in nats, labels that differ by space around them summed."""
    spellings: dict[str, list[float]] = {}
    for label, logprob in logprobs.items():
        spellings.setdefault(bare_label(label), []).append(logprob)
    merged = {}
    for label, parts in spellings.items():
        merged[label] = _log_sum(parts)
    return merged


def _log_sum(logprobs: Sequence[float]) -> float:
    """Return the logarithm of a sum of probabilities; one logprob stays as it is."""
    if len(logprobs) == 1:
        return logprobs[0]
    total = math.fsum(math.exp(logprob) for logprob in logprobs)
    return _log(total)


def _log(probability: float) -> float:
    """Return the logarithm of a probability; -inf for 0."""
    return math.log(probability) if probability > 0.0 else -math.inf


@dataclass(frozen=True, slots=True)
class _Step:
    """A token that follows a path of a `LabelTree`."""

    text: str  # what the path spells with it
    is_last: bool  # True if space follows, so that no token continues the label


class LabelTree:
    """The paths through a vocabulary that spell labels.

    Args:
        vocabulary: token text -> id, as a tokenizer's `get_vocab()` returns it. Labels are ASCII,
            which every tokenizer writes as itself.
        labels: the labels.

    Raises:
        Unsupported: the vocabulary cannot spell a label.
    """

    def __init__(self, vocabulary: Mapping[str, int], labels: Iterable[str]) -> None:
        self.labels = tuple(labels)
        self._prefixes: set[str] = set()
        # The tokens of which labels can consist: text -> id.
        self._tokens: dict[str, int] = {}
        # The same with space before them: (text without the space, id).
        self._after_space: list[tuple[str, int]] = []
        # Tokens that end a label, with space after them: (text without the space, id).
        self._before_space: list[tuple[str, int]] = []
        for label in self.labels:
            self._add(label, vocabulary)
        self._add_spaced(vocabulary)
        for label in self.labels:
            if not self._can_spell(label):
                raise Unsupported(
                    f"the label {label!r} cannot be spelt by the model's tokenizer; "
                    "choose another scale."
                )

    def _add(self, label: str, vocabulary: Mapping[str, int]) -> None:
        for end in range(1, len(label) + 1):
            self._prefixes.add(label[:end])
            for start in range(end):
                part = label[start:end]
                if part in vocabulary:
                    self._tokens[part] = vocabulary[part]

    def _add_spaced(self, vocabulary: Mapping[str, int]) -> None:
        endings: set[str] = set()
        for label in self.labels:
            for start in range(len(label)):
                endings.add(label[start:])
        for space in _SPACES:
            for text in sorted(self._prefixes):
                if space + text in vocabulary:
                    self._after_space.append((text, vocabulary[space + text]))
            for text in sorted(endings):
                if text + space in vocabulary:
                    self._before_space.append((text, vocabulary[text + space]))

    def _can_spell(self, text: str) -> bool:
        if not text:
            return True
        for token in self._tokens:
            if text.startswith(token) and self._can_spell(text[len(token) :]):
                return True
        return False

    @cached_property
    def readings(self) -> dict[Path, tuple[int, ...]]:
        """Map each path to the tokens whose logprobs are needed after it; () is the prompt."""
        if self._tokens.keys() >= set(self.labels):
            tokens: list[int] = []
            for spellings in self._single_tokens.values():
                tokens += spellings
            return {(): tuple(tokens)}
        readings = {}
        for path, steps in self._steps.items():
            if steps:
                readings[path] = tuple(steps)
        return readings

    @cached_property
    def _single_tokens(self) -> dict[str, list[int]]:
        """Map each label to the tokens that spell it alone, the one without space first."""
        tokens = {label: [self._tokens[label]] for label in self.labels}
        for text, token in (*self._after_space, *self._before_space):
            if text in tokens:
                tokens[text].append(token)
        return tokens

    @cached_property
    def _steps(self) -> dict[Path, dict[int, _Step]]:
        """Map each path to its possible next tokens."""
        steps: dict[Path, dict[int, _Step]] = {}
        frontier: deque[tuple[Path, str]] = deque([((), "")])
        while frontier:
            path, text = frontier.popleft()
            steps[path] = self._next_steps(text)
            for token, step in steps[path].items():
                if not step.is_last:
                    frontier.append(((*path, token), step.text))
        return steps

    def _next_steps(self, text: str) -> dict[int, _Step]:
        """Return the tokens that may follow `text`, the beginning of a label."""
        steps: dict[int, _Step] = {}
        pieces = [*self._tokens.items()]
        if not text:
            pieces += self._after_space
        for piece, token in pieces:
            if text + piece in self._prefixes:
                steps[token] = _Step(text + piece, is_last=False)
        for piece, token in self._before_space:
            if text + piece in self.labels:
                steps[token] = _Step(text + piece, is_last=True)
        return steps

    def logprobs(self, measured: Mapping[Path, Mapping[int, float]]) -> dict[str, float]:
        """Return the logprob of each label in nats; -inf for a label of probability 0.

        Args:
            measured: for each path of `readings`, token -> logprob. A missing token counts as
                impossible.
        """
        if len(self.readings) == 1:
            return self._single_logprobs(measured[()])
        total = dict.fromkeys(self.labels, 0.0)
        stack: list[tuple[Path, str, float]] = [((), "", 1.0)]
        while stack:
            path, text, probability = stack.pop()
            logprobs = measured.get(path, {})
            continued = 0.0
            for token, step in self._steps[path].items():
                chance = math.exp(logprobs.get(token, -math.inf))
                continued += chance
                if step.is_last:
                    total[step.text] += probability * chance
                elif chance > 0.0:
                    stack.append(((*path, token), step.text, probability * chance))
            # The label is complete only if no token follows that continues it to another label.
            if text in total:
                total[text] += probability * max(0.0, 1.0 - continued)
        return {label: _log(probability) for label, probability in total.items()}

    def _single_logprobs(self, first: Mapping[int, float]) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        for label, tokens in self._single_tokens.items():
            logprobs[label] = _log_sum([first.get(token, -math.inf) for token in tokens])
        return logprobs


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the added tokens of a transformers tokenizer that are neither words nor white space.

    The tokenizer reads each of them as one token wherever it stands.
    """
    brackets = set("<>[]|｜")
    control = set()
    for token in (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens):
        if len(token) > 1 and brackets & set(token):
            control.add(token)
    return frozenset(control)
