"""The clients that people use, each as installed from the package index, on a running server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infer_align.engines.fake import FakeEngine
from tests import environments

SCRIPTS = Path(__file__).parent / "scripts"
CASES = {
    "openai-1": "openai_sdk",
    "openai-2": "openai_sdk",
    "openai-3": "openai_sdk",
    "litellm": "litellm_sdk",
    "langchain": "langchain_sdk",
    "instructor": "instructor_sdk",
}


def test_every_environment_is_tried() -> None:
    assert environments.names() == sorted([*CASES, "open-webui", "playwright", "schemathesis"])
    for name in environments.names():
        for line in (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines():
            assert line.count("==") == 1, f"{name}: {line} is no exact pin"


@pytest.mark.clients
@pytest.mark.parametrize("name", CASES)
def test_client(servers: dict[str, Any], name: str) -> None:
    python = environments.program(name)
    urls = json.dumps({name: live.base_url for name, live in servers.items()})
    done = subprocess.run(
        [python, str(SCRIPTS / f"{CASES[name]}.py"), urls],
        env=environments.variables(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("ok")
    for kind, live in servers.items():
        if isinstance(live.service.engine, FakeEngine):
            assert live.idle(), f"{name} left something running on the server {kind!r}"
        assert live.metric("infer_align_requests_total", status="500") == 0
