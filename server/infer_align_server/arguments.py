"""The arguments that choose a configuration, and a parser that says what was meant."""

from __future__ import annotations

import argparse
import difflib
import shlex
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from infer_align.errors import ConfigError, quote

if TYPE_CHECKING:
    from infer_align.config import Config

# Seeds are below this number, so that every random generator takes them.
SEED_RANGE = 2**32
LAST_PORT = 65535
# Digits of the longest number of an option that counts things.
LONGEST_COUNT = 18
# Columns of the text that says what a command is for.
PURPOSE_WIDTH = 78
# Options of other servers, each with what it is called here.
OTHER_NAMES = {
    "--served-model-name": "--name NAME",
    "--alias": "--name NAME",
    "--base-url": "--upstream URL",
    "--url": "--upstream URL",
    "--urls": "--upstream URL",
    "--api-key": "--set server.api_keys_env=VARIABLE, the environment variable that holds the key",
    "--max-model-len": "--set engine.context_length=N, or engine.max_model_len with kind vllm",
    "--engine": "--set engine.kind=KIND",
    "--kind": "--set engine.kind=KIND",
    "--backend": "--set engine.kind=KIND",
    "--reward": "a section [rewards.NAME] of a configuration file",
    "--rewards": "a section [rewards.NAME] of a configuration file",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors show the usage of the command itself and name the nearest option.

    Args:
        purpose: what the command is for, in one or two sentences. The help begins with it.
        example: a command line without the program's name. The help ends with it.
        add_arguments: adds the arguments when the parser is first used. A command that is not
            called then loads no code.
        options: the options of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *arguments: Any,
        purpose: str = "",
        example: str = "",
        add_arguments: Callable[[Parser], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        # argparse's own formatter would join the lines.
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        if purpose:
            self.description = textwrap.fill(purpose, PURPOSE_WIDTH)
        if example:
            self.epilog = f"example:\n  infer-align {example}"
        self._add_arguments = add_arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments; a command refuses what it does not know, before its parents do."""
        if self._add_arguments is not None:
            self._add_arguments(self)
            self._add_arguments = None
        options, unknown = super().parse_known_args(args, namespace)
        is_command = self.get_default("run") is not None
        if unknown and is_command:
            self.refuse(unknown[0])
        return options, unknown

    def check_command(self, words: Sequence[str], commands: Collection[str]) -> None:
        """End the program with an error if the first word is no command.

        Args:
            words: the arguments of the program.
            commands: the names of its commands.
        """
        first = words[0] if words else ""
        if not first or first in commands or first in self._option_string_actions:
            return
        if first.startswith("-"):
            option = first.partition("=")[0]
            similar = difflib.get_close_matches(option, self._option_string_actions, 1, 0.75)
            if similar:
                self.error(f"there is no option {option}; did you mean {similar[0]}?")
            self.error(f"{option} stands after a command: infer-align serve {shlex.join(words)}")
        similar = difflib.get_close_matches(first, commands, n=1)
        if similar:
            self.error(f"there is no command {first!r}; did you mean {similar[0]}?")
        names = ", ".join(commands)
        self.error(
            f"there is no command {first!r}; known: {names}. To serve a model, write: infer-align "
            f"serve {shlex.join(words)}"
        )

    def refuse(self, argument: str) -> NoReturn:
        """End the program with an error about an unknown argument."""
        option = argument.partition("=")[0]
        if not option.startswith("-"):
            self.error(f"there is one argument too many: {argument!r}")
        self.error(f"there is no option {option}; {self._meant(option)}")

    def _meant(self, option: str) -> str:
        if option in OTHER_NAMES and "--upstream" in self._option_string_actions:
            return f"here it is {OTHER_NAMES[option]}"
        names = [name for name in self._option_string_actions if name.startswith("--")]
        similar = difflib.get_close_matches(option, names, n=1)
        if similar:
            return f"did you mean {similar[0]}?"
        setting = option.lstrip("-").replace("-", "_")
        owners = _owners_of(setting) if "--set" in names else []
        if owners:
            return f"write it as --set {owners[0]}.{setting}=VALUE"
        return f"known: {', '.join(sorted(names))}"


def _owners_of(setting: str) -> list[str]:
    """Return the sections of the configuration that have a setting."""
    from infer_align.config.config import owners_of

    return owners_of(setting)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a configuration. `configuration` reads them."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="MODEL|CONFIG",
        help="Model to serve: a folder, a hub id such as ORG/NAME, or a GGUF file. Or the path of "
        "a configuration (.toml). Default: the embedded demo.",
    )
    parser.add_argument("--config", metavar="FILE", help="Path of a configuration.")
    parser.add_argument(
        "--model", "-m", help="Model to serve; with --upstream, the upstream's name of it."
    )
    parser.add_argument(
        "--upstream",
        metavar="URL",
        help="Serve the models of an OpenAI-compatible server, such as http://127.0.0.1:8001/v1.",
    )
    parser.add_argument("--name", help="Name of the model in the API. Default: its own.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="Override one value of the configuration, by its name in the file.",
    )


def seed(text: str) -> int:
    """Return the random seed of an argument.

    Raises:
        ArgumentTypeError: it is no seed.
    """
    # Ten digits hold every seed.
    is_number = text.isascii() and text.isdecimal() and len(text) <= 10
    if not is_number or int(text) >= SEED_RANGE:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be an integer from 0 to {SEED_RANGE - 1}"
        )
    return int(text)


def positive_integer(text: str) -> int:
    """Return the number of an argument that counts things.

    Raises:
        ArgumentTypeError: it is no integer of at least 1.
    """
    is_number = text.isascii() and text.isdecimal() and len(text) <= LONGEST_COUNT
    if not is_number or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be an integer of at least 1, with at most "
            f"{LONGEST_COUNT} digits"
        )
    return int(text)


def _port(text: str) -> int:
    # No port has more than five digits.
    is_number = text.isascii() and text.isdecimal() and len(text) <= 5
    if not is_number or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is not allowed; must be an integer from 0 to {LAST_PORT}"
        )
    return int(text)


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the address that `serve` listens on."""
    parser.add_argument("--host", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument(
        "--port", "-p", type=_port, help="Port to listen on; 0 takes a free one. Default: 8000."
    )


def configuration(options: argparse.Namespace) -> Config:
    """Return the configuration that the arguments choose.

    Raises:
        ConfigError: an argument contradicts another one, or the configuration is wrong.
    """
    from infer_align.config import Choices, load

    path = options.config
    model = options.model
    target = options.target
    if target is not None and _is_configuration(target):
        path = _one_of("--config", path, target)
    elif target is not None:
        model = _one_of("--model", model, target)
    if options.upstream is None and model is not None and "://" in model:
        _refuse_url(model)
    upstream = None if options.upstream is None else complete_url(options.upstream)
    choices = Choices(
        model=model,
        upstream=upstream,
        name=options.name,
        host=getattr(options, "host", None),
        port=getattr(options, "port", None),
    )
    return load(path, options.set, choices)


def _refuse_url(url: str) -> NoReturn:
    """Refuse a URL in place of a model, and say how to write what it names.

    Raises:
        ConfigError: always.
    """
    from infer_align.config.model_path import model_of_url

    meant = model_of_url(url)
    if meant is not None:
        raise ConfigError(f"{url!r} is a URL, not a model; write {meant!r}.")
    raise ConfigError(
        f"{url!r} is a URL, not a model; to serve the models of that server: "
        f"infer-align serve --upstream {url}"
    )


def _is_configuration(target: str) -> bool:
    """Return True for the path of a configuration, False for a model."""
    from infer_align.config.model_path import is_gguf, is_part

    path = Path(target)
    if target.endswith(".toml"):
        return True
    is_model = is_part(target) or is_gguf(target)
    return path.exists() and not path.is_dir() and not is_model


def _one_of(option: str, value: Any, target: str) -> str:
    if value is not None and value != target:
        raise ConfigError(
            f"{option} {value} and the argument {target!r} name two different things; give one."
        )
    return target


def complete_url(address: str) -> str:
    """Return an address as a URL: "host:port" alone gets "http://"."""
    return address if "://" in address else f"http://{address}"
