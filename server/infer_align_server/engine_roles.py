"""Protocols of engines that answer requests themselves, or pass them on.

Python looks at every method of a protocol for each check. So the service checks its engine
once, when it is made.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

from infer_align.engines import App
from infer_align.upstream.forward import ForwardedAnswer, ForwardedRequest


@runtime_checkable
class Forwards(Protocol):
    """An engine that passes requests on to servers behind it."""

    def passes(self, path: str) -> bool:
        """Return True if a route of the engine's servers is passed on."""

    def forward(self, request: ForwardedRequest) -> AbstractAsyncContextManager[ForwardedAnswer]:
        """Open a request at one of the engine's servers."""


@runtime_checkable
class ServesApplication(Protocol):
    """An engine with an ASGI application of its own, such as vLLM's."""

    def app(self) -> App | None:
        """Return the application, or None until the engine has started."""
