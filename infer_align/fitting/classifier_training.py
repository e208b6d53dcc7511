"""Train one classifier on preference pairs, epoch after epoch, and go on after an interruption.

The loss is that of Bradley and Terry: -log sigmoid(score of the chosen - score of the rejected).
After each epoch the member is measured on pairs that it does not train on. The best epoch is kept,
and training stops when `patience` epochs in a row were no better.

A checkpoint after each epoch holds the weights, the optimizer's state and the best weights. The
order of the pairs and the dropout depend on the seed, the member and the epoch alone, so a run that
was interrupted ends with the same weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import logsigmoid

from infer_align.errors import ConfigError
from infer_align.types import Array

# An epoch is better than the best one so far if its loss is smaller by this.
MIN_GAIN = 1e-4
MAX_NORM = 1.0
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The token ids of the two answers of one pair, with their conversation."""

    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The settings of the training of each member.

    Attributes:
        epochs: the largest number of passes over the pairs.
        batch_size: pairs per step.
        learning_rate: of AdamW; it falls linearly to 0.
        patience: epochs without a gain after which training stops.
        seed: of all members.
    """

    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 2e-5
    patience: int = 2
    seed: int = 0


@dataclass(slots=True)
class History:
    """The state of a training, as numbers.

    Attributes:
        losses: the validation loss after each epoch.
        best: number of the best epoch, from 1; 0 before the first.
    """

    losses: list[float] = field(default_factory=list)
    best: int = 0

    def add(self, loss: float) -> bool:
        """Add the loss of an epoch; return True if it is the best so far."""
        is_best = not self.best or loss < self.losses[self.best - 1] - MIN_GAIN
        self.losses.append(loss)
        if is_best:
            self.best = len(self.losses)
        return is_best

    def is_complete(self, settings: TrainingSettings) -> bool:
        """Return True if no further epoch follows."""
        epochs = len(self.losses)
        return epochs >= settings.epochs or epochs - self.best >= settings.patience


@dataclass(slots=True)
class MemberTraining:
    """The training of one member.

    Attributes:
        model: the classifier, with one label. Afterwards it has the weights of the best epoch.
        settings: of the training.
        number: of the member, from 0.
        checkpoint: file of the checkpoint.
        digest: of the pairs and settings; a checkpoint with another one is not used.
    """

    model: Any
    settings: TrainingSettings
    number: int
    checkpoint: Path
    digest: str
    history: History = field(default_factory=History)
    _best: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(
        self,
        pairs: Sequence[EncodedPair],
        validation: Sequence[EncodedPair],
        progress: Callable[[int, int], None],
    ) -> History:
        """Train to the end; epochs that the checkpoint holds are not repeated.

        Args:
            pairs: to train on. A pair that a bootstrap drew twice occurs twice.
            validation: pairs that decide which epoch is the best.
            progress: is called with the epoch, from 1, and the number of pairs done in it.

        Raises:
            ConfigError: the checkpoint cannot be written.
        """
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.settings.learning_rate, weight_decay=WEIGHT_DECAY
        )
        self._read_checkpoint(optimizer)
        while not self.history.is_complete(self.settings):
            self._train_epoch(pairs, optimizer, progress)
            margins = margins_of(self.model, validation, self.settings.batch_size)
            loss = float(np.mean(np.logaddexp(0.0, -margins)))
            if self.history.add(loss):
                self._best = _copied(self.model)
            self._write_checkpoint(optimizer)
        self.model.load_state_dict(self._best)
        return self.history

    def _train_epoch(
        self,
        pairs: Sequence[EncodedPair],
        optimizer: torch.optim.Optimizer,
        progress: Callable[[int, int], None],
    ) -> None:
        epoch = len(self.history.losses)
        seed = [self.settings.seed, self.number, epoch]
        order = np.random.default_rng(seed).permutation(len(pairs))
        torch.manual_seed(int(np.random.default_rng([*seed, 1]).integers(2**31)))
        size = self.settings.batch_size
        steps = -(-len(pairs) // size)
        self.model.train()
        for step in range(steps):
            done = epoch * steps + step
            for group in optimizer.param_groups:
                share = 1 - done / (self.settings.epochs * steps)
                group["lr"] = self.settings.learning_rate * share
            batch = [pairs[i] for i in order[step * size : (step + 1) * size].tolist()]
            loss = -logsigmoid(_margins(self.model, batch)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            optimizer.step()
            progress(epoch + 1, min(len(pairs), (step + 1) * size))

    def _write_checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in _copied(self.model).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for number, state in optimizer.state_dict()["state"].items():
            for name, tensor in state.items():
                tensors[f"optimizer.{number}.{name}"] = tensor.detach().cpu().clone().contiguous()
        facts = json.dumps({**asdict(self.history), "digest": self.digest})
        temporary = self.checkpoint.with_suffix(f".{os.getpid()}.part")
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, {"training": facts})
            temporary.rename(self.checkpoint)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"--out: {str(self.checkpoint.parent)!r} cannot be written: {error}"
            ) from error

    def _read_checkpoint(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue from the checkpoint, if there is one of the same pairs and settings."""
        try:
            with safe_open(self.checkpoint, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("training", "{}"))
                if facts.pop("digest", None) != self.digest:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            return
        self.history = History(**facts)
        self._best = _part(tensors, "best.")
        self.model.load_state_dict(_part(tensors, "model."))
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


@torch.inference_mode()
def margins_of(model: Any, pairs: Sequence[EncodedPair], batch_size: int) -> Array:
    """Return the score of the chosen minus that of the rejected answer of each pair: [C]."""
    model.eval()
    margins: list[float] = []
    for start in range(0, len(pairs), batch_size):
        margins += _margins(model, pairs[start : start + batch_size]).tolist()
    return np.array(margins)


def _margins(model: Any, pairs: Sequence[EncodedPair]) -> torch.Tensor:
    """Return the margins of one batch of pairs: [C]. Both answers are read in one forward pass."""
    chosen = [pair.chosen for pair in pairs]
    rejected = [pair.rejected for pair in pairs]
    rows = chosen + rejected
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), int(model.config.get_text_config().pad_token_id))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    scores: torch.Tensor = output.logits[:, 0].float()
    return scores[: len(pairs)] - scores[len(pairs) :]


def _copied(model: Any) -> dict[str, torch.Tensor]:
    copies: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        copies[name] = tensor.detach().cpu().clone().contiguous()
    return copies


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    part: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            part[name.removeprefix(prefix)] = tensor
    return part
