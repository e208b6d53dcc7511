"""The keeper of stored profiles: the store that the configuration names, if it names one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from infer_align.config.config import Config
from infer_align.errors import AlignError, ConfigError, Unsupported, quote
from infer_align.methods.profile import ProfileSettings
from infer_align.profiles.records import StoredProfile

if TYPE_CHECKING:
    from infer_align.profiles.store import ProfileStore


class UnknownProfile(AlignError):
    """404: the caller has no profile of this name."""

    status = 404
    type = "invalid_request_error"
    code = "profile_not_found"


class ProfileKeeper:
    """The stored profiles of a service."""

    def __init__(self, config: Config) -> None:
        """Prepare the store that the configuration names.

        Raises:
            ConfigError: the URL is wrong, or a package is missing.
        """
        self._settings = config.methods.get(ProfileSettings)
        url = store_url(self._settings)
        self._store = None if url is None else open_store(url)

    @property
    def keeps(self) -> bool:
        """Return True if a store is configured."""
        return self._store is not None

    async def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.close()

    def store(self, param: str) -> ProfileStore:
        """Return the store.

        Raises:
            Unsupported: profiles are not kept.
        """
        if self._store is None:
            raise Unsupported(
                f"{param}: this server keeps no profiles; set [profiles] store, or send the "
                "choices in the request, as align.profile.choices.",
                param=param,
            )
        return self._store

    async def load(self, owner: str, profile_id: str, param: str) -> StoredProfile:
        """Return a stored profile.

        Raises:
            UnknownProfile: the owner has none of this name.
            Unsupported: profiles are not kept.
            StoreFailed: it could not be read.
        """
        stored = await self.store(param).get(owner, profile_id)
        if stored is None:
            raise UnknownProfile(
                f"{param}: the profile {quote(profile_id)} does not exist; the first feedback "
                "makes it.",
                param=param,
            )
        return stored


def existing_profiles(config: Config) -> ProfileKeeper:
    """Return the profiles of a store that exists already, for a command that reads them.

    Raises:
        ConfigError: no store is configured, its file does not exist, or its URL is wrong.
    """
    keeper = ProfileKeeper(config)
    url = store_url(config.methods.get(ProfileSettings))
    if url is None:
        raise ConfigError("[profiles] store: is not set, so there are no stored profiles.")
    from infer_align.profiles.database import sqlite_file  # noqa: PLC0415

    file = sqlite_file(url)
    # Opening it would make it, with empty tables.
    if file is not None and not file.exists():
        raise ConfigError(
            f"[profiles] store: the file {str(file.absolute())!r} does not exist, so there are no "
            "stored profiles; the first feedback to a server makes it. A path that does not begin "
            "with / starts at the folder in which the command runs."
        )
    return keeper


def store_url(settings: ProfileSettings) -> str | None:
    """Return the URL of the store; None if profiles are not kept.

    Raises:
        ConfigError: the environment variable that holds it is not set.
    """
    if settings.store_env is None:
        return settings.store
    url = os.environ.get(settings.store_env, "").strip()
    if not url:
        raise ConfigError(
            f"[profiles] store_env: the environment variable {settings.store_env!r} is not set or "
            "empty; put the URL of the database there."
        )
    return url


def open_store(url: str) -> ProfileStore:
    """Return the store of a URL; it is connected at its first use.

    Raises:
        ConfigError: the URL is wrong, or a package is missing.
    """
    try:
        # SQLAlchemy is in the extra `store`.
        from infer_align.profiles.store import ProfileStore  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"[profiles] store needs the package {error.name!r}; install it with: pip install "
            "'infer-align[store]'"
        ) from error
    return ProfileStore(url)
