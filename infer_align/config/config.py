"""The configuration of the process: `infer-align.toml`, as one tree of dataclasses.

Each value remembers where it came from. `--set a.b=c` uses the names of the file. Environment
variables hold secrets only, and the file names those variables.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from infer_align.config import registry
from infer_align.config.checks import check_gpu_memory, check_models, check_workers
from infer_align.config.model_path import file_name
from infer_align.config.presets import check_align, split_presets
from infer_align.config.schema import parse
from infer_align.config.sections import loaded
from infer_align.config.server import Limits, Server, Telemetry
from infer_align.config.source import Choices, kind_of, read_tables
from infer_align.engines import Engine
from infer_align.errors import ConfigError, nearest, quote
from infer_align.methods import Sections
from infer_align.rewards import Reward
from infer_align.types import Body
from infer_align.upstream import Upstream
from infer_align.values import Value

SECTIONS = ("server", "limits", "telemetry", "engine", "engines", "rewards", "values", "presets")
# The reward that `align.trust_judge` uses.
JUDGE = "trust_judge"


class EngineSection(Protocol):
    """`[engine]` or `[engines.<name>]`: the dataclass of the engine's kind.

    A class attribute `holds_model = False` says that the engine loads no model into the process.
    """

    def load(self) -> Engine:
        """Return the engine, not yet started."""


class RewardSection(Protocol):
    """`[rewards.<name>]`: the dataclass of the reward's kind."""

    def load(self) -> Reward:
        """Return the reward, not yet started."""


