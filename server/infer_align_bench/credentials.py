"""API keys. A key is read from the environment and sent to its own server only."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its source."""

    value: str | None = field(default=None, repr=False)
    # Environment variable of the key; None: the endpoint gets no key.
    env: str | None = None
    # Command-line flag that names the variable, for error messages.
    flag: str = "--api-key-env"

    @classmethod
    def from_environment(cls, env: str | None, flag: str = "--api-key-env") -> ApiKey:
        """Read the key from the environment variable `env`, if it is set and not empty."""
        value = os.environ.get(env) if env else None
        return cls(value or None, env, flag)


def same_server(first_url: str, second_url: str) -> bool:
    """Return True if both addresses have the same host and port, so that they share a key."""
    return _host(first_url) == _host(second_url)


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]
