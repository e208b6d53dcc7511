"""Every way a tokenizer can spell a label, and the label's exact probability from next-token probabilities.

A tokenizer that has a token for each label needs one reading. One that splits "85" into digits needs another after "8", and
"8" itself counts only as far as no further digit follows. All paths are summed: "100" may be "100", "10" + "0" or "1" + "0" + "0".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from infer_align.errors import Unsupported

Path = tuple[int, ...]  # of token ids, after the prompt


class LabelTree:
    """The paths through a vocabulary that spell labels.

    Args:
        vocabulary: token text -> id, as a tokenizer's `get_vocab()`; labels are ASCII, which all tokenizers write as itself.
        labels: what may be said.

    Raises:
        Unsupported: a label that the vocabulary cannot spell.
    """

    def __init__(self, vocabulary: Mapping[str, int], labels: Iterable[str]) -> None:
        self.labels = tuple(labels)
        starts = {label[:end] for label in self.labels for end in range(1, len(label) + 1)}
        parts = {start[begin:] for start in starts for begin in range(len(start))}
        self._pieces = {text: vocabulary[text] for text in parts if text in vocabulary}
        self._starts = starts
        if missing := [label for label in self.labels if not self._spellable(label)]:
            raise Unsupported(
                f"the label {missing[0]!r} cannot be spelt by the model's tokenizer; choose another scale."
            )

    def _spellable(self, rest: str) -> bool:
        return not rest or any(
            rest.startswith(piece) and self._spellable(rest[len(piece) :]) for piece in self._pieces
        )

    @cached_property
    def readings(self) -> dict[Path, tuple[int, ...]]:
        """After which path (the first is the prompt itself) the logprobs of which tokens are needed."""
        if all(label in self._pieces for label in self.labels):
            return {(): tuple(self._pieces[label] for label in self.labels)}
        return {path: tuple(nexts) for path, nexts in self._nexts.items() if nexts}

    @cached_property
    def _nexts(self) -> dict[Path, dict[int, str]]:
        """Path -> {next token: the text that stands then}."""
        found: dict[Path, dict[int, str]] = {}
        frontier: list[tuple[Path, str]] = [((), "")]
        while frontier:
            path, text = frontier.pop(0)
            found[path] = {
                token: text + piece
                for piece, token in self._pieces.items()
                if text + piece in self._starts
            }
            frontier += [((*path, token), longer) for token, longer in found[path].items()]
        return found

    def logprobs(self, read: Mapping[Path, Mapping[int, float]]) -> dict[str, float]:
        """Label -> nats.

        Args:
            read: what `readings` asked for: path -> {token: logprob}; a token that is missing counts as impossible.
        """
        if len(self.readings) == 1:
            first = read[()]
            return {label: first.get(self._pieces[label], -math.inf) for label in self.labels}
        total = dict.fromkeys(self.labels, 0.0)
        frontier: list[tuple[Path, str, float]] = [((), "", 1.0)]
        while frontier:
            path, text, probability = frontier.pop()
            following = read.get(path, {})
            steps = {
                token: math.exp(following.get(token, -math.inf)) for token in self._nexts[path]
            }
            if (
                text in total
            ):  # said in full only where nothing that continues it to another label follows
                total[text] += probability * max(0.0, 1.0 - sum(steps.values()))
            frontier += [
                ((*path, token), self._nexts[path][token], probability * p)
                for token, p in steps.items()
                if p > 0.0
            ]
        return {label: math.log(p) if p > 0.0 else -math.inf for label, p in total.items()}


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """What a transformers tokenizer reads as one token wherever it stands, and is neither a word nor white space."""
    added = (*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens)
    return frozenset(
        token for token in added if len(token) > 1 and not {*token}.isdisjoint("<>[]|｜")
    )
