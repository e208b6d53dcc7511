"""The frozen model with its tokenizer: loading it and running one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from infer_align.checkpoints.rope import fix_rope, longest_context, reads_rows_alone
from infer_align.checkpoints.types import check_weights_type
from infer_align.decoding.cache import RowCache
from infer_align.decoding.params import check_token_ids
from infer_align.decoding.sequences import check_token_prompt
from infer_align.decoding.token_length import SHORT_TEXT, TokenLength, check_length
from infer_align.decoding.tools import ToolRequest
from infer_align.engines.transformers.int8_layers import (
    INT8,
    check_int8,
    quantize_linear_layers,
)
from infer_align.engines.transformers.linear_layers import quicken_linear_layers
from infer_align.engines.transformers.prompt import Prompt, render, tokenize
from infer_align.engines.transformers.weights import check_causal, load_weights
from infer_align.errors import ConfigError
from infer_align.types import Draw
from infer_align.values import FrozenModel, tokenizer_digest
from infer_align.values._fingerprint import Fingerprint, fingerprint

# Sampling parameters that a model's generation_config may set, by the names of SamplingParams.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Tokens of prompt and completion where neither the model nor the configuration names a maximum.
CONTEXT_LENGTH = 2048


class Step(NamedTuple):
    """The result of one forward pass for B rows.

    Attributes:
        logits: [B, V] float32, after the last token.
        hidden: [B, d] float32, the state that the output layer read. d is 0 if the model has no
            output layer that can be observed.
    """

    logits: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def stack(cls, steps: Sequence[Step]) -> Step:
        """Return the rows of all steps, one after the other."""
        if len(steps) == 1:
            return steps[0]
        logits = torch.cat([step.logits for step in steps])
        return cls(logits, torch.cat([step.hidden for step in steps]))

    def take(self, rows: list[int]) -> Step:
        """Return these rows."""
        return Step(self.logits[rows], self.hidden[rows])


@dataclass(frozen=True, slots=True)
class Model:
    """A frozen causal LM on its device.

    Attributes:
        lm: the transformers model.
        tokenizer: its fast tokenizer.
        device: where the model is.
        eos: the end-of-sequence tokens.
        context_length: maximum number of tokens of prompt and completion together.
        vocabulary: number of token ids.
        sampling_defaults: the sampling parameters of the model's generation_config.
        tap: inputs of the output layer in the latest forward pass; a hook fills it.
        weights: fingerprint of the weights before they are quantized.
        cell_bytes: bytes of keys and values of one token.
        hidden_size: size of the output layer's input.
        token_length: the bytes that one token stands for; None if there is no limit.
    """

    lm: Any
    tokenizer: Any
    device: torch.device
    eos: frozenset[int]
    context_length: int
    vocabulary: int
    sampling_defaults: Mapping[str, float]
    tap: list[torch.Tensor]
    weights: Fingerprint
    cell_bytes: int = 0
    hidden_size: int = 0
    token_length: TokenLength | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str,
        dtype: str,
        context_length: int | None,
        trust_remote_code: bool,
        progress: Callable[[str], None],
    ) -> Model:
        """Load a model from the demo, a folder, a GGUF file or the hub.

        Raises:
            ConfigError: the model cannot be loaded, lacks weights or a fast tokenizer, or has
                layers without keys and values, such as state space models; or its linear layers
                cannot have int8 weights.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        on_device = torch.device(device)
        lm, tokenizer = load_weights(
            name,
            _weights_type(dtype, on_device),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        lm = lm.to(on_device).eval().requires_grad_(requires_grad=False)
        weights = fingerprint(lm.named_parameters())
        if dtype == INT8:
            replaced, layers = quantize_linear_layers(lm)
            progress(f"{replaced} of {layers} linear layers with int8 weights")
        quicken_linear_layers(lm)
        text_config = lm.config.get_text_config(decoder=True)
        maximum = longest_context(text_config)
        if maximum and (context_length or 0) > maximum:
            raise ConfigError(
                f"[engine] context_length: {context_length} is over the {maximum} of {name!r}."
            )
        # `dynamic` positions can be stretched beyond these.
        trained = getattr(text_config, "max_position_embeddings", None)
        context_length = int(context_length or trained or CONTEXT_LENGTH)
        _fix_positions(name, lm, context_length)
        model = cls(
            lm=lm,
            tokenizer=tokenizer,
            device=on_device,
            eos=end_tokens(lm, tokenizer),
            context_length=context_length,
            vocabulary=int(text_config.vocab_size),
            sampling_defaults=_sampling_defaults(lm),
            tap=_tap_output_layer(lm),
            weights=weights,
            token_length=TokenLength.of(tokenizer),
        )
        cell_bytes, hidden_size = model.check_cache(name)
        check_causal(name, lm)
        return replace(model, cell_bytes=cell_bytes, hidden_size=hidden_size)

    def check_cache(self, name: str) -> tuple[int, int]:
        """Read two tokens, so that a model that cannot be batched by rows fails now.

        Returns:
            The bytes of keys and values of one token, and the size of the output layer's input.

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
                f"[engine] model: {name!r} does not keep plain keys and values, "
                f"which this engine batches: {error}"
            ) from error
        return cache.nbytes // 2, step.hidden.shape[-1]

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: RowCache, lengths: list[int]) -> Step:
        """Read new tokens of every row: [B, Q] ids, right-aligned.

        Args:
            ids: new tokens; a row with fewer than Q has padding on the left.
            cache: the rows' keys and values; the new ones are appended.
            lengths: tokens of each row, the new ones included.
        """
        step = self.forward_last(ids, cache, lengths, 1)
        return Step(step.logits[:, -1], step.hidden[:, -1])

    @torch.inference_mode()
    def forward_last(
        self, ids: torch.Tensor, cache: RowCache, lengths: list[int], columns: int
    ) -> Step:
        """Read new tokens as `forward` does; return the results of the last columns.

        Args:
            ids: new tokens; a row with fewer than Q has padding on the left.
            cache: the rows' keys and values; the new ones are appended.
            lengths: tokens of each row, the new ones included.
            columns: number of the last columns whose results are returned: [B, columns, V] logits
                and [B, columns, d] states.
        """
        width = cache.length + ids.shape[1]
        starts = width - torch.tensor(lengths, device=self.device)
        places = torch.arange(width, device=self.device)
        positions = places[None, cache.length :] - starts[:, None]
        padded = min(lengths) < width
        mask = (places[None] >= starts[:, None]).long() if padded else None
        self.tap.clear()
        output = self.lm(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=columns,
        )
        logits = output.logits[:, -columns:].float()
        hidden = self.tap[-1][:, -columns:].float() if self.tap else logits[..., :0]
        return Step(logits, hidden)

    def read(self, tokens: Sequence[list[int]], cache: RowCache, lengths: list[int]) -> Step:
        """Read new tokens of every row, given as lists of any length.

        Args:
            tokens: new tokens of each row.
            cache: the rows' keys and values; the new ones are appended.
            lengths: tokens of each row, the new ones included.
        """
        width = max(len(row) for row in tokens)
        padded = [[0] * (width - len(row)) + row for row in tokens]
        return self.forward(torch.tensor(padded, device=self.device), cache, lengths)

    @torch.inference_mode()
    def states(self, ids: list[int]) -> torch.Tensor:
        """Return the state in which each next token is chosen: [T] ids -> [T, d] float32."""
        self.tap.clear()
        self.lm(input_ids=torch.tensor([ids], device=self.device), use_cache=False)
        return self.tap[-1][0].float()

    def frozen(self, name: str) -> FrozenModel:
        """Describe the model for the values that have to fit it."""
        digest = tokenizer_digest(self.tokenizer.get_vocab())
        device = str(self.device)
        return FrozenModel(name, self.vocabulary, self.hidden_size, digest, device, self.weights)

    def render(self, draw: Draw, prefix: str = "", tools: ToolRequest | None = None) -> Prompt:
        """Return the prompt of a draw as text and tokens.

        Args:
            draw: the draw.
            prefix: the beginning of the assistant's turn.
            tools: the tools that the model may call.

        Raises:
            InvalidRequest: the chat template refuses the messages, or a part is not text.
        """
        if draw.kind == "completion":
            return self.completion_prompt(draw.body["prompt"])
        text = render(self.tokenizer, draw.body, tools) + prefix
        is_continued = bool(prefix) or bool(draw.body.get("continue_final_message"))
        return self.tokenize(text, "messages", special=False, is_continued=is_continued)

    def tokenize(
        self, text: str, param: str, *, special: bool, is_continued: bool = False
    ) -> Prompt:
        """Turn a rendered prompt into tokens; see `prompt.tokenize` for the arguments.

        Raises:
            InvalidRequest: the text is empty, is not valid Unicode, or cannot fit the context.
        """
        check_length(text, self.token_length, self.context_length, param)
        return tokenize(self.tokenizer, text, param, special=special, is_continued=is_continued)

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that a long text has at least; 0 if nothing is known."""
        if self.token_length is None or len(text) <= SHORT_TEXT:
            return 0
        return self.token_length.fewest_tokens(text)

    def completion_prompt(self, prompt: object) -> Prompt:
        """Return the prompt of a text completion, which is a string or a list of token ids.

        Raises:
            InvalidRequest: it is something else, or the model does not have one of the token ids.
        """
        if isinstance(prompt, str):
            return self.tokenize(prompt, "prompt", special=True, is_continued=True)
        ids = check_token_prompt(prompt)
        check_token_ids("prompt", ids, self.vocabulary)
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return Prompt(text, ids, is_continued=True)


def _weights_type(dtype: str, device: torch.device) -> str:
    """Return the type in which the weights are loaded.

    Raises:
        ConfigError: there is no such type, or the device cannot multiply by int8 weights.
    """
    if dtype == INT8:
        check_int8(device)
        return "bfloat16"
    if dtype == "auto":
        return "float32" if device.type == "cpu" else dtype
    check_weights_type("[engine] dtype", dtype, also='on a CPU, "int8"')
    return dtype


def end_tokens(lm: Any, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a turn or a text.

    These are the tokenizer's end of sequence and end of turn, and all that the model's
    generation_config and configuration list. A chat model often lists its end of turn in one of
    these places alone.

    Args:
        lm: the transformers model.
        tokenizer: its fast tokenizer.
    """
    ends: set[int] = set()
    for name in ("eos_token_id", "eot_token_id", "eom_token_id"):
        ends |= _ids(getattr(tokenizer, name, None))
    ends |= _ids(lm.generation_config.eos_token_id)
    for config in (lm.config, lm.config.get_text_config(decoder=True)):
        stated = _ids(getattr(config, "eos_token_id", None))
        # A configuration class has a default, such as 2 for Llama. If the checkpoint states no end
        # token, that default may be an ordinary word.
        default = _ids(getattr(type(config), "eos_token_id", None))
        ends |= {token for token in stated if token not in default or _is_special(tokenizer, token)}
    # A vocabulary may be smaller than its tokenizer's or its configuration's.
    vocabulary = int(lm.config.get_text_config(decoder=True).vocab_size)
    return frozenset(token for token in ends if token < vocabulary)


def _ids(value: object) -> set[int]:
    """Return the token ids of a field that holds one, a list of them or none."""
    values = value if isinstance(value, list | tuple | set) else [value]
    ids: set[int] = set()
    for token in values:
        # Some configurations write -1 for a token that they lack.
        if isinstance(token, int) and token >= 0:
            ids.add(token)
    return ids


def _is_special(tokenizer: Any, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)


def _fix_positions(name: str, lm: Any, context_length: int) -> None:
    """Let the model read each row by the same rotary factors, whatever is in the batch.

    Raises:
        ConfigError: the positions of other rows change how it reads a row.
    """
    fix_rope(lm, context_length)
    if not reads_rows_alone(lm, context_length):
        raise ConfigError(
            f"[engine] model: {name!r} is a {type(lm).__name__} whose rotary positions depend on "
            "the longest sequence of a batch, so answers would depend on other requests. Set "
            "[engine] context_length to the length that it was trained with, or serve it with "
            "vLLM."
        )


def _sampling_defaults(lm: Any) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name in SAMPLING_DEFAULTS:
        value = getattr(lm.generation_config, name, None)
        if value is not None:
            defaults[name] = value
    return defaults


def _tap_output_layer(lm: Any) -> list[torch.Tensor]:
    """Return a list to which the model's output layer appends its input in every forward pass."""
    tap: list[torch.Tensor] = []
    layer = lm.get_output_embeddings()
    if layer is not None:
        layer.register_forward_pre_hook(lambda _, inputs: tap.append(inputs[0]))
    return tap
