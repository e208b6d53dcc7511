"""Parsers of the values of flags; a wrong value is an error of the command line."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any, NoReturn

from infer_align.errors import quote
from infer_align.urls import is_http_url, quote_url

# Digits of the longest number of an option.
LONGEST_NUMBER = 18
# Bounds of the spread of lengths.
SMALLEST_SPREAD = 1e-3
LARGEST_SPREAD = 100.0


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise argparse.ArgumentTypeError(f"{quote(text)} is nested too deeply") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{quote(text)} is not a JSON object; must be like {{"name": 1}}'
        )
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; write a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{quote(text)} is too large for a float")
    return number


def http_url(text: str) -> str:
    """Parse the URL of a server; "host:port" alone gets "http://"."""
    url = text if "://" in text else f"http://{text}"
    if not is_http_url(url):
        raise argparse.ArgumentTypeError(
            f"{quote_url(text)} is not an http(s) URL; must be like http://127.0.0.1:8000/v1"
        )
    return url


def non_negative(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole_number(text, 0)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole_number(text, 1)


def _whole_number(text: str, minimum: int) -> int:
    # Python reads no more than some thousand digits.
    is_number = text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER
    if not is_number or int(text) < minimum:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be a whole number of at least {minimum}, "
            f"with at most {LONGEST_NUMBER} digits"
        )
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not allowed; must be a number above 0")
    return value


def spread(text: str) -> float:
    """Parse a standard deviation of lengths, divided by their mean."""
    value = _number(text)
    # The square of a smaller or larger number is not in the range of a float.
    if not SMALLEST_SPREAD <= value <= LARGEST_SPREAD:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be a number from {SMALLEST_SPREAD:g} to "
            f"{LARGEST_SPREAD:g}"
        )
    return value


def non_negative_number(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be a number of at least 0"
        )
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def number_range(text: str) -> tuple[int, int]:
    """Parse a range of positive whole numbers, such as "64" or "32-128"."""
    first, dash, last = text.partition("-")
    low = positive(first)
    high = positive(last) if dash else low
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be like 64 or 32-128")
    return low, high
