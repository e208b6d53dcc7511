"""Score an answer by how much the other candidates agree with it. No model judges.

    by = "text"        share of all candidates whose extracted text is the same
    by = "words"       mean cosine of the word counts with the other candidates
    by = "embeddings"  mean cosine of the sentence embeddings with the other candidates

Agreement finds the answer that the model gives most often. That is the right one where a model is
right more often than it is wrong in one same way, such as in arithmetic. It is a popular error
where the model believes one.

A single candidate scores 1, with a note: it agrees with itself.

Source: "Self-Consistency Improves Chain of Thought Reasoning in Language Models" (2203.11171), for
the vote over extracted texts. The similarities are a form of minimum Bayes risk decoding.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from annotated_types import Len

from infer_align.errors import ConfigError, InvalidRequest
from infer_align.rewards import DESCRIPTION, TIMEOUT, Reward, RewardScores
from infer_align.types import Array, Candidate, Messages, ScoringUsage
from infer_align.words import words_of

if TYPE_CHECKING:
    from infer_align.rewards._sentences import SentenceEncoder

By: TypeAlias = Literal["text", "words", "embeddings"]
# Returns the part of a text that is compared, or None if there is none.
Extractor: TypeAlias = Callable[[str], str | None]
Pattern = Annotated[str, Len(min_length=1, max_length=500)]

# A fraction such as 1/2 or 2 1/2, or a number with or without commas between its thousands and an
# exponent. No sign after a word: "10-12" ends in 12. No fraction in a date: "1/2/2026" ends in
# 2026.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-−])?"
    r"(?:(?<![\w/.,])(?:\d+ )?\d+/0*[1-9]\d*(?!\.?\d|/)"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?)"
)
# A fraction in TeX, with the space before it, which is read as 1/2.
_TEX_FRACTION = re.compile(r"\s?\\[dt]?frac(?:\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}|(\d)(\d))")
# A fraction in one character, with the space before it.
_ONE_CHARACTER = re.compile(r"\s?([¼-¾⅐-⅞])")
# The line of a fraction that is no slash.
_FRACTION_SLASH = "⁄"
# A pattern may take this many seconds for one text. Some patterns would take years.
MATCH_SECONDS = 0.25
_DIGITS = 12
ALONE = "the only candidate: it agrees with itself"
NO_MATCH = "extract matches nothing in this text, so it agrees with none"
EMPTY = "an empty answer agrees with none"


@dataclass(frozen=True, slots=True)
class AgreementParameters:
    """The parameters that a request may set."""

    extract: Pattern | None = field(
        default=None,
        metadata={
            "description": 'Regular expression of what by = "text" compares: its last match, or '
            "the first group of it. Default: the last number or fraction, or else the whole text "
            "without case and punctuation."
        },
    )


@dataclass(frozen=True, slots=True)
class Agreement(AgreementParameters):
    """The agreement of the other candidates with an answer."""

    by: By = field(
        default="text",
        metadata={
            "description": '"text" counts equal results, "words" compares word counts, '
            '"embeddings" compares sentence embeddings by `model`.'
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "description": "Path or Hugging Face id of a sentence encoder, such as "
            "all-MiniLM-L6-v2, or package:<name>/<file> with a zip file. Needed for by = "
            '"embeddings".'
        },
    )
    device: str = field(
        default="auto",
        metadata={"description": 'torch device. "auto" is a GPU if there is one, else the CPU.'},
    )
    description: str = field(default="", metadata=DESCRIPTION)
    timeout_seconds: float = field(default=30.0, metadata=TIMEOUT)

    def load(self) -> AgreementReward:
        """Return the reward. Its encoder is loaded by `start`.

        Raises:
            ConfigError: `model` or `extract` does not fit `by`, or `extract` is not a pattern.
        """
        if (self.by == "embeddings") != (self.model is not None):
            raise ConfigError(
                'agreement: model is the sentence encoder of by = "embeddings"; set both or '
                "neither."
            )
        try:
            return AgreementReward(self)
        except ValueError as error:
            raise ConfigError(f"agreement.{error}") from None


plugin = Agreement


class AgreementReward(Reward):
    """The agreement of each candidate with the others, from 0 to 1 (embeddings: from -1)."""

    parameters: ClassVar[type | None] = AgreementParameters
    relative = True

    def __init__(self, config: Agreement, encoder: SentenceEncoder | None = None) -> None:
        """Compare as configured.

        Raises:
            ValueError: `extract` is not a regular expression, or `by` does not use one.
        """
        self.config = config
        self.timeout_seconds = config.timeout_seconds
        self.description = config.description or f"agreement of the candidates by {config.by}"
        self.cost = "reads nothing"
        if config.by == "embeddings":
            self.cost = "reads each answer once with the sentence encoder"
        self._encoder = encoder
        self._extract = _make_extractor(config)

    async def start(self) -> None:
        """Load the sentence encoder, if there is one.

        Raises:
            ConfigError: it cannot be loaded.
        """
        if self.config.model is None:
            return
        # torch is not needed for the other ways to compare.
        from infer_align.rewards._sentences import (  # noqa: PLC0415
            EncoderSettings,
            SentenceEncoder,
        )

        settings = EncoderSettings(self.config.model)
        self._encoder = await asyncio.to_thread(
            SentenceEncoder, settings, self.config.device, "agreement"
        )

    async def close(self) -> None:
        """Free the encoder."""
        self._encoder = None

    def with_parameters(self, parameters: Mapping[str, Any]) -> AgreementReward:
        """Return the same reward with another pattern.

        Raises:
            InvalidRequest: it is not a regular expression, or `by` does not use one.
        """
        try:
            return AgreementReward(replace(self.config, **parameters), self._encoder)
        except ValueError as error:
            raise InvalidRequest(str(error), param="extract") from None

    async def score(self, messages: Messages, candidates: Sequence[Candidate]) -> RewardScores:
        """Return [1, 1, N] scores. A single candidate scores 1.

        Raises:
            InvalidRequest: `extract` takes too long on an answer.
        """
        texts = [candidate.text for candidate in candidates]
        if len(texts) == 1:
            return RewardScores(np.ones((1, 1, 1)), notes=(ALONE,))
        return await asyncio.to_thread(self._compare, texts)

    def _compare(self, texts: Sequence[str]) -> RewardScores:
        if self.config.by == "text":
            return _votes(texts, self._extract)
        if self.config.by == "words":
            return RewardScores(mean_cosines(word_vectors(texts))[None, None])
        if self._encoder is None:
            raise ConfigError("agreement: the sentence encoder is not loaded.")
        notes: list[str | None] = []
        for text in texts:
            limit = self._encoder.max_length
            truncated = self._encoder.is_truncated(text)
            notes.append(f"truncated: read the first {limit} tokens" if truncated else None)
        vectors = self._encoder.embed(texts)
        for row, text in enumerate(texts):
            if not text.strip():
                vectors[row] = 0.0
                notes[row] = EMPTY
        return RewardScores(mean_cosines(vectors)[None, None], ScoringUsage(), tuple(notes))


def mean_cosines(vectors: Array) -> Array:
    """Return the mean product of each unit vector with the others: [N, D] -> [N].

    A single vector has 1.
    """
    rivals = len(vectors) - 1
    if rivals < 1:
        return np.ones(len(vectors))
    products = vectors @ vectors.T
    np.fill_diagonal(products, 0.0)
    # Equal texts shall have equal scores, whatever the order of the sums.
    means: Array = (products.sum(axis=1) / rivals).round(_DIGITS)
    return means


def word_vectors(texts: Sequence[str]) -> Array:
    """Return the word counts of each text as a unit vector, in any case: [N, words].

    A text without words has a vector of zeros.
    """
    counts = [Counter(words_of(text)) for text in texts]
    columns: dict[str, int] = {}
    for count in counts:
        for word in count:
            columns.setdefault(word, len(columns))
    vectors = np.zeros((len(texts), max(1, len(columns))))
    for row, count in enumerate(counts):
        for word, times in count.items():
            vectors[row, columns[word]] = times
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1.0))


def last_number(text: str) -> str | None:
    """Return the last number of a text in one spelling, so that "1,200.0" and "1200" are equal.

    A number that is no integer is a fraction: "0.5", "½" and "1/2" are all "1/2".
    """
    numbers = _NUMBER.findall(_in_ascii(text))
    if not numbers:
        return None
    digits: str = numbers[-1].replace(",", "").replace("−", "-")
    try:
        return str(_value(digits))
    except ValueError:
        # Python converts no integer of thousands of digits.
        return digits


def _value(digits: str) -> Fraction:
    """Return the value of a number; "2 1/2" is 5/2, and "2 3/2" ends in 3/2."""
    integer, _, part = digits.rpartition(" ")
    fraction = Fraction(part)
    if not integer or fraction >= 1:
        return fraction
    value = abs(Fraction(integer)) + fraction
    return -value if integer.startswith("-") else value


def normalized(text: str) -> str:
    """Return the words and symbols of a text in lower case, without punctuation."""
    return " ".join(words_of(text))


def _as_fraction(match: re.Match[str]) -> str:
    numerator, denominator = (part for part in match.groups() if part is not None)
    return f" {numerator}/{denominator} "


def _in_ascii(text: str) -> str:
    """Return a text with digits of ASCII, and with fractions as 1/2."""
    if not text.isascii():
        text = _ONE_CHARACTER.sub(_in_digits, text).replace(_FRACTION_SLASH, "/")
        text = "".join(map(_ascii_digit, text))
    return _TEX_FRACTION.sub(_as_fraction, text)


def _in_digits(match: re.Match[str]) -> str:
    return f" {unicodedata.normalize('NFKC', match[1])}"


def _ascii_digit(character: str) -> str:
    """Return a digit of any script as one of ASCII, and every other character as it is."""
    return str(unicodedata.decimal(character, character))


def _votes(texts: Sequence[str], extract: Extractor) -> RewardScores:
    """Return the share of candidates with the same result; 0 for a candidate without one."""
    results = [extract(text) for text in texts]
    counts = Counter(result for result in results if result is not None)
    shares: list[float] = []
    notes: list[str | None] = []
    for text, result in zip(texts, results, strict=True):
        missing = NO_MATCH if text.strip() else EMPTY
        shares.append(0.0 if result is None else counts[result] / len(results))
        notes.append(missing if result is None else None)
    values = np.array([[shares]], dtype=np.float64)
    return RewardScores(values, notes=tuple(notes))


def _make_extractor(config: Agreement) -> Extractor:
    """Return the function that finds what is compared in a text.

    Raises:
        ValueError: `extract` is not a regular expression, or `by` does not use one.
    """
    if config.extract is None:
        return _number_or_text
    if config.by != "text":
        raise ValueError(f'extract: is for by = "text", but this reward compares by {config.by}.')
    return _by_pattern(config.extract)


def _number_or_text(text: str) -> str | None:
    number = last_number(text)
    if number is not None:
        return number
    # An answer of punctuation alone, such as "?", is that punctuation. An empty one has no result.
    return normalized(text) or text.strip() or None


def _by_pattern(pattern: str) -> Extractor:
    """Return the function that finds the last match of a pattern.

    The package `regex` matches as `re` does, and can stop: a client's pattern may be one that takes
    exponential time.
    """
    # Only a configured pattern needs the package.
    try:
        import regex  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ValueError("extract: needs the package regex; install infer-align[local].") from None
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"extract: {pattern!r} is not a regular expression: {error}.") from None

    def extract(text: str) -> str | None:
        result = None
        try:
            for match in compiled.finditer(text, timeout=MATCH_SECONDS, concurrent=True):
                result = match.group(1) if compiled.groups else match.group()
        except TimeoutError:
            raise InvalidRequest(
                f"extract: {pattern!r} takes longer than {MATCH_SECONDS:g} s on an answer; write a "
                "pattern without repetitions inside repetitions."
            ) from None
        return None if result is None else normalized_number(result)

    return extract


def normalized_number(text: str) -> str:
    """Return a text without spaces around it; a text that is a number in one spelling."""
    stripped = text.strip()
    is_number = _NUMBER.fullmatch(_in_ascii(stripped).strip())
    return last_number(stripped) or stripped if is_number else stripped
