"""The command `infer-align`. A command imports its code when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.errors import AlignError, ConfigError, InvalidRequest, quote
from infer_align_server import streams
from infer_align_server.arguments import (
    Parser,
    add_address,
    add_configuration,
    configuration,
)

if TYPE_CHECKING:
    from infer_align.config.registry import Registry

# A command line for each command, at the end of its help.
EXAMPLES = {
    "serve": "serve ./my-llama --port 8000",
    "chat": """chat "Name a colour." --align '{"best_of_n": {"n": 4}}'""",
    "methods": "methods",
    "fit": "fit reward pairs.jsonl",
    "bench": "bench serve --base-url http://127.0.0.1:8000/v1",
    "rewards": "rewards check infer-align.toml",
    "check": "check dpa ./my-llama",
    "profiles": "profiles list infer-align.toml",
    "keys": "keys new search-team",
    "config": "config show infer-align.toml",
}
# Width of tables in a file or a pipe, where no terminal has a width. COLUMNS overrides it.
FILE_WIDTH = 240


def _output_width() -> int | None:
    # A closed output is None.
    is_free = sys.stdout is None or sys.stdout.isatty() or "COLUMNS" in os.environ
    return None if is_free else FILE_WIDTH


OUT = Console(width=_output_width())
ERR = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The arguments after the program's name; default: those of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure, 2 for a wrong command, configuration or
        input file, 130 for Ctrl-C.
    """
    streams.prepare()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _check_text(words)
        options = make_parser(words).parse_args(words)
        status: int = options.run(options)
    except ConfigError as error:
        _print_error("configuration", error)
        return 2
    except InvalidRequest as error:
        _print_error("error", error)
        return 2
    except AlignError as error:
        _print_error("error", error)
        return 1
    except OSError as error:
        _print_error("error", AlignError(_file_problem(error)))
        if error.filename is None:
            streams.discard_output()
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _check_text(words: Sequence[str]) -> None:
    """Refuse an argument whose bytes are no text: no message, file or request could hold it.

    Raises:
        ConfigError: quoting the argument.
    """
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ConfigError(
                f"the argument {quote(word)} is not UTF-8; write it in UTF-8, and give a file a "
                "name in UTF-8."
            )


def _file_problem(error: OSError) -> str:
    """Return what a file, or the standard output, could not do."""
    problem = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"cannot write: {problem}; the output is not complete."
    return f"{error.filename}: {problem}."


def _print_error(kind: str, error: AlignError) -> None:
    """Print an error as one line, which a reader of a log can search for."""
    # Messages of libraries may hold line breaks.
    message = " ".join(error.message.split())
    text = f"[bold red]{kind}:[/] {escape(message)}"
    ERR.print(text, highlight=False, soft_wrap=True)


def make_parser(words: Sequence[str] = ()) -> Parser:
    """Return the parser of the whole command line.

    Args:
        words: the arguments, whose first word is checked now.
    """
    parser = Parser(
        "infer-align",
        purpose="Serve a frozen language model, and align its answers while they are generated.",
        example="serve ./my-llama",
    )
    parser.add_argument(
        "--version", action="version", version=f"infer-align {version('infer-align')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add_arguments, text in (
        ("serve", _add_serve, "Serve a model over the OpenAI API."),
        ("chat", _add_chat, "Chat with a running server; show the scores."),
        (
            "methods",
            _add_methods,
            "List the methods, rewards, values and engines with their parameters.",
        ),
        ("fit", _add_fit, "Fit a value, which steers tokens, or a reward, which scores answers."),
        ("bench", _add_bench, "Measure any OpenAI endpoint."),
        ("rewards", _add_rewards, "Check the configured rewards."),
        ("check", _add_check, "Check what the served model can do."),
        ("profiles", _add_profiles, "List, show, export or delete stored profiles."),
        ("keys", _add_keys, "Make an API key."),
        ("config", _add_config, "Inspect the configuration."),
    ):
        commands.add_parser(
            name, help=text, purpose=text, example=EXAMPLES[name], add_arguments=add_arguments
        )
    parser.check_command(words, commands.choices)
    return parser


def _add_serve(parser: Parser) -> None:
    add_configuration(parser)
    add_address(parser)
    parser.set_defaults(run=_serve)


def _add_chat(parser: Parser) -> None:
    from infer_align_bench.arguments.values import http_url

    parser.add_argument(
        "message", nargs="?", help="Message to send. Default: start a conversation."
    )
    parser.add_argument(
        "--base-url",
        type=http_url,
        default="http://127.0.0.1:8000/v1",
        help="Base URL of the API. Default: %(default)s.",
    )
    parser.add_argument(
        "--model", help="Name of the model. Default: the first model of the server."
    )
    _add_chat_fields(parser)
    parser.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        help="Environment variable that holds the API key. Default: %(default)s.",
    )
    parser.set_defaults(run=_chat)


