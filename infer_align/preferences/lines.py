"""Read the JSON objects of a file, and keep the reason for each line that gives nothing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer_align.errors import ConfigError, quote

_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How a compressed file begins, its suffix, and the function that reads it.
_COMPRESSIONS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", ".gz", gzip.decompress),
    (b"\xfd7zXZ\x00", ".xz", lzma.decompress),
    (b"BZh", ".bz2", bz2.decompress),
)
# How a file of another kind begins, and what to do about it.
_OTHER_FILES = (
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; decompress it, or compress it by gzip"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"PAR1", "is a Parquet file; write its rows as JSON lines"),
)


class BadLineError(ValueError):
    """A line that gives no pair, with the reason."""


@dataclass(slots=True)
class Problems:
    """The problems of a file. As a context manager it records the problem of one line."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    sampled: int = 0  # pools of which not every pair is read
    same_texts: int = 0  # pairs of a pool with one text and two ratings
    line: int = 0

    def at(self, line: int) -> Problems:
        """Return this object as the context of a line."""
        self.line = line
        return self

    def add(self, reason: str) -> None:
        """Record why the line gives nothing."""
        self.lines.append((self.line, reason))

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: object, _traceback: object) -> bool:
        if isinstance(error, BadLineError):
            self.add(str(error))
            return True
        return False

    def sentences(self) -> tuple[str, ...]:
        """Return the problems in the order of the file."""
        return tuple(f"line {line}: {reason}" for line, reason in sorted(self.lines))


def json_objects(path: Path, problems: Problems) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the JSON objects of a file with the number of their line.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_content(path)
    single = _single(content)
    if single is not None:
        yield from enumerate(single, 1)
        return
    for line, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        with problems.at(line):
            yield line, _record(text)


def read_content(path: Path) -> bytes:
    """Return the bytes of a file without a byte order mark; it may be compressed (.gz, .xz, .bz2).

    Its lines end with LF or CR LF, or with CR, which becomes LF.

    Raises:
        ConfigError: the file cannot be read, or is of a kind that has no lines of JSON.
    """
    try:
        content = _decompressed(path.suffix, path.read_bytes())
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be read: {reason}.") from error
    for beginning, problem in _OTHER_FILES:
        if content.startswith(beginning):
            raise ConfigError(f"{path} {problem}.")
    content = content.removeprefix(_BYTE_ORDER_MARK)
    # Old systems of Apple's end lines with CR. JSON has it between values only.
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _decompressed(suffix: str, content: bytes) -> bytes:
    """Decompress a file that begins like a compressed one, or is called like one."""
    for beginning, name, decompress in _COMPRESSIONS:
        if content.startswith(beginning) or suffix == name:
            return decompress(content)
    return content


def _single(content: bytes) -> list[Mapping[str, Any]] | None:
    """Return the objects of a file that is one JSON value over several lines; None if it is not."""
    stripped = content.strip()
    is_list = stripped.startswith(b"[")
    if not is_list and not re.match(rb"\{\s*\n", stripped):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(each, dict) for each in values) else None


def _record(text: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadLineError("is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadLineError(f"is {quote(value)}; must be a JSON object")
    return value


def nothing_to_read(path: Path, sought: str, problems: Problems) -> ConfigError:
    """Return the error of a file without a single pair or pool."""
    reasons = problems.sentences()
    if not reasons:
        return ConfigError(f"{path}: is empty; each line must be a JSON object with a {sought}.")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return ConfigError(f"{path}: has no {sought}: {reasons[0]}{more}.")
