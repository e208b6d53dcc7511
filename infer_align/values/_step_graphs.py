"""CUDA graphs of a step that runs again and again: the host starts all of its operations at once.

A graph is one recording of the operations of a step, with their addresses. So a step takes its
numbers from tensors that stay where they are, and writes its results to such tensors.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger("infer_align")

# A size is captured when it is used for this time: a size that does not come again is not worth it.
CAPTURED_AT_USE = 4
# Every graph takes some memory of the device. Further sizes run eagerly.
MAX_GRAPHS = 32
# CUDA captures for one thread of a process at a time.
_capturing = threading.Lock()


class StepGraphs:
    """The graphs of one step, by its size. Where there is no CUDA, the step runs eagerly.

    If a size cannot be captured, one warning is logged, and every size without a graph runs eagerly
    from then on.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Take the name of the step, for the warning, and the device on which it runs."""
        self._name = name
        self._device = device
        self._may_capture = True
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
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
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
        if not self._may_capture or len(self._graphs) >= MAX_GRAPHS:
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
            self._may_capture = False
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
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        # What a library makes at its first use on a stream is made here, and not in the capture.
        with torch.cuda.stream(self._stream):
            step()
        caller.wait_stream(self._stream)
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
