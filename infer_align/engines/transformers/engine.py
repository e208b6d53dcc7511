"""The embedded engine: any causal LM that transformers loads, batched continuously in this process.

    check, sample -> Prompt (prompt.py) -> Job (rows.py) -> Scheduler thread (scheduler.py):
    prefill each prompt once, then one step of the whole batch at a time:
    model -> adjust, steer, sample (infer_align.decoding) -> text -> Stream

The batching of transformers itself is not used: it is three times slower on a CPU, and its logits
processors cannot steer single rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from infer_align.decoding.constraint import ConstraintCompiler
from infer_align.decoding.labels import LabelLogprobs, LabelQuery, LabelTree, control_tokens
from infer_align.decoding.params import (
    STOP_TOKEN_IDS,
    SamplingParams,
    field_schemas,
    stop_token_ids,
    stop_token_ids_schema,
)
from infer_align.decoding.sequences import SequenceLogprobs, SequenceQuery
from infer_align.engines import Engine, Stream
from infer_align.engines.transformers import form as answer_form
from infer_align.engines.transformers.draw import ALSO_READ, ReadDraw, count_prompt, read_draw
from infer_align.engines.transformers.echo import lists_prompt, start_reading
from infer_align.engines.transformers.model import Model
from infer_align.engines.transformers.reading import Question
from infer_align.engines.transformers.room import Room
from infer_align.engines.transformers.rows import Job
from infer_align.engines.transformers.scheduler import Scheduler
from infer_align.engines.transformers.sequence_prompt import query_tokens
from infer_align.engines.transformers.sequences import SequenceQuestion
from infer_align.engines.transformers.steering import LoadedValues
from infer_align.engines.transformers.template import (
    has_system_role,
    set_template,
    template_notes,
)
from infer_align.errors import EngineFailed, InvalidRequest, Unavailable
from infer_align.types import Body, Capability, Draw, Kind
from infer_align.values import Value

if TYPE_CHECKING:
    from infer_align.engines.transformers import Transformers


class _Started(NamedTuple):
    """The parts of an engine that has started, and facts of its tokenizer."""

    model: Model
    values: LoadedValues
    grammars: ConstraintCompiler
    scheduler: Scheduler
    control_tokens: frozenset[str]
    has_system_role: bool


class TransformersEngine(Engine):
    """Reads requests in the caller's thread and samples in one scheduler thread."""

    model: str = ""
    context_length: int = 0
    reads_values = True
    capabilities: frozenset[Capability] = frozenset(
        {
            Capability.CHAT,
            Capability.COMPLETION,
            Capability.SEED,
            Capability.LOGPROBS,
            Capability.LABEL_LOGPROBS,
            Capability.STRUCTURED,
            Capability.TOOLS,
            Capability.STEER,
            Capability.ESTIMATES,
            Capability.GUIDE,
            Capability.SEQUENCE_LOGPROBS,
        }
    )

    def __init__(self, config: Transformers) -> None:
        self.config = config
        self.model = config.model
        self.context_length = config.context_length or 0
        self._started: _Started | None = None
        # The prompts whose logprobs are read before their draws begin.
        self._readings: set[asyncio.Task[None]] = set()
        self._trees: dict[tuple[str, ...], LabelTree] = {}
        # One thread: a client's slow grammars wait for each other, and no other request for them.
        self._grammar_thread = ThreadPoolExecutor(1, "grammar")

    async def start(self) -> None:
        """Load the model and the values, and start the scheduler.

        Raises:
            ConfigError: the model cannot be loaded or batched, or a value does not fit it.
        """
        config = self.config
        model = await asyncio.to_thread(self._load_model)
        self.context_length = model.context_length
        values = LoadedValues(model.frozen(config.model))
        for name, value in self.values.items():
            await asyncio.to_thread(values.add, name, value)
        tokenizer, eos = model.tokenizer, model.eos
        grammars = await asyncio.to_thread(ConstraintCompiler, tokenizer, model.vocabulary, eos)
        scheduler = Scheduler(
            model,
            values,
            max_batch=config.max_batch,
            prefill_tokens=config.prefill_tokens,
            kv_cache_gib=config.kv_cache_gib,
            fits_threads=config.threads is None,
        )
        scheduler.start()
        controls, sees_system = control_tokens(tokenizer), has_system_role(tokenizer)
        self._started = _Started(model, values, grammars, scheduler, controls, sees_system)

    def _load_model(self) -> Model:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        model = Model.load(
            config.model,
            device=config.device,
            dtype=config.dtype,
            context_length=config.context_length,
            trust_remote_code=config.trust_remote_code,
            progress=self.progress,
        )
        set_template(model.tokenizer, config.chat_template)
        return model

    @property
    def notes(self) -> tuple[str, ...]:
        """Return sentences on what the model's chat template lacks; none before the start."""
        return template_notes(self._started.model.tokenizer) if self._started else ()

    def _parts(self) -> _Started:
        if self._started is None:
            raise Unavailable("the model is still loading")
        return self._started

    @property
    def frozen(self) -> Model:
        """Return the frozen model, for fitting values to its states.

        Raises:
            Unavailable: the engine has not started.
        """
        return self._parts().model

    def value(self, name: str) -> Value:
        """Return a value that requests can steer by.

        Raises:
            KeyError: there is no such value.
        """
        return self._started.values.value(name) if self._started else self.values[name]

    async def add_value(self, name: str, value: Value) -> None:
        """Let requests steer by another value from now on. It replaces a value of the same name.

        Raises:
            ConfigError: the value does not fit the model.
            Unavailable: the engine has not started.
        """
        await asyncio.to_thread(self._parts().values.add, name, value)

    async def close(self) -> None:
        """End the scheduler. Running draws end with an error."""
        if self._started:
            await asyncio.to_thread(self._started.scheduler.stop)
        self._grammar_thread.shutdown(wait=False, cancel_futures=True)

    def health(self) -> str | None:
        """Return None while the scheduler runs, else the reason why it does not."""
        if self._started is None:
            return "the model is still loading"
        return None if self._started.scheduler.is_alive() else "the scheduler has stopped"

    def check(self, draw: Draw) -> None:
        """Refuse a draw with fields or values that this engine cannot honour.

        Raises:
            InvalidRequest: naming the field.
        """
        SamplingParams.from_body(draw.body, draw.kind, also_read=ALSO_READ[draw.kind])
        stop_token_ids(draw.body)
        form = answer_form.AnswerForm.read(draw)
        if self._started is None:
            return
        self._started.values.check(draw)
        form.check(self._started.grammars)
        if draw.guidance:
            # The prompts of traits have to fit before anything is spent.
            self._read(draw)

    def is_prepared(self, body: Body, kind: Kind) -> bool:
        """Return True if the grammars of a body have been compiled, or cannot be."""
        return self._uncompiled_form(body, kind) is None

    async def prepare(self, body: Body, kind: Kind) -> None:
        """Compile the grammars of a body. A client's grammar may take seconds."""
        form = self._uncompiled_form(body, kind)
        if form is None or self._started is None:
            return
        grammars, tokenizer = self._started.grammars, self._started.model.tokenizer
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._grammar_thread, form.compile, grammars, tokenizer)

    def _uncompiled_form(self, body: Body, kind: Kind) -> answer_form.AnswerForm | None:
        """Return the form that a body asks for if a grammar of it has not been compiled."""
        if not body.keys() & answer_form.FIELDS[kind]:
            return None
        if self.health() is not None or self._started is None:
            return None
        try:
            form = answer_form.AnswerForm.read(Draw(body, kind=kind))
        except InvalidRequest:
            return None
        grammars, tokenizer = self._started.grammars, self._started.model.tokenizer
        return None if form.is_free or form.is_compiled(grammars, tokenizer) else form

    def field_schemas(self, kind: Kind) -> Mapping[str, Any]:
        """Return the JSON schemas of the sampling fields."""
        return {
            **field_schemas(kind),
            **answer_form.field_schemas(kind),
            STOP_TOKEN_IDS: stop_token_ids_schema(),
        }

    def sample(self, draw: Draw) -> Stream:
        """Queue the draw. Its candidates join the running batch as soon as there is room.

        Raises:
            InvalidRequest: the prompt cannot be rendered, or prompt and completion do not fit.
            Unavailable: the engine has not started or was closed.
        """
        started = self._parts()
        read = self._read(draw)
        job = Job(
            draw,
            read.params,
            read.prompt,
            read.max_tokens,
            guiding=read.guiding,
            steering=started.values.steering_values(draw),
            estimates=started.values.estimate_values(draw),
            constraint=read.form.constraint(started.grammars, read.tools),
            call_constraint=read.form.call_constraint(started.grammars, read.tools),
            tools=read.tools,
            stop_ids=read.stop_ids,
        )
        if not started.scheduler.is_alive():
            raise Unavailable("the engine was shut down")
        if lists_prompt(job):
            reading = start_reading(started.model, started.scheduler, job)
            self._readings.add(reading)
            reading.add_done_callback(self._readings.discard)
            return job.stream
        # Submit in the next round of the event loop: draws that begin together, such as those of
        # several directions, are then prefilled together.
        job.loop.call_soon(started.scheduler.submit_later, job)
        return job.stream

    def _read(self, draw: Draw) -> ReadDraw:
        started = self._parts()
        room = Room(self.context_length, started.scheduler.capacity, self.config.max_batch)
        return read_draw(draw, started.model, room, self.default_max_tokens)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Return the control tokens of the tokenizer; none before the engine has started."""
        return self._started.control_tokens if self._started else frozenset()

    @property
    def reads_chats(self) -> bool:
        """Return True unless the tokenizer has no chat template."""
        return self._started is None or bool(self._started.model.tokenizer.chat_template)

    @property
    def has_system_role(self) -> bool:
        """Return True unless the chat template leaves system messages out."""
        return self._started is None or self._started.has_system_role

    def text_of_tokens(self, tokens: Sequence[int]) -> str:
        """Return the text of a prompt of token ids.

        Raises:
            InvalidRequest: the model does not have one of the token ids.
            Unavailable: the engine has not started.
        """
        return self._parts().model.completion_prompt(list(tokens)).text

    def prompt_tokens(self, draw: Draw) -> int:
        """Return the number of tokens of a draw's prompt; an upper bound before the start."""
        if self._started is None:
            return super().prompt_tokens(draw)
        return count_prompt(draw, self._started.model)

    def label_calls(self, labels: tuple[str, ...]) -> int:
        """Return the number of one-token calls that reading these labels takes.

        Raises:
            Unsupported: the tokenizer cannot spell a label.
        """
        if self._started is None:
            return super().label_calls(labels)
        return len(self._tree(self._started.model, labels).readings)

    def _tree(self, model: Model, labels: tuple[str, ...]) -> LabelTree:
        if labels not in self._trees:
            self._trees[labels] = LabelTree(model.tokenizer.get_vocab(), labels)
        return self._trees[labels]

    async def read_labels(self, query: LabelQuery) -> LabelLogprobs:
        """Return the probability of each label. Questions that wait are read as one batch.

        Raises:
            InvalidRequest: the prompt cannot be rendered.
            Unsupported: the tokenizer cannot spell a label.
            EngineFailed: the prompt does not fit the context or the cache, or the model failed.
            Unavailable: the engine has not started or was closed.
        """
        started = self._parts()
        tree = self._tree(started.model, query.labels)
        ids = started.model.render(Draw({"messages": query.messages}), query.prefix).ids
        longest = len(ids) + max(len(path) for path in tree.readings)
        if longest > min(self.context_length, started.scheduler.capacity):
            raise EngineFailed(
                f"a judge's prompt of {len(ids)} tokens does not fit the context of "
                f"{self.context_length}.",
                status=400,
            )
        question = Question(ids, tree)
        # Let concurrent callers tokenize first, so that their questions are read together.
        await asyncio.sleep(0)
        started.scheduler.submit(question)
        measured = await question.answer
        return LabelLogprobs(tree.logprobs(measured), len(ids), len(tree.readings))

    async def sequence_logprobs(self, query: SequenceQuery) -> SequenceLogprobs:
        """Return the log-probability of each text. Queries that wait are read as one batch.

        Raises:
            InvalidRequest: the prompt cannot be rendered, a text does not fit the context or the
                cache, or a value is unknown or cannot estimate.
            EngineFailed: the model failed.
            Unavailable: the engine has not started or was closed.
        """
        started = self._parts()
        heads = started.values.estimating(query.values)
        longest = min(self.context_length, started.scheduler.capacity)
        prompt, texts = query_tokens(started.model, query, longest)
        question = SequenceQuestion(prompt, texts, heads)
        # Let concurrent callers tokenize first, so that their questions are read together.
        await asyncio.sleep(0)
        started.scheduler.submit(question)
        return await question.answer
