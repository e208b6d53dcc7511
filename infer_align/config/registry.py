"""Find plugins by their file name.

Every module of `methods/`, `rewards/`, `engines/` and `values/` is a plugin, and so is every entry
point of the groups `infer_align.methods`, `infer_align.rewards` and so on. A plugin module holds
its class in a variable `plugin`; the module's name is its id. Listing the plugins imports none of
them.
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

    Another package adds a reward with an entry point `name = "its.module"` in the group
    `infer_align.rewards`.
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
        names = set(self._external)
        for module in pkgutil.iter_modules(paths):
            # Modules that start with an underscore support plugins and are none themselves.
            if not module.name.startswith("_"):
                names.add(module.name)
        return tuple(sorted(names))

    def names(self) -> list[str]:
        """Return the sorted ids of the plugins."""
        return list(self._names)

    def get(self, name: str) -> type[Any]:
        """Import the plugin class called `name`.

        Raises:
            ConfigError: there is no such plugin, or a package that it needs is not installed.
        """
        if name not in self._names:
            raise ConfigError(
                f"there is no {name!r} among the {self.folder}; {nearest(name, self._names)}"
            )
        try:
            if name in self._external:
                module = self._external[name].load()
            else:
                module = importlib.import_module(f"infer_align.{self.folder}.{name}")
        except ImportError as error:
            raise ConfigError(
                f"{self.folder}: {name!r} needs the package {error.name!r}; install the extra that "
                "brings it, such as: pip install 'infer-align[local]'"
            ) from error
        plugin: type[Any] = module.plugin
        return plugin


methods = Registry("methods")
rewards = Registry("rewards")
engines = Registry("engines")
values = Registry("values")
