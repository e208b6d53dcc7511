"""Errors that begin with the section of the configuration that they are about."""

from __future__ import annotations

from typing import Any

from infer_align.errors import ConfigError


def loaded(section: Any, path: str) -> Any:
    """Return what a section loads.

    Raises:
        ConfigError: it cannot be made; the message begins with the section.
    """
    try:
        return section.load()
    except ConfigError as error:
        raise in_section(path, error) from error


def in_section(path: str, error: ConfigError) -> ConfigError:
    """Return the error of a section, whose message begins with the section.

    Args:
        path: the dotted path of the section.
        error: of the plugin. An engine calls its section `[engine]`, also that of a judge.
    """
    message = error.message
    if message.startswith("[engine] "):
        message = message.removeprefix("[engine] ")
    elif message.startswith("["):
        return error
    return ConfigError(f"[{path}] {message}")
