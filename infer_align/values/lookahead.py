"""Values of kind `lookahead`, as published: a small value LM reads the prefix and each candidate.

A value LM has one or more scalar heads. One forward pass per step serves all rows, candidates and
heads of a value LM. The k candidates of a row are siblings: each attends to the shared prefix and
to itself. The keys and values of the chosen sibling stay in the cache, so no token is read twice.

Shapes: B rows, Q new tokens per row, H heads, d hidden size of the LM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.checkpoints.rope import fix_rope
from infer_align.checkpoints.types import check_weights_type
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, Value, check_fit
from infer_align.values._sibling_pass import CacheShape, ReadSiblings, SiblingPass
from infer_align.values._sibling_reading import NAME, supports_siblings
from infer_align_kernels import runs_triton

HEADS = "value_heads.safetensors"
CARD = "value.json"


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Values from a small value LM that reads the prefix and each candidate token."""

    path: str = field(
        metadata={"description": f"Folder with the files of the value LM, `{HEADS}` and `{CARD}`."}
    )
    head: str | None = field(
        default=None,
        metadata={"description": "Name of the head. Required if the value LM has several heads."},
    )
    description: str = field(
        default="", metadata={"description": "One line that describes the value."}
    )
    dtype: str = field(default="float32", metadata={"description": "Torch dtype of the value LM."})

    def load(self) -> LookaheadValue:
        """Return the value, without loading its LM."""
        return LookaheadValue(self)


plugin = Lookahead


