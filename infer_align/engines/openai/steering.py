"""VAS for a model on another server (Han et al. 2405.06639): its top logprobs, and a value LM here.

    tail "mask"  One call per token. The top k tokens are reweighted and sampled here; no other
                 token can be sampled.
    tail "keep"  Two calls per token. The first returns the top k; the second samples one token
                 with logit_bias = beta . (V - mean), clipped at 100.

The upstream reads the prefix again at every token. Prefix caching makes that cheap; without it the
cost is quadratic. The calls are counted in `align.usage.engine_calls`.

This module holds what all steered draws of an engine share; `steered.py` is one steered draw.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transformers import AutoTokenizer

from infer_align.decoding.params import SamplingParams
from infer_align.decoding.text import token_bytes
from infer_align.demo.locate import locate
from infer_align.engines.openai.continuation import (
    TOKEN_ID,
    WAYS,
    Continuation,
    ContinuationPrompt,
    Way,
)
from infer_align.engines.openai.probe import TOP_LOGPROBS
from infer_align.errors import ConfigError, InvalidRequest, Unsupported
from infer_align.messages import Conversation, normalize, render
from infer_align.types import Draw, Steering
from infer_align.upstream import UpstreamFailed
from infer_align.upstream.client import Client
from infer_align.upstream.pool import Host
from infer_align.values import FrozenModel, Value, check_values, tokenizer_digest
from infer_align.values.lookahead import LookaheadValue

T = TypeVar("T")

# Sampling fields that work although each token is a call of its own. A penalty, for example, does
# not: the upstream would apply it to one token only.
SAMPLING_FIELDS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "stop"}
)
FIELDS = SAMPLING_FIELDS | frozenset(
    {
        "model",
        "messages",
        "prompt",
        "user",
        "metadata",
        "chat_template_kwargs",
        "safety_identifier",
        "prompt_cache_key",
    }
)


class Steerer:
    """The tokenizer and the values of one engine, and how its upstreams can be steered.

    Args:
        tokenizer: path or hub id of the upstream model's tokenizer.
        values: the values by name; they are loaded here.

    Attributes:
        vocabulary: {bytes of a token: id}.
        partial_tokens: the tokens that are not whole characters.

    Raises:
        ConfigError: the tokenizer or a value cannot be loaded.
    """

    def __init__(self, tokenizer: str, values: Mapping[str, Value]) -> None:
        self.tokenizer = _load_tokenizer(tokenizer)
        self.vocabulary = _vocabulary(self.tokenizer)
        partial = [token for data, token in self.vocabulary.items() if not _is_text(data)]
        self.partial_tokens = frozenset(partial)
        digest = tokenizer_digest(self.tokenizer.get_vocab())
        frozen = FrozenModel(tokenizer, len(self.tokenizer), 0, digest, "cpu")
        self._values = _started(values, frozen)
        # (URL, model) -> how the upstream continues a prefix; None if it returns no top logprobs.
        self._ways: dict[tuple[str, str], Way | None] = {}
        self._lock = threading.Lock()

    # --- what the upstreams can do ---

    async def probe(self, client: Client, host: Host, model: str) -> None:
        """Find the most exact way in which an upstream continues a prefix with top logprobs.

        Raises:
            AlignError: the upstream did not answer, so that it is still unknown.
        """
        self._ways[host.url, model] = await self._find_way(client, host, model)

    def knows(self, host: Host, model: str) -> bool:
        """Return True if it was found out how an upstream continues a prefix."""
        return (host.url, model) in self._ways

    async def _find_way(self, client: Client, host: Host, model: str) -> Way | None:
        for way in WAYS:
            if await self._works(client, host, Continuation(way, self.vocabulary, model)):
                return way
        return None

    async def _works(self, client: Client, host: Host, continuation: Continuation) -> bool:
        text = "one two"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = ContinuationPrompt(
            text, tuple(ids), {"messages": [{"role": "user", "content": text}]}
        )
        body = continuation.body(prompt, [], "three") | continuation.logprob_fields(2)
        try:
            answer = await client.call_host(host, continuation.path, body)
        except UpstreamFailed as error:
            if error.refused or error.status == 501:
                return False
            raise
        try:
            has_ids = TOKEN_ID in str(answer["choices"][0]["logprobs"])
            has_logprobs = bool(continuation.top_logprobs(answer))
        except (UpstreamFailed, KeyError, IndexError, TypeError):
            return False
        return has_logprobs and (has_ids or continuation.way != "ids")

    def way(self, model: str) -> Way | None:
        """Return how every upstream of the model can continue a prefix, or None if one cannot."""
        ways = {way for (_, name), way in self._ways.items() if name == model}
        if not ways or None in ways:
            return None
        return max((way for way in ways if way), key=WAYS.index)

    # --- draws ---

    def check(self, draw: Draw, steering: Steering, model: str, *, honours_bias: bool) -> None:
        """Refuse what cannot be steered token by token.

        Args:
            draw: the draw.
            steering: its steering.
            model: the upstream's name of the model.
            honours_bias: True if the upstream honours logit_bias.

        Raises:
            InvalidRequest: naming the field.
        """
        check_values(draw, self._values)
        if steering.candidates is None:
            parameter = "top_k" if steering.min_p is None else "min_p"
            raise Unsupported(
                f"align.vas.{parameter}: an upstream shows only its {TOP_LOGPROBS} most likely "
                f"tokens; give a number up to {TOP_LOGPROBS} as align.vas.top_k instead.",
                param=f"align.vas.{parameter}",
            )
        if steering.candidates > TOP_LOGPROBS:
            raise Unsupported(
                f"align.vas.top_k: {steering.candidates} is over the {TOP_LOGPROBS} logprobs that "
                f"an upstream returns; set it to at most {TOP_LOGPROBS}.",
                param="align.vas.top_k",
            )
        if self.way(model) is None and self._ways:
            raise Unsupported(
                f"align.vas: the upstream of {model!r} cannot be steered; use another model.",
                param="align.vas",
            )
        if steering.tail == "keep" and not honours_bias:
            raise Unsupported(
                "align.vas.tail: 'keep' needs logit_bias, which the upstream does not honour; "
                "use the tail 'mask'.",
                param="align.vas.tail",
            )
        for name, value in draw.body.items():
            if name not in FIELDS and value not in (None, False, [], {}, 0):
                raise Unsupported(
                    f"{name}: is not available when vas steers an upstream token by token; "
                    "leave it out.",
                    param=name,
                )
        sampling_params(draw)

    def values_of(self, steering: Steering) -> list[LookaheadValue]:
        """Return the values of a steering, in its order."""
        return [self._values[name] for name in steering.beta]

    def prompt(self, draw: Draw) -> ContinuationPrompt:
        """Return the prompt of a draw.

        Raises:
            InvalidRequest: the chat template refuses the messages.
        """
        if draw.kind == "completion":
            text = draw.body["prompt"]
            return ContinuationPrompt(text, tuple(self.tokenizer(text)["input_ids"]))
        messages = draw.body["messages"]
        options = draw.body.get("chat_template_kwargs") or {}

        def rendered(conversation: Conversation) -> str:
            text: str = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, **options
            )
            return text

        try:
            text = render(rendered, normalize(messages))
        # A template is code, and may raise anything.
        except Exception as error:
            raise InvalidRequest(
                f"messages: the tokenizer's chat template refused them: {error}.", param="messages"
            ) from None
        fields = {"messages": messages}
        if options:
            fields["chat_template_kwargs"] = options
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ContinuationPrompt(text, tuple(ids), fields)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a forward pass of a value LM in a thread: one at a time, as each uses all cores."""

        def locked() -> T:
            with self._lock:
                return work()

        return await asyncio.to_thread(locked)


