"""A small reward model that transformers loads like any other: summed word embeddings and an MLP.

The words of the reply are *summed*, not averaged, and start as N(0, 1) noise: members of an ensemble that start apart
then disagree about words they have hardly seen, which is what an ensemble can notice. Averaged bags or a small
initialisation give members that err alike, and the ensemble buys nothing.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["BagConfig", "BagForSequenceClassification", "register"]


class BagConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes, and the token ids that delimit the two bags in a chat-template text."""

    model_type = "infer_align_bag"

    def __init__(
        self,
        *,
        vocab_size: int = 2048,
        embedding_size: int = 32,
        hidden_size: int = 64,
        user_token_id: int = 0,
        assistant_token_id: int = 0,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.user_token_id = user_token_id
        self.assistant_token_id = assistant_token_id
        super().__init__(**kwargs)


class BagForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Scores the last assistant turn, given the last user turn before it; all other turns are ignored."""

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
        """``input_ids`` [B, T], ``attention_mask`` [B, T] (1 = real token, either padding side) -> logits [B, labels]."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        in_prompt, in_reply = _turns(input_ids, real.bool(), self.config)
        bags = [
            (embedding(input_ids) * mask.unsqueeze(-1)).sum(1)
            for embedding, mask in ((self.prompt, in_prompt), (self.reply, in_reply))
        ]
        return SequenceClassifierOutput(logits=self.score(self.mlp(torch.cat(bags, -1))))


def _turns(ids: Tensor, real: Tensor, config: BagConfig) -> tuple[Tensor, Tensor]:
    """Masks [B, T] of the last assistant turn and of the user turn before it, role tokens excluded."""
    position = torch.arange(ids.shape[1], device=ids.device)
    assistant = _last(position, real & (ids == config.assistant_token_id))
    user = _last(position, real & (ids == config.user_token_id) & (position < assistant))
    return real & (position > user) & (position < assistant), real & (position > assistant)


def _last(position: Tensor, where: Tensor) -> Tensor:
    """Last position in each row at which ``where`` [B, T] holds, -1 if none; [B, 1]."""
    return torch.where(where, position, -1).amax(1, keepdim=True)


def register() -> None:
    """Make the Auto classes know the model; safe to call again."""
    AutoConfig.register(BagConfig.model_type, BagConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        BagConfig, BagForSequenceClassification, exist_ok=True
    )
