"""Stored profiles over HTTP where things go wrong: crashes, broken stores, odd requests."""

from __future__ import annotations

import queue
import resource
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.postgres import Postgres, postgres, store_url
from tests.server.processes import LOCAL, Process

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

__all__ = ["postgres", "store_url"]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("store")]

CLIENTS = 64
PROFILES = 8
# The server is killed after so many answers.
ANSWERS = 200
LIMIT_SECONDS = 100
URL = "TEST_PROFILE_STORE"
CONFIG = f"""
[server]
default_rewards = {{ brief = 1.0 }}
[profiles]
store_env = "{URL}"
spreads = {{ brief = 2.0 }}
[engine]
kind = "fake"
replies = [{{text = "Mice."}}]
[rewards.brief]
kind = "rules"
words_weight = -1.0
"""
HI = [{"role": "user", "content": "hi"}]
CHOICE = {"messages": HI, "candidates": ["Mice.", "Owls eat mice."], "chosen": 0}
Command = Callable[..., Process]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The configuration of a server that keeps profiles."""
    path = tmp_path / "infer-align.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def client(url: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, **LOCAL)


def exported(url: str, name: str) -> dict[str, Any]:
    with client(url) as http:
        answer = http.get(f"/v1/align/profiles/{name}/export")
    assert answer.status_code == 200, answer.text
    return answer.json()


def write_without_end(url: str, number: int, acknowledged: queue.Queue[tuple[str, str]]) -> None:
    """Send one feedback after another until the server dies; report the acknowledged ones."""
    name = f"u{number % PROFILES}"
    with client(url) as http:
        for i in range(10_000):
            request_id = f"{number}-{i}"
            body = {"profile": name, "request_id": request_id, **CHOICE}
            try:
                answer = http.post("/v1/align/feedback", json=body)
            except httpx2.HTTPError:
                return
            if answer.status_code == 200:
                acknowledged.put((name, request_id))


def test_a_killed_server_loses_no_acknowledged_feedback(
    command: Command, file: Path, store_url: str
) -> None:
    process = command(str(file), **{URL: store_url})
    url = process.url()
    acknowledged: queue.Queue[tuple[str, str]] = queue.Queue()
    clients = [
        threading.Thread(target=write_without_end, args=(url, i, acknowledged))
        for i in range(CLIENTS)
    ]
    for each in clients:
        each.start()
    answers = [acknowledged.get(timeout=LIMIT_SECONDS) for _ in range(ANSWERS)]
    process.popen.kill()
    for each in clients:
        each.join(LIMIT_SECONDS)
    while not acknowledged.empty():
        answers.append(acknowledged.get())

    expected = defaultdict(set)
    for name, request_id in answers:
        expected[name].add(request_id)
    url = command(str(file), **{URL: store_url}).url()
    for name, request_ids in expected.items():
        profile = exported(url, name)
        stored = [choice["request_id"] for choice in profile["choices"]]
        assert request_ids <= set(stored)
        assert len(stored) == len(set(stored)) == profile["total"]
    with client(url) as http:
        assert http.post("/v1/align/feedback", json={"profile": "u0", **CHOICE}).status_code == 200


def checks_that_answers_go_on(url: str) -> None:
    """Feedback and stored profiles are refused with a 503; everything else is answered."""
    named = {"messages": HI, "align": {"profile": {"id": "u"}}}
    inline = {"chosen": "Mice.", "rejected": "Owls eat mice."}
    with client(url) as http:
        for path, body in (
            ("/v1/align/feedback", {"profile": "u", **CHOICE}),
            ("/v1/chat/completions", named),
            ("/v1/align/profiles/u/question", {"messages": HI, "candidates": ["a", "b"]}),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert "nothing was changed" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "5"
        for align in ({}, {"best_of_n": {"n": 2}}, {"profile": {"choices": [inline]}}):
            answer = http.post("/v1/chat/completions", json={"messages": HI, "align": align})
            assert answer.status_code == 200, answer.text
        assert http.get("/ready").json()["ready"] is True


def test_a_database_server_that_goes_down_stops_profiles_alone(
    command: Command, file: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="infer-align-postgres-") as folder:
        database = Postgres(Path(folder))
        url = command(str(file), **{URL: database.new_database()}).url()
        with client(url) as http:
            assert http.post("/v1/align/feedback", json={"profile": "u", **CHOICE}).is_success
        database.close()
        checks_that_answers_go_on(url)


def test_a_read_only_file_is_read_and_not_written(
    command: Command, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "profiles.db"
    url = command(str(file), **{URL: f"sqlite:///{path}"}).url()
    with client(url) as http:
        assert http.post("/v1/align/feedback", json={"profile": "u", **CHOICE}).is_success
    read_only = f"sqlite:///file:{path}?mode=ro&uri=true"
    url = command(str(file), **{URL: read_only}).url()
    with client(url) as http:
        refused = http.post("/v1/align/feedback", json={"profile": "u", **CHOICE})
        assert refused.status_code == 503
        answer = http.post(
            "/v1/chat/completions", json={"messages": HI, "align": {"profile": {"id": "u"}}}
        )
        assert answer.json()["align"]["profile"]["choices"] == 1


def test_a_full_disk_stops_feedback_alone(command: Command, file: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/profiles.db"
    process = command(str(file), **{URL: store})
    named = {"messages": HI, "align": {"profile": {"id": "u"}}}
    with client(process.url()) as http:
        assert http.post("/v1/align/feedback", json={"profile": "u", **CHOICE}).is_success
        # No file of the process can grow: for the database, the disk is full.
        limits = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        for _ in range(2):
            refused = http.post("/v1/align/feedback", json={"profile": "u", **CHOICE})
            assert refused.status_code == 503, refused.text
            assert refused.json()["error"]["code"] == "store_unavailable"
            answer = http.post("/v1/chat/completions", json=named).json()
            assert answer["align"]["profile"]["choices"] == 1
            assert http.post("/v1/chat/completions", json={"messages": HI}).is_success
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, limits)
        later = http.post("/v1/align/feedback", json={"profile": "u", **CHOICE})
        assert later.json()["choices"] == 2


@pytest.mark.parametrize(
    ("profile", "status", "param"),
    [
        ({"id": "none"}, 404, "align.profile.id"),
        ({"id": "u'; DROP TABLE profiles; --"}, 400, "align.profile.id"),
        ({"id": "../u"}, 400, "align.profile.id"),
        ({"id": ""}, 400, "align.profile.id"),
        (
            {"choices": [{"chosen": "a", "rejected": "b"}] * 100_000},
            400,
            "align.profile.choices",
        ),
    ],
)
def test_odd_profiles_of_a_request_are_refused_by_name(
    odd: str, profile: dict[str, Any], status: int, param: str
) -> None:
    with client(odd) as http:
        body = {"messages": HI, "align": {"profile": profile}}
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["param"] == param
        assert len(refused.text) < 2000
        assert http.post("/v1/chat/completions", json={"messages": HI}).is_success


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"profile": "u' OR '1'='1"}, "profile"),
        ({"candidates": ["a", "b"] * 50_000}, "candidates"),
        ({"candidates": ["a", "b"], "chosen": -1}, "chosen"),
        ({"chosen": True}, "chosen"),
        ({"chosen": 0.5}, "chosen"),
        ({"weights": {"'; DROP TABLE profiles; --": 1}}, "weights.'; DROP TABLE profiles; --"),
        ({"messages": "hi"}, "messages"),
        ({"candidates": [1, 2]}, "candidates.0"),
        ({"request_id": "x" * 1000}, "request_id"),
        ({"description": "x" * 10_000}, "description"),
    ],
)
def test_odd_feedback_is_refused_by_name(odd: str, fields: dict[str, Any], param: str) -> None:
    with client(odd) as http:
        refused = http.post("/v1/align/feedback", json={"profile": "u", **CHOICE, **fields})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == param
        assert http.get("/v1/align/profiles/u").status_code == 404


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that keeps profiles; the tests that use it leave nothing in its store."""
    folder = tmp_path_factory.mktemp("odd")
    path = folder / "infer-align.toml"
    path.write_text(CONFIG, encoding="utf-8")
    process = Process("--port", "0", str(path), **{URL: f"sqlite:///{folder}/profiles.db"})
    yield process.url()
    process.popen.terminate()
    process.wait()


NUL = "a\0b"


def test_a_character_that_postgresql_cannot_store_is_refused_by_name(
    command: Command, file: Path, store_url: str
) -> None:
    url = command(str(file), **{URL: store_url}).url()
    with client(url) as http:
        for field in ("description", "request_id"):
            answer = http.post("/v1/align/feedback", json={"profile": "u", field: NUL, **CHOICE})
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == field
            assert error["message"].startswith(f"{field}: 'a\\x00b' ")
        answer = http.get("/v1/align/profiles/a%00b")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "profile_not_found")
        texts = {"messages": [{"role": "user", "content": NUL}], "candidates": [NUL, "b\0"]}
        answer = http.post("/v1/align/feedback", json={"profile": "u", "chosen": 0, **texts})
        assert answer.status_code == 200, answer.text
    assert len(exported(url, "u")["choices"]) == 1
