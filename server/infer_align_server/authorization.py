"""The service that a request is for, its caller, and the owner of the caller's profiles."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest

from infer_align_server.service import Service


def service_of(http: HttpRequest) -> Service:
    """Return the service of the application that received the request."""
    service: Service = http.app.state.service
    return service


def authorize(http: HttpRequest, *, limited: bool = True) -> tuple[Service, str]:
    """Return the service and the caller's name; see `Service.authorize`.

    Raises:
        Unauthorized: The API key is missing or wrong.
        Overloaded: The caller is over its rate limit.
    """
    service = service_of(http)
    address = http.client.host if http.client else "unknown"
    authorization = http.headers.get("authorization", "")
    caller = service.authorize(authorization, address, limited=limited)
    return service, caller


def owner_of(http: HttpRequest) -> str:
    """Return the owner of the profiles that a request may use."""
    return service_of(http).owner(http.headers.get("authorization", ""))
