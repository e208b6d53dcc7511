"""Classify the exceptions of an HTTP request into a few kinds, which reports count."""

from __future__ import annotations

import errno
import os

import aiohttp

CONNECT_SECONDS = 10.0

# Checked in this order: the first matching type names the kind.
KINDS: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorDNSError, "name not found"),
    (aiohttp.ClientSSLError, "TLS failed"),
    (aiohttp.ClientConnectorError, "connection failed"),
    (aiohttp.ServerDisconnectedError, "connection lost"),
    (aiohttp.ClientPayloadError, "connection lost"),
    (OSError, "connection lost"),
)


def connect_timeout(timeout: float) -> float:
    """Return the seconds to wait for a connection, given the timeout of a request."""
    return min(timeout, CONNECT_SECONDS)


def classify_failure(error: Exception, timeout: float) -> tuple[str, str]:
    """Return the kind and the message of the exception that ended a request.

    Args:
        error: raised by aiohttp, or by reading the answer.
        timeout: seconds of one request, for the message.
    """
    # aiohttp wraps the exception of the operating system.
    cause = getattr(error, "os_error", error)
    code = getattr(cause, "errno", None)
    if isinstance(cause, OSError) and code in (errno.EMFILE, errno.ENFILE):
        message = "the limit of this client, not of the endpoint; raise it with ulimit -n"
        return "client out of files", f"{os.strerror(code)}: {message}"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return "connect timeout", f"no connection within {connect_timeout(timeout):g} s"
    if isinstance(error, TimeoutError):
        return "timeout", f"no end within {timeout:g} s"
    message = os.strerror(code) if isinstance(code, int) and code > 0 else str(cause)
    return _kind(error, cause), message or type(error).__name__


def _kind(error: Exception, cause: Exception) -> str:
    for error_type, kind in KINDS:
        if isinstance(error, error_type):
            refused = kind == "connection failed" and isinstance(cause, ConnectionRefusedError)
            return "connection refused" if refused else kind
    return "bad HTTP"
