"""CUDA graphs of a step that runs again and again: the host starts all of its operations at once.

A graph is one recording of the operations of a step, with their addresses. So a step takes its
numbers from tensors that stay where they are, and writes its results to such tensors.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

log = logging.getLogger("infer_align")

# A size is captured when it is used for this time: a size that does not come again is not worth it.
CAPTURED_AT_USE = 4
# Every graph takes some memory of the device. Further sizes run eagerly.
MAX_GRAPHS = 32
# Calls of torch that wait for numbers of the device. In inference mode, some have another name.
WAITING_CALLS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
}
# Calls that copy tensors, perhaps to another device.
COPYING_CALLS = {"_to_copy", "copy_", "to"}
# CUDA captures for one thread of a process at a time.
_capturing = threading.Lock()


class WaitingCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the calls of torch in its context that cannot be captured in a graph.

    They wait for the device, or copy between it and the host. A capture that fails may leave torch
    in a bad state, so it is better not begun.

    Attributes:
        names: of these calls.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the call."""
        result = function(*args, **(kwargs or {}))
        name: str = function._schema.name.partition("::")[2]
        if name in WAITING_CALLS or _is_copied_across(name, args, result) or _is_masked(name, args):
            self.names.append(name)
        return result


def _is_copied_across(name: str, args: Any, result: Any) -> bool:
    """Return True for a copy from one device to another."""
    if name not in COPYING_CALLS:
        return False
    tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
    return len({tensor.device for tensor in tensors}) > 1


def _is_masked(name: str, args: Any) -> bool:
    """Return True for an index by a mask: the number of chosen elements has to be known."""
    if not name.startswith("index") or len(args) < 2:
        return False
    indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
    return any(index.dtype in {torch.bool, torch.uint8} for index in indices)


class StepGraphs:
    """The graphs of one step, by its size. Where there is no CUDA, the step runs eagerly.

    If a size cannot be captured, one warning is logged, and every size without a graph runs eagerly
    from then on.

    Attributes:
        may_capture: True if further sizes may be captured.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Take the name of the step, for the warning, and the device on which it runs."""
        self._name = name
        self._device = device
        self.may_capture = True
        self._uses: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        # All graphs share one stream and one pool of memory, which the first capture makes. They
        # never run at once, and what a step leaves for its caller is not in the pool.
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self._graphs)

    def run(self, size: Hashable, step: Callable[[], None]) -> None:
        """Run a step: replay its graph if there is one.

        Args:
            size: all that decides which operations the step has.
            step: reads and writes tensors that are the same at each call with this size.
        """
        if self._device.type != "cuda":
            step()
            return
        if size not in self._graphs and self._is_due(size):
            self._try_to_capture(size, step)
        if size in self._graphs:
            self._graphs[size].replay()
        else:
            step()

    def _is_due(self, size: Hashable) -> bool:
        """Count a use, and return True if the size is worth a graph now."""
        if not self.may_capture or len(self._graphs) >= MAX_GRAPHS:
            return False
        self._uses[size] += 1
        return self._uses[size] >= CAPTURED_AT_USE

    def _try_to_capture(self, size: Hashable, step: Callable[[], None]) -> None:
        try:
            with _capturing, torch.cuda.device(self._device):
                self._graphs[size] = self._capture(step)
        # CUDA, a kernel or the model's code may refuse a capture in any way. Without a graph, the
        # step gives the same results; an error that is not about the capture comes again there.
        except Exception as error:
            self.may_capture = False
            log.warning(
                "%s: a step cannot be captured in a CUDA graph, so its steps take longer, with the "
                "same results: %s: %s",
                self._name,
                type(error).__name__,
                error,
            )

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record a step, after it has run once on the stream of the graphs."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        # What a library makes at its first use on a stream is made here, and not in the capture.
        with torch.cuda.stream(self._stream), WaitingCalls() as waiting:
            step()
        caller.wait_stream(self._stream)
        if waiting.names:
            raise RuntimeError(f"it waits in {', '.join(sorted(set(waiting.names)))}")
        graph = torch.cuda.CUDAGraph()
        # If a capture fails, `torch.cuda.graph` may stay on its stream. The outer context does not.
        # Other threads may allocate memory meanwhile: "thread_local" does not forbid it to them.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            step()
        return graph
