"""Check the URL of a server before anything is sent to it."""

from __future__ import annotations

from urllib.parse import urlsplit

from infer_align.errors import quote


def is_http_url(url: str) -> bool:
    """Return True for an http(s) URL with a host, and with a port that exists if it has one."""
    if not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        port = parts.port
    # No IPv6 address, a label of a name that is empty or too long, or no number as the port.
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(host) and port != 0


def quote_url(url: str) -> str:
    """Return a URL as a message quotes it: without the user and the password in it."""
    return quote(url) if "@" not in url else "the URL (not shown: it may hold a password)"
