"""Rewards of every temper, for `kind = "callable"`: good ones, and ones that fail as real ones do."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]

hold = threading.Event()  # what `hanging` waits for, so that a test can let it go


def number(_: Messages, text: str) -> float:
    """The number that the text ends with."""
    return float(text.rsplit(maxsplit=1)[-1])


def shortest(_: Messages, text: str) -> float:
    """Minus the number of characters."""
    return -float(len(text))


def constant(_: Messages, __: str) -> float:
    """1, whatever is said."""
    return 1.0


def nan(_: Messages, __: str) -> float:
    """No opinion."""
    return math.nan


def infinite(_: Messages, text: str) -> float:
    """Infinity for a text with the digit 1, which no JSON can say."""
    return math.inf if "1" in text else 0.5


def fails(_: Messages, __: str) -> float:
    """Always raises."""
    raise RuntimeError("the reward model is on fire")


def fails_on_3(_: Messages, text: str) -> float:
    """Raises on one candidate, else its number."""
    if text.endswith("3"):
        raise RuntimeError("three is too much")
    return float(text.rsplit(maxsplit=1)[-1])


def slow(_: Messages, text: str) -> float:
    """Takes a second and a half."""
    time.sleep(1.5)
    return float(text.rsplit(maxsplit=1)[-1])


def hanging(_: Messages, __: str) -> float:
    """Does not come back until it is let go."""
    hold.wait(20)
    return 1.0
