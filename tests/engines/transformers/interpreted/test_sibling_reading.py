"""Test the demo's lookahead value with the kernel `sibling_attention`, interpreted.

The same values with masked attention are the reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infer_align import demo
from infer_align.decoding.cache import RowCache
from infer_align.decoding.siblings import ValueCache
from infer_align.values import FrozenModel, tokenizer_digest
from infer_align.values._sibling_reading import NAME
from infer_align.values.lookahead import Lookahead, ValueLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lm() -> ValueLM:
    """Return the value LM of the embedded demo."""
    path = demo.path(demo.LM)
    config = AutoModelForCausalLM.from_pretrained(path).config
    digest = tokenizer_digest(AutoTokenizer.from_pretrained(path).get_vocab())
    frozen = FrozenModel("demo", config.vocab_size, config.hidden_size, digest, "cpu")
    value = Lookahead("demo/value-lm", "helpful").load()
    value.start(frozen, {})
    assert value.lm is not None
    return value.lm


def prefilled(lm: ValueLM, prompts: list[list[int]]) -> ValueCache:
    cache = ValueCache(lm, [], [], RowCache())
    for row, ids in enumerate(prompts):
        row_cache = RowCache()
        lm.forward(torch.tensor([ids]), row_cache, torch.arange(len(ids))[None], None)
        cache = cache.join(ValueCache(lm, [row], [len(ids)], row_cache))
    return cache


def steps(lm: ValueLM) -> list[torch.Tensor]:
    """Value candidates of two rows of different length for three steps, with a token of each."""
    generator = torch.Generator().manual_seed(0)
    cache = prefilled(lm, [[5, 9, 11, 3, 8], [7, 2]])
    values = []
    for _ in range(3):
        candidates = torch.randint(5, 60, (2, 4), generator=generator)
        values.append(cache.siblings(candidates))
        # The third candidate of one row, and a token outside the candidates of the other.
        cache.choose(torch.stack([candidates[0, 2], torch.tensor(61)]))
    return values


@torch.inference_mode()
def test_the_kernel_gives_the_values_of_masked_attention(lm: ValueLM) -> None:
    sibling_pass = lm.sibling_pass
    assert sibling_pass is not None
    assert lm.lm.config._attn_implementation == NAME
    by_kernel = steps(lm)
    lm.sibling_pass = None
    try:
        by_mask = steps(lm)
    finally:
        lm.sibling_pass = sibling_pass
    expected: Any = torch.stack(by_mask)
    torch.testing.assert_close(torch.stack(by_kernel), expected, atol=1e-5, rtol=1e-5)
