"""Read `[presets.<name>]`: an `align` object, and in `body` the fields of a request beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infer_align.config.align import parse_align
from infer_align.errors import AlignError, ConfigError
from infer_align.types import Body

# The key of a preset that holds fields of the request's body.
BODY = "body"
# Fields that make a request what it is, which no preset can choose.
REFUSED = ("align", "messages", "model", "prompt", "stream", "stream_options")
# Both names of the limit on a completion's tokens. A request that names one has set the other.
LIMIT_NAMES = ("max_tokens", "max_completion_tokens")


def split_presets(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Body]]:
    """Return the `align` object of each preset, and the fields of the body that it sets.

    Raises:
        ConfigError: a preset has a wrong name, key or field.
    """
    aligns: dict[str, Any] = {}
    bodies: dict[str, Body] = {}
    for name, preset in table.items():
        section = f"[presets.{name}]"
        if not name.strip():
            raise ConfigError(f"{section} the name {name!r} is empty; requests could not give it.")
        if "@" in name:
            raise ConfigError(
                f"{section} the name of a preset cannot contain '@': the model name "
                "<model>@<preset> would be ambiguous; rename it."
            )
        align = preset
        if isinstance(preset, Mapping):
            align = {key: value for key, value in preset.items() if key != BODY}
            bodies[name] = _checked_body(preset.get(BODY, {}), section)
        check_align(align, section)
        aligns[name] = align
    return aligns, bodies


def check_align(align: object, section: str) -> None:
    """Check an `align` object of the configuration.

    Raises:
        ConfigError: naming the section.
    """
    try:
        parse_align(align)
    except AlignError as error:
        raise ConfigError(f"{section} {error.message}") from error


def _checked_body(body: object, section: str) -> Body:
    if not isinstance(body, Mapping):
        raise ConfigError(
            f"{section} {BODY}: {body!r} is not a table; write the fields of the request into it, "
            "such as body = { temperature = 0.2 }."
        )
    for name in body:
        if name in REFUSED:
            raise ConfigError(
                f"{section} {BODY}.{name}: is set by each request, so a preset cannot set it; "
                "remove it."
            )
    return dict(body)


def fill(body: Body, defaults: Body) -> Body:
    """Return the body with each default that it does not set; null counts as not set."""
    missing: dict[str, Any] = {}
    for name, value in defaults.items():
        names = LIMIT_NAMES if name in LIMIT_NAMES else (name,)
        if all(body.get(each) is None for each in names):
            missing[name] = value
    return {**body, **missing} if missing else body
