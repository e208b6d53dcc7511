"""Values of the embedded engine: loading, binding draws to them, the steering of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from infer_align.decoding.cache import RowCache
from infer_align.decoding.dense_steering import candidate_count
from infer_align.decoding.fused_steering import FusedSteerer
from infer_align.decoding.siblings import read_tokens
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.transformers.rows import Row
from infer_align.types import Draw
from infer_align.values import FrozenModel, Value, check_estimating, check_values
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue, ValueLM
from infer_align_kernels import runs_triton


class LoadedValues:
    """The values that requests to one engine can use.

    Attributes:
        cell_bytes: bytes of keys and values that one token takes in all value LMs together.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.cell_bytes = 0
        self._frozen = frozen
        self._device = torch.device(frozen.device)
        self._shared: dict[object, Any] = {}
        self._values: dict[str, Value] = {}
        # One call steers rows by their likely tokens where kernels run.
        self._steerer = FusedSteerer() if runs_triton(self._device) else None

    def add(self, name: str, value: Value) -> None:
        """Load a value and let requests use it.

        Raises:
            ConfigError: the value does not fit the frozen model.
        """
        value.start(self._frozen, self._shared)
        # Replace the mapping instead of changing it: the scheduler's thread may be reading it.
        self._values = {**self._values, name: value}
        in_use: set[int] = set()
        for other in self._values.values():
            if isinstance(other, LookaheadValue):
                in_use.add(id(other.lm))
        # Drop the value LMs that only a replaced value used.
        self._shared = {key: item for key, item in self._shared.items() if id(item) in in_use}
        self.cell_bytes = 0
        for item in self._shared.values():
            if isinstance(item, ValueLM):
                self.cell_bytes += item.cell_bytes

    def value(self, name: str) -> Value:
        """Return the value of that name.

        Raises:
            KeyError: there is no such value.
        """
        return self._values[name]

    def check(self, draw: Draw) -> None:
        """Refuse a draw that names a value which is not configured or cannot estimate.

        Raises:
            InvalidRequest: naming the value and the nearest name.
        """
        check_values(draw, self._values)

    def estimating(self, names: Sequence[str]) -> dict[str, HeadValue]:
        """Return the loaded heads of these names.

        Raises:
            InvalidRequest: naming a value that is not configured or cannot estimate.
        """
        heads: dict[str, HeadValue] = {}
        for name in names:
            check_estimating(f"values.{name}", name, self._values)
            value = self._values[name]
            if isinstance(value, HeadValue):
                heads[name] = value
        return heads

    def steering_values(self, draw: Draw) -> dict[Value, float]:
        """Return the loaded values that steer a draw, with their weights other than 0."""
        beta = draw.steering.beta if draw.steering else {}
        return {self._values[name]: weight for name, weight in beta.items() if weight}

    def estimate_values(self, draw: Draw) -> dict[HeadValue, float]:
        """Return the loaded heads whose estimates a draw reports, with their weights."""
        weights = draw.estimates.values if draw.estimates else {}
        heads: dict[HeadValue, float] = {}
        for name, weight in weights.items():
            value = self._values[name]
            if weight and isinstance(value, HeadValue):
                heads[value] = weight
        return heads

    def prefill(self, values: Mapping[Value, float], ids: list[int]) -> dict[ValueLM, RowCache]:
        """Read a prompt with the value LMs of these values. Each cache holds one row."""
        caches: dict[ValueLM, RowCache] = {}
        for value in values:
            if isinstance(value, LookaheadValue) and value.lm and value.lm not in caches:
                caches[value.lm] = read_tokens(value.lm, ids)
        return caches

    def steering_batch(self, rows: Sequence[Row]) -> SteeringBatch | None:
        """Build the steering of these rows; None if none of them is steered."""
        steerings = [row.job.draw.steering for row in rows]
        if not any(steerings):
            return None
        values = list(dict.fromkeys(value for row in rows for value in row.job.steering))
        beta = np.zeros((len(rows), len(values)), np.float32)
        top_k = np.zeros(len(rows), np.int64)
        min_p = np.zeros(len(rows), np.float32)
        max_kl = np.full(len(rows), np.inf, np.float32)
        masked = np.zeros(len(rows), np.bool_)
        for i, steering in enumerate(steerings):
            if steering is None:
                continue
            weights = rows[i].job.steering
            beta[i] = [weights.get(value, 0.0) for value in values]
            top_k[i] = candidate_count(steering, self._frozen.vocabulary)
            min_p[i] = steering.min_p or 0.0
            masked[i] = steering.tail == "mask"
            if steering.max_kl is not None:
                max_kl[i] = steering.max_kl
        heads_only = all(isinstance(value, HeadValue) for value in values)
        return SteeringBatch.build(
            values,
            beta,
            top_k,
            masked,
            self._device,
            min_p=min_p,
            steerer=self._steerer if heads_only else None,
            max_kl=max_kl,
            # The draw and the logprobs read the candidates.
            fuses_candidates=False,
        )