class ValueLM:
    """A value LM with its heads. Values with the same folder and dtype share one.

    Attributes:
        lm: the transformers base model.
        names: names of the heads.
        description: one line for people.
        summary: what the fit has measured; None if it is not recorded.
        folder_version: version of the folder that was loaded, from `folder_version`.
        cell_bytes: bytes of keys and values per token.
        cell_shape: their shape; None if the layers differ.
        sibling_pass: reads siblings with the kernel `sibling_attention`, as on a GPU. None on a CPU
            and for models without transformers' interface of attentions, where attention is masked.
    """

    def __init__(self, path: str, frozen: FrozenModel, dtype: str) -> None:
        check_weights_type(f"{path}: dtype", dtype)
        folder = Path(locate(path))
        self.folder_version = folder_version(path)
        try:
            card: dict[str, Any] = json.loads((folder / CARD).read_text())
            self.names: list[str] = card["heads"]
            heads = load_file(folder / HEADS)
            # [H, d] and [H]
            self._weight = heads["weight"].to(frozen.device, torch.float32, copy=True)
            self._bias = heads["bias"].to(frozen.device, torch.float32, copy=True)
            self.lm, loading = AutoModel.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except LOAD_ERRORS as error:
            kind = type(error).__name__
            raise ConfigError(f"{path}: cannot be loaded as a value LM: {kind}: {error}") from error
        check_complete("path", path, "value LM", loading)
        check_fit(path, card, frozen)
        self._check_shapes(path, frozen)
        _check_window(path, self.lm.config.get_text_config())
        self.lm = self.lm.to(frozen.device).eval().requires_grad_(requires_grad=False)
        # It was fitted with the same factors.
        fix_rope(self.lm, None)
        self.description: str = card.get("description", "")
        summary = card.get("summary")
        self.summary: dict[str, Any] | None = summary if isinstance(summary, dict) else None
        self.cell_bytes, self.cell_shape = self._measure_cell(path)
        self.sibling_pass: SiblingPass | None = None
        if runs_triton(self.lm.device):
            self.use_sibling_pass(path)

    def use_sibling_pass(self, name: str) -> None:
        """Read siblings with the kernel `sibling_attention`, if the model allows it.

        Args:
            name: of the value LM, for a warning.
        """
        shape = self.cell_shape
        layers = getattr(self.lm.config.get_text_config(), "num_hidden_layers", None)
        # A layer without keys and values of its own reads those of another one.
        if shape is None or shape.layers != layers or not supports_siblings(self.lm):
            return
        self.lm.set_attn_implementation(NAME)
        heads = len(self._bias)
        self.sibling_pass = SiblingPass(name, self.forward, heads, shape, self.lm.device)

    def _check_shapes(self, path: str, frozen: FrozenModel) -> None:
        embeddings = self.lm.get_input_embeddings().weight
        if len(embeddings) < frozen.vocabulary:
            raise ConfigError(
                f"{path}: reads {len(embeddings)} tokens, but {frozen.model!r} has "
                f"{frozen.vocabulary}. Use a value LM with the tokenizer of this model."
            )
        expected = (len(self.names), self.lm.config.hidden_size)
        if self._weight.shape != expected or self._bias.shape != expected[:1]:
            raise ConfigError(
                f"{path}: its heads have shape {tuple(self._weight.shape)}, but {CARD} and the LM "
                f"require {expected}. Fit the value again."
            )

    def _measure_cell(self, path: str) -> tuple[int, CacheShape | None]:
        """Return the bytes and the shape of the keys and values of one token.

        They are measured with one forward pass.
        """
        ones = torch.ones((1, 1), dtype=torch.long, device=self.lm.device)
        try:
            output = self.lm(input_ids=ones, attention_mask=ones, use_cache=True)
            layers = output.past_key_values.layers
            size = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in layers)
        except (AttributeError, TypeError) as error:
            # The model has no cache, or one that holds recurrent states.
            raise ConfigError(
                f"{path}: a {type(self.lm).__name__} keeps no plain keys and values, which a value "
                "LM needs. Use a model with ordinary attention."
            ) from error
        return size, CacheShape.of(layers)

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the values after each new token and append the tokens to the cache.

        Args:
            ids: [B, Q] new tokens.
            cache: transformers cache of the earlier tokens.
            positions: [B, Q] position of each new token.
            mask: [B, columns], 0 for padding; or [B, 1, Q, columns], True where a token may attend.
                Columns are the cached tokens, then the new ones.

        Returns:
            [B, Q, H] float32.
        """
        output = self.lm(
            input_ids=ids,
            past_key_values=cache,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
        )
        values: torch.Tensor = output.last_hidden_state.float() @ self._weight.T + self._bias
        return values

    def siblings(
        self, ids: torch.Tensor, cache: Any, lengths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the values after each sibling.

        Siblings are alternatives for one position: each attends to its row's tokens and to itself.

        Args:
            ids: [B, k] siblings.
            cache: transformers cache of the earlier tokens, right-aligned.
            lengths: tokens of each row in the cache.

        Returns:
            [B, k, H] float32, and the siblings' own keys and values as in `ReadSiblings`. With None
            in their place, they are the last k columns of the cache.
        """
        if self.sibling_pass is not None:
            read: ReadSiblings = self.sibling_pass.read(ids, cache, lengths)
            return read.values, read.columns
        row_lengths = torch.tensor(lengths, device=ids.device)
        positions = row_lengths[:, None].expand(-1, ids.shape[1])
        mask = _sibling_mask(int(cache.length), row_lengths, ids.shape[1])
        return self.forward(ids, cache, positions, mask), None


def _check_window(path: str, config: Any) -> None:
    """Refuse an LM with a sliding window: its siblings would read tokens before the window too.

    Raises:
        ConfigError: naming the window.
    """
    window: int | None = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    longest = getattr(config, "max_position_embeddings", None)
    if window is None or "sliding_attention" not in layers:
        return
    if longest is None or window < longest:
        raise ConfigError(
            f"{path}: its layers read a window of {window} tokens (sliding_window), and siblings "
            "would read all earlier ones. Use a value LM without a sliding window."
        )


