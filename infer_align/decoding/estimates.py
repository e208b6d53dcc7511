"""Value estimates of running answers, from the states and logits of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from infer_align.decoding.device import upload
from infer_align.values.head import HeadValue


def expected_values(
    logits: torch.Tensor, hidden: torch.Tensor, weights: Sequence[Mapping[HeadValue, float]]
) -> torch.Tensor:
    """Estimate the value of each row's answer, the weighted sum of its heads' expectations. -> [D].

    Args:
        logits: [D, V] that the next token is sampled from, before temperature.
        hidden: [D, d] states that the output layer read.
        weights: for each of the D rows, its heads and their weights.
    """
    total = torch.zeros(len(weights), device=logits.device)
    states = hidden.float()
    for head in dict.fromkeys(head for row in weights for head in row):
        column = np.array([row.get(head, 0.0) for row in weights], np.float32)
        total += upload(column, logits.device) * head.expected(states, logits)
    return total
