"""Probabilities of labels from next-token probabilities, for every way a tokenizer can spell them.

If each label is one token, the distribution after the prompt suffices. A tokenizer that splits "85"
into digits needs another distribution after "8", and "8" itself counts only if no further digit
follows. All spellings are summed: "100" may be "100", "10" + "0" or "1" + "0" + "0".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infer_align.errors import Unsupported
from infer_align.types import Messages

# Token ids that follow the prompt.
Path = tuple[int, ...]


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
        for label in self.labels:
            self._add(label, vocabulary)
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

    def _can_spell(self, text: str) -> bool:
        if not text:
            return True
        tokens = [token for token in self._tokens if text.startswith(token)]
        return any(self._can_spell(text[len(token) :]) for token in tokens)

    @cached_property
    def readings(self) -> dict[Path, tuple[int, ...]]:
        """Map each path to the tokens whose logprobs are needed after it; () is the prompt."""
        if all(label in self._tokens for label in self.labels):
            return {(): tuple(self._tokens[label] for label in self.labels)}
        return {path: tuple(steps) for path, steps in self._steps.items() if steps}

    @cached_property
    def _steps(self) -> dict[Path, dict[int, str]]:
        """Map each path to its possible next tokens and the text that each of them completes."""
        steps: dict[Path, dict[int, str]] = {}
        frontier: deque[tuple[Path, str]] = deque([((), "")])
        while frontier:
            path, text = frontier.popleft()
            steps[path] = {}
            for piece, token in self._tokens.items():
                if text + piece in self._prefixes:
                    steps[path][token] = text + piece
                    frontier.append(((*path, token), text + piece))
        return steps

    def logprobs(self, measured: Mapping[Path, Mapping[int, float]]) -> dict[str, float]:
        """Return the logprob of each label in nats; -inf for a label of probability 0.

        Args:
            measured: for each path of `readings`, token -> logprob. A missing token counts as
                impossible.
        """
        if len(self.readings) == 1:
            first = measured[()]
            return {label: first.get(self._tokens[label], -math.inf) for label in self.labels}
        total = dict.fromkeys(self.labels, 0.0)
        stack: list[tuple[Path, str, float]] = [((), "", 1.0)]
        while stack:
            path, text, probability = stack.pop()
            logprobs = measured.get(path, {})
            continued = 0.0
            for token, longer in self._steps[path].items():
                step = math.exp(logprobs.get(token, -math.inf))
                continued += step
                if step > 0.0:
                    stack.append(((*path, token), longer, probability * step))
            # The label is complete only if no token follows that continues it to another label.
            if text in total:
                total[text] += probability * max(0.0, 1.0 - continued)
        return {label: math.log(p) if p > 0.0 else -math.inf for label, p in total.items()}


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the added tokens of a transformers tokenizer that are neither words nor white space.

    The tokenizer reads each of them as one token wherever it stands.
    """
    added = (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)
    brackets = set("<>[]|｜")
    return frozenset(token for token in added if len(token) > 1 and brackets & set(token))
