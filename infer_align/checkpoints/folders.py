"""A cache of folders that are expensive to make.

An entry is made in a temporary folder and renamed, so an entry is never half written. A lock per
entry lets two processes that start together share the work: `filelock`, which transformers itself
needs. A list of sizes and digests finds an entry that was damaged later; it is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

# The list of an entry's files, as a JSON object of name -> [size in bytes, digest].
LIST = "files.json"
# A digest covers the beginning of a file: all of a small file, the header of a large one.
DIGEST_BYTES = 2**24


def cache_folder() -> Path:
    """Return the folder of all entries: under XDG_CACHE_HOME, else under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "infer-align"


def cached_folder(key: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of an entry. It is made if it does not exist or is damaged.

    Args:
        key: the name of the entry.
        make: writes the entry's files into an empty folder.

    Raises:
        OSError: the cache cannot be written.
    """
    entry = cache_folder() / key
    if is_whole(entry):
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):
        # Another process may have made it meanwhile.
        if not is_whole(entry):
            _make(entry, make)
    return entry


def _make(entry: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(entry, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".part", dir=entry.parent))
    try:
        make(temporary)
        (temporary / LIST).write_text(json.dumps(_describe(temporary)))
        temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(entry: Path) -> bool:
    """Return True if the entry exists and its files are those that were written."""
    try:
        expected = json.loads((entry / LIST).read_text())
        return bool(expected == _describe(entry))
    except (OSError, ValueError):
        return False


def _describe(folder: Path) -> dict[str, list[int | str]]:
    """Return the size and the digest of each file of a folder, without the list itself."""
    files: dict[str, list[int | str]] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if name != LIST and file.is_file():
            with file.open("rb") as stream:
                digest = hashlib.sha256(stream.read(DIGEST_BYTES)).hexdigest()
            files[name] = [file.stat().st_size, digest]
    return files
