"""What the pages tell a reader to type is what the commands take."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from infer_align_bench.arguments import add_commands

ROOT = Path(__file__).parents[2]
PAGES = ["docs/bench.md", "docs/scaling.md", "README.md", "benchmarks/alignment/demo_grid.toml"]
COMMANDS = [
    (page, line.strip().removeprefix("# ").strip())
    for page in PAGES
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
    if line.strip().removeprefix("# ").strip().startswith("infer-align bench ")
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_understood(page: str, command: str) -> None:
    del page
    parser = argparse.ArgumentParser()
    add_commands(parser)
    parser.parse_args(shlex.split(command, comments=True)[2:])


def test_the_figures_of_the_text_are_those_of_the_tables() -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    queue = text[text.index("<!-- table: scaling-queue") :].partition("<!-- end")[0]
    waiting = [
        float(row.rsplit("|", 2)[1].strip().rstrip("%"))
        for row in re.findall(r"^\| \d.*$", queue, re.MULTILINE)
    ]
    assert max(waiting) <= 1, "hardly any request waits"
    assert "1.4 times" not in text
