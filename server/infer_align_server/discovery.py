"""What this server offers: models, methods with their schemas, rewards with their members."""

from __future__ import annotations

from typing import Any

from infer_align.config import registry
from infer_align.config.schema import json_schema
from infer_align.objectives import Ensemble
from infer_align.types import Budget
from infer_align_server.service import Service

# Models are frozen and have no birthday; clients only need a number that does not change.
CREATED = 1_700_000_000


def model(service: Service, name: str) -> dict[str, Any]:
    """One entry of /v1/models; a preset's says what it stands for."""
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "infer-align",
    }
    if name not in service.names:
        root, _, preset = name.rpartition("@")
        entry |= {"root": root, "align": service.config.presets[preset]}
    return entry


def methods(service: Service) -> dict[str, Any]:
    """The answer of /v1/align/methods."""
    plugins = {name: registry.methods.get(name) for name in registry.methods.names()}
    return {
        "model": service.model,
        "capabilities": sorted(service.engine.capabilities),
        "methods": {
            name: _described(cls)
            for name, cls in {**plugins, "ensemble": Ensemble, "budget": Budget}.items()
        },
        "rewards": {
            name: {
                "description": reward.description,
                "members": list(reward.members),
                "attributes": list(reward.attributes),
                "default_weight": service.default_rewards.get(name, 0.0),
            }
            for name, reward in service.rewards.items()
        },
        "values": {
            name: {"description": value.description}
            for name, value in service.engine.values.items()
        },
        "presets": dict(service.config.presets),
    }


def _described(cls: type[Any]) -> dict[str, Any]:
    return {"description": (cls.__doc__ or "").partition("\n")[0], "parameters": json_schema(cls)}
