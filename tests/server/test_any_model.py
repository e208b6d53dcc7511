"""`infer-align serve MODEL` and `serve --upstream URL` serve models under their own names."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align_server import cli
from infer_align_server.arguments import configuration
from tests.server.conftest import Serve, end, start
from tests.server.processes import LOCAL, Process

pytestmark = pytest.mark.slow


def names(url: str) -> list[str]:
    return [entry["id"] for entry in httpx2.get(f"{url}/v1/models", **LOCAL).json()["data"]]


def ask(url: str, **fields: Any) -> httpx2.Response:
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 3, **fields}
    return httpx2.post(f"{url}/v1/chat/completions", json=body, **LOCAL)


@pytest.mark.parametrize("form", ["{model}", "--model={model}", "--set=engine.model={model}"])
def test_a_folder_is_served_under_its_name(language_model: Callable[..., str], form: str) -> None:
    model = language_model("Llama")
    name = Path(model).name
    # The server of the command, in this process: it has loaded torch already.
    options = cli.make_parser().parse_args(["serve", form.format(model=model)])
    live = start(configuration(options))
    url = live.root
    assert names(url) == [name]
    answer = ask(url, model=name)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    rewards = httpx2.get(f"{url}/v1/align/methods", **LOCAL).json()["rewards"]
    assert list(rewards) == ["trust_judge"], "no reward of the demo"
    end(live)


def test_every_model_of_an_upstream_is_served(
    serve: Serve, command: Callable[..., Process]
) -> None:
    upstream = serve('[engine]\nkind = "fake"\nmodel = "smol"\n[presets.b]\n')
    forms = [
        ["--upstream", upstream.base_url],
        ["--set", "engine.kind=openai", "--set", f"engine.urls={upstream.base_url}"],
    ]
    for form in forms:
        server = command(*form)
        url = server.url()
        # The preset is a model of its own to whoever stands before this server.
        assert names(url) == ["smol", "smol@b"]
        for name in ("smol", "smol@b"):
            answer = ask(url, model=name)
            assert answer.status_code == 200, answer.text
        assert ask(url).json()["choices"][0]["message"]["content"]
        server.popen.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_one_model_of_an_upstream_can_be_chosen_and_renamed(
    serve: Serve, command: Callable[..., Process]
) -> None:
    upstream = serve('[engine]\nkind = "fake"\nmodel = "smol"\n[presets.b]\n')
    url = command("--upstream", upstream.base_url, "--model", "smol@b", "--name", "mine").url()
    assert names(url) == ["mine"]
    assert ask(url, model="mine").status_code == 200
    assert upstream.engine.bodies[-1]["model"] == "smol"
