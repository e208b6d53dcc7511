"""A small random value LM for tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaModel

from infer_align.values.lookahead import ValueLM

VOCABULARY = 30
HEADS = 2


class TinyValueLM(ValueLM):
    """A random value LM without files.

    Args:
        device: where it computes.
        has_pass: True to read siblings as on a GPU, with the kernel `sibling_attention`.
        dtype: of the weights.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        has_pass: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        self.lm = LlamaModel(config).eval().to(device, dtype)
        self.heads = torch.randn((16, HEADS), device=device)
        self._weight = self.heads.T
        self._bias = torch.zeros(HEADS, device=device)
        self.cell_bytes, self.cell_shape = self._measure_cell("tiny")
        self.sibling_pass = None
        if has_pass:
            self.use_sibling_pass("tiny")
            assert self.sibling_pass is not None

    def value(self, ids: list[int]) -> torch.Tensor:
        """Return the values after a complete text. [H]."""
        states = self.lm(input_ids=torch.tensor([ids], device=self.lm.device)).last_hidden_state
        values: torch.Tensor = states[0, -1] @ self.heads
        return values
