"""The clients that people use, each as installed from the package index, on a running server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from infer_align.engines.fake import FakeEngine
from tests import environments
from tests.clients.engine import CLIENTS, describe, run_client

CASES = {
    "openai-1": "openai_sdk",
    "openai-2": "openai_sdk",
    "openai-3": "openai_sdk",
    "litellm": "litellm_sdk",
    "langchain": "langchain_sdk",
    "instructor": "instructor_sdk",
}
# Environments that tests of their own use.
OTHERS = ("chart", "open-webui", "playwright", "schemathesis")


def test_every_environment_is_tried() -> None:
    assert CASES.keys() == CLIENTS.keys()
    assert environments.names() == sorted([*CASES, *OTHERS])
    for name in environments.names():
        for line in (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines():
            assert line.count("==") == 1, f"{name}: {line} is no exact pin"


@pytest.mark.clients
@pytest.mark.parametrize("name", CASES)
def test_client(servers: dict[str, Any], name: str) -> None:
    urls = json.dumps({name: live.base_url for name, live in servers.items()})
    run_client(name, CASES[name], urls, seconds=110)
    for kind, live in servers.items():
        if isinstance(live.service.engine, FakeEngine):
            assert live.idle(), f"{name} left something running on the server {kind!r}"
        assert live.metric("infer_align_requests_total", status="500") == 0


@pytest.mark.clients
@pytest.mark.timeout(300)
@pytest.mark.parametrize("server", ["embedded", "upstream_embedded"])
@pytest.mark.parametrize("name", CLIENTS)
def test_client_on_a_real_model(servers: dict[str, Any], name: str, server: str) -> None:
    live = servers[server]
    run_client(name, CLIENTS[name], describe(live.base_url, "demo", "unused"), seconds=280)
    assert live.metric("infer_align_requests_total", status="500") == 0
    assert live.until(lambda: live.service.admission.running == 0)
