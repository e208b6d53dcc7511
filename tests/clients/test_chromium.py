"""A page of another origin calls the server in a real browser, without a window."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.conftest import NUMBERS, Serve

pytestmark = [pytest.mark.slow, pytest.mark.clients]

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PAGE = """<!doctype html><body>waiting<script>
async function send(stream) {
  const answer = await fetch("URL/chat/completions", {
    method: "POST",
    headers: {"Content-Type": "application/json", "Authorization": "Bearer right",
      "X-Stainless-Lang": "js", "X-Stainless-Runtime": "browser:chrome"},
    body: JSON.stringify({messages: [{role: "user", content: "hi"}], stream})});
  return [answer.status, answer.headers.get("x-request-id") !== null, await answer.text()];
}
(async () => {
  let results;
  try { results = [await send(false), await send(true)]; } catch (error) { results = `${error}`; }
  await fetch("/result", {method: "POST", body: JSON.stringify(results)});
})();
</script></body>"""


class Site(http.server.ThreadingHTTPServer):
    """A web site with one page, which reports what the server answered to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.page = ""
        self.result: object = None
        self.reported = threading.Event()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """The page, and the route that its script reports to."""

    server: Site

    def do_GET(self) -> None:
        self._send(self.server.page.encode())

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        self.server.result = json.loads(self.rfile.read(length))
        self._send(b"")
        self.server.reported.set()

    def log_message(self, *_: object) -> None:
        """Write no log."""

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    yield site
    site.shutdown()
    site.server_close()
    thread.join()


def visit(site: Site, base_url: str, profile: Path) -> object:
    """Open the page in the browser and return what its script reports."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    site.page = PAGE.replace("URL", base_url)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command = [CHROMIUM, *options, f"--user-data-dir={profile}", site.origin]
    command.insert(1, "--remote-debugging-port=0")
    log = (profile.parent / "chromium.log").open("wb")
    with log, subprocess.Popen(command, stdout=log, stderr=log) as browser:
        try:
            assert site.reported.wait(90), "the page did not report"
        finally:
            browser.terminate()
    return site.result


def test_a_page_of_an_allowed_origin_reads_answers_and_streams(
    serve: Serve, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROMIUM_KEYS", "right")
    server = f'allowed_origins = ["{site.origin}"]\napi_keys_env = "CHROMIUM_KEYS"\n'
    live = serve(NUMBERS + server)
    result = visit(site, live.base_url, tmp_path / "profile")
    assert isinstance(result, list), result
    for status, has_request_id, text in result:
        assert (status, has_request_id) == (200, True)
        assert "candidate" in text
    assert "candidate 3" in result[0][2]
    assert "[DONE]" in result[1][2]


def test_a_page_of_another_origin_is_not_answered(serve: Serve, site: Site, tmp_path: Path) -> None:
    live = serve(NUMBERS + 'allowed_origins = ["https://app.example.com"]\n')
    result = visit(site, live.base_url, tmp_path / "profile")
    assert result == "TypeError: Failed to fetch"
