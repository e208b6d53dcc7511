"""Read TOML, and refuse what no setting of this program can be."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any

from infer_align.errors import ConfigError, field_path, quote

# Integers of TOML have 64 bits. Larger ones fail where they become a float.
LARGEST = 2**63 - 1
# Settings are nested in a few levels. Text nested more deeply may overflow the stack.
MAX_NESTING = 64


class NotTomlError(ValueError):
    """A text is not TOML; the message says why."""


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text.

    Raises:
        NotTomlError: the text is not TOML, or one that no setting needs.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise NotTomlError("it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise NotTomlError(str(error)) from None
    except ValueError:
        # Python refuses to read a number of thousands of digits.
        raise NotTomlError(f"it has a number above {LARGEST}") from None


def check_values(table: Mapping[str, Any], path: str = "") -> None:
    """Refuse values that no setting can have: dates, huge integers, NUL, too deep tables.

    Args:
        table: of the configuration.
        path: where the table stands; "" for a whole configuration.

    Raises:
        ConfigError: naming the first such value by its dotted name.
    """
    level: list[tuple[str, Any]] = [(path, table)]
    for _ in range(MAX_NESTING):
        for name, value in level:
            _check_value(name, value)
        level = [child for name, value in level for child in _children(name, value)]
        if not level:
            return
    # The whole path of such a value is too long to be read.
    name = ".".join(level[0][0].split(".")[:2])
    raise ConfigError(f"{name}: is nested in more than {MAX_NESTING} levels; no setting is.")


def _children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            _check_text(path, name, "the name ")
            yield (f"{path}.{field_path(name)}" if path else field_path(name)), child
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield f"{path}.{i}", child


def _check_value(path: str, value: Any) -> None:
    if isinstance(value, str):
        _check_text(path, value)
    elif isinstance(value, date | time):
        raise ConfigError(
            f"{path}: {value.isoformat()} is a date or a time, and no setting is one; for a text, "
            f'write it in quotes: "{value.isoformat()}".'
        )
    elif isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ConfigError(
            f"{path}: an integer of {value.bit_length()} bits is not allowed; must be from "
            f"-{LARGEST} to {LARGEST}."
        )


def _check_text(path: str, text: str, subject: str = "") -> None:
    if "\0" in text:
        raise ConfigError(
            f"{path}: {subject}{quote(text)} is not allowed; must not contain the character NUL."
        )
