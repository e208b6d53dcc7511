"""The base of reward model ensembles: their configuration, members and layout of scores.

A kind of reward model, such as `classifier` or `pooling`, derives its section from
`RewardModelSection` and its reward from `RewardModelEnsemble`. It adds how a model is loaded and
how a text is scored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from infer_align.errors import ConfigError, InvalidRequest, Unavailable
from infer_align.rewards import DESCRIPTION, TIMEOUT, Reward, RewardScores
from infer_align.rewards._conversation import check_text_only, turns
from infer_align.rewards._encoding import Encoder
from infer_align.rewards._labels import Labels, check_labels
from infer_align.rewards._scaling import SCALING, Scaling, check_scaling, scale_scores
from infer_align.types import Array, Candidate, Messages, ScoringUsage

# Stands for the answer when a conversation is checked before anything is drawn.
_ANSWER = Candidate(0, {"message": {"role": "assistant", "content": "yes"}})


@dataclass(frozen=True, slots=True)
class RewardModelSection:
    """The configuration fields of every ensemble of reward models."""

    model: str | None = field(
        default=None, metadata={"description": "Path or Hugging Face id of one reward model."}
    )
    models: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Paths or ids of several models. Each is a member of the ensemble."
        },
    )
    attributes: tuple[str, ...] = field(
        default=(),
        metadata={
            "description": "Names of the model's labels, if each label is an objective. Without "
            "names, each label is a member of the ensemble."
        },
    )
    label: str | None = field(
        default=None,
        metadata={
            "description": "Name of one label of the model, such as POSITIVE. The score is then "
            "its log-odds."
        },
    )
    members: bool = field(
        default=False,
        metadata={
            "description": "Average the labels as members of an ensemble, although they have names."
        },
    )
    scaling: dict[str, Scaling] = field(default_factory=dict, metadata=SCALING)
    description: str = field(default="", metadata=DESCRIPTION)
    max_length: int = field(
        default=4096,
        metadata={
            "ge": 8,
            "description": "Maximum number of tokens read. A longer text is truncated, and a note "
            "says so. A chat template's text loses its beginning; special tokens stay.",
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "description": "Chat template by which the model reads a conversation: the name of one "
            "of the tokenizer's, the path of a Jinja file, or the template itself. Default: the "
            "tokenizer's."
        },
    )
    add_special_tokens: bool = field(
        default=False,
        metadata={
            "description": "Put the tokenizer's special tokens, such as [CLS] and [SEP], around "
            "the text of the chat template."
        },
    )
    timeout_seconds: float = field(default=60.0, metadata=TIMEOUT)

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the configured models, in order."""
        return self.models or (self.model or "",)

    def check_models(self, kind: str) -> None:
        """Refuse a section that does not name its models, or contradicts itself.

        Raises:
            ConfigError: neither or both of `model` and `models` are set, or more than one of
                `attributes`, `label` and `members`, or `scaling` names an unknown attribute.
        """
        if bool(self.model) == bool(self.models):
            raise ConfigError(
                f"{kind}: set either model or models: model = 'path' for one reward model, "
                f"models = ['path', ...] for several."
            )
        meanings = [bool(self.attributes), self.label is not None, self.members]
        if sum(meanings) > 1:
            raise ConfigError(
                f"{kind}: attributes, label and members give the labels different meanings; "
                "set one of them."
            )
        check_scaling(kind, self.scaling, self.attributes)


class TextScore(NamedTuple):
    """The result of scoring one text with one model."""

    logits: Array  # [labels]; NaN if the text could not be read
    tokens: int  # number of tokens that the model read
    note: str | None  # why the logits are NaN, or that the text was truncated


class LoadedModel(Protocol):
    """A reward model that is ready to score."""

    @property
    def labels(self) -> Labels:
        """Return the labels of the model. It gives one logit for each."""

    @property
    def encoder(self) -> Encoder:
        """Return the encoder that turns conversations into the model's token ids."""


Model = TypeVar("Model", bound=LoadedModel)


