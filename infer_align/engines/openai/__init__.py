"""Any OpenAI-compatible server as the engine: the client's body goes there whole, what comes back is kept whole.

    check, sample ─▶ Drawing (draws.py): as few calls as the upstream honours ─▶ choices (choices.py) ─▶ Stream
    start ─▶ capabilities (probe.py), asked with calls of one token; read_labels ─▶ labels.py; vas ─▶ steering.py

The upstreams, their keys and their health are `infer_align.upstream`. Of a request, only the model's name chooses among them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from infer_align.engines import Engine, Stream
from infer_align.engines.openai.draws import Drawing, Fanout
from infer_align.engines.openai.labels import read_labels
from infer_align.engines.openai.probe import FEATURES, FIELDS, Probed, probe
from infer_align.errors import AlignError, ConfigError, Unavailable, Unsupported
from infer_align.types import Body, Capability, Draw, LabelQuery, LabelReading
from infer_align.upstream import KEY_REFUSED, Upstream, UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host

if TYPE_CHECKING:
    from infer_align.engines.openai.steering import Steered, Steerer

log = logging.getLogger("infer_align")

# Where an upstream does not say how long its context is; only the worst case of a request without a maximum hangs on it.
CONTEXT_LENGTH = 8192
_CAPABILITIES = frozenset(capability.value for capability in Capability)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAI(Upstream):
    """One or several OpenAI-compatible servers."""

    model: str | None = field(
        default=None,
        metadata={"description": "the upstream's model; without it every model that it lists is served under its name"},
    )
    n: Literal["auto", "native", "single"] = field(
        default="auto",
        metadata={"description": "several candidates by one call, by one call each, or as what comes back shows to be possible"},
    )
    context_length: int | None = field(
        default=None,
        metadata={"ge": 1, "description": f"tokens of prompt and completion; default: the upstream's, or {CONTEXT_LENGTH}"},
    )
    probe: bool = field(
        default=True, metadata={"description": "find out at the start, by calls of one token, what the upstream can do"}
    )
    probe_seconds: float = field(default=20.0, metadata={"gt": 0, "description": "for all probes of an upstream together"})
    capabilities: tuple[str, ...] = field(
        default=("completion", "seed", "logprobs", "tools", "structured", "n", "logit_bias"),
        metadata={"description": f"what it can do, where probe is false; of: {', '.join(FEATURES)}"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"description": "path or hub id of the upstream model's tokenizer, which vas needs to steer it"}
    )

    def load(self) -> OpenAIEngine:
        """The engine, its upstreams not yet reached.

        Raises:
            ConfigError: urls, key or capabilities are wrong.
        """
        if unknown := sorted(set(self.capabilities) - set(FEATURES)):
            raise ConfigError(f"capabilities: {unknown[0]!r} is not one of them; known: {', '.join(FEATURES)}.")
        return OpenAIEngine(self)


plugin = OpenAI


class OpenAIEngine(Engine):
    """Forwards draws. `start` does not fail where no upstream can be reached: it keeps trying, and `health` says so.

    Attributes:
        client: the upstreams.
        probed: what each upstream can do, by URL.
    """

    def __init__(self, config: OpenAI) -> None:
        self.config = config
        self.client = Client(config)
        self.probed: dict[str, Probed] = {}
        self.context_length = config.context_length or CONTEXT_LENGTH
        self._models: tuple[str, ...] = (config.model,) if config.model else ()
        self._fanout = Fanout(config.n)
        self._drawings: set[Drawing | Steered] = set()
        self._watch: asyncio.Task[None] | None = None
        self._steerer: Steerer | None = None
        self._closed = False

    @property
    def models(self) -> tuple[str, ...]:
        """Those of all upstreams, the first upstream's first; () until one was reached, unless one is configured."""
        return self._models

    @property
    def model(self) -> str:  # type: ignore[override]
        """The configured one, else the first that is listed."""
        return self._models[0] if self._models else ""

    @property
    def capabilities(self) -> frozenset[Capability]:  # type: ignore[override]
        """What every upstream that was reached can do."""
        common = set(FEATURES).intersection(*(probed.can for probed in self.probed.values())) if self.probed else set()
        found = {Capability.CHAT, *(Capability(name) for name in common if name in _CAPABILITIES)}
        return frozenset(found | {Capability.STEER} if self._steerer and self._steerer.way else found)

    @property
    def lacking(self) -> Mapping[Capability, str]:  # type: ignore[override]
        """What steering an upstream needs beyond what is there."""
        if self._steerer is None:
            return {Capability.STEER: "to steer an upstream, name its model's tokenizer with [engine] tokenizer"}
        return {Capability.STEER: "to be steered, the upstream must show top_logprobs, which it does not"}

    async def start(self) -> None:
        """Reach the upstreams, and ask what they can do.

        Raises:
            ConfigError: the tokenizer or a value cannot be loaded.
        """
        if self.config.tokenizer:
            from infer_align.engines.openai.steering import Steerer  # noqa: PLC0415 - torch, which forwarding does not need

            self._steerer = await asyncio.to_thread(Steerer, self.config.tokenizer, self.values)
        await self.client.start()
        await asyncio.gather(*(self._reach(host) for host in self.client.pool.hosts))
        self._watch = asyncio.create_task(self._keep_reaching())

    async def _keep_reaching(self) -> None:
        while True:
            await asyncio.sleep(self.config.recovery_seconds)
            lost = [host for host in self.client.pool.hosts if host.down is not None]
            await asyncio.gather(*(self._reach(host) for host in lost))

    async def _reach(self, host: Host) -> None:
        """List its models, and the first time ask what it can do; a failure is noted on the host."""
        try:
            await self._list(host)
            if host.down is None and host.url not in self.probed:
                if self._steerer:
                    await self._steerer.probe(self.client, host, self.model)
                self.probed[host.url] = await self._probe(host)
        except AlignError as error:
            host.failed(host.down or error.message)
        except Exception:
            log.exception("reaching the upstream %s failed", host.url)
            host.failed("it answers what cannot be read")

    async def _list(self, host: Host) -> None:
        try:
            async with asyncio.timeout(self.config.connect_timeout_seconds):
                listed = listed_models(await self.client.once(host, "/models"))
        except TimeoutError:
            host.failed("no answer in time")
            return
        except UpstreamFailed as error:
            if error.code == KEY_REFUSED or self.config.model is None:
                host.failed(error.message)
            if host.down:
                raise
            listed = {}  # it is there, and lists nothing
        if self.config.model is None:
            if not listed:
                host.failed("it lists no models; name one with model = '...'")
            host.models = frozenset(listed)
            self._models = tuple(dict.fromkeys([*self._models, *listed]))
        if self.config.context_length is None:
            self.context_length = listed.get(self.model) or self.context_length

    async def _probe(self, host: Host) -> Probed:
        given = frozenset(self.config.capabilities)
        found = Probed(given, frozenset(FEATURES) - given)
        if self.config.probe:
            found = await probe(self.client, host, self.model, self.config.probe_seconds)
        log.info(
            "upstream %s can: %s; ignores: %s", host.url, ", ".join(sorted(found.can)), ", ".join(sorted(found.ignores)) or "-"
        )
        if "n" in found.ignores:
            self._fanout.learn(host, self.model, 1)
        return found

    async def close(self) -> None:
        """Break off what is drawn; its streams end with an error."""
        self._closed = True
        if self._watch:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        for drawing in tuple(self._drawings):
            drawing.fail(Unavailable("the engine was shut down"))
        await self.client.close()

    def health(self) -> str | None:
        """None while an upstream can be reached."""
        if self._closed:
            return "the engine was shut down"
        return self.client.pool.health()

    def check(self, draw: Draw) -> None:
        """Refuse what the upstreams were found to drop; whether a value is allowed is theirs to say.

        Raises:
            InvalidRequest: naming the field.
        """
        if self._steerer and draw.steering:
            self._steerer.check(draw, biased=all("logit_bias" in probed.can for probed in self.probed.values()))
            return
        ignored = frozenset().union(*(probed.ignores for probed in self.probed.values()))
        if draw.kind in ignored:
            raise Unsupported(f"the upstream of {self.model!r} has no text completions; use chat completions.", param="prompt")
        asked = {name for feature in ignored for name in FIELDS.get(feature, ()) if draw.body.get(name)}
        asked |= {"seed"} if "seed" in ignored and draw.seeded else set()
        if asked:
            name = min(asked)
            raise Unsupported(f"{name}: the upstream of {self.model!r} does not honour it; leave it out.", param=name)

    def sample(self, draw: Draw) -> Stream:
        """Ask the upstreams for the draw's candidates.

        Raises:
            Unavailable: after close.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        model = self._model_of(draw.body)
        drawing: Drawing | Steered
        if self._steerer and draw.steering and any(draw.steering.beta.values()):
            drawing = self._steerer.drawing(self.client, draw, model, self.context_length, self._drawings.discard)
        else:
            drawing = Drawing(self.client, self._fanout, draw, model, self._drawings.discard)
        self._drawings.add(drawing)
        drawing.start()
        return drawing.stream

    def _model_of(self, body: Body) -> str:
        name = body.get("model")
        return name if isinstance(name, str) and name in self._models else self.model

    async def read_labels(self, query: LabelQuery) -> LabelReading:
        """From the top logprobs of calls of one token; see labels.py for how exact that is.

        Raises:
            Unsupported: the upstreams show no top logprobs.
            UpstreamFailed: none of them answered.
        """
        if Capability.LABEL_LOGPROBS not in self.capabilities:
            return await super().read_labels(query)
        continues = all(probed.continues for probed in self.probed.values())
        return await read_labels(self.client, self.model, query, continues=continues)


def listed_models(answer: Any) -> dict[str, int | None]:
    """{id: context length, where it is said} of an upstream's /models."""
    data = answer.get("data") if isinstance(answer, dict) else None
    entries = [entry for entry in data or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    lengths = ("max_model_len", "context_length", "context_window")
    return {e["id"]: next((e[name] for name in lengths if isinstance(e.get(name), int) and e[name] > 0), None) for e in entries}
