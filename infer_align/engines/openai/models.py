"""The models of the upstreams, and the features that each upstream offers with each model.

Both are found when the engine starts. What is still unknown is checked again later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from infer_align.engines.openai.batch_size import BatchSizes, HostModel
from infer_align.engines.openai.probe import FEATURES, Features, LimitName, probe
from infer_align.errors import AlignError
from infer_align.upstream import KEY_REFUSED, UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

if TYPE_CHECKING:
    from infer_align.engines.openai import OpenAI
    from infer_align.engines.openai.steering import Steerer

log = logging.getLogger("infer_align")

# Context length if no upstream reports one. It only sets the worst case of a request that has no
# maximum of its own.
CONTEXT_LENGTH = 8192
# Only this many models of an upstream are probed; the others are assumed to be like the first.
MAX_PROBED = 8
# A probe that stays without an answer is repeated at growing intervals, up to this one.
MAX_PROBE_INTERVAL_SECONDS = 300.0
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
        steerer: finds out how each upstream can be steered; None without a tokenizer.
        features: (URL, model) -> the features that were found.
    """

    def __init__(self, config: OpenAI, client: Client, sizes: BatchSizes) -> None:
        self.names: tuple[str, ...] = (config.model,) if config.model else ()
        self.steerer: Steerer | None = None
        self.features: dict[HostModel, Features] = {}
        self._config = config
        self._client = client
        self._sizes = sizes
        # URL -> model -> context length, or None if the upstream does not report it.
        self._listed: dict[str, dict[str, int | None]] = {}
        # Model -> its features on every host; a cache.
        self._features_by_model: dict[str, list[Features]] = {}
        # (URL, model) -> the time of the next probe, and the interval after that.
        self._next_probe: dict[HostModel, tuple[float, float]] = {}

    # --- what is known ---

    def supported(self, model: str) -> frozenset[str]:
        """Return the features that every upstream of the model supports."""
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

    def context_length(self, model: str) -> int:
        """Return the configured context length, else the smallest that an upstream reports."""
        if self._config.context_length:
            return self._config.context_length
        lengths = []
        for models in self._listed.values():
            length = models.get(model)
            if length:
                lengths.append(length)
        return min(lengths, default=CONTEXT_LENGTH)

    def _features_of(self, model: str) -> list[Features]:
        if model not in self._features_by_model:
            self._features_by_model[model] = self._collect_features(model)
        return self._features_by_model[model]

    def _collect_features(self, model: str) -> list[Features]:
        features = []
        for host in self._client.pool.hosts:
            if host.models is not None and model not in host.models:
                continue
            key = host.url, self._probed_instead_of(host, model)
            if key in self.features:
                features.append(self.features[key])
        return features

    def _probed_instead_of(self, host: Host, model: str) -> str:
        """Return the model whose probe counts for this one."""
        probed = self._probed_models(host)
        if model in probed or not probed:
            return model
        return probed[0]

    def _probed_models(self, host: Host) -> Sequence[str]:
        if self._config.model:
            return (self._config.model,)
        return tuple(self._listed.get(host.url, {}))[:MAX_PROBED]

    # --- reaching the upstreams ---

    async def reach_all(self) -> None:
        """Reach every host at once."""
        await asyncio.gather(*(self.reach(host) for host in self._client.pool.hosts))

    async def reach(self, host: Host) -> None:
        """List the models of a host that was lost, and probe what is unknown.

        A failure is recorded in the state of the host.
        """
        unlisted = host.url not in self._listed and not self._config.model
        try:
            if host.down_reason is not None or unlisted:
                await self._list_models(host)
                self._probe_at_once(host)
            if host.down_reason is None:
                await self._probe_unknown(host)
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
        self._features_by_model.clear()
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

    # --- probing ---

    def _probe_at_once(self, host: Host) -> None:
        """Forget the intervals of a host that is back."""
        for key in tuple(self._next_probe):
            if key[0] == host.url:
                del self._next_probe[key]

    async def _probe_unknown(self, host: Host) -> None:
        """Probe each model of which something is unknown and whose next probe is due."""
        for model in self._probed_models(host):
            key = host.url, model
            features = self.features.get(key)
            due, interval = self._next_probe.get(key, (0.0, self._config.recovery_seconds))
            is_known = features is not None and not features.unknown
            if is_known or monotonic() < due:
                continue
            next_interval = min(2 * interval, MAX_PROBE_INTERVAL_SECONDS)
            self._next_probe[key] = monotonic() + interval, next_interval
            if self.steerer:
                await self.steerer.probe(self._client, host, model)
            self.features[key] = await self._find_features(host, model)
            self._features_by_model.clear()

    async def _find_features(self, host: Host, model: str) -> Features:
        if self._config.probe:
            features = await probe(self._client, host, model, self._config.probe_seconds)
        else:
            configured = frozenset(self._config.capabilities)
            features = Features(supported=configured, ignored=frozenset(FEATURES) - configured)
        for name in ("supported", "accepted", "ignored", "unknown"):
            listed = ", ".join(sorted(getattr(features, name))) or "-"
            log.info("upstream %s, model %s, %s: %s", host.url, model, name, listed)
        if self._config.probe and "n" in features.supported | features.ignored:
            self._sizes.set_probed(host, model, honours_n="n" in features.supported)
        return features


def parse_models(answer: Any) -> dict[str, int | None]:
    """Return {model: context length or None} of an upstream's answer to /models."""
    entries = answer.get("data") if isinstance(answer, dict) else None
    models = {}
    for entry in entries or ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            models[entry["id"]] = _context_length(entry)
    return models


def _context_length(entry: dict[str, Any]) -> int | None:
    for name in LENGTH_FIELDS:
        length = entry.get(name)
        if isinstance(length, int) and length > 0:
            return length
    return None
