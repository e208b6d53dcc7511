"""API keys: from the environment, to their own server, and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, and where it is from."""

    value: str | None = field(default=None, repr=False)
    env: str | None = None  # the variable; None: this endpoint is sent no key
    flag: str = "--api-key-env"

    @classmethod
    def named(cls, env: str | None, flag: str = "--api-key-env") -> Key:
        """The key in a variable of the environment."""
        return cls(os.environ.get(env) or None if env else None, env, flag)


def same_server(one: str, other: str) -> bool:
    """Whether two addresses are of one host and port: a key of one is only then a key of the other."""
    return urlsplit(one).netloc.rpartition("@")[2] == urlsplit(other).netloc.rpartition("@")[2]
