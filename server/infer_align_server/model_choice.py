"""The model and the preset that a request names."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from infer_align.errors import InvalidRequest, UnknownModel, Unsupported, nearest, quote


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model and preset of one request.

    Attributes:
        name: The name in the request, or of the first model; the response repeats it.
        engine_model: The engine's name of the model.
        preset: The preset after "@" in the name, if there is one.
    """

    name: str
    engine_model: str
    preset: str | None = None

    @property
    def api_name(self) -> str:
        """Return the name of the model in the API, without the preset."""
        return self.name if self.preset is None else self.name.removesuffix(f"@{self.preset}")


@dataclass(frozen=True, slots=True)
class ModelNames:
    """The names that requests may give to models.

    Attributes:
        models: {name in the API: name in the engine} of each model.
        presets: The names of the presets.
    """

    models: Mapping[str, str]
    presets: Collection[str]

    def every(self) -> list[str]:
        """Return the name of each model, then of each model with each preset."""
        pairs = itertools.product(self.models, self.presets)
        named = (f"{name}@{preset}" for name, preset in pairs)
        return list(dict.fromkeys([*self.models, *named]))

    def split(self, name: str) -> tuple[str, str] | None:
        """Return the model and the preset of a name such as "demo@careful"; None for a model.

        A preset wins over a model of the same name, which another server of this kind may list.
        """
        model, separator, preset = name.rpartition("@")
        if separator and preset in self.presets and model in self.models:
            return model, preset
        return None

    def choose(self, name: object) -> ModelChoice:
        """Return the model and the preset of a name.

        Raises:
            InvalidRequest: The name is not a string.
            UnknownModel: There is no such model, or no such preset.
        """
        if not isinstance(name, str):
            raise InvalidRequest(
                f"model: {quote(name)} is not allowed; must be a string.", param="model"
            )
        parts = self.split(name)
        if parts is not None:
            return ModelChoice(name, self.models[parts[0]], parts[1])
        if name in self.models:
            return ModelChoice(name, self.models[name])
        raise UnknownModel(
            f"model: {quote(name)} does not exist; {nearest(name, self.every())}", param="model"
        )


def refuse_preset(model: ModelChoice) -> None:
    """Refuse a model with a preset, on a route that the flow does not answer.

    Raises:
        Unsupported: The request names a preset.
    """
    if model.preset is not None:
        raise Unsupported(
            f"model: the preset {model.preset!r} is only allowed on /v1/chat/completions and "
            "/v1/completions; leave out the part from '@' here.",
            param="model",
        )
