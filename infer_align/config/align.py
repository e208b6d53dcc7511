"""Parse an `align` object: from the body of a request, or from a preset of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from infer_align.config import registry
from infer_align.config.schema import join, parse
from infer_align.errors import InvalidRequest, nearest, quote
from infer_align.methods import Method
from infer_align.objectives import Ensemble

Details = Literal["none", "scores", "candidates"]
# Keys of `align` that are not methods.
SETTINGS = ("preset", "rewards", "ensemble", "budget", "details")
# Above this weight a weighted sum could overflow, and an infinite objective compares nothing.
MAX_WEIGHT = 1e9


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the cost of one answer."""

    completion_tokens: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "Refuse a plan whose worst case exceeds this many tokens: sampled for "
            "candidates and by judges, and read in the contexts of guidance.",
        },
    )
    deadline_seconds: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "description": "Return the best answer so far after this many seconds, marked partial.",
        },
    )


def parameter_classes() -> dict[str, type[Any]]:
    """Return the keys of `align` that have parameters, each with the dataclass of them."""
    classes: dict[str, type[Any]] = {}
    for name in registry.methods.names():
        classes[name] = registry.methods.get(name)
    classes["ensemble"] = Ensemble
    classes["budget"] = Budget
    return classes


@dataclass(frozen=True, slots=True)
class Align:
    """A parsed `align` object."""

    methods: Mapping[str, Method] = field(default_factory=dict)
    rewards: Mapping[str, float] | None = None  # reward -> weight; None: the configured default
    # reward -> the parameters that the request sets
    reward_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ensemble: Ensemble = field(default_factory=Ensemble)
    budget: Budget = field(default_factory=Budget)
    details: Details = "scores"
    path: str = "align"  # where the object stands in the request body, for error messages


def parse_align(
    value: object,
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    preset: str | None = None,
    path: str = "align",
) -> Align:
    """Parse an `align` object.

    Args:
        value: the JSON object.
        presets: named `align` objects of the configuration.
        preset: the preset to start from; `align.preset` wins over it.
        path: where the object stands in the body; "" if its keys are the body's own.

    Raises:
        InvalidRequest: the first wrong field, by its dotted path.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"{path}: {quote(value)} is not an object; allowed keys: {', '.join(_keys())}.",
            param=path,
        )
    _check_keys(value, path)
    settings = _merge_preset(dict(value), presets, preset, path)
    _check_keys(settings, path)
    methods: dict[str, Method] = {}
    for key, parameters in settings.items():
        if key not in SETTINGS:
            methods[key] = parse(registry.methods.get(key), parameters, join(path, key))
    rewards = None
    reward_parameters: dict[str, dict[str, Any]] = {}
    if "rewards" in settings:
        rewards, reward_parameters = _parse_rewards(settings["rewards"], join(path, "rewards"))
    # Most requests have neither, and to parse an empty object takes as long as any other.
    ensemble, budget = Ensemble(), Budget()
    if "ensemble" in settings:
        ensemble = parse(Ensemble, settings["ensemble"], join(path, "ensemble"))
    if "budget" in settings:
        budget = parse(Budget, settings["budget"], join(path, "budget"))
    return Align(
        methods=methods,
        rewards=rewards,
        reward_parameters=reward_parameters,
        ensemble=ensemble,
        budget=budget,
        details=_parse_details(settings.get("details", "scores"), join(path, "details")),
        path=path,
    )


def _check_keys(settings: Mapping[str, Any], path: str) -> None:
    """Refuse a key that is no method and no setting, whatever its value."""
    keys = _keys()
    for key in settings:
        if key not in keys:
            raise InvalidRequest(
                f"{join(path, key)}: no such key; {nearest(key, keys)}",
                param=join(path, key),
                code="unknown_field",
            )


def _keys() -> list[str]:
    return sorted({*registry.methods.names(), *SETTINGS})


def _merge_preset(
    settings: dict[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None,
    path: str,
) -> dict[str, Any]:
    """Return the preset's keys overridden by the request's; a null takes a key away."""
    requested = settings.pop("preset", None)
    name = preset if requested is None else requested
    base: Mapping[str, Any] = {}
    if name is not None:
        if not isinstance(name, str) or name not in presets:
            raise InvalidRequest(
                f"{join(path, 'preset')}: {quote(name)} is not configured; "
                f"{nearest(str(name), presets)}",
                param=join(path, "preset"),
            )
        base = presets[name]
    merged = {**base, **settings}
    return {key: value for key, value in merged.items() if value is not None}


def _parse_rewards(value: object, path: str) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the weight of each reward, and the parameters of those that have some.

    A reward is a number, its weight, or an object with a weight (1 if it names none) and
    parameters. The parameters are checked when the reward is looked up.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(
            f"{path}: {quote(value)} is not an object; allowed: {{reward name: weight}}.",
            param=path,
        )
    weights: dict[str, float] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for key, reward in value.items():
        name = str(key)
        if not isinstance(reward, Mapping):
            weights[name] = _parse_weight(reward, join(path, name))
            continue
        fields = dict(reward)
        weights[name] = _parse_weight(fields.pop("weight", 1.0), join(path, f"{name}.weight"))
        if fields:
            parameters[name] = fields
    return weights, parameters


def _parse_weight(weight: Any, path: str) -> float:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if is_number and 0 <= weight <= MAX_WEIGHT:
        return float(weight)
    raise InvalidRequest(
        f"{path}: {quote(weight)} is not allowed; a weight is a number from 0 to "
        f'{MAX_WEIGHT:.0e}. A reward with parameters is an object: {{"weight": 1, "<parameter>": '
        "...}. To prefer less of something, use a reward that scores its absence.",
        param=path,
    )


def _parse_details(value: object, path: str) -> Details:
    for allowed in get_args(Details):
        if value == allowed:
            details: Details = allowed
            return details
    raise InvalidRequest(
        f"{path}: {quote(value)} is not allowed; allowed: {', '.join(get_args(Details))}.",
        param=path,
    )
