"""vLLM's own OpenAI layer over an engine of ours: the half of `vllm_compat` that a server needs and a worker does not."""

# mypy: disable-error-code="import-not-found,import-untyped"
# ruff: noqa: PLC0415 - vLLM's modules are loaded by who starts it
from __future__ import annotations

import copy
import functools
from argparse import Namespace
from collections.abc import Mapping
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from infer_align.errors import AlignError, ConfigError, InvalidRequest, quote
from infer_align.types import Kind, Messages
from infer_align.vllm.compat import refusal, refused, vocabulary_of


@dataclass(slots=True)
class Job:
    """One candidate's way through vLLM's OpenAI layer: what it carries to the engine, and the name it got there."""

    extra_args: Mapping[str, Any] = field(default_factory=dict)  # for SamplingParams.extra_args
    rendered: Any = None  # the prompt, where it was rendered for all candidates of a draw
    request_id: str | None = None


_job: ContextVar[Job | None] = ContextVar("_job", default=None)


class Client:
    """The engine as vLLM's OpenAI layer sees it. A request without a job passes untouched."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """AsyncLLM.generate."""
        if job := _job.get():
            job.request_id = request_id
            if job.extra_args:
                sampling_params.extra_args = {
                    **(sampling_params.extra_args or {}),
                    **job.extra_args,
                }
        return self._engine.generate(prompt, sampling_params, request_id, **options)


class Frontend:
    """vLLM's OpenAI layer over an AsyncLLM: its whole application, and its two serving objects for our candidates.

    What renders prompts, parses tool calls and reasoning, sets up grammars and words errors is vLLM's, here as in `vllm serve`.
    """

    def __init__(self, engine: Any, args: Namespace) -> None:
        self._client = Client(engine)
        self._args = args
        self._open = AsyncExitStack()
        self.model: str = args.served_model_name[0]
        self.variants: tuple[str, ...] = tuple(module.name for module in args.lora_modules or ())
        self.vocabulary: dict[str, int] = vocabulary_of(engine.model_config)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self._client.get_tokenizer()

    async def start(self) -> None:
        """Build the application; in the event loop that will serve."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._client.get_supported_tasks()
        if "generate" not in tasks:
            raise ConfigError(
                f"[engine] model: {self._args.model!r} does not generate text; vLLM knows it for {', '.join(tasks)}."
            )
        self.app = build_app(self._args, tasks, self._client.model_config)
        await init_app_state(self._client, self.app.state, self._args, tasks)
        self.app.state.server = SimpleNamespace(
            should_exit=False
        )  # what vLLM would stop when the engine dies; we answer 503
        self.chat = self.app.state.openai_serving_chat
        self.completion = self.app.state.openai_serving_completion
        self._render = {
            "chat": self.chat.render_chat_request,
            "completion": self.completion.render_completion_request,
        }
        self.chat.render_chat_request = functools.partial(self._rendered, "chat")
        self.completion.render_completion_request = functools.partial(self._rendered, "completion")
        await self._open.enter_async_context(self.app.router.lifespan_context(self.app))

    async def close(self) -> None:
        """End what runs beside the application."""
        await self._open.aclose()

    async def _rendered(self, kind: Kind, request: Any) -> Any:
        job = _job.get()
        if job is None or job.rendered is None:
            return await self._render[kind](request)
        if kind == "completion":
            return [copy.copy(prompt) for prompt in job.rendered]
        conversation, prompts = job.rendered
        return conversation, [copy.copy(prompt) for prompt in prompts]

    def request(self, kind: Kind, body: Mapping[str, Any]) -> Any:
        """A body as vLLM reads it.

        Raises:
            InvalidRequest: vLLM refuses it, in its own words.
        """
        try:
            return _request_class(kind)(**body)
        except ValidationError as error:
            raise _invalid(error) from None
        except Exception as error:
            raise refusal(error) from None

    def check(self, kind: Kind, request: Any) -> None:
        """Have vLLM look at the sampling fields before anything is spent.

        Raises:
            InvalidRequest: vLLM refuses one.
        """
        serving = self.chat if kind == "chat" else self.completion
        most = (
            request.max_tokens
            if kind == "completion"
            else request.max_completion_tokens or request.max_tokens
        )
        try:
            request.to_sampling_params(1 if most is None else most, serving.default_sampling_params)
        except Exception as error:
            raise refusal(error) from None

    async def render(self, kind: Kind, request: Any) -> Any:
        """The request's prompt, as `Job.rendered`; the request is prepared along with it.

        Raises:
            AlignError: vLLM refuses it.
        """
        try:
            return _accepted(await self._render[kind](request))
        except AlignError:
            raise
        except Exception as error:
            raise refusal(error) from error

    async def turn(self, messages: Messages, said: str) -> list[int]:
        """The token ids of a conversation up to the assistant's next turn, of which `said` is said already.

        Raises:
            AlignError: vLLM refuses the messages.
        """
        request = self.request("chat", {"model": self.model, "messages": [*messages]})
        _, (prompt,) = await self.render("chat", request)
        continued = self.tokenizer.encode(said, add_special_tokens=False) if said else []
        return [*prompt["prompt_token_ids"], *continued]

    async def answer(self, kind: Kind, request: Any, job: Job) -> Any:
        """One request, carried by `job`: vLLM's response object or, of a streaming request, its server-sent events.

        Raises:
            AlignError: vLLM refuses it, or failed.
        """
        _job.set(job)  # of this task alone
        create = (
            self.chat.create_chat_completion
            if kind == "chat"
            else self.completion.create_completion
        )
        try:
            return _accepted(await create(request))
        except AlignError:
            raise
        except Exception as error:
            raise refusal(error) from error


def request_fields(kind: Kind) -> frozenset[str]:
    """The names of a body that vLLM reads."""
    return frozenset(_request_class(kind).model_fields)


def _request_class(kind: Kind) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return ChatCompletionRequest if kind == "chat" else CompletionRequest


def _accepted(answer: Any) -> Any:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    if isinstance(answer, ErrorResponse):
        raise refused(answer.error.model_dump())
    return answer


def _invalid(error: ValidationError) -> InvalidRequest:
    from vllm.exceptions import VLLMValidationError

    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    message = str(cause) if cause else f"{quote(first['input'])}: {first['msg']}"
    if isinstance(cause, VLLMValidationError) and cause.parameter:
        return InvalidRequest(message, param=cause.parameter)
    field_name = str(first["loc"][0]) if first["loc"] else None
    return InvalidRequest(f"{field_name}: {message}" if field_name else message, param=field_name)
