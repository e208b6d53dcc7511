"""Flags of `infer-align bench judge`."""

from __future__ import annotations

import argparse
from pathlib import Path

from infer_align_bench.arguments.endpoint import add_timeout
from infer_align_bench.arguments.values import http_url, json_object, positive


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench judge`."""
    parser.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help="JSONL file of pairs with the better answer as `chosen`, of rated answers, or the "
        "export of a profile",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N pairs")
    parser.add_argument(
        "--base-url",
        type=http_url,
        default="http://127.0.0.1:8000/v1",
        metavar="URL",
        help="server with the judge; default: %(default)s",
    )
    parser.add_argument("--model", metavar="NAME", help="model, or preset, of the requests")
    parser.add_argument(
        "--body",
        type=json_object,
        default={},
        metavar="JSON",
        help='further fields of every request, such as {"principles": [{"text": "brief"}]}',
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=4,
        metavar="N",
        help="number of requests in flight; default: %(default)s",
    )
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the API key; default: %(default)s",
    )
    add_timeout(parser)