def _sibling_mask(columns: int, lengths: torch.Tensor, k: int) -> torch.Tensor:
    """Return True where a sibling may attend: [B, 1, k, columns + k].

    The tokens of a row end in the last of the columns. The siblings' own columns follow.
    """
    device = lengths.device
    starts = columns - lengths
    prefix = torch.arange(columns, device=device)[None] >= starts[:, None]
    prefixes = prefix[:, None].expand(-1, k, -1)
    itself = torch.eye(k, dtype=torch.bool, device=device)
    return torch.cat([prefixes, itself.expand(len(lengths), -1, -1)], dim=-1)[:, None]


class LookaheadValue(Value):
    """One head of a value LM.

    Attributes:
        lm: the value LM, after `start`.
        index: index of the head in the LM, after `start`.
    """

    def __init__(self, config: Lookahead) -> None:
        self.config = config
        self.description = config.description
        self.lm: ValueLM | None = None
        self.index = 0

    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        """Load the LM, or use the one that another value has loaded from the same folder.

        Raises:
            ConfigError: the LM cannot be loaded or was made for another tokenizer, or the name of
                the head is missing or unknown.
        """
        lm = self._shared_lm(frozen, shared)
        name = self.config.head or (lm.names[0] if len(lm.names) == 1 else "")
        if name not in lm.names:
            raise ConfigError(
                f"{self.config.path}: head {name!r} is not one of: {', '.join(lm.names)}; "
                "name one with head = '...'."
            )
        self.lm = lm
        self.index = lm.names.index(name)
        self.description = self.description or lm.description
        self.summary = lm.summary

    def _shared_lm(self, frozen: FrozenModel, shared: dict[object, Any]) -> ValueLM:
        """Return the shared LM of the folder; load it if it is missing or out of date."""
        path = self.config.path
        key = (path, self.config.dtype)
        current: ValueLM | None = shared.get(key)
        if current is None or current.folder_version != folder_version(path):
            current = ValueLM(path, frozen, self.config.dtype)
            shared[key] = current
        return current


def write(
    folder: Path,
    lm: PreTrainedModel,
    heads: dict[str, tuple[torch.Tensor, float]],
    frozen: FrozenModel,
    card: dict[str, Any],
) -> None:
    """Save a value LM with its heads. A folder that was only partly written does not load.

    Args:
        folder: folder to write; other files in it stay.
        lm: the value LM.
        heads: {name: (weight [d], bias)}.
        frozen: the model that the value was fitted on.
        card: further entries of the card, such as "description".
    """
    full_card = {
        **card,
        "kind": "lookahead",
        "model": frozen.model,
        "tokenizer": frozen.tokenizer,
        "heads": list(heads),
    }
    weight = torch.stack([weight for weight, _ in heads.values()])
    bias = torch.tensor([bias for _, bias in heads.values()])
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        lm.save_pretrained(part)
        save_file({"weight": weight.contiguous(), "bias": bias}, part / HEADS)
        (part / CARD).write_text(json.dumps(full_card, indent=1) + "\n")
        _move_files(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def store_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Add what a fit has measured to the card of a value LM.

    Args:
        folder: of the value LM.
        summary: JSON, such as {"suggested_beta": 4.0}.
    """
    card = folder / CARD
    entries = {**json.loads(card.read_text()), "summary": dict(summary)}
    part = card.with_name(f"{CARD}.part")
    part.write_text(json.dumps(entries, indent=1) + "\n")
    part.replace(card)


def _move_files(source: Path, target: Path) -> None:
    """Move all files; remove the old card first and move the new card last.

    Without a card, a mixture of old and new files does not load.
    """
    target.mkdir(exist_ok=True)
    (target / CARD).unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name == CARD):
        file.replace(target / file.name)


def folder_version(path: str) -> tuple[int, ...]:
    """Return a number pair that changes when the folder is written again; empty without a card."""
    card = Path(locate(path)) / CARD
    if not card.exists():
        return ()
    status = card.stat()
    return (status.st_mtime_ns, status.st_ino)
