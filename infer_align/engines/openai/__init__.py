"""Any OpenAI-compatible server as the engine: the client's body goes there whole, what comes back is kept whole.

    check, sample ─▶ Drawing (draws.py): as few calls as the upstream honours ─▶ choices (choices.py) ─▶ Stream
    start ─▶ models and what they can do (roster.py, probe.py); read_labels ─▶ labels.py; vas ─▶ steering.py
    relay ─▶ the upstream's own Responses API, passed through

The upstreams, their keys and their health are `infer_align.upstream`. Of a request, only the model's name chooses among them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from infer_align.engines import Engine, Stream
from infer_align.engines.openai.draws import Drawing, refusal
from infer_align.engines.openai.fanout import Fanout
from infer_align.engines.openai.labels import read_labels
from infer_align.engines.openai.probe import FEATURES, FIELDS, Probed
from infer_align.engines.openai.roster import CONTEXT_LENGTH, Roster
from infer_align.errors import ConfigError, Unavailable, Unsupported
from infer_align.types import Body, Capability, Draw, LabelLogprobs, LabelQuery
from infer_align.upstream import Upstream, UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.response import read_bytes

if TYPE_CHECKING:
    from infer_align.engines.openai.steering import Steered, Steerer

_CAPABILITIES = frozenset(capability.value for capability in Capability)
# What a server without the Responses API says of its route, beside a status of these.
NO_ROUTE, NO_ROUTE_STATUSES = (
    re.compile(r"|not found|method not allowed|(the upstream answered \d+)", re.IGNORECASE),
    {404, 405, 501},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAI(Upstream):
    """One or several OpenAI-compatible servers."""

    model: str | None = field(
        default=None,
        metadata={
            "description": "the upstream's model; without it every model that it lists is served under its name"
        },
    )
    n: Literal["auto", "native", "single"] = field(
        default="auto",
        metadata={
            "description": "several candidates by one call, by one call each, or as what comes back shows to be possible"
        },
    )
    context_length: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": f"tokens of prompt and completion; default: the upstream's, or {CONTEXT_LENGTH}",
        },
    )
    probe: bool = field(
        default=True,
        metadata={
            "description": "find out at the start, by calls of a few tokens, what the upstream can do"
        },
    )
    probe_seconds: float = field(
        default=20.0, metadata={"gt": 0, "description": "for all probes of a model together"}
    )
    capabilities: tuple[str, ...] = field(
        default=("completion", "seed", "logprobs", "tools", "structured", "n", "logit_bias"),
        metadata={
            "description": f"what it can do, where probe is false; of: {', '.join(FEATURES)}"
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "description": "path or hub id of the upstream model's tokenizer, which vas needs to steer it"
        },
    )

    def load(self) -> OpenAIEngine:
        """The engine, its upstreams not yet reached.

        Raises:
            ConfigError: urls, key or capabilities are wrong.
        """
        if unknown := sorted(set(self.capabilities) - set(FEATURES)):
            raise ConfigError(
                f"capabilities: {unknown[0]!r} is not one of them; known: {', '.join(FEATURES)}."
            )
        return OpenAIEngine(self)


plugin = OpenAI


class OpenAIEngine(Engine):
    """Forwards draws. `start` does not fail where no upstream can be reached: it keeps trying, and `health` says so.

    Attributes:
        client: the upstreams.
    """

    def __init__(self, config: OpenAI) -> None:
        self.config = config
        self.client = Client(config)
        self._fanout = Fanout(config.n)
        self._roster = Roster(config, self.client, self._fanout)
        self._drawings: set[Drawing | Steered] = set()
        self._watch: asyncio.Task[None] | None = None
        self._steerer: Steerer | None = None
        self._closed = False

    @property
    def models(self) -> tuple[str, ...]:
        """Those of all upstreams, the first upstream's first; () until one was reached, unless one is configured."""
        return self._roster.models

    @property
    def model(self) -> str:
        """The configured one, else the first that is listed."""
        return next(iter(self.models), "")

    @property
    def context_length(self) -> int:
        """That of the first model."""
        return self._roster.context_length(self.model)

    @property
    def probed(self) -> Mapping[tuple[str, str], Probed]:
        """What each upstream can do with each model, by (URL, model)."""
        return self._roster.probed

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What every upstream that has the first model was seen to do with it; of another model, `check` knows."""
        found = {
            Capability.CHAT,
            *(Capability(name) for name in self._roster.can(self.model) if name in _CAPABILITIES),
        }
        return frozenset(
            found | {Capability.STEER} if self._steerer and self._steerer.way(self.model) else found
        )

    @property
    def capability_hints(self) -> Mapping[Capability, str]:
        """What steering an upstream needs beyond what is there."""
        if self._steerer is None:
            return {
                Capability.STEER: "to steer an upstream, name its model's tokenizer with [engine] tokenizer"
            }
        return {
            Capability.STEER: "to be steered, the upstream must show top_logprobs, which it does not"
        }

    async def start(self) -> None:
        """Reach the upstreams, and ask what they can do.

        Raises:
            ConfigError: the tokenizer or a value cannot be loaded.
        """
        if self.config.tokenizer:
            from infer_align.engines.openai.steering import Steerer  # noqa: PLC0415 - torch, which forwarding does not need

            self._steerer = await asyncio.to_thread(Steerer, self.config.tokenizer, self.values)
            self._roster.steerer = self._steerer
        await self.client.start()
        await self._roster.reach_all()
        self._watch = asyncio.create_task(self._keep_reaching())

    async def _keep_reaching(self) -> None:
        while True:
            await asyncio.sleep(self.config.recovery_seconds)
            await self._roster.reach_all()

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
        model = self._model_of(draw.body)
        if self._steerer and draw.steering:
            self._steerer.check(draw, model, biased="logit_bias" in self._roster.can(model))
            return
        ignored = self._roster.ignores(model)
        if draw.kind in ignored:
            raise Unsupported(
                f"the upstream of {model!r} has no text completions; use chat completions.",
                param="prompt",
            )
        if draw.body.get("best_of") not in {None, 1}:
            raise Unsupported(
                "best_of: what it draws nobody could count; ask for align.best_of_n instead.",
                param="best_of",
            )
        asked = {
            name for feature in ignored for name in FIELDS.get(feature, ()) if draw.body.get(name)
        }
        asked |= {"seed"} if "seed" in ignored and draw.seed_requested else set()
        if asked:
            name = min(asked)
            raise Unsupported(
                f"{name}: the upstream of {model!r} does not honour it; leave it out.", param=name
            )

    def worst_case_tokens(self, body: Body) -> int:
        """The most tokens one candidate of this body can generate, by the model that it names."""
        room = (
            {"max_tokens": self._roster.context_length(self._model_of(body))}
            if "messages" in body
            else {}
        )
        return super().worst_case_tokens({**room, **body})

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
            room = self._roster.context_length(model)
            drawing = self._steerer.drawing(self.client, draw, model, room, self._drawings.discard)
        else:
            drawing = Drawing(self.client, self._fanout, draw, model, self._drawings.discard)
        drawing.start()
        self._drawings.add(drawing)
        return drawing.stream

    def _model_of(self, body: Body) -> str:
        name = body.get("model")
        return name if isinstance(name, str) and name in self.models else self.model

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """From the top logprobs of calls of one token; see labels.py for how exact that is.

        Raises:
            Unsupported: the upstreams show no top logprobs.
            UpstreamFailed: none of them answered.
        """
        if Capability.LABEL_LOGPROBS not in self.capabilities:
            return await super().read_labels(query)
        continues = "continue" in self._roster.can(self.model)
        return await read_labels(
            self.client,
            self.model,
            query,
            continues=continues,
            limit=self._roster.limit(self.model),
        )

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, content: bytes | None, model: str | None
    ) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        """The upstream's own answer to a request below its base URL: (content type, its bytes as they come).

        Raises:
            Unsupported: the upstream does not serve the route.
            InvalidRequest: it refuses the request.
            UpstreamFailed: it failed; also while the bytes are read.
        """
        try:
            async with self.client.relay(method, path, content, model=model) as response:
                yield response.headers.get("Content-Type", "application/json"), read_bytes(response)
        except UpstreamFailed as error:
            unnamed = error.param is None and error.code == UpstreamFailed.code
            if (
                error.status in NO_ROUTE_STATUSES
                and unnamed
                and NO_ROUTE.fullmatch(error.message.rstrip("."))
            ):
                what = f"{method} /v1{path.partition('?')[0]}: the upstream does not serve this; use /v1/chat/completions."
                raise Unsupported(what, code="not_served", status=404) from None
            raise refusal(error) if error.refused else error from None
