"""Which models the upstreams have, and what each can do there: found out at the start, and again while something is open."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from infer_align.engines.openai.fanout import Fanout
from infer_align.engines.openai.probe import FEATURES, Probed, probe
from infer_align.errors import AlignError
from infer_align.upstream import KEY_REFUSED, UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

if TYPE_CHECKING:
    from infer_align.engines.openai import OpenAI
    from infer_align.engines.openai.steering import Steerer

log = logging.getLogger("infer_align")

# Where an upstream does not say how long its context is; only the worst case of a request without a maximum hangs on it.
CONTEXT_LENGTH = 8192
# Of an upstream that lists more models than this, the first so many are probed; the others are taken to be like its first.
MOST_PROBED = 8
# Questions that stay open are asked less and less often, at last every so many seconds.
SELDOM_SECONDS = 300.0


class Roster:
    """What is known of the upstreams of one engine.

    Attributes:
        models: the configured one; else those of all upstreams that were reached, in the order of the configuration, as listed.
        steerer: whose ways of steering are found out too, where there is one.
        probed: what each upstream can do with each model, by (URL, model).
    """

    def __init__(self, config: OpenAI, client: Client, fanout: Fanout) -> None:
        self.models: tuple[str, ...] = (config.model,) if config.model else ()
        self.steerer: Steerer | None = None
        self.probed: dict[tuple[str, str], Probed] = {}
        self._config = config
        self._client = client
        self._fanout = fanout
        self._listed: dict[
            str, dict[str, int | None]
        ] = {}  # URL -> model -> context length, where it is said
        self._about: dict[
            str, list[Probed]
        ] = {}  # model -> what is known of it, made when it is asked for
        self._due: dict[
            tuple[str, str], tuple[float, float]
        ] = {}  # when open questions are asked again, and the wait after that

    def can(self, model: str) -> frozenset[str]:
        """What every upstream that has the model was seen to do with it."""
        known = self._known(model)
        return (
            frozenset(FEATURES).intersection(*(probed.can for probed in known))
            if known
            else frozenset()
        )

    def ignores(self, model: str) -> frozenset[str]:
        """What one of them was seen to ignore."""
        return frozenset().union(*(probed.ignores for probed in self._known(model)))

    def limit(self, model: str) -> str:
        """How the model calls the limit on its tokens."""
        return next((probed.limit for probed in self._known(model)), "max_tokens")

    def context_length(self, model: str) -> int:
        """Of prompt and completion: the configured one, else the least that an upstream says of the model."""
        said = [length for names in self._listed.values() if (length := names.get(model))]
        return self._config.context_length or min(said, default=CONTEXT_LENGTH)

    def _known(self, model: str) -> list[Probed]:
        if model not in self._about:
            hosts = [
                host
                for host in self._client.pool.hosts
                if host.models is None or model in host.models
            ]
            pairs = ((host.url, self._stands_for(host, model)) for host in hosts)
            self._about[model] = [self.probed[pair] for pair in pairs if pair in self.probed]
        return self._about[model]

    def _stands_for(self, host: Host, model: str) -> str:
        """The model that was probed for this one."""
        names = self._names(host)
        return model if model in names else next(iter(names), model)

    def _names(self, host: Host) -> Sequence[str]:
        return (
            (self._config.model,)
            if self._config.model
            else tuple(self._listed.get(host.url, {}))[:MOST_PROBED]
        )

    async def reach(self, host: Host) -> None:
        """List its models where it was lost, and ask what is still open of them; a failure is noted on the host."""
        try:
            if host.down_reason is not None or (
                host.url not in self._listed and not self._config.model
            ):
                await self._list(host)
                self._due = {
                    key: due for key, due in self._due.items() if key[0] != host.url
                }  # it is back: ask at once
            if host.down_reason is None:
                await self._ask(host)
        except AlignError as error:
            host.record_failure(host.down_reason or error.message)
        except Exception:
            log.exception("reaching the upstream %s failed", host.url)
            host.record_failure("it answers what cannot be read")
        self._client.pool.wake()

    async def reach_all(self) -> None:
        """All of them at once."""
        await asyncio.gather(*(self.reach(host) for host in self._client.pool.hosts))

    async def _list(self, host: Host) -> None:
        try:
            async with asyncio.timeout(self._config.connect_timeout_seconds):
                listed = listed_models(await self._client.call_host(host, "/models"))
        except TimeoutError:
            host.record_failure("no answer in time")
            return
        except UpstreamFailed as error:
            if error.code == KEY_REFUSED or self._config.model is None:
                host.record_failure(error.message)
            if host.down_reason:
                raise
            listed = {}  # it is there, and lists nothing
        self._listed[host.url] = listed
        self._about.clear()
        if self._config.model is None:
            lists = (self._listed.get(one.url, {}) for one in self._client.pool.hosts)
            self.models = tuple(dict.fromkeys(name for names in lists for name in names))
            if not listed:
                host.record_failure("it lists no models; name one with model = '...'")
            host.models = frozenset(listed)
            return
        having = any(self._config.model in names for names in self._listed.values())
        for other in (
            self._client.pool.hosts
        ):  # one that lists others only is left out, where another lists it
            names = self._listed.get(other.url)
            other.models = frozenset(names) if names and having else None

    async def _ask(self, host: Host) -> None:
        """What is not known yet, and due."""
        for model in self._names(host):
            key, known = (host.url, model), self.probed.get((host.url, model))
            due, wait = self._due.get(key, (0.0, self._config.recovery_seconds))
            if (known and not known.unknown) or monotonic() < due:
                continue
            self._due[key] = monotonic() + wait, min(2 * wait, SELDOM_SECONDS)
            if self.steerer:
                await self.steerer.probe(self._client, host, model)
            self.probed[key] = await self._probe(host, model)
            self._about.clear()

    async def _probe(self, host: Host, model: str) -> Probed:
        given = frozenset(self._config.capabilities)
        found = Probed(given, frozenset(FEATURES) - given)
        if self._config.probe:
            found = await probe(self._client, host, model, self._config.probe_seconds)
        for verdict in ("can", "takes", "ignores", "unknown"):
            log.info(
                "upstream %s, model %s, %s: %s",
                host.url,
                model,
                verdict,
                ", ".join(sorted(getattr(found, verdict))) or "-",
            )
        if "n" in found.can | found.ignores and self._config.probe:
            self._fanout.settle(host, model, honours="n" in found.can)
        return found


def listed_models(answer: Any) -> dict[str, int | None]:
    """{id: context length, where it is said} of an upstream's /models."""
    data = answer.get("data") if isinstance(answer, dict) else None
    entries = [
        entry
        for entry in data or ()
        if isinstance(entry, dict) and isinstance(entry.get("id"), str)
    ]
    lengths = ("max_model_len", "context_length", "context_window")
    return {
        e["id"]: next(
            (e[name] for name in lengths if isinstance(e.get(name), int) and e[name] > 0), None
        )
        for e in entries
    }
