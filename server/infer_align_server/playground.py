"""The pages for people: the playground at `/`, the API reference at `/docs`, and their files.

The pages are static. They call the public API as every client does, so the pages need no API key
and their calls do. All links in them are relative: they work behind a base path. A strict policy
forbids them to load or to call anything of another host.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path, PurePosixPath

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import RedirectResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from infer_align.config.server import Server
from infer_align_server.routes import RecordedRoute

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # A browser asks each time if its copy is still the same, so an update is seen at once.
    "cache-control": "no-cache",
}
# The files that the pages load, by suffix. The types do not depend on the tables of the system.
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HTML = ".html"


class Pages(StaticFiles):
    """The files of the pages, with their headers."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> HttpResponse:
        """Return a file; an empty 304 if the browser has the same."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        if "content-type" in response.headers:
            response.headers["content-type"] = MEDIA_TYPES[Path(full_path).suffix]
        return response


def folder() -> Path:
    """Return the folder of the pages: beside this module in a wheel, else that of the checkout."""
    packaged = Path(__file__).parent / "web"
    if packaged.is_dir():
        return packaged
    return Path(__file__).parents[2] / "clients/web"


@functools.cache
def _pages() -> Pages:
    return Pages(directory=folder())


async def playground(http: HttpRequest) -> HttpResponse:
    """Return the playground."""
    return await _pages().get_response("index.html", http.scope)


async def api_reference(http: HttpRequest) -> HttpResponse:
    """Return the page that shows the OpenAPI document."""
    if http.scope.get("raw_path", b"").endswith(b"/"):
        # The links of the page are relative, so its own address must have no slash at its end.
        return RedirectResponse("../docs")
    return await _pages().get_response("docs.html", http.scope)


async def page_file(http: HttpRequest) -> HttpResponse:
    """Return a style sheet, a module or a picture of the pages.

    Raises:
        HTTPException: There is no such file.
    """
    path: str = http.path_params["path"]
    suffix = PurePosixPath(path).suffix
    if suffix == HTML or suffix not in MEDIA_TYPES:
        raise HTTPException(404)
    return await _pages().get_response(path, http.scope)


def page_routes(server: Server) -> list[Route]:
    """Return the routes of the pages that the configuration switches on."""
    routes: list[Route] = []
    if server.playground:
        routes.append(RecordedRoute("/", playground, methods=["GET"]))
    if server.api_docs:
        routes.append(RecordedRoute("/docs", api_reference, methods=["GET"]))
    if routes:
        routes.append(RecordedRoute("/web/{path:path}", page_file, methods=["GET"]))
    return routes
