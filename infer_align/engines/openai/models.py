"""The models of the upstreams: listed at the start, and again when an upstream comes back.

Listing costs nothing. What each model can do is in `features.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from infer_align.engines.openai.batch_size import BatchSizes
from infer_align.engines.openai.features import UpstreamFeatures
from infer_align.errors import AlignError
from infer_align.upstream import KEY_REFUSED, UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

if TYPE_CHECKING:
    from infer_align.engines.openai import OpenAI

log = logging.getLogger("infer_align")

# Context length if no upstream reports one. It only sets the worst case of a request that has no
# maximum of its own.
CONTEXT_LENGTH = 8192
# With `probe = "start"`, only this many models of an upstream are probed; the others are assumed to
# be like the first.
MAX_PROBED = 8
# Names that servers use for the context length of a listed model.
LENGTH_FIELDS = ("max_model_len", "context_length", "context_window")


class UpstreamModels:
    """The models of one engine's upstreams.

    Args:
        config: the section of the engine.
        client: the upstreams.
        sizes: gets the results of probes for the parameter `n`.

    Attributes:
        names: the configured model; else the models of all upstreams that were reached, in the
            order of the configuration and of their lists.
        features: what each upstream offers with each model.
    """

    def __init__(self, config: OpenAI, client: Client, sizes: BatchSizes) -> None:
        self.names: tuple[str, ...] = (config.model,) if config.model else ()
        self.features = UpstreamFeatures(config, client, sizes, self._probed_models)
        self._config = config
        self._client = client
        # URL -> model -> context length, or None if the upstream does not report it.
        self._listed: dict[str, dict[str, int | None]] = {}

    # --- what is known ---

    def context_length(self, model: str) -> int:
        """Return the context length if it is known, else a usual one."""
        return self.known_context_length(model) or CONTEXT_LENGTH

    def known_context_length(self, model: str) -> int | None:
        """Return the configured context length, else the smallest that an upstream reports."""
        if self._config.context_length:
            return self._config.context_length
        lengths = []
        for models in self._listed.values():
            length = models.get(model)
            if length:
                lengths.append(length)
        return min(lengths, default=None)

    def _probed_models(self, host: Host) -> Sequence[str]:
        if self._config.model:
            return (self._config.model,)
        return tuple(self._listed.get(host.url, {}))[:MAX_PROBED]

    # --- reaching the upstreams ---

    async def reach_all(self) -> None:
        """Reach every host at once."""
        await asyncio.gather(*(self.reach(host) for host in self._client.pool.hosts))

    async def reach(self, host: Host) -> None:
        """List the models of a host that was lost.

        With `probe = "start"`, also probe what is unknown.

        A failure is recorded in the state of the host.
        """
        unlisted = host.url not in self._listed and not self._config.model
        try:
            if host.down_reason is not None or unlisted:
                await self._list_models(host)
                self.features.forget_intervals(host)
            if host.down_reason is None:
                await self.features.find_at_start(host)
        except AlignError as error:
            host.record_failure(host.down_reason or error.message)
        except Exception:
            log.exception("reaching the upstream %s failed", host.url)
            host.record_failure("its answer cannot be read")
        self._client.pool.wake()

    async def _list_models(self, host: Host) -> None:
        try:
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                listed = parse_models(await self._client.call_host(host, "/models"))
        except TimeoutError:
            host.record_failure("no answer in time")
            return
        except UpstreamFailed as error:
            if error.code == KEY_REFUSED or self._config.model is None:
                host.record_failure(error.message)
            if host.down_reason:
                raise
            # It answers, and has no list of models.
            listed = {}
        self._listed[host.url] = listed
        if self._config.model is None:
            self._serve_listed(host)
        else:
            self._leave_out_hosts_without(self._config.model)

    def _serve_listed(self, host: Host) -> None:
        """Serve every listed model, those of the first upstream first."""
        names: dict[str, None] = {}
        for each in self._client.pool.hosts:
            names |= dict.fromkeys(self._listed.get(each.url, {}))
        self.names = tuple(names)
        listed = self._listed[host.url]
        if not listed:
            host.record_failure("it lists no models; name one with model = '...'")
        host.models = frozenset(listed)

    def _leave_out_hosts_without(self, model: str) -> None:
        """Use only the hosts that list the configured model, if any does."""
        is_listed = any(model in names for names in self._listed.values())
        for host in self._client.pool.hosts:
            names = self._listed.get(host.url)
            host.models = frozenset(names) if names and is_listed else None


def parse_models(answer: Any) -> dict[str, int | None]:
    """Return {model: context length or None} of an upstream's answer to /models."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    models = {}
    for entry in entries or ():
        name = entry.get("id") if isinstance(entry, dict) else None
        if name and isinstance(name, str):
            models[name] = _context_length(entry)
    return models


def _context_length(entry: dict[str, Any]) -> int | None:
    for name in LENGTH_FIELDS:
        length = entry.get(name)
        if isinstance(length, int) and length > 0:
            return length
    return None
