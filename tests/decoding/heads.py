"""Value heads with random weights, for tests of steering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from infer_align.values import FrozenModel
from infer_align.values.head import HeadValue, write


def random_heads(
    folder: Path, vocabulary: int, width: int, ranks: Sequence[int], device: torch.device
) -> list[HeadValue]:
    """Return loaded heads, one of each rank."""
    frozen = FrozenModel("tiny", vocabulary, width, "tokens", str(device))
    generator = torch.Generator().manual_seed(1)
    heads: list[HeadValue] = []
    for i, rank in enumerate(ranks):
        shapes = {"P": (rank, width), "E": (vocabulary, rank), "b": (vocabulary,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        path = folder / f"{i}.safetensors"
        write(path, tensors, frozen, {})
        head = HeadValue(str(path))
        head.start(frozen, {})
        heads.append(head)
    return heads
