"""Multiply by the output layer quickly.

The output layer of a small model is a large part of it: a fifth of SmolLM2-135M. Two things slow it
down.

After a prompt, the states of the last tokens are a slice of [B, Q, d], which is not contiguous.
torch multiplies such a slice row by row, and reads all weights B times: 2,000 ms in place of 15 for
32 rows of SmolLM2 in bfloat16.

For a few rows at a time in float32 on a CPU, the matrix library of torch multiplies
"weights x states" about twice as fast as "states x weights", which is what a linear layer computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

# With fewer outputs, the order of the factors makes no difference.
LARGE_VOCABULARY = 16_384


def quicken_output_layer(lm: Any) -> None:
    """Let the output layer read contiguous states; let a large one use the quicker order.

    The order changes for float32 on a CPU only. Logits may differ from those of the linear layer in
    the last bits.
    """
    layer = lm.get_output_embeddings()
    if layer is None:
        return
    layer.register_forward_pre_hook(_make_contiguous)
    # Subclasses, such as quantized layers, multiply in their own way.
    if type(layer) is not torch.nn.Linear or layer.out_features < LARGE_VOCABULARY:
        return
    if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32:
        # `forward` is an attribute of this one layer now; hooks of the module still run.
        vars(layer)["forward"] = partial(_multiply, layer)


def _make_contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """Return the inputs with contiguous states."""
    return (inputs[0].contiguous(), *inputs[1:])


def _multiply(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    """Return the logits: [..., d] -> [..., V]."""
    flat = states.reshape(-1, layer.in_features)
    logits = (layer.weight @ flat.t()).t().contiguous()
    if layer.bias is not None:
        logits += layer.bias
    return logits.reshape(*states.shape[:-1], layer.out_features)
