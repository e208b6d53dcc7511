"""The commands on the pages are valid, and the text agrees with the tables."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer_align_bench.arguments import add_commands

ROOT = Path(__file__).parents[2]
PAGES = ["docs/bench.md", "docs/scaling.md", "README.md", "benchmarks/alignment/demo_grid.toml"]


def page_commands() -> Iterator[tuple[str, str]]:
    """Yield page and command of every call of `infer-align bench`."""
    for page in PAGES:
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
            command = line.strip().removeprefix("# ").strip()
            if command.startswith("infer-align bench "):
                yield page, command


COMMANDS = list(page_commands())


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_valid(page: str, command: str) -> None:
    del page
    parser = argparse.ArgumentParser()
    add_commands(parser)
    parser.parse_args(shlex.split(command, comments=True)[2:])


def test_the_text_agrees_with_the_table() -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    table = text[text.index("<!-- table: scaling-queue") :].partition("<!-- end")[0]
    waiting = []
    for line in re.findall(r"^\| \d.*$", table, re.MULTILINE):
        last_cell = line.rsplit("|", 2)[1]
        waiting.append(float(last_cell.strip().rstrip("%")))
    assert max(waiting) <= 1, "hardly any request waits"
    assert "1.4 times" not in text
