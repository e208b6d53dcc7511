"""Read the tables of a configuration: a file or the embedded demo, and the command line over it.

The settings of the demo belong to its model alone. Without a file, they are dropped as soon as the
command line names another engine: a value that was fitted to the demo fits no other model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_align import demo
from infer_align.config.toml_text import MAX_NESTING, NotTomlError, check_values, parse_toml
from infer_align.errors import ConfigError, quote

# Origins of settings, as `infer-align config show` prints them.
DEMO = "the embedded demo"
OVERRIDE = "--set"
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Choices:
    """The settings that a command names by an argument or an option of their own.

    Attributes:
        model: `[engine] model`.
        upstream: `[engine] urls` of an engine of kind "openai".
        host: `[server] host`.
        port: `[server] port`.
        name: `[server] served_name`.
    """

    model: str | None = None
    upstream: str | None = None
    host: str | None = None
    port: int | None = None
    name: str | None = None

    def apply(self, table: dict[str, Any]) -> list[str]:
        """Write the choices into a table of sections and return their dotted names."""
        server = {"host": self.host, "port": self.port, "served_name": self.name}
        engine: dict[str, Any] = {"model": self.model}
        if self.upstream is not None:
            engine |= {"kind": "openai", "urls": self.upstream}
            if kind_of(table.get("engine", {})) != "openai":
                # The options of an engine of another kind mean nothing to an upstream.
                table["engine"] = {}
        names = []
        for section, settings in {"server": server, "engine": engine}.items():
            for name, value in settings.items():
                if value is not None:
                    table.setdefault(section, {})[name] = value
                    names.append(f"{section}.{name}")
        return names


def read_tables(
    path: str | Path | None, overrides: Sequence[str] = (), choices: Choices | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tables of a configuration and the origin of each of its settings.

    Args:
        path: the TOML file; None for the embedded demo.
        overrides: texts `a.b=c`; c is TOML, or else a string. They win over the choices.
        choices: further settings of the command line.

    Returns:
        {section: table}, and {dotted name: origin}.

    Raises:
        ConfigError: the file cannot be read, or an override has another form.
    """
    choices = choices or Choices()
    if path is not None:
        return _change(_read_toml(Path(path)), str(path), overrides, choices)
    table, origins = _change(_read_toml(demo.CONFIG), DEMO, overrides, choices)
    if _is_demo(table.get("engine", {})):
        return table, origins
    return _change({}, DEMO, overrides, choices)


def kind_of(engine: Mapping[str, Any]) -> Any:
    """Return the kind of an `[engine]` table; a table with URLs and no kind is an upstream."""
    return engine.get("kind", "openai" if "urls" in engine else "transformers")


def _is_demo(engine: Any) -> bool:
    if not isinstance(engine, dict):
        return False
    is_embedded = kind_of(engine) == "transformers" and "urls" not in engine
    return is_embedded and engine.get("model", "demo") == "demo"


def _change(
    table: dict[str, Any], source: str, overrides: Sequence[str], choices: Choices
) -> tuple[dict[str, Any], dict[str, str]]:
    """Apply the command line to a table; return it with the origin of each setting."""
    origins = dict.fromkeys(_dotted_names(table), source)
    for name in choices.apply(table):
        origins[name] = COMMAND_LINE
    for text in overrides:
        name = override(table, text)
        inside = f"{name}."
        # The override replaces the whole table of that name, so its old entries are gone.
        for old in [old for old in origins if old.startswith(inside)]:
            del origins[old]
        for new in _dotted_names(table):
            if new == name or new.startswith(inside):
                origins[new] = OVERRIDE
    return table, origins


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        # Some editors begin a file with a byte order mark.
        table = parse_toml(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; name a configuration file, or none for the embedded demo."
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{file}: is a folder, not a configuration file; to serve the model in it: "
            f"infer-align serve {file}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8: {error}; save it as UTF-8.") from None
    except NotTomlError as error:
        raise ConfigError(f"{file}: not TOML: {error}.") from None
    try:
        check_values(table)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}") from None
    return table


def override(table: dict[str, Any], text: str, option: str = "--set") -> str:
    """Write `a.b=c` into a table of tables and return the dotted name.

    Args:
        table: changed in place.
        text: c is TOML, or else a string.
        option: the option of the command line, for messages.

    Raises:
        ConfigError: the text has another form, or a value that no setting can have.
    """
    name, equals, value = text.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or not all(parts):
        example = "server.port=9000" if option == "--set" else "rank=32"
        raise ConfigError(
            f"{option} {quote(text)}: must have the form a.b=value, such as {example}."
        )
    if len(parts) > MAX_NESTING:
        raise ConfigError(
            f"{option} {quote(text)}: has more than {MAX_NESTING} names; no setting has."
        )
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{option} {quote(text)}: {part!r} is a value, not a section.")
    dotted = ".".join(parts)
    table[parts[-1]] = _value(value)
    check_values({parts[-1]: table[parts[-1]]}, ".".join(parts[:-1]))
    return dotted


def _value(text: str) -> Any:
    """Return the value of a TOML text, or else the text itself."""
    try:
        table = parse_toml(f"value = {text}")
    except NotTomlError:
        return text
    # More lines would be further settings.
    return table["value"] if len(table) == 1 else text


def _dotted_names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, Mapping):
            yield from _dotted_names(value, f"{name}.")
