"""Responses of the routes that list what a server offers: models, methods and what they use."""

from __future__ import annotations

from typing import Any

from infer_align.config import registry
from infer_align.config.align import Budget
from infer_align.config.schema import json_schema
from infer_align.methods.guidance import TraitSections
from infer_align.objectives import Ensemble
from infer_align.values import Value
from infer_align_server.availability import Availability, availability
from infer_align_server.service import Service

# The time of creation of every model. OpenAI's API requires one, and clients need only that it
# does not change.
CREATED = 1_700_000_000


def model(service: Service, name: str) -> dict[str, Any]:
    """Return one entry of /v1/models; the entry of a preset contains its `align` object."""
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "infer-align",
    }
    if name not in service.names:
        root, _, preset = name.rpartition("@")
        entry["root"] = root
        entry["align"] = service.config.presets[preset]
        entry["body"] = service.config.preset_bodies.get(preset, {})
    return entry


def methods(service: Service) -> dict[str, Any]:
    """Return the response of /v1/align/methods."""
    parameters: dict[str, type[Any]] = {
        name: registry.methods.get(name) for name in registry.methods.names()
    }
    parameters["ensemble"] = Ensemble
    parameters["budget"] = Budget
    usable = availability(service)
    values = service.engine.values
    traits = service.config.methods.get(TraitSections).entries
    return {
        "model": service.model,
        "capabilities": sorted(service.engine.capabilities),
        # An upstream is asked for these only when a request needs one.
        "unknown_capabilities": sorted(service.engine.unknown_capabilities),
        "methods": {name: _method(cls, usable.get(name)) for name, cls in parameters.items()},
        "rewards": {name: _reward(service, name) for name in service.rewards},
        "values": {name: _value(value) for name, value in values.items()},
        "traits": {name: {"description": trait.description} for name, trait in traits.items()},
        "presets": dict(service.config.presets),
        "preset_bodies": dict(service.config.preset_bodies),
    }


def _method(cls: type[Any], usable: Availability | None) -> dict[str, Any]:
    """Return a method with its parameters, and whether it can be used now."""
    summary = (cls.__doc__ or "").partition("\n")[0]
    usable = usable or Availability()
    return {
        "description": summary,
        "parameters": json_schema(cls),
        "available": usable.reason is None,
        "reason": usable.reason,
        "fix": usable.fix,
    }


def _value(value: Value) -> dict[str, Any]:
    return {"description": value.description, "warnings": list(value.warnings)}


def _reward(service: Service, name: str) -> dict[str, Any]:
    reward = service.rewards[name]
    return {
        "description": reward.description,
        "members": list(reward.members),
        "attributes": list(reward.attributes),
        "default_weight": service.default_rewards.get(name, 0.0),
        "warnings": list(reward.warnings),
    }
