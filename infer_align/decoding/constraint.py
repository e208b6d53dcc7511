"""Structured outputs: grammars that decide which token may come next.

    response_format, structured_outputs -> Grammar (`read_grammar`)
    Grammar -> Constraint (`ConstraintCompiler`), compiled once and cached
    Constraint -> one Matcher per candidate -> `constrain`: forbidden tokens get the logit -inf

The library llguidance compiles grammars and computes the allowed tokens. Candidates without a
matcher cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from infer_align.decoding import trial
from infer_align.decoding.text import token_bytes
from infer_align.errors import InvalidRequest

# Compiled grammars that are kept. Each may take a few megabytes.
CACHED_GRAMMARS = 64
MAX_REASON = 240
WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of an answer.

    Attributes:
        text: the grammar in llguidance's own format.
        param: the field of the request that it comes from.
    """

    text: str
    param: str


class Constraint:
    """A compiled grammar, shared by all candidates of all requests that name it."""

    def __init__(self, compiled: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._compiled = compiled
        self._tokenizer = tokenizer

    def matcher(self) -> Matcher:
        """Return a matcher at the beginning of the answer."""
        return Matcher(self._compiled.deep_copy())

    def matcher_after(self, text: str) -> Matcher | None:
        """Return a matcher behind this text; None if the grammar does not begin with it."""
        matcher = self._compiled.deep_copy()
        tokens = self._tokenizer.tokenize_str(text)
        if tokens and not matcher.consume_tokens(tokens):
            return None
        return Matcher(matcher)


class Matcher:
    """Follows one candidate through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        # True if the vocabulary has no token that the grammar allows next.
        self._is_stuck = False

    @property
    def error(self) -> str | None:
        """Return the reason why the grammar cannot be followed any further, or None."""
        if self._matcher.is_error():
            return _reason(self._matcher.get_error())
        return "no token of the model's vocabulary continues it" if self._is_stuck else None

    @property
    def finished(self) -> bool:
        """Return True if the answer is complete and nothing can follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def consume(self, token: int) -> None:
        """Take the token that was sampled."""
        self._matcher.consume_token(token)

    def fill(self, words: NDArray[np.int32]) -> None:
        """Write one bit per token: 1 if it may come next. [ceil((V + 1) / 32)].

        The bit after the last token stands for the end of a model without such a token. All bits
        are 0 if there is an error.
        """
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            words.fill(0)
        self._is_stuck = not words.any()


class NotCompiled(Exception):
    """A grammar has not been compiled yet."""


class Compiler(Protocol):
    """Returns compiled grammars."""

    def compile(self, grammar: Grammar) -> Constraint:
        """Return the compiled grammar.

        Raises:
            InvalidRequest: the grammar is wrong or too large.
        """
        ...


class ConstraintCompiler(Compiler):
    """Compiles grammars for one tokenizer. It may be used from any thread.

    Args:
        tokenizer: the model's fast tokenizer.
        vocabulary: number of token ids.
        eos: the end-of-sequence tokens. A grammar allows them where the answer may end.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer = _TokenTable(tokenizer, vocabulary, eos).build()
        # The latest grammars by their text, each compiled, or with what is wrong with it.
        self._results: OrderedDict[str, Constraint | str] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """Return the compiled grammar.

        Raises:
            InvalidRequest: the grammar is wrong or too large; the message has llguidance's reason.
        """
        result = self._recall(grammar.text)
        if result is None:
            result = self._compile(grammar.text)
            self._keep(grammar.text, result)
        return _usable(grammar, result)

    def recall(self, grammar: Grammar) -> Constraint:
        """Return the grammar if it has been compiled already.

        Raises:
            NotCompiled: it has not.
            InvalidRequest: see `compile`.
        """
        result = self._recall(grammar.text)
        if result is None:
            raise NotCompiled
        return _usable(grammar, result)

    def _recall(self, text: str) -> Constraint | str | None:
        with self._lock:
            if text in self._results:
                self._results.move_to_end(text)
            return self._results.get(text)

    def _keep(self, text: str, result: Constraint | str) -> None:
        with self._lock:
            self._results[text] = result
            if len(self._results) > CACHED_GRAMMARS:
                self._results.popitem(last=False)

    def _compile(self, text: str) -> Constraint | str:
        """Return the compiled grammar, or what is wrong with it."""
        # llguidance bounds some of the work only: other grammars would end this process.
        error = trial.failure(lambda: self._fault(text))
        if error is not None:
            return error
        return Constraint(LLMatcher(self._tokenizer, text, log_level=0), self._tokenizer)

    def _fault(self, text: str) -> str | None:
        """Return what is wrong with a grammar, or None."""
        matcher = LLMatcher(self._tokenizer, text, log_level=0)
        return _reason(matcher.get_error()) if matcher.is_error() else None


class CompiledGrammars(Compiler):
    """Returns the grammars that a compiler has compiled already, and compiles none."""

    def __init__(self, compiler: ConstraintCompiler) -> None:
        self._compiler = compiler

    def compile(self, grammar: Grammar) -> Constraint:
        """Return the grammar; see `ConstraintCompiler.recall`."""
        return self._compiler.recall(grammar)


def _usable(grammar: Grammar, result: Constraint | str) -> Constraint:
    """Return the result of a grammar, or raise what is wrong with it."""
    if isinstance(result, str):
        raise InvalidRequest(
            f"{grammar.param}: cannot be followed: {result}; change it, or leave it out.",
            param=grammar.param,
        )
    return result


class _TokenTable:
    """The vocabulary as llguidance reads it.

    The bytes are those of `token_bytes`, so that every tokenizer of the engine can be constrained.
    Where a grammar leaves no choice, llguidance allows the token that this table spells it with.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        added = tokenizer.added_tokens_decoder
        special = {token for token, entry in added.items() if entry.special and token < vocabulary}
        # A model without an end of sequence gets one past its vocabulary. It is never sampled.
        self.tokens = [token_bytes(tokenizer, token) for token in range(vocabulary)] + [b""]
        self._eos = sorted(eos) or [vocabulary]
        self.eos_token_id = self._eos[0]
        self.bos_token_id = None
        self.special_token_ids = sorted(special | set(self._eos))
        self._tokenizer = tokenizer
        ordinary = {token: data for token, data in enumerate(self.tokens) if token not in special}
        # Of equal tokens the last one counts: the bytes of a vocabulary stand before its words.
        self._ids = {data: token for token, data in ordinary.items() if data}
        self._longest = max((len(data) for data in self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Spell a text with the tokenizer, or by its longest tokens where that adds a space."""
        ids: list[int] = self._tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
        is_exact = max(ids, default=0) < len(self.tokens)
        if is_exact and b"".join(self.tokens[token] for token in ids) == text:
            return ids
        return self._longest_tokens(text)

    def _longest_tokens(self, text: bytes) -> list[int]:
        """Spell a text from the left by the longest tokens, as far as the vocabulary can."""
        ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[start:end]])
            start = end
        return ids

    def build(self) -> LLTokenizer:
        """Return llguidance's tokenizer."""
        return LLTokenizer(TokenizerWrapper(self), eos_token=self._eos)


class ConstrainedRow(Protocol):
    """A candidate whose next token may be constrained.

    Attributes:
        matcher: follows the candidate; None if nothing constrains it.
    """

    matcher: Matcher | None


def constrain(logits: torch.Tensor, rows: Sequence[ConstrainedRow]) -> torch.Tensor:
    """Set the logits of forbidden tokens to -inf. [B, V] -> [B, V].

    The argument stays unchanged. Rows without a matcher stay bit for bit the same. All logits of a
    row are -inf if its grammar cannot be followed any further.
    """
    matchers: dict[int, Matcher] = {}
    for i, row in enumerate(rows):
        if row.matcher is not None:
            matchers[i] = row.matcher
    if not matchers:
        return logits
    vocabulary = logits.shape[-1]
    words = np.zeros((len(matchers), -(-(vocabulary + 1) // WORD_BITS)), np.int32)
    for row_words, matcher in zip(words, matchers.values(), strict=True):
        matcher.fill(row_words)
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    forbidden = torch.from_numpy(bits[:, :vocabulary] == 0).to(logits.device)
    indices = torch.tensor(list(matchers), device=logits.device)
    masked = logits[indices].masked_fill_(forbidden, -torch.inf)
    return logits.index_copy(0, indices, masked)


def _reason(error: str) -> str:
    """Return llguidance's message on one line."""
    line = " ".join(error.partition("<backtrace>")[0].split()).rstrip(".")
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 3] + "..."
