"""A large output layer gives the logits of the linear layer, in either order of the factors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from infer_align.engines.transformers.output_layer import LARGE_VOCABULARY, quicken_output_layer


def model(layer):
    return SimpleNamespace(get_output_embeddings=lambda: layer)


def layer(outputs=LARGE_VOCABULARY, *, bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(24, outputs, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (8, 1, 24), (3, 5, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_are_those_of_the_linear_layer(shape, bias):
    one = layer(bias=bias)
    states = torch.randn(shape)
    expected = one(states)
    quicken_output_layer(model(one))
    logits = one(states)
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, expected)
    assert one(states).equal(logits)


def test_hooks_still_see_the_states():
    one = layer()
    quicken_output_layer(model(one))
    inputs = []
    one.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    states = torch.randn(2, 1, 24)
    one(states)
    assert inputs[0] is states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [8, LARGE_VOCABULARY])
def test_the_last_states_of_a_prompt_are_read_in_one_multiplication(dtype, outputs):
    one = layer(outputs, dtype=dtype)
    quicken_output_layer(model(one))
    inputs = []
    one.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    states = torch.randn(4, 9, 24, dtype=dtype)
    last = states[:, -1:]
    assert not last.is_contiguous()
    logits = one(last)
    assert inputs[0].is_contiguous()
    assert inputs[0].equal(last)
    torch.testing.assert_close(logits, one(last.contiguous()), rtol=0, atol=0)


class Quantized(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    "other",
    [
        None,
        layer(LARGE_VOCABULARY - 1),
        layer(dtype=torch.bfloat16),
        Quantized(24, LARGE_VOCABULARY),
    ],
)
def test_every_other_layer_multiplies_in_its_own_way(other):
    quicken_output_layer(model(other))
    assert "forward" not in vars(other or object)
