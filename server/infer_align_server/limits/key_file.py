"""The file of API keys: named, as hashes, with scopes, and read again when it changes."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Annotated, Literal, get_args

from annotated_types import Len
from pydantic import AwareDatetime, Field

from infer_align.config.schema import parse
from infer_align.config.toml_text import parse_toml
from infer_align.errors import ConfigError, quote

log = logging.getLogger("infer_align")

Scope = Literal["generate", "score", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
# A request looks at the time of the file's last change this often, in seconds.
CHECK_SECONDS = 1.0
KEY_PREFIX = "ia-"
KEY_BYTES = 32
_FIX = "`infer-align keys new NAME` prints an entry"


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One API key of the file.

    Entries of the same name are one caller: they share limits and profiles. So a key is replaced by
    adding a second entry, and by removing the first one once every client has the new key.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = field(
        metadata={"description": "The caller: in limits, in the log, and as owner of profiles."}
    )
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = field(
        metadata={"description": "SHA-256 of the key, in hexadecimal."}
    )
    scopes: Annotated[tuple[Scope, ...], Len(min_length=1)] = field(
        default=SCOPES, metadata={"description": "What the key may do. Default: everything."}
    )
    expires: AwareDatetime | None = field(
        default=None,
        metadata={"description": "When the key ends, with a time zone. Default: never."},
    )

    @property
    def is_valid(self) -> bool:
        """Return True until the key expires."""
        return self.expires is None or datetime.now(UTC) < self.expires


@dataclass(frozen=True, slots=True)
class _Content:
    keys: Annotated[tuple[KeyEntry, ...], Len(min_length=1)] = field(
        metadata={"description": f"The keys, as [[keys]] sections; {_FIX}."}
    )


class KeyFile:
    """The keys of a file. A file that becomes unreadable or wrong leaves the keys as they were."""

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, or an entry is wrong.
        """
        self._path = Path(path)
        self._state = self._file_state()
        self._entries = _read(self._path)
        self._checked_at = monotonic()

    def entries(self) -> tuple[KeyEntry, ...]:
        """Return the keys, with those that a recent change of the file has brought."""
        now = monotonic()
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            if self._file_state() != self._state:
                self.reload()
        return self._entries

    def reload(self) -> None:
        """Read the file again."""
        # Before reading: a change in between is then read the next time.
        self._state = self._file_state()
        try:
            self._entries = _read(self._path)
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error.message)
            return
        log.info("API keys: read again", extra={"keys": len(self._entries)})

    def _file_state(self) -> tuple[int, int, int]:
        """Return what changes whenever the file does; zeros if there is none."""
        try:
            status = os.stat(self._path)
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_size, status.st_mtime_ns)


def _read(path: Path) -> tuple[KeyEntry, ...]:
    """Return the entries of a file.

    Raises:
        ConfigError: the file cannot be read, or an entry is wrong.
    """
    try:
        table = parse_toml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"[server] api_keys_file: {quote(str(path))} cannot be read: {reason}; {_FIX}."
        ) from None
    try:
        return parse(_Content, table, "", ConfigError).keys
    except ConfigError as error:
        raise ConfigError(f"[server] api_keys_file: {path}: {error.message}") from None


def new_key() -> tuple[str, str]:
    """Return a random key and its hash."""
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
