"""Plugins by file name: every module of `methods/`, `rewards/`, `engines/` and `values/`, and entry points of the same group.

A plugin module holds its class in a variable `plugin`; the module's name is its id. Listing imports nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from infer_align.errors import ConfigError, nearest


class Registry:
    """The plugins of one folder of the package, such as "rewards".

    A package adds to it with an entry point `name = "its.module"` in the group `infer_align.rewards`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @cached_property
    def _external(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"infer_align.{self.folder}")}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        spec = importlib.util.find_spec(f"infer_align.{self.folder}")
        paths = spec.submodule_search_locations if spec else None
        found = {m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_")}
        return tuple(sorted(found | self._external.keys()))

    def names(self) -> list[str]:
        """Sorted ids, looked up once a process. Modules that start with an underscore are support code, not plugins."""
        return list(self._names)

    def get(self, name: str) -> type[Any]:
        """The plugin class called `name`, imported now.

        Raises:
            ConfigError: no such plugin, or the packages it needs are not installed.
        """
        if name not in self.names():
            raise ConfigError(
                f"{self.folder}: {name!r} is not one of them; {nearest(name, self.names())}"
            )
        try:
            if name in self._external:
                module = self._external[name].load()
            else:
                module = importlib.import_module(f"infer_align.{self.folder}.{name}")
        except ImportError as error:
            raise ConfigError(
                f"{self.folder}: {name!r} needs the package {error.name!r}; install the extra that brings it, "
                f"such as: pip install 'infer-align[local]'"
            ) from error
        plugin: type[Any] = module.plugin
        return plugin


methods = Registry("methods")
rewards = Registry("rewards")
engines = Registry("engines")
values = Registry("values")
