"""The sequence classifier that `fit reward --on classifier` begins with.

It is a model that is there already, with a new head of one label, or a small encoder of the BERT
family whose weights are random and whose tokens are learnt from the texts of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from infer_align.checkpoints.complete import check_complete
from infer_align.checkpoints.errors import LOAD_ERRORS
from infer_align.checkpoints.model_folder import model_folder
from infer_align.errors import ConfigError
from infer_align.messages import message_text
from infer_align.preferences import PreferencePair
from infer_align.rewards._encoding import Encoder, make_encoder
from infer_align.rewards._torch import position_count

# The tokens and the sizes of a classifier from scratch.
SPECIAL_TOKENS = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}
VOCABULARY = 4000
HIDDEN = 128
LAYERS = 2
HEADS = 4
# The turns of a conversation, each after its role.
TEMPLATE = (
    "{{ '[CLS]' }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}{{ '[SEP]' }}"
)


@dataclass(frozen=True, slots=True)
class ClassifierBase:
    """The model that every member begins with.

    Attributes:
        tokenizer: of transformers. It is saved with each member.
        encoder: reads conversations as the reward kind `classifier` will.
        new_model: makes a model whose new weights are random by torch's seed.
        add_special_tokens: True if the reward must add the tokenizer's special tokens, because the
            chat template leaves them out.
    """

    tokenizer: Any
    encoder: Encoder
    new_model: Callable[[], Any]
    add_special_tokens: bool


def load_base(
    model: str | None, pairs: Sequence[PreferencePair], max_length: int
) -> ClassifierBase:
    """Load a model, or make the tokenizer and the configuration of one from scratch.

    Args:
        model: a name that `model_folder` reads; None for a model from scratch.
        pairs: whose texts a new tokenizer learns.
        max_length: maximum number of tokens that the classifier reads.

    Raises:
        ConfigError: the model cannot be loaded as a sequence classifier.
    """
    if model is None:
        tokenizer = _new_tokenizer(pairs)
        new_model = _model_from_scratch(tokenizer, max_length)
    else:
        path = model_folder(model, "--base")
        tokenizer, new_model = _pretrained(path)
    example = new_model()
    limits = [max_length, position_count(example)]
    tokenizer.model_max_length = min(limit for limit in limits if limit)
    vocabulary = len(example.get_input_embeddings().weight)
    plain = make_encoder(tokenizer, None, limits, vocabulary, add_special_tokens=False)
    add_special_tokens = bool(plain.missing_special_tokens())
    encoder = make_encoder(
        tokenizer, None, limits, vocabulary, add_special_tokens=add_special_tokens
    )
    return ClassifierBase(tokenizer, encoder, new_model, add_special_tokens)


def _pretrained(path: str) -> tuple[Any, Callable[[], Any]]:
    """Return the tokenizer of a model, and a function that loads it with a head of one label.

    Raises:
        ConfigError: there is no such model, or it is no sequence classifier.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except LOAD_ERRORS as error:
        raise ConfigError(f"--base: {path!r} has no tokenizer that loads: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def new_model() -> Any:
        try:
            with _quiet_transformers():
                made, loading = AutoModelForSequenceClassification.from_pretrained(
                    path,
                    num_labels=1,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except LOAD_ERRORS as error:
            raise ConfigError(
                f"--base: {path!r} cannot be loaded as a sequence classifier: {error}"
            ) from error
        _check_body(path, made, loading)
        made.config.pad_token_id = tokenizer.pad_token_id
        made.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return made

    return tokenizer, new_model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the bars of transformers, and its report that the head of a model is new."""
    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


def _check_body(path: str, model: Any, loading: Mapping[str, Any]) -> None:
    """Refuse a model that lacks weights outside its head. A pooler belongs to the head.

    Raises:
        ConfigError: naming the missing weights.
    """
    body = f"{model.base_model_prefix}."
    missing: list[str] = []
    for name in loading["missing_keys"]:
        if name.startswith(body) and ".pooler." not in name:
            missing.append(name)
    mismatched = [each for each in loading["mismatched_keys"] if each[0].startswith(body)]
    incomplete = {"missing_keys": missing, "mismatched_keys": mismatched}
    check_complete("--base", path, "model", incomplete)


def _new_tokenizer(pairs: Sequence[PreferencePair]) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has learnt the texts of the pairs."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts: list[str] = []
    for pair in pairs:
        texts += [pair.chosen, pair.rejected]
        texts += [message_text(dict(message)) for message in pair.messages]
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        special_tokens=[(cls, tokenizer.token_to_id(cls)), (sep, tokenizer.token_to_id(sep))],
    )
    named = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **named)


def _model_from_scratch(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> Callable[[], BertForSequenceClassification]:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    return lambda: BertForSequenceClassification(config)


def save_member(base: ClassifierBase, model: Any, folder: Path) -> None:
    """Write a member as a folder that the reward kind `classifier` loads.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _quiet_transformers():
            model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--out: {str(folder)!r} cannot be written: {error}") from error
