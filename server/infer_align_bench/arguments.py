"""The flags of `infer-align bench`; nothing here loads what only a measurement needs."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any


def add_commands(parser: argparse.ArgumentParser) -> None:
    """`serve`, `quality` and `plan`; each sets `run`, a function of the parsed options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, module, text in (
        (
            "serve",
            add_serve,
            "serve",
            "load, latency and throughput of any OpenAI endpoint, alone or against another",
        ),
        (
            "quality",
            add_quality,
            "quality.command",
            "quality against tokens, seconds and KL over a grid of settings, and what to use",
        ),
        (
            "plan",
            add_plan,
            "plan",
            "from `serve`'s results: what a request costs, and how many replicas a rate needs",
        ),
    ):
        command = commands.add_parser(name, help=text)
        add(command)
        command.set_defaults(run=partial(_run, module))


def _run(module: str, options: argparse.Namespace) -> int:
    code: int = importlib.import_module(f"infer_align_bench.{module}").run(options)
    return code


def add_serve(parser: argparse.ArgumentParser) -> None:
    """`bench serve`."""
    _add_target(parser)
    parser.add_argument(
        "--against", metavar="URL", help="a second endpoint, under load in turns; ratios are A / B"
    )
    parser.add_argument(
        "--against-model",
        metavar="M",
        help="its model; without --against, another model of the same endpoint",
    )
    parser.add_argument(
        "--against-align", type=json_object, metavar="JSON", help="its align; default: none"
    )
    parser.add_argument(
        "--against-api-key-env",
        metavar="NAME",
        help="its key's variable; default: the first's key, on the same server",
    )
    loop = parser.add_argument_group("load")
    loop.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="requests always under way (closed loop); default: 1",
    )
    loop.add_argument(
        "--rate",
        type=positive_number,
        metavar="R",
        help="requests per second and target, at random times (open loop)",
    )
    loop.add_argument(
        "--requests",
        type=positive,
        metavar="N",
        help="per target; default: 200, or no bound with --duration",
    )
    loop.add_argument(
        "--duration",
        type=positive_number,
        metavar="S",
        help="seconds in which requests are started",
    )
    loop.add_argument(
        "--grace",
        type=positive_number,
        default=10.0,
        metavar="S",
        help="after --duration, for those under way; then they are given up and counted; default: %(default)g",
    )
    loop.add_argument(
        "--timeout",
        type=positive_number,
        default=120.0,
        metavar="S",
        help="of one request; default: %(default)g",
    )
    loop.add_argument(
        "--max-in-flight",
        type=positive,
        metavar="N",
        help="with --rate, per target: those beyond it wait, and their waiting counts",
    )
    loop.add_argument(
        "--warmup",
        type=whole,
        metavar="N",
        help="requests before, not counted; default: as are under way, 4 at least",
    )
    loop.add_argument(
        "--seed",
        type=whole,
        default=0,
        help="of prompts, arrivals, turns, and of each request; default: %(default)s",
    )
    _add_dataset(parser)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--dataset",
        default="demo",
        metavar="NAME",
        help="demo, synthetic, or a JSONL file of chats; default: %(default)s",
    )
    asked.add_argument(
        "--input-tokens",
        type=span,
        default=(128, 128),
        metavar="N[-M]",
        help="synthetic; default: 128",
    )
    asked.add_argument(
        "--output-tokens",
        type=span,
        default=(64, 64),
        metavar="N[-M]",
        help="synthetic, as max_tokens; default: 64",
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument(
        "--goodput",
        metavar="GOALS",
        help="such as ttft:200,e2e:1000: which requests met all of them, in ms",
    )
    kept.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="everything, with each request, its gaps and its align.usage",
    )
    kept.add_argument("--plot", type=Path, metavar="PATH", help="a PNG")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """`bench plan`."""
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="of `bench serve --json`, closed loops on one replica",
    )
    parser.add_argument(
        "--hold-out",
        action="append",
        default=[],
        type=Path,
        metavar="RESULT",
        help="predicted, not fitted",
    )
    asked = parser.add_argument_group("what is planned")
    asked.add_argument(
        "--rate",
        type=positive_number,
        default=1000.0,
        metavar="R",
        help="requests per second; default: %(default)g",
    )
    asked.add_argument(
        "--n",
        type=positive,
        default=8,
        metavar="N",
        help="candidates of a request; default: %(default)s",
    )
    asked.add_argument(
        "--prompt-tokens", type=whole, default=512, metavar="N", help="default: %(default)s"
    )
    asked.add_argument(
        "--output-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="of one candidate; default: %(default)s",
    )
    asked.add_argument(
        "--k",
        type=whole,
        default=0,
        metavar="K",
        help="tokens valued at each step; default: 0, not steered",
    )
    asked.add_argument(
        "--reward-tokens",
        type=whole,
        metavar="N",
        help="read by rewards; default: each candidate after its prompt",
    )
    asked.add_argument(
        "--judge-tokens", type=whole, default=0, metavar="N", help="default: %(default)s"
    )
    asked.add_argument(
        "--latency",
        type=positive_number,
        default=math.inf,
        metavar="S",
        help="mean seconds of a request, at most",
    )
    asked.add_argument(
        "--p99",
        type=positive_number,
        metavar="S",
        help="seconds within which 99%% end: the replicas are simulated",
    )
    asked.add_argument(
        "--spread",
        type=positive_number,
        default=0.5,
        metavar="X",
        help="of lengths: deviation / mean; default: %(default)g",
    )
    asked.add_argument(
        "--max-sequences",
        type=positive,
        default=256,
        metavar="N",
        help="of one replica; default: %(default)s",
    )
    asked.add_argument("--json", type=Path, metavar="PATH", help="prices, errors and the plan")


