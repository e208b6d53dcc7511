"""The embedded engine: any causal LM that transformers loads, with continuous batching of our own.

    check, sample ─▶ Prompt (prompt.py) ─▶ Job ─▶ Scheduler thread (scheduler.py): prefill once per prompt, then
    one step of the whole running batch at a time: model (cache.py) ─▶ logits ─▶ sampler.py ─▶ text.py ─▶ Stream

Own batching, because transformers' generates a third as fast on a CPU and its processors cannot be steered row by row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infer_align.decoding.labels import LabelTree, control_tokens
from infer_align.decoding.params import SamplingParams, field_schemas
from infer_align.engines import Engine, Stream
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.reading import Question
from infer_align.engines.transformers.rows import Job
from infer_align.engines.transformers.scheduler import Scheduler
from infer_align.engines.transformers.steering import Steerer
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Capability, Draw, Kind, LabelLogprobs, LabelQuery
from infer_align.values import Value


@dataclass(frozen=True, slots=True)
class Transformers:
    """Any causal LM that transformers loads, in this process."""

    model: str = field(
        default="demo", metadata={"description": 'path or hub id; "demo" is the embedded model'}
    )
    device: str = field(
        default="auto", metadata={"description": '"auto" takes a GPU when there is one'}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "description": 'torch dtype of the weights; "auto" is float32 on a CPU, else the model\'s own'
        },
    )
    context_length: int | None = field(
        default=None,
        metadata={"ge": 8, "description": "tokens of prompt and completion; default: the model's"},
    )
    max_batch: int = field(
        default=256, metadata={"ge": 1, "description": "candidates decoded at once"}
    )
    kv_cache_gib: float = field(
        default=2.0,
        metadata={
            "gt": 0,
            "description": "memory for keys and values; bounds how many candidates run at once",
        },
    )
    prefill_tokens: int = field(
        default=1024,
        metadata={"ge": 16, "description": "prompt tokens read between two decoding steps"},
    )
    threads: int | None = field(
        default=None,
        metadata={"ge": 1, "description": "CPU threads of torch; default: torch's own choice"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"description": "run model code that comes with the weights"}
    )

    def load(self) -> TransformersEngine:
        """The engine, its model not yet loaded."""
        return TransformersEngine(self)


plugin = Transformers


class TransformersEngine(Engine):
    """Tokenizes on the caller's side, samples in one scheduler thread."""

    model: str = ""
    context_length: int = 0
    capabilities: frozenset[Capability] = frozenset(
        {
            Capability.CHAT,
            Capability.COMPLETION,
            Capability.SEED,
            Capability.LOGPROBS,
            Capability.LABEL_LOGPROBS,
            Capability.STEER,
            Capability.ESTIMATES,
        }
    )

    def __init__(self, config: Transformers) -> None:
        self.config = config
        self.model = config.model
        self.context_length = config.context_length or 0
        self._model: Model | None = None
        self._steerer: Steerer | None = None
        self._scheduler: Scheduler | None = None
        self._trees: dict[tuple[str, ...], LabelTree] = {}

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: it cannot be loaded, or it is of a kind that this engine cannot batch.
        """
        self._model = await asyncio.to_thread(Model.load, self.config)
        self.context_length = self._model.context_length
        self._steerer = Steerer(self._model.frozen(self.config.model))
        for name, value in self.values.items():
            await asyncio.to_thread(self._steerer.add, name, value)
        self._scheduler = Scheduler(self._model, self._steerer, self.config)
        self._scheduler.start()

    @property
    def frozen(self) -> Model:
        """The frozen model itself, for fitting values to its states.

        Raises:
            Unavailable: not started.
        """
        if self._model is None:
            raise Unavailable("the model is still loading")
        return self._model

    def value(self, name: str) -> Value:
        """A value that requests can steer by.

        Raises:
            KeyError: no such value.
        """
        return self._steerer.value(name) if self._steerer else self.values[name]

    async def add_value(self, name: str, value: Value) -> None:
        """Let requests steer by another value from now on; one of the same name is replaced.

        Raises:
            ConfigError: it does not fit the model.
        """
        if self._steerer is None:
            raise Unavailable("the model is still loading")
        await asyncio.to_thread(self._steerer.add, name, value)

    async def close(self) -> None:
        """End the scheduler; what still runs is cut off."""
        if self._scheduler:
            await asyncio.to_thread(self._scheduler.stop)

    def health(self) -> str | None:
        """None while the scheduler runs."""
        if self._scheduler is None:
            return "the model is still loading"
        return None if self._scheduler.is_alive() else "the scheduler has stopped"

    def check(self, draw: Draw) -> None:
        """Read the sampling fields, and refuse those that this engine would have to drop."""
        SamplingParams.from_body(draw.body, draw.kind)
        if self._steerer:
            self._steerer.check(draw)

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """Those of `SamplingParams`."""
        return field_schemas(kind)

    def sample(self, draw: Draw) -> Stream:
        """Queue the draw; its candidates join the running batch as soon as there is room.

        Raises:
            InvalidRequest: the prompt cannot be rendered, or prompt and completion do not fit.
            Unavailable: not started, or closed.
        """
        if self._model is None or self._steerer is None or self._scheduler is None:
            raise Unavailable("the model is still loading")
        params = SamplingParams.from_body(draw.body, draw.kind, self._model.sampling_defaults)
        prompt = self._model.render(draw)
        if biased := [token for token in params.logit_bias if token >= self._model.vocabulary]:
            raise InvalidRequest(
                f"logit_bias: {biased[0]} is not a token id; must be from 0 to {self._model.vocabulary - 1}.",
                param="logit_bias",
            )
        room = self._room(draw, len(prompt.ids), params.max_tokens, self._scheduler.capacity)
        job = Job(
            draw,
            params,
            prompt,
            room,
            steering=self._steerer.steering_values(draw),
            estimates=self._steerer.estimate_values(draw),
        )
        if not self._scheduler.is_alive():
            raise Unavailable("the engine was shut down")
        # In the loop's next round: draws that begin together, as those of several directions do, are prefilled together.
        job.loop.call_soon(self._submit, self._scheduler, job)
        return job.stream

    @staticmethod
    def _submit(scheduler: Scheduler, job: Job) -> None:
        try:
            scheduler.submit(job)
        except Unavailable as error:
            job.stream.put(error)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Those of the tokenizer that are not words."""
        return frozenset() if self._model is None else control_tokens(self._model.tokenizer)

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """As many as there are beginnings of labels in this tokenizer.

        Raises:
            Unsupported: a label cannot be spelt.
        """
        return (
            super().label_calls(labels)
            if self._model is None
            else len(self._tree(self._model, labels).readings)
        )

    def _tree(self, model: Model, labels: tuple[str, ...]) -> LabelTree:
        if labels not in self._trees:
            self._trees[labels] = LabelTree(model.tokenizer.get_vocab(), labels)
        return self._trees[labels]

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Queue the reading; it is batched with all that wait, between two decoding steps.

        Raises:
            InvalidRequest: the prompt cannot be rendered.
            Unsupported: a label cannot be spelt by the tokenizer.
            EngineFailed: the prompt does not fit the context or the cache, or the model failed.
            Unavailable: not started, or closed.
        """
        if self._model is None or self._scheduler is None:
            raise Unavailable("the model is still loading")
        tree = self._tree(self._model, query.labels)
        ids = self._model.render(Draw({"messages": query.messages}), query.prefix).ids
        longest = len(ids) + max(len(path) for path in tree.readings)
        if longest > min(self.context_length, self._scheduler.capacity):
            raise EngineFailed(
                f"a judge's prompt of {len(ids)} tokens does not fit the context of {self.context_length}.",
                status=400,
            )
        question = Question(ids, tree)
        await asyncio.sleep(
            0
        )  # whoever asks at the same time tokenizes first: then all are read together
        self._scheduler.submit(question)
        read = await question.answer
        return LabelLogprobs(tree.logprobs(read), len(ids), len(tree.readings))

    def _room(self, draw: Draw, prompt_tokens: int, max_tokens: int | None, capacity: int) -> int:
        prompt = "messages" if draw.kind == "chat" else "prompt"
        left = self.context_length - prompt_tokens
        if left < 1 or (max_tokens or 1) > left:
            asked = f" and {max_tokens} of completion" if max_tokens else ""
            raise InvalidRequest(
                f"max_completion_tokens: {prompt_tokens} tokens of prompt{asked} do not fit the context of {self.context_length}; "
                "shorten the prompt or ask for fewer.",
                param="max_completion_tokens" if left >= 1 else prompt,
                code="context_length_exceeded",
            )
        room = max_tokens or max(1, min(left, capacity - prompt_tokens))
        if prompt_tokens + room > capacity:
            raise InvalidRequest(
                f"max_completion_tokens: a candidate of {prompt_tokens + room} tokens does not fit the key-value cache of "
                f"{capacity}; ask for fewer, or raise [engine] kv_cache_gib.",
                param="max_completion_tokens",
                code="context_length_exceeded",
            )
        return room
