"""A small reward model for transformers: summed word embeddings and an MLP.

The embeddings are summed, not averaged, and initialised as N(0, 1) noise. Members of an ensemble
then disagree about words that are rare in the training data, and an ensemble objective can notice
the disagreement. With averages or a small initialisation the members make the same errors, and the
ensemble gains nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class BagConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes, and the token ids that begin a user turn and an assistant turn."""

    model_type = "infer_align_bag"

    def __init__(
        self,
        *,
        vocab_size: int = 2048,
        embedding_size: int = 32,
        hidden_size: int = 64,
        user_token_id: int = 0,
        assistant_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.user_token_id = user_token_id
        self.assistant_token_id = assistant_token_id
        super().__init__(**kwargs)


class BagForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Scores the last assistant turn after the last user turn; other turns are ignored."""

    config_class = BagConfig
    base_model_prefix = "bag"

    def __init__(self, config: BagConfig) -> None:
        super().__init__(config)
        self.prompt = nn.Embedding(config.vocab_size, config.embedding_size)
        self.reply = nn.Embedding(config.vocab_size, config.embedding_size)
        self.mlp = nn.Sequential(
            nn.Linear(2 * config.embedding_size, config.hidden_size),
            nn.ReLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.ReLU(),
        )
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> SequenceClassifierOutput:
        """Return the logits [B, labels].

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 1 for a real token and 0 for padding, on either side.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        in_prompt, in_reply = _turns(input_ids, attention_mask.bool(), self.config)
        prompt = (self.prompt(input_ids) * in_prompt.unsqueeze(-1)).sum(1)
        reply = (self.reply(input_ids) * in_reply.unsqueeze(-1)).sum(1)
        logits = self.score(self.mlp(torch.cat([prompt, reply], -1)))
        return SequenceClassifierOutput(logits=logits)


def _turns(ids: Tensor, real: Tensor, config: BagConfig) -> tuple[Tensor, Tensor]:
    """Return masks [B, T] of the last user turn and of the assistant turn after it.

    The tokens that begin a turn are excluded.
    """
    position = torch.arange(ids.shape[1], device=ids.device)
    assistant = _last(position, real & (ids == config.assistant_token_id))
    user = _last(position, real & (ids == config.user_token_id) & (position < assistant))
    in_prompt = real & (position > user) & (position < assistant)
    in_reply = real & (position > assistant)
    return in_prompt, in_reply


def _last(position: Tensor, where: Tensor) -> Tensor:
    """Return the last position [B, 1] of each row at which `where` [B, T] is true, or -1."""
    return torch.where(where, position, -1).amax(1, keepdim=True)


def register() -> None:
    """Register the model with the Auto classes of transformers. It may be called again."""
    AutoConfig.register(BagConfig.model_type, BagConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        BagConfig, BagForSequenceClassification, exist_ok=True
    )
