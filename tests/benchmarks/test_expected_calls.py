"""The calls of torch in the expected time of lookahead are those of a value LM's step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, LlamaConfig

from benchmarks.gpu import value_lm_work
from infer_align.decoding.siblings import ValueCache, read_tokens
from infer_align.values._sibling_reading import OwnColumns, SiblingReading, reading_siblings
from infer_align.values.lookahead import ValueLM
from infer_align_kernels import PrefixTable, sibling_attention_at

SIBLINGS = 5
TEXTS = ([1, 2, 3, 4, 5], [6, 7, 8])
# Another version of transformers may take a few calls more or fewer.
TOLERANCE = 0.15
# These give another view of the same memory: they start nothing on a GPU.
VIEWS = {
    "alias",
    "expand",
    "permute",
    "reshape",
    "select",
    "slice",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """Run each test in inference mode, as the engines do."""
    with torch.inference_mode():
        yield


class CountedCalls(TorchDispatchMode):
    """Counts the calls of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))


class SmallValueLM(ValueLM):
    """A random value LM of a few layers, without files."""

    def __init__(self, layers: int) -> None:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
        self.lm = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
        self._weight = torch.ones(1, 64)
        self._bias = torch.zeros(1)
        self.sibling_pass = None
        self.cell_bytes, self.cell_shape = self._measure_cell("small")
        self.use_sibling_pass("small")


def work(counted: CountedCalls) -> int:
    return sum(number for name, number in counted.calls.items() if name not in VIEWS)


def prefilled(lm: ValueLM) -> ValueCache:
    first, second = (read_tokens(lm, text) for text in TEXTS)
    cache = ValueCache(lm, [0], [len(TEXTS[0])], first)
    return cache.join(ValueCache(lm, [1], [len(TEXTS[1])], second))


def count_step(layers: int) -> tuple[int, int]:
    """Return the calls of a step that values siblings, and of one that keeps the chosen ones."""
    cache = prefilled(SmallValueLM(layers))
    ids = torch.arange(2 * SIBLINGS).view(2, SIBLINGS)
    for _ in range(2):
        # The first round makes buffers.
        with CountedCalls() as step:
            cache.siblings(ids)
        with CountedCalls() as keeping:
            cache.choose(ids[:, 1])
    return work(step), work(keeping)


def count_pass(layers: int) -> tuple[int, int]:
    """Return the calls of the pass that a graph holds, and those of the same pass on this CPU.

    In the first, sibling attention is one call in each layer: a GPU has a kernel for it.
    """
    lm = SmallValueLM(layers)
    cache = prefilled(lm).cache
    table = PrefixTable(layers, 16, torch.bfloat16, torch.device("cpu"))
    lengths = torch.tensor([len(text) for text in TEXTS])
    own = OwnColumns(torch.zeros((layers, 2, 2, 2, SIBLINGS, 16), dtype=torch.bfloat16))
    ids = torch.ones((2, SIBLINGS), dtype=torch.long)
    positions = lengths[:, None].expand(-1, SIBLINGS)
    mask = torch.ones((2, 1, 1, 1), dtype=torch.bool)
    query = torch.zeros((2, 4, SIBLINGS, 16), dtype=torch.bfloat16)
    keys, values = own.columns[0]
    result = torch.zeros((2, SIBLINGS, 1))
    with table.pointing_to(*zip(*((each.keys, each.values) for each in cache.layers), strict=True)):
        reading = SiblingReading(own, table, lengths, 1024)
        with reading_siblings(reading), CountedCalls() as forward:
            result.copy_(lm.forward(ids, own, positions, mask))
        with CountedCalls() as attention:
            sibling_attention_at(query, table, 0, keys, values, lengths, 1024)
    return work(forward) - layers * (work(attention) - 1), work(forward)


def test_the_calls_of_a_pass() -> None:
    (two, _), (three, _) = count_pass(2), count_pass(3)
    layer = three - two
    assert layer == pytest.approx(value_lm_work.LAYER_CALLS, rel=TOLERANCE)
    assert 0 < two - 2 * layer <= value_lm_work.CALLS_AROUND_LAYERS


def test_the_calls_around_a_pass() -> None:
    (step, keeping_two), (_, keeping_three) = count_step(2), count_step(3)
    in_layers = keeping_three - keeping_two
    assert in_layers == value_lm_work.KEEPING_CALLS
    around = step - count_pass(2)[1] + keeping_two - 2 * in_layers
    # The other calls are made by the engine.
    assert 10 < around <= value_lm_work.CALLS_AROUND_PASS