class ValueSection(Protocol):
    """`[values.<name>]`: the dataclass of the value's kind."""

    def load(self) -> Value:
        """Return the value."""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration."""

    engine: EngineSection
    engine_kind: str
    server: Server = field(default_factory=Server)
    limits: Limits = field(default_factory=Limits)
    telemetry: Telemetry = field(default_factory=Telemetry)
    # Further engines, for judges.
    engines: Mapping[str, EngineSection] = field(default_factory=dict)
    rewards: Mapping[str, RewardSection] = field(default_factory=dict)
    values: Mapping[str, ValueSection] = field(default_factory=dict)
    # The `align` object of each preset, and the fields of the body that it sets.
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset_bodies: Mapping[str, Body] = field(default_factory=dict)
    # Sections of methods, such as `[dpa]`, by the name of the section.
    method_sections: Mapping[str, object] = field(default_factory=dict)
    # Dotted name of a setting -> "--set" or the path of the file that it was read from.
    origins: Mapping[str, str] = field(default_factory=dict)

    def load_engine(self) -> Engine:
        """Return the engine with its values, not yet started.

        Raises:
            ConfigError: the engine or a value cannot be made; the message names its section.
        """
        engine: Engine = loaded(self.engine, "engine")
        engine.served_name = self.served_name
        engine.default_max_tokens = self.server.default_max_tokens
        engine.values = {
            name: loaded(section, f"values.{name}") for name, section in self.values.items()
        }
        return engine

    def load_engines(self) -> dict[str, Engine]:
        """Return the engines of `[engines.*]`, not yet started.

        Raises:
            ConfigError: an engine cannot be made; the message names its section.
        """
        return {name: loaded(section, f"engines.{name}") for name, section in self.engines.items()}

    def load_rewards(
        self, engines: Mapping[str, Engine] = MappingProxyType({})
    ) -> dict[str, Reward]:
        """Return every configured reward and the judge of `align.trust_judge`, not yet started.

        Args:
            engines: the engines that judges may use, by name.

        Raises:
            ConfigError: a reward cannot be made; the message names its section.
        """
        rewards = {}
        for name, section in {**self.rewards, **self._default_judge()}.items():
            reward = loaded(section, f"rewards.{name}")
            reward.engines = engines
            rewards[name] = reward
        return rewards

    def _default_judge(self) -> dict[str, RewardSection]:
        """Return the judge of `align.trust_judge` if no section of that name is configured.

        The first configured judge is used, otherwise the served model itself.
        """
        if JUDGE in self.rewards:
            return {}
        kind = registry.rewards.get(JUDGE)
        for section in self.rewards.values():
            if isinstance(section, kind):
                return {JUDGE: section}
        return {JUDGE: kind()}

    @property
    def served_name(self) -> str | None:
        """Return the name of the model in the API; None if it is the engine's own name for it.

        A model in a folder is served under the folder's name, a GGUF file under its stem.
        """
        if self.server.served_name:
            return self.server.served_name
        if isinstance(self.engine, Upstream):
            return None
        model = getattr(self.engine, "model", None)
        return file_name(model) if isinstance(model, str) else None

    @property
    def methods(self) -> Sections:
        """Return the sections that methods read."""
        return Sections(*self.method_sections.values())

    def api_keys(self) -> tuple[str, ...]:
        """Return the accepted API keys; () if no key is required.

        Raises:
            ConfigError: the environment variable that should hold them is missing or empty.
        """
        variable = self.server.api_keys_env
        if variable is None:
            return ()
        keys = _split_keys(os.environ.get(variable, ""))
        if not keys:
            raise ConfigError(
                f"[server] api_keys_env: the environment variable {variable!r} is not set or "
                "empty; put the accepted keys there, separated by commas."
            )
        return tuple(keys)

    def secrets(self) -> set[str]:
        """Return the secrets in the environment variables that the file names.

        They must never appear in a log line or an error message.
        """
        secrets: set[str] = set()
        for section in self._sections().values():
            for f in dataclasses.fields(section):
                variable = getattr(section, f.name)
                if f.name.endswith("_env") and variable:
                    text = os.environ.get(variable, "")
                    secrets |= _secrets_of(f.name, text)
        return secrets - {""}

    def settings(self) -> Iterator[tuple[str, object, str]]:
        """Yield (dotted name, value, origin) of every setting."""
        yield "engine.kind", self.engine_kind, self._origin("engine.kind")
        for path, section in self._sections().items():
            for name, value in _section_settings(section):
                yield f"{path}.{name}", value, self._origin(f"{path}.{name}")
        for name, preset in self.presets.items():
            yield f"presets.{name}", preset, self._origin(f"presets.{name}")
        for name, body in self.preset_bodies.items():
            for key, value in body.items():
                setting = f"presets.{name}.body.{key}"
                yield setting, value, self._origin(setting)

    def _origin(self, name: str) -> str:
        return self.origins.get(name, "default")

    def _sections(self) -> dict[str, Any]:
        """Return every section by its dotted path."""
        sections: dict[str, Any] = {"server": self.server, "limits": self.limits}
        sections["telemetry"] = self.telemetry
        for name, section in self.method_sections.items():
            # A method with several sections of one form, such as `[traits.<name>]`, holds entries.
            entries = getattr(section, "entries", None)
            if entries is None:
                sections[name] = section
                continue
            for key, entry in entries.items():
                sections[f"{name}.{key}"] = entry
        sections["engine"] = self.engine
        for folder in ("engines", "rewards", "values"):
            for name, section in getattr(self, folder).items():
                sections[f"{folder}.{name}"] = section
        return sections


def _secrets_of(name: str, text: str) -> set[str]:
    """Return the secrets in the text of an environment variable that the field `name` names."""
    secrets = {text.strip(), *_split_keys(text)}
    if name == "headers_env":
        secrets |= {pair.partition("=")[2] for pair in _split_keys(text)}
    return secrets


def _split_keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    return [key for key in keys if key]


def _section_settings(section: Any) -> Iterator[tuple[str, object]]:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if "rest" in f.metadata:  # options of another program, under their own names
            yield from value.items()
        else:
            yield f.name, value


def load(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    choices: Choices | None = None,
) -> Config:
    """Read the configuration file, then apply the command line.

    Args:
        path: the TOML file; None for the configuration of the embedded demo, or for no settings
            at all if the command line names another engine.
        overrides: texts `a.b=c`; c is TOML, or else a string.
        choices: settings that the command names by arguments of their own.

    Raises:
        ConfigError: names what is wrong by its dotted name, and the file.
    """
    table, origins = read_tables(path, overrides, choices)
    return _build(table, origins)


def _build(table: dict[str, Any], origins: dict[str, str]) -> Config:
    method_sections = _method_sections()
    _check_section_names(table, [*SECTIONS, *method_sections])
    engine = table.get("engine", {})
    kind = kind_of(engine)
    presets, preset_bodies = split_presets(table.get("presets", {}))
    server = parse(Server, table.get("server", {}), "server", ConfigError)
    check_align({"rewards": server.default_rewards}, "[server] default_rewards:")
    parsed_sections: dict[str, Any] = {}
    for name, section in method_sections.items():
        parsed_sections[name] = _parse_method_section(section, table.get(name, {}), name)
    config = Config(
        server=server,
        limits=parse(Limits, table.get("limits", {}), "limits", ConfigError),
        telemetry=parse(Telemetry, table.get("telemetry", {}), "telemetry", ConfigError),
        engine=_parse_plugin(registry.engines, kind, engine, "engine"),
        engine_kind=kind,
        engines=_parse_plugins(registry.engines, table.get("engines", {})),
        rewards=_parse_plugins(registry.rewards, table.get("rewards", {})),
        values=_parse_plugins(registry.values, table.get("values", {})),
        presets=presets,
        preset_bodies=preset_bodies,
        method_sections=parsed_sections,
        origins=origins,
    )
    check_models(config)
    check_gpu_memory(config)
    check_workers(config)
    return config


def _method_sections() -> dict[str, type[Any]]:
    """Return the dataclasses of the sections that methods read, by the section's name."""
    sections = {}
    for name in registry.methods.names():
        section = getattr(registry.methods.get(name), "section", None)
        if section is not None:
            sections[getattr(section, "section_name", name)] = section
    return sections


