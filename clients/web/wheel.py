"""Put the pages into the wheel, beside the server that sends them.

setuptools packs the files of Python packages, and these files belong to none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

PAGES = Path(__file__).parent
TARGET = Path("infer_align_server/web")
SUFFIXES = {".html", ".css", ".js", ".svg"}


class BuildWithPages(build_py):
    """Build the Python packages, then copy the pages. A checkout is served as it is."""

    def run(self) -> None:
        """Build, unless the installation is editable and reads the checkout."""
        super().run()
        if self.editable_mode:
            return
        for source, target in self._pages().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:  # noqa: FBT001, FBT002 - theirs
        """Return the files that the build makes."""
        outputs: list[str] = super().get_outputs(include_bytecode)
        return [*outputs, *map(str, self._pages().values())]

    def _pages(self) -> dict[Path, Path]:
        """Return {file of the checkout: its place in the build}."""
        files = [path for path in PAGES.rglob("*") if path.suffix in SUFFIXES]
        folder = Path(self.build_lib) / TARGET
        return {path: folder / path.relative_to(PAGES) for path in files}
