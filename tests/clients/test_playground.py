"""The playground in a real browser: what a person does on it, and what it must never do.

`scripts/playground.py` drives Chromium from an environment of its own. Each visit also fails if the
page logs an error, violates its policy, or asks another host for anything.
"""

from __future__ import annotations

import http.client
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import infer_align
from infer_align import config as configuration
from tests import environments
from tests.server.conftest import FOREVER, NUMBERS, Live, Serve

pytestmark = [pytest.mark.slow, pytest.mark.clients, pytest.mark.xdist_group("playground")]

ROOT = environments.ROOT
SCRIPT = Path(__file__).parent / "scripts/playground.py"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FAKE = '[engine]\nkind = "fake"\n'
DEMO = Path(infer_align.__file__).parent / "demo/infer-align.toml"
DEMO_PROFILES = """
rewards = { quality = 1.0 }
traits = { helpful = "preference.helpfulness" }
spreads = { quality = 1.0, "preference.helpfulness" = 1.0 }
"""
ENDLESS = f"""
[engine]
kind = "fake"
replies = [{{text = "never ends", seconds_per_token = {FOREVER}.0}}]
[rewards.brevity]
kind = "rules"
words_weight = -1.0
"""
# A method that this server does not have, with a parameter of each kind.
ZEAL = {
    "description": "Invented by a test.",
    "stage": "select",
    "available": True,
    "reason": None,
    "fix": "",
    "parameters": {
        "type": "object",
        "$defs": {
            "Step": {"type": "object", "properties": {"text": {"type": "string"}}},
            "Gate": {"type": "object", "properties": {"at_least": {"type": "number"}}},
        },
        "properties": {
            "strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
            "mode": {"enum": ["soft", "hard"], "default": "soft"},
            "silent": {"type": "boolean", "default": False},
            "motto": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "free": {"anyOf": [{"type": "integer"}, {"const": "all"}], "default": 20},
            "untouched": {"type": "integer", "default": 7, "description": "Nobody touches it."},
            "steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}},
            "gates": {"type": "object", "additionalProperties": {"$ref": "#/$defs/Gate"}},
            "weights": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "propertyNames": {"enum": ["a", "b"]},
            },
        },
    },
}
Visit = Callable[..., dict[str, Any]]


