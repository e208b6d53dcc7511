"""vLLM's own OpenAI layer over an engine of this process.

vLLM renders prompts, parses tool calls and reasoning, sets up grammars and words its errors, as in
`vllm serve`.
"""

from __future__ import annotations

import copy
import functools
import math
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel, ValidationError
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from infer_align.errors import AlignError, ConfigError, InvalidRequest, quote
from infer_align.messages import SYSTEM_MARK, SYSTEM_PROBE
from infer_align.stages import trace_headers
from infer_align.types import ANSWER_FIELDS, Kind, Messages
from infer_align.vllm import compat, readings
from infer_align.vllm.forced_calls import parse_forced_calls
from infer_align.vllm.interfaces import CandidateCall, Completion, error_from_json

REQUEST_CLASSES = {"chat": ChatCompletionRequest, "completion": CompletionRequest}
# The name of a tool that no template holds.
_TOOL_MARK = "infer_align_tool"

# The call that the current task makes. Requests that vLLM's own application serves have none.
_call: ContextVar[CandidateCall | None] = ContextVar("_call", default=None)


class EngineProxy:
    """An engine for vLLM's OpenAI layer that applies the current CandidateCall to each request.

    Attributes:
        generate: AsyncLLM.generate; all other attributes are those of the engine.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self.generate = _apply_call(engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _apply_call(engine: AsyncLLM) -> Callable[..., AsyncGenerator[Any, None]]:
    """Return AsyncLLM.generate with the same parameters, which also applies the current call."""
    generate: Callable[..., AsyncGenerator[Any, None]] = engine.generate
    # Without an endpoint vLLM drops the headers, with a warning.
    is_traced = engine.vllm_config.observability_config.otlp_traces_endpoint is not None

    def wrapped(
        prompt: object, sampling_params: SamplingParams, request_id: str, **options: object
    ) -> AsyncGenerator[Any, None]:
        call = _call.get()
        if call is not None:
            call.request_id = request_id
            if call.extra_args:
                extra_args = sampling_params.extra_args or {}
                sampling_params.extra_args = {**extra_args, **call.extra_args}
        headers = trace_headers() if is_traced else {}
        if headers:
            # vLLM's span is a child of the stage that asks, not of the client's span.
            options["trace_headers"] = headers
        return generate(prompt, sampling_params, request_id, **options)

    return wrapped


class Frontend:
    """vLLM's whole application over an AsyncLLM, and its two serving objects for candidates.

    Attributes:
        model: name under which the model is served.
        lora_names: names of the LoRA adapters.
        vocabulary: token ids of the tokenizer by token.
        app: vLLM's ASGI application, available after `start`.
        has_system_role: False if the chat template refuses system messages or leaves them out.
            Final after `start`.
        shows_tools: False if the chat template leaves tools out. Final after `start`.
    """

    def __init__(self, engine: AsyncLLM, args: Namespace) -> None:
        self._engine = EngineProxy(engine)
        self._args = args
        self._lifespan = AsyncExitStack()
        self.model: str = args.served_model_name[0]
        self.lora_names: tuple[str, ...] = tuple(module.name for module in args.lora_modules or ())
        self.has_system_role = True
        self.shows_tools = True
        self.vocabulary: dict[str, int] = compat.vocabulary_of(engine.model_config)

    async def start(self) -> None:
        """Build the application. Call it in the event loop that will serve.

        Raises:
            ConfigError: the model does not generate text.
        """
        tasks = await self._engine.get_supported_tasks()
        if "generate" not in tasks:
            raise ConfigError(
                f"[engine] model: {self._args.model!r} does not generate text. Its tasks in vLLM: "
                f"{', '.join(tasks)}; choose a model that generates text."
            )
        self.app = build_app(self._args, tasks, self._engine.model_config)
        await init_app_state(self._engine, self.app.state, self._args, tasks)
        # vLLM would stop this server when the engine dies. Ours goes on and answers 503.
        self.app.state.server = SimpleNamespace(should_exit=False)
        chat = self.app.state.openai_serving_chat
        completion = self.app.state.openai_serving_completion
        self._serving = {"chat": chat, "completion": completion}
        self._render_functions = {
            "chat": chat.render_chat_request,
            "completion": completion.render_completion_request,
        }
        chat.render_chat_request = functools.partial(self._render_once, "chat")
        completion.render_completion_request = functools.partial(self._render_once, "completion")
        parse_forced_calls(chat)
        await self._lifespan.enter_async_context(self.app.router.lifespan_context(self.app))
        self.has_system_role = await self._shows_system()
        self.shows_tools = await self._shows_tool()

    async def _shows_system(self) -> bool:
        """Render a system message, and look for it in the prompt. Nothing is generated."""
        try:
            prompt = await self.prompt_ids(SYSTEM_PROBE, "")
        except InvalidRequest:
            return False
        return SYSTEM_MARK in self.tokenizer.decode(prompt)

    async def _shows_tool(self) -> bool:
        """Render a tool, and look for its name in the prompt. Nothing is generated."""
        tool = {"type": "function", "function": {"name": _TOOL_MARK}}
        messages = [{"role": "user", "content": "x"}]
        try:
            prompt = await self.chat_ids(
                {"messages": messages, "tools": [tool], "tool_choice": "required"}
            )
        except AlignError:
            # Without a parser for calls, vLLM refuses the choice.
            return True
        return _TOOL_MARK in self.tokenizer.decode(prompt)

    async def close(self) -> None:
        """End the background tasks of the application."""
        await self._lifespan.aclose()

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the model."""
        return self._engine.get_tokenizer()

    async def _render_once(self, kind: Kind, request: BaseModel) -> Any:
        """Render a request, or copy the prompt that its call carries."""
        call = _call.get()
        if call is None:
            return await self._render_functions[kind](request)
        if call.prompt is None:
            return await self.render(kind, request)
        if kind == "completion":
            return [copy.copy(prompt) for prompt in call.prompt]
        conversation, prompts = call.prompt
        return conversation, [copy.copy(prompt) for prompt in prompts]

    def field_names(self, kind: Kind) -> frozenset[str]:
        """Return the names of the body's fields that vLLM reads."""
        return frozenset(REQUEST_CLASSES[kind].model_fields)

    def parse(self, kind: Kind, body: Mapping[str, Any]) -> BaseModel:
        """Parse a body to a request object of vLLM.

        Raises:
            InvalidRequest: vLLM refuses a field; the message is vLLM's.
        """
        try:
            request: BaseModel = REQUEST_CLASSES[kind](**body)
        except ValidationError as error:
            raise _invalid_request(error) from None
        except Exception as error:
            raise compat.convert_error(error) from None
        return request

    def check(self, kind: Kind, request: Any) -> None:
        """Have vLLM check the sampling fields before anything is generated.

        Raises:
            InvalidRequest: vLLM refuses a field.
        """
        if kind == "chat":
            max_tokens = request.max_completion_tokens or request.max_tokens
        else:
            max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = 1
        defaults = self._serving[kind].default_sampling_params
        try:
            request.to_sampling_params(max_tokens, defaults)
        except Exception as error:
            raise compat.convert_error(error) from None

    async def render(self, kind: Kind, request: BaseModel) -> Any:
        """Render a request's prompt, for `CandidateCall.prompt`. vLLM also prepares the request.

        Raises:
            AlignError: vLLM refuses the request.
        """
        try:
            return _without_error(await self._render_functions[kind](request))
        except AlignError as error:
            raise _about_prompt(error, kind) from None
        except Exception as error:
            raise _about_prompt(compat.convert_error(error), kind) from error

    async def prompt_ids(self, messages: Messages, prefix: str) -> list[int]:
        """Return the token ids of a conversation and of the beginning of the assistant's answer.

        Raises:
            AlignError: vLLM refuses the messages.
        """
        prompt = await self.chat_ids({"messages": [*messages]})
        prefix_ids = self.tokenizer.encode(prefix, add_special_tokens=False) if prefix else []
        return [*prompt, *prefix_ids]

    async def chat_ids(self, fields: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a chat's prompt.

        Args:
            fields: the fields of a chat's body that shape its prompt.

        Raises:
            AlignError: vLLM refuses the fields.
        """
        request = self.parse("chat", {"model": self.model, **fields})
        _, (prompt,) = await self.render("chat", request)
        return [*prompt["prompt_token_ids"]]

    async def completion_ids(self, text: str) -> list[int]:
        """Return the token ids of the prompt of a text completion.

        Raises:
            AlignError: vLLM refuses the prompt.
        """
        request = self.parse("completion", {"model": self.model, "prompt": text})
        (prompt,) = await self.render("completion", request)
        return [*prompt["prompt_token_ids"]]

    async def complete(self, kind: Kind, request: BaseModel, call: CandidateCall) -> Completion:
        """Generate the one choice of a request that does not stream.

        Raises:
            AlignError: vLLM refuses the request, or failed.
        """
        response = await self._create(kind, request, call)
        choice = response.choices[0].model_dump()
        del choice["index"]
        fields = response.model_dump(exclude=set(ANSWER_FIELDS), exclude_none=True)
        return Completion(choice, response.usage.model_dump(), fields)

    async def stream(
        self, kind: Kind, request: BaseModel, call: CandidateCall
    ) -> AsyncIterator[str]:
        """Generate the one choice of a streaming request; return its server-sent events.

        Raises:
            AlignError: vLLM refuses the request.
        """
        events: AsyncIterator[str] = await self._create(kind, request, call)
        return events

    async def _create(self, kind: Kind, request: BaseModel, call: CandidateCall) -> Any:
        # The variable is that of the current task alone.
        _call.set(call)
        serving = self._serving[kind]
        create = serving.create_chat_completion if kind == "chat" else serving.create_completion
        try:
            return _without_error(await create(request))
        except AlignError:
            raise
        except Exception as error:
            raise compat.convert_error(error) from error

    async def label_logprobs(
        self, prompt: Sequence[int], tokens: Sequence[int]
    ) -> dict[int, float]:
        """Return the logprob of each of `tokens` as the next token of a prompt of token ids.

        Raises:
            AlignError: vLLM refuses the prompt, or failed.
        """
        request_id = f"label-{uuid.uuid4().hex}"
        return await readings.label_logprobs(self._engine, prompt, tokens, request_id)

    @property
    def cached_block(self) -> float:
        """Return the tokens of the smallest prefix that the engine caches; infinity if none."""
        cache = self._engine.vllm_config.cache_config
        return cache.block_size if cache.enable_prefix_caching else math.inf

    async def text_logprobs(
        self, prompt: Sequence[int], text: Sequence[int], *, uses_cache: bool
    ) -> tuple[list[float], int]:
        """Return the logprob of each token of a text after a prompt; see `readings.text_logprobs`.

        Raises:
            AlignError: vLLM refuses the prompt, or failed.
        """
        request_id = f"text-{uuid.uuid4().hex}"
        return await readings.text_logprobs(
            self._engine, prompt, text, request_id, uses_cache=uses_cache
        )

    def generated_tokens(self, call: CandidateCall) -> int:
        """Return the number of tokens that a running call has so far; 0 if it does not run."""
        return compat.generated_tokens(self._engine, call.request_id)

    async def abort(self, call: CandidateCall) -> None:
        """Abort a call if the engine has received it."""
        if call.request_id:
            await self._engine.abort(call.request_id)


def _without_error(response: Any) -> Any:
    """Return the response; raise it if it is an error object."""
    if isinstance(response, ErrorResponse):
        raise error_from_json(response.error.model_dump())
    return response


def _about_prompt(error: AlignError, kind: Kind) -> AlignError:
    """Return a refusal of the prompt that names the prompt, if vLLM named no field of the body."""
    if not isinstance(error, InvalidRequest) or error.param in REQUEST_CLASSES[kind].model_fields:
        return error
    field_name = "messages" if kind == "chat" else "prompt"
    return InvalidRequest(f"{field_name}: {error.message}", param=field_name, status=error.status)


def _invalid_request(error: ValidationError) -> InvalidRequest:
    """Convert the first failure of a validation."""
    failure = error.errors(include_url=False)[0]
    cause = failure.get("ctx", {}).get("error")
    message = str(cause) if cause else f"{quote(failure['input'])}: {failure['msg']}"
    if isinstance(cause, VLLMValidationError) and cause.parameter:
        return InvalidRequest(message, param=cause.parameter)
    if not failure["loc"]:
        return InvalidRequest(message)
    field_name = str(failure["loc"][0])
    return InvalidRequest(f"{field_name}: {message}", param=field_name)
