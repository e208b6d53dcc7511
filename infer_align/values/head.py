"""Values of kind `head`: the value of every next token, from the frozen model's last hidden state.

    Q(h, a) = u(h) . E[a] + b[a]        u(h) = P h, or W2 gelu(W1 h + c1)

h is the state that the model's output layer reads. With rank r, E is [V, r], so a head has r / d of
the size of an output layer. Valuing k candidates gathers k rows of E.

Shapes: B rows, V vocabulary, k candidates, d hidden size, r rank.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import gelu, linear

from infer_align.demo.locate import locate
from infer_align.errors import ConfigError
from infer_align.values import FrozenModel, Value, check_fit
from infer_align.values._fingerprint import (
    Fingerprint,
    different_parts,
    digest,
    from_json,
    to_json,
)
from infer_align.values._head_arithmetic import HeadArithmetic, KernelHead, arrange
from infer_align_kernels import HeadTable, HeadValues, compiled_layers

if TYPE_CHECKING:
    from infer_align_kernels.steer_logits.layers import CompiledLayers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """Values from the frozen model's hidden state, by a low-rank linear head or a small MLP."""

    path: str = field(
        metadata={"description": "Safetensors file that `infer-align fit value` has written."}
    )
    description: str = field(
        default="", metadata={"description": "One line that describes the value."}
    )

    def load(self) -> HeadValue:
        """Return the value, without reading its file."""
        return HeadValue(self.path, self.description)


plugin = Head