@pytest.fixture
def visit() -> Visit:
    """`visit(scenario, url, option=...)`: what the scenario has seen on a page without faults."""

    def run(scenario: str, url: str, **options: Any) -> dict[str, Any]:
        python = environments.program("playwright")
        done = subprocess.run(
            [
                python,
                str(SCRIPT),
                scenario,
                json.dumps({"url": url, "browser": CHROMIUM, **options}),
            ],
            env=environments.variables(),
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "missing" in seen:
            pytest.skip("no browser: install chromium, or run `playwright install chromium`")
        assert seen["console"] == []
        assert seen["violations"] == []
        assert seen["other_hosts"] == []
        assert seen.get("faults", []) == [], "axe calls this serious"
        return seen

    return run


@pytest.fixture
def demo(serve: Serve) -> Live:
    """The demo, which `make demo-serve` serves."""
    pytest.importorskip("torch")
    return serve(DEMO.read_text(encoding="utf-8"))


# Five different answers. The person will prefer the shortest one, which has the lowest number.
KEEPS = """
[server]
default_rewards = {number = 1.0, brevity = 0.0}
[profiles]
PLACE
spreads = {number = 3.0, brevity = 1.0}
[engine]
kind = "fake"
replies = [
    {text = "candidate 3"}, {text = "and one more candidate 9"}, {text = "1"},
    {text = "the candidate 7"}, {text = "candidate 5"},
]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.brevity]
kind = "rules"
words_weight = -1.0
"""


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The setting of a new store of profiles."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    return f'store = "sqlite+aiosqlite:///{tmp_path}/profiles.db"'


def address(live: Live) -> str:
    return f"{live.root}/"


# --- answers ---


def test_a_question_gets_three_answers_side_by_side(demo: Live, visit: Visit) -> None:
    seen = visit("first_answer", address(demo))
    assert seen["cards"] == ["Plain", "Greedy", "Aligned"]
    assert all(text.strip() for text in seen["texts"].values())
    assert seen["turns"] == ["What is the habitat of the otter?"]
    plain, greedy, aligned = seen["bodies"]
    assert {body["seed"] for body in seen["bodies"]} == {1}
    assert (greedy["temperature"], "align" in plain, "align" in aligned) == (0, False, True)
    # What the page shows is what the API answers.
    for kind, body in (("plain", plain), ("greedy", greedy), ("aligned", aligned)):
        fields = {key: value for key, value in body.items() if not key.startswith("stream")}
        answer = demo.post(fields).json()["choices"][0]["message"]["content"]
        assert seen["texts"][kind] == answer
    pieces = seen["pieces"]
    assert len(pieces) > 2, "the text does not grow while it is sampled"
    assert all(later.startswith(piece) for piece, later in itertools.pairwise(pieces))
    for row in ("returned", "rejected", "read by reward models", "drawing", "scoring"):
        assert row in seen["cost"]


def test_the_chat_goes_on_with_the_aligned_answer(demo: Live, visit: Visit) -> None:
    seen = visit("second_question", address(demo))
    roles = [message["role"] for message in seen["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert seen["messages"][1]["content"] == seen["first"]
    assert (seen["turns_after"], seen["cards_after"]) == (0, 0)


@pytest.mark.parametrize(
    ("slider", "method", "expected"),
    [
        ("helpful", "guidance", {"scale": {"helpful": 4}}),
        ("brief", "vas", {"beta": {"brief": 10}}),
        ("verbosity", "dpa", {"direction": {"verbosity": 1}}),
    ],
)
def test_a_slider_changes_the_aligned_answer_alone(
    demo: Live, visit: Visit, slider: str, method: str, expected: dict[str, Any]
) -> None:
    seen = visit("slider", address(demo), slide=[method, slider, "End"])
    (body,) = seen["bodies"]
    assert body["align"][method] == expected
    assert seen["before"]["plain"] == seen["after"]["plain"]
    assert seen["before"]["aligned"] != seen["after"]["aligned"]
    if method == "dpa":
        assert "outside the trained range from -0.5 to 0.5" in "".join(seen["direction"])
    else:
        assert body["logprobs"] is True
        assert seen["coloured"] > 0, "steering has changed the probability of no token"
    assert ("read as context" in seen["cost"]) is (method == "guidance")


@pytest.mark.parametrize("name", ["brief", "constructor", "toString"])
def test_a_reward_may_have_any_name(serve: Serve, visit: Visit, name: str) -> None:
    reward = f'[rewards.{name}]\nkind = "rules"\nwords_weight = -1.0\n'
    assert visit("rewards", address(serve(FAKE + reward)))["names"] == [name]


@pytest.mark.parametrize("trait", ["warm", "__proto__", "constructor"])
def test_a_person_types_a_trait(demo: Live, visit: Visit, trait: str) -> None:
    seen = visit("own_trait", address(demo), trait=trait)
    assert seen["align"]["guidance"] == {
        "scale": {trait: 2},
        "traits": {trait: {"prompt": "Answer politely."}},
    }
    assert seen["error"] == []


# --- candidates, and the request as code ---


def test_candidates_stand_best_first_with_a_dot_for_each_member(demo: Live, visit: Visit) -> None:
    seen = visit("candidates", address(demo))
    fields = {key: value for key, value in seen["body"].items() if not key.startswith("stream")}
    report = demo.post(fields).json()["align"]
    by_objective = sorted(report["candidates"], key=lambda each: -each["objective"])
    assert [item["index"] for item in seen["items"]] == [each["index"] for each in by_objective]
    assert seen["reason"] == f"{report['reason']}."
    assert "chosen" in seen["items"][0]["title"]
    spread = [value for each in by_objective for value in each["scores"]["quality"]["members"]]
    low, high = min(spread), max(spread)
    for item, candidate in zip(seen["items"], by_objective, strict=True):
        members = candidate["scores"]["quality"]["members"]
        places = [4 + 92 * (value - low) / (high - low) for value in members]
        assert item["dots"] == pytest.approx(places)
        assert item["labels"][0].startswith("quality: ")


def test_a_stopped_candidate_says_why(demo: Live, visit: Visit) -> None:
    seen = visit(
        "candidates",
        address(demo),
        methods=["early_stop"],
        slides=[["early_stop", "helpful", "End"]],
    )
    assert "Not compared: " in seen["items"][-1]["text"]
    assert "dropped" in seen["reason"]


def test_the_code_of_the_request_gives_the_answer_of_the_page(
    demo: Live, visit: Visit, tmp_path: Path
) -> None:
    seen = visit("candidates", address(demo), slides=[["vas", "brief", "ArrowRight"]])
    lines = [line for line in seen["items"][0]["text"].splitlines() if line]
    # The button stands below the text.
    chosen = lines[lines.index("Prefer this one") - 1]
    variables = {**os.environ, "NO_PROXY": "*"}
    shell = subprocess.run(
        ["bash", "-c", seen["curl"]], capture_output=True, text=True, env=variables, check=True
    )
    assert json.loads(shell.stdout)["choices"][0]["message"]["content"] == chosen
    sdk = subprocess.run(
        [sys.executable, "-c", seen["python"]],
        capture_output=True,
        text=True,
        env=variables,
        check=True,
    )
    assert sdk.stdout.splitlines()[0] == chosen
    table = tomllib.loads(seen["preset"])["presets"]["mine"]
    expected = {key: value for key, value in seen["body"]["align"].items() if key != "details"}
    assert table == {**expected, "body": {"max_tokens": 200}}
    path = tmp_path / "preset.toml"
    path.write_text(DEMO.read_text(encoding="utf-8") + seen["preset"], encoding="utf-8")
    assert configuration.load(path).presets["mine"] == expected


def test_a_method_of_a_later_version_appears_by_itself(demo: Live, visit: Visit) -> None:
    seen = visit("new_method", address(demo), method=ZEAL)
    assert seen["align"]["zeal"] == {
        "strength": 0.75,
        "mode": "hard",
        "silent": True,
        "motto": "go",
        "free": "all",
        "steps": [{"text": "first"}],
        "gates": {"quality": {"at_least": 0}},
        "weights": {"a": 2},
    }
    assert "Nobody touches it." in seen["panel"]


def test_a_preset_stands_alone(demo: Live, visit: Visit) -> None:
    seen = visit("preset", address(demo), preset="careful")
    (body,) = seen["bodies"]
    assert body["align"] == {"preset": "careful", "details": "candidates"}
    assert json.loads(seen["content"]) == demo.service.config.presets["careful"]
    assert "16 candidates" in seen["reason"]


def test_the_pictures_of_the_docs_can_be_taken_again(
    serve: Serve, visit: Visit, store: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    live = serve(DEMO.read_text(encoding="utf-8") + f"[profiles]\n{store}\n{DEMO_PROFILES}")
    visit("pictures", address(live), folder=str(tmp_path))
    taken = {path.name for path in tmp_path.glob("*.png")}
    assert taken == {path.name for path in (ROOT / "docs").glob("playground*.png")}
    page = (ROOT / "docs/playground.md").read_text(encoding="utf-8")
    assert all(f"({name})" in page for name in taken)


# --- the profile ---


def test_choices_move_the_profile_and_the_next_answer(
    serve: Serve, visit: Visit, store: str
) -> None:
    live = serve(KEEPS.replace("PLACE", store))
    seen = visit("profile", address(live), prefer="7. ", choices=["4 choices.", "8 choices."])
    first, second = seen["weights"]
    assert second["brevity"] > first["brevity"] > 50, "the point of brevity does not move right"
    (body,) = seen["bodies"]
    assert body["align"]["profile"].keys() == {"id"}
    assert seen["aligned"] == "1"
    assert any("brevity" in sentence and "more" in sentence for sentence in seen["words"])
    assert all("give or take" in label and "between" in label for label in seen["labels"])
    assert seen["ask"] is True
    assert body["align"]["profile"]["id"] in seen["curl"]
    assert seen["download"]["total"] == 8
    assert seen["left"] == {}
    assert live.get(f"/v1/align/profiles/{seen['download']['id']}").status_code == 404


def test_without_a_store_the_choices_stay_in_the_browser(serve: Serve, visit: Visit) -> None:
    live = serve(KEEPS.replace("PLACE", ""))
    seen = visit("profile", address(live), prefer="7. ", choices=["4 choices.", "8 choices."])
    first, second = seen["weights"]
    assert second["brevity"] > first["brevity"] > 50
    (body,) = seen["bodies"]
    choices = body["align"]["profile"]["choices"]
    assert [choice["chosen"] for choice in choices] == ["1"] * 8
    assert seen["download"]["choices"] == choices
    assert seen["aligned"] == "1"
    assert seen["ask"] is False
    assert "candidate" not in seen["storage"], "a deleted choice stays in the browser"


@pytest.mark.parametrize("width", [1280, 360])
def test_the_next_question_is_answered_by_the_keyboard(
    serve: Serve, visit: Visit, store: str, width: int
) -> None:
    live = serve(KEEPS.replace("PLACE", store))
    seen = visit("question", address(live), width=width)
    assert len(set(seen["answers"])) == 2
    assert seen["focused"] == "I prefer answer 1"
    assert seen["focused_after"] == "Ask me"
    assert (seen["open"], set(seen["weights"])) == (0, {"number", "brevity"})
    scrolled, visible = seen["width"]
    assert scrolled <= visible, "the page is wider than the screen"


def test_choices_move_the_slider_of_a_trait_in_the_next_request(
    serve: Serve, visit: Visit, store: str
) -> None:
    pytest.importorskip("torch")
    live = serve(DEMO.read_text(encoding="utf-8") + f"[profiles]\n{store}\n{DEMO_PROFILES}")
    seen = visit("profile", address(live), prefer="1. ", choices=["choices.", "choices."])
    assert "trait helpful" in seen["weights"][1]
    (body,) = seen["bodies"]
    assert body["align"]["guidance"] == {"scale": {"helpful": 0}}


def test_a_store_that_is_down_is_an_error_in_words(serve: Serve, visit: Visit, store: str) -> None:
    live = serve(KEEPS.replace("PLACE", store.replace("profiles.db", "no folder/profiles.db")))
    seen = visit("profile_problem", address(live), prefer="7. ")
    assert "nothing was changed" in seen["alert"]
    assert "Try again in 5 s." in seen["alert"]


# --- cancel, errors and keys ---


@pytest.mark.parametrize("by", ["button", "key"])
def test_cancelling_stops_the_work_of_the_server(serve: Serve, visit: Visit, by: str) -> None:
    live = serve(ENDLESS)
    before = live.metric("infer_align_disconnects_total")
    seen = visit("cancel", address(live), by=by)
    assert seen["states"] == ["Cancelled"] * 3
    assert (seen["progress"], seen["still_running"]) == (3, 0)
    assert live.idle(), "the server still works on a cancelled request"
    assert live.until(lambda: live.metric("infer_align_disconnects_total") == before + 3)


def test_the_page_counts_the_candidates_that_are_finished(
    serve: Serve, visit: Visit, hold: threading.Event
) -> None:
    assert not hold.is_set(), "the reward waits until the end of the test"
    live = serve(
        '[rewards.slow]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
        f'{FAKE}replies = [{{text = "one 2"}}]\n'
    )
    seen = visit("progress", address(live))
    assert "Drawing 8 candidates and comparing them: 8 are finished" in seen["state"]
    assert seen["bar"] == ["8", "8"]


def test_an_error_is_shown_in_words_with_what_to_do(serve: Serve, visit: Visit) -> None:
    live = serve(NUMBERS)
    seen = visit("errors", address(live), fill={"Most tokens of an answer": "99999999"})
    assert len(seen["errors"]) == 3
    for text in seen["errors"]:
        assert "99999999" in text
        assert "Change max_tokens, then answer again." in text
    assert seen["marked"] == ["max_tokens"]


def test_a_server_that_is_out_of_reach_is_an_error_in_words(serve: Serve, visit: Visit) -> None:
    for text in visit("unreachable", address(serve(NUMBERS)))["errors"]:
        assert "cannot be reached" in text
        assert "Check that the server runs" in text


def test_a_key_is_typed_once_and_can_be_forgotten(
    serve: Serve, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_BROWSER_KEYS", "a-secret-key")
    live = serve(f'[server]\napi_keys_env = "TEST_BROWSER_KEYS"\n{FAKE}')
    seen = visit("key", address(live), key="a-secret-key")
    assert "API key" in seen["refused"]
    assert seen["visible"] is False, "the key stands in the page"
    assert "a-secret-key" not in seen["stored_after"]
    assert seen["cookies"] == 0


# --- where and how the page is read ---


class Prefix(http.server.BaseHTTPRequestHandler):
    """A proxy that serves a server under /models/ and nothing else."""

    upstream: str
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._pass()

    def do_POST(self) -> None:
        self._pass()

    def _pass(self) -> None:
        if not self.path.startswith("/models/"):
            self.send_error(404)
            return
        length = int(self.headers.get("content-length", 0))
        connection = http.client.HTTPConnection(self.upstream)
        headers = {"content-type": self.headers.get("content-type", "")}
        path = self.path.removeprefix("/models")
        connection.request(self.command, path, self.rfile.read(length), headers)
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in {"transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.end_headers()
        while piece := answer.read1():
            self.wfile.write(piece)
        connection.close()

    def log_message(self, *_: object) -> None:
        """Write no log."""


@pytest.fixture
def prefixed(demo: Live) -> Iterator[str]:
    """The address of the demo behind the base path /models/."""
    handler = type("DemoPrefix", (Prefix,), {"upstream": f"127.0.0.1:{demo.port}"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/models/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_page_works_behind_a_base_path(prefixed: str, visit: Visit) -> None:
    seen = visit("first_answer", prefixed)
    assert all(text.strip() for text in seen["texts"].values())
    assert visit("reference", prefixed)["routes"]
    assert httpx2.get(prefixed + "docs/", trust_env=False).headers["location"] == "../docs"


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_fits_a_phone(demo: Live, visit: Visit, colours: str) -> None:
    seen = visit("phone", address(demo), width=360, colours=colours)
    scrolled, visible = seen["width"]
    assert scrolled <= visible, "the page is wider than the screen"
    assert seen["lowest"] >= 24, "a button is too low for a finger"


def test_the_page_is_used_by_the_keyboard_alone(demo: Live, visit: Visit) -> None:
    seen = visit("keyboard", address(demo))
    assert seen["first"] == "Skip to the question"
    assert seen["question"] == "one\ntwo"


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_reference_shows_each_route(demo: Live, visit: Visit, colours: str) -> None:
    seen = visit("reference", address(demo), colours=colours)
    paths = demo.get("/openapi.json").json()["paths"]
    assert [route.partition(" ")[2] for route in seen["routes"]] == list(paths)
    assert "Candidates per prompt" in seen["text"]
