"""HTTP clients of other servers ("upstreams") that exchange JSON.

    Upstream (here)         the configuration that every kind of upstream shares
    Client (client.py)      sends one call, and retries it where that is safe
    Pool (pool.py)          chooses the host that gets the call
    response.py, sse.py     read JSON, event streams and errors from a response

The engine `openai` and the remote rewards are built on this package. It knows no API beyond HTTP,
JSON, server-sent events and error bodies.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from annotated_types import Gt

from infer_align.errors import ConfigError, EngineFailed
from infer_align.urls import is_http_url, quote_url

# The error code of a call that failed because the upstream rejected this server's own key.
KEY_REFUSED = "upstream_unauthorized"


@dataclass(frozen=True, slots=True)
class Address:
    """The address of one upstream."""

    url: str = field(metadata={"description": 'Base URL, such as "http://host:8000/v1".'})
    weight: Annotated[float, Gt(0)] = field(
        default=1.0, metadata={"description": "Share of the load, relative to the other URLs."}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """The options of a configuration section that every kind of upstream shares."""

    urls: str | tuple[str | Address, ...] = field(
        metadata={
            "description": "Base URL, or several, each a string or {url, weight}. A call goes to "
            "the least loaded upstream that is up."
        }
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "description": "Environment variable that holds the API key of the upstreams. The key "
            "is sent to these URLs only."
        },
    )
    max_concurrency: int = field(
        default=256,
        metadata={
            "ge": 1,
            "description": "Maximum number of concurrent calls to each upstream. "
            "Further calls wait.",
        },
    )
    connect_timeout_seconds: float = field(
        default=5.0, metadata={"gt": 0, "description": "Timeout for opening a connection."}
    )
    timeout_seconds: float = field(
        default=600.0, metadata={"gt": 0, "description": "Timeout for one whole call."}
    )
    retries: int = field(
        default=2,
        metadata={
            "ge": 0,
            "le": 10,
            "description": "Number of retries after a failure that cost no tokens: no connection, "
            "status 429 or 503, or a kept-alive connection that was already closed.",
        },
    )
    max_retry_wait_seconds: float = field(
        default=10.0,
        metadata={
            "ge": 0,
            "description": "Maximum Retry-After, in seconds, before a retry. "
            "A longer one is returned to the client as an error.",
        },
    )
    recovery_seconds: float = field(
        default=2.0,
        metadata={
            "gt": 0,
            "description": "Interval between attempts to reach an upstream that is down.",
        },
    )

    def addresses(self) -> tuple[Address, ...]:
        """Return the configured addresses, without a trailing slash.

        Raises:
            ConfigError: there is no URL, or one is not an http(s) URL or holds a password.
        """
        entries = (self.urls,) if isinstance(self.urls, str) else self.urls
        if not entries:
            raise ConfigError(
                'urls: at least one URL is required, such as urls = ["http://127.0.0.1:8000/v1"].'
            )
        return tuple(_checked_address(entry) for entry in entries)

    def api_key(self) -> str | None:
        """Return the API key of the upstreams, or None if none is configured.

        Raises:
            ConfigError: the environment variable that should hold it is missing or not a key.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env!r} is not set, empty or "
                "not one line of ASCII; put the key for the upstreams there."
            )
        return key


class UpstreamFailed(EngineFailed):
    """A call to an upstream that gave no usable answer.

    Attributes:
        status: the upstream's own status, else 502, or 504 for a timeout.
        refused: True if the upstream rejected the request itself, so that no other host and no
            retry can help.
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


def _checked_address(entry: str | Address) -> Address:
    address = Address(entry) if isinstance(entry, str) else entry
    if not is_http_url(address.url):
        raise ConfigError(
            f"urls: {quote_url(address.url)} is not an http(s) URL; write it as "
            "'http://host:8000/v1'."
        )
    parts = urlsplit(address.url)
    if parts.username or parts.password or parts.query or parts.fragment:
        # The URL may hold a secret, so that the message names the host only.
        raise ConfigError(
            f"urls: the URL of {parts.hostname!r} contains a user, a query or a fragment; remove "
            "it, and use api_key_env for the key."
        )
    return Address(address.url.rstrip("/"), address.weight)
