"""Flags of `infer-align bench plan`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from infer_align.methods.best_of_n import BestOfN
from infer_align_bench.arguments.values import non_negative, positive, positive_number


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench plan`."""
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="file of `bench serve --json`, from a closed loop on one replica",
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
    _add_planned_methods(group)


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
        type=positive_number,
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
