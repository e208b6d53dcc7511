"""Multiply by int8 weights on a CPU.

A decoding step reads every weight once, and with a few rows that is what it takes its time for. In
int8 a weight takes one byte in place of four. Each output of a layer has one scale, by which its
int8 numbers are multiplied. States stay in bfloat16.

torch multiplies int8 weights row by row: for a few rows that is quicker than anything else, and a
row's result does not depend on the other rows. For many rows, such as those of a prompt, the
weights are converted to bfloat16, in which int8 numbers are exact, and multiplied as a matrix.

The operation of torch is private, and reads past the end of rows whose size or place in memory it
does not expect. So it is called for layers and states that fit it only.
"""

from __future__ import annotations

from typing import Any

import torch

from infer_align.errors import ConfigError

INT8 = "int8"
FIELD = "[engine] dtype"
# With more rows, converting the weights takes less time than the multiplication row by row.
FEW_ROWS = 32
# The operation reads blocks of 16 numbers on x86 and of up to 32 on ARM, and needs their alignment.
BLOCK = 32
ALIGNMENT = 64  # bytes
LARGEST = 127
# Rows of a large output layer that are converted at a time, so that little memory is needed.
CONVERTED_ROWS = 4096


class Int8Linear(torch.nn.Module):
    """A linear layer with int8 weights, one scale per output, and states in bfloat16.

    Attributes:
        in_features: size d of the states.
        out_features: number V of outputs.
        numbers: [V, d] int8.
        scale: [V] bfloat16, by which the numbers of an output are multiplied.
        bias: [V] bfloat16, or None.
    """

    numbers: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        weight = layer.weight.detach()
        starts = range(0, self.out_features, CONVERTED_ROWS)
        parts = [_quantize(weight[start : start + CONVERTED_ROWS]) for start in starts]
        self.register_buffer("numbers", torch.cat([numbers for numbers, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]))
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """Compute the weights: [V, d] bfloat16. Some models read them beside the layer."""
        return self.numbers.to(torch.bfloat16) * self.scale[:, None]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the outputs: [..., d] -> [..., V] bfloat16."""
        rows = states.reshape(-1, self.in_features).contiguous()
        if len(rows) > FEW_ROWS:
            outputs = (rows @ self.numbers.to(torch.bfloat16).t()).mul_(self.scale)
        else:
            outputs = torch._weight_int8pack_mm(_aligned(rows), self.numbers, self.scale)
        if self.bias is not None:
            outputs += self.bias
        return outputs.reshape(*states.shape[:-1], self.out_features)


def check_int8(device: torch.device) -> None:
    """Refuse int8 weights where they cannot be multiplied.

    Raises:
        ConfigError: the device is not a CPU, or this torch lacks the operation.
    """
    if device.type != "cpu":
        raise ConfigError(
            f'{FIELD}: "{INT8}" needs a CPU, and the model is on {str(device)!r}. Set dtype to '
            '"bfloat16", or [engine] device to "cpu".'
        )
    if not hasattr(torch, "_weight_int8pack_mm"):
        raise ConfigError(
            f'{FIELD}: "{INT8}" needs an operation that torch {torch.__version__} lacks. Set dtype '
            'to "float32" or "bfloat16", or install another version of torch.'
        )


def quantize_linear_layers(lm: Any) -> tuple[int, int]:
    """Replace the linear layers of a model in bfloat16 by layers with int8 weights.

    Layers of subclasses, such as quantized ones, stay as they are. So do layers that the model
    keeps in float32, and those whose input has a size that the operation of torch does not read.

    Returns:
        The number of linear layers with int8 weights, and of all linear layers.

    Raises:
        ConfigError: the model cannot run with such layers.
    """
    layers: dict[torch.nn.Linear, torch.nn.Module] = {}
    # A layer that a model uses in several places stays one layer.
    for name, layer in list(lm.named_modules(remove_duplicate=False)):
        if type(layer) is torch.nn.Linear:
            if layer not in layers:
                layers[layer] = Int8Linear(layer) if _fits(layer) else layer
            lm.set_submodule(name, layers[layer])
    _check_runs(lm)
    replaced = [layer for layer in layers.values() if isinstance(layer, Int8Linear)]
    return len(replaced), len(layers)


def _fits(layer: torch.nn.Linear) -> bool:
    return layer.weight.dtype == torch.bfloat16 and layer.in_features % BLOCK == 0


@torch.inference_mode()
def _check_runs(lm: Any) -> None:
    try:
        lm(input_ids=torch.zeros((1, 2), dtype=torch.long), use_cache=False)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{FIELD}: a {type(lm).__name__} does not run with "{INT8}" weights: {error}. Set '
            'dtype to "bfloat16".'
        ) from error


def _quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest int8 numbers and their scales: [n, d] -> [n, d], [n] bfloat16."""
    exact = weight.float()
    scale = (exact.abs().amax(dim=1) / LARGEST).to(torch.bfloat16)
    # Divide by the scale as it is stored. That of an output without weights is 0.
    divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (exact / divisor[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows in a place that the operation can read; a view may begin anywhere."""
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows
