"""The CPU threads of torch for a small model: one is faster than several.

torch gives each core a share of every product and waits for the last one. The shares of a small
model take microseconds. As soon as another thread of the machine wants a core, the wait costs more
than the help was worth.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock, Thread

import torch

# Requests per second with two threads on two cores, over those with one: 0.65 to 0.90 for Llamas of
# 2 to 11 million weights, 0.88 to 1.06 for 21 and 42 million, 0.93 to 1.29 for 135 million.
# The clients ran beside the server, 1 to 32 at once.
SMALL_MODEL = 30_000_000
# Two threads at once would take the other one's 1 for the number that is to be restored.
_changing = Lock()


def compute_alone(models: Iterable[torch.nn.Module]) -> None:
    """Let the calling thread compute without helpers if all its models are small and on the CPU.

    It is for a thread that runs these models and nothing else. Other threads keep their number of
    helpers, and so does this one if a model is large or on another device.
    """
    if not all(_is_small(model) for model in models):
        return
    # torch sets the number of the calling thread and of all threads that begin later. So this
    # thread's number becomes its own, and a thread that ends at once restores the others'.
    with _changing:
        number = torch.get_num_threads()
        torch.set_num_threads(1)
        restorer = Thread(target=torch.set_num_threads, args=(number,), name="restore-threads")
        restorer.start()
        restorer.join()


def _is_small(model: torch.nn.Module) -> bool:
    weights = 0
    # Quantized layers hold their weights as buffers.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "cpu":
            return False
        weights += tensor.numel()
    return weights < SMALL_MODEL
