"""vLLM in this process: its engine, and its own OpenAI layer, behind our flow.

    without align ─▶ vLLM's application, untouched
    check, sample ─▶ candidates.py: one request per candidate, through vLLM's OpenAI layer ─▶ AsyncLLM ─▶ Stream
    steering      ─▶ steering.py: what a request tells the workers; processor.py: what they do with it

The workers are processes of vLLM's own. Every import of vLLM is in `infer_align.vllm.compat` and
`infer_align.vllm.openai`.
"""

# ruff: noqa: PLC0415 - importing vLLM takes ten seconds and more: not before it starts
from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from infer_align.decoding.labels import control_tokens
from infer_align.demo.locate import locate
from infer_align.engines import App, Engine, Stream
from infer_align.engines.vllm.body import parsed
from infer_align.engines.vllm.candidates import Sampling
from infer_align.engines.vllm.labels import read_labels, readings
from infer_align.engines.vllm.steering import Steerer
from infer_align.engines.vllm.watching import Fetcher
from infer_align.errors import AlignError, ConfigError, Unavailable
from infer_align.types import Capability, Draw, LabelLogprobs, LabelQuery
from infer_align.values import Value
from infer_align.vllm import package as vllm_package


@dataclass(frozen=True, slots=True)
class Vllm:
    """Any model that vLLM serves, on as many GPUs and nodes as it is told."""

    model: str = field(
        default="demo", metadata={"description": 'path or hub id; "demo" is the embedded model'}
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "rest": vllm_package.option_names,
            "description": "not written as such: every option of `vllm serve` for its engine, chat templates and parsers stands "
            "here by its own name, such as max_model_len, tensor_parallel_size or tool_call_parser",
        },
    )

    def load(self) -> VllmEngine:
        """The engine, its model not yet loaded.

        Raises:
            ConfigError: vLLM is not installed, or in another version.
        """
        vllm_package.require()
        return VllmEngine(self)

    @property
    def memory_share(self) -> float | None:
        """Of the GPUs' memory, what the engine takes."""
        return vllm_package.memory_share(self.options)


plugin = Vllm


