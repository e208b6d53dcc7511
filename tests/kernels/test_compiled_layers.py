"""Test the layers of heads as compiled by Numba against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from infer_align_kernels import compiled_layers

# Numba is installed with vLLM.
pytestmark = pytest.mark.vllm
layers = pytest.importorskip("infer_align_kernels.steer_logits.layers")

HIDDEN = 63


def linear_head(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"P": torch.randn(rank, HIDDEN, generator=generator)}


def deep_head(width: int, rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "W1": torch.randn(width, HIDDEN, generator=generator) / HIDDEN**0.5,
        "c1": torch.randn(width, generator=generator),
        "W2": torch.randn(rank, width, generator=generator),
    }


def by_torch(head: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    exact = {name: layer.double() for name, layer in head.items()}
    states = hidden.double()
    if "P" in exact:
        return functional.linear(states, exact["P"])
    activations = functional.gelu(functional.linear(states, exact["W1"], exact["c1"]))
    return functional.linear(activations, exact["W2"])


# The sizes are multiples of four and not, because four products are added at once.
@pytest.mark.parametrize(
    "heads",
    [
        [linear_head(1)],
        [linear_head(32)],
        [deep_head(5, 3)],
        [deep_head(64, 17)],
        [linear_head(7), deep_head(12, 8, seed=1), deep_head(3, 1, seed=2)],
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_features_are_those_of_torch(heads: list[dict[str, torch.Tensor]], rows: int) -> None:
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3))
    compiled = compiled_layers(heads)
    assert compiled is not None
    expected = torch.cat([by_torch(head, hidden) for head in heads], dim=1)
    torch.testing.assert_close(compiled.features(hidden).double(), expected, atol=1e-4, rtol=1e-5)


def test_strided_states_are_read() -> None:
    heads = [deep_head(12, 8)]
    states = torch.randn(4, 2 * HIDDEN, generator=torch.Generator().manual_seed(4))[:, ::2]
    compiled = compiled_layers(heads)
    assert compiled is not None
    assert torch.equal(compiled.features(states), compiled.features(states.contiguous()))


def test_a_row_alone_has_the_features_that_it_has_in_its_batch() -> None:
    heads = [linear_head(7), deep_head(33, 9)]
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(5))
    compiled = compiled_layers(heads)
    assert compiled is not None
    together = compiled.features(hidden)
    for s in range(len(hidden)):
        assert torch.equal(compiled.features(hidden[s : s + 1]), together[s : s + 1])


def test_gelu_is_exact_for_numbers_of_any_size() -> None:
    small = torch.linspace(-9, 9, 5001)
    large = torch.logspace(0, 30, 301)
    x = torch.cat([small, large, -large, torch.tensor([torch.inf])])
    compiled = np.array([layers.gelu(each) for each in x.numpy()])
    expected = functional.gelu(x.double()).numpy()
    assert compiled[-1] == expected[-1] == np.inf
    error = np.abs(compiled[:-1] - expected[:-1])
    assert (error <= 3e-7 * np.abs(x.numpy()[:-1])).all()
    assert (compiled[x.numpy() < -9] == 0).all()
    assert np.isnan(layers.gelu(np.float32("nan")))


def test_torch_computes_large_layers() -> None:
    small = deep_head(12, 8)
    assert compiled_layers([small]) is not None
    wide = layers.MAX_WEIGHTS // HIDDEN + 1
    assert compiled_layers([small, deep_head(wide, 8)]) is None
