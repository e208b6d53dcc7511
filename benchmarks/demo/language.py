"""The frozen language model of the demo, and its training on the world's documents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Messages = list[dict[str, str]]
Document = Callable[[random.Random], Messages]
# Token ids of one document, and labels: the ids to learn, or _IGNORED.
Row = tuple[Tensor, Tensor]

_IGNORED = -100
# A batch is computed in this number of parts, each padded to its own length.
_PARTS = 4
# Batches that are drawn at once and sorted by length.
_DRAWN_BATCHES = 32
# Typical length of a reply in tokens; it sets the scale of the gradient only.
_TYPICAL_REPLY = 20


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
    document: Document,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> LlamaForCausalLM:
    """Train a new model on the assistant turns of documents, with AdamW and a cosine schedule.

    Args:
        config: shape and schedule.
        tokenizer: the model's tokenizer.
        document: writes one document.
        progress: called with the step and the loss of its batch every 200 steps.
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
            # The sum is divided by a fixed size. A mean per part would give the tokens of short
            # replies more weight.
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
    special_tokens = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
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
        **special_tokens,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special_tokens
    )
    return model


def _cosine(step: int, config: LanguageConfig) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine to 0."""
    warmup = min(1.0, (step + 1) / config.warmup)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))


def render(messages: Messages) -> str:
    """Write plain-text messages as the chat template does, but faster."""
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def _batches(
    config: LanguageConfig, tokenizer: PreTrainedTokenizerFast, document: Document
) -> Iterator[list[Row]]:
    """Yield `steps` batches of new documents, each in parts of similar length with little padding.

    The documents of 32 batches are sorted by length and cut into parts. Each batch takes one part
    of every range of lengths, so that it holds every kind of document.
    """
    rng = random.Random(config.seed)
    size = config.batch // _PARTS
    for start in range(0, config.steps, _DRAWN_BATCHES):
        documents = [document(rng) for _ in range(_DRAWN_BATCHES * config.batch)]
        rows = encode(tokenizer, documents)
        rows.sort(key=lambda row: len(row[0]))
        parts = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        ranges: list[list[Row]] = []
        for i in range(0, len(parts), _DRAWN_BATCHES):
            ranges.append(rng.sample(parts[i : i + _DRAWN_BATCHES], _DRAWN_BATCHES))
        batches = [list(batch) for batch in zip(*ranges, strict=True)]
        yield from batches[: config.steps - start]


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Messages]) -> list[Row]:
    """Return token ids and labels.

    The labels are the ids inside assistant turns, with their end.
    """
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    end = tokenizer.eos_token_id
    texts = [render(messages) for messages in documents]
    rows: list[Row] = []
    for ids in tokenizer(texts, add_special_tokens=False).input_ids:
        labels: list[int] = []
        inside = False
        for token in ids:
            labels.append(token if inside else _IGNORED)
            inside = token == assistant or (inside and token != end)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    return rows


def collate(rows: Sequence[Row]) -> Row:
    """Return right-padded ids and labels [B, T].

    Causal attention needs no mask for padding on the right.
    """
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=_IGNORED)
    return ids, labels


def _losses(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of every labelled token, flat, in nats."""
    targets = labels[:, 1:]
    is_learned = targets != _IGNORED
    # Only states of labelled tokens are multiplied with the output matrix.
    hidden = model.model(ids).last_hidden_state[:, :-1][is_learned]
    return cross_entropy(model.lm_head(hidden), targets[is_learned], reduction="none")


@torch.no_grad()
def reply_losses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Messages]
) -> list[float]:
    """Return the mean loss of each document's replies, in nats per token."""
    return [_losses(model, *collate([row])).mean().item() for row in encode(tokenizer, documents)]