def _add_chat_fields(parser: Parser) -> None:
    """Add the fields of each request of `chat`."""
    from infer_align_bench.arguments.values import (
        json_object,
        non_negative_number,
        positive,
        positive_number,
    )

    parser.add_argument(
        "--align",
        type=json_object,
        default={},
        metavar="JSON",
        help='The align object of each request, such as \'{"best_of_n": {"n": 8}}\'.',
    )
    parser.add_argument("--system", help="System message.")
    parser.add_argument(
        "--temperature", type=non_negative_number, help="Sampling temperature; 0 is greedy."
    )
    parser.add_argument("--top-p", type=positive_number, help="Probability mass to sample from.")
    parser.add_argument(
        "--max-tokens", type=positive, help="Maximum number of tokens of an answer."
    )


def _add_methods(parser: Parser) -> None:
    parser.set_defaults(run=_methods)


def _add_fit(parser: Parser) -> None:
    from infer_align_server import fit, fit_reward

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "Fit a value from prompts and a configured reward. The model does not change."
    example = (
        "fit value infer-align.toml --reward short --prompts prompts.jsonl --out short.safetensors"
    )
    value = commands.add_parser("value", help=text, purpose=text, example=example)
    fit.add_arguments(value)
    add_configuration(value)
    value.set_defaults(run=fit.run)
    text = "Fit a reward to preference pairs, or to the choices of stored profiles."
    example = "fit reward pairs.jsonl --out reward.safetensors"
    reward = commands.add_parser("reward", help=text, purpose=text, example=example)
    fit_reward.add_arguments(reward)
    reward.set_defaults(run=fit_reward.run)


def _add_bench(parser: Parser) -> None:
    from infer_align_bench import arguments

    arguments.add_commands(parser)


def _add_rewards(parser: Parser) -> None:
    from infer_align_server.check_rewards import command

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = (
        "Find out how far the rewards can be trusted, on pairs or pools of answers. Without a "
        "file: score a few texts, and compare with Hugging Face's usual recipe."
    )
    example = "rewards check infer-align.toml --pairs pairs.jsonl"
    check = commands.add_parser("check", help=text, purpose=text, example=example)
    command.add_arguments(check)
    add_configuration(check)
    check.set_defaults(run=lambda options: command.run(options, OUT, ERR))


def _add_check(parser: Parser) -> None:
    from infer_align_server import check_dpa

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = (
        "Find out if the model follows preference directions: compare its greedy answers to four "
        "prompts, each at five directions."
    )
    dpa = commands.add_parser("dpa", help=text, purpose=text, example="check dpa ./my-llama")
    check_dpa.add_arguments(dpa)
    add_configuration(dpa)
    dpa.set_defaults(run=lambda options: check_dpa.run(options, OUT))


def _add_profiles(parser: Parser) -> None:
    from infer_align_server import profile_commands

    profile_commands.add_commands(parser, OUT)


def _add_keys(parser: Parser) -> None:
    from infer_align_server import key_commands

    key_commands.add_commands(parser, OUT)


def _add_config(parser: Parser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "Show each setting with its value, and where the value comes from."
    example = "config show infer-align.toml --set server.port=9000"
    show = commands.add_parser("show", help=text, purpose=text, example=example)
    add_configuration(show)
    add_address(show)
    show.set_defaults(run=_config_show)


def _serve(options: argparse.Namespace) -> int:
    import asyncio

    from infer_align_server import logs, serve, supervisor

    logs.switch_off_progress_bars()
    config = configuration(options)
    if config.server.workers > 1:
        return supervisor.Supervisor(config, lambda: configuration(options), OUT.width).run()
    with asyncio.Runner(loop_factory=serve.loop_factory()) as runner:
        return runner.run(serve.serve(config, OUT, ERR))


def _chat(options: argparse.Namespace) -> int:
    from infer_align_server import chat

    fields = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
    }
    if options.align:
        fields["align"] = options.align
    with chat.Chat(
        options.base_url,
        options.model,
        fields,
        options.system,
        options.api_key_env,
    ) as conversation:
        if options.message:
            return conversation.send_once(options.message)
        return conversation.loop()


def _methods(_: argparse.Namespace) -> int:
    from infer_align.config import registry
    from infer_align.config.align import parameter_classes

    _print_plugins("align", parameter_classes())
    _print_plugins("[rewards.<name>] kind", _installed(registry.rewards))
    _print_plugins("[values.<name>] kind", _installed(registry.values))
    _print_plugins("[engine] kind", _installed(registry.engines))
    return 0


def _installed(plugins: Registry) -> dict[str, type[Any]]:
    """Return the plugins that can be imported; print the packages that the others need."""
    installed: dict[str, type[Any]] = {}
    for name in plugins.names():
        try:
            installed[name] = plugins.get(name)
        except ConfigError as error:
            ERR.print(escape(error.message), highlight=False)
    return installed


def _print_plugins(title: str, plugins: dict[str, type[Any]]) -> None:
    from infer_align.config.schema import signature

    table = Table(escape(title), "parameters", "description", title_justify="left")
    for name, cls in plugins.items():
        summary = (cls.__doc__ or "").partition("\n")[0]
        table.add_row(name, escape(signature(cls)), summary)
    OUT.print(table)


def _config_show(options: argparse.Namespace) -> int:
    table = Table("setting", "value", "origin")
    for name, value, origin in configuration(options).settings():
        table.add_row(escape(name), escape(repr(value)), escape(origin))
    OUT.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
