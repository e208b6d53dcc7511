"""The source of a value: the strings from which a worker of vLLM, another process, loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from infer_align.errors import ConfigError
from infer_align.values import Value
from infer_align.values.head import HeadValue
from infer_align.values.lookahead import Lookahead, LookaheadValue

# The kind of a value, its path and its other settings.
ValueSource: TypeAlias = Mapping[str, str]


def write_source(name: str, value: Value) -> ValueSource:
    """Return the source of a value.

    Raises:
        ConfigError: the value is of a kind that vLLM's workers cannot load.
    """
    if isinstance(value, HeadValue):
        return {"kind": "head", "path": value.path, "description": value.description}
    if isinstance(value, LookaheadValue):
        config = value.config
        return {
            "kind": "lookahead",
            "path": config.path,
            "head": config.head or "",
            "description": config.description,
            "dtype": config.dtype,
        }
    kind = type(value).__module__.rpartition(".")[2]
    raise ConfigError(
        f'[values.{name}] kind {kind!r} cannot run inside vLLM; use kind = "head" or '
        'kind = "lookahead", or the transformers engine.'
    )


def load_source(source: ValueSource) -> HeadValue | LookaheadValue:
    """Return the value of a source, without reading its files."""
    if source["kind"] == "head":
        return HeadValue(source["path"], source["description"])
    return Lookahead(
        source["path"], source["head"] or None, source["description"], source["dtype"]
    ).load()
