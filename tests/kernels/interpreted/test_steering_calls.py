"""A steering step takes two launches and a few calls of torch, whatever the number of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from benchmarks.gpu import expected
from infer_align.decoding.fused_steering import FusedSteerer
from infer_align.decoding.steering import steer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.values._head_arithmetic import arrange
from infer_align.values.head import HeadValue

ROWS = 3
VOCABULARY = 300
HIDDEN = 16
RANK = 8
K = 4


class CallsOutsideOfLaunches(TorchDispatchMode):
    """Counts the calls of torch, without those by which the interpreter runs a kernel.

    Attributes:
        calls: of torch.
        launches: of kernels.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls = 0
        self.launches = 0
        self._is_launching = False
        launch = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            self._is_launching = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._is_launching = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # The tests fill memory that nothing has written yet.
        is_filling = function is torch.ops.aten.fill_.Scalar
        self.calls += not (self._is_launching or is_filling)
        return function(*args, **(kwargs or {}))


def random_head() -> HeadValue:
    head = HeadValue("a head in memory")
    head.tensors = {
        "P": torch.randn(RANK, HIDDEN),
        "E": torch.randn(VOCABULARY, RANK),
        "b": torch.zeros(VOCABULARY),
    }
    head._arithmetic = arrange(head.tensors)
    return head


@pytest.mark.parametrize("values", expected.VALUE_COUNTS)
def test_a_step_has_two_launches_and_few_calls(
    values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batch = SteeringBatch.build(
        [random_head() for _ in range(values)],
        np.ones((ROWS, values), np.float32),
        np.full(ROWS, K),
        np.zeros(ROWS, np.bool_),
        torch.device("cpu"),
        steerer=FusedSteerer(),
    )
    logits = torch.randn(ROWS, VOCABULARY)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16)
    frozen = logits.clone()
    with torch.inference_mode():
        # The first step takes the memory that later steps share.
        steer(frozen.clone(), hidden, batch, in_place=True)
        with CallsOutsideOfLaunches(monkeypatch) as counted:
            steered = steer(logits, hidden, batch, in_place=True)
    assert int((steered != frozen).sum()) == ROWS * K
    assert counted.launches == expected.STEERING_LAUNCHES
    assert counted.calls == expected.STEERING_CALLS
