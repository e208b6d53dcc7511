"""Objectives brought to a common scale, so that a direction through them means what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align.types import Array

# Of the field `scaling` of a reward's section.
SCALING = {
    "description": "{attribute: {mean, std}}: its scores become (score - mean) / std; others stay as they are"
}


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one objective is brought to a common scale: (score - mean) / std."""

    mean: float = field(default=0.0, metadata={"description": "subtracted"})
    std: float = field(default=1.0, metadata={"gt": 0, "description": "divided by"})


def check_scaling(kind: str, scaling: Mapping[str, Scaling], attributes: Sequence[str]) -> None:
    """Refuse what would scale nothing.

    Raises:
        ConfigError: it names no attribute of the reward.
    """
    if unknown := [name for name in scaling if name not in attributes]:
        raise ConfigError(
            f"{kind}.scaling.{unknown[0]}: no such attribute; {nearest(unknown[0], attributes)}"
        )


def scaled(values: Array, scaling: Mapping[str, Scaling], attributes: Sequence[str]) -> Array:
    """[A, K, N], each objective on its configured scale."""
    each = [scaling.get(name, Scaling()) for name in attributes] or [Scaling()]
    mean, std = (np.array([[[getattr(s, name)]] for s in each]) for name in ("mean", "std"))
    return np.asarray((values - mean) / std)
