"""The command `infer-align keys new`: an API key, and its entry for the file of keys."""

from __future__ import annotations

import argparse

from rich.console import Console

from infer_align.config.schema import parse
from infer_align.errors import ConfigError
from infer_align_server.limits.key_file import SCOPES, KeyEntry, new_key


def add_commands(parser: argparse.ArgumentParser, out: Console) -> None:
    """Add the commands to the parser of `infer-align keys`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "Make an API key, and print its entry for the file."
    example = "keys new search-team --scopes generate,score"
    new = commands.add_parser("new", help=text, purpose=text, example=example)
    new.add_argument(
        "name", metavar="NAME", help="Name of the caller, such as a team or a program."
    )
    new.add_argument(
        "--scopes",
        default=",".join(SCOPES),
        help="Groups of routes that the key may use, separated by commas. Default: %(default)s.",
    )
    new.set_defaults(run=lambda options: _new(options, out))


def _new(options: argparse.Namespace, out: Console) -> int:
    """Print a new key and its entry.

    Raises:
        ConfigError: the name or a scope is wrong.
    """
    key, sha256 = new_key()
    scopes = [scope.strip() for scope in options.scopes.split(",")]
    fields = {"name": options.name, "sha256": sha256, "scopes": scopes}
    entry = parse(KeyEntry, fields, "", ConfigError)
    quoted = ", ".join(f'"{scope}"' for scope in entry.scopes)
    lines = [
        f"# The key, for its user alone: {key}",
        "# The entry, for the file that [server] api_keys_file names:",
        "[[keys]]",
        f'name = "{entry.name}"',
        f'sha256 = "{entry.sha256}"',
        f"scopes = [{quoted}]",
    ]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
