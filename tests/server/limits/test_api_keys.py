"""API keys in a file: scopes, expiry, and rotation while the server runs."""

from __future__ import annotations

import hmac
import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infer_align.errors import ConfigError, Forbidden, Unauthorized
from infer_align_server.authorization import scope_of
from infer_align_server.cli import main
from infer_align_server.limits import key_file
from infer_align_server.limits.api_keys import ApiKeys
from infer_align_server.limits.key_file import SCOPES, KeyFile, hash_of
from tests.server.processes import LOCAL, Process

FAKE = '[engine]\nkind = "fake"\nreplies = [{text = "candidate 1"}, {text = "candidate 2"}]\n'
HI = [{"role": "user", "content": "hi"}]
CANDIDATES = {"messages": HI, "candidates": ["1", "2"]}
# {route: (its scope, a body)}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("generate", {"messages": HI}),
    "/v1/completions": ("generate", {"prompt": "hi"}),
    "/v1/align/score": ("score", CANDIDATES),
    "/v1/align/judge": ("score", CANDIDATES),
    "/v1/align/verify": ("score", {"query": "hi", "candidates": ["1"]}),
    "/v1/rerank": ("score", {"query": "hi", "documents": ["1", "2"]}),
    "/v1/align/feedback": ("feedback", {"profile": "u"}),
    "/v1/align/profiles/u/question": ("feedback", CANDIDATES),
}


def entry(key: str, name: str = "ann", scopes: tuple[str, ...] = SCOPES, more: str = "") -> str:
    listed = ", ".join(f'"{scope}"' for scope in scopes)
    return f'[[keys]]\nname = "{name}"\nsha256 = "{hash_of(key)}"\nscopes = [{listed}]\n{more}\n'


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys_at(tmp_path: Path) -> Any:
    """`keys_at(text)`: write the file of keys, as an editor does, and return its path."""
    path = tmp_path / "keys.toml"

    def write(text: str) -> str:
        new = tmp_path / "keys.new"
        new.write_text(text, encoding="utf-8")
        new.replace(path)
        return str(path)

    return write


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_does_what_its_scopes_allow_and_nothing_else(
    serve: Any, keys_at: Any, scope: str
) -> None:
    path = keys_at(entry("k", scopes=(scope,)))
    live = serve(f'[server]\napi_keys_file = "{path}"\n{FAKE}')
    for route, (needed, body) in ROUTES.items():
        answer = live.post(body, route, headers=bearer("k"))
        assert (answer.status_code == 403) is (scope != needed), (route, answer.text)
        if answer.status_code == 403:
            error = answer.json()["error"]
            assert error["code"] == "missing_scope"
            assert repr(needed) in error["message"]
            assert scope in error["message"]
    assert live.get("/v1/models", headers=bearer("k")).status_code == 200
    assert live.get("/v1/models").status_code == 401


def test_a_question_that_draws_needs_the_scope_to_generate(serve: Any, keys_at: Any) -> None:
    path = keys_at(entry("k", scopes=("feedback",)))
    live = serve(f'[server]\napi_keys_file = "{path}"\n{FAKE}')
    answer = live.post({"messages": HI}, "/v1/align/profiles/u/question", headers=bearer("k"))
    assert answer.status_code == 403


def test_the_routes_of_an_engine_that_change_it_need_admin() -> None:
    assert scope_of("/v1/embeddings") == "generate"
    assert scope_of("/tokenize") == "generate"
    assert scope_of("/score") == scope_of("/v2/rerank") == "score"
    for path in ("/v1/load_lora_adapter", "/sleep", "/reset_prefix_cache", "/v1", "/x/v1/chat"):
        assert scope_of(path) == "admin", path


def test_a_key_is_replaced_without_a_gap_and_keeps_its_caller(
    keys_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "CHECK_SECONDS", 0.0)
    keys = ApiKeys([], KeyFile(keys_at(entry("old"))))
    first = keys.caller("Bearer old", "")
    keys_at(entry("old") + entry("new"))
    assert keys.caller("Bearer old", "") == keys.caller("Bearer new", "") == first
    keys_at(entry("new"))
    assert keys.caller("Bearer new", "") == first
    with pytest.raises(Unauthorized):
        keys.caller("Bearer old", "")


