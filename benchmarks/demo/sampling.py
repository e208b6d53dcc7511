"""Sample many short replies from the demo's language model, for training and measuring.

All rows of a batch share one seeded generator. This is faster than one generator per row, which a
server needs, and the shipped reward models were trained on these very samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo.language import render

# A reply and its number of tokens, the end of the turn included.
Reply = tuple[str, int]


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
) -> list[list[Reply]]:
    """Return n replies to each question, sampled at temperature 1.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        questions: the user's messages.
        n: number of replies to each question.
        seed: seed of all draws.
        system: a system message before each question.
        greedy: take the likeliest token instead of sampling.
        max_tokens: maximum length of a reply.
        batch: maximum number of rows in one forward.
    """
    generator = None if greedy else torch.Generator().manual_seed(seed)
    prompts = tokenizer(_prompts(questions, system)).input_ids
    replies: list[list[Reply]] = [[] for _ in questions]
    for chunk in _chunks_of_equal_length(prompts, max(1, batch // n)):
        ids = torch.tensor([prompts[index] for index in chunk]).repeat_interleave(n, 0)
        rows = _continue(model, ids, max_tokens, generator)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        for row, (text, tokens) in enumerate(zip(texts, rows, strict=True)):
            replies[chunk[row // n]].append((text, len(tokens)))
    return replies


def _prompts(questions: Sequence[str], system: str | None) -> list[str]:
    prefix = [{"role": "system", "content": system}] if system else []
    prompts: list[str] = []
    for question in questions:
        text = render([*prefix, {"role": "user", "content": question}])
        prompts.append(f"{text}<|assistant|>")
    return prompts


def _chunks_of_equal_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield indices of at most `size` prompts of equal length, so that no row needs padding."""
    for length in sorted({len(prompt) for prompt in prompts}):
        indices = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _continue(
    model: LlamaForCausalLM, ids: Tensor, max_tokens: int, generator: torch.Generator | None
) -> list[list[int]]:
    """Return the continuation of every row of ids [B, T], greedy if there is no generator.

    A row that has ended leaves the batch at once.
    """
    written: list[list[int]] = [[] for _ in ids]
    active = torch.arange(len(ids))
    cache = DynamicCache()
    for _ in range(max_tokens):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = _next_token(output.logits[:, -1], generator)
        for row, value in zip(active.tolist(), token.tolist(), strict=True):
            written[row].append(value)
        unfinished = (token != model.config.eos_token_id).nonzero().squeeze(-1)
        if not len(unfinished):
            break
        if len(unfinished) < len(active):
            active = active[unfinished]
            token = token[unfinished]
            cache.batch_select_indices(unfinished)
        ids = token[:, None]
    return written


def _next_token(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row of logits [B, V], or take the likeliest if there is no generator."""
    if generator is None:
        return logits.argmax(-1)
    # Inverse transform sampling needs one random number per row and is far cheaper than
    # multinomial.
    cumulative = logits.softmax(-1).cumsum(-1)
    point = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point).squeeze(-1)
    return token.clamp_(max=logits.shape[-1] - 1)
