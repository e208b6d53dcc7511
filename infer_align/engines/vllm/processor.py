"""Value-augmented sampling inside vLLM's workers: one logits processor for both model runners.

The value heads and value LMs are on the device beside the model. In each step:

1. vLLM's output layer computes the logits; a tap keeps its input, the hidden states.
2. vLLM applies biases, bans and grammars.
3. This processor reweights the logits of the steered rows (`decoding.steering.steer`) and records
   the estimates that are due.
4. vLLM applies temperature and samples.

Rows that are not steered stay the same, and a step without steered rows costs nothing. Steering by
heads does not wait for the device: the host decides which rows are steered. A value LM needs the
sampled token of the step before, so steering by lookahead values does wait.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from infer_align.decoding.steering import steer
from infer_align.decoding.steering_batch import SteeringBatch
from infer_align.engines.vllm.extra_args import (
    STEERING_KEY,
    Estimated,
    EstimateRequest,
    SteeringRequest,
    published_value_names,
)
from infer_align.engines.vllm.lookahead import (
    DeviceHistory,
    HostHistory,
    LookaheadCaches,
    LookaheadRow,
    TokenHistory,
)
from infer_align.engines.vllm.recorder import DueRow, EstimatedRequest, EstimateRecorder
from infer_align.engines.vllm.slot_table import LookaheadSlot, SlotSteering, SlotTable
from infer_align.engines.vllm.value_source import ValueSource, load_source
from infer_align.values import FrozenModel, Value
from infer_align.values._fingerprint import Fingerprint, fingerprint
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import LookaheadValue
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
        # The state of the V2 runner's requests.
        self._requests: LogitsProcRequestState | None = None
        if is_pin_memory is None:
            requests: LogitsProcRequestState = device_or_requests
            self._requests = requests
            device = torch.device(requests.device)
            slots = requests.max_num_reqs
            # Prompt length of each slot, on the host. V2 only.
            self._prompt_lengths = requests.prompt_len.np
        else:
            device = torch.device(device_or_requests)
            slots = vllm_config.scheduler_config.max_num_seqs
            self._prompt_lengths = np.zeros(0)
        self._all_slots = np.arange(slots)
        settings = _settings(vllm_config)
        self._frozen = _frozen_model(vllm_config, settings.get("tokenizer", ""), device)
        self._table = SlotTable(slots, self._frozen.vocabulary, device)
        # The steered rows of the V1 runner.
        self._steered: dict[int, SlotSteering] = {}
        # The tokens of the requests that lookahead values steer.
        self._histories: dict[int, TokenHistory] = {}
        self._caches = LookaheadCaches()
        # True if a step has sampled since the latest `apply_staged_writes`.
        self._sampled = False
        self._estimated: dict[int, EstimatedRequest] = {}
        self._recorder = EstimateRecorder(device)
        self._tap = HiddenStateTap()
        # A value between `load_value` and `use_value`.
        self._loaded: Value | None = None
        # The value LMs of the values, see `Value.start`.
        self._shared: dict[object, Any] = {}
        for name, source in settings.get("values", {}).items():
            self.load_value(source)
            self.use_value(name)
        _processors.add(self)

    def load_value(self, source: ValueSource) -> None:
        """Load a value onto this worker's device, without using it yet.

        Raises:
            ConfigError: the value cannot be loaded, or was made for another model.
        """
        value = load_source(source)
        value.start(self._frozen, self._shared)
        self._loaded = value

    def use_value(self, name: str) -> None:
        """Use the loaded value under this name for requests that join from now on.

        Requests that run keep the value that it replaces.

        Raises:
            RuntimeError: no value is loaded.
        """
        if self._loaded is None:
            raise RuntimeError(f"value {name!r}: none is loaded; call load_value first.")
        self._table.set_value(name, self._loaded)
        self._loaded = None
        # Drop the value LMs that only a replaced value used.
        lookaheads = [v for v in self._table.values if isinstance(v, LookaheadValue)]
        in_use = {id(lookahead.lm) for lookahead in lookaheads}
        self._shared = {key: lm for key, lm in self._shared.items() if id(lm) in in_use}

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
        process_dict_updates(self._histories, batch_update, self._history_of)
        if not self._histories:
            self._caches.clear()
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
        self._histories.pop(req_idx, None)
        if self._requests is not None and self._table.has_lookahead(steering):
            tokens = self._requests.all_token_ids.gpu
            self._histories[req_idx] = DeviceHistory(tokens, req_idx)
        self._estimated.pop(req_idx, None)
        if estimated is not None:
            self._estimated[req_idx] = estimated
        return steering is not None or estimated is not None

    def apply_staged_writes(self) -> None:
        """Prepare a step. Called by V2 before each."""
        if not self._sampled:
            # vLLM does not call `apply` where no request needs it, and does not say who has left.
            self._caches.clear()
        self._sampled = False
        self._tap.enabled = self._table.any_steered or bool(self._estimated)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Reweight the steered rows in place and record the estimates that are due.

        Args:
            logits: [rows, V] float32.
            ctx: the batch in V2. V1 passes none: there each row is its own slot.
        """
        self._sampled = True
        if ctx is None:
            batch = self._table.batch(self._all_slots[: len(logits)])
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
            logits = self._steer(logits, hidden, batch, ctx)
        if due:
            self._recorder.add(logits, hidden, due)
        return logits

    def _steer(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        batch: SteeringBatch,
        ctx: LogitsContext | None,
    ) -> torch.Tensor:
        slots = self._table.lookahead_slots
        if not slots:
            return steer(logits, hidden, batch, in_place=True)
        rows = (
            self._lookahead_rows_v1(slots) if ctx is None else self._lookahead_rows_v2(slots, ctx)
        )
        caches = self._caches.prepare(rows)
        return steer(logits, hidden, batch, caches, in_place=True)

    def _lookahead_rows_v1(self, slots: Sequence[LookaheadSlot]) -> list[LookaheadRow]:
        rows: list[LookaheadRow] = []
        for item in slots:
            history = self._histories[item.slot]
            if isinstance(history, HostHistory):
                rows.append(LookaheadRow(item.position, history, history.length, item.lms))
        return rows

    def _lookahead_rows_v2(
        self, slots: Sequence[LookaheadSlot], ctx: LogitsContext
    ) -> list[LookaheadRow]:
        """Return the rows that are sampled; vLLM drops the samples of prompts it still reads."""
        rows: list[LookaheadRow] = []
        for item in slots:
            length = int(ctx.seq_lens_upper_bound_np[item.row])
            if self._requests is not None and length >= self._requests.prefill_len.np[item.slot]:
                history = self._histories[item.slot]
                rows.append(LookaheadRow(item.position, history, length, item.lms))
        return rows

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

    def _history_of(
        self, params: SamplingParams, prompt: Sequence[int] | None, output: Sequence[int]
    ) -> HostHistory | None:
        if prompt is None or not self._table.has_lookahead(self._steering_of(params)):
            return None
        return HostHistory(prompt, output, torch.device(self._frozen.device))

    def _estimates_of(
        self, sampling_params: SamplingParams, output: Sequence[int] = ()
    ) -> EstimatedRequest | None:
        request = EstimateRequest.read(sampling_params.extra_args)
        if request is None:
            return None
        weights: dict[HeadValue, float] = {}
        for name, weight in request.schedule.values.items():
            if weight:
                weights[self._table.head(name)] = weight
        return EstimatedRequest(request.key, request.schedule, weights, output)


