"""The filter function for Open WebUI, called as Open WebUI calls filters.

One test runs Open WebUI's own code, in an environment of its own. In the other tests `Host` does
what Open WebUI's loader and its `process_filter_functions` do with the source text of a function,
the valves of its database, and the parameters that a handler names.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests import environments
from tests.server.conftest import Live, Serve

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "deploy/open-webui/infer_align_filter.py"
FILTER_ID = "infer_align"
ANN = "5b1f0c5e-9c59-4a6e-8f0b-2f4c9a3b7d10"
KEPT = """
[server]
default_rewards = {number = 1.0, brevity = 0.0}
[profiles]
store = "sqlite+aiosqlite:///STORE"
spreads = {number = 3.0, brevity = 1.0}
[engine]
kind = "fake"
replies = [{text = "candidate 3"}, {text = "1"}, {text = "more than candidate 9"}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.brevity]
kind = "rules"
words_weight = -1.0
"""


class Host:
    """Open WebUI, as far as a filter sees it."""

    def __init__(self, valves: dict[str, Any] | None = None) -> None:
        module = types.ModuleType(f"function_{FILTER_ID}")
        sys.modules[module.__name__] = module
        exec(SOURCE.read_text(encoding="utf-8"), module.__dict__)
        self.function = module.Filter()
        self.valves = valves or {}
        # {user id: what the user has saved}
        self.user_valves: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    async def _emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    async def _process(self, kind: str, form_data: Any, user_id: str) -> Any:
        handler = getattr(self.function, kind, None)
        if handler is None:
            return form_data
        self.function.valves = self.function.Valves(**self.valves)
        parameters = inspect.signature(handler).parameters
        extra = {
            "__user__": {"id": user_id, "email": "ann@example.com", "role": "user"},
            "__event_emitter__": self._emit,
            "__metadata__": {"chat_id": "c1"},
            "__model__": {"id": "fake"},
            "__id__": FILTER_ID,
        }
        arguments = {key: value for key, value in extra.items() if key in parameters}
        if "__user__" in arguments:
            saved = self.user_valves.get(user_id, {})
            arguments["__user__"]["valves"] = self.function.UserValves(**saved)
        arguments["event" if kind == "stream" else "body"] = form_data
        if inspect.iscoroutinefunction(handler):
            return await handler(**arguments)
        return handler(**arguments)

    def process(self, kind: str, form_data: Any, user_id: str = ANN) -> Any:
        """Return what a handler makes of a request or of a chunk."""
        return asyncio.run(self._process(kind, form_data, user_id))

    def chat(self, live: Live, user_id: str = ANN) -> Any:
        """Send a chat request through the filter; return its last report and its text."""
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": "fake", "stream": True, "messages": messages}
        answer = live.post(self.process("inlet", body, user_id))
        assert answer.status_code == 200, answer.text
        text = ""
        report = None
        for line in answer.text.splitlines():
            if not line.startswith("data: {"):
                continue
            chunk = self.process("stream", json.loads(line.removeprefix("data: ")), user_id)
            report = chunk.get("align", report)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
        return text, report


@pytest.fixture
def live(serve: Serve, tmp_path: Path) -> Live:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    return serve(KEPT.replace("STORE", str(tmp_path / "profiles.db")))


def test_the_source_begins_as_open_webui_reads_it() -> None:
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    assert lines[0] == '"""'
    header = dict(line.split(": ", 1) for line in lines[1 : lines.index('"""', 1)])
    assert {"title", "version", "description"} <= header.keys()
    assert "requirements" not in header, "an offline Open WebUI installs nothing"


def test_untouched_sliders_leave_a_request_as_it_is() -> None:
    body = {"model": "fake", "messages": []}
    assert Host().process("inlet", dict(body)) == body


