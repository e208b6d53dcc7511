"""Load the engines and the rewards, with the size of each, and name the section that fails."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from infer_align.config import Config
from infer_align.config.model_path import disk_bytes
from infer_align.config.sections import in_section
from infer_align.demo.locate import locate
from infer_align.engines import Engine
from infer_align.errors import AlignError, ConfigError
from infer_align.rewards import Reward, start_reward
from infer_align.upstream import Upstream

Progress = Callable[[str], None]
log = logging.getLogger("infer_align")


async def load_models(
    config: Config,
    engines: Mapping[str, Engine],
    rewards: Mapping[str, Reward],
    progress: Progress,
) -> None:
    """Start the engines and the rewards, one after the other, because each uses all cores.

    Args:
        config: The configuration, for the sections and the sizes of what is loaded.
        engines: By name; "served" is the engine of `[engine]`.
        rewards: By name.
        progress: Called with a short description of each thing that is being loaded.

    Raises:
        ConfigError: A model cannot be loaded; the message names its section.
        AlignError: An engine or a reward failed otherwise.
    """
    for name, engine in engines.items():
        is_served = name == "served"
        section = config.engine if is_served else config.engines[name]
        model = (config.served_name or engine.model) if is_served else name
        title = _title("engine", model, section)
        progress(title)

        def phase_progress(phase: str, title: str = title) -> None:
            progress(f"{title}: {phase}")

        engine.progress = phase_progress
        await _named("engine" if is_served else f"engines.{name}", engine.start())
    for name, reward in rewards.items():
        # The judge of align.trust_judge is there without a section, and has nothing to load.
        if name in config.rewards:
            progress(_title("reward", name, config.rewards[name]))
        await _named(f"rewards.{name}", start_reward(name, reward))


def _title(kind: str, name: str, section: Any) -> str:
    """Return what is loaded with its size on disk, such as "engine llama (2.2 GB)"."""
    if isinstance(section, Upstream):
        urls = ", ".join(address.url for address in section.addresses())
        return f"{kind} {name} at {urls}".replace("  ", " ")
    models = getattr(section, "paths", None) or (getattr(section, "model", None),)
    total = sum(_size(model) for model in models if model)
    return f"{kind} {name} ({format_bytes(total)})" if total else f"{kind} {name}"


def _size(model: str) -> int:
    try:
        return disk_bytes(locate(model))
    except ConfigError:
        # Its own start says what is wrong with it.
        return 0


def format_bytes(size: float) -> str:
    """Return a number of bytes as people write it, such as "269 MB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


async def _named(section: str, starting: Awaitable[None]) -> None:
    """Wait for a start; an error names the section.

    Raises:
        ConfigError: The thing cannot be loaded.
    """
    try:
        await starting
    except ConfigError as error:
        raise in_section(section, error) from error
    except AlignError:
        raise
    except Exception as error:
        # A library failed on what it was told to load. The traceback is for developers.
        log.debug("loading failed", exc_info=True)
        raise ConfigError(
            f"[{section}] cannot be loaded: {type(error).__name__}: {error} (the traceback is "
            'logged with [server] log_level = "debug")'
        ) from error
