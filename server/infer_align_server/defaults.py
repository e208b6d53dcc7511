"""Complete requests by the server's defaults, and check the presets when the server starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from infer_align.config import Config
from infer_align.config.align import parse_align
from infer_align.config.presets import LIMIT_NAMES, fill
from infer_align.engines import Engine
from infer_align.errors import ConfigError, InvalidRequest, Unavailable, Unsupported, nearest
from infer_align.flow.scorers import reward_names
from infer_align.rewards import Reward
from infer_align.types import Body

# A parameter of this many parts or fewer is a whole method, such as "align.rps". What it needs may
# stand in the request that names the preset.
METHOD_PARTS = 2
# A request that every preset must be able to serve.
PROBE = {"messages": [{"role": "user", "content": "Hello"}]}


def complete_body(config: Config, body: Body, preset: str | None) -> Body:
    """Return a request's body with the fields of its preset and the server's default limit.

    Args:
        config: The configuration.
        body: The client's body. What it sets stays.
        preset: The preset that the model's name selects; `align.preset` wins over it.
    """
    align = body.get("align")
    chosen = align.get("preset") if isinstance(align, Mapping) else None
    name = preset if chosen is None else chosen
    defaults: dict[str, Any] = {}
    if isinstance(name, str):
        defaults |= config.preset_bodies.get(name, {})
    limit = config.server.default_max_tokens
    if limit is not None and not any(field in defaults for field in LIMIT_NAMES):
        defaults["max_tokens"] = limit
    return fill(body, defaults)


def default_rewards(config: Config, rewards: Mapping[str, Reward]) -> Mapping[str, float]:
    """Return the weights of the rewards that score requests which name none.

    Without a configured default, every reward that may score such a request has weight 1. Those
    without an engine come first: only if there is none, those that read with one score.

    Raises:
        ConfigError: a configured default is no reward; the message names the nearest.
    """
    names = reward_names(rewards)
    for name in config.server.default_rewards:
        if name not in names:
            raise ConfigError(
                f"[server] default_rewards: {name!r} is not configured; {nearest(name, names)}"
            )
    if config.server.default_rewards:
        return config.server.default_rewards
    plain: list[str] = []
    reading: list[str] = []
    for name in config.rewards:
        reward = rewards[name]
        if reward.attributes or reward.named_only:
            continue
        group = reading if reward.uses_engine else plain
        group.append(name)
    return dict.fromkeys(plain or reading, 1.0)


def check_preset_names(config: Config, rewards: Mapping[str, Reward], engine: Engine) -> None:
    """Check the rewards and values that presets name, before anything is loaded.

    Raises:
        ConfigError: one is not configured; the message names the nearest.
    """
    for preset, settings in config.presets.items():
        align = parse_align(settings)
        for name in align.rewards or {}:
            if name.partition(".")[0] not in rewards:
                raise ConfigError(
                    f"[presets.{preset}] rewards.{name}: no such reward; {nearest(name, rewards)}"
                )
        for key, method in align.methods.items():
            unknown = [v for v in getattr(method, "value_names", ()) if v not in engine.values]
            if unknown:
                raise ConfigError(
                    f"[presets.{preset}] {key}: the value {unknown[0]!r} is not configured; "
                    f"{nearest(unknown[0], engine.values)}"
                )


def check_presets(config: Config, plan: Callable[[Body, str], object]) -> list[str]:
    """Plan a short request with each preset, once the engine has started.

    Args:
        config: The configuration.
        plan: Plans a chat request from its body and the name of a preset.

    Returns:
        A sentence for each preset that cannot be used by itself, because the engine lacks a
        capability, or because it leaves something to the request.

    Raises:
        ConfigError: A preset holds a wrong name or value.
    """
    warnings = []
    for name in config.presets:
        body = fill(fill(PROBE, config.preset_bodies.get(name, {})), {"max_tokens": 1})
        try:
            plan(body, name)
        except Unavailable:
            # The engine does not know yet if it can. The first request finds out.
            continue
        except InvalidRequest as error:
            if _is_mistake(error):
                raise ConfigError(f"[presets.{name}] {error.message}") from error
            warnings.append(f"[presets.{name}] cannot be used by itself: {error.message}")
    return warnings


def _is_mistake(error: InvalidRequest) -> bool:
    """Return True for a wrong name or value, False for what another engine or request may mend."""
    if isinstance(error, Unsupported):
        return error.code == "unknown_field"
    parts = (error.param or "").split(".")
    return parts[0] != "align" or len(parts) > METHOD_PARTS
