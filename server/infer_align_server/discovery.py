"""Responses of the routes that list what a server offers: models, methods and what they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infer_align.config.align import parameter_classes
from infer_align.config.schema import json_schema
from infer_align.flow.scorers import reward_names
from infer_align.methods.dpa import Prompting
from infer_align.methods.guidance import TraitSections
from infer_align.values import Value
from infer_align_server.availability import Availability, availability
from infer_align_server.service import Service

# The kinds of names that a request may add to.
OPEN_NAMES = {"traits"}


def model(service: Service, name: str) -> dict[str, Any]:
    """Return one entry of /v1/models; the entry of a preset contains its `align` object.

    OpenAI's API requires a time of creation. It is the time at which the server started.
    """
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.start_time,
        "owned_by": "infer-align",
    }
    parts = service.split_preset(name)
    if parts is not None:
        entry["root"], preset = parts
        entry["align"] = service.config.presets[preset]
        entry["body"] = service.config.preset_bodies.get(preset, {})
    return entry


def methods(service: Service) -> dict[str, Any]:
    """Return the response of /v1/align/methods."""
    usable = availability(service)
    values = service.engine.values
    names = _names(service)
    ranges = service.config.methods.get(Prompting).trained_range
    described: dict[str, Any] = {}
    for name, cls in parameter_classes().items():
        described[name] = _method(cls, usable.get(name), names, ranges)
    return {
        "model": service.model,
        "capabilities": sorted(service.engine.capabilities),
        # An upstream is asked for these only when a request needs one.
        "unknown_capabilities": sorted(service.engine.unknown_capabilities),
        # What the model lacks, such as a chat template that shows tools.
        "notes": list(service.engine.notes),
        "methods": described,
        "rewards": {name: _reward(service, name) for name in service.rewards},
        "values": {name: _value(value) for name, value in values.items()},
        "profiles": {
            "kept": service.profiles.keeps,
            "traits": dict(service.personaliser.settings.traits),
        },
        "traits": {name: {"description": text} for name, text in _traits(service).items()},
        "presets": dict(service.config.presets),
        "preset_bodies": dict(service.config.preset_bodies),
        "limits": service.config.limits.numbers(),
    }


def _method(
    cls: type[Any],
    usable: Availability | None,
    names: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return a method with its parameters, and whether it can be used now."""
    summary = (cls.__doc__ or "").partition("\n")[0]
    usable = usable or Availability()
    stage = getattr(cls, "stage", None)
    return {
        "description": summary,
        "stage": None if stage is None else stage.name.lower(),
        "parameters": _with_names(json_schema(cls), names, ranges),
        "available": usable.reason is None,
        "reason": usable.reason,
        "fix": usable.fix,
        "note": usable.note,
    }


def _with_names(
    schema: dict[str, Any],
    names: Mapping[str, Sequence[str]],
    ranges: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return the schema of a method with the names of this server in it.

    The metadata of a field says by "x-names" what its keys name, such as values. A request may
    bring traits of its own, so configured traits are examples.
    """
    if isinstance(schema.get("additionalProperties"), Mapping):
        # The method's own keys name rewards.
        rewards = {"x-names": "rewards", "propertyNames": {"examples": list(names["rewards"])}}
        schema = {**schema, **rewards}
    properties = dict(schema.get("properties", {}))
    for key, parameter in properties.items():
        kind = parameter.get("x-names")
        if kind is not None:
            keyword = "examples" if kind in OPEN_NAMES else "enum"
            properties[key] = {**parameter, "propertyNames": {keyword: list(names[kind])}}
        if kind == "attributes":
            properties[key]["x-trained-range"] = {name: list(r) for name, r in ranges.items()}
    return {**schema, "properties": properties}


def _names(service: Service) -> dict[str, list[str]]:
    """Return what the keys of a parameter may name, by its kind in "x-names"."""
    attributes = list(service.config.methods.get(Prompting).attributes)
    for reward in service.rewards.values():
        attributes += reward.attributes
    values = service.engine.values
    return {
        "attributes": list(dict.fromkeys(attributes)),
        "estimates": [name for name, value in values.items() if value.estimates_states],
        "rewards": reward_names(service.rewards),
        "traits": list(_traits(service)),
        "values": list(values),
    }


def _traits(service: Service) -> dict[str, str]:
    """Return the description of each configured trait."""
    entries = service.config.methods.get(TraitSections).entries
    return {name: trait.description for name, trait in entries.items()}


def _value(value: Value) -> dict[str, Any]:
    return {
        "description": value.description,
        "warnings": list(value.warnings),
        "summary": value.summary,
    }


def _reward(service: Service, name: str) -> dict[str, Any]:
    reward = service.rewards[name]
    return {
        "description": reward.description,
        "members": list(reward.members),
        "attributes": list(reward.attributes),
        "default_weight": service.default_rewards.get(name, 0.0),
        "parameters": None if reward.parameters is None else json_schema(reward.parameters),
        "cost": reward.cost,
        "warnings": list(reward.warnings),
    }
