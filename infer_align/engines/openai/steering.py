"""Steering a model on another server: its top logprobs are read, and changed, token by token.

    vas, tail "mask"  One call per token. The top k tokens are reweighted and sampled here; no other
                      token can be sampled.
    vas, tail "keep"  Two calls per token. The first returns the top k; the second samples one token
                      with logit_bias = beta . (V - mean), clipped at 100.
    guidance          One call per token and context, side by side, and one for each plausible token
                      that a context hides. The tokens are guided (`contexts.py`), reweighted by
                      vas if it is there, and sampled here.

VAS is Han et al. 2405.06639, with a value LM here. The upstream reads the prefix again at every
token. Prefix caching makes that cheap; without it the cost is quadratic. The calls are counted in
`align.usage.engine_calls`.

This module holds what all steered draws of an engine share; `steered.py` is one steered draw, and
`ways.py` finds out which upstreams can be steered.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from transformers import AutoTokenizer, GenerationConfig

from infer_align.decoding.params import SamplingParams
from infer_align.decoding.template_variables import FIELD, template_variables
from infer_align.decoding.text import token_bytes
from infer_align.decoding.token_length import TokenLength, check_length
from infer_align.demo.locate import locate
from infer_align.engines.openai.contexts import GuidanceContexts
from infer_align.engines.openai.continuation import ContinuationPrompt
from infer_align.engines.openai.probe import TOP_LOGPROBS
from infer_align.engines.openai.ways import UpstreamWays
from infer_align.errors import ConfigError, InvalidRequest, Unsupported, field_path
from infer_align.messages import SYSTEM_MARK, SYSTEM_PROBE, Conversation, normalize, render
from infer_align.steering import Guidance, Steering
from infer_align.types import Body, Draw, Kind
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

PROMPT_FIELDS: Mapping[Kind, str] = {"chat": "messages", "completion": "prompt"}
# The fields of a tokenizer that name an end: of the text, of a turn, of a message.
END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Steerer:
    """The tokenizer and the values of one engine, and how its upstreams can be steered.

    Args:
        tokenizer: path or hub id of the upstream model's tokenizer.
        values: the values by name; they are loaded here.

    Attributes:
        vocabulary: {bytes of a token: id}.
        partial_tokens: the tokens that are not whole characters.
        end_tokens: the tokens that end an answer.
        ways: how each upstream continues a prefix.
        has_system_role: False if the tokenizer's chat template shows no system messages.

    Raises:
        ConfigError: the tokenizer or a value cannot be loaded.
    """

    def __init__(self, tokenizer: str, values: Mapping[str, Value]) -> None:
        self.tokenizer = _load_tokenizer(tokenizer)
        self._token_length = TokenLength.of(self.tokenizer)
        self.vocabulary = _vocabulary(self.tokenizer)
        partial = [token for data, token in self.vocabulary.items() if not _is_text(data)]
        self.partial_tokens = frozenset(partial)
        self.end_tokens = _end_tokens(tokenizer, self.tokenizer)
        self.ways = UpstreamWays(self.vocabulary, self._tokenize)
        self.has_system_role = self._shows_system()
        digest = tokenizer_digest(self.tokenizer.get_vocab())
        frozen = FrozenModel(tokenizer, len(self.tokenizer), 0, digest, "cpu")
        self._values = _started(values, frozen)
        self._lock = threading.Lock()

    def check(
        self, draw: Draw, model: str, *, honours_bias: bool, context_length: int | None
    ) -> None:
        """Refuse what cannot be steered token by token.

        Args:
            draw: the draw, which has steering or guidance.
            model: the upstream's name of the model.
            honours_bias: True if the upstream honours logit_bias.
            context_length: tokens of prompt and answer together; None if they are unknown.

        Raises:
            InvalidRequest: naming the field.
        """
        if draw.steering:
            needs_bias = draw.steering.tail == "keep" and not draw.guidance
            lacks_bias = needs_bias and not honours_bias
            self._check_steering(draw, draw.steering, model, lacks_bias=lacks_bias)
        method = "guidance" if draw.guidance else "vas"
        for name, value in draw.body.items():
            if name not in FIELDS and value not in (None, False, [], {}, 0):
                field = field_path(name)
                raise Unsupported(
                    f"{field}: is not available when {method} steers an upstream token by token; "
                    "leave it out.",
                    param=field,
                )
        sampling_params(draw)
        if draw.guidance:
            self._check_guidance(draw, draw.guidance, context_length)

    def _check_steering(
        self, draw: Draw, steering: Steering, model: str, *, lacks_bias: bool
    ) -> None:
        check_values(draw, self._values)
        if steering.max_kl is not None:
            raise Unsupported(
                "align.vas.max_kl: the divergence cannot be computed, because an upstream shows "
                f"only its {TOP_LOGPROBS} most likely tokens; leave it out and use a smaller beta.",
                param="align.vas.max_kl",
            )
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
        if self.ways.refuses(model):
            raise Unsupported(
                f"align.vas: the upstream of {model!r} cannot be steered; use another model.",
                param="align.vas",
            )
        if lacks_bias:
            raise Unsupported(
                "align.vas.tail: 'keep' needs logit_bias, which the upstream does not honour; "
                "use the tail 'mask'.",
                param="align.vas.tail",
            )

    def _check_guidance(self, draw: Draw, guidance: Guidance, context_length: int | None) -> None:
        """Render every context, and refuse one that leaves no room for an answer."""
        contexts = GuidanceContexts.of(draw.body, guidance)
        for i, body in enumerate(contexts.bodies):
            tokens = len(self.prompt(draw.kind, body, context_length).ids)
            if context_length is not None and tokens >= context_length:
                param = contexts.params[i] or PROMPT_FIELDS[draw.kind]
                raise InvalidRequest(
                    f"{param}: the request {contexts.names[i]} has {tokens} tokens, which leave no "
                    f"room for an answer in the model's context of {context_length}; shorten it.",
                    param=param,
                    code="context_length_exceeded",
                )

    def values_of(self, steering: Steering) -> list[LookaheadValue]:
        """Return the values of a steering, in its order."""
        return [self._values[name] for name in steering.beta]

    def prompt(
        self, kind: Kind, body: Body, context_length: int | None = None
    ) -> ContinuationPrompt:
        """Return the prompt of a body.

        Args:
            kind: the kind of the request.
            body: its body.
            context_length: tokens of prompt and answer together; None if they are unknown.

        Raises:
            InvalidRequest: the chat template refuses the messages, a variable is none of it, or the
                prompt cannot fit the context.
        """
        if kind == "completion":
            text = body["prompt"]
            check_length(text, self._token_length, context_length, "prompt")
            return ContinuationPrompt(text, tuple(self.tokenizer(text)["input_ids"]))
        messages = body["messages"]
        options = template_variables(body.get(FIELD))

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
        check_length(text, self._token_length, context_length, "messages")
        fields = {"messages": messages}
        if options:
            fields[FIELD] = options
        return ContinuationPrompt(text, tuple(self._tokenize(text)), fields)

    def _tokenize(self, text: str) -> Sequence[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _shows_system(self) -> bool:
        """Return False if the chat template leaves system messages out, or refuses them."""
        if not self.tokenizer.chat_template:
            # The upstream has a template of its own.
            return True
        try:
            return SYSTEM_MARK in self.prompt("chat", {"messages": SYSTEM_PROBE}).text
        except InvalidRequest:
            return False

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


def _end_tokens(name: str, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of a generation_config.

    A chat model often lists its end of turn only there.
    """
    ends = [getattr(tokenizer, field, None) for field in END_FIELDS]
    # A tokenizer may come without the rest of its model.
    with suppress(OSError, ValueError):
        listed = GenerationConfig.from_pretrained(locate(name)).eos_token_id
        ends += listed if isinstance(listed, list) else [listed]
    return frozenset(end for end in ends if isinstance(end, int) and end >= 0)


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
