"""Turn a conversation into the token ids that a reward model reads.

With a chat template, the ids are those of the template's text. Without one, they are those of the
turns' texts with a blank line between them, and of the tokenizer's own special tokens.

A text with more tokens than the model reads is truncated. The special tokens at both ends stay,
such as [CLS] and [SEP], because encoders read the score at the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from infer_align.errors import ConfigError, nearest, quote
from infer_align.messages import (
    Conversation,
    called_functions,
    calls_as_text,
    message_text,
    render,
)

SEPARATOR = "\n\n"
# A limit of fewer tokens is a mistake in a tokenizer's files.
SMALLEST_LIMIT = 8
# Every model scores this conversation while it is loaded.
PROBE: Conversation = [
    {"role": "user", "content": "What do owls eat?"},
    {"role": "assistant", "content": "Owls eat mice."},
]


class Encoded(NamedTuple):
    """A conversation as one model reads it."""

    ids: list[int]  # empty if the conversation cannot be read
    note: str | None  # why there are no ids, or that the text was truncated


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into token ids for one model.

    Attributes:
        tokenizer: of transformers.
        template: chat template as Jinja text; None to read the turns as plain text.
        max_length: maximum number of tokens that the model reads.
        vocabulary: number of token ids that the model knows; None if it is unknown.
        add_special_tokens: True to put the tokenizer's special tokens around the template's text.
    """

    tokenizer: Any
    template: str | None
    max_length: int
    vocabulary: int | None
    add_special_tokens: bool = False

    @cached_property
    def special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the ids that the tokenizer puts before and after a text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
        if 0 not in mask:
            return [], []
        start = mask.index(0)
        end = len(mask) - mask[::-1].index(0)
        return ids[:start], ids[end:]

    @cached_property
    def key(self) -> object:
        """Return an object that is equal for encoders that give equal ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return (
            self.template,
            self.max_length,
            self.vocabulary,
            self.add_special_tokens,
            backend.to_str() if backend else id(self.tokenizer),
        )

    def encode(self, conversation: Conversation) -> Encoded:
        """Return the token ids of a conversation, truncated to `max_length`.

        Nothing is raised. If the template or the tokenizer refuses the conversation, there are no
        ids and the note says why.
        """
        try:
            text = self.text(conversation)
        except Exception as error:
            # A template is code that came with the model: it may raise anything.
            return Encoded(
                [], f"the reward model's chat template refused the conversation: {error}"
            )
        try:
            content = self._content_ids(text)
            prefix, suffix = self._special_tokens_of(content)
            ids = [*prefix, *content, *suffix]
            if len(ids) <= self.max_length:
                return self._checked(ids, None)
            room = self.max_length - len(prefix) - len(suffix)
            if self._reads_the_beginning(conversation, room):
                side, content = "first", content[:room]
            else:
                side, content = "last", content[-room:]
        except Exception as error:
            return Encoded([], f"the reward model's tokenizer cannot read the text: {error}")
        note = f"truncated: read the {side} {self.max_length} of {len(ids)} tokens"
        return self._checked([*prefix, *content, *suffix], note)

    def encode_by_recipe(self, conversation: Conversation) -> Encoded:
        """Return the ids as `tokenizer(text, truncation=True)` gives them.

        This is how most programs call a classifier. Special tokens are added, unless the template
        writes them.
        """
        try:
            added = self.template is None or self.add_special_tokens
            encoded = self.tokenizer(
                self.text(conversation),
                truncation=True,
                max_length=self.max_length,
                add_special_tokens=added or bool(self.missing_special_tokens()),
            )
        except Exception as error:
            # A template is code that came with the model: it may raise anything.
            return Encoded([], f"the tokenizer or its template failed: {error}")
        return self._checked(encoded["input_ids"], None)

    def missing_special_tokens(self) -> list[str]:
        """Return the tokens that the tokenizer would add and that the template does not write."""
        if self.template is None or self.add_special_tokens:
            return []
        prefix, suffix = self.special_tokens
        ids = self._content_ids(self.text(PROBE))
        missing: list[int] = []
        if ids[: len(prefix)] != prefix:
            missing += prefix
        if suffix and ids[-len(suffix) :] != suffix:
            missing += suffix
        names: list[str] = self.tokenizer.convert_ids_to_tokens(missing)
        return names

    def text(self, conversation: Conversation) -> str:
        """Return the text that the model reads, without special tokens and not truncated.

        Raises:
            Exception: the chat template refuses the conversation.
        """
        if self.template is None:
            return SEPARATOR.join(message_text(message) for message in conversation)
        text = render(self._rendered, conversation)
        if all(name in text for name in called_functions(conversation)):
            return text
        # The template does not write tool calls. Two candidates that differ in their calls alone
        # must not read alike.
        return render(self._rendered, calls_as_text(conversation))

    def _rendered(self, conversation: Conversation) -> str:
        text: str = self.tokenizer.apply_chat_template(
            conversation, chat_template=self.template, tokenize=False
        )
        return text

    def _content_ids(self, text: str) -> list[int]:
        # `verbose` would print a warning for every text over the tokenizer's own limit.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _special_tokens_of(self, content: list[int]) -> tuple[list[int], list[int]]:
        """Return the special tokens that stay before and after the content.

        Those that the template wrote at the beginning are moved out of `content`. Those at the end
        survive in it, because the text of a template loses its beginning.
        """
        if self.template is None or self.add_special_tokens:
            return self.special_tokens
        prefix, _ = self.special_tokens
        if not prefix or content[: len(prefix)] != prefix:
            starts = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id} - {None}
            prefix = content[:1] if content and content[0] in starts else []
        del content[: len(prefix)]
        return prefix, []

    def _reads_the_beginning(self, conversation: Conversation, room: int) -> bool:
        """Return True to truncate at the end.

        A text without a template is truncated as transformers does it, at the tokenizer's own side.
        But candidates differ only in the last turn. If the earlier turns fill more than half of the
        room, the text loses its beginning. So all candidates of a request lose the same side.
        """
        if self.template is not None or self.tokenizer.truncation_side == "left":
            return False
        earlier = self.text([*conversation[:-1], {"content": ""}])
        return 2 * len(self._content_ids(earlier)) <= room

    def _checked(self, ids: list[int], note: str | None) -> Encoded:
        """Refuse ids that would end the forward of a whole batch."""
        if not ids:
            return Encoded([], "there are no tokens to score")
        largest = max(ids)
        if self.vocabulary is not None and largest >= self.vocabulary:
            return Encoded(
                [],
                f"the tokenizer gives the token id {largest}, but the reward model knows only "
                f"{self.vocabulary} tokens",
            )
        return Encoded(ids, note)


def make_encoder(
    tokenizer: Any,
    chat_template: str | None,
    limits: Sequence[int | None],
    vocabulary: int | None,
    *,
    add_special_tokens: bool,
) -> Encoder:
    """Return the encoder of one reward model.

    Args:
        tokenizer: of transformers.
        chat_template: from the configuration, see `find_template`.
        limits: numbers of tokens that the model and its section allow; None is no limit.
        vocabulary: number of token ids that the model knows; None if it is unknown.
        add_special_tokens: True to put the tokenizer's special tokens around a template's text.

    Raises:
        ConfigError: the chat template cannot be found.
    """
    sizes = [limit for limit in limits if limit]
    if tokenizer.model_max_length >= SMALLEST_LIMIT:
        sizes.append(int(tokenizer.model_max_length))
    template = find_template(tokenizer, chat_template)
    return Encoder(tokenizer, template, min(sizes), vocabulary, add_special_tokens)


def find_template(tokenizer: Any, chat_template: str | None) -> str | None:
    """Return the chat template by which a reward model reads a conversation, as Jinja text.

    Args:
        tokenizer: of transformers; it may hold several templates, each with a name.
        chat_template: name of one of them, path of a file, or the template itself. None for the
            template that transformers takes: the only one, or the one called "default".

    Returns:
        The template, or None if the tokenizer has none.

    Raises:
        ConfigError: there is no such template, or none of several is called "default".
    """
    templates = tokenizer.chat_template
    named = templates if isinstance(templates, dict) else {}
    if chat_template is not None:
        return _configured_template(chat_template, named)
    if not named:
        return templates or None
    if "default" not in named:
        raise ConfigError(
            f"chat_template: the tokenizer has several chat templates ({', '.join(named)}), and "
            "none is called 'default'. Set chat_template to one of these names, or to the path of "
            "a Jinja file."
        )
    return str(named["default"])


def _configured_template(chat_template: str, named: dict[str, str]) -> str:
    if chat_template in named:
        return named[chat_template]
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template: {quote(chat_template)} is neither the name of a template of the "
            f"tokenizer ({nearest(chat_template, named)}) nor a file that can be read: {error}"
        ) from None
