"""Where a model's files are: the embedded demo, a folder, or a hub id."""

from __future__ import annotations

from infer_align import demo
from infer_align.errors import ConfigError


def locate(model: str) -> str:
    """What transformers' `from_pretrained` takes for a configured model.

    "demo" is the embedded language model, "demo/<asset>" another of its files; anything else is taken as it is.

    Raises:
        ConfigError: the demo has no such asset.
    """
    name, _, asset = model.partition("/")
    if name != "demo":
        return model
    if asset:
        # The demo's reward models have an architecture of their own: transformers has to know it before it loads one.
        from infer_align.demo.bag import register  # noqa: PLC0415 - imports torch

        register()
    try:
        return str(demo.path(asset or demo.LM))
    except FileNotFoundError as error:
        raise ConfigError(f"model: {model!r} cannot be found: {error}") from None