class RewardModelEnsemble(Reward, Generic[Model]):
    """An ensemble of reward models that are loaded at start."""

    kind: str  # the `kind` of its configuration section, for error messages

    def __init__(self, config: RewardModelSection) -> None:
        self.config = config
        self.attributes = config.attributes
        self.timeout_seconds = config.timeout_seconds
        self._models: list[Model] = []
        self._closed = False

    @abstractmethod
    async def _load(self, path: str) -> Model:
        """Load one model.

        Raises:
            ConfigError: the model cannot be loaded.
        """

    async def _check(self, model: Model) -> None:
        """Refuse a loaded model whose scores would have no meaning here."""

    def check_conversation(self, where: str, messages: Messages) -> None:
        """Refuse a conversation that the chat template of a member cannot read.

        Raises:
            InvalidRequest: naming `where` and the template's reason.
        """
        check_text_only(where, messages)
        conversation = turns(messages, _ANSWER)
        readers = {model.encoder.template: model.encoder for model in self._models}
        for encoder in readers.values():
            try:
                encoder.text(conversation)
            except Exception as error:
                raise InvalidRequest(
                    f"{where}: the reward model's chat template refuses these messages: {error}; "
                    "change the messages, leave this reward out, or set chat_template in its "
                    "section.",
                    param=where,
                ) from error

    @abstractmethod
    async def _probe(self, model: Model) -> TextScore:
        """Score a short conversation with one model."""

    async def start(self) -> None:
        """Load the models one after the other.

        Raises:
            ConfigError: a model cannot be loaded or cannot score, or its labels do not fit the
                configuration.
        """
        for path in self.config.paths:
            model = await self._load(path)
            # Stored before the checks, so that `close` also frees a model that is refused.
            self._models.append(model)
            await self._check(model)
            self._check_labels(path, model)
            await self._check_probe(path, model)
            self._check_special_tokens(path, model)
        names = [Path(path).name for path in self.config.paths]
        labels = [len(model.labels.names) for model in self._models]
        one_score = bool(self.attributes) or self.config.label is not None
        self.members = tuple(names) if one_score else member_names(names, labels)
        members = ", ".join(self.members)
        self.cost = f"reads the conversation and each answer once with {len(names)} model(s)"
        self.description = self.config.description or f"reward model ensemble: {members}"

    def _check_labels(self, path: str, model: Model) -> None:
        """Refuse a model if the configuration does not say what its labels mean.

        Raises:
            ConfigError: see `check_labels`.
        """
        config = self.config
        try:
            warning = check_labels(
                path, model.labels, config.label, config.attributes, members=config.members
            )
        except ConfigError as error:
            raise ConfigError(f"{self.kind}: {error.message}") from None
        if warning:
            self.warnings = (*self.warnings, warning)

    async def _check_probe(self, path: str, model: Model) -> None:
        """Refuse a model that cannot score a short conversation of a user and an assistant.

        Raises:
            ConfigError: the chat template refuses it, for example, or the score is not a number.
        """
        score = await self._probe(model)
        if np.isfinite(score.logits).all():
            return
        reason = score.note or "its scores are not finite numbers"
        raise ConfigError(
            f"{self.kind}: {path!r} cannot score a test text: {reason}. "
            "If the chat template is the cause, set chat_template to one that takes a "
            "conversation of a user and an assistant."
        )

    def _check_special_tokens(self, path: str, model: Model) -> None:
        """Warn of a template that lacks the special tokens of its tokenizer."""
        missing = model.encoder.missing_special_tokens()
        if not missing:
            return
        warning = (
            f"{path!r}: its tokenizer adds {' '.join(missing)}, but its chat template does not "
            "write them, so the model reads the text without them. If it was trained with them, "
            "set add_special_tokens = true."
        )
        self.warnings = (*self.warnings, warning)

    def _check_open(self) -> None:
        """Raise Unavailable after `close`."""
        if self._closed:
            raise Unavailable("the reward was shut down")

    def _combine(self, rows: Sequence[Sequence[TextScore]]) -> RewardScores:
        """Combine the scores of N texts by every model into scaled scores [A, K, N]."""
        values = np.empty((max(1, len(self.attributes)), len(self.members), len(rows)))
        tokens = 0
        for index, row in enumerate(rows):
            values[:, :, index] = self._arrange([score.logits for score in row])
            tokens += sum(score.tokens for score in row)
        notes = tuple(_first_note(row) for row in rows)
        scaled = scale_scores(values, self.config.scaling, self.attributes)
        return RewardScores(scaled, ScoringUsage(tokens), notes)

    def _arrange(self, logits: Sequence[Array]) -> Array:
        """Turn one [labels] per model into [A, K].

        Labels are objectives, or members of the only objective. If one label is configured, its
        log-odds are the score.
        """
        if self.attributes:
            return np.stack(logits, axis=1)
        label = self.config.label
        if label is not None:
            pairs = zip(self._models, logits, strict=True)
            return np.array([[model.labels.log_odds(label, each) for model, each in pairs]])
        return np.concatenate(logits)[None]


def member_names(names: Sequence[str], labels: Sequence[int]) -> tuple[str, ...]:
    """Name the members of an ensemble in which a model with K labels is K members."""
    members: list[str] = []
    for name, count in zip(names, labels, strict=True):
        if count == 1:
            members.append(name)
        else:
            members += [f"{name}#{label}" for label in range(count)]
    return tuple(members)


def _first_note(scores: Sequence[TextScore]) -> str | None:
    for score in scores:
        if score.note:
            return score.note
    return None
