"""The process's configuration: `infer-align.toml`, one dataclass tree, and where each value came from.

`--set a.b=c` uses the file's own names. Environment variables hold secrets only, and the file names them.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from infer_align import demo
from infer_align.config import registry
from infer_align.config.schema import parse
from infer_align.engines import Engine
from infer_align.errors import AlignError, ConfigError, nearest
from infer_align.flow.request import Limits as RequestLimits
from infer_align.flow.request import parse_align
from infer_align.methods.dpa import Prompting
from infer_align.rewards import Reward
from infer_align.types import LabelReader


@dataclass(frozen=True, slots=True)
class Server:
    """`[server]`: where it listens and who may ask."""

    host: str = field(default="127.0.0.1", metadata={"description": "address to listen on"})
    port: int = field(
        default=8000,
        metadata={"ge": 0, "le": 65535, "description": "port to listen on; 0 takes a free one"},
    )
    api_keys_env: str | None = field(
        default=None,
        metadata={
            "description": "environment variable with the accepted API keys, comma-separated; without it no key is asked for"
        },
    )
    served_name: str | None = field(
        default=None, metadata={"description": "model name in the API; default: the engine's"}
    )
    default_rewards: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "description": "{reward name: weight} where a request names none; default: all of one objective but judges, equally"
        },
    )
    keepalive_seconds: float = field(
        default=10.0,
        metadata={
            "gt": 0,
            "description": "silence after which a stream sends a comment; until then a failure still has its own status",
        },
    )
    honour_client_timeout: bool = field(
        default=True,
        metadata={
            "description": "take the timeout that OpenAI's SDKs announce for a deadline where the request sets none"
        },
    )
    drain_seconds: float = field(
        default=30.0,
        metadata={"ge": 0, "description": "how long running requests may finish after SIGTERM"},
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata={"description": "least severe log line that is written"}
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """`[limits]`: what one request, one key and all together may ask for."""

    max_candidates: int = field(
        default=128, metadata={"ge": 1, "description": "candidates of one request"}
    )
    max_completion_tokens: int = field(
        default=131_072,
        metadata={"ge": 1, "description": "worst case of one request: candidates x maximum tokens"},
    )
    max_running: int = field(
        default=64, metadata={"ge": 1, "description": "requests worked on at once"}
    )
    max_running_tokens: int = field(
        default=1_048_576,
        metadata={"ge": 1, "description": "sum of the running requests' worst cases"},
    )
    max_queue: int = field(
        default=256,
        metadata={
            "ge": 0,
            "description": "requests waiting for their turn; the next one gets a 429",
        },
    )
    max_body_bytes: int = field(
        default=4 * 1024 * 1024, metadata={"ge": 1, "description": "size of one request body"}
    )
    requests_per_minute: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "per API key, or per address where no keys are asked for; 0 for no limit",
        },
    )
    candidate_tokens_per_minute: int = field(
        default=0,
        metadata={
            "ge": 0,
            "description": "per API key, or per address: the worst case is taken at once, what was not sampled is given back; "
            "0 for no limit",
        },
    )

    @property
    def request(self) -> RequestLimits:
        """Those that bound one request's plan."""
        return RequestLimits(self.max_candidates, self.max_completion_tokens)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree. `origins` says for each dotted name that was given where: the file's path or "--set"."""

    engine: Any  # the dataclass of the engine's kind
    engine_kind: str
    server: Server = field(default_factory=Server)
    limits: Limits = field(default_factory=Limits)
    engines: Mapping[str, Any] = field(
        default_factory=dict
    )  # further ones, for judges: name -> the dataclass of the kind
    rewards: Mapping[str, Any] = field(
        default_factory=dict
    )  # name -> the dataclass of the reward's kind
    values: Mapping[str, Any] = field(
        default_factory=dict
    )  # name -> the dataclass of the value's kind
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dpa: Prompting = field(default_factory=Prompting)
    origins: Mapping[str, str] = field(default_factory=dict)

    def load_engine(self) -> Engine:
        """The engine, not yet started."""
        engine: Engine = self.engine.load()
        engine.values = {name: section.load() for name, section in self.values.items()}
        return engine

    def load_engines(self) -> dict[str, Engine]:
        """The engines of `[engines.*]`, not yet started."""
        return {name: section.load() for name, section in self.engines.items()}

    def load_rewards(
        self, engines: Mapping[str, LabelReader] = MappingProxyType({})
    ) -> dict[str, Reward]:
        """Every configured reward, and the judge of `align.trust_judge`, not yet started; `engines` are those that judges may ask.

        Raises:
            ConfigError: naming the section.
        """
        loaded = {}
        for name, section in {**self.rewards, **self._judge()}.items():
            try:
                loaded[name] = section.load()
                loaded[name].engines = engines
            except ConfigError as error:
                raise ConfigError(f"[rewards.{name}] {error.message}") from error
        return loaded

    def _judge(self) -> dict[str, Any]:
        """Who answers to `align.trust_judge`: the section of that name, else the first judge, else the served model."""
        judge = registry.rewards.get("trust_judge")
        judges = [section for section in self.rewards.values() if isinstance(section, judge)]
        return (
            {}
            if "trust_judge" in self.rewards
            else {"trust_judge": judges[0] if judges else judge()}
        )

    @property
    def methods(self) -> Mapping[str, object]:
        """The sections that methods read, by the method's name."""
        return {"dpa": self.dpa}

    def api_keys(self) -> tuple[str, ...]:
        """The accepted keys; () where none is asked for.

        Raises:
            ConfigError: the environment variable that should hold them is missing or empty.
        """
        if self.server.api_keys_env is None:
            return ()
        keys = tuple(
            key.strip()
            for key in os.environ.get(self.server.api_keys_env, "").split(",")
            if key.strip()
        )
        if not keys:
            raise ConfigError(
                f"[server] api_keys_env: the environment variable {self.server.api_keys_env!r} is not set or empty; "
                "put the accepted keys there, comma-separated."
            )
        return keys

    def secrets(self) -> set[str]:
        """What the environment variables hold that the file names: never to be shown."""
        sections = (
            self.server,
            self.engine,
            *self.engines.values(),
            *self.rewards.values(),
            *self.values.values(),
        )
        names = {
            getattr(section, f.name)
            for section in sections
            for f in dataclasses.fields(section)
            if f.name.endswith("_env")
        }
        held = {os.environ.get(name, "") for name in names if name}
        return {part.strip() for value in held for part in (value, *value.split(","))} - {""}

    def settings(self) -> Iterator[tuple[str, object, str]]:
        """(dotted name, value, where it came from) of every setting."""
        sections = {
            "server": self.server,
            "limits": self.limits,
            "dpa": self.dpa,
            "engine": self.engine,
        }
        sections |= {f"engines.{name}": section for name, section in self.engines.items()}
        sections |= {f"rewards.{name}": section for name, section in self.rewards.items()}
        sections |= {f"values.{name}": section for name, section in self.values.items()}
        yield "engine.kind", self.engine_kind, self.origins.get("engine.kind", "default")
        for path, section in sections.items():
            for f in dataclasses.fields(section):
                value = getattr(section, f.name)
                for key, setting in value.items() if "rest" in f.metadata else [(f.name, value)]:
                    name = f"{path}.{key}"
                    yield name, setting, self.origins.get(name, "default")
        for name, preset in self.presets.items():
            yield f"presets.{name}", preset, self.origins.get(f"presets.{name}", "default")


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read the file, or the embedded demo's when there is none, then the overrides `a.b=c` (c is TOML, or else a string).

    Raises:
        ConfigError: what is wrong, by its dotted name, and where it was read.
    """
    file = Path(path) if path else demo.CONFIG
    try:
        table: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: no such file; name a configuration file, or none for the embedded demo."
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    origins = {name: str(file) if path else "the embedded demo" for name in _names(table)}
    for given in overrides:
        name = override(table, given)
        origins = {
            known: origin for known, origin in origins.items() if not known.startswith(f"{name}.")
        }
        origins |= {
            known: "--set"
            for known in _names(table)
            if known == name or known.startswith(f"{name}.")
        }
    return _build(table, origins)


def _build(table: dict[str, Any], origins: dict[str, str]) -> Config:
    known = ("server", "limits", "dpa", "engine", "engines", "rewards", "values", "presets")
    for section, value in table.items():
        if section not in known:
            raise ConfigError(f"[{section}]: no such section; {nearest(section, known)}")
        if not isinstance(value, dict):
            raise ConfigError(
                f"{section}: {value!r} is not a table; write it as a section [{section}]."
            )
    engine = table.get("engine", {})
    kind = engine.get("kind", "transformers")
    presets = table.get("presets", {})
    for name, preset in presets.items():
        if "@" in name:
            raise ConfigError(
                f"[presets.{name}] a preset's name cannot hold '@': <model>@<preset> would be ambiguous; rename it."
            )
        _check_align(preset, f"[presets.{name}]")
    server = parse(Server, table.get("server", {}), "server", ConfigError)
    _check_align({"rewards": server.default_rewards}, "[server] default_rewards:")
    built = Config(
        server=server,
        limits=parse(Limits, table.get("limits", {}), "limits", ConfigError),
        engine=_plugin(registry.engines, kind, engine, "engine"),
        engine_kind=kind,
        engines={
            name: _named(registry.engines, name, section)
            for name, section in table.get("engines", {}).items()
        },
        rewards={
            name: _named(registry.rewards, name, section)
            for name, section in table.get("rewards", {}).items()
        },
        values={
            name: _named(registry.values, name, section)
            for name, section in table.get("values", {}).items()
        },
        presets=presets,
        dpa=parse(Prompting, table.get("dpa", {}), "dpa", ConfigError),
        origins=origins,
    )
    _check_memory(built)
    return built


def _check_memory(config: Config) -> None:
    """Engines that each take a share of the same GPUs must leave room for each other; the last to load would fail otherwise."""
    sections = {"engine": config.engine}
    sections |= {f"engines.{name}": section for name, section in config.engines.items()}
    sections |= {f"rewards.{name}": section for name, section in config.rewards.items()}
    shares = {
        name: share
        for name, section in sections.items()
        if (share := getattr(section, "memory_share", None)) is not None
    }
    total = sum(shares.values())
    if total > 1 + 1e-9:
        each = " + ".join(f"[{name}] {share:.3g}" for name, share in shares.items())
        raise ConfigError(
            f"gpu_memory_utilization: {each} = {total:.3g} of the GPUs' memory, over the whole; set it in each section so that the "
            "sum is at most 1 (where a section has several models, each takes it), or give kv_cache_memory_bytes instead."
        )


def _check_align(align: object, where: str) -> None:
    try:
        parse_align(align, {})
    except AlignError as error:
        raise ConfigError(f"{where} {error.message}") from error


def _named(plugins: registry.Registry, name: str, section: object) -> Any:
    path = f"{plugins.folder}.{name}"
    if not isinstance(section, dict) or "kind" not in section:
        raise ConfigError(f"[{path}] needs a kind; {nearest('', plugins.names())}")
    if "." in name or "@" in name:
        raise ConfigError(f"[{path}] the name cannot hold '.' or '@'; rename it.")
    if path == "rewards.trust_judge" and section["kind"] != "trust_judge":
        raise ConfigError(
            "[rewards.trust_judge] is who answers to align.trust_judge: its kind must be 'trust_judge'; rename it."
        )
    if path == "engines.served":
        raise ConfigError("[engines.served] is what the engine of [engine] is called; rename it.")
    return _plugin(plugins, section["kind"], section, path)


def _plugin(plugins: registry.Registry, kind: str, section: Mapping[str, Any], path: str) -> Any:
    if kind not in plugins.names():
        raise ConfigError(
            f"{path}.kind: {kind!r} is not one of them; {nearest(str(kind), plugins.names())}"
        )
    return parse(
        plugins.get(kind),
        {key: value for key, value in section.items() if key != "kind"},
        path,
        ConfigError,
    )


def override(table: dict[str, Any], text: str) -> str:
    """Write `a.b=c` into a table of tables; -> the dotted name. c is TOML, or else a string.

    Raises:
        ConfigError: not of that form.
    """
    name, equals, value = text.partition("=")
    parts = [part.strip() for part in name.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {text!r}: not of the form a.b=value, such as server.port=9000.")
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is a value, not a section.")
    try:
        table[parts[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[parts[-1]] = value
    return ".".join(parts)


def _names(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, Mapping):
            yield from _names(value, f"{name}.")
