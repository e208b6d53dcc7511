"""The pages for people: how they are served, and what their files contain."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest

from infer_align_server.playground import folder
from tests.server.conftest import USER, Live, Serve

FAKE = '[engine]\nkind = "fake"\n'
HTML = ("index.html", "docs.html")
FILES = sorted(path for path in folder().rglob("*") if path.suffix in {".html", ".css", ".js"})
MODULES = [path for path in FILES if path.suffix == ".js"]
# The name of a format, which is never requested.
NAMESPACE = "http://www.w3.org/2000/svg"


def name(path: Path) -> str:
    return str(path.relative_to(folder()))


@pytest.mark.parametrize("path", ["/", "/docs", "/web/modules/main.js", "/web/styles/page.css"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_page_is_sent_with_a_strict_policy(numbers: Live, path: str, method: str) -> None:
    with numbers.http() as http:
        answer = http.request(method, path)
    assert answer.status_code == 200
    assert bool(answer.content) is (method == "GET")
    policy = dict(
        directive.split(" ", 1)
        for directive in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    for source in ("script-src", "style-src", "connect-src"):
        assert policy[source] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    expected = {"/": "text/html", "/docs": "text/html"}.get(path, "text/")
    assert answer.headers["content-type"].startswith(expected)


def test_other_verbs_are_refused(numbers: Live) -> None:
    answer = numbers.post({}, "/")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_browser_that_has_a_file_gets_no_second_copy(numbers: Live) -> None:
    first = numbers.get("/web/modules/main.js")
    again = numbers.get("/web/modules/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    [
        "/web",
        "/web/",
        "/web/modules",
        "/web/index.html",
        "/web/wheel.py",
        "/web/nothing.js",
        "/web/..%2fpython%2fexample.py",
        "/web/%2e%2e/python/example.py",
        "/web/modules/..%2f..%2f..%2f..%2fpyproject.toml",
    ],
)
def test_only_the_files_of_the_pages_are_served(numbers: Live, path: str) -> None:
    answer = numbers.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "http_404"


def test_the_address_of_the_reference_loses_a_slash_at_its_end(numbers: Live) -> None:
    """The links of the page are relative, and must not lead into `/docs/`."""
    answer = numbers.get("/docs/")
    assert (answer.status_code, answer.headers["location"]) == (307, "../docs")


def test_the_pages_need_no_key_and_their_calls_do(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PLAYGROUND_KEYS", "right")
    live = serve(f'[server]\napi_keys_env = "TEST_PLAYGROUND_KEYS"\n{FAKE}')
    for path in ("/", "/docs", "/web/modules/main.js"):
        assert live.get(path).status_code == 200
    for path in ("/v1/align/methods", "/v1/models", "/openapi.json"):
        assert live.get(path).status_code == 401


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        ("playground = false", {"/": 404, "/docs": 200, "/web/styles/page.css": 200}),
        ("api_docs = false", {"/": 200, "/docs": 404, "/web/styles/page.css": 200}),
        (
            "playground = false\napi_docs = false",
            {"/": 404, "/docs": 404, "/web/styles/page.css": 404, "/openapi.json": 200},
        ),
    ],
)
def test_each_page_can_be_switched_off(
    serve: Serve, settings: str, statuses: dict[str, int]
) -> None:
    live = serve(f"[server]\n{settings}\n{FAKE}")
    assert {path: live.get(path).status_code for path in statuses} == statuses


def test_the_sliders_of_the_page_are_described(serve: Serve) -> None:
    live = serve(
        f'[rewards.short]\nkind = "rules"\ntarget_words = 9\n'
        f'[traits.pirate]\nprompt = "Talk like a pirate."\ndescription = "Arr."\n'
        f'[dpa]\nattributes = ["wit", "length"]\ntrained_range = {{wit = [0, 1]}}\n{FAKE}'
    )
    listed = live.get("/v1/align/methods").json()
    methods = listed["methods"]
    direction = methods["dpa"]["parameters"]["properties"]["direction"]
    assert direction["propertyNames"] == {"enum": ["wit", "length"]}
    assert direction["x-trained-range"] == {"wit": [0, 1]}
    compose = methods["compose"]["parameters"]
    assert compose["propertyNames"] == {"examples": ["short", "trust_judge"]}, (
        "its own keys name rewards"
    )
    assert compose["properties"]["gates"]["propertyNames"] == {"enum": ["short", "trust_judge"]}
    scale = methods["guidance"]["parameters"]["properties"]["scale"]
    assert scale["propertyNames"] == {"examples": ["pirate"]}, "a request may bring its own"
    assert scale["x-slider"]["minimum"] < 0 < scale["x-slider"]["maximum"]
    assert listed["traits"] == {"pirate": {"description": "Arr."}}
    assert methods["guidance"]["stage"] == "steer"
    assert methods["budget"]["stage"] is None
    assert listed["limits"]["max_candidates"] == 128


def test_a_waiting_stream_says_how_many_candidates_are_finished(
    serve: Serve, hold: threading.Event
) -> None:
    live = serve(
        f'[rewards.slow]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
        f'{FAKE}replies = [{{text = "one 2"}}]\n'
    )
    body = {"messages": USER, "stream": True, "align": {"best_of_n": {"n": 3}}}
    headers = {"x-stainless-read-timeout": "0.5"}
    with (
        live.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        lines = answer.iter_lines()
        comments = (line for line in lines if line.startswith(":"))
        assert any(comment.endswith(", 3 are finished") for comment in comments)
        hold.set()
        assert "data: [DONE]" in list(lines)


# --- the files ---


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_names_another_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace(NAMESPACE, "")
    assert re.findall(r"https?:|wss?://|\burl\(|@import|[\"'`]//", text) == []


@pytest.mark.parametrize("page", HTML)
def test_a_page_has_no_inline_script_or_style_and_only_relative_links(page: str) -> None:
    text = (folder() / page).read_text(encoding="utf-8")
    for script in re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL):
        assert script == ""
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", text) == []
    links = re.findall(r'\b(?:href|src)="([^"]*)"', text)
    assert links
    assert [link for link in links if link.startswith("/")] == []
    for link in links:
        if link.startswith("web/"):
            assert (folder() / link.removeprefix("web/")).is_file(), link


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_shows_data_as_text_and_imports_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    parsing = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert re.findall(parsing, text) == []
    assert text.startswith("/**"), "a module begins with its subject"
    imports = re.findall(r'from "([^"]+)"', text)
    assert all(target.startswith("./") for target in imports)
    for target in imports:
        assert (path.parent / target).is_file(), target
    assert len(text.splitlines()) <= 400


def test_every_module_is_used() -> None:
    used: set[str] = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:\./|modules/|")(\w+\.js)"', text))
    assert {path.name for path in MODULES} <= used


def test_every_id_that_a_module_looks_up_is_on_a_page() -> None:
    pages: Any = {page: (folder() / page).read_text(encoding="utf-8") for page in HTML}
    ids = {each for text in pages.values() for each in re.findall(r'\bid="([^"]+)"', text)}
    looked_up: set[str] = set()
    for path in MODULES:
        looked_up |= set(re.findall(r'byId\("([^"]+)"\)', path.read_text(encoding="utf-8")))
    assert looked_up <= ids