def _parse_method_section(cls: type[Any], table: Mapping[str, Any], name: str) -> Any:
    """Parse the section of a method: one table, or a table of named entries."""
    entry = getattr(cls, "entry", None)
    if entry is None:
        return parse(cls, table, name, ConfigError)
    return cls(
        {key: parse(entry, value, f"{name}.{key}", ConfigError) for key, value in table.items()}
    )


def _check_section_names(table: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, value in table.items():
        if name not in names:
            sections = [f"{owner}.{name}" for owner in owners_of(name)]
            hint = f"did you mean {sections[0]!r}?" if sections else nearest(name, names)
            raise ConfigError(f"[{name}]: no such section; {hint}")
        if not isinstance(value, dict):
            raise ConfigError(
                f"{name}: {quote(value)} is not a table; write it as a section [{name}]."
            )


def owners_of(setting: str) -> list[str]:
    """Return the sections that have a setting of this name, such as ["server"] for "port"."""
    sections: dict[str, type[Any]] = {"server": Server, "limits": Limits}
    owners = [section for section, cls in sections.items() if _has_field(cls, setting)]
    for kind in registry.engines.names():
        # The packages of an engine may be missing.
        with suppress(ConfigError):
            if _has_field(registry.engines.get(kind), setting):
                return [*owners, "engine"]
    return owners


def _has_field(cls: type[Any], name: str) -> bool:
    return any(f.name == name for f in dataclasses.fields(cls))


def _parse_plugins(plugins: registry.Registry, table: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the named sections of one folder, such as `[rewards.*]`."""
    return {name: _parse_named(plugins, name, section) for name, section in table.items()}


def _parse_named(plugins: registry.Registry, name: str, section: object) -> Any:
    path = f"{plugins.folder}.{name}"
    if not isinstance(section, dict) or "kind" not in section:
        raise ConfigError(f"[{path}] needs a kind; {nearest('', plugins.names())}")
    if not name.strip():
        raise ConfigError(f"[{path}] the name {name!r} is empty; requests could not give it.")
    if "." in name or "@" in name:
        raise ConfigError(f"[{path}] the name cannot contain '.' or '@'; rename it.")
    if path == f"rewards.{JUDGE}" and section["kind"] != JUDGE:
        raise ConfigError(
            f"[{path}] configures the judge of align.trust_judge: its kind must be {JUDGE!r}; "
            "rename it."
        )
    if path == "engines.served":
        raise ConfigError(f"[{path}] 'served' is the name of the engine of [engine]; rename it.")
    return _parse_plugin(plugins, section["kind"], section, path)


def _parse_plugin(
    plugins: registry.Registry, kind: str, section: Mapping[str, Any], path: str
) -> Any:
    if kind not in plugins.names():
        raise ConfigError(
            f"{path}.kind: {quote(kind)} is not a known kind; {nearest(str(kind), plugins.names())}"
        )
    fields = {key: value for key, value in section.items() if key != "kind"}
    return parse(plugins.get(kind), fields, path, ConfigError)
