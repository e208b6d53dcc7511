"""The commands `infer-align profiles`: list, show, export and delete what the store keeps."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_align.config.config import Config
from infer_align.errors import ConfigError
from infer_align.flow.choice_scores import ChoiceScores
from infer_align.flow.personal import Personaliser
from infer_align.profiles.records import StoredProfile
from infer_align_server.arguments import add_configuration, configuration
from infer_align_server.profile_keeper import ProfileKeeper, UnknownProfile, existing_profiles
from infer_align_server.profiles import export_json, knowledge

# Characters of an owner's hash that a table shows.
OWNER_CHARACTERS = 12
Work: TypeAlias = Callable[[ProfileKeeper, Config, argparse.Namespace, Console], Awaitable[None]]


def add_commands(parser: argparse.ArgumentParser, out: Console) -> None:
    """Add the commands to the parser of `infer-align profiles`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text = "List the stored profiles."
    every = commands.add_parser(
        "list", help=text, purpose=text, example="profiles list infer-align.toml"
    )
    _complete(every, _list, out)
    for name, work, text in (
        ("show", _show, "Show the weights and the scales that a profile has learnt."),
        ("export", _export, "Print everything that is stored about a profile, as JSON."),
        ("delete", _delete, "Delete a profile with all its choices."),
    ):
        example = f"profiles {name} u17 infer-align.toml"
        command = commands.add_parser(name, help=text, purpose=text, example=example)
        command.add_argument("id", metavar="ID", help="Name of the profile.")
        command.add_argument(
            "--owner",
            default="",
            metavar="HASH",
            help="Beginning of the owner's hash, if several owners have a profile of this name.",
        )
        _complete(command, work, out)


def _complete(parser: argparse.ArgumentParser, work: Work, out: Console) -> None:
    add_configuration(parser)
    parser.set_defaults(run=lambda options: asyncio.run(_run(work, options, out)))


async def _run(work: Work, options: argparse.Namespace, out: Console) -> int:
    config = configuration(options)
    keeper = existing_profiles(config)
    try:
        await work(keeper, config, options, out)
    finally:
        await keeper.close()
    return 0


async def _list(
    keeper: ProfileKeeper, _config: Config, _options: argparse.Namespace, out: Console
) -> None:
    table = Table("id", "owner", "choices", "created")
    for owner, profile_id, choices, created_at in await keeper.store("id").overview():
        day = datetime.fromtimestamp(created_at, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(escape(profile_id), owner[:OWNER_CHARACTERS], str(choices), day)
    out.print(table)


async def _show(
    keeper: ProfileKeeper, config: Config, options: argparse.Namespace, out: Console
) -> None:
    _, stored = await _find(keeper, options)
    rewards = config.load_rewards()
    defaults = config.server.default_rewards
    personaliser = Personaliser(rewards, defaults, config.methods, ChoiceScores(rewards))
    summary = knowledge(personaliser, stored)
    out.print(f"{stored.id}: {summary['choices']} choices", highlight=False, markup=False)
    if stored.description:
        out.print(stored.description, highlight=False, markup=False)
    for sentence in summary["words"]:
        out.print(f"  {sentence}", highlight=False, markup=False)


async def _export(
    keeper: ProfileKeeper, _config: Config, options: argparse.Namespace, out: Console
) -> None:
    _, stored = await _find(keeper, options)
    text = json.dumps(export_json(stored), indent=2, ensure_ascii=False)
    out.print(text, highlight=False, markup=False, soft_wrap=True)


async def _delete(
    keeper: ProfileKeeper, _config: Config, options: argparse.Namespace, out: Console
) -> None:
    owner, stored = await _find(keeper, options)
    await keeper.store("id").delete(owner, stored.id)
    out.print(f"{stored.id}: deleted", highlight=False, markup=False)


async def _find(keeper: ProfileKeeper, options: argparse.Namespace) -> tuple[str, StoredProfile]:
    """Return the owner and the profile that the arguments name.

    Raises:
        UnknownProfile: there is none.
        ConfigError: several owners have one.
    """
    owners: list[str] = []
    for owner, profile_id, *_ in await keeper.store("id").overview():
        if profile_id == options.id and owner.startswith(options.owner):
            owners.append(owner)
    if not owners:
        raise UnknownProfile(f"there is no profile {options.id!r}; see: infer-align profiles list")
    if len(owners) > 1:
        hashes = ", ".join(owner[:OWNER_CHARACTERS] for owner in owners)
        raise ConfigError(f"{options.id!r}: several owners have it; add --owner, one of {hashes}.")
    return owners[0], await keeper.load(owners[0], options.id, "id")
