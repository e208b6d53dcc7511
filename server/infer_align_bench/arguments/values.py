"""Parsers of the values of flags; a wrong value is an error of the command line."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a JSON object; must be like {{"name": 1}}'
        )
    return value


def non_negative(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole_number(text, 0)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole_number(text, 1)


def _whole_number(text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; must be a whole number of at least {minimum}"
        )
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a number above 0")
    return value


def non_negative_number(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a number of at least 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def number_range(text: str) -> tuple[int, int]:
    """Parse a range of positive whole numbers, such as "64" or "32-128"."""
    first, _, last = text.partition("-")
    low = positive(first)
    high = positive(last or first)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be like 64 or 32-128")
    return low, high
