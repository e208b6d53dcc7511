"""The types of the client's requests: what they accept, and how a new method gets its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infer_align.config import registry
from infer_align.config.align import parse_align
from infer_align.errors import InvalidRequest
from tests.methods.smallest import smallest_align

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients/python/infer_align_client"
PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "server"))


def run(*command: str, path: str = PATHS, where: Path = ROOT) -> tuple[int, str]:
    """Run a Python module or file, and return its exit code and what it prints."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "MYPYPATH": ""},
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def wrong_lines(program: str, client: Path, folder: Path) -> dict[int, str]:
    """Return what mypy says about a program that uses the client: {line: message}."""
    file = folder / "program.py"
    file.write_text(program, encoding="utf-8")
    # As in an installation: the program finds the package on its path.
    shutil.copytree(client, folder / "infer_align_client", dirs_exist_ok=True)
    options = (
        "--strict",
        "--no-error-summary",
        "--config-file=",
        f"--cache-dir={folder / 'cache'}",
    )
    _, output = run("-m", "mypy", *options, file.name, where=folder)
    errors = re.findall(r"^(\S+?):(\d+): error: (.+)$", output, re.MULTILINE)
    assert {place for place, _, _ in errors} <= {"program.py"}, output
    return {int(line): message for _, line, message in errors}


RIGHT: list[dict[str, Any]] = [
    {"best_of_n": {"n": 3}, "details": "scores", "preset": "polite"},
    {"vas": {"beta": {"helpful": 4}, "top_k": "all", "tail": "mask"}},
    {"guidance": {"scale": {"calm": 1}, "traits": {"calm": {"prompt": "Be calm."}}}},
    {"compose": {"quality": {"shape": "rank"}, "gates": {"quality": {"at_least": 0}}}},
    {"trust_judge": {"scale": 10, "aspects": {"honesty": "tells the truth"}}},
    {"trust_judge": {"aspects": ["honesty"]}},
    {"trust_judge": {"principles": [{"text": "polite", "negate": True}], "votes": 3}},
    {"profile": {"choices": [{"chosen": "a", "rejected": "b"}]}},
    {"select": {"rule": "lexicographic", "order": ["quality"]}},
    {"rewards": {"short": 1, "judge": {"weight": 2, "rubric": "auto", "votes": 3}}},
    {"rewards": {"ratio": {"prompt": None}, "judge": {"principles": [{"text": "polite"}]}}},
    {"ensemble": {"objective": "wco"}, "budget": {"completion_tokens": 9}},
    *[smallest_align(name) for name in registry.methods.names()],
]
# Each with a word of what mypy says about it.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"best_of": {"n": 3}}, '"best_of"'),
    ({"best_of_n": {"m": 3}}, '"m"'),
    ({"best_of_n": {"n": "3"}}, '"n"'),
    ({"best_of_n": {"n": None}}, '"n"'),
    ({"details": "all"}, '"details"'),
    ({"vas": {"beta": {"helpful": 4}, "top_k": "any"}}, '"top_k"'),
    ({"vas": {}}, '"beta"'),
    ({"guidance": {"scale": {"calm": 1}, "traits": {"calm": {}}}}, '"prompt"'),
    ({"compose": {"gates": {"quality": {}}}}, "Gate"),
    ({"compose": {"quality": {"shape": "flat"}}}, "Gate"),
    ({"trust_judge": {"scale": 11}}, '"scale"'),
    ({"profile": {"choices": [{"chosen": "a"}]}}, '"rejected"'),
    ({"select": {"rule": "best"}}, '"rule"'),
    ({"ensemble": {"objective": "max"}}, '"objective"'),
]


@pytest.mark.slow
def test_a_type_checker_accepts_what_the_server_does(tmp_path: Path) -> None:
    program = ["from infer_align_client import Align"]
    for number, align in enumerate([*RIGHT, *[align for align, _ in WRONG]]):
        program.append(f"align{number}: Align = {align!r}")
    wrong = wrong_lines("\n".join(program) + "\n", CLIENT, tmp_path)
    for line, (align, word) in enumerate(WRONG, start=len(RIGHT) + 2):
        assert word in wrong.pop(line, "no error"), align
    assert wrong == {}
    for align in RIGHT:
        parse_align(align, presets={"polite": {}})
    for align, _ in WRONG:
        with pytest.raises(InvalidRequest):
            parse_align(align)


