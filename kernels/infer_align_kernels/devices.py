"""Choose the implementation for a device: the Triton kernels or the torch references."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray

# True if Triton interprets its kernels on the CPU. Triton reads the variable when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The kernels need a * b + c to be one instruction. Triton 3.9 warns that this will not stay its
# default. It reads the variable when it compiles a kernel.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def runs_triton(device: torch.device) -> bool:
    """Return True if tensors on this device are computed by the Triton kernels.

    That is a GPU. With TRITON_INTERPRET=1 it is the CPU too, so that tests can run everything that
    a GPU runs.
    """
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def launching(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def staged(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor of the host, from which a copy to the device does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
