"""Value estimates in one worker of vLLM, kept until the server fetches them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from infer_align.decoding.device import upload
from infer_align.decoding.estimates import expected_values
from infer_align.engines.vllm.extra_args import Estimated
from infer_align.steering import EstimateSchedule
from infer_align.values.head import HeadValue

# Estimates that are never fetched are dropped after this many steps.
MAX_STEPS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class EstimatedRequest:
    """A request that needs value estimates.

    Attributes:
        key: name under which its estimates are reported.
        schedule: when to estimate.
        weights: the heads when the request joined the batch, and their weights.
        output: its tokens so far, a list that vLLM's V1 runner appends to; () in V2.
    """

    key: str
    schedule: EstimateSchedule
    weights: Mapping[HeadValue, float]
    output: Sequence[int] = ()


class DueRow(NamedTuple):
    """A row of logits whose request is due for an estimate."""

    row: int
    request: EstimatedRequest
    tokens: int


class EstimateRecorder:
    """The estimates of one worker that the server has not fetched yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps: deque[tuple[list[tuple[str, int]], torch.Tensor]] = deque(maxlen=MAX_STEPS)

    def add(self, logits: torch.Tensor, hidden: torch.Tensor, due: Sequence[DueRow]) -> None:
        """Estimate some rows, without waiting for the device.

        Args:
            logits: [rows, V] that the step samples from.
            hidden: [rows, d] states that the output layer read.
            due: the rows to estimate.
        """
        rows = upload(np.array([item.row for item in due], np.int64), self._device)
        weights = [item.request.weights for item in due]
        values = expected_values(
            logits.index_select(0, rows), hidden.index_select(0, rows), weights
        )
        names = [(item.request.key, item.tokens) for item in due]
        self._steps.append((names, values))

    def take(self) -> list[Estimated]:
        """Return all estimates since the last call."""
        estimates: list[Estimated] = []
        while self._steps:
            names, values = self._steps.popleft()
            for (key, tokens), value in zip(names, values.tolist(), strict=True):
                estimates.append((key, tokens, value))
        return estimates
