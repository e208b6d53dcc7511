"""A lookahead value, the paper's: a small value LM reads the prefix and each candidate after it, and scalar heads value them.

One forward per step serves all rows, all candidates and all heads of one value LM: the k candidates of a row are siblings, each
of which attends to the shared prefix and to itself. The keys and values of the one that is chosen stay, so nothing is computed
twice.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PreTrainedModel

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, Value, check_fit

HEADS = "value_heads.safetensors"
CARD = "value.json"


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Values from a small value LM that reads the prefix and each candidate token."""

    path: str = field(
        metadata={"description": "folder with the value LM, value_heads.safetensors and value.json"}
    )
    head: str | None = field(
        default=None, metadata={"description": "which of its heads; needed when it has several"}
    )
    description: str = field(default="", metadata={"description": "one line for people"})
    dtype: str = field(default="float32", metadata={"description": "torch dtype of the value LM"})

    def load(self) -> LookaheadValue:
        """The value, its LM not yet loaded."""
        return LookaheadValue(self)


plugin = Lookahead


class ValueLM:
    """A value LM with its heads; values that name the same folder share it."""

    def __init__(self, path: str, frozen: FrozenModel, dtype: str) -> None:
        folder = Path(locate(path))
        self.stamp = stamp(path)
        try:
            card: dict[str, Any] = json.loads((folder / CARD).read_text())
            self.names: list[str] = card["heads"]
            heads = load_file(folder / HEADS)
            self._weight = heads["weight"].to(frozen.device, torch.float32, copy=True)  # [H, d]
            self._bias = heads["bias"].to(frozen.device, torch.float32, copy=True)  # [H]
            self.lm = AutoModel.from_pretrained(folder, dtype=dtype)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise ConfigError(
                f"{path}: cannot be loaded as a value LM: {type(error).__name__}: {error}"
            ) from error
        check_fit(path, card, frozen)
        self._check_shapes(path, frozen)
        self.lm = self.lm.to(frozen.device).eval().requires_grad_(requires_grad=False)
        self.description: str = card.get("description", "")
        self.cell_bytes = self._measure(path)

    def _check_shapes(self, path: str, frozen: FrozenModel) -> None:
        table = self.lm.get_input_embeddings().weight
        if len(table) < frozen.vocabulary:
            raise ConfigError(
                f"{path}: reads {len(table)} tokens, but {frozen.model!r} has {frozen.vocabulary}."
            )
        expected = (len(self.names), self.lm.config.hidden_size)
        if self._weight.shape != expected or self._bias.shape != expected[:1]:
            raise ConfigError(
                f"{path}: its heads have shape {tuple(self._weight.shape)}, but {CARD} and the LM say {expected}; fit it again."
            )

    def _measure(self, path: str) -> int:
        """Bytes of keys and values that a token takes."""
        try:
            one = torch.ones((1, 1), dtype=torch.long, device=self.lm.device)
            output = self.lm(input_ids=one, attention_mask=one, use_cache=True)
            return sum(
                int(layer.keys.nbytes + layer.values.nbytes)
                for layer in output.past_key_values.layers
            )
        except (AttributeError, TypeError) as error:  # no cache, or one of states
            raise ConfigError(
                f"{path}: a {type(self.lm).__name__} keeps no plain keys and values, which a value LM needs."
            ) from error

    @torch.inference_mode()
    def forward(
        self, ids: torch.Tensor, cache: Any, positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Values after each token: [B, Q] ids, appended to `cache` -> [B, Q, H].

        Args:
            ids: new tokens.
            cache: a transformers cache of what came before.
            positions: [B, Q] position of each.
            mask: [B, columns] of padding, or [B, 1, Q, columns] where True may be attended to, the new columns included.
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


class LookaheadValue(Value):
    """One head of a value LM."""

    def __init__(self, config: Lookahead) -> None:
        self.config = config
        self.description = config.description
        self.lm: ValueLM | None = None
        self.index = 0

    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        """Load the LM, or take the one that another value has loaded from the same folder.

        Raises:
            ConfigError: not loadable, made for another tokenizer, or the head is not named.
        """
        key = (self.config.path, self.config.dtype)
        if key not in shared or shared[key].stamp != stamp(
            self.config.path
        ):  # not there, or fitted anew since
            shared[key] = ValueLM(self.config.path, frozen, self.config.dtype)
        lm: ValueLM = shared[key]
        name = self.config.head or (lm.names[0] if len(lm.names) == 1 else "")
        if name not in lm.names:
            raise ConfigError(
                f"{self.config.path}: head {name!r} is not one of: {', '.join(lm.names)}; name one with head = '...'."
            )
        self.lm, self.index = lm, lm.names.index(name)
        self.description = self.description or lm.description


def write(
    folder: Path,
    lm: PreTrainedModel,
    heads: dict[str, tuple[torch.Tensor, float]],
    frozen: FrozenModel,
    card: dict[str, Any],
) -> None:
    """Save a value LM with its heads, {name: (weight [d], bias)}, and what it was made for; a half-written one does not load."""
    made_for = {
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
        (part / CARD).write_text(json.dumps({**card, **made_for}, indent=1) + "\n")
        folder.mkdir(exist_ok=True)
        (folder / CARD).unlink(
            missing_ok=True
        )  # without its card, a mixture of old and new is refused
        for file in sorted(part.iterdir(), key=lambda file: file.name == CARD):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def stamp(path: str) -> tuple[int, ...]:
    """What changes when the folder is written again."""
    card = Path(locate(path)) / CARD
    return (card.stat().st_mtime_ns, card.stat().st_ino) if card.exists() else ()
