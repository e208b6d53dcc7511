"""Other servers that speak HTTP and JSON: where they are, which of them is asked, and what is done when one fails.

    section (here) ─▶ Client (client.py): one call, retried where that is safe ─▶ Pool (pool.py): the host that takes it

Engines and rewards that live elsewhere stand on this. It knows nothing of what is said over it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from annotated_types import Gt

from infer_align.errors import ConfigError, EngineFailed

# The code of a failure whose cause is this server's own key.
KEY_REFUSED = "upstream_unauthorized"


@dataclass(frozen=True, slots=True)
class Address:
    """One of several upstreams."""

    url: str = field(metadata={"description": 'base URL, such as "http://host:8000/v1"'})
    weight: Annotated[float, Gt(0)] = field(
        default=1.0, metadata={"description": "share of the load, against the others'"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """How upstreams are reached: the part of a section that every kind of upstream shares."""

    urls: str | tuple[str | Address, ...] = field(
        metadata={
            "description": "base URL, or several; each a string or {url, weight}. The least loaded one that is up is asked"
        }
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "description": "environment variable with the key for the upstreams; it is sent to no other place"
        },
    )
    max_concurrency: int = field(
        default=256,
        metadata={"ge": 1, "description": "calls at once to each upstream; others wait"},
    )
    connect_timeout_seconds: float = field(
        default=5.0, metadata={"gt": 0, "description": "for a connection to be made"}
    )
    timeout_seconds: float = field(
        default=600.0, metadata={"gt": 0, "description": "for one call from end to end"}
    )
    retries: int = field(
        default=2,
        metadata={
            "ge": 0,
            "le": 10,
            "description": "further calls after a failure that cost no tokens: no connection, 429, 503, or a kept-alive connection "
            "that had been closed",
        },
    )
    max_retry_wait_seconds: float = field(
        default=10.0,
        metadata={
            "ge": 0,
            "description": "a Retry-After over this is given to the client instead of being waited for",
        },
    )
    recovery_seconds: float = field(
        default=2.0,
        metadata={
            "gt": 0,
            "description": "how often an upstream that could not be reached is tried again",
        },
    )

    def addresses(self) -> tuple[Address, ...]:
        """The upstreams, without a slash at the end.

        Raises:
            ConfigError: none, or one that is not an http(s) URL, or holds a password.
        """
        given = (self.urls,) if isinstance(self.urls, str) else self.urls
        if not given:
            raise ConfigError(
                'urls: needs at least one, such as urls = ["http://127.0.0.1:8000/v1"].'
            )
        return tuple(_checked(Address(one) if isinstance(one, str) else one) for one in given)

    def api_key(self) -> str | None:
        """The key for the upstreams, if they need one.

        Raises:
            ConfigError: the environment variable that should hold it is missing or empty.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env!r} is not set, empty or not one line of ASCII; put "
                "the key for the upstreams there."
            )
        return key


class UpstreamFailed(EngineFailed):
    """A call that brought no answer.

    Attributes:
        status: the upstream's own, else 502, or 504 for a timeout.
        refused: the upstream says that the request is wrong: it would be anywhere.
    """

    code = "upstream_failed"

    def __init__(
        self,
        message: str,
        *,
        status: int = 502,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        refused: bool = False,
    ) -> None:
        super().__init__(message, status=status, param=param, code=code, retry_after=retry_after)
        self.refused = refused


def _checked(address: Address) -> Address:
    parts = urlsplit(address.url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            f"urls: {address.url!r} is not an http(s) URL; write it as 'http://host:8000/v1'."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"urls: that of {parts.hostname!r} holds a user, a query or a fragment; put the key into api_key_env."
        )
    return Address(address.url.rstrip("/"), address.weight)