def add_quality(parser: argparse.ArgumentParser) -> None:
    """`bench quality`."""
    _add_endpoint(parser)
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSONL of chats; `demo` for the embedded world's questions",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--gold",
        required=True,
        metavar="SCORER",
        help="a reward's name, module:function, or an object of align/score",
    )
    parser.add_argument(
        "--gold-url",
        metavar="URL",
        help="the server that scores; default: the one that is measured",
    )
    parser.add_argument(
        "--gold-api-key-env",
        metavar="NAME",
        help="its key's variable; default: the same key, on the same server",
    )
    parser.add_argument(
        "--grid",
        required=True,
        type=Path,
        metavar="FILE",
        help="TOML or JSON: the settings to compare",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("quality.html"),
        metavar="PATH",
        help="default: %(default)s",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="the same figures for programs")
    parser.add_argument(
        "--notebook",
        type=Path,
        metavar="PATH",
        help="finished answers, to go on from; default: beside the report",
    )
    parser.add_argument(
        "--draws",
        type=positive,
        default=1,
        metavar="N",
        help="answers per prompt and setting; default: %(default)s",
    )
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=4,
        metavar="N",
        help="requests under way; default: %(default)s",
    )
    parser.add_argument(
        "--timeout",
        type=positive_number,
        default=120.0,
        metavar="S",
        help="of one request; default: %(default)g",
    )
    parser.add_argument("--seed", type=whole, default=0, help="default: %(default)s")


def _add_target(parser: argparse.ArgumentParser) -> None:
    _add_endpoint(parser)
    parser.add_argument(
        "--align", type=json_object, metavar="JSON", help='such as \'{"best_of_n": {"n": 8}}\''
    )
    parser.add_argument(
        "--no-stream", action="store_true", help="whole answers: no first token, no gaps"
    )


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        default="http://127.0.0.1:8000/v1",
        help="any OpenAI endpoint; default: %(default)s",
    )
    parser.add_argument("--model", help="default: the first that it lists")
    parser.add_argument(
        "--body",
        type=json_object,
        default={},
        metavar="JSON",
        help="further fields; null leaves one out",
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of each answer")
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="variable with the key; default: %(default)s",
    )


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def whole(text: str) -> int:
    """0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a whole number from 0")
    return int(text)


def positive(text: str) -> int:
    """1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a whole number from 1")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number over 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be a number over 0")
    return value


def span(text: str) -> tuple[int, int]:
    """The ends of a range: "64" or "32-128"."""
    low, _, high = text.partition("-")
    ends = (positive(low), positive(high or low))
    if ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; must be like 64 or 32-128")
    return ends
