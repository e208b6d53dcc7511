"""Multiply by a large output layer quickly on a CPU.

The output layer of a small model is a large part of it: a fifth of SmolLM2-135M. For a few rows at
a time, the matrix library of torch multiplies "weights x states" about twice as fast as
"states x weights", which is what a linear layer computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

# With fewer outputs, the order of the factors makes no difference.
LARGE_VOCABULARY = 16_384


def quicken_output_layer(lm: Any) -> None:
    """Let a large output layer in float32 on a CPU multiply in the quicker order.

    Logits may differ from those of the linear layer in the last bits.
    """
    layer = lm.get_output_embeddings()
    # Subclasses, such as quantized layers, multiply in their own way.
    if type(layer) is not torch.nn.Linear or layer.out_features < LARGE_VOCABULARY:
        return
    if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
        # `forward` is an attribute of this one layer now; hooks of the module still run.
        vars(layer)["forward"] = partial(_multiply, layer)


def _multiply(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return the logits: [..., d] -> [..., V]."""
    flat = states.reshape(-1, layer.in_features)
    logits = (layer.weight @ flat.t()).t().contiguous()
    if layer.bias is not None:
        logits += layer.bias
    return logits.reshape(*states.shape[:-1], layer.out_features)
