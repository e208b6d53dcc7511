"""The chat template of a model: read one from a file, and find out what one lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infer_align.decoding.call_format import shows_tools
from infer_align.engines.transformers.prompt import render
from infer_align.errors import ConfigError, InvalidRequest
from infer_align.messages import SYSTEM_MARK, SYSTEM_PROBE

NO_TEMPLATE = (
    "The model has no chat template, so only /v1/completions answers. Name a file with its "
    'template: [engine] chat_template = "template.jinja".'
)
NO_SYSTEM_ROLE = (
    "The model's chat template shows it no system messages: {problem}. Name another template: "
    '[engine] chat_template = "template.jinja".'
)

NO_TOOLS = (
    "Tools: the model's template does not show them, so a system instruction describes them. A "
    'call that tool_choice requires or names fits its schema. With "auto" such a model may never '
    "call."
)


def set_template(tokenizer: Any, path: str | None) -> None:
    """Give a tokenizer the chat template of a file; None keeps its own.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"[engine] chat_template: {path!r} cannot be read: {reason}; name a file with a "
            "template in Jinja's language."
        ) from None


def template_notes(tokenizer: Any) -> tuple[str, ...]:
    """Return sentences on what the chat template of a tokenizer lacks, and what to do."""
    if not tokenizer.chat_template:
        return (NO_TEMPLATE,)
    notes: list[str] = []
    try:
        text = render(tokenizer, {"messages": SYSTEM_PROBE})
    except InvalidRequest as error:
        notes.append(NO_SYSTEM_ROLE.format(problem=error.message.rstrip(".")))
    else:
        if SYSTEM_MARK not in text:
            notes.append(NO_SYSTEM_ROLE.format(problem="it leaves them out"))
    if not shows_tools(str(tokenizer.chat_template)):
        notes.append(NO_TOOLS)
    return tuple(notes)


def has_system_role(tokenizer: Any) -> bool:
    """Return True if the model sees system messages; nothing is generated."""
    try:
        return SYSTEM_MARK in render(tokenizer, {"messages": SYSTEM_PROBE})
    except InvalidRequest:
        return False
