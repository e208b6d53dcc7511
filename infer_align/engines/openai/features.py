"""The features that each upstream offers with each model, looked for when a request needs them.

    probe = "lazy"    a feature is probed at its first need, for that model alone
    probe = "start"   every feature of the first models is probed at the start
    probe = false     nothing is probed; the configured features count

What was found is remembered. A probe without an answer is repeated at the next need, at growing
intervals. Requests that need the same feature at the same time share one probe.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from infer_align.engines.openai.batch_size import BatchSizes, HostModel
from infer_align.engines.openai.probe import (
    FEATURES,
    NOTHING_KNOWN,
    Features,
    LimitName,
    probe,
)
from infer_align.engines.openai.ways import TOKENWISE, UpstreamWays
from infer_align.errors import AlignError
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

if TYPE_CHECKING:
    from infer_align.engines.openai import OpenAI

log = logging.getLogger("infer_align")

# A probe that stays without an answer is repeated at growing intervals, up to this one.
MAX_PROBE_INTERVAL_SECONDS = 300.0

_ProbeKey = tuple[str, str, str]  # URL, model, feature


class UpstreamFeatures:
    """The features of one engine's upstreams.

    Args:
        config: the section of the engine.
        client: the upstreams.
        sizes: gets the results of probes for the parameter `n`.
        probed_at_start: returns the models of a host that `probe = "start"` looks at.

    Attributes:
        ways: how each upstream continues a prefix; None without a tokenizer.
        by_model: (URL, model) -> what was found out.
    """

    def __init__(
        self,
        config: OpenAI,
        client: Client,
        sizes: BatchSizes,
        probed_at_start: Callable[[Host], Sequence[str]],
    ) -> None:
        self.ways: UpstreamWays | None = None
        self.by_model: dict[HostModel, Features] = {}
        self._config = config
        self._client = client
        self._sizes = sizes
        self._probed_at_start = probed_at_start
        self._running: dict[_ProbeKey, asyncio.Task[None]] = {}
        # The time of the next probe, and the interval after that.
        self._next_probe: dict[_ProbeKey, tuple[float, float]] = {}

    @property
    def probes_at_start(self) -> bool:
        """Return True if features are looked for at the start."""
        return self._config.probe in {"start", True}

    # --- what is known ---

    def supported(self, model: str) -> frozenset[str]:
        """Return the features that every upstream of the model is known to support."""
        features = self._features_of(model)
        if not features:
            return frozenset()
        return frozenset.intersection(*(each.supported for each in features))

    def ignored(self, model: str) -> frozenset[str]:
        """Return the features that at least one upstream of the model ignores."""
        return frozenset().union(*(each.ignored for each in self._features_of(model)))

    def limit_name(self, model: str) -> LimitName:
        """Return the field that limits the completion tokens of the model."""
        features = self._features_of(model)
        return features[0].limit_name if features else "max_tokens"

    def unknown(self, model: str, features: Collection[str]) -> frozenset[str]:
        """Return the features that are unknown for an upstream that serves the model now."""
        unknown: set[str] = set()
        for host in self._hosts_of(model):
            unknown |= self._unknown_on(host, self._probed_instead_of(host, model), features)
        return frozenset(unknown)

    def due(self, model: str, features: Collection[str]) -> frozenset[str]:
        """Return the unknown features that may be probed now."""
        due: set[str] = set()
        for host in self._hosts_of(model):
            due |= self._due_on(host, self._probed_instead_of(host, model), features)
        return frozenset(due)

    def _features_of(self, model: str) -> list[Features]:
        features = []
        for host in self._client.pool.hosts:
            if host.models is not None and model not in host.models:
                continue
            result = self._known(host, self._probed_instead_of(host, model))
            if result is not NOTHING_KNOWN:
                features.append(result)
        return features

    def _hosts_of(self, model: str) -> list[Host]:
        """Return the hosts that serve the model and can be reached."""
        hosts = []
        for host in self._client.pool.hosts:
            is_listed = host.models is None or model in host.models
            if is_listed and host.down_reason is None:
                hosts.append(host)
        return hosts

    def _known(self, host: Host, model: str) -> Features:
        if self._config.probe is False:
            configured = frozenset(self._config.capabilities)
            return Features(supported=configured, ignored=frozenset(FEATURES) - configured)
        return self.by_model.get((host.url, model), NOTHING_KNOWN)

    def _probed_instead_of(self, host: Host, model: str) -> str:
        """Return the model whose probe counts for this one."""
        probed = self._probed_at_start(host) if self.probes_at_start else ()
        return model if model in probed or not probed else probed[0]

    def _unknown_on(self, host: Host, model: str, features: Collection[str]) -> set[str]:
        unknown = set(self._known(host, model).unknown.intersection(features))
        if self.ways is None:
            return unknown
        for need in TOKENWISE:
            if need in features and not self.ways.knows(need, host, model):
                unknown.add(need)
        return unknown

    def _due_on(self, host: Host, model: str, features: Collection[str]) -> set[str]:
        now = monotonic()
        due = set()
        for feature in self._unknown_on(host, model, features):
            time, _ = self._next_probe.get((host.url, model, feature), (0.0, 0.0))
            if time <= now:
                due.add(feature)
        return due

    # --- probing ---

    async def find(self, model: str, features: Collection[str]) -> None:
        """Probe the unknown ones of these features on each upstream that serves the model now."""
        tasks: set[asyncio.Task[None]] = set()
        for host in self._hosts_of(model):
            tasks |= self._probes(host, self._probed_instead_of(host, model), features)
        # A client that leaves must not end a probe that others wait for.
        await asyncio.gather(*(asyncio.shield(task) for task in tasks))

    async def find_at_start(self, host: Host) -> None:
        """Probe everything that is unknown about the first models of a host, if so configured."""
        if not self.probes_at_start:
            return
        for model in self._probed_at_start(host):
            tasks = self._probes(host, model, (*FEATURES, *TOKENWISE))
            await asyncio.gather(*tasks)

    def forget_intervals(self, host: Host) -> None:
        """Probe again at the next need: the host is back."""
        for key in tuple(self._next_probe):
            if key[0] == host.url:
                del self._next_probe[key]

    def close(self) -> None:
        """Cancel all probes."""
        for task in set(self._running.values()):
            task.cancel()

    def _probes(self, host: Host, model: str, features: Collection[str]) -> set[asyncio.Task[None]]:
        """Return the probes of the features that are due: running ones, and one for the rest."""
        tasks: set[asyncio.Task[None]] = set()
        keys: list[_ProbeKey] = []
        for feature in sorted(self._due_on(host, model, features)):
            key = host.url, model, feature
            if key in self._running:
                tasks.add(self._running[key])
            else:
                keys.append(key)
        if keys:
            task = asyncio.create_task(self._probe(host, model, keys))
            tasks.add(task)
            self._running |= dict.fromkeys(keys, task)
        return tasks

    async def _probe(self, host: Host, model: str, keys: Sequence[_ProbeKey]) -> None:
        features = [feature for _, _, feature in keys]
        try:
            await self._find_on(host, model, features)
        except AlignError as error:
            log.warning("upstream %s, model %s: a probe failed: %s", host.url, model, error)
        finally:
            for key in keys:
                del self._running[key]
            self._schedule(host, model, keys)

    async def _find_on(self, host: Host, model: str, features: Sequence[str]) -> None:
        probed = [feature for feature in features if feature not in TOKENWISE]
        if probed:
            seconds = self._config.probe_seconds
            result = await probe(self._client, host, model, seconds, probed)
            self.by_model[host.url, model] = self._known(host, model).updated(result)
            self._log(host, model, result)
            if "n" in result.supported | result.ignored:
                self._sizes.set_probed(host, model, honours_n="n" in result.supported)
        needs = [feature for feature in features if feature in TOKENWISE]
        if needs and self.ways:
            await self.ways.find(needs, self._client, host, model)

    def _schedule(self, host: Host, model: str, keys: Sequence[_ProbeKey]) -> None:
        """Set the time of the next probe of each feature that is still unknown."""
        for key in keys:
            _, interval = self._next_probe.pop(key, (0.0, self._config.recovery_seconds))
            if self._unknown_on(host, model, {key[2]}):
                following = min(2 * interval, MAX_PROBE_INTERVAL_SECONDS)
                self._next_probe[key] = monotonic() + interval, following

    def _log(self, host: Host, model: str, result: Features) -> None:
        for name in ("supported", "accepted", "ignored", "refused", "unknown"):
            listed = ", ".join(sorted(getattr(result, name)))
            if listed:
                log.info("upstream %s, model %s, %s: %s", host.url, model, name, listed)
