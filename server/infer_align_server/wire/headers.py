"""The headers of a request as a dictionary, made once."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request as HttpRequest

_KEY = "infer_align.headers"


def headers_of(http: HttpRequest) -> Mapping[str, str]:
    """Return the headers of a request by their names in lower case; a repeated one has its first.

    Starlette's mapping would read the whole list for each look-up.
    """
    headers: dict[str, str] | None = http.scope.get(_KEY)
    if headers is None:
        headers = {}
        for name, value in http.scope["headers"]:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        http.scope[_KEY] = headers
    return headers