def test_every_key_is_compared_with_all_others_in_constant_time(
    keys_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ApiKeys(["one", "two"], KeyFile(keys_at(entry("three", "ann") + entry("four", "bob"))))
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def counted(first: str, second: str) -> bool:
        compared.append((first, second))
        return compare(first, second)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for key in ("one", "two", "three", "four"):
        keys.caller(f"Bearer {key}", "")
        assert [second for _, second in compared] == [
            hash_of(each) for each in ("one", "two", "three", "four")
        ]
        # Only hashes of one length are compared, and never the key itself.
        assert {first for first, _ in compared} == {hash_of(key)}
        compared.clear()
    for key in ("", "o", "on", "one more", "fou"):
        with pytest.raises(Unauthorized):
            keys.caller(f"Bearer {key}", "")
        assert {second for _, second in compared} == {
            hash_of(each) for each in ("one", "two", "three", "four")
        }
        compared.clear()


def test_an_expired_key_is_no_key(keys_at: Any) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    future = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    old, new = entry("old", more=f"expires = {past}"), entry("new", more=f"expires = {future}")
    keys = ApiKeys([], KeyFile(keys_at(old + new)))
    assert keys.caller("Bearer new", "").name == "ann"
    with pytest.raises(Unauthorized, match=f"it expired at {re.escape(past)}; send"):
        keys.caller("Bearer old", "")
    with pytest.raises(Unauthorized, match="it is not a key of this server"):
        keys.caller("Bearer other", "")


@pytest.mark.parametrize(
    "broken", ["", "not toml", "[[keys]]\nname = 1\n", f"x = {'[' * 60_000}", None]
)
def test_a_broken_file_leaves_the_keys_as_they_were(
    keys_at: Any, broken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "CHECK_SECONDS", 0.0)
    path = keys_at(entry("k"))
    keys = ApiKeys([], KeyFile(path))
    if broken is None:
        Path(path).unlink()
    else:
        keys_at(broken)
    assert keys.caller("Bearer k", "").name == "ann"
    keys_at(entry("another"))
    assert keys.caller("Bearer another", "").name == "ann"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "'/no/such/file' cannot be read: No such file or directory; `infer-align keys new"),
        ("", "`infer-align keys new NAME` prints an entry"),
        ("keys = 1", "keys"),
        ("", "keys: is required"),
        ('[[keys]]\nname = "a"\n', "sha256: is required"),
        (entry("k", scopes=("genrate",)), "keys.0.scopes.0"),
        (entry("k", name="a b"), "keys.0.name"),
        (entry("k", more="expires = 2026-01-01T00:00:00"), "keys.0.expires"),
        (entry("k", more="scope = 1"), "keys.0.scope"),
    ],
)
def test_a_wrong_file_stops_the_start(keys_at: Any, text: str | None, message: str) -> None:
    path = "/no/such/file" if text is None else keys_at(text)
    with pytest.raises(ConfigError) as caught:
        KeyFile(path)
    assert message in caught.value.message
    assert "[server] api_keys_file" in caught.value.message


def test_a_byte_order_mark_and_line_ends_of_another_system_are_read(keys_at: Any) -> None:
    text = "\ufeff" + entry("k").replace("\n", "\r\n")
    assert ApiKeys([], KeyFile(keys_at(text))).caller("Bearer k", "").name == "ann"


def test_keys_of_the_environment_stay_beside_the_file(keys_at: Any) -> None:
    keys = ApiKeys(["plain"], KeyFile(keys_at(entry("k", scopes=("score",)))))
    assert keys.caller("Bearer plain", "", "admin").name == "key 0"
    with pytest.raises(Forbidden):
        keys.caller("Bearer k", "", "admin")


def test_a_new_key_works_as_its_printed_entry_says(
    keys_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "new", "search", "--scopes", "score,feedback"]) == 0
    printed = capsys.readouterr().out
    key = printed.splitlines()[0].rpartition(" ")[2]
    caller = ApiKeys([], KeyFile(keys_at(printed))).caller(f"Bearer {key}", "")
    assert (caller.name, caller.scopes) == ("search", ("score", "feedback"))
    assert main(["keys", "new", "search", "--scopes", "everything"]) != 0
    assert "scopes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hangup_reads_the_file_again(keys_at: Any, tmp_path: Path) -> None:
    path = keys_at(entry("old"))
    config = tmp_path / "infer-align.toml"
    config.write_text(f'[server]\napi_keys_file = "{path}"\n{FAKE}', encoding="utf-8")
    process = Process("--port", "0", str(config))
    try:
        with httpx2.Client(base_url=process.url(), **LOCAL) as http:
            assert http.get("/v1/models", headers=bearer("old")).status_code == 200
            keys_at(entry("new"))
            os.kill(process.popen.pid, signal.SIGHUP)
            process.log.find("API keys: read again")
            assert http.get("/v1/models", headers=bearer("new")).status_code == 200
            assert http.get("/v1/models", headers=bearer("old")).status_code == 401
    finally:
        process.popen.terminate()
        process.wait()
