"""Run every example of README.md and docs/ against the embedded demo; compare its output."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infer_align.config import load
from infer_align_server.limits.key_file import KeyFile
from tests.server import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
DEFAULT_URL = "http://127.0.0.1:8000"
FENCED_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOCAL_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
REPOSITORY_PATH = re.compile(
    r"`((?:infer_align|kernels|server|clients|benchmarks|tests)/[\w./-]*)`"
)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATHS = [ROOT, ROOT / "kernels", ROOT / "server", ROOT / "clients/python"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(path) for path in PATHS),
    "OPENAI_API_KEY": "unused",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int  # of its first line of code
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """Return the blocks of a page in one language."""
    text = read(page)
    matching = []
    for match in FENCED_BLOCK.finditer(text):
        if match[1] == language:
            line = text.count("\n", 0, match.start()) + 2
            matching.append(Block(page, line, match[1], match[2]))
    return matching


def all_blocks(language: str) -> list[Block]:
    """Return the blocks of all pages in one language."""
    return [block for page in PAGES for block in blocks(page, language)]


# `test_first_hour.py` follows this page, with a model of the reader.
FOLLOWED_PAGE = "docs/first-hour.md"
PYTHON_PAGES = sorted({block.page for block in all_blocks("python")} - {FOLLOWED_PAGE})
# The other bash blocks install and start things.
CURL_BLOCKS = [
    block
    for block in all_blocks("bash")
    if block.code.startswith("curl") and block.page != FOLLOWED_PAGE
]
# A grid of `bench quality` and a file of API keys are not a server's configuration.
OTHER_TABLES = ("[[cells]]", "[[keys]]")
CONFIGURATIONS = [
    block for block in all_blocks("toml") if not any(table in block.code for table in OTHER_TABLES)
]
KEY_FILES = [block for block in all_blocks("toml") if "[[keys]]" in block.code]

# One worker runs all tests that need the demo, so only one demo is started.
one_worker = pytest.mark.xdist_group("docs")


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors = set()
    for heading in HEADING.findall(page.read_text(encoding="utf-8")):
        words = re.sub(r"[^\w\- ]", "", heading)
        anchors.add(words.lower().replace(" ", "-"))
    return anchors


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of a page; the test's own timeout bounds it."""
    return subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """Start `infer-align serve` without a configuration, as README.md does, and return its URL."""
    pytest.importorskip("torch")
    server = processes.Process("--port", "0", "--set", "server.log_level=error")
    yield server.url()
    server.popen.terminate()
    assert server.wait() == 0


@one_worker
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_in_order(page: str, demo: str, tmp_path: Path) -> None:
    lines: list[str] = []
    for block in blocks(page, "python"):
        # Blank lines keep the numbers of a traceback those of the page.
        lines += [""] * (block.line - 1 - len(lines))
        lines += block.code.splitlines()
    page_file = tmp_path / "page.py"
    page_file.write_text("\n".join(lines).replace(DEFAULT_URL, demo), encoding="utf-8")
    # A fork has loaded the packages that pages import.
    variables = {"OPENAI_API_KEY": "unused", "PYTHONWARNINGS": "default"}
    result = processes.run(str(page_file), program=processes.script, **variables)
    assert result.returncode == 0, result.stderr
    position = 0
    for output in blocks(page, "text"):
        position = result.stdout.find(output.code, position)
        assert position >= 0, f"{output} is not what was printed:\n{result.stdout}"
        position += len(output.code)


@one_worker
@pytest.mark.parametrize("block", CURL_BLOCKS, ids=str)
def test_curl_blocks_are_answered(block: Block, demo: str) -> None:
    result = run(["bash", "-euo", "pipefail", "-c", block.code.replace(DEFAULT_URL, demo)])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not re.match(r'\s*{"error"', result.stdout), result.stdout


def configuration(block: Block) -> Any:
    """Return the parameter for a configuration; one that names vLLM needs it to be installed."""
    needs_vllm = re.search(r'kind = "(vllm|pooling)"', block.code) is not None
    return pytest.param(block, marks=[pytest.mark.vllm] if needs_vllm else [], id=str(block))


@pytest.mark.parametrize("block", [configuration(block) for block in CONFIGURATIONS])
def test_toml_blocks_are_accepted(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    if re.search(r'kind = "(vllm|pooling)"', block.code):
        pytest.importorskip("vllm")
    path = tmp_path / "infer-align.toml"
    path.write_text(block.code, encoding="utf-8")
    # The reader's model, in the working directory.
    (tmp_path / "my-model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "my-model" / name).touch()
    monkeypatch.chdir(tmp_path)
    load(path)


@pytest.mark.parametrize("block", KEY_FILES, ids=str)
def test_files_of_keys_are_accepted(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(block.code, encoding="utf-8")
    assert KeyFile(str(path)).entries()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = ROOT / page
    for path, anchor in LOCAL_LINK.findall(read(page)):
        target = source.parent / path if path else source
        assert target.exists(), path
        if anchor:
            assert anchor in slugs(target), f"{path}#{anchor}"


def test_every_page_is_listed_in_the_readme() -> None:
    readme = read("README.md")
    assert [page for page in PAGES[1:] if f"({page})" not in readme] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    for path in REPOSITORY_PATH.findall(read(page)):
        assert (ROOT / path).exists(), path
