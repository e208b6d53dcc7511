"""Flags of `infer-align bench serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from infer_align_bench.arguments.endpoint import add_endpoint, add_timeout
from infer_align_bench.arguments.values import (
    http_url,
    json_object,
    non_negative,
    number_range,
    positive,
    positive_number,
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench serve`."""
    _add_target(parser)
    _add_second_target(parser)
    _add_load(parser)
    _add_dataset(parser)
    _add_output(parser)


def _add_second_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=http_url,
        metavar="URL",
        help="second endpoint to compare with; both get load in turns, ratios are A / B",
    )
    parser.add_argument(
        "--against-model",
        metavar="M",
        help="model of the second endpoint; without --against, another model of the first",
    )
    parser.add_argument(
        "--against-align",
        type=json_object,
        metavar="JSON",
        help="`align` of the second endpoint; default: none",
    )
    parser.add_argument(
        "--against-api-key-env",
        metavar="NAME",
        help="environment variable with the second endpoint's API key; "
        "default: the first key, if both are on the same server",
    )


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="number of requests in flight (closed loop); default: 1",
    )
    group.add_argument(
        "--rate",
        type=positive_number,
        metavar="R",
        help="requests per second and target, sent at random times (open loop)",
    )
    group.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="number of requests per target; default: 200, or no limit with --duration",
    )
    _add_time_limits(group)
    _add_load_details(group)


def _add_time_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--duration",
        type=positive_number,
        metavar="S",
        help="seconds in which requests are started",
    )
    group.add_argument(
        "--grace",
        type=positive_number,
        default=10.0,
        metavar="S",
        help="seconds after --duration until unfinished requests are given up and counted as "
        "failed; default: %(default)g",
    )
    add_timeout(group)


def _add_load_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-in-flight",
        type=positive,
        metavar="N",
        help="with --rate: maximum number of requests in flight per target; further requests "
        "wait in the client, and their latency includes the wait",
    )
    group.add_argument(
        "--warmup",
        type=non_negative,
        metavar="N",
        help="number of warm-up requests, which are not counted; "
        "default: the concurrency, at least 4",
    )
    group.add_argument(
        "--seed",
        type=non_negative,
        default=0,
        help="seed of prompts, arrival times, order of targets and requests; default: %(default)s",
    )


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--dataset",
        default="demo",
        metavar="NAME",
        help="demo, synthetic, or a JSONL file with one chat per line; default: %(default)s",
    )
    group.add_argument(
        "--input-tokens",
        type=number_range,
        default=(128, 128),
        metavar="N[-M]",
        help="length of a synthetic prompt; default: 128",
    )
    group.add_argument(
        "--output-tokens",
        type=number_range,
        default=(64, 64),
        metavar="N[-M]",
        help="max_tokens of a synthetic prompt; default: 64",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--goodput",
        metavar="GOALS",
        help="latency goals in milliseconds, such as ttft:200,e2e:1000; "
        "report the requests that meet all of them",
    )
    group.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="write all results to a JSON file, with every request, its gaps and align.usage",
    )
    group.add_argument("--plot", type=Path, metavar="PATH", help="write a plot to a PNG file")


def _add_target(parser: argparse.ArgumentParser) -> None:
    add_endpoint(parser)
    parser.add_argument(
        "--align",
        type=json_object,
        metavar="JSON",
        help='`align` of every request, such as \'{"best_of_n": {"n": 8}}\'',
    )
    parser.add_argument(
        "--no-stream",
        action="store_true",
        help="request complete answers; first tokens and gaps are not measured",
    )
