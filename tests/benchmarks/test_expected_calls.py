"""The calls of torch in the expected time of lookahead are those of a value LM's forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, LlamaConfig

from benchmarks.gpu import expected
from infer_align.decoding.cache import RowCache

SIBLINGS = 5
PREFIX = 10
# Another version of transformers may take a few calls more or fewer.
TOLERANCE = 0.15
# These give another view of the same memory: they start nothing on a GPU.
VIEWS = {"expand", "reshape", "select", "slice", "transpose", "unsqueeze", "view"}


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


def count(layers: int) -> tuple[int, int]:
    """Return the calls of one step of siblings, and those that keep the chosen one."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    lm = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    cache = RowCache()

    def read(tokens: int, positions: torch.Tensor, mask: torch.Tensor | None) -> None:
        ids = torch.ones((2, tokens), dtype=torch.long)
        lm(input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask)

    with torch.inference_mode():
        read(PREFIX, torch.arange(PREFIX).expand(2, -1), None)
        mask = torch.ones((2, 1, SIBLINGS, PREFIX + SIBLINGS), dtype=torch.bool)
        with CountedCalls() as step:
            read(SIBLINGS, torch.full((2, SIBLINGS), PREFIX), mask)
        with CountedCalls() as keeping:
            cache.keep_one(PREFIX, torch.tensor([0, 1]))
    return work(step.calls), work(keeping.calls)


def work(calls: Mapping[str, int]) -> int:
    return sum(number for name, number in calls.items() if name not in VIEWS)


def test_the_calls_of_a_step_of_a_value_lm() -> None:
    (two, keeping_two), (three, keeping_three) = count(2), count(3)
    layer = three - two
    assert layer == pytest.approx(expected.LAYER_CALLS, rel=TOLERANCE)
    assert keeping_three - keeping_two == expected.KEEPING_CALLS
    # Those before and after the layers; the choice of a sibling has some of its own.
    assert 0 < two - 2 * layer <= expected.CALLS_AROUND_LAYERS
