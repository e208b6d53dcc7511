"""Locate a model: the embedded demo, a folder, or a Hugging Face id."""

from __future__ import annotations

from infer_align import demo
from infer_align.errors import ConfigError


def locate(model: str) -> str:
    """Return what the `from_pretrained` of transformers takes for a configured model.

    "demo" is the embedded language model, "demo/<asset>" another file of the demo. Every other name
    is returned as it is.

    Raises:
        ConfigError: the demo has no such asset.
    """
    name, _, asset = model.partition("/")
    if name != "demo":
        return model
    if asset:
        # transformers must know the architecture of the demo's reward models before it loads one.
        from infer_align.demo.bag import register  # noqa: PLC0415 - imports torch

        register()
    try:
        return str(demo.path(asset or demo.LM))
    except FileNotFoundError as error:
        raise ConfigError(f"model: {model!r} cannot be found: {error}") from None
