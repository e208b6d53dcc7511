"""The JSON schema of `align`, as this server is configured.

The dataclasses of the methods know the types and bounds of their parameters. This file adds what
only a running server knows: the names of its rewards, attributes, values and traits, its limits,
and whether it keeps profiles. Rules between two keys, such as "rps needs a direction", are left to
the server: a preset may hold one of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import get_args

from infer_align.config import registry
from infer_align.config.align import MAX_WEIGHT, Budget, Details
from infer_align.config.schema import json_schema
from infer_align.flow.scorers import reward_names
from infer_align.methods import Method
from infer_align.methods.dpa import Prompting
from infer_align.methods.trust_judge import AUTO, MAX_ASPECTS
from infer_align.objectives import Ensemble
from infer_align.rewards import Reward
from infer_align.rewards.trust_judge import TrustJudgeReward
from infer_align.types import Kind
from infer_align_server.service import Service
from infer_align_server.wire.response_schemas import STRING, Schema, nullable, ref

# The kinds of names, in "x-names" of a parameter, that stand for configured values.
_NAMES_OF_VALUES = frozenset({"values", "estimates"})
_NULL: Schema = {"type": "null"}


def align_schema(service: Service, kind: Kind) -> Schema:
    """Return the schema of `align` for one kind of request.

    It has the methods that the engine supports, and the settings.
    """
    properties: dict[str, Schema] = {}
    possible = service.engine.capabilities | service.engine.unknown_capabilities
    for name in registry.methods.names():
        method = registry.methods.get(name)
        if kind == "completion" and getattr(method, "chat_only", False):
            properties[name] = _NULL
        elif method.needs <= possible:
            narrowed = _narrowed(name, _method_schema(method, service), service)
            properties[name] = nullable(narrowed)
    presets = list(service.config.presets)
    properties["preset"] = nullable({"enum": presets}) if presets else _NULL
    properties["rewards"] = nullable(_rewards(service.rewards))
    properties["ensemble"] = nullable(json_schema(Ensemble))
    properties["budget"] = nullable(json_schema(Budget))
    properties["details"] = nullable({"enum": list(get_args(Details))})
    return {"type": "object", "properties": properties, "additionalProperties": False}


def judge_settings(schema: Schema) -> Schema:
    """Return a schema with the fields of `TrustJudge`, and which of them exclude each other."""
    properties = dict(schema["properties"])
    one_counts = {"contains": {"properties": {"weight": {"exclusiveMinimum": 0}}}}
    distinct = {"maxItems": MAX_ASPECTS, "maxProperties": MAX_ASPECTS, "uniqueItems": True}
    properties["principles"] = {**properties["principles"], **one_counts}
    properties["aspects"] = {**properties["aspects"], **distinct}
    principles = having("principles", {"type": "array"})
    aspects = having("aspects", {"type": ["array", "object"], "minItems": 1, "minProperties": 1})
    rubric = having("rubric", STRING)
    written = having("rubric", {"type": "string", "not": {"const": AUTO}})
    replaced = {"anyOf": [principles, aspects, written]}
    exclusive = [
        {"not": {"allOf": [having("criteria", STRING), replaced]}},
        {"not": {"allOf": [aspects, {"anyOf": [principles, rubric]}]}},
    ]
    return {**schema, "properties": properties, "allOf": exclusive}


def having(name: str, value: Schema | None = None) -> Schema:
    """Return the schema of an object that has a field with such a value; by default not null."""
    return {"required": [name], "properties": {name: value or {"not": _NULL}}}


def _method_schema(method: type[Method], service: Service) -> Schema:
    """Return the schema of a method. The number of candidates is at most that of the server."""
    schema = json_schema(method)
    fan_out = getattr(method, "fan_out", None)
    if fan_out is None:
        return schema
    limit = service.config.limits.max_candidates
    number = schema["properties"][fan_out]
    bounded = {**number, "maximum": min(limit, number.get("maximum", limit))}
    properties = {**schema["properties"], fan_out: bounded}
    required = [*schema.get("required", ())]
    if number.get("default", 1) > limit:
        required.append(fan_out)
    return {**schema, "properties": properties, "required": required}


def _narrowed(name: str, schema: Schema, service: Service) -> Schema:
    """Return the schema of a method with the names that this server knows."""
    rewards = reward_names(service.rewards)
    properties = schema["properties"]
    if name == "dpa":
        return {**schema, "properties": {**properties, "direction": _direction(schema, service)}}
    if name == "compose":
        # Each key that is no parameter is the name of a reward.
        gates = _named(properties["gates"], rewards)
        named = _named(schema, [*rewards, "gates"])
        return {**named, "properties": {**properties, "gates": gates}}
    if name == "select":
        order = {**properties["order"], "uniqueItems": True}
        return {**schema, "properties": {**properties, "order": order}}
    if name == "profile":
        return _profile(schema, service)
    if name == "trust_judge":
        return judge_settings(schema)
    return {**schema, "properties": _with_values(properties, service)}


def _with_values(properties: Mapping[str, Schema], service: Service) -> Mapping[str, Schema]:
    """Return the parameters of a method; those that name values may name the configured ones."""
    if not service.engine.values:
        return properties
    narrowed = dict(properties)
    for name, parameter in properties.items():
        if parameter.get("x-names") in _NAMES_OF_VALUES:
            narrowed[name] = _named(parameter, service.engine.values)
    return narrowed


def _direction(schema: Schema, service: Service) -> Schema:
    """Return the schema of a direction: known attributes, at least one with a weight."""
    direction = _named(schema["properties"]["direction"], attributes(service))
    return {**direction, "not": {"additionalProperties": {"const": 0}}}


def _profile(schema: Schema, service: Service) -> Schema:
    """Return the schema of a profile: known rewards and attributes, conversations as messages."""
    properties = dict(schema["properties"])
    names = [*reward_names(service.rewards), *attributes(service)]
    properties["weights"] = _named(properties["weights"], names)
    if not service.profiles.keeps:
        properties["id"] = _NULL
    choice = schema["$defs"]["Choice"]
    conversation = {**choice["properties"], "messages": nullable(ref("Messages"))}
    definitions = {**schema["$defs"], "Choice": {**choice, "properties": conversation}}
    return {**schema, "properties": properties, "$defs": definitions}


def attributes(service: Service) -> list[str]:
    """Return the attributes that a direction may name."""
    names = dict.fromkeys(service.config.methods.get(Prompting).attributes)
    for reward in service.rewards.values():
        names |= dict.fromkeys(reward.attributes)
    return [*names]


def _named(schema: Schema, names: Iterable[str]) -> Schema:
    """Return the schema of an object that has these keys alone."""
    return {**schema, "propertyNames": {"enum": [*names]}}


def _rewards(rewards: Mapping[str, Reward]) -> Schema:
    names = reward_names(rewards)
    schemas = {name: _reward(rewards[name.partition(".")[0]]) for name in names}
    return {"type": "object", "propertyNames": {"enum": names}, "properties": schemas}


def _reward(reward: Reward) -> Schema:
    """Return the schema of one reward in `align.rewards`: its weight, or an object.

    A reward that requires a parameter has no plain weight.
    """
    weight: Schema = {"type": "number", "minimum": 0, "maximum": MAX_WEIGHT}
    parameters: Schema = {} if reward.parameters is None else json_schema(reward.parameters)
    if isinstance(reward, TrustJudgeReward):
        parameters = judge_settings(parameters)
    properties = {**parameters.get("properties", {}), "weight": weight}
    required = parameters.get("required", [])
    with_parameters: Schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    if "allOf" in parameters:
        with_parameters["allOf"] = parameters["allOf"]
    return with_parameters if required else {"anyOf": [weight, with_parameters]}
