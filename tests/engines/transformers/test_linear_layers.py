"""Quickened layers give the results of linear layers, for any number of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infer_align.engines.transformers.linear_layers import (
    FEW_ROWS,
    LARGE_VOCABULARY,
    SMALLEST_LAYER,
    quicken_linear_layers,
)

D = 64
# Outputs of the smallest layer that is quickened.
MANY = SMALLEST_LAYER // D


class Model(torch.nn.Module):
    """A model with an inner layer and an output layer, or none."""

    def __init__(self, inner: torch.nn.Module, output: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.output = output

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """Return the output layer."""
        return self.output


def linear(
    outputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(D, outputs, bias=bias, dtype=dtype).requires_grad_(requires_grad=False)


SHAPES = [
    (D,),
    (0, 1, D),
    (1, D),
    (1, 1, D),
    (2, 1, D),
    (FEW_ROWS, D),
    (FEW_ROWS + 1, 1, D),
    (3, 5, D),
    (7, 9, D),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [5, LARGE_VOCABULARY])
def test_the_results_are_those_of_the_linear_layers(
    shape: tuple[int, ...], bias: bool, outputs: int
) -> None:
    layers = (linear(MANY, bias=bias), linear(outputs, bias=bias))
    states = torch.randn(shape)
    expected = [layer(states) for layer in layers]
    quicken_linear_layers(Model(*layers))
    for layer, result in zip(layers, expected, strict=True):
        output = layer(states)
        assert output.is_contiguous()
        torch.testing.assert_close(output, result)
        # Repeated calls give the same bits.
        assert layer(states).equal(output)


def inputs_of(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Return a list to which the layer appends its states in every call."""
    states: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    return states


def test_hooks_still_see_the_states() -> None:
    layers = (linear(MANY), linear(LARGE_VOCABULARY))
    quicken_linear_layers(Model(*layers))
    for layer in layers:
        inputs = inputs_of(layer)
        states = torch.randn(2, 1, D)
        layer(states)
        assert inputs[0] is states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [8, LARGE_VOCABULARY])
def test_the_last_states_of_a_prompt_are_read_in_one_multiplication(
    dtype: torch.dtype, outputs: int
) -> None:
    output_layer = linear(outputs, dtype=dtype)
    quicken_linear_layers(Model(linear(5), output_layer))
    inputs = inputs_of(output_layer)
    last = torch.randn(4, 9, D, dtype=dtype)[:, -1:]
    assert not last.is_contiguous()
    logits = output_layer(last)
    assert inputs[0].is_contiguous()
    assert inputs[0].equal(last)
    torch.testing.assert_close(logits, output_layer(last.contiguous()), rtol=0, atol=0)


class Quantized(torch.nn.Linear):
    """A layer that multiplies in its own way."""


@pytest.mark.parametrize(
    "other",
    [
        linear(MANY, dtype=torch.bfloat16),
        linear(MANY - 1),
        Quantized(D, MANY),
        torch.nn.Embedding(MANY, D),
    ],
)
def test_every_other_layer_multiplies_in_its_own_way(other: Any) -> None:
    quicken_linear_layers(Model(other, other))
    assert "forward" not in vars(other)


def test_a_model_without_an_output_layer_is_quickened() -> None:
    model = Model(linear(MANY))
    quicken_linear_layers(model)
    assert "forward" in vars(model.inner)
