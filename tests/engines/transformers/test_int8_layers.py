"""Int8 weights: the products of the quantized weights, and an engine that serves them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from infer_align.engines.transformers.int8_layers import (
    BLOCK,
    CONVERTED_ROWS,
    FEW_ROWS,
    Int8Linear,
    check_int8,
    quantize_linear_layers,
)
from infer_align.errors import ConfigError
from infer_align.steering import Steering
from infer_align.values import head
from infer_align.values.head import HeadValue

ROUNDING = 2.0**-8  # of bfloat16


def linear(inputs: int, outputs: int, *, bias: bool = False, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    return layer.requires_grad_(False)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def products(layer: Int8Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs in float64."""
    weights = layer.numbers.double() * layer.scale.double()[:, None]
    outputs = inputs.double() @ weights.T
    return outputs if layer.bias is None else outputs + layer.bias.double()


def assert_equal_products(layer: Int8Linear, inputs: torch.Tensor) -> None:
    outputs = layer(inputs)
    expected = products(layer, inputs)
    assert outputs.dtype == torch.bfloat16
    assert outputs.shape == expected.shape
    # The product, its scaling and the bias are each rounded.
    tolerance = 3 * ROUNDING * float(expected.abs().max())
    torch.testing.assert_close(outputs.double(), expected, atol=tolerance, rtol=0)


# --- The weights ---


def test_each_weight_is_the_nearest_of_127_steps_of_its_output():
    layer = linear(64, 9)
    layer.weight[3] = 0
    layer.weight[4] *= 1e4
    layer.weight[5] *= 1e-20
    quantized = Int8Linear(layer)
    scale = quantized.scale.double()[:, None]
    error = (quantized.numbers.double() * scale - layer.weight.double()).abs()
    # Where the scale is rounded down, the largest weights are cut.
    assert (error <= scale * (0.5 + 127 * ROUNDING)).all()
    assert quantized.numbers.abs().amax(dim=1).tolist()[:3] == [127, 127, 127]
    assert not quantized.numbers[3].any()
    assert quantized.scale[3] == 0


def test_a_large_layer_is_converted_in_parts():
    layer = linear(BLOCK, CONVERTED_ROWS + 3)
    quantized = Int8Linear(layer)
    assert quantized.numbers.shape == layer.weight.shape
    tail = linear(BLOCK, 3)
    tail.weight.copy_(layer.weight[-3:])
    assert Int8Linear(tail).numbers.equal(quantized.numbers[-3:])


def test_the_weights_can_be_read_beside_the_layer():
    layer = linear(64, 9)
    weight = Int8Linear(layer).weight
    assert weight.dtype == torch.bfloat16
    largest = layer.weight.abs().amax(dim=1, keepdim=True)
    assert ((weight - layer.weight).abs() <= largest / 50).all()


# --- The products ---


SHAPES = [(64,), (1, 64), (1, 1, 64), (8, 1, 64), (3, 5, 64), (2, 50, 64)]
SHAPES += [(FEW_ROWS, 64), (FEW_ROWS + 1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_outputs_are_products_of_the_quantized_weights(shape, bias):
    assert_equal_products(Int8Linear(linear(64, 41, bias=bias)), states(*shape))


def test_no_states_have_no_outputs():
    assert Int8Linear(linear(64, 41))(states(0, 64)).shape == (0, 41)


@pytest.mark.parametrize("inputs", [32, 96, 576])
@pytest.mark.parametrize("outputs", [1, 2, 3, 7, 24, 63, 100])
def test_any_number_of_outputs_is_computed(inputs, outputs):
    assert_equal_products(Int8Linear(linear(inputs, outputs)), states(5, inputs))


@pytest.mark.parametrize("first", [0, 1, 3, 16])
@pytest.mark.parametrize("rows", [1, 4, FEW_ROWS + 1])
def test_states_may_lie_anywhere_in_memory(first, rows):
    quantized = Int8Linear(linear(64, 10))
    shifted = states(rows * 64 + first)[first:].view(rows, 64)
    assert_equal_products(quantized, shifted)
    assert_equal_products(quantized, states(64, rows).T)
    assert_equal_products(quantized, states(rows, 4, 64)[:, -1:])
    assert_equal_products(quantized, states(rows, 80)[:, first : first + 64])


@pytest.mark.parametrize("rows", [2, 3, 8, 17, FEW_ROWS])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 41), (576, 192)])
def test_a_row_alone_equals_the_row_among_few_bit_by_bit(rows, inputs, outputs):
    quantized = Int8Linear(linear(inputs, outputs, bias=True))
    together = states(rows, inputs)
    alone = [quantized(row) for row in together]
    assert quantized(together).equal(torch.stack(alone))


# --- The layers of a model ---