METHOD = '''
"""A method from a package of its own."""
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from annotated_types import Len
from infer_align.methods import PlanDraft, Stage
from infer_align.types import Capability


@dataclass(frozen=True, slots=True)
class Factor:
    r"""One of the factors, as in \\d+."""

    by: float
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """Draw as many times as the product of the factors says, which is a long line to read in here.

    A second paragraph.
    """

    factors: Annotated[tuple[Factor, ...], Len(min_length=1)]
    named: dict[str, Factor] = field(default_factory=dict)
    order: Literal["up", "down"] | int | None = None
    limit: int | None = 8
    span: tuple[float, float] = (0.0, 1.0)
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False
    stage: ClassVar[Stage] = Stage.PROPOSE
    needs: ClassVar[frozenset[Capability]] = frozenset()

    def apply(self, draft: PlanDraft) -> PlanDraft:
        return draft


plugin = Repeat
'''
TYPES = '''
class Factor(TypedDict, total=False):
    r"""One of the factors, as in \\d+."""

    by: Required[float]
    note: str


class DrawTwice(TypedDict, total=False):
    """Draw as many times as the product of the factors says, which is a long line to read in
    here.
    """

    factors: Required[list[Factor]]
    named: dict[str, Factor]
    order: Literal["up", "down"] | int
    limit: int | None
    span: list[object]
    options: dict[str, object]
    exact: bool
'''
PROGRAM = """
from infer_align_client import Align, DrawTwice, Factor, extra_body
twice: DrawTwice = {"factors": [{"by": 2}], "order": "up", "limit": None, "span": [0, 1]}
align: Align = {"draw_twice": twice, "best_of_n": {"n": 2}}
extra_body(draw_twice=twice)
extra_body(draw_twice={})
"""


@pytest.fixture
def newcomer(tmp_path: Path) -> Path:
    """Return a folder with the docs' scripts, the client, and a package that brings a method."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("*.md", "*.png"))
    shutil.copytree(ROOT / "clients/python", root / "clients/python")
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "README.md").write_text("<!-- table: methods -->\n<!-- end -->\n", encoding="utf-8")
    (root / "twice_plugin.py").write_text(METHOD, encoding="utf-8")
    info = root / "twice_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twice-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[infer_align.methods]\ndraw_twice = twice_plugin\n")
    return root


def generate(root: Path) -> tuple[int, str]:
    """Run `make docs` in the folder of a newcomer."""
    return run("docs/generate.py", path=os.pathsep.join([PATHS, str(root)]), where=root)


@pytest.mark.slow
def test_a_new_method_gets_its_types_without_an_edit(newcomer: Path, tmp_path: Path) -> None:
    assert generate(newcomer) == (0, "")
    client = newcomer / "clients/python/infer_align_client"
    assert TYPES in (client / "parameters.py").read_text(encoding="utf-8")
    for command in (["check"], ["format", "--check"]):
        code, output = run("-m", "ruff", *command, str(client), where=newcomer)
        assert code == 0, output
    program = tmp_path / "program"
    program.mkdir()
    wrong = wrong_lines(PROGRAM, client, program)
    assert list(wrong) == [6]
    assert 'Missing key "factors"' in wrong[6]
    assert run("program.py", where=program) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Score", "Gate"])
def test_a_type_whose_name_is_taken_is_refused(newcomer: Path, name: str) -> None:
    plugin = newcomer / "twice_plugin.py"
    plugin.write_text(plugin.read_text(encoding="utf-8").replace("Factor", name), encoding="utf-8")
    code, output = generate(newcomer)
    assert code == 1
    assert f"ValueError: {name}: " in output
    assert "rename one of" in output
    assert "Repeat" not in (newcomer / "README.md").read_text(encoding="utf-8")
