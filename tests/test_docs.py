"""Run every example of README.md and docs/ against the embedded demo; compare its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from infer_align.config import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DEFAULT_URL = "http://127.0.0.1:8000"
FENCED_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LOCAL_LINK = re.compile(r"\]\((?!https?://|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATHS = [ROOT, ROOT / "kernels", ROOT / "server", ROOT / "clients/python"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(path) for path in PATHS),
    "OPENAI_API_KEY": "unused",
}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, code) of each fenced block in this language."""
    text = page.read_text(encoding="utf-8")
    numbered = []
    for match in FENCED_BLOCK.finditer(text):
        if match[1] == language:
            line = text.count("\n", 0, match.start()) + 2
            numbered.append((line, match[2]))
    return numbered


def pages_with(language: str) -> list[Path]:
    """Return the pages that hold a block in this language."""
    return [page for page in PAGES if blocks(page, language)]


def curl_blocks() -> list[tuple[Path, int, str]]:
    """Return the bash blocks that send a request; the others install and start things."""
    requests = []
    for page in PAGES:
        for line, code in blocks(page, "bash"):
            if code.lstrip().startswith("curl"):
                requests.append((page, line, code))
    return requests


def toml_blocks() -> list[tuple[Path, int, str]]:
    """Return the blocks that are a server's configuration; a grid of `bench quality` is not."""
    configurations = []
    for page in PAGES:
        for line, code in blocks(page, "toml"):
            if "[[cells]]" not in code:
                configurations.append((page, line, code))
    return configurations


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of a page; the test's own timeout bounds it."""
    return subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False
    )


def read_url(stderr: IO[str]) -> str:
    """Return the address that the server prints once it listens."""
    lines = []
    for line in stderr:
        lines.append(line)
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        if match:
            return match[0]
    pytest.fail("the server ended before it listened:\n" + "".join(lines))


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """Start `infer-align serve` without a configuration, as README.md does, and return its URL."""
    pytest.importorskip("torch")
    settings = ["--set", "server.port=0", "--set", "server.log_level=error"]
    command = [sys.executable, "-m", "infer_align_server", "serve", *settings]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as server:
        assert server.stderr is not None
        try:
            url = read_url(server.stderr)
            # A full pipe would stop the server, so the rest of its log is read too.
            reader = threading.Thread(target=server.stderr.read)
            reader.start()
            yield url
        finally:
            server.terminate()
        reader.join()
        assert server.wait() == 0


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, demo: str, tmp_path: Path) -> None:
    lines: list[str] = []
    for line, code in blocks(page, "python"):
        # Blank lines keep the numbers of a traceback those of the page.
        lines += [""] * (line - 1 - len(lines))
        lines += code.splitlines()
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(lines).replace(DEFAULT_URL, demo), encoding="utf-8")
    result = run([sys.executable, str(script)])
    assert result.returncode == 0, result.stderr
    position = 0
    for line, expected in blocks(page, "text"):
        position = result.stdout.find(expected, position)
        assert position >= 0, f"{page.name}:{line} is not what was printed:\n{result.stdout}"
        position += len(expected)


@pytest.mark.parametrize(
    ("page", "line", "code"), curl_blocks(), ids=lambda value: getattr(value, "name", None)
)
def test_curl_blocks_are_answered(page: Path, line: int, code: str, demo: str) -> None:
    place = f"{page.name}:{line}"
    result = run(["bash", "-euo", "pipefail", "-c", code.replace(DEFAULT_URL, demo)])
    assert result.returncode == 0, f"{place}: {result.stderr}"
    assert result.stdout.strip(), place
    assert not re.match(r'\s*{"error"', result.stdout), f"{place}: {result.stdout}"


@pytest.mark.parametrize(
    ("page", "line", "code"), toml_blocks(), ids=lambda value: getattr(value, "name", None)
)
def test_toml_blocks_are_accepted(page: Path, line: int, code: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = tmp_path / f"{page.stem}-{line}.toml"
    path.write_text(code, encoding="utf-8")
    config.load(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for path, anchor in LOCAL_LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in slugs(target), f"{page.name}: {path}#{anchor}"
