"""Find out which methods requests can ask for now, and what one more section would add."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infer_align.config import registry
from infer_align.errors import AlignError, Unavailable
from infer_align.flow.stand_in import AGREEMENT as AGREEMENT_KIND
from infer_align.flow.stand_in import NEEDS
from infer_align.flow.stand_in import RATIO as RATIO_KIND
from infer_align_server.service import Service

# The section that would provide a value.
VALUE = '[values.mine]\nkind = "head"\npath = "mine.safetensors"'
# Sections of a reward of one's own: one that reads with the engine, and one that needs nothing.
RATIO = '[rewards.polite]\nkind = "density_ratio"\nprompt = "Answer politely."'
NO_CHAT = "the model has no chat template; name a file with one in [engine] chat_template"
RULES = '[rewards.short]\nkind = "rules"\ntarget_words = 60'


@dataclass(frozen=True, slots=True)
class Availability:
    """The answer to whether a method can be used with this configuration.

    Attributes:
        reason: Why it cannot be used; None if it can.
        fix: The lines of the configuration that would make it usable, or that would replace what
            the note says; "" if there are none.
        note: What a method that can be used makes do with; "" if it has all it needs.
    """

    reason: str | None = None
    fix: str = ""
    note: str = ""


def availability(service: Service) -> dict[str, Availability]:
    """Return the availability of each method of `align`, by its name."""
    return {name: _method(service, name) for name in registry.methods.names()}


def _method(service: Service, name: str) -> Availability:
    cls = registry.methods.get(name)
    # What an upstream can do is found out when a request needs it.
    possible = service.engine.capabilities | service.engine.unknown_capabilities
    missing = sorted(cls.needs - possible)
    if getattr(cls, "chat_only", False) and not service.engine.reads_chats:
        return Availability(NO_CHAT)
    relies_on = getattr(cls, "relies_on", None)
    # Where the configuration lacks a value, the engine cannot have the capability to use it.
    if relies_on == "values" and not service.engine.values:
        return Availability("no value is configured; fit one with: infer-align fit value", VALUE)
    if missing:
        hint = service.engine.capability_hints.get(missing[0], "use another engine")
        return Availability(f"the engine lacks {', '.join(missing)}; {hint}")
    if relies_on == "rewards" and not service.default_rewards:
        return _stand_in(service)
    return _judge(service, name)


def _stand_in(service: Service) -> Availability:
    """Return what chooses where no reward is configured, and what one section would add."""
    engine = service.engine
    start = "no reward is configured: "
    if engine.capabilities >= NEEDS:
        return Availability(note=f"{start}{RATIO_KIND} chooses", fix=RATIO)
    if engine.unknown_capabilities >= NEEDS:
        unless = f"{AGREEMENT_KIND} if the upstream cannot read given texts"
        return Availability(note=f"{start}{RATIO_KIND} chooses, or {unless}", fix=RATIO)
    return Availability(note=f"{start}{AGREEMENT_KIND} chooses", fix=RULES)


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
