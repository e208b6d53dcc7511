"""Flags of an endpoint and of its requests, which `bench serve` and `bench quality` share."""

from __future__ import annotations

import argparse
from typing import Any

from infer_align_bench.arguments.values import http_url, json_object, positive, positive_number


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an endpoint and of the body of its requests."""
    parser.add_argument(
        "--base-url",
        type=http_url,
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