class WorkerExtension:
    """Methods that the server calls in each worker, by `collective_rpc`.

    A value is replaced in two steps, so that workers never steer by different ones.
    """

    vllm_config: VllmConfig

    def infer_align_fingerprint(self) -> Fingerprint:
        """Return the fingerprint of this worker's weights; {} if it is not the first of its shards.

        The numbers are taken from the part of each matrix that the first GPU holds.
        """
        return fingerprint(model_parameters(self)) if is_first_shard() else {}

    def infer_align_load_value(self, source: ValueSource) -> None:
        """Load a value, without using it yet.

        Raises:
            ConfigError: the value cannot be loaded, or was made for another model.
        """
        for processor in self._infer_align_processors():
            processor.load_value(source)

    def infer_align_use_value(self, name: str) -> int:
        """Use the loaded value under this name for requests that join from now on.

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


def _frozen_model(vllm_config: VllmConfig, tokenizer: str, device: torch.device) -> FrozenModel:
    model = vllm_config.model_config
    return FrozenModel(
        model.model, model.get_vocab_size(), model.get_hidden_size(), tokenizer, str(device)
    )


def _settings(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """Return the settings that the server left for its workers.

    They are "tokenizer", the digest of the tokenizer, and "values", the source of each value.
    """
    additional: object = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return {}
    settings: Mapping[str, Any] = additional.get(STEERING_KEY, {})
    return settings
