"""A value head: the value of every next token from the frozen model's own last hidden state, in one cheap pass.

    Q(h, a) = u(h) . E[a] + b[a]        u(h) = P h, or W2 gelu(W1 h + c1)

h is what the model's output layer reads. Of rank r: E is [V, r], so a head is r/d the size of an output layer, and valuing k
candidates gathers k rows of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import embedding, gelu, linear

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, Value, check_fit
from infer_align_kernels import candidate_values


@dataclass(frozen=True, slots=True)
class Head:
    """Values from the frozen model's own hidden state: low rank or a small MLP."""

    path: str = field(
        metadata={"description": "safetensors file, as `infer-align fit value` writes it"}
    )
    description: str = field(default="", metadata={"description": "one line for people"})

    def load(self) -> HeadValue:
        """The value, its file not yet read."""
        return HeadValue(self.path, self.description)


plugin = Head


class HeadValue(Value):
    """One head, resident on the frozen model's device."""

    estimates: ClassVar[bool] = True

    def __init__(self, path: str, description: str = "") -> None:
        self.path = path
        self.description = description
        self._tensors: dict[str, torch.Tensor] = {}

    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        """Read the file.

        Raises:
            ConfigError: not there, not a head, or made for another model.
        """
        tensors, metadata = read(self.path)
        first = tensors["P"] if "P" in tensors else tensors["W1"]
        check_fit(self.path, {**metadata, "hidden_size": first.shape[1]}, frozen)
        if len(tensors["E"]) != frozen.vocabulary:
            raise ConfigError(
                f"{self.path}: values {len(tensors['E'])} tokens, but {frozen.model!r} has {frozen.vocabulary}."
            )
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ConfigError(
                f"{self.path}: {broken[0]} holds numbers that are not finite; fit the value again."
            )
        self.description = self.description or metadata.get("description", "")
        # Copies: what is mapped from a file ends the process when somebody writes over the file.
        self._tensors = {
            name: tensor.to(frozen.device, torch.float32, copy=True)
            for name, tensor in tensors.items()
        }

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """u(h). [B, d] float32 -> [B, r]."""
        t = self._tensors
        if "P" in t:
            return linear(hidden, t["P"])
        return linear(gelu(linear(hidden, t["W1"], t["c1"])), t["W2"])

    def evaluate(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Q(h, a) of each row's candidates. [B, d] float32, [B, k] -> [B, k]."""
        if hidden.is_cuda:
            return candidate_values(
                token_ids,
                self.features(hidden)[:, None],
                self._tensors["E"][None],
                self._tensors["b"][None],
            )[0]
        bias, rows = (
            self._tensors["b"].take(token_ids),
            embedding(token_ids, self._tensors["E"]),
        )  # [B, k], [B, k, r]
        return torch.baddbmm(bias[:, :, None], rows, self.features(hidden)[:, :, None])[:, :, 0]

    def expected(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """V(h) = sum over a of pi(a) Q(h, a), what the next token will have been worth on average. [B, d], [B, V] -> [B] float32.

        Args:
            hidden: the states, float32.
            logits: those of the policy pi that goes on from them, at temperature 1.
        """
        t, policy = self._tensors, torch.softmax(logits.float(), dim=-1)
        return ((policy @ t["E"]) * self.features(hidden)).sum(-1) + policy @ t["b"]


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A head's tensors (P, or W1 c1 W2; E, b) and its metadata.

    Raises:
        ConfigError: the file is not there, or is not a head.
    """
    file = Path(locate(path))
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a safetensors file: {error}") from None
    if metadata.get("kind") != "head" or not _is_head(tensors):
        raise ConfigError(
            f"{path}: not a value head (it holds {', '.join(sorted(tensors))}); make one with: infer-align fit value."
        )
    return tensors, metadata


def _is_head(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are there, and the shapes fit together."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    match shapes:
        case {"P": (r, _), "E": (v, e), "b": (w,)}:
            return r == e and v == w
        case {"W1": (hidden, _), "c1": (bias,), "W2": (r, width), "E": (v, e), "b": (w,)}:
            return hidden == bias == width and r == e and v == w
    return False


def write(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    frozen: FrozenModel,
    metadata: Mapping[str, str],
) -> None:
    """Save a head with what it was made for; whole or not at all."""
    made_for = {
        "kind": "head",
        "model": frozen.model,
        "tokenizer": frozen.tokenizer,
        "hidden_size": str(frozen.hidden_size),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            part,
            {**metadata, **made_for},
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
