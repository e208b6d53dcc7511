"""Scale the objectives of a reward, so that a direction through them has a meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from infer_align.errors import ConfigError, nearest
from infer_align.types import Array

# Metadata of the field `scaling` of a reward's section.
SCALING = {
    "description": "{attribute: {mean, std}}. Its scores become (score - mean) / std. "
    "Other attributes are unchanged."
}


@dataclass(frozen=True, slots=True)
class Scaling:
    """The scaling of one objective: (score - mean) / std."""

    mean: float = field(
        default=0.0, metadata={"description": "Number subtracted from every score."}
    )
    std: float = field(
        default=1.0, metadata={"gt": 0, "description": "Number that the difference is divided by."}
    )


def check_scaling(kind: str, scaling: Mapping[str, Scaling], attributes: Sequence[str]) -> None:
    """Refuse a scaling of an attribute that the reward does not have.

    Raises:
        ConfigError: `scaling` names an unknown attribute.
    """
    for name in scaling:
        if name not in attributes:
            raise ConfigError(
                f"{kind}.scaling.{name}: no such attribute; {nearest(name, attributes)}"
            )


def scale_scores(values: Array, scaling: Mapping[str, Scaling], attributes: Sequence[str]) -> Array:
    """Scale [A, K, N] scores, each objective by its own mean and standard deviation."""
    scalings = [scaling.get(name, Scaling()) for name in attributes] or [Scaling()]
    mean = np.array([each.mean for each in scalings])[:, None, None]
    std = np.array([each.std for each in scalings])[:, None, None]
    return np.asarray((values - mean) / std)
