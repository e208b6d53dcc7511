"""vLLM in this process: its engine, and its own OpenAI layer, behind our flow.

    without align   vLLM's application answers the request unchanged
    check, sample   running_draw.py: one request per candidate, through vLLM's OpenAI layer
    steering        values.py in the server; processor.py in vLLM's workers
    estimates       estimates.py in the server; recorder.py in vLLM's workers

extra_args.py holds what a request carries to the workers, which are processes of vLLM's own. Every
import of vLLM is in `infer_align.vllm`.
"""

# ruff: noqa: PLC0415 - importing vLLM takes ten seconds or more, so it waits for the start
from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from infer_align.decoding.labels import LabelLogprobs, LabelQuery, control_tokens
from infer_align.demo.locate import locate
from infer_align.engines import App, Engine, Stream
from infer_align.engines.vllm.body import parse_body
from infer_align.engines.vllm.estimates import EstimateFetcher
from infer_align.engines.vllm.labels import count_requests, read_labels
from infer_align.engines.vllm.running_draw import RunningDraw
from infer_align.engines.vllm.values import EngineValues
from infer_align.errors import AlignError, ConfigError, Unavailable
from infer_align.types import Capability, Draw
from infer_align.values import Value
from infer_align.vllm import package as vllm_package
from infer_align.vllm.interfaces import AsyncEngine

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

WORKER_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM in this process, with any model that it serves, on one or more GPUs and nodes."""

    model: str = field(
        default="demo",
        metadata={"description": 'Path or Hugging Face id; "demo" is the embedded model.'},
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "rest": vllm_package.option_names,
            "description": "Put any `vllm serve` option of the engine, chat templates or parsers "
            "directly in this section, under its vLLM name, such as max_model_len, "
            "tensor_parallel_size or tool_call_parser.",
        },
    )

    def load(self) -> VllmEngine:
        """Make the engine; its model loads at start.

        Raises:
            ConfigError: vLLM is not installed, or its version is not supported.
        """
        vllm_package.require()
        return VllmEngine(self)

    @property
    def memory_share(self) -> float | None:
        """The share of the GPUs' memory that the engine takes; None if it is set in bytes."""
        return vllm_package.memory_share(self.options)


plugin = Vllm


