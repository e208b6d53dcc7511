"""Return the folder of a model, whatever it is packed in: a zip file, a GGUF file, or nothing.

An archive is unpacked once into the cache, by its content.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path, PurePosixPath

from infer_align.checkpoints.folders import cached_folder
from infer_align.checkpoints.gguf import convert_gguf, find_gguf
from infer_align.demo.locate import locate
from infer_align.errors import ConfigError

ARCHIVE = ".zip"
CONFIG = "config.json"
# The unpacked files of an archive may be this many times as large as the archive, no more.
LARGEST_RATIO = 100


def model_folder(model: str, field: str) -> str:
    """Return what the `from_pretrained` of transformers takes for a configured model.

    Args:
        model: a name that `locate` reads; a zip file with a model's files, or a GGUF file too.
        field: the configuration field that names the model, for error messages.

    Raises:
        ConfigError: there is no such file, or it cannot be unpacked.
    """
    path = locate(model)
    if path.endswith(ARCHIVE):
        return str(_unpacked(Path(path), field))
    gguf = find_gguf(path, field)
    if gguf is None:
        return path
    return str(convert_gguf(gguf, "auto", field, lambda _text: None))


def _unpacked(archive: Path, field: str) -> Path:
    """Return the folder with the model of a zip file."""
    try:
        with archive.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        key = f"zip/{archive.stem}-{digest[:16]}"
        folder = cached_folder(key, lambda folder: _extract(archive, folder))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{field}: {str(archive)!r} cannot be unpacked: {reason}.") from error
    return folder


def _extract(archive: Path, folder: Path) -> None:
    """Write the model of an archive into an empty folder, without the folders around it.

    Raises:
        ValueError: the archive holds no model, or is no honest archive.
    """
    with zipfile.ZipFile(archive) as opened:
        names = [entry.filename for entry in opened.infolist() if not entry.is_dir()]
        size = sum(entry.file_size for entry in opened.infolist())
        if size > LARGEST_RATIO * archive.stat().st_size:
            raise ValueError(f"its files would take {size:,} bytes")
        base = _base(names)
        for name in names:
            inner = PurePosixPath(name)
            if not inner.is_relative_to(base) or ".." in inner.parts:
                continue
            target = folder / inner.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(opened.read(name))


def _base(names: list[str]) -> PurePosixPath:
    """Return the folder of an archive in which the model's files lie."""
    folders: list[PurePosixPath] = []
    for name in names:
        path = PurePosixPath(name)
        if path.name == CONFIG:
            folders.append(path.parent)
    if not folders:
        raise ValueError(f"it has no {CONFIG}, so it holds no model")
    # The pooling of a sentence encoder has a configuration too, one folder below.
    return min(folders, key=lambda folder: len(folder.parts))
