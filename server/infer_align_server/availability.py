"""Find out which methods requests can ask for now, and what one more section would add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infer_align.config import registry
from infer_align.errors import AlignError, Unavailable
from infer_align_server.service import Service

# What a method relies on -> the sections that would provide it.
FIXES = {
    "rewards": '[rewards.short]\nkind = "rules"\ntarget_words = 60',
    "values": '[values.mine]\nkind = "head"\npath = "mine.safetensors"',
}


@dataclass(frozen=True, slots=True)
class Availability:
    """The answer to whether a method can be used with this configuration.

    Attributes:
        reason: Why it cannot be used; None if it can.
        fix: The lines of the configuration that would make it usable; "" if there are none.
    """

    reason: str | None = None
    fix: str = ""


def availability(service: Service) -> dict[str, Availability]:
    """Return the availability of each method of `align`, by its name."""
    return {name: _method(service, name) for name in registry.methods.names()}


def _method(service: Service, name: str) -> Availability:
    cls = registry.methods.get(name)
    # What an upstream can do is found out when a request needs it.
    possible = service.engine.capabilities | service.engine.unknown_capabilities
    missing = sorted(cls.needs - possible)
    # Where the configuration lacks a value, the engine cannot have the capability to use it.
    lacking = _lacking(service, getattr(cls, "relies_on", None))
    if lacking.reason:
        return lacking
    if missing:
        hint = service.engine.capability_hints.get(missing[0], "use another engine")
        return Availability(f"the engine lacks {', '.join(missing)}; {hint}")
    return _judge(service, name)


def _lacking(service: Service, relies_on: str | None) -> Availability:
    if relies_on == "rewards" and not service.config.rewards:
        reason = "no reward is configured; align.trust_judge in the same request can stand in"
        return Availability(reason, FIXES["rewards"])
    if relies_on == "values" and not service.engine.values:
        reason = "no value is configured; fit one with: infer-align fit value"
        return Availability(reason, FIXES["values"])
    return Availability()


def _judge(service: Service, name: str) -> Availability:
    """Return whether the reward that a method of the same name stands for can score."""
    reward: Any = service.rewards.get(name)
    if reward is None or not service.settled.is_set():
        return Availability()
    try:
        reward.check(f"align.{name}")
    except Unavailable:
        return Availability()
    except AlignError as error:
        return Availability(error.message.removeprefix(f"align.{name}: ").rstrip("."))
    return Availability()