def sampling_params(draw: Draw) -> SamplingParams:
    """Read the sampling fields that work when an upstream is steered token by token.

    Raises:
        InvalidRequest: naming the field.
    """
    fields = {name: value for name, value in draw.body.items() if name in SAMPLING_FIELDS}
    return SamplingParams.from_body(fields, draw.kind)


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer: {name!r} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer: {name!r} has no fast tokenizer, which streaming needs.")
    return tokenizer


def _started(values: Mapping[str, Value], frozen: FrozenModel) -> dict[str, LookaheadValue]:
    """Load the values.

    Raises:
        ConfigError: a value is not a lookahead, or cannot be loaded.
    """
    shared: dict[object, Any] = {}
    started = {}
    for name, value in values.items():
        if not isinstance(value, LookaheadValue):
            raise ConfigError(
                f"[values.{name}] reads the model's hidden states, which an upstream does not "
                "return; use a value of kind lookahead."
            )
        value.start(frozen, shared)
        started[name] = value
    return started


def _vocabulary(tokenizer: Any) -> dict[bytes, int]:
    """Return {bytes of a token: id}, with the lowest id of equal tokens."""
    vocabulary: dict[bytes, int] = {}
    for token in range(len(tokenizer)):
        vocabulary.setdefault(token_bytes(tokenizer, token), token)
    vocabulary.pop(b"", None)
    return vocabulary


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False