def test_each_slider_becomes_a_key_of_align() -> None:
    host = Host()
    # The page of Open WebUI sends numbers as text, and null for a field on "Default".
    host.user_valves[ANN] = {"cheerful": "1.5", "formal": -1, "brief": None, "best_of_n": "4"}
    body = host.process("inlet", {"model": "fake", "messages": []})
    assert body["align"] == {
        "guidance": {"scale": {"cheerful": 1.5, "formal": -1.0}},
        "best_of_n": {"n": 4},
    }
    other = host.process("inlet", {"model": "fake", "messages": []}, "bob")
    assert "align" not in other, "a user gets the sliders of another"


def test_keys_that_the_request_brings_stay() -> None:
    host = Host()
    host.user_valves[ANN] = {"best_of_n": 4}
    body = {"model": "fake", "messages": [], "align": {"best_of_n": {"n": 2}}}
    assert host.process("inlet", body)["align"] == {"best_of_n": {"n": 2}}


@pytest.mark.parametrize(
    ("model", "is_aligned"), [("ours", True), ("ours@brief", True), ("gpt-5", False)]
)
def test_models_of_other_servers_are_left_alone(model: str, *, is_aligned: bool) -> None:
    host = Host({"models": "ours, mine"})
    host.user_valves[ANN] = {"best_of_n": 4}
    body = host.process("inlet", {"model": model, "messages": []})
    assert ("align" in body) is is_aligned


@pytest.mark.parametrize(
    "saved", [{"cheerful": 9}, {"cheerful": "much"}, {"best_of_n": 0}, {"best_of_n": 17}]
)
def test_a_value_out_of_range_is_refused_when_it_is_saved(saved: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Host().function.UserValves(**saved)


def test_the_sliders_are_described_in_their_schema() -> None:
    schema = Host().function.UserValves.model_json_schema()["properties"]
    assert {"cheerful", "simple", "brief", "formal", "best_of_n", "profile"} == schema.keys()
    assert all(field["description"] for field in schema.values())


def test_the_reason_of_the_choice_is_shown(live: Live) -> None:
    host = Host()
    host.user_valves[ANN] = {"best_of_n": 3}
    text, report = host.chat(live)
    assert text == "more than candidate 9"
    (event,) = host.events
    assert event == {"type": "status", "data": {"description": report["reason"], "done": True}}
    quiet = Host({"show_reason": False})
    quiet.user_valves = host.user_valves
    quiet.chat(live)
    assert quiet.events == []


def test_the_profile_of_a_user_has_the_id_of_the_user(live: Live) -> None:
    host = Host({"base_url": live.base_url})
    host.user_valves = {
        ANN: {"best_of_n": 3, "profile": True},
        "bob": {"best_of_n": 3, "profile": 1},
    }
    text, report = host.chat(live)
    assert (text, "profile" in report) == ("more than candidate 9", False), "there is no choice yet"
    choice = {
        "profile": ANN,
        "messages": [{"role": "user", "content": "hi"}],
        "candidates": ["1", "more than candidate 9"],
        "chosen": 0,
    }
    for _ in range(5):
        assert live.post(choice, "/v1/align/feedback").status_code == 200
    text, report = host.chat(live)
    assert (text, report["profile"]["id"]) == ("1", ANN)
    text, report = host.chat(live, "bob")
    assert (text, "profile" in report) == ("more than candidate 9", False)


def test_a_server_that_is_out_of_reach_leaves_the_profile_out() -> None:
    host = Host({"base_url": "http://127.0.0.1:9/v1"})
    host.user_valves[ANN] = {"best_of_n": 3, "profile": True}
    body = host.process("inlet", {"model": "fake", "messages": []})
    assert body["align"] == {"best_of_n": {"n": 3}}


@pytest.mark.clients
def test_the_code_of_open_webui_loads_and_calls_the_filter(live: Live, tmp_path: Path) -> None:
    python = environments.program("open-webui")
    script = Path(__file__).parent / "scripts/webui_filter.py"
    folder = tmp_path / "data"
    folder.mkdir()
    settings = {"DATA_DIR": str(folder), "WEBUI_SECRET_KEY": "test", "OFFLINE_MODE": "true"}
    done = subprocess.run(
        [python, str(script), json.dumps({"kept": live.base_url})],
        env={**environments.variables(), **settings},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith("ok")
