"""The frozen language model of the demo, and its training on the world's documents."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["LanguageConfig", "Messages", "render", "reply_losses", "train"]

Messages = list[dict[str, str]]
_IGNORED = -100
_PARTS = 4  # of one batch, each padded to its own length
_TYPICAL_REPLY = 20  # tokens; sets only the scale of the gradient


@dataclass(frozen=True, slots=True)
class LanguageConfig:
    """Shape and schedule. head_dim is 32 because inference engines support it on CPU."""

    hidden_size: int = 64
    intermediate_size: int = 192
    layers: int = 2
    heads: int = 2
    head_dim: int = 32
    max_length: int = 1024
    steps: int = 2400
    batch: int = 64
    learning_rate: float = 6e-3
    warmup: int = 50
    seed: int = 0


def train(
    config: LanguageConfig,
    tokenizer: PreTrainedTokenizerFast,
    document: Callable[[random.Random], Messages],
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> LlamaForCausalLM:
    """Teach a new model the replies in ``document``s (prompts are context only). AdamW, cosine to zero.

    ``progress`` is told the step and the loss of its batch, nats per token, every now and then.
    """
    torch.manual_seed(config.seed)
    model = _untrained(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, config))
    model.train()
    for step, parts in enumerate(_batches(config, tokenizer, document)):
        optimizer.zero_grad()
        loss = 0.0
        for ids, labels in parts:
            # A sum over a fixed size: a mean would weigh the words of short replies, which share parts, more.
            part = _losses(model, ids, labels).sum() / (config.batch * _TYPICAL_REPLY)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == config.steps - 1:
            progress(step, loss)
    return model.eval()


def _untrained(config: LanguageConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        **ends,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends
    )
    return model


def _cosine(step: int, config: LanguageConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))


def render(messages: Messages) -> str:
    """What the chat template writes for plain-text messages, without the cost of running it on every document."""
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def _batches(
    config: LanguageConfig,
    tokenizer: PreTrainedTokenizerFast,
    document: Callable[[random.Random], Messages],
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """``steps`` batches of fresh documents, each in parts of similar length, so that little is padding.

    32 batches at a time are sorted by length and cut; a batch takes one part of each stretch of lengths, so that every
    batch holds every kind of document.
    """
    rng = random.Random(config.seed)
    size = config.batch // _PARTS
    for start in range(0, config.steps, 32):
        rows = encode(tokenizer, [document(rng) for _ in range(32 * config.batch)])
        rows.sort(key=lambda row: len(row[0]))
        cut = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        stretches = [rng.sample(cut[i : i + 32], 32) for i in range(0, len(cut), 32)]
        yield from [list(parts) for parts in zip(*stretches, strict=True)][: config.steps - start]


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Messages]
) -> list[tuple[Tensor, Tensor]]:
    """Token ids, and labels that are the ids inside assistant turns (their end included) and ignored elsewhere."""
    assistant, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    rows = []
    for ids in tokenizer(
        [render(messages) for messages in documents], add_special_tokens=False
    ).input_ids:
        labels, inside = [], False
        for token in ids:
            labels.append(token if inside else _IGNORED)
            inside = token == assistant or (inside and token != end)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    return rows


def collate(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels [B, T]. Causal attention never looks right, so no mask is needed."""
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    return ids, pad_sequence(
        [labels for _, labels in rows], batch_first=True, padding_value=_IGNORED
    )


def _losses(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every labelled token, flat, in nats; the others never reach the output matrix."""
    wanted = labels[:, 1:] != _IGNORED
    hidden = model.model(ids).last_hidden_state[:, :-1][wanted]
    return cross_entropy(model.lm_head(hidden), labels[:, 1:][wanted], reduction="none")


@torch.no_grad()
def reply_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Messages]
) -> list[float]:
    """Mean loss of each document's replies, nats per token."""
    return [_losses(model, *collate([row])).mean().item() for row in encode(tokenizer, documents)]