class VllmEngine(Engine):
    """An AsyncLLM, and vLLM's OpenAI layer over it."""

    model: str = ""
    context_length: int = 0
    capabilities: frozenset[Capability] = frozenset(Capability) - {Capability.STEER}

    capability_hints: Mapping[Capability, str] = MappingProxyType(
        dict.fromkeys(
            (Capability.STEER, Capability.ESTIMATES),
            'configure a value of kind "head" in [values.*]',
        )
    )

    def __init__(self, config: Vllm) -> None:
        self.config = config
        self.model = config.model
        self.context_length = int(config.options.get("max_model_len") or 0)
        self._launching: asyncio.Task[None] | None = None
        self._engine: Any = None
        self._frontend: Any = None
        self._steerer: Steerer | None = None
        self._fetcher: Fetcher | None = None
        self._running: set[Sampling] = set()
        self._closed = False

    @property
    def models(self) -> tuple[str, ...]:
        """The model, and its LoRA adapters."""
        return (self.model, *(self._frontend.variants if self._frontend else ()))

    async def start(self) -> None:
        """Load the model in vLLM's workers.

        Raises:
            ConfigError: vLLM refuses an option, or a value cannot steer this engine.
        """
        self._steerer = Steerer(self.values)
        self.progress("importing vLLM")
        self._launching = asyncio.create_task(asyncio.to_thread(self._launch))
        try:
            await asyncio.shield(self._launching)
        except AlignError:
            raise
        except Exception as error:
            raise ConfigError(
                f"vLLM could not start: {error}; its log above has the cause."
            ) from error
        from infer_align.vllm import compat as vllm_compat
        from infer_align.vllm.openai import Frontend

        self.progress("setting up vLLM's OpenAI layer")
        self._frontend = Frontend(self._engine, self._args)
        await self._frontend.start()
        self.context_length = self._engine.model_config.max_model_len
        self._fetcher = Fetcher(
            partial(vllm_compat.call_workers, self._engine, "infer_align_take_estimates")
        )
        if self._steerer.active:
            self.capabilities |= {Capability.STEER}
            self._offer_estimates()
        if not self._engine.model_config.logprobs_mode.endswith(
            "logprobs"
        ):  # raw_logits, processed_logits
            self.capabilities -= {Capability.LOGPROBS, Capability.LABEL_LOGPROBS}

    def _offer_estimates(self) -> None:
        if self._engine.vllm_config.speculative_config is None:
            self.capabilities |= {Capability.ESTIMATES}
        else:
            self.capability_hints = {
                **self.capability_hints,
                Capability.ESTIMATES: "leave out [engine] speculative_config, or align.early_stop",
            }

    def _launch(self) -> None:
        from infer_align.vllm import compat as vllm_compat

        assert self._steerer is not None
        options = self._steerer.engine_args(self.config.options)
        self._args = vllm_compat.arguments(
            locate(self.config.model), self.served_name or self.model, options
        )
        self.progress("vLLM's workers: weights, memory profile, key-value cache")
        self._engine = vllm_compat.launch(self._args, self._steerer.configure)

    async def close(self) -> None:
        """End the workers; what still runs is cut off."""
        self._closed = True
        await self._give_up_loading()
        for sampling in [*self._running]:
            sampling.stream.put(Unavailable("the engine was shut down"))
            sampling.close()
        if self._fetcher is not None:
            self._fetcher.close()
        if self._frontend is not None:
            await self._frontend.close()
        if self._engine is not None:
            if self._engine.output_handler is not None:
                self._engine.output_handler.cancel()  # or it would report the end of the workers as their death
            await asyncio.to_thread(self._engine.shutdown)

    async def _give_up_loading(self) -> None:
        """Whoever is told to stop while it loads does not wait for the model: without its workers, vLLM's start-up ends."""
        while self._launching is not None and not self._launching.done():
            for worker in multiprocessing.active_children():
                worker.terminate()
            await asyncio.wait({self._launching}, timeout=0.1)
        if self._launching is not None and not self._launching.cancelled():
            self._launching.exception()  # heard

    def health(self) -> str | None:
        """None while vLLM's engine lives."""
        if self._closed:
            return "the engine was shut down"
        if self._frontend is None:
            return "the model is still loading"
        return "vLLM's engine has died; its log says why" if self._engine.errored else None

    def app(self) -> App | None:
        """vLLM's own application, once it is up."""
        return None if self._frontend is None else self._frontend.app

    def exposition(self) -> bytes:
        """vLLM's counters, such as vllm:num_requests_running."""
        if self._frontend is None:
            return b""
        from infer_align.vllm.compat import exposition

        return exposition()

    def value(self, name: str) -> Value:
        """A value that requests can steer by.

        Raises:
            KeyError: no such value.
        """
        return self.values[name] if self._steerer is None else self._steerer.value(name)

    async def add_value(self, name: str, value: Value) -> None:
        """Let requests steer by another value from now on, without a restart; one of the same name is replaced.

        Raises:
            ConfigError: it does not fit the model, or the engine was started without values.
        """
        if self._steerer is None or self._engine is None:
            raise Unavailable("the model is still loading")
        await self._steerer.add(name, value, self._engine.collective_rpc)
        self.values = {**self.values, name: value}

    def check(self, draw: Draw) -> None:
        """Have vLLM read the body; what it would leave unread is refused by name."""
        if self._frontend is None:
            raise Unavailable("the model is still loading")
        self._frontend.check(draw.kind, parsed(self._frontend, draw))
        if self._steerer:
            self._steerer.check(draw)

    def sample(self, draw: Draw) -> Stream:
        """Start a request per candidate; the prompt is rendered once and its prefix cached.

        Raises:
            Unavailable: not started, or closed.
        """
        if why := self.health():
            raise Unavailable(why)
        extra = self._steerer.extra_args(draw.steering) if draw.steering and self._steerer else {}
        assert self._fetcher is not None  # healthy: it has started
        sampling = Sampling(self._engine, self._frontend, draw, extra, self._fetcher)
        self._running.add(sampling)
        sampling.on_end(self._running.discard)
        return sampling.stream

    @property
    def control_tokens(self) -> frozenset[str]:
        """Those of the tokenizer that are not words."""
        return frozenset() if self._frontend is None else control_tokens(self._frontend.tokenizer)

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """As many as there are beginnings of labels in this tokenizer.

        Raises:
            Unsupported: a label cannot be spelt.
        """
        return (
            super().label_calls(labels)
            if self._frontend is None
            else len(readings(self._frontend, labels))
        )

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """One token after each path that spells a label, all paths at once; they share the prompt's cached prefix."""
        if why := self.health():
            raise Unavailable(why)
        return await read_labels(self._engine, self._frontend, query)
