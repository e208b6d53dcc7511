"""Every example in README.md and docs/ runs, as it stands, against the embedded demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
DEFAULT = "http://127.0.0.1:8000"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in (".", "kernels", "server", "clients/python")
    ),
    "OPENAI_API_KEY": "unused",
}


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of each fenced block of that language."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, m.start()) + 2, m.group(2))
        for m in BLOCK.finditer(text)
        if m.group(1) == language
    ]


def commands(page: Path) -> list[tuple[int, str]]:
    """The bash blocks that ask the server something; the others install and start things."""
    return [
        (line, code)
        for language in ("bash", "sh")
        for line, code in blocks(page, language)
        if code.lstrip().startswith("curl")
    ]


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """The base url of `infer-align serve`, without a configuration: what README.md starts."""
    pytest.importorskip("torch")
    command = [
        sys.executable,
        "-m",
        "infer_align_server",
        "serve",
        "--set",
        "server.port=0",
        "--set",
        "server.log_level=error",
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as server:
        said: list[str] = []
        stderr = server.stderr
        assert stderr is not None
        reader = threading.Thread(target=lambda: said.extend(stderr))
        reader.start()
        end = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", "".join(list(said)))):
            assert server.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.05)
        yield found.group()
        server.terminate()
        assert server.wait(20) == 0
        reader.join()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page: Path, demo: str, tmp_path: Path) -> None:
    lines: list[str] = []
    for line, code in blocks(page, "python"):
        lines += [""] * (
            line - 1 - len(lines)
        ) + code.splitlines()  # a traceback names the page's own lines
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(lines).replace(DEFAULT, demo), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("page", "line", "code"),
    [(p, *c) for p in PAGES for c in commands(p)],
    ids=lambda v: getattr(v, "name", None),
)
def test_curl_blocks_are_answered(page: Path, line: int, code: str, demo: str) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code.replace(DEFAULT, demo)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:{line}: {done.stderr}"
    assert done.stdout.strip(), f"{page.name}:{line}"
    assert not re.match(r'\s*{"error"', done.stdout), f"{page.name}:{line}: {done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(
        r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")
    ):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
