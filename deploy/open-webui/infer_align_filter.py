"""
title: infer-align
version: 0.1.0
license: Apache-2.0
description: Sliders for traits and candidates of an infer-align server, and a profile per user.
required_open_webui_version: 0.6.0
"""

# A filter function of Open WebUI: paste it under Admin Panel > Functions. It adds the object
# `align` to the requests of a chat; see docs/open-webui.md. It imports what Open WebUI brings.
# Open WebUI reads the text above as a header.
# ruff: noqa: D400, D415

from __future__ import annotations

import asyncio
import json
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

# The sliders: {trait of the server: what a user reads}. Change them to your own [traits.*].
TRAITS = {
    "cheerful": "More joy and excitement; below 0 for less.",
    "simple": "Short words and short sentences.",
    "brief": "Shorter answers.",
    "formal": "The style of a business letter; below 0 that of a chat.",
}
LOWEST_SCALE = -2.0
HIGHEST_SCALE = 4.0
MOST_CANDIDATES = 16
# A server that does not answer in this time is asked without the profile.
PROFILE_SECONDS = 3.0

Body = dict[str, Any]
Emitter = Callable[[dict[str, Any]], Awaitable[None]]


class _Form(BaseModel):
    """Valves whose field "Default" is sent as null."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value not in (None, "")}


class _UserForm(_Form):
    best_of_n: int = Field(
        default=1,
        ge=1,
        le=MOST_CANDIDATES,
        title="Candidates",
        description=f"Draw so many answers and keep the best one, 1 to {MOST_CANDIDATES}.",
    )
    profile: bool = Field(
        default=False,
        title="Use my profile",
        description="Answer as your earlier choices say. The profile has your user id as its name.",
    )


def _sliders() -> dict[str, Any]:
    """Return one field for each trait."""
    fields: dict[str, Any] = {}
    for trait, meaning in TRAITS.items():
        description = f"{meaning} 0 is off, 1 asks for it; {LOWEST_SCALE:g} to {HIGHEST_SCALE:g}."
        fields[trait] = (
            float,
            Field(default=0.0, ge=LOWEST_SCALE, le=HIGHEST_SCALE, description=description),
        )
    return fields


class Filter:
    """Open WebUI calls `inlet` before a request, and `stream` for each chunk of the answer."""

    class Valves(_Form):
        """An administrator sets these for all users."""

        priority: int = Field(default=0, description="Filters of lower numbers come first.")
        models: str = Field(
            default="",
            description="Models of infer-align, separated by commas; their presets are included. "
            "Empty: every model that the filter is attached to.",
        )
        base_url: str = Field(
            default="http://127.0.0.1:8000/v1",
            description="Address of the infer-align server, as in Open WebUI's connection.",
        )
        api_key: str = Field(default="", description="The key of that connection, if it has one.")
        show_reason: bool = Field(
            default=True, description="Show above an answer why it was chosen."
        )

    # What each user sets: the sliders come first.
    UserValves = create_model("UserValves", __base__=_UserForm, **_sliders())

    def __init__(self) -> None:
        """Begin with the defaults; Open WebUI puts its own valves in their place."""
        self.valves = self.Valves()
        # Open WebUI shows a switch for the filter below the message.
        self.toggle = True

    async def inlet(self, body: Body, __user__: dict[str, Any] | None = None) -> Body:
        """Return the request with the user's settings as `align`; keys that it has stay."""
        if not self._is_ours(str(body.get("model", ""))):
            return body
        user = __user__ or {}
        valves = user.get("valves") or self.UserValves()
        align: dict[str, Any] = {}
        scales = {trait: getattr(valves, trait) for trait in TRAITS if getattr(valves, trait)}
        if scales:
            align["guidance"] = {"scale": scales}
        if valves.best_of_n > 1:
            align["best_of_n"] = {"n": valves.best_of_n}
        if valves.profile and user.get("id") and await self._has_profile(user["id"]):
            align["profile"] = {"id": user["id"]}
        if not align:
            return body
        return {**body, "align": {**align, **(body.get("align") or {})}}

    async def stream(self, event: Body, __event_emitter__: Emitter | None = None) -> Body:
        """Return the chunk as it is, and show why the answer was chosen."""
        report = event.get("align")
        if isinstance(report, dict) and __event_emitter__ and self.valves.show_reason:
            data = {"description": report.get("reason", ""), "done": True}
            await __event_emitter__({"type": "status", "data": data})
        return event

    def _is_ours(self, model: str) -> bool:
        """Return True if the model is served by infer-align: other servers refuse `align`."""
        names = [name.strip() for name in self.valves.models.split(",") if name.strip()]
        return not names or model in names or model.partition("@")[0] in names

    async def _has_profile(self, user_id: str) -> bool:
        """Return True if the server has a profile of this name: the first choice makes it."""
        return await asyncio.to_thread(self._find_profile, user_id)

    def _find_profile(self, user_id: str) -> bool:
        name = urllib.parse.quote(user_id, safe="")
        url = f"{self.valves.base_url.rstrip('/')}/align/profiles/{name}"
        headers = {}
        if self.valves.api_key:
            headers["Authorization"] = f"Bearer {self.valves.api_key}"
        # The address is set by the administrator.
        request = urllib.request.Request(url, headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=PROFILE_SECONDS) as answer:  # noqa: S310
                return bool(json.load(answer).get("choices"))
        except (OSError, ValueError):
            # There is none, or it cannot be read now: the chat goes on without it.
            return False
