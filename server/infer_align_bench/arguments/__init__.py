"""Command-line flags of `infer-align bench`. Importing this package loads no measuring code."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from collections.abc import Callable
from functools import partial

from infer_align_bench.arguments import judge, plan, quality, serve
from infer_align_bench.arguments.endpoint import body_fields
from infer_align_bench.arguments.values import json_object

__all__ = ["add_commands", "body_fields", "json_object"]

# Columns of the text that says what a command is for.
DESCRIPTION_WIDTH = 78

AddFlags = Callable[[argparse.ArgumentParser], None]

# The name of each command, its flags, the module that runs it, its purpose and an example.
COMMANDS: list[tuple[str, AddFlags, str, str, str]] = [
    (
        "serve",
        serve.add_flags,
        "serve",
        "Measure latency and throughput of an endpoint, alone or compared with another.",
        "serve --base-url http://127.0.0.1:8000/v1 --concurrency 16",
    ),
    (
        "quality",
        quality.add_flags,
        "quality.command",
        "Measure quality against tokens, seconds and KL over a grid of settings.",
        "quality --prompts demo --gold gold --grid grid.toml",
    ),
    (
        "judge",
        judge.add_flags,
        "judging.command",
        "Measure how often a judge prefers the answer that people prefer, and its biases.",
        "judge --pairs pairs.jsonl",
    ),
    (
        "plan",
        plan.add_flags,
        "plan",
        "Estimate the cost of a request and the replicas for a rate, from results of `serve`.",
        "plan result.json --rate 100 --n 8",
    ),
]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each command; it sets `run`, a function of the parsed options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add_flags, module, text, example in COMMANDS:
        command = commands.add_parser(
            name,
            help=text,
            description=textwrap.fill(text, DESCRIPTION_WIDTH),
            epilog=f"example:\n  infer-align bench {example}",
            # The default formatter would join the lines of the example.
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_flags(command)
        command.set_defaults(run=partial(_run, module))


def _run(module: str, options: argparse.Namespace) -> int:
    code: int = importlib.import_module(f"infer_align_bench.{module}").run(options)
    return code
