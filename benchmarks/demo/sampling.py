"""Fast batched sampling from the demo's language model, for training reward models on it and for measuring."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.language import render

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    n: int,
    *,
    seed: int,
    system: str | None = None,
    greedy: bool = False,
    max_tokens: int = 96,
    batch: int = 1024,
) -> list[list[tuple[str, int]]]:
    """``n`` replies to each question, after ``system``, as (text, tokens including the end of turn), at temperature 1.

    Questions of one length share a batch, so nothing is padded; a finished reply leaves its batch at once.
    """
    generator = torch.Generator().manual_seed(seed)
    before = [{"role": "system", "content": system}] if system else []
    asked = [
        render([*before, {"role": "user", "content": question}]) + "<|assistant|>"
        for question in questions
    ]
    prompts = tokenizer(asked).input_ids
    replies: list[list[tuple[str, int]]] = [[] for _ in questions]
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(members), max(1, batch // n)):
            chunk = members[start : start + max(1, batch // n)]
            ids = torch.tensor([prompts[index] for index in chunk]).repeat_interleave(n, 0)
            tokens = _continue(model, ids, max_tokens, None if greedy else generator)
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for row, (text, spent) in enumerate(zip(texts, tokens, strict=True)):
                replies[chunk[row // n]].append((text, len(spent)))
    return replies


def _continue(
    model: LlamaForCausalLM, ids: Tensor, max_tokens: int, generator: torch.Generator | None
) -> list[list[int]]:
    """Continue every row of ``ids`` [B, T] until it ends or is ``max_tokens`` long; greedy without a generator."""
    written: list[list[int]] = [[] for _ in ids]
    active = torch.arange(len(ids))
    cache = DynamicCache()
    for _ in range(max_tokens):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if generator is None:
            token = logits.argmax(-1)
        else:
            cumulative = logits.softmax(-1).cumsum(
                -1
            )  # one uniform per row: far cheaper than multinomial
            point = torch.rand(len(active), 1, generator=generator) * cumulative[:, -1:]
            token = (
                torch.searchsorted(cumulative, point).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
            )
        for row, value in zip(active.tolist(), token.tolist(), strict=True):
            written[row].append(value)
        keep = (token != model.config.eos_token_id).nonzero().squeeze(-1)
        if not len(keep):
            break
        if len(keep) < len(active):
            active, token = active[keep], token[keep]
            cache.batch_select_indices(keep)
        ids = token[:, None]
    return written
