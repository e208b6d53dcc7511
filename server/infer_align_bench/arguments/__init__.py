"""Command-line flags of `infer-align bench`. Importing this package loads no measuring code."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from functools import partial

from infer_align_bench.arguments import judge, plan, quality, serve
from infer_align_bench.arguments.endpoint import body_fields
from infer_align_bench.arguments.values import json_object

__all__ = ["add_commands", "body_fields", "json_object"]

AddFlags = Callable[[argparse.ArgumentParser], None]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each command; it sets `run`, a function of the parsed options."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    descriptions: list[tuple[str, AddFlags, str, str]] = [
        (
            "serve",
            serve.add_flags,
            "serve",
            "measure latency and throughput of an endpoint, alone or compared with another",
        ),
        (
            "quality",
            quality.add_flags,
            "quality.command",
            "measure quality against tokens, seconds and KL over a grid of settings",
        ),
        (
            "judge",
            judge.add_flags,
            "judging.command",
            "measure how often a judge prefers the answer that people prefer, and its biases",
        ),
        (
            "plan",
            plan.add_flags,
            "plan",
            "estimate the cost of a request and the replicas for a rate, from results of `serve`",
        ),
    ]
    for name, add_flags, module, text in descriptions:
        command = commands.add_parser(name, help=text)
        add_flags(command)
        command.set_defaults(run=partial(_run, module))


def _run(module: str, options: argparse.Namespace) -> int:
    code: int = importlib.import_module(f"infer_align_bench.{module}").run(options)
    return code
