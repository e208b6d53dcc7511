"""The frozen model with its tokenizer: loading, rendering prompts, one forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from infer_align.decoding.cache import RowCache
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError, InvalidRequest, shown
from infer_align.types import Draw
from infer_align.values import FrozenModel, tokenizer_digest

if TYPE_CHECKING:
    from infer_align.engines.transformers import Transformers

# What a model's generation_config may say about sampling, by the names of SamplingParams.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt."""

    text: str
    ids: list[int]


class Step(NamedTuple):
    """What one forward gives for every row."""

    logits: torch.Tensor  # [B, V] float32, after the last token
    hidden: torch.Tensor  # [B, d] float32, the state that the output layer read; d is 0 where the model does not show it


@dataclass(frozen=True, slots=True)
class Model:
    """A causal LM, frozen, on its device."""

    lm: Any
    tokenizer: Any
    device: torch.device
    eos: frozenset[int]
    context_length: int
    vocabulary: int
    sampling_defaults: Mapping[str, float]
    tap: list[torch.Tensor]  # filled by a hook: the output layer's input in the latest forward
    cell_bytes: int = 0  # keys and values of one token
    hidden_size: int = 0

    @classmethod
    def load(cls, config: Transformers) -> Model:
        """Load from the demo, a folder, or the hub.

        Raises:
            ConfigError: not loadable, no fast tokenizer, or layers that keep no keys and values (state space models).
        """
        path = locate(config.model)
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu")
            if config.device == "auto"
            else config.device
        )
        dtype = (
            ("float32" if device.type == "cpu" else "auto")
            if config.dtype == "auto"
            else config.dtype
        )
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=config.trust_remote_code
            )
            lm = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"[engine] model: {config.model!r} cannot be loaded: {error}"
            ) from error
        if not tokenizer.is_fast:
            raise ConfigError(
                f"[engine] model: {config.model!r} has no fast tokenizer, which streaming needs; convert it to tokenizer.json."
            )
        lm = lm.to(device).eval().requires_grad_(requires_grad=False)
        text_config = lm.config.get_text_config(decoder=True)
        generation: GenerationConfig = lm.generation_config
        eos = (
            generation.eos_token_id
            if generation.eos_token_id is not None
            else tokenizer.eos_token_id
        )
        own = getattr(text_config, "max_position_embeddings", None)
        if own and (config.context_length or 0) > own:
            raise ConfigError(
                f"[engine] context_length: {config.context_length} is over the {own} of {config.model!r}."
            )
        length = config.context_length or own or 2048
        defaults = {
            name: getattr(generation, name)
            for name in SAMPLING_DEFAULTS
            if getattr(generation, name, None) is not None
        }
        model = cls(
            lm=lm,
            tokenizer=tokenizer,
            device=device,
            eos=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
            context_length=int(length),
            vocabulary=int(text_config.vocab_size),
            sampling_defaults=defaults,
            tap=_tap(lm),
        )
        cell_bytes, hidden_size = model.check_cache(config.model)
        return replace(model, cell_bytes=cell_bytes, hidden_size=hidden_size)

    def check_cache(self, name: str) -> tuple[int, int]:
        """Run two tokens through the cache: what cannot be batched row by row fails now, not at the first request.

        Returns:
            Bytes of keys and values that a token takes, and the size of the output layer's input.

        Raises:
            ConfigError: naming the model.
        """
        cache = RowCache()
        try:
            step = self.forward(
                torch.zeros((1, 2), dtype=torch.long, device=self.device), cache, [2]
            )
            if cache.length != 2:
                raise ValueError(f"its cache holds {cache.length} of 2 tokens")
        except (
            AttributeError,
            LookupError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(
                f"[engine] model: {name!r} does not keep plain keys and values, which this engine batches: {error}"
            ) from error
        return cache.nbytes // 2, step.hidden.shape[-1]

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: RowCache, lengths: list[int]) -> Step:
        """One step for every row: [B, Q] token ids, right-aligned, appended to `cache`.

        Args:
            ids: new tokens; a row with fewer than Q has padding on the left.
            cache: the rows' keys and values, appended to here.
            lengths: tokens of each row, these included.
        """
        width = cache.length + ids.shape[1]
        ends = torch.tensor(lengths, device=self.device)
        columns = torch.arange(width, device=self.device)
        positions = columns[None, cache.length :] - (width - ends)[:, None]
        padded = min(lengths) < width
        mask = (columns[None] >= (width - ends)[:, None]).long() if padded else None
        self.tap.clear()
        output = self.lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        return Step(logits, self.tap[-1][:, -1].float() if self.tap else logits[:, :0])

    @torch.inference_mode()
    def states(self, ids: list[int]) -> torch.Tensor:
        """The state in which each next token is chosen: [T] ids -> [T, d] float32."""
        self.tap.clear()
        self.lm(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return self.tap[-1][0].float()

    def frozen(self, name: str) -> FrozenModel:
        """What a value has to fit."""
        digest = tokenizer_digest(self.tokenizer.get_vocab())
        return FrozenModel(name, self.vocabulary, self.hidden_size, digest, str(self.device))

    def render(self, draw: Draw, said: str = "") -> Prompt:
        """The draw's prompt as tokens; `said` is what the assistant's turn begins with.

        Raises:
            InvalidRequest: the chat template refuses the messages, or a part is not text.
        """
        if draw.kind == "completion":
            return self._tokenized(draw.body["prompt"], "prompt", special=True)
        messages = [_plain(i, message) for i, message in enumerate(draw.body["messages"])]
        if "developer" not in str(self.tokenizer.chat_template):  # OpenAI's newer word for it
            messages = [
                {**m, "role": "system"} if m["role"] == "developer" else m for m in messages
            ]
        if not self.tokenizer.chat_template:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions.",
                param="messages",
                code="unsupported",
            )
        options = _template_variables(draw.body.get("chat_template_kwargs") or {})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except (
            Exception
        ) as error:  # a template is code that came with the model, and what it raises is up to it
            raise InvalidRequest(
                f"messages: the model's chat template refused them: {error}.", param="messages"
            ) from None
        return self._tokenized(text + said, "messages", special=False)

    def _tokenized(self, text: str, param: str, *, special: bool) -> Prompt:
        try:
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except (TypeError, UnicodeError):  # what the tokenizer raises for lone surrogates
            raise InvalidRequest(f"{param}: the text is not valid Unicode.", param=param) from None
        if not ids:
            raise InvalidRequest(
                f"{param}: no tokens to start from; must not be empty for this model.", param=param
            )
        return Prompt(text, ids)


