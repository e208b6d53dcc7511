"""The arithmetic of a value head on a CPU, and on devices with Triton kernels.

    Q(h, a) = u(h) . E[a] + b[a]        u(h) = P h, or W2 gelu(W1 h + c1)

Both forms hold E and b minus their means over the vocabulary. So a value is relative to the mean
value of all tokens, which is the centre of steering with all tokens. Steering by fewer tokens
centres over those, so it does not see the difference.

Shapes: B rows, V vocabulary, k candidates, d hidden size, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch.nn.functional import embedding, gelu, linear

from infer_align_kernels import HeadValues, add_head_values, candidate_values, runs_triton

HALF_ROOT = 0.5**0.5


class HeadArithmetic(ABC):
    """A head's tensors, arranged for one kind of device.

    Attributes:
        weight: [V, r] E minus its mean over the vocabulary.
        bias: [V] b minus its mean.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    @abstractmethod
    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute u(h). [B, d] float32 -> [B, r]."""

    @abstractmethod
    def evaluate(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Compute the values of each row's candidates. [B, d] float32, [B, k] -> [B, k]."""

    @abstractmethod
    def evaluate_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the value of every token. [B, d] float32 -> [B, V]."""

    @abstractmethod
    def add_all(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        beta: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """Add beta times the value of every token in place; see `HeadValue.add_all`."""

    @abstractmethod
    def expected(self, hidden: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """Compute the mean of Q(h, a) over a policy. [B, d] float32, [B, V] -> [B]."""


def arrange(tensors: Mapping[str, torch.Tensor]) -> HeadArithmetic:
    """Return the arithmetic for the device of the tensors: P, or W1, c1 and W2; E; b."""
    if runs_triton(tensors["E"].device):
        return KernelHead(tensors)
    return CpuHead(tensors)


class KernelHead(HeadArithmetic):
    """The arithmetic with Triton kernels."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._layers = {name: layer for name, layer in tensors.items() if name not in {"E", "b"}}
        self._mean_weight = tensors["E"].mean(dim=0)
        self._mean_bias = tensors["b"].mean()
        self.weight = tensors["E"] - self._mean_weight
        self.bias = tensors["b"] - self._mean_bias

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        layers = self._layers
        if "P" in layers:
            return linear(hidden, layers["P"])
        return linear(gelu(linear(hidden, layers["W1"], layers["c1"])), layers["W2"])

    def all_values(self, hidden: torch.Tensor) -> HeadValues:
        """Return the value of every token as the fused sampler reads it. [B, d] float32."""
        return HeadValues(self.features(hidden)[:, None], self.weight[None], self.bias[None])

    def evaluate(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        features = self.features(hidden)[:, None]
        return candidate_values(token_ids, features, self.weight[None], self.bias[None])[0]

    def evaluate_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return torch.addmm(self.bias[None], self.features(hidden), self.weight.T)

    def add_all(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        beta: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """See the base class."""
        add_head_values(logits, self.features(hidden), self.weight, self.bias, beta, rows)

    def expected(self, hidden: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        mean_weights = policy @ self.weight + self._mean_weight
        mean_biases = policy @ self.bias + self._mean_bias
        return (mean_weights * self.features(hidden)).sum(dim=1) + mean_biases


class CpuHead(HeadArithmetic):
    """The arithmetic in few operations, because on a CPU each costs more than what it computes.

    One table holds E, and b as its last column. The features end with a 1 for that column.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        table = torch.cat([tensors["E"], tensors["b"][:, None]], dim=1)
        # [r + 1]
        self._mean_row = table.mean(dim=0)
        # [V, r + 1]
        self._table = table.sub_(self._mean_row)
        self.weight = self._table[:, :-1]
        self.bias = self._table[:, -1]
        # gelu(x) is (s + s erf(s)) / sqrt(2) with s = x / sqrt(2). The factors are in the layers.
        # On a CPU, torch's own gelu takes as long for few rows as both layers.
        self._first_layer: torch.Tensor | None = None
        self._first_bias: torch.Tensor | None = None
        last_layer = tensors["P"] if "P" in tensors else tensors["W2"] * HALF_ROOT
        if "W1" in tensors:
            self._first_layer = tensors["W1"] * HALF_ROOT
            self._first_bias = tensors["c1"] * HALF_ROOT
        no_weights = torch.zeros((1, last_layer.shape[1]))
        self._last_layer = torch.cat([last_layer, no_weights])
        self._last_bias = torch.zeros(len(self._last_layer))
        self._last_bias[-1] = 1.0

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return linear(self._activations(hidden), self._last_layer[:-1])

    def _extended_features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute u(h), and a 1 for the bias. [B, d] float32 -> [B, r + 1]."""
        return linear(self._activations(hidden), self._last_layer, self._last_bias)

    def _activations(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of the last layer. [B, d] float32."""
        if self._first_layer is None:
            return hidden
        scaled = linear(hidden, self._first_layer, self._first_bias)
        return torch.addcmul(scaled, scaled, scaled.erf())

    def evaluate(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        rows = embedding(token_ids, self._table)
        return rows.mul_(self._extended_features(hidden)[:, None]).sum(dim=2)

    def evaluate_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        return self._extended_features(hidden) @ self._table.T

    def add_all(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        beta: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """See the base class."""
        add_head_values(logits, self._extended_features(hidden), self._table, None, beta, rows)

    def expected(self, hidden: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        mean_rows = policy @ self._table + self._mean_row
        return (mean_rows * self._extended_features(hidden)).sum(dim=1)
