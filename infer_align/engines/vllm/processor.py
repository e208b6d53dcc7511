"""Value-augmented sampling inside vLLM's workers: one logits processor for both model runners.

The value heads are on the device beside the model. In each step:

1. vLLM's output layer computes the logits; a tap keeps its input, the hidden states.
2. vLLM applies biases, bans and grammars.
3. This processor reweights the logits of the steered rows (`decoding.steering.steer`) and records
   the estimates that are due.
4. vLLM applies temperature and samples.

Rows that are not steered stay the same, and a step without steered rows costs nothing. Nothing
waits for the device: the host decides which rows are steered.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from infer_align.decoding.steering import steer
from infer_align.engines.vllm.extra_args import (
    STEERING_KEY,
    Estimated,
    EstimateRequest,
    SteeringRequest,
    published_value_names,
)
from infer_align.engines.vllm.recorder import DueRow, EstimatedRequest, EstimateRecorder
from infer_align.engines.vllm.slot_table import SlotSteering, SlotTable
from infer_align.values import FrozenModel
from infer_align.values._fingerprint import Fingerprint, fingerprint
from infer_align.values.head import HeadValue
from infer_align.vllm.interfaces import VllmConfig
from infer_align.vllm.worker import (
    BatchUpdate,
    HiddenStateTap,
    LogitsContext,
    LogitsProcessorV1,
    LogitsProcessorV2,
    LogitsProcRequestState,
    SamplingParams,
    is_first_shard,
    model_parameters,
    process_dict_updates,
)

# The processors in this process; each belongs to the worker with the same configuration.
_processors: weakref.WeakSet[ValueProcessor] = weakref.WeakSet()


class ValueProcessor(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Adds value estimates to the logits of steered requests.

    vLLM makes one per worker, by its full class name.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device_or_requests: torch.device | LogitsProcRequestState,
        is_pin_memory: bool | None = None,  # noqa: FBT001 - vLLM's signature
    ) -> None:
        """Load the configured values.

        The V1 runner passes the device, and whether host memory is pinned. The V2 runner passes the
        state of its requests alone.

        Raises:
            ConfigError: a value cannot be loaded, or was made for another model.
        """
        self.vllm_config = vllm_config
        if is_pin_memory is None:
            requests: LogitsProcRequestState = device_or_requests
            device = torch.device(requests.device)
            slots = requests.max_num_reqs
            # Prompt length of each slot, on the host. V2 only.
            self._prompt_lengths = requests.prompt_len.np
        else:
            device = torch.device(device_or_requests)
            slots = vllm_config.scheduler_config.max_num_seqs
            self._prompt_lengths = np.zeros(0)
        settings = _settings(vllm_config)
        model = vllm_config.model_config
        self._frozen = FrozenModel(
            model.model,
            model.get_vocab_size(),
            model.get_hidden_size(),
            settings.get("tokenizer", ""),
            str(device),
        )
        self._table = SlotTable(slots, self._frozen.vocabulary, device)
        # The steered rows of the V1 runner.
        self._steered: dict[int, SlotSteering] = {}
        self._estimated: dict[int, EstimatedRequest] = {}
        self._recorder = EstimateRecorder(device)
        self._tap = HiddenStateTap()
        # A value between `load_value` and `use_value`.
        self._loaded: HeadValue | None = None
        for name, path in settings.get("values", {}).items():
            self.load_value(path)
            self.use_value(name)
        _processors.add(self)

    def load_value(self, path: str) -> None:
        """Load a head onto this worker's device, without using it yet.

        Raises:
            ConfigError: the head cannot be loaded, or was made for another model.
        """
        value = HeadValue(path)
        value.start(self._frozen, {})
        self._loaded = value

    def use_value(self, name: str) -> None:
        """Use the loaded head under this name for requests that join from now on.

        Requests that run keep the head that it replaces.

        Raises:
            RuntimeError: no head is loaded.
        """
        if self._loaded is None:
            raise RuntimeError(f"value {name!r}: no head is loaded; call load_value first.")
        self._table.set_value(name, self._loaded)
        self._loaded = None

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check a new request. vLLM calls this in the server process and answers errors with 400.

        Raises:
            ValueError: a field is invalid; the message names it.
        """
        # No names are published where the engine's server is another process.
        names = published_value_names() or None
        SteeringRequest.read(sampling_params.extra_args, names)
        EstimateRequest.read(sampling_params.extra_args, names)

    def is_argmax_invariant(self) -> bool:
        """Return False: steering changes which token has the largest logit."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows that joined, left or moved. V1 calls this before each step."""
        changed = process_dict_updates(
            self._steered, batch_update, lambda params, *_: self._steering_of(params)
        )
        if changed:
            self._table.assign_all(self._steered)
        process_dict_updates(
            self._estimated,
            batch_update,
            lambda params, _, output: self._estimates_of(params, output),
        )
        self._tap.enabled = bool(self._steered or self._estimated)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Give a slot to a request, in place of the previous one. Called by V2.

        Returns:
            True if the request needs this processor.
        """
        steering = self._steering_of(sampling_params)
        estimated = self._estimates_of(sampling_params)
        self._table.assign(req_idx, steering)
        self._estimated.pop(req_idx, None)
        if estimated is not None:
            self._estimated[req_idx] = estimated
        return steering is not None or estimated is not None

    def apply_staged_writes(self) -> None:
        """Prepare a step. Called by V2 before each."""
        self._tap.enabled = self._table.any_steered or bool(self._estimated)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Reweight the steered rows in place and record the estimates that are due.

        Args:
            logits: [rows, V] float32.
            ctx: the batch in V2. V1 passes none: there each row is its own slot.
        """
        if ctx is None:
            batch = self._table.batch(range(len(logits)))
        elif len(logits) == len(ctx.idx_mapping_np):
            batch = self._table.batch(ctx.idx_mapping_np)
        else:
            # Speculative decoding has a row per draft token, and only the device knows its slot.
            batch = self._table.expanded_batch(ctx.idx_mapping_np, ctx.expanded_idx_mapping)
        due = self._due_rows(ctx) if self._estimated else []
        if batch is None and not due:
            return logits
        hidden = self._tap.take(len(logits))
        if batch is not None:
            logits, _ = steer(logits, hidden, batch, in_place=True)
        if due:
            self._recorder.add(logits, hidden, due)
        return logits

    def take_estimates(self) -> list[Estimated]:
        """Return all estimates since the last call."""
        return self._recorder.take()

    def _due_rows(self, ctx: LogitsContext | None) -> list[DueRow]:
        """Return the rows whose estimates are due. Speculative decoding does not support them."""
        rows = self._estimated_rows_v1() if ctx is None else self._estimated_rows_v2(ctx)
        return [row for row in rows if row.request.schedule.is_due(row.tokens)]

    def _estimated_rows_v1(self) -> list[DueRow]:
        items = self._estimated.items()
        return [DueRow(row, request, len(request.output)) for row, request in items]

    def _estimated_rows_v2(self, ctx: LogitsContext) -> list[DueRow]:
        slots = ctx.idx_mapping_np
        # Where a CUDA graph pads the batch, vLLM pads the lengths but not the slots.
        lengths = ctx.seq_lens_upper_bound_np[: len(slots)] - self._prompt_lengths[slots]
        rows = []
        for row, (slot, tokens) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
            if slot in self._estimated:
                rows.append(DueRow(row, self._estimated[slot], tokens))
        return rows

    def _steering_of(self, sampling_params: SamplingParams) -> SlotSteering | None:
        return self._table.resolve(SteeringRequest.read(sampling_params.extra_args))

    def _estimates_of(
        self, sampling_params: SamplingParams, output: Sequence[int] = ()
    ) -> EstimatedRequest | None:
        request = EstimateRequest.read(sampling_params.extra_args)
        if request is None:
            return None
        weights: dict[HeadValue, float] = {}
        for name, weight in request.schedule.values.items():
            if weight:
                weights[self._table.value(name)] = weight
        return EstimatedRequest(request.key, request.schedule, weights, output)


