"""Flags of `infer-align bench quality`."""

from __future__ import annotations

import argparse
from pathlib import Path

from infer_align_bench.arguments.endpoint import add_endpoint, add_timeout
from infer_align_bench.arguments.values import http_url, non_negative, positive, positive_number


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench quality`."""
    add_endpoint(parser)
    _add_quality_inputs(parser)
    _add_quality_outputs(parser)
    _add_kl_limit(parser)
    parser.add_argument(
        "--draws",
        type=positive,
        default=1,
        metavar="N",
        help="number of answers per prompt and setting; default: %(default)s",
    )
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=4,
        metavar="N",
        help="number of requests in flight; default: %(default)s",
    )
    add_timeout(parser)
    parser.add_argument(
        "--seed",
        type=non_negative,
        default=0,
        help="seed of requests, order and resampling; default: %(default)s",
    )


def _add_quality_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSONL file with one chat per line, or `demo` for the questions of the demo",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use only the first N prompts")
    parser.add_argument(
        "--gold",
        required=True,
        metavar="SCORER",
        help="scorer of the answers: name of a reward, module:function, or a JSON object for "
        "/v1/align/score",
    )
    parser.add_argument(
        "--gold-url",
        type=http_url,
        metavar="URL",
        help="server that scores the answers; default: the measured server",
    )
    parser.add_argument(
        "--gold-api-key-env",
        metavar="NAME",
        help="environment variable with the API key of the scoring server; "
        "default: the key of the measured server, if it is the same",
    )
    parser.add_argument(
        "--grid",
        required=True,
        type=Path,
        metavar="FILE",
        help="TOML or JSON file with the settings to compare",
    )


def _add_kl_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kl-limit",
        type=positive_number,
        default=10.0,
        metavar="NATS",
        help="a recommended setting with a larger KL gets a warning; default: %(default)g",
    )


def _add_quality_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("quality.html"),
        metavar="PATH",
        help="HTML file of the report; default: %(default)s",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the results to a JSON file"
    )
    parser.add_argument(
        "--notebook",
        type=Path,
        metavar="PATH",
        help="JSONL file of the finished answers; a later run continues from it; "
        "default: next to the report",
    )