def _tap(lm: Any) -> list[torch.Tensor]:
    """A list that the model's output layer puts its input into, at every forward."""
    tap: list[torch.Tensor] = []
    layer = lm.get_output_embeddings()
    if layer is not None:
        layer.register_forward_pre_hook(lambda _, inputs: tap.append(inputs[0]))
    return tap


def _plain(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text parts joined: what chat templates of text models take."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    where = f"messages[{index}].content"
    for part in content:
        if part["type"] not in {"text", "refusal"}:
            raise InvalidRequest(
                f"{where}: a part of type {part['type']!r} is not available on this engine; allowed: text.",
                param=where,
            )
        if not isinstance(part.get(part["type"]), str):
            raise InvalidRequest(
                f"{where}: a part holds {shown(part)}; must hold a string {part['type']!r}.",
                param=where,
            )
    return {**message, "content": "".join(part[part["type"]] for part in content)}


def _template_variables(given: object) -> Mapping[str, Any]:
    """What a client may set in the chat template: its variables, but not the template, nor how it is rendered."""
    path = "chat_template_kwargs"
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"{path}: {shown(given)} is not an object; allowed: the template's variables.",
            param=path,
        )
    if reserved := sorted(
        given.keys()
        & inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    ):
        raise InvalidRequest(
            f"{path}.{reserved[0]}: is not a variable of the template; leave it out.", param=path
        )
    return given
