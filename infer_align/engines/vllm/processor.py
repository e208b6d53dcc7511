"""VAS inside vLLM's workers: one logits processor for both model runners, with the value heads resident beside the model.

A step: vLLM's output layer ─ its input is tapped ─ logits ─ biases, bans, grammar ─ top-k ─ values of the k ─ reweighted logits ─
temperature and the sampler. Rows that do not steer are not touched, and where no row steers nothing is done at all. Of rows that
are watched, what their values expect is kept at the steps that are due, for the frontend to fetch.

The older runner (V1) knows a request by its row, the newer one (V2) by a slot that any of its rows map to. Here both are slots.
Nothing on the way waits for the device: who steers is decided on the host, and the tensors for it are made when that changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from infer_align.decoding.steering import steer
from infer_align.engines.vllm.slots import Bound, Slots
from infer_align.engines.vllm.steering import KEY, Terms
from infer_align.engines.vllm.watching import Estimates, Named, Recorder, Watched
from infer_align.values import FrozenModel
from infer_align.values.head import HeadValue
from infer_align.vllm.compat import (
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
        self._frozen = FrozenModel(
            model.model,
            model.get_vocab_size(),
            model.get_hidden_size(),
            settings.get("tokenizer", ""),
            str(device),
        )
        self._slots = Slots(size, self._frozen.vocabulary, device)
        self._rows: dict[int, Bound] = {}  # V1: how each row is steered
        self._watched: dict[int, Watched] = {}  # by row (V1) or slot (V2)
        self._prompt_lengths = (
            np.zeros(0) if pinned is not None else where.prompt_len.np
        )  # V2: of each slot
        self._recorder = Recorder(device)
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
        Named.read(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """No: it is what steering is for."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1, before each step: which rows have come, gone or moved."""
        if process_dict_updates(self._rows, batch_update, lambda params, *_: self._bind(params)):
            self._slots.replace(self._rows)
        process_dict_updates(
            self._watched, batch_update, lambda params, _, output: self._watch(params, output)
        )
        self._tap.armed = bool(self._rows or self._watched)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot, whoever had it before."""
        bound, watched = self._bind(sampling_params), self._watch(sampling_params)
        self._slots.put(req_idx, bound)
        self._watched.pop(req_idx, None)
        if watched is not None:
            self._watched[req_idx] = watched
        return bound is not None or watched is not None

    def apply_staged_writes(self) -> None:
        """V2, before each step."""
        self._tap.armed = self._slots.steered_any or bool(self._watched)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """[rows, V] float32, in place. V1 says nothing more: a row is a slot."""
        if ctx is None:
            layout = self._slots.layout(range(len(logits)))
        elif len(logits) == len(ctx.idx_mapping_np):
            layout = self._slots.layout(ctx.idx_mapping_np)
        else:  # speculative decoding: a row per draft token, and only the device knows whose
            layout = self._slots.expanded_layout(ctx.idx_mapping_np, ctx.expanded_idx_mapping)
        due = self._due(ctx) if self._watched else []
        if layout is None and not due:
            return logits
        hidden = self._tap.take(len(logits))
        if layout is not None:
            logits, _ = steer(logits, hidden, layout, out=logits)
        if due:
            self._recorder.add(logits, hidden, due)
        return logits

    def take_estimates(self) -> Estimates:
        """What was kept since the last call."""
        return self._recorder.take()

    def _due(self, ctx: LogitsContext | None) -> list[tuple[int, Watched, int]]:
        """Rows whose estimates are wanted in this step, with the tokens that they have so far. Not under speculative decoding."""
        if ctx is None:
            found = ((row, watched, len(watched.output)) for row, watched in self._watched.items())
        else:
            slots = ctx.idx_mapping_np  # the other array is padded where a CUDA graph is
            lengths = ctx.seq_lens_upper_bound_np[: len(slots)] - self._prompt_lengths[slots]
            pairs = zip(slots.tolist(), lengths.tolist(), strict=True)
            found = (
                (i, self._watched[slot], n)
                for i, (slot, n) in enumerate(pairs)
                if slot in self._watched
            )
        return [
            (row, watched, tokens)
            for row, watched, tokens in found
            if watched.estimates.is_due(tokens)
        ]

    def _bind(self, sampling_params: Any) -> Bound | None:
        return self._slots.bind(Terms.read(sampling_params.extra_args))

    def _watch(self, sampling_params: Any, output: Sequence[int] = ()) -> Watched | None:
        if (named := Named.read(sampling_params.extra_args)) is None:
            return None
        values = (
            (self._slots.head(name), weight)
            for name, weight in named.estimates.values.items()
            if weight
        )
        return Watched(named.name, named.estimates, tuple(values), output)


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

    def infer_align_take_estimates(self) -> Estimates:
        """What the values have said of watched requests since the last call; nothing where this worker does not sample."""
        return [
            estimate
            for processor in self._infer_align_processors()
            for estimate in processor.take_estimates()
        ]

    def _infer_align_processors(self) -> list[ValueProcessor]:
        return [processor for processor in _live if processor.vllm_config is self.vllm_config]


def _settings(vllm_config: Any) -> Mapping[str, Any]:
    """What the frontend left for the workers: the tokenizer's digest, and {value name: path}."""
    given = vllm_config.additional_config
    found: Mapping[str, Any] = given.get(KEY, {}) if isinstance(given, Mapping) else {}
    return found
