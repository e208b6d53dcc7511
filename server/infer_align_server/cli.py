"""The command `infer-align`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.config import config as configuration
from infer_align.config import registry
from infer_align.config.schema import signature
from infer_align.errors import AlignError, ConfigError
from infer_align.objectives import Ensemble
from infer_align.types import Budget
from infer_align_bench import arguments as bench
from infer_align_server import chat, fit, serve

OUT = Console()
ERR = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 2 for a wrong call or configuration, 1 for a failure, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
    except ConfigError as error:
        ERR.print(f"[bold red]configuration:[/] {escape(error.message)}", highlight=False)
        return 2
    except AlignError as error:
        ERR.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "infer-align", description="Serve a frozen language model, aligned while it decodes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serving = commands.add_parser(
        "serve", help="serve a model over the OpenAI API; without a file, the embedded demo"
    )
    _add_config(serving)
    serving.set_defaults(run=_serve)

    talking = commands.add_parser("chat", help="talk to a running server, and see the scores")
    talking.add_argument("message", nargs="?", help="one message; without it, a conversation")
    talking.add_argument(
        "--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s"
    )
    talking.add_argument("--model", help="default: the first that the server lists")
    talking.add_argument(
        "--align",
        type=bench.json_object,
        default={},
        metavar="JSON",
        help='such as \'{"best_of_n": {"n": 8}}\'',
    )
    talking.add_argument("--system", help="system message")
    talking.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        help="environment variable with the key; default: %(default)s",
    )
    talking.set_defaults(run=_chat)

    listing = commands.add_parser(
        "methods", help="what a request can ask for in `align`, what can score, what can be served"
    )
    listing.set_defaults(run=_methods)

    fitting = commands.add_parser("fit", help="fit what VAS steers with").add_subparsers(
        required=True, metavar="COMMAND"
    )
    value = fitting.add_parser(
        "value", help="a value, from prompts and a configured reward; the model is untouched"
    )
    fit.add_arguments(value)
    _add_config(value)
    value.set_defaults(run=fit.run)

    bench.add_commands(commands.add_parser("bench", help="measure an endpoint, ours or another's"))

    config = commands.add_parser("config", help="the configuration").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = config.add_parser("show", help="each value and where it came from")
    _add_config(show)
    show.set_defaults(run=_config_show)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="infer-align.toml; default: the embedded demo")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one value, by the file's own names",
    )


def _serve(options: argparse.Namespace) -> int:
    config = configuration.load(options.config, options.set)
    with asyncio.Runner(loop_factory=serve.loop_factory()) as runner:
        return runner.run(serve.serve(config, ERR))


def _chat(options: argparse.Namespace) -> int:
    with chat.Chat(
        options.base_url, options.model, options.align, options.system, options.api_key_env
    ) as talk:
        return talk.send_once(options.message) if options.message else talk.loop()


def _methods(_: argparse.Namespace) -> int:
    methods = {name: registry.methods.get(name) for name in registry.methods.names()}
    _print_plugins("align", {**methods, "ensemble": Ensemble, "budget": Budget})
    for title, plugins in (
        ("[rewards.<name>] kind", registry.rewards),
        ("[values.<name>] kind", registry.values),
        ("[engine] kind", registry.engines),
    ):
        found = {}
        for name in plugins.names():
            try:
                found[name] = plugins.get(name)
            except ConfigError as error:  # its packages are not installed here
                ERR.print(escape(error.message), highlight=False)
        _print_plugins(title, found)
    return 0


def _print_plugins(title: str, plugins: dict[str, type[Any]]) -> None:
    table = Table(escape(title), "parameters", "what it does", title_justify="left")
    for name, cls in plugins.items():
        table.add_row(name, escape(signature(cls)), (cls.__doc__ or "").partition("\n")[0])
    OUT.print(table)


def _config_show(options: argparse.Namespace) -> int:
    table = Table("setting", "value", "from")
    for name, value, origin in configuration.load(options.config, options.set).settings():
        table.add_row(escape(name), escape(repr(value)), escape(origin))
    OUT.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
