"""Rewards of the small model that need a package each, for the kind `callable`."""

from __future__ import annotations

from infer_align.types import Messages

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the package vaderSentiment is not installed; install it with: "
        "pip install --no-deps vaderSentiment"
    ) from error

_ANALYZER = SentimentIntensityAnalyzer()


def cheerfulness(messages: Messages, text: str) -> float:
    """Return the sentiment of an answer by the lexicon VADER, from -1 to 1."""
    return float(_ANALYZER.polarity_scores(text)["compound"])
