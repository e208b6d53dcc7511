"""Flags that several commands of `infer-align bench` share, and parsers of their values."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an endpoint and of the body of its requests."""
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        help="URL of an OpenAI endpoint; default: %(default)s",
    )
    parser.add_argument("--model", help="model name; default: the first that the endpoint lists")
    parser.add_argument(
        "--body",
        type=json_object,
        default={},
        metavar="JSON",
        help="further fields of every request; the value null removes a field",
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="maximum number of tokens of an answer"
    )
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the API key; default: %(default)s",
    )


def add_timeout(group: argparse._ActionsContainer) -> None:
    """Add `--timeout`."""
    group.add_argument(
        "--timeout",
        type=positive_number,
        default=120.0,
        metavar="S",
        help="seconds until one request fails; default: %(default)g",
    )


def body_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the body fields of --max-tokens and --body; those of --body win."""
    fields = {"max_tokens": options.max_tokens} if options.max_tokens else {}
    return {**fields, **options.body}


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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a number above 0")
    return value


def number_range(text: str) -> tuple[int, int]:
    """Parse a range of positive whole numbers, such as "64" or "32-128"."""
    first, _, last = text.partition("-")
    low = positive(first)
    high = positive(last or first)
    if low > high:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be like 64 or 32-128")
    return low, high
