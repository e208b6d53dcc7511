"""The model and the preset that a request names."""

from __future__ import annotations

from dataclasses import dataclass

from infer_align.errors import Unsupported


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