class VllmEngine(Engine):
    """An AsyncLLM with vLLM's OpenAI layer over it."""

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
        self._launching: asyncio.Task[Frontend] | None = None
        self._engine: AsyncEngine | None = None
        self._frontend: Frontend | None = None
        self._engine_values: EngineValues | None = None
        self._fetcher: EstimateFetcher | None = None
        self._running: set[RunningDraw] = set()
        self._closed = False

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the model and of its LoRA adapters."""
        lora_names = self._frontend.lora_names if self._frontend else ()
        return (self.model, *lora_names)

    async def start(self) -> None:
        """Load the model in vLLM's workers.

        Raises:
            ConfigError: vLLM refuses an option, or a value cannot steer this engine.
        """
        values = EngineValues(self.values)
        self._engine_values = values
        self.progress("importing vLLM")
        self._launching = asyncio.create_task(asyncio.to_thread(self._launch, values))
        try:
            frontend = await asyncio.shield(self._launching)
        except AlignError:
            raise
        except Exception as error:
            raise ConfigError(
                f"vLLM could not start: {error}; see its log above for the cause."
            ) from error
        from infer_align.vllm.compat import call_workers

        self.progress("setting up vLLM's OpenAI layer")
        self._frontend = frontend
        await frontend.start()
        assert self._engine is not None
        self.context_length = self._engine.model_config.max_model_len
        self._fetcher = EstimateFetcher(
            partial(call_workers, self._engine, "infer_align_take_estimates")
        )
        self._set_capabilities(self._engine, values)

    def _set_capabilities(self, engine: AsyncEngine, values: EngineValues) -> None:
        if values.enabled:
            self.capabilities |= {Capability.STEER}
            if engine.vllm_config.speculative_config is None:
                self.capabilities |= {Capability.ESTIMATES}
            else:
                self.capability_hints = {
                    **self.capability_hints,
                    Capability.ESTIMATES: "remove [engine] speculative_config or align.early_stop",
                }
        # The modes raw_logits and processed_logits report no logprobs.
        if not engine.model_config.logprobs_mode.endswith("logprobs"):
            self.capabilities -= {Capability.LOGPROBS, Capability.LABEL_LOGPROBS}

    def _launch(self, values: EngineValues) -> Frontend:
        """Import vLLM and start the workers. Runs in a thread, because both block."""
        from infer_align.vllm import compat
        from infer_align.vllm.openai import Frontend

        options = values.engine_options(self.config.options)
        served_name = self.served_name or self.model
        args = compat.parse_options(locate(self.config.model), served_name, options)
        self.progress("vLLM's workers: weights, memory profile, key-value cache")
        engine = compat.launch(args, values.configure)
        self._engine = engine
        return Frontend(engine, args)

    async def close(self) -> None:
        """Fail the draws that run, and end the workers."""
        self._closed = True
        await self._abandon_loading()
        for running_draw in [*self._running]:
            running_draw.stream.put(Unavailable("the engine was shut down"))
            running_draw.close()
        if self._fetcher is not None:
            self._fetcher.close()
        if self._frontend is not None:
            await self._frontend.close()
        if self._engine_values is not None:
            self._engine_values.close()
        if self._engine is not None:
            from infer_align.vllm.compat import shut_down

            await shut_down(self._engine, abandon_requests=True)

    async def _abandon_loading(self) -> None:
        """End a start that is still running, without waiting for the model.

        vLLM's start-up fails as soon as its workers are gone.
        """
        if self._launching is None:
            return
        while not self._launching.done():
            for worker in multiprocessing.active_children():
                worker.terminate()
            await asyncio.wait({self._launching}, timeout=WORKER_POLL_SECONDS)
        if not self._launching.cancelled():
            # Reading the exception keeps asyncio from logging it.
            self._launching.exception()

    def health(self) -> str | None:
        """Return None while the engine can answer, else the reason why it cannot."""
        if self._closed:
            return "the engine was shut down"
        if self._engine is None or self._frontend is None:
            return "the model is still loading"
        return (
            "vLLM's engine has stopped; see its log for the cause" if self._engine.errored else None
        )

    def _healthy_frontend(self) -> Frontend:
        reason = self.health()
        if reason is not None:
            raise Unavailable(reason)
        assert self._frontend is not None
        return self._frontend

    def app(self) -> App | None:
        """Return vLLM's own application, once the engine has started."""
        return None if self._frontend is None else self._frontend.app

    def exposition(self) -> bytes:
        """Return vLLM's metrics, such as vllm:num_requests_running."""
        if self._frontend is None:
            return b""
        from infer_align.vllm.compat import metrics_text

        return metrics_text()

    def value(self, name: str) -> Value:
        """Return a value by which requests can be steered.

        Raises:
            KeyError: there is no such value.
        """
        if self._engine_values is None:
            return self.values[name]
        return self._engine_values.value(name)

    async def add_value(self, name: str, value: Value) -> None:
        """Add a value, or replace the one of the same name, without a restart.

        Raises:
            ConfigError: the value does not fit the model, or the engine was started without values.
        """
        if self._engine_values is None or self._engine is None:
            raise Unavailable("the model is still loading")
        await self._engine_values.add(name, value, self._engine.collective_rpc)
        self.values = {**self.values, name: value}

    def check(self, draw: Draw) -> None:
        """Have vLLM parse and check the body, and check the values.

        Raises:
            InvalidRequest: vLLM refuses a field or would not read it, or a value does not exist.
        """
        if self._frontend is None:
            raise Unavailable("the model is still loading")
        self._frontend.check(draw.kind, parse_body(self._frontend, draw))
        if self._engine_values is not None:
            self._engine_values.check(draw)

    def sample(self, draw: Draw) -> Stream:
        """Start one request per candidate. The prompt is rendered once and its prefix is cached.

        Raises:
            Unavailable: the engine has not started, is closed, or has died.
        """
        frontend = self._healthy_frontend()
        assert self._fetcher is not None
        assert self._engine_values is not None
        extra_args = self._engine_values.extra_args(draw.steering) if draw.steering else {}
        running_draw = RunningDraw(frontend, draw, extra_args, self._fetcher)
        self._running.add(running_draw)
        running_draw.on_end(self._running.discard)
        return running_draw.stream

    @property
    def control_tokens(self) -> frozenset[str]:
        """The tokens of the tokenizer that are not text."""
        return frozenset() if self._frontend is None else control_tokens(self._frontend.tokenizer)

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """Return the number of requests that `read_labels` sends for one query.

        Raises:
            Unsupported: the tokenizer cannot spell a label.
        """
        if self._frontend is None:
            return super().label_calls(labels)
        return count_requests(self._frontend, labels)

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Return the probability of each label as the next text of a conversation.

        Raises:
            Unavailable: the engine has not started, is closed, or has died.
            AlignError: vLLM refuses the messages, or failed.
        """
        return await read_labels(self._healthy_frontend(), query)