class HeadValue(Value):
    """One head, resident on the frozen model's device.

    Attributes:
        tensors: after `start`, those of the file in float32. E and b are minus their means over the
            vocabulary, which steering does not see.
    """

    estimates_states: ClassVar[bool] = True

    def __init__(self, path: str, description: str = "") -> None:
        self.path = path
        self.description = description
        self.tensors: dict[str, torch.Tensor] = {}
        self._arithmetic: HeadArithmetic | None = None

    def start(self, frozen: FrozenModel, shared: dict[object, Any]) -> None:
        """Read the file.

        Raises:
            ConfigError: the file is missing, is not a head, or was made for another model.
        """
        tensors, metadata = read(self.path)
        first_layer = tensors["P"] if "P" in tensors else tensors["W1"]
        check_fit(self.path, {**metadata, "hidden_size": first_layer.shape[1]}, frozen)
        if len(tensors["E"]) != frozen.vocabulary:
            raise ConfigError(
                f"{self.path}: values {len(tensors['E'])} tokens, but {frozen.model!r} has "
                f"{frozen.vocabulary}. Fit the value on this model."
            )
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ConfigError(
                    f"{self.path}: {name} holds numbers that are not finite. Fit the value again."
                )
        self.warnings = _check_weights(self.path, metadata, frozen)
        for warning in self.warnings:
            log.warning("%s", warning)
        self.description = self.description or metadata.get("description", "")
        self.summary = _read_summary(metadata)
        # Copy the tensors. Those of an open file are mapped into memory, and writing over the file
        # would end the process.
        self.tensors = {}
        for name, tensor in tensors.items():
            self.tensors[name] = tensor.to(frozen.device, torch.float32, copy=True)
        self._arithmetic = arrange(self.tensors)
        self.tensors["E"] = self._arithmetic.weight
        self.tensors["b"] = self._arithmetic.bias

    @property
    def is_linear(self) -> bool:
        """Return True if u(h) is P h."""
        return "P" in self.tensors

    @property
    def arithmetic(self) -> HeadArithmetic:
        """Return the arithmetic of the started head.

        Raises:
            RuntimeError: the head is not started.
        """
        if self._arithmetic is None:
            raise RuntimeError(f"the value {self.path} is not started; call start() first.")
        return self._arithmetic

    def evaluate(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Compute Q(h, a) of each row's candidates, minus the mean of Q(h, .) over all tokens.

        Args:
            hidden: [B, d] states, float32.
            token_ids: [B, k] the candidates.

        Returns:
            [B, k] float32.
        """
        return self.arithmetic.evaluate(hidden, token_ids)

    def evaluate_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute Q(h, a) of every token, minus their mean. [B, d] float32 -> [B, V]."""
        return self.arithmetic.evaluate_all(hidden)

    def all_values(self, hidden: torch.Tensor) -> HeadValues:
        """Return `evaluate_all` in the form that the fused sampler reads. [B, d] float32.

        Raises:
            RuntimeError: no kernels run on the head's device.
        """
        arithmetic = self.arithmetic
        if not isinstance(arithmetic, KernelHead):
            raise RuntimeError("the fused sampler needs a device with Triton kernels.")
        return arithmetic.all_values(hidden)

    def add_all(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        beta: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """Add beta times the value of every token to its logit in place, centred over all tokens.

        Args:
            logits: [B, V] float32, overwritten.
            hidden: [S, d] states of the steered rows, float32.
            beta: [S]; a row of weight 0 stays bit for bit the same.
            rows: [S] indices of the steered rows; None for all.
        """
        self.arithmetic.add_all(logits, hidden, beta, rows)

    def expected(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Compute V(h) = sum over a of pi(a) Q(h, a), the mean value over the next token.

        Args:
            hidden: [B, d] states, float32.
            logits: [B, V] of the policy pi in these states, at temperature 1.

        Returns:
            [B] float32.
        """
        return self.arithmetic.expected(hidden, torch.softmax(logits.float(), dim=-1))


class HeadStack:
    """Several started heads as one, for steering with few calls.

    Attributes:
        heads: the heads.
        table: their weights and biases.
    """

    def __init__(self, heads: Sequence[HeadValue]) -> None:
        """Stack one or more heads that are on the same device."""
        plain = [head for head in heads if head.is_linear]
        deep = [head for head in heads if not head.is_linear]
        # The features of linear heads come first.
        self.heads = (*plain, *deep)
        weights = [head.tensors["E"] for head in self.heads]
        biases = [head.tensors["b"] for head in self.heads]
        self.table = HeadTable(weights, biases)
        has_kernels = all(isinstance(head.arithmetic, KernelHead) for head in self.heads)
        self._layers: _StackedLayers | CompiledLayers | None
        if has_kernels:
            self._layers = _StackedLayers(plain, deep)
        else:
            # On a CPU, torch saves nothing by the layers of several heads as one.
            self._layers = compiled_layers([_layers_of(head) for head in self.heads])

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute u(h) of all heads, in their order. [B, d] float32 -> [B, sum of ranks]."""
        if self._layers is not None:
            return self._layers.features(hidden)
        parts = [head.arithmetic.features(hidden) for head in self.heads]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _layers_of(head: HeadValue) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in head.tensors.items() if name not in {"E", "b"}}


class _StackedLayers:
    """The layers of all heads, side by side."""

    def __init__(self, plain: Sequence[HeadValue], deep: Sequence[HeadValue]) -> None:
        self._linear = _stacked(plain, "P")
        self._first_layer = _stacked(deep, "W1")
        self._first_bias = _stacked(deep, "c1")
        self._second_layer = _block_diagonal([head.tensors["W2"] for head in deep])

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        if self._linear is not None:
            parts.append(linear(hidden, self._linear))
        if self._first_layer is not None and self._second_layer is not None:
            activated = gelu(linear(hidden, self._first_layer, self._first_bias))
            parts.append(linear(activated, self._second_layer))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _block_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one matrix in which each block reads its own inputs; None without blocks."""
    if not blocks:
        return None
    rows = sum(block.shape[0] for block in blocks)
    columns = sum(block.shape[1] for block in blocks)
    matrix = torch.zeros((rows, columns), device=blocks[0].device)
    row = 0
    column = 0
    for block in blocks:
        height, width = block.shape
        matrix[row : row + height, column : column + width] = block
        row += height
        column += width
    return matrix


def _stacked(heads: Sequence[HeadValue], name: str) -> torch.Tensor | None:
    """Return this tensor of all heads, one below the other; None without heads."""
    return torch.cat([head.tensors[name] for head in heads]) if heads else None


def read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors (P, or W1, c1 and W2; E; b) and the metadata of a head.

    Raises:
        ConfigError: the file is missing or is not a head.
    """
    file = Path(locate(path))
    try:
        with safe_open(file, "pt") as opened:
            # The opened file is not a mapping, so it cannot be iterated itself.
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read as a safetensors file: {error}") from None
    if metadata.get("kind") != "head" or not _is_head(tensors):
        raise ConfigError(
            f"{path}: not a value head (it holds {', '.join(sorted(tensors))}). "
            "Make one with: infer-align fit value."
        )
    return tensors, metadata


def _check_weights(path: str, metadata: Mapping[str, str], frozen: FrozenModel) -> tuple[str, ...]:
    """Refuse a head that was fitted on other weights than those of the frozen model.

    Returns:
        A warning if the weights cannot be compared, else nothing.

    Raises:
        ConfigError: naming both models.
    """
    if frozen.fingerprint is None:
        return ()
    fitted_on = metadata.get("model", "an unknown model")
    stored = _stored_fingerprint(metadata)
    differences = different_parts(stored, frozen.fingerprint)
    if differences is None:
        return (
            f"{path}: nothing shows that this head was fitted on {frozen.model!r}. It names "
            f"{fitted_on!r}, and holds no fingerprint of that model's weights. On another model it "
            "steers at random. Fit the value again to be sure.",
        )
    if differences:
        raise ConfigError(
            f"{path}: fitted on {fitted_on!r} (fingerprint {digest(stored)}), but the weights of "
            f"{frozen.model!r} (fingerprint {digest(frozen.fingerprint)}) are others: "
            f"{', '.join(differences)}. Fit the value on this model."
        )
    return ()


def _read_summary(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what the fit has measured; None if the file does not say it."""
    try:
        summary = json.loads(metadata.get("summary", "null"))
    except ValueError:
        return None
    return summary if isinstance(summary, dict) else None


def store_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Add what a fit has measured to the metadata of a head.

    Args:
        path: of the head.
        summary: JSON, such as {"suggested_beta": 4.0}.
    """
    tensors, metadata = read(str(path))
    _save(path, tensors, {**metadata, "summary": json.dumps(summary)})


def _stored_fingerprint(metadata: Mapping[str, str]) -> Fingerprint:
    """Return the fingerprint in a head's metadata; {} if there is none that can be read."""
    try:
        return from_json(metadata.get("fingerprint", "{}"))
    except (ValueError, TypeError):
        return {}


def _is_head(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return True if the tensors of a head are there and their shapes fit together."""
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
    """Save a head and the properties of its model. A failed write leaves the old file.

    Args:
        path: file to write.
        tensors: P, or W1, c1 and W2; E; b.
        frozen: the model that the head was fitted on.
        metadata: further entries, such as "reward" and "description".
    """
    all_metadata = {
        **metadata,
        "kind": "head",
        "model": frozen.model,
        "tokenizer": frozen.tokenizer,
        "hidden_size": str(frozen.hidden_size),
    }
    if frozen.fingerprint:
        all_metadata["fingerprint"] = to_json(frozen.fingerprint)
    _save(path, tensors, all_metadata)


def _save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file. A failed write leaves the old one."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(contiguous, part, dict(metadata))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
