"""The parts of vLLM that run in its workers: logits processors and the model's hidden states.

Import this module only where vLLM runs. vLLM's server process imports it too, to validate
requests, but has no use for model code: that is imported when a tap is made.
"""

# ruff: noqa: E402 - the version is checked before anything of vLLM is imported
from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from infer_align.vllm import package as vllm_package

vllm_package.require()

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

__all__ = [
    "BatchUpdate",
    "HiddenStateTap",
    "LogitsContext",
    "LogitsProcRequestState",
    "LogitsProcessorV1",
    "LogitsProcessorV2",
    "SamplingParams",
    "is_first_shard",
    "model_parameters",
    "process_dict_updates",
]


def is_first_shard() -> bool:
    """Return True if this worker holds the first part of each matrix, by tensor parallelism."""
    return int(get_tensor_model_parallel_rank()) == 0


def model_parameters(worker: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """Return the names and weights of a worker's model."""
    parameters: Iterable[tuple[str, torch.Tensor]] = worker.get_model().named_parameters()
    return parameters


class HiddenStateTap:
    """Keeps the input of the model's output layer: the hidden state behind each row of logits.

    The tap patches the class of the output layer, not the model. Every architecture calls this
    layer outside CUDA graphs, with exactly the rows that are sampled next. Logprobs of prompts and
    draft models call it after the sampler, so the latest call before the sampler is the right one.
    Several engines of one process share the patch, and only one of them runs a step at a time.

    Attributes:
        enabled: True if the next step needs hidden states; they are not kept otherwise.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._hidden: torch.Tensor | None = None
        _patch_output_layer()
        _taps.add(self)

    def put(self, hidden: torch.Tensor) -> None:
        """Keep the input of the output layer. [rows, d]."""
        self._hidden = hidden if self.enabled else None

    def take(self, rows: int) -> torch.Tensor:
        """Return the hidden states behind `rows` rows of logits, [rows, d], and forget them.

        Raises:
            RuntimeError: the layer was not called, or with another number of rows. Steering would
                read wrong states, so the engine has to stop.
        """
        hidden = self._hidden
        self._hidden = None
        if hidden is None or len(hidden) != rows:
            count = "none" if hidden is None else len(hidden)
            raise RuntimeError(
                f"steering needs the hidden states of {rows} rows of logits, but the output layer "
                f"received {count}; vLLM's implementation of this model cannot be steered."
            )
        return hidden


_taps: weakref.WeakSet[HiddenStateTap] = weakref.WeakSet()


def _patch_output_layer() -> None:
    """Make the output layer of every model pass its input to the taps. Has an effect once."""
    from vllm.model_executor.layers.logits_processor import (  # noqa: PLC0415 - see above
        LogitsProcessor as OutputLayer,
    )

    original = OutputLayer.forward
    if getattr(original, "is_tapped", False):
        return

    def forward(
        layer: OutputLayer, lm_head: Any, hidden_states: torch.Tensor, *args: Any, **options: Any
    ) -> Any:
        for tap in _taps:
            tap.put(hidden_states)
        return original(layer, lm_head, hidden_states, *args, **options)

    forward.is_tapped = True  # type: ignore[attr-defined]
    OutputLayer.forward = forward
