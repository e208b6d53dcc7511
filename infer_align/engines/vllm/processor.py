"""VAS inside vLLM's workers: one logits processor for both model runners, with the value heads resident beside the model.

A step: vLLM's output layer ─ its input is tapped ─ logits ─ biases, bans, grammar ─ top-k ─ values of the k ─ reweighted logits ─
temperature and the sampler. Rows that do not steer are not touched, and where no row steers nothing is done at all.

The older runner (V1) knows a request by its row, the newer one (V2) by a slot that any of its rows map to. Here both are slots.
Nothing on the way waits for the device: who steers is decided on the host, and the tensors for it are made when that changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from infer_align.engines.vllm.slots import Bound, Slots, steer
from infer_align.engines.vllm.steering import KEY, Terms
from infer_align.values import Frozen
from infer_align.values.head import HeadValue
from infer_align.vllm_compat import (
    BatchUpdate,
    LogitsContext,
    LogitsProcessorV1,
    LogitsProcessorV2,
    Tap,
    process_dict_updates,
)

_live: weakref.WeakSet[ValueProcessor] = weakref.WeakSet()


class ValueProcessor(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Adds value estimates to the logits of the requests that ask for it. vLLM makes one per worker, by its full class name."""

    def __init__(self, vllm_config: Any, where: Any, pinned: bool | None = None) -> None:  # noqa: FBT001 - vLLM's signature
        """V1 gives the device and whether host memory is pinned; V2 gives its request states.

        Raises:
            ConfigError: a value cannot be loaded, or was made for another model.
        """
        model = vllm_config.model_config
        self.vllm_config = vllm_config
        device = torch.device(where.device if pinned is None else where)
        size = where.max_num_reqs if pinned is None else vllm_config.scheduler_config.max_num_seqs
        settings = _settings(vllm_config)
        self._frozen = Frozen(
            model.model, model.get_vocab_size(), model.get_hidden_size(), settings.get("tokenizer", ""), str(device)
        )
        self._slots = Slots(size, self._frozen.vocabulary, device)
        self._rows: dict[int, Bound] = {}  # V1: how each row is steered
        self._tap = Tap()
        self._loaded: HeadValue | None = None  # the latest
        for name, path in settings.get("values", {}).items():
            self.load(path)
            self.use(name)
        _live.add(self)

    def load(self, path: str) -> None:
        """Load a head onto this worker's device; nothing uses it yet.

        Raises:
            ConfigError: not loadable, or made for another model.
        """
        value = HeadValue(path)
        value.start(self._frozen, {})
        self._loaded = value

    def use(self, name: str) -> None:
        """Steer by the head that was loaded last the requests that join from now on; those that run keep the one it replaces."""
        assert self._loaded is not None
        self._slots.add(name, self._loaded)
        self._loaded = None

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called by vLLM where requests come in.

        Raises:
            ValueError: naming the field; vLLM answers 400.
        """
        Terms.read(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """No: it is what steering is for."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1, before each step: which rows have come, gone or moved."""
        if process_dict_updates(self._rows, batch_update, lambda params, *_: self._bind(params)):
            self._slots.replace(self._rows)
        self._tap.armed = bool(self._rows)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot, whoever had it before."""
        bound = self._bind(sampling_params)
        self._slots.put(req_idx, bound)
        return bound is not None

    def apply_staged_writes(self) -> None:
        """V2, before each step."""
        self._tap.armed = self._slots.steered_any

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """[rows, V] float32, in place. V1 says nothing more: a row is a slot."""
        if ctx is None:
            layout = self._slots.layout(range(len(logits)))
        elif len(logits) == len(ctx.idx_mapping_np):
            layout = self._slots.layout(ctx.idx_mapping_np)
        else:  # speculative decoding: a row per draft token, and only the device knows whose
            layout = self._slots.expanded_layout(ctx.idx_mapping_np, ctx.expanded_idx_mapping)
        return logits if layout is None else steer(logits, self._tap.take(len(logits)), layout)

    def _bind(self, sampling_params: Any) -> Bound | None:
        return self._slots.bind(Terms.read(sampling_params.extra_args))


class WorkerExtension:
    """What `collective_rpc` can call in each worker. In two steps: workers that steered by different heads would part ways."""

    vllm_config: Any

    def infer_align_load_value(self, path: str) -> None:
        """Load a head; nothing uses it yet.

        Raises:
            ConfigError: not loadable, or made for another model.
        """
        for processor in self._infer_align_processors():
            processor.load(path)

    def infer_align_use_value(self, name: str) -> int:
        """Let requests steer by the head that was loaded, under this name; -> 1 where this worker samples, else 0."""
        mine = self._infer_align_processors()
        for processor in mine:
            processor.use(name)
        return len(mine)

    def _infer_align_processors(self) -> list[ValueProcessor]:
        return [processor for processor in _live if processor.vllm_config is self.vllm_config]


def _settings(vllm_config: Any) -> Mapping[str, Any]:
    """What the frontend left for the workers: the tokenizer's digest, and {value name: path}."""
    given = vllm_config.additional_config
    found: Mapping[str, Any] = given.get(KEY, {}) if isinstance(given, Mapping) else {}
    return found
