"""Scoring functions for rewards of `kind = "callable"`: sound ones, failing ones, hanging ones."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, Any]]

# `hanging` waits for this event.
hold = threading.Event()
# The first call of `interrupted` takes it.
interrupt = threading.Lock()


def number(_: Messages, text: str) -> float:
    """The number that the text ends with."""
    return float(text.rsplit(maxsplit=1)[-1])


def shortest(_: Messages, text: str) -> float:
    """The negative number of characters."""
    return -float(len(text))


def constant(_: Messages, __: str) -> float:
    """1 for every text."""
    return 1.0


def nan(_: Messages, __: str) -> float:
    """NaN for every text."""
    return math.nan


def infinite(_: Messages, text: str) -> float:
    """Infinity for a text with the digit 1, which JSON cannot represent."""
    return math.inf if "1" in text else 0.5


def fails(_: Messages, __: str) -> float:
    """Raise an error."""
    raise RuntimeError("the reward model is on fire")


def fails_on_3(_: Messages, text: str) -> float:
    """Raise an error for one candidate; otherwise return its number."""
    if text.endswith("3"):
        raise RuntimeError("three is too much")
    return float(text.rsplit(maxsplit=1)[-1])


def system_characters(messages: Messages, _: str) -> float:
    """A hundredth of the number of characters of the system's turn."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    return len("".join(system)) / 100


def hanging(_: Messages, text: str) -> float:
    """Return the number that the text ends with, after the test has set `hold`."""
    hold.wait()
    return number(_, text)


def fails_late(_: Messages, __: str) -> float:
    """Raise an error after the test has set `hold`."""
    hold.wait()
    raise RuntimeError("out of memory")


def held_by_a_file(_: Messages, __: str) -> float:
    """Return 1 as soon as the file TEST_HOLD_FILE exists, for a server in another process."""
    path = Path(os.environ["TEST_HOLD_FILE"])
    while not path.exists():
        time.sleep(0.01)
    return 1.0


def interrupted(_: Messages, __: str) -> float:
    """Send the process the signal of Ctrl-C, once."""
    if interrupt.acquire(blocking=False):
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0


def praised(_: Messages, text: str) -> float:
    """The number that the text ends with, or 99 for a text with the word "wonderful"."""
    return 99.0 if "wonderful" in text else float(re.findall(r"\d+$|$", text)[0] or -1)
