"""Flags of `infer-align bench plan`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import get_args

from infer_align.methods.adaptive import Adaptive
from infer_align.methods.best_of_n import BestOfN
from infer_align_bench.arguments.values import (
    non_negative,
    non_negative_number,
    positive,
    positive_number,
    spread,
)
from infer_align_bench.price_table import shipped
from infer_align_bench.traffic import Routing


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench plan`."""
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        metavar="RESULT",
        help="file of `bench serve --json`, from a closed loop on one replica",
    )
    parser.add_argument(
        "--prices",
        metavar="TABLE",
        help="use a table of prices in place of results: its file, or the name of a shipped one "
        f"({', '.join(shipped())})",
    )
    parser.add_argument(
        "--hold-out",
        action="append",
        default=[],
        type=Path,
        metavar="RESULT",
        help="further result that is predicted but not used for the fit",
    )
    _add_planned_request(parser)
    _add_planned_service(parser)
    _add_cluster(parser)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write prices, errors and the plan to a file"
    )


def _add_planned_request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planned request")
    group.add_argument(
        "--n",
        type=positive,
        default=BestOfN().n,
        metavar="N",
        help="number of candidates; default: %(default)s",
    )
    group.add_argument(
        "--prompt-tokens",
        type=non_negative,
        default=512,
        metavar="N",
        help="number of prompt tokens; default: %(default)s",
    )
    group.add_argument(
        "--output-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="number of tokens of one candidate; default: %(default)s",
    )
    _add_adaptive(group)
    _add_planned_methods(group)


def _add_adaptive(group: argparse._ArgumentGroup) -> None:
    adaptive = Adaptive()
    group.add_argument(
        "--mean-n",
        type=positive_number,
        metavar="X",
        help="mean number of candidates with align.adaptive; --n is then the largest number",
    )
    group.add_argument(
        "--batch",
        type=positive,
        default=adaptive.batch,
        metavar="N",
        help="number of candidates of one adaptive batch; default: %(default)s",
    )


def _add_planned_methods(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--k",
        type=non_negative,
        default=0,
        metavar="K",
        help="number of tokens that are valued at each step; default: 0, no steering",
    )
    group.add_argument(
        "--reward-tokens",
        type=non_negative,
        metavar="N",
        help="number of tokens that rewards read; default: each candidate with its prompt",
    )
    group.add_argument(
        "--judge-tokens",
        type=non_negative,
        default=0,
        metavar="N",
        help="number of tokens of the judge; default: %(default)s",
    )


def _add_planned_service(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planned service")
    group.add_argument(
        "--rate",
        type=positive_number,
        default=1000.0,
        metavar="R",
        help="requests per second; default: %(default)g",
    )
    group.add_argument(
        "--latency",
        type=positive_number,
        default=math.inf,
        metavar="S",
        help="maximum mean latency of a request in seconds; default: no limit",
    )
    group.add_argument(
        "--p99",
        type=positive_number,
        metavar="S",
        help="seconds in which 99%% of the requests end; the number of replicas is simulated",
    )
    group.add_argument(
        "--spread",
        type=spread,
        default=0.5,
        metavar="X",
        help="standard deviation of answer lengths, divided by the mean; default: %(default)g",
    )
    group.add_argument(
        "--max-sequences",
        type=positive,
        default=256,
        metavar="N",
        help="maximum number of sequences of one replica; default: %(default)s",
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planned cluster")
    group.add_argument(
        "--routing",
        choices=get_args(Routing),
        default="least",
        help="replica of a request: that with the fewest requests, any at random, or that of its "
        "prefix unless it is overloaded (affine); default: %(default)s",
    )
    group.add_argument(
        "--prefix-tokens",
        type=non_negative,
        default=0,
        metavar="N",
        help="number of prompt tokens that many requests share; default: %(default)s",
    )
    group.add_argument(
        "--prefixes",
        type=positive,
        default=1,
        metavar="N",
        help="number of different prefixes; default: %(default)s",
    )
    group.add_argument(
        "--prefix-skew",
        type=non_negative_number,
        default=1.0,
        metavar="X",
        help="prefix i is used in proportion to 1 / i^X; default: %(default)g",
    )
    group.add_argument(
        "--cache-tokens",
        type=non_negative,
        default=0,
        metavar="N",
        help="number of tokens of prefixes that one replica keeps; default: none",
    )
    _add_machines(group)


def _add_machines(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--judge-pool",
        type=positive_number,
        metavar="LOAD",
        help="judge on replicas of their own, as many as have this mean load, such as 0.7; "
        "default: the replicas that generate judge too",
    )
    group.add_argument(
        "--gpus-per-replica",
        type=positive,
        default=1,
        metavar="N",
        help="number of GPUs of a replica; default: %(default)s",
    )
    group.add_argument(
        "--gpus-per-node",
        type=positive,
        default=8,
        metavar="N",
        help="number of GPUs of a node; default: %(default)s",
    )
