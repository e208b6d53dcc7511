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
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from infer_align.decoding.labels import LabelLogprobs, LabelQuery, control_tokens
from infer_align.decoding.params import check_token_ids
from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.demo.locate import locate
from infer_align.engines import App, Engine, Stream
from infer_align.engines.vllm.body import Bodies
from infer_align.engines.vllm.estimates import EstimateFetcher
from infer_align.engines.vllm.labels import count_requests, read_labels
from infer_align.engines.vllm.running_draw import RunningDraw
from infer_align.engines.vllm.sequences import sequence_logprobs
from infer_align.engines.vllm.values import EngineValues
from infer_align.errors import AlignError, ConfigError, Unavailable
from infer_align.types import Capability, Draw
from infer_align.values import Value
from infer_align.vllm import package as vllm_package
from infer_align.vllm.interfaces import AsyncEngine

if TYPE_CHECKING:
    from infer_align.vllm.openai import Frontend

WORKER_POLL_SECONDS = 0.1
LOADING = "the model is still loading"


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
        """Return the share of the GPUs' memory for the engine; None if it is set in bytes."""
        return vllm_package.memory_share(self.options)


plugin = Vllm


_ADD_VALUE = "configure a value in [values.*]"
_ADD_HEAD = 'configure a value of kind "head" in [values.*]'
# The contexts of a request would have to stay at the same step, which vLLM's scheduler does not do.
_GUIDE_FROM_OUTSIDE = (
    "a second server in front of this one can guide it: infer-align serve --upstream "
    "http://HOST:PORT/v1 --set engine.tokenizer=MODEL"
)

_NO_SYSTEM_ROLE = (
    "The model's chat template shows it no system messages. Name another template: "
    '[engine] chat_template = "template.jinja".'
)
_NO_TOOLS = (
    "Tools: the model's template does not show them. A call that tool_choice requires or names is "
    'a call still. With "auto" such a model may never call. Name another template: [engine] '
    'chat_template = "template.jinja".'
)


@dataclass(frozen=True, slots=True)
class _Started:
    """The parts of an engine that has started."""

    engine: AsyncEngine
    frontend: Frontend
    bodies: Bodies
    values: EngineValues
    fetcher: EstimateFetcher
    control_tokens: frozenset[str]