class Block(torch.nn.Module):
    """Layers of every kind, in a model that reads token ids."""

    def __init__(self, inputs: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, inputs, dtype=torch.bfloat16)
        self.up = linear(inputs, 63)
        self.again = self.up
        self.odd = torch.nn.ModuleList([linear(63, 100), linear(100, 24), linear(24, inputs)])
        self.norm = torch.nn.LayerNorm(inputs, dtype=torch.bfloat16)
        self.exact = torch.nn.Linear(inputs, 8)
        self.output = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(
            inputs, 8, dtype=torch.bfloat16
        )

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        assert not use_cache
        hidden = self.embedding(input_ids)
        hidden = self.up(hidden) + self.again(hidden)
        for layer in self.odd:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        return self.output(hidden) + self.exact(hidden.float())


def test_only_plain_layers_that_fit_are_replaced():
    model = Block().eval()
    assert quantize_linear_layers(model) == (1, 5)
    assert isinstance(model.up, Int8Linear)
    assert model.again is model.up
    assert all(type(layer) is torch.nn.Linear for layer in (*model.odd, model.exact))
    assert type(model.output) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    assert "up.numbers" not in dict(model.named_parameters())


class Suspicious(Block):
    """A model that looks into its layers."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        if not isinstance(self.up, torch.nn.Linear):
            raise TypeError("up is no linear layer")
        return super().forward(input_ids, use_cache)


def test_a_model_that_does_not_run_with_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"dtype: a Suspicious .* up is no linear .*bfloat16"):
        quantize_linear_layers(Suspicious().eval())


def test_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r'dtype: "int8" needs a CPU, .*\'cuda:1\'.*device to'):
        check_int8(torch.device("cuda:1"))


def test_a_torch_without_the_operation_is_refused(monkeypatch):
    check_int8(torch.device("cpu"))
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    with pytest.raises(ConfigError, match=r'dtype: "int8" needs an operation that torch .* lacks'):
        check_int8(torch.device("cpu"))


# --- The engine ---


async def texts(engine: Any, draw: Any, finish: Any, n: int, **fields: Any) -> list[str]:
    candidates, _ = await finish(engine, draw("the cat", n, max_tokens=12, **fields))
    return [candidate.text for candidate in candidates]


@pytest.mark.anyio
async def test_a_seed_gives_its_text_again_and_among_other_candidates(serving, draw, finish):
    rows = []
    for _ in range(2):
        async with serving(dtype="int8") as engine:
            rows.append(await texts(engine, draw, finish, 8))
            alone = [(await texts(engine, draw, finish, 1, seed=i))[0] for i in range(8)]
            rows.append(alone)
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert len(set(rows[0])) > 1


@pytest.mark.anyio
@pytest.mark.parametrize("dtype", ["int4", "complex64", "Tensor", "", "int32", "float8_e5m2"])
async def test_an_unknown_type_is_refused(serving, dtype):
    with pytest.raises(ConfigError, match=rf"\[engine\] dtype: '{dtype}' is no type of weights"):
        async with serving(dtype=dtype):
            pass


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma2", "GPT2", "Bloom", "OPT"])
async def test_the_logits_are_near_those_of_bfloat16(
    architecture, options, serving, language_model
):
    folder = language_model(architecture, **options)
    ids = torch.arange(5, 45)[None]
    logits = {}
    for dtype in ("bfloat16", "int8"):
        async with serving(model=folder, dtype=dtype) as engine:
            logits[dtype] = engine.frozen.lm(input_ids=ids).logits.float()
            embedding = engine.frozen.lm.get_input_embeddings()
            assert type(embedding).__name__ != "Int8Linear"
    assert isinstance(engine.frozen.lm.get_output_embeddings(), Int8Linear)
    spread = logits["bfloat16"].std()
    assert 0 < (logits["int8"] - logits["bfloat16"]).std() < 0.05 * spread


@pytest.mark.anyio
async def test_a_value_of_the_float32_model_loads_and_one_of_another_model_does_not(
    serving, language_model, draw, finish, tmp_path
):
    values = []
    for seed in (0, 1):
        async with serving(model=language_model("Llama", seed=seed)) as engine:
            frozen = engine.frozen.frozen("tiny")
            token = engine.frozen.tokenizer("x")["input_ids"][-1]
        tensors = {
            "P": torch.zeros(4, frozen.hidden_size),
            "E": torch.zeros(frozen.vocabulary, 4),
            "b": torch.zeros(frozen.vocabulary),
        }
        tensors["b"][token] = 100
        file = tmp_path / f"{seed}.safetensors"
        head.write(file, tensors, frozen, {})
        values.append(HeadValue(str(file)))
    async with serving(dtype="int8", values={"x": values[0]}) as engine:
        assert engine.frozen.frozen("tiny").fingerprint.keys() == frozen.fingerprint.keys()
        steered = replace(
            draw("the cat", max_tokens=4), steering=Steering({"x": 9.0}, "all", "keep")
        )
        (candidate,), _ = await finish(engine, steered)
        assert candidate.text == "xxxx"
    with pytest.raises(ConfigError, match=r"layer 1 down, layer 1 query"):
        async with serving(dtype="int8", values={"x": values[1]}):
            pass
