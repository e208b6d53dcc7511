"""The filter of deploy/open-webui, loaded, configured and called by Open WebUI's own code.

Its database, its loader of functions, its valves and `process_filter_functions` are real; no model
and no page is started.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from open_webui.internal.db import Base, engine
from open_webui.models.functions import FunctionForm, Functions
from open_webui.models.users import Users
from open_webui.utils.filter import (
    get_filter_context,
    process_filter_functions,
    resolve_filter_pipeline,
)
from open_webui.utils.plugin import load_function_module_by_id, resolve_valves_schema_options

SOURCE = Path(__file__).parents[3] / "deploy/open-webui/infer_align_filter.py"
FILTER_ID = "infer_align"
ANN = "5b1f0c5e-9c59-4a6e-8f0b-2f4c9a3b7d10"
MESSAGES = [{"role": "user", "content": "hi"}]
# As Open WebUI lists a model that a connection serves and that the filter is attached to.
MODEL = {"id": "fake", "owned_by": "openai", "info": {"meta": {"filterIds": [FILTER_ID]}}}


class Chat:
    """One chat of a user, as Open WebUI's middleware drives filters."""

    def __init__(self, app: SimpleNamespace, user_id: str) -> None:
        self.request = SimpleNamespace(app=app, state=SimpleNamespace())
        self.user = {"id": user_id, "email": "ann@example.com", "name": "Ann", "role": "user"}
        self.events: list[dict[str, Any]] = []

    async def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    async def process(self, kind: str, form_data: dict[str, Any]) -> dict[str, Any]:
        _, functions = await resolve_filter_pipeline(self.request, MODEL, [FILTER_ID])
        assert [function.id for function in functions] == [FILTER_ID]
        changed, _ = await process_filter_functions(
            request=self.request,
            filter_context=get_filter_context(self.request),
            filter_functions=functions,
            filter_type=kind,
            form_data=form_data,
            extra_params={
                "__user__": self.user,
                "__event_emitter__": self.emit,
                "__metadata__": {"chat_id": "c1"},
                "__model__": MODEL,
            },
        )
        return changed

    async def send(self, url: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Return the text, the report, and the request that the filter made."""
        body = {"model": "fake", "stream": True, "messages": MESSAGES}
        body = await self.process("inlet", body)
        text, report = "", {}
        for line in await asyncio.to_thread(post, url, "/chat/completions", body):
            if not line.startswith("data: {"):
                continue
            chunk = await self.process("stream", json.loads(line.removeprefix("data: ")))
            report = chunk.get("align", report)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
        return text, report, body


def post(url: str, path: str, body: dict[str, Any]) -> list[str]:
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, content, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode().splitlines()


async def install() -> None:
    """Save the filter and its users as the pages of Open WebUI do."""
    content = SOURCE.read_text(encoding="utf-8")
    function, kind, header, _ = await load_function_module_by_id(FILTER_ID, content)
    assert kind == "filter"
    assert header["title"] == "infer-align"
    assert "requirements" not in header
    for form in (function.Valves, function.UserValves):
        schema = resolve_valves_schema_options(form, form.schema())
        assert all(field["description"] for field in schema["properties"].values())
    form = FunctionForm(
        id=FILTER_ID, name="infer-align", content=content, meta={"manifest": header}
    )
    await Functions.insert_new_function("admin", kind, form, module=function)
    await Functions.update_function_by_id(FILTER_ID, {"is_active": True})
    for user_id in (ANN, "bob"):
        await Users.insert_new_user(user_id, user_id, f"{user_id}@example.com", role="user")


async def set_valves(user_id: str, **valves: Any) -> None:
    saved = await Functions.update_user_valves_by_id_and_user_id(FILTER_ID, user_id, valves)
    assert saved == valves


async def main(url: str) -> None:
    Base.metadata.create_all(engine)
    await install()
    app = SimpleNamespace(state=SimpleNamespace())

    text, report, body = await Chat(app, ANN).send(url)
    assert "align" not in body, "sliders that no one has touched change nothing"
    assert report == {}

    # The page saves numbers as text, and null for a field on "Default".
    await set_valves(ANN, best_of_n="4", cheerful=None, profile=True)
    await Functions.update_function_valves_by_id(FILTER_ID, {"base_url": url})
    chat = Chat(app, ANN)
    text, report, body = await chat.send(url)
    assert body["align"] == {"best_of_n": {"n": 4}}, "there is no choice yet"
    (event,) = chat.events
    expected = {"description": report["reason"], "done": True}
    assert event == {"type": "status", "data": expected}
    _, report, body = await Chat(app, "bob").send(url)
    assert "align" not in body, "a user gets the sliders of another"

    choice = {
        "profile": ANN,
        "messages": MESSAGES,
        "candidates": ["candidate 1", "more words than candidate 9"],
        "chosen": 0,
    }
    post(url, "/align/feedback", choice)
    text, report, body = await Chat(app, ANN).send(url)
    assert body["align"]["profile"] == {"id": ANN}
    assert report["profile"]["choices"] == 1

    await Functions.update_function_valves_by_id(FILTER_ID, {"models": "another"})
    _, _, body = await Chat(app, ANN).send(url)
    assert "align" not in body, "models of other servers are left alone"

    # The switch below the message is off: the chat does not name the filter.
    functions = await resolve_filter_pipeline(Chat(app, ANN).request, MODEL, [])
    assert functions == ([], [])
    print("ok", text)


asyncio.run(main(json.loads(sys.argv[1])["kept"]))
