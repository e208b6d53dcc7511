"""Run a client's script on one engine: the same cases for every engine with a real model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests import environments

SCRIPTS = Path(__file__).parent / "scripts"
# The environment of each client, and its script.
CLIENTS = {
    "openai-1": "engine_openai",
    "openai-2": "engine_openai",
    "openai-3": "engine_openai",
    "litellm": "engine_litellm",
    "langchain": "engine_langchain",
    "instructor": "engine_instructor",
}


def describe(
    url: str,
    model: str,
    key: str,
    *,
    fields: Any = MappingProxyType({}),
) -> str:
    """Return the argument of a script.

    The server needs a reward "brevity". Its model may be tiny: schemas have few answers.

    Args:
        url: the base URL of the server.
        model: the name of the model.
        key: the API key.
        fields: fields that are added to requests with tools.
    """
    described = {"url": url, "model": model, "key": key, "fields": {**fields}}
    return json.dumps(described)


def run_client(environment: str, script: str, argument: str, seconds: float) -> None:
    """Run a script in a client's environment, and fail with its error if it fails."""
    done = subprocess.run(
        [environments.program(environment), str(SCRIPTS / f"{script}.py"), argument],
        env=environments.variables(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("ok")