class VllmEngine(Engine):
    """An AsyncLLM with vLLM's OpenAI layer over it."""

    model: str = ""
    context_length: int = 0
    capabilities: frozenset[Capability] = frozenset(Capability) - {
        Capability.STEER,
        Capability.GUIDE,
    }

    capability_hints: Mapping[Capability, str] = MappingProxyType(
        {
            Capability.STEER: _ADD_VALUE,
            Capability.ESTIMATES: _ADD_HEAD,
            Capability.GUIDE: _GUIDE_FROM_OUTSIDE,
        }
    )

    def __init__(self, config: Vllm) -> None:
        self.config = config
        self.model = config.model
        self.context_length = int(config.options.get("max_model_len") or 0)
        self._launching: asyncio.Task[tuple[AsyncEngine, Frontend]] | None = None
        self._started: _Started | None = None
        # What `close` has to end, also after a start that failed.
        self._resources = AsyncExitStack()
        self._running: set[RunningDraw] = set()
        self._closed = False

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of the model and of its LoRA adapters."""
        lora_names = self._started.frontend.lora_names if self._started else ()
        return (self.model, *lora_names)

    async def start(self) -> None:
        """Load the model in vLLM's workers.

        Raises:
            ConfigError: vLLM refuses an option, or a value cannot steer this engine.
        """
        values = EngineValues(self.values)
        self._resources.callback(values.close)
        self.progress("importing vLLM")
        self._launching = asyncio.create_task(asyncio.to_thread(self._launch, values))
        try:
            engine, frontend = await asyncio.shield(self._launching)
        except AlignError:
            raise
        except Exception as error:
            raise ConfigError(
                f"vLLM could not start: {error}; see its log above for the cause."
            ) from error
        from infer_align.vllm.compat import call_workers

        self.progress("setting up vLLM's OpenAI layer")
        self._resources.push_async_callback(frontend.close)
        await frontend.start()
        await values.check_weights(engine.collective_rpc)
        self.context_length = engine.model_config.max_model_len
        fetcher = EstimateFetcher(partial(call_workers, engine, "infer_align_take_estimates"))
        self._resources.callback(fetcher.close)
        self._set_capabilities(engine, frontend, values)
        controls = control_tokens(frontend.tokenizer)
        self._started = _Started(engine, frontend, Bodies(frontend), values, fetcher, controls)

    def _set_capabilities(
        self, engine: AsyncEngine, frontend: Frontend, values: EngineValues
    ) -> None:
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
            self.capabilities -= {
                Capability.LOGPROBS,
                Capability.LABEL_LOGPROBS,
                Capability.SEQUENCE_LOGPROBS,
            }
        # Only fast tokenizers of transformers show which tokens spell a text at its place.
        if not getattr(frontend.tokenizer, "is_fast", False):
            self.capabilities -= {Capability.SEQUENCE_LOGPROBS}

    def _launch(self, values: EngineValues) -> tuple[AsyncEngine, Frontend]:
        """Import vLLM and start the workers. Runs in a thread, because both block."""
        from infer_align.vllm import compat
        from infer_align.vllm.openai import Frontend

        options = values.engine_options(self.config.options)
        served_name = self.served_name or self.model
        args = compat.parse_options(locate(self.config.model), served_name, options)
        self.progress("vLLM's workers: weights, memory profile, key-value cache")
        engine = compat.launch(args, values.configure)
        self._resources.push_async_callback(compat.shut_down, engine, abandon_requests=True)
        return engine, Frontend(engine, args)

    async def close(self) -> None:
        """Fail the draws that run, and end the workers."""
        self._closed = True
        await self._abandon_loading()
        for running_draw in [*self._running]:
            running_draw.stream.put(Unavailable("the engine was shut down"))
            running_draw.close()
        await self._resources.aclose()

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
        if self._started is None:
            return LOADING
        if self._started.engine.errored:
            return "vLLM's engine has stopped; see its log for the cause"
        return None

    def _require_started(self) -> _Started:
        if self._started is None:
            raise Unavailable(LOADING)
        return self._started

    def _require_healthy(self) -> _Started:
        reason = self.health()
        if reason is not None:
            raise Unavailable(reason)
        return self._require_started()

    def app(self) -> App | None:
        """Return vLLM's own application, once the engine has started."""
        return None if self._started is None else self._started.frontend.app

    def exposition(self) -> bytes:
        """Return vLLM's metrics, such as vllm:num_requests_running."""
        if self._started is None:
            return b""
        from infer_align.vllm.compat import metrics_text

        return metrics_text()

    def value(self, name: str) -> Value:
        """Return a value by which requests can be steered.

        Raises:
            KeyError: there is no such value.
        """
        if self._started is None:
            return self.values[name]
        return self._started.values.value(name)

    async def add_value(self, name: str, value: Value) -> None:
        """Add a value, or replace the one of the same name, without a restart.

        Raises:
            ConfigError: the value does not fit the model, or the engine was started without values.
        """
        started = self._require_started()
        await started.values.add(name, value, started.engine.collective_rpc)
        self.values = {**self.values, name: value}

    def check(self, draw: Draw) -> None:
        """Have vLLM parse and check the body, and check the values.

        Raises:
            InvalidRequest: vLLM refuses a field or would not read it, or a value does not exist.
        """
        started = self._require_started()
        started.bodies.check(draw)
        started.values.check(draw)

    def sample(self, draw: Draw) -> Stream:
        """Start one request per candidate. The prompt is rendered once and its prefix is cached.

        Raises:
            Unavailable: the engine has not started, is closed, or has died.
        """
        started = self._require_healthy()
        extra_args = started.values.extra_args(draw.steering) if draw.steering else {}
        running_draw = RunningDraw(
            started.frontend, started.bodies, draw, extra_args, started.fetcher
        )
        self._running.add(running_draw)
        running_draw.on_end(self._running.discard)
        return running_draw.stream

    @property
    def control_tokens(self) -> frozenset[str]:
        """Return the tokens of the tokenizer that are not text."""
        return self._started.control_tokens if self._started else frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the model's chat template lacks; none before the start."""
        if self._started is None:
            return ()
        frontend = self._started.frontend
        notes: list[str] = []
        if not frontend.has_system_role:
            notes.append(_NO_SYSTEM_ROLE)
        if not frontend.shows_tools:
            notes.append(_NO_TOOLS)
        return tuple(notes)

    @property
    def has_system_role(self) -> bool:
        """Return True unless the chat template refuses system messages or leaves them out."""
        return self._started is None or self._started.frontend.has_system_role

    def text_of_tokens(self, tokens: Sequence[int]) -> str:
        """Return the text of a prompt of token ids.

        Raises:
            InvalidRequest: the model does not have one of the token ids.
            Unavailable: the engine has not started.
        """
        frontend = self._require_started().frontend
        check_token_ids("prompt", tokens, len(frontend.vocabulary))
        text: str = frontend.tokenizer.decode([*tokens])
        return text

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """Return the number of requests that `read_labels` sends for one query.

        Raises:
            Unsupported: the tokenizer cannot spell a label.
        """
        if self._started is None:
            return super().label_calls(labels)
        return count_requests(self._started.frontend, labels)

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Return the probability of each label as the next text of a conversation.

        Raises:
            Unavailable: the engine has not started, is closed, or has died.
            AlignError: vLLM refuses the messages, or failed.
        """
        return await read_labels(self._require_healthy().frontend, query)

    async def sequence_logprobs(self, query: SequenceQuery) -> SequenceLogprobs:
        """Return the log-probability of each text as the answer to a prompt.

        Raises:
            Unsupported: the query asks for values, or for the tokens of an adapter, or the model
                has no fast tokenizer.
            InvalidRequest: the prompt cannot be rendered, or a text does not fit the context.
            Unavailable: the engine has not started, is closed, or has died.
            AlignError: vLLM failed.
        """
        frontend = self._require_healthy().frontend
        if Capability.SEQUENCE_LOGPROBS not in self.capabilities:
            return await super().sequence_logprobs(query)
        return await sequence_logprobs(frontend, query, self.context_length)