class WorkerExtension:
    """Methods that the server calls in each worker, by `collective_rpc`.

    A value is replaced in two steps, so that workers never steer by different heads.
    """

    vllm_config: VllmConfig

    def infer_align_fingerprint(self) -> Fingerprint:
        """Return the fingerprint of this worker's weights; {} if it is not the first of its shards.

        The numbers are taken from the part of each matrix that the first GPU holds.
        """
        return fingerprint(model_parameters(self)) if is_first_shard() else {}

    def infer_align_load_value(self, path: str) -> None:
        """Load a head, without using it yet.

        Raises:
            ConfigError: the head cannot be loaded, or was made for another model.
        """
        for processor in self._infer_align_processors():
            processor.load_value(path)

    def infer_align_use_value(self, name: str) -> int:
        """Use the loaded head under this name for requests that join from now on.

        Returns:
            1 if this worker samples, else 0.
        """
        processors = self._infer_align_processors()
        for processor in processors:
            processor.use_value(name)
        return len(processors)

    def infer_align_take_estimates(self) -> list[Estimated]:
        """Return all estimates since the last call; none if this worker does not sample."""
        estimates: list[Estimated] = []
        for processor in self._infer_align_processors():
            estimates += processor.take_estimates()
        return estimates

    def _infer_align_processors(self) -> list[ValueProcessor]:
        config = self.vllm_config
        return [processor for processor in _processors if processor.vllm_config is config]


def _settings(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """Return the settings that the server left for its workers.

    They are "tokenizer", the digest of the tokenizer, and "values", the path of each value.
    """
    additional: object = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return {}
    settings: Mapping[str, Any] = additional.get(STEERING_KEY, {})
    return settings
