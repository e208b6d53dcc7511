"""The engine: it checks draws, starts them at the upstreams and passes on what is not drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING

from infer_align.decoding.labels import LabelLogprobs, LabelQuery
from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.engines import Engine, Stream, Undiscovered
from infer_align.engines.openai.batch_size import BatchSizes
from infer_align.engines.openai.draws import UpstreamDrawing
from infer_align.engines.openai.labels import read_labels
from infer_align.engines.openai.models import UpstreamModels
from infer_align.engines.openai.probe import (
    EFFECT_MAY_BE_HIDDEN,
    FIELDS,
    Features,
)
from infer_align.engines.openai.sequences import sequence_logprobs
from infer_align.engines.openai.ways import GUIDE, needs_of
from infer_align.errors import InvalidRequest, Unavailable, Unsupported
from infer_align.types import Body, Capability, Draw
from infer_align.upstream.forward import ForwardedAnswer, ForwardedRequest
from infer_align.upstream.forwarder import Forwarder

if TYPE_CHECKING:
    from infer_align.engines.openai import OpenAI
    from infer_align.engines.openai.features import UpstreamFeatures
    from infer_align.engines.openai.steered import SteeredDrawing
    from infer_align.engines.openai.steering import Steerer

_CAPABILITIES = frozenset(capability.value for capability in Capability)
# Labels are read differently from an upstream that continues a begun turn.
LABEL_FEATURES = frozenset({"label_logprobs", "continue"})


# Routes of vLLM that stand beside "/v1".
ROOT_ROUTES = frozenset(
    {"/classify", "/detokenize", "/pooling", "/rerank", "/score", "/tokenize", "/v2/rerank"}
)


class OpenAIEngine(Engine):
    """Sends draws to the upstreams.

    `start` succeeds even if no upstream can be reached: the engine keeps trying, and `health`
    gives the reason.

    Attributes:
        client: the upstreams.
    """

    def __init__(self, config: OpenAI) -> None:
        self.config = config
        self.client = Forwarder(config)
        self._sizes = BatchSizes(config.n)
        self._models = UpstreamModels(config, self.client, self._sizes)
        self._drawings: set[UpstreamDrawing | SteeredDrawing] = set()
        self._reaching: asyncio.Task[None] | None = None
        self._steerer: Steerer | None = None
        self._closed = False

    # --- what it offers ---

    @property
    def models(self) -> tuple[str, ...]:
        """Return the models of all upstreams; () until one answered, unless one is configured."""
        return self._models.names

    @property
    def model(self) -> str:
        """Return the configured model, else the first that is listed."""
        return self.models[0] if self.models else ""

    @property
    def context_length(self) -> int:
        """Return the context length of the first model."""
        return self._models.context_length(self.model)

    @property
    def features(self) -> Mapping[tuple[str, str], Features]:
        """Return the features that were found, by (URL, model)."""
        return self._models.features.by_model

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Return the features that every upstream of the first model is known to support.

        `missing` also finds out those that are unknown, and those of the other models.
        """
        return self._capabilities_of(self.model)

    @property
    def unknown_capabilities(self) -> frozenset[Capability]:
        """Return the features of the first model that no request needed yet."""
        names = self._features.unknown(self.model, _CAPABILITIES)
        return frozenset(map(Capability, names))

    def missing(self, needs: frozenset[Capability], model: object = None) -> frozenset[Capability]:
        """Return the needed capabilities that an upstream of the model lacks.

        Raises:
            Undiscovered: a needed feature was not probed yet.
            Unavailable: a needed feature could not be probed, or no upstream can be reached.
        """
        name = self._model_of({"model": model})
        features = {need.value for need in needs}
        if Capability.LABEL_LOGPROBS in needs:
            features |= LABEL_FEATURES
        self._require_found(name, features)
        unknown = self._features.unknown(name, features)
        if unknown:
            raise Unavailable(
                f"the upstream of {name!r} did not answer the calls that show if it can do "
                f"{', '.join(sorted(unknown))}; try again later.",
                retry_after=self.config.recovery_seconds,
            )
        missing = needs - self._capabilities_of(name)
        reason = self.health()
        if missing and reason:
            raise Unavailable(f"{reason}; try again later.", retry_after=5)
        return missing

    def describe(self, model: object = None) -> str:
        """Return how messages name the engine with a model."""
        name = self._model_of({"model": model})
        if name:
            return f"the engine of {name!r}"
        return "the engine openai, which has not reached an upstream yet,"

    @property
    def _features(self) -> UpstreamFeatures:
        return self._models.features

    def _capabilities_of(self, model: str) -> frozenset[Capability]:
        names = self._features.supported(model) & _CAPABILITIES
        capabilities = {Capability.CHAT, *map(Capability, names)}
        if self._steerer and self._steerer.ways.way(model):
            capabilities.add(Capability.STEER)
        if self._steerer and self._steerer.ways.width(model):
            capabilities.add(Capability.GUIDE)
        return frozenset(capabilities)

    def _require_found(self, model: str, features: Collection[str]) -> None:
        """Raise Undiscovered if one of the features can be probed now."""
        due = self._features.due(model, features)
        if due:
            raise Undiscovered(
                f"it is not known yet if the upstream of {model!r} can do "
                f"{', '.join(sorted(due))}; try again.",
                lambda: self._features.find(model, due),
            )

    @property
    def capability_hints(self) -> Mapping[Capability, str]:
        """Return a sentence on how to enable steering and guidance."""
        if self._steerer is None:
            hint = "to steer an upstream, name its model's tokenizer with [engine] tokenizer"
            return {Capability.STEER: hint, Capability.GUIDE: hint}
        return {
            Capability.STEER: "to be steered, the upstream must return top_logprobs, which it does "
            "not",
            Capability.GUIDE: "to be guided, the upstream must return at least 2 top_logprobs, and "
            "must continue a text completion or honour continue_final_message, which it does not; "
            "a vLLM server does by default",
        }

    @property
    def has_system_role(self) -> bool:
        """Return False if the tokenizer's chat template shows no system messages."""
        return self._steerer is None or self._steerer.has_system_role

    def health(self) -> str | None:
        """Return None while an upstream can be reached, else the reasons."""
        if self._closed:
            return "the engine was shut down"
        return self.client.pool.health()

    # --- start and end ---

    async def start(self) -> None:
        """Reach the upstreams and list their models.

        Raises:
            ConfigError: the tokenizer or a value cannot be loaded.
        """
        if self.config.tokenizer:
            # Steering needs torch, which an engine that only forwards does not.
            from infer_align.engines.openai.steering import Steerer  # noqa: PLC0415

            self._steerer = await asyncio.to_thread(Steerer, self.config.tokenizer, self.values)
            self._features.ways = self._steerer.ways
        await self.client.start()
        await self._models.reach_all()
        self._reaching = asyncio.create_task(self._keep_reaching())

    async def _keep_reaching(self) -> None:
        while True:
            await asyncio.sleep(self.config.recovery_seconds)
            await self._models.reach_all()

    async def close(self) -> None:
        """Cancel all draws; their streams end with an error."""
        self._closed = True
        if self._reaching:
            self._reaching.cancel()
            with suppress(asyncio.CancelledError):
                await self._reaching
        self._features.close()
        for drawing in tuple(self._drawings):
            drawing.fail(Unavailable("the engine was shut down"))
        await self.client.close()

    # --- draws ---

    def check(self, draw: Draw) -> None:
        """Refuse fields that an upstream was found to ignore; it checks their values itself.

        Raises:
            InvalidRequest: naming the field.
            Undiscovered: it is not known yet if an upstream ignores a field.
        """
        model = self._model_of(draw.body)
        self._require_found(model, _needed_features(draw))
        if self._steerer and (draw.steering or draw.guidance):
            self._steerer.check(
                draw,
                model,
                honours_bias="logit_bias" in self._features.supported(model),
                context_length=self._models.known_context_length(model),
            )
            return
        ignored = self._features.ignored(model)
        if draw.kind in ignored:
            raise Unsupported(
                f"the upstream of {model!r} has no text completions; use chat completions.",
                param="prompt",
            )
        if draw.body.get("best_of") not in {None, 1}:
            raise Unsupported(
                "best_of: the tokens that it costs cannot be counted; use align.best_of_n instead.",
                param="best_of",
            )
        fields: set[str] = set()
        for feature in ignored:
            fields.update(name for name in FIELDS.get(feature, ()) if draw.body.get(name))
        if "seed" in ignored and draw.seed_requested:
            fields.add("seed")
        if fields:
            name = min(fields)
            raise Unsupported(
                f"{name}: the upstream of {model!r} does not honour it; leave it out.", param=name
            )

    def prompt_tokens(self, draw: Draw) -> int:
        """Return the number of tokens of a prompt.

        It is an upper bound without a tokenizer, and for a prompt that cannot fit the context. Some
        upstreams cut such a prompt, so it is left to them to refuse it.

        Raises:
            InvalidRequest: the tokenizer's chat template refuses the messages.
        """
        has_tokens = isinstance(draw.body.get("prompt"), list)
        if self._steerer is None or has_tokens:
            return super().prompt_tokens(draw)
        context_length = self._models.known_context_length(self._model_of(draw.body))
        try:
            return len(self._steerer.prompt(draw.kind, draw.body, context_length).ids)
        except InvalidRequest as error:
            if error.code != "context_length_exceeded":
                raise
            return super().prompt_tokens(draw)

    def worst_case_tokens(self, body: Body) -> int:
        """Return the maximum number of tokens of one candidate, for the model in the body."""
        if "messages" not in body:
            return super().worst_case_tokens(body)
        context_length = self._models.context_length(self._model_of(body))
        return super().worst_case_tokens({"max_tokens": context_length, **body})

    def sample(self, draw: Draw) -> Stream:
        """Start the draw at the upstreams.

        Raises:
            Unavailable: the engine is closed, or no upstream that can be steered was reached.
        """
        if self._closed:
            raise Unavailable("the engine was shut down")
        drawing = self._drawing(draw)
        drawing.start()
        self._drawings.add(drawing)
        return drawing.stream

    def _drawing(self, draw: Draw) -> UpstreamDrawing | SteeredDrawing:
        model = self._model_of(draw.body)
        if self._steerer is None or not needs_of(draw):
            return UpstreamDrawing(self.client, self._sizes, draw, model, self._drawings.discard)
        # Like the steerer, this needs torch.
        from infer_align.engines.openai.steered import SteeredDrawing  # noqa: PLC0415

        return SteeredDrawing(
            self._steerer,
            self.client,
            draw,
            model,
            self._models.known_context_length(model),
            self._drawings.discard,
        )

    def _model_of(self, body: Body) -> str:
        name = body.get("model")
        return name if isinstance(name, str) and name in self.models else self.model

    # --- labels, and responses of the upstream ---

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Read the labels from top logprobs; labels.py explains how exact that is.

        Raises:
            Unsupported: the upstreams return no top logprobs.
            UpstreamFailed: no upstream answered.
        """
        await self._features.find(self.model, LABEL_FEATURES)
        if Capability.LABEL_LOGPROBS not in self.capabilities:
            return await super().read_labels(query)
        return await read_labels(
            self.client,
            self.model,
            query,
            continues="continue" in self._features.supported(self.model),
            limit_name=self._features.limit_name(self.model),
        )

    async def sequence_logprobs(self, query: SequenceQuery) -> SequenceLogprobs:
        """Read texts as the end of prompts; sequences.py explains which texts can be read.

        Raises:
            Unsupported: the upstreams list no logprobs of prompts, or a text cannot be read.
            UpstreamFailed: no upstream answered.
        """
        model = self._model_of(query.body)
        feature = "echo" if query.kind == "completion" else Capability.SEQUENCE_LOGPROBS.value
        await self._features.find(model, {feature})
        if feature not in self._features.supported(model):
            return await super().sequence_logprobs(query)
        return await sequence_logprobs(self.client, model, query)

    def passes(self, path: str) -> bool:
        """Return True if a route, such as "/v1/embeddings", is passed on to the upstreams."""
        family = path.removeprefix("/v1/").strip("/").partition("/")[0]
        if path.startswith("/v1/"):
            return "*" in self.config.routes or family in self.config.routes
        return path.rstrip("/") in ROOT_ROUTES and family in {*self.config.routes, "v2"}

    def forward(self, request: ForwardedRequest) -> AbstractAsyncContextManager[ForwardedAnswer]:
        """Open a request at an upstream; see `Forwarder.forward`."""
        return self.client.forward(request)


def _needed_features(draw: Draw) -> set[str]:
    """Return the features of a draw that an upstream may be seen to ignore."""
    needs = needs_of(draw)
    if needs:
        # Only value steering alone lets the upstream sample, with a bias.
        is_biased = GUIDE not in needs and draw.steering and draw.steering.tail == "keep"
        return {*needs, "logit_bias"} if is_biased else set(needs)
    needed = {"completion"} if draw.kind == "completion" else set()
    for feature, names in FIELDS.items():
        is_present = any(draw.body.get(name) for name in names)
        if is_present and feature not in EFFECT_MAY_BE_HIDDEN:
            needed.add(feature)
    return needed
