"""Profiles over HTTP, with choices in the request, and stored ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from infer_align import config as configuration
from tests.server.conftest import Live, end, start
from tests.server.test_openapi import validator

LONG = {"chosen": "candidate 9", "rejected": "candidate 1"}
BRIEF = {"chosen": "candidate 1", "rejected": "and many more words 9"}
WEIGHTS = {"number": 1.0, "brevity": 0.0}


def ask(live: Any, profile: Any, status: int = 200, **align: Any) -> Any:
    align = {"best_of_n": {"n": 3}, "profile": profile, **align}
    answer = live.chat(align, seed=1)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_the_report_says_what_the_choices_changed(numbers: Any) -> None:
    answer = ask(numbers, {"weights": WEIGHTS, "choices": [BRIEF, LONG]})
    report = answer["align"]["profile"]
    assert report["adapt"] == "weights"
    assert report["choices"] == 2
    assert report["weights"]["brevity"] > 0
    assert report["uncertainty"].keys() == report["weights"].keys() == WEIGHTS.keys()
    assert answer["align"]["methods"] == ["profile", "best_of_n"]
    document = numbers.get("/openapi.json").json()
    validator(document, "ChatCompletion").validate(answer)


def test_weights_select_another_answer(numbers: Any) -> None:
    best = ask(numbers, {"weights": {"number": 1.0}})
    worst = ask(numbers, {"weights": {"number": -1.0}})
    assert best["choices"][0]["message"]["content"] == "candidate 9"
    assert worst["choices"][0]["message"]["content"] == "candidate 1"


def test_the_score_route_knows_profiles(numbers: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "candidates": ["candidate 1", "candidate 2"],
        "profile": {"weights": {"number": 0.0}, "choices": [{**LONG}] * 3},
    }
    answer = numbers.post(body, "/v1/align/score")
    assert answer.status_code == 200, answer.text
    assert answer.json()["ranking"] == [1, 0]
    assert answer.json()["profile"]["choices"] == 3


def test_a_stream_reports_the_profile_in_its_last_chunk(numbers: Any) -> None:
    align = {"profile": {"choices": [LONG], "description": "A child."}}
    text = numbers.chat(align, stream=True).text
    assert '"profile":{"adapt":"weights"' in text
    assert text.endswith("data: [DONE]\n\n")


def test_every_prompt_of_a_list_has_its_report(numbers: Any) -> None:
    body = {"prompt": ["a", "b"], "align": {"profile": {"choices": [LONG]}}}
    answer = numbers.post(body, "/v1/completions")
    assert answer.status_code == 200, answer.text
    reports = answer.json()["align"]["prompts"]
    assert [report["profile"]["choices"] for report in reports] == [1, 1]


@pytest.mark.parametrize(
    ("profile", "param"),
    [
        ({"id": "u17"}, "align.profile.id"),
        ({"weights": {"nubmer": 1}}, "align.profile.weights.nubmer"),
        ({"choices": [{**LONG, "messages": []}]}, "align.profile.choices.0.messages"),
        ({"choices": [LONG] * 300}, "align.profile.choices"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(numbers: Any, profile: Any, param: str) -> None:
    error = ask(numbers, profile, 400)["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_broken_reward_teaches_nothing(numbers: Any) -> None:
    weights = {"number": 1.0, "broken": 0.0}
    report = ask(numbers, {"weights": weights, "choices": [LONG]})["align"]["profile"]
    assert report["choices"] == 1
    assert report["weights"]["broken"] == 0
    assert report["failed"] == {"broken": 1}


def test_the_text_of_a_message_changes_no_weight(numbers: Any) -> None:
    plain = ask(numbers, {"choices": [LONG]})["align"]["profile"]
    messages = [{"role": "user", "content": '{"profile": {"weights": {"number": -5}}}'}]
    answer = numbers.post(
        {"messages": messages, "align": {"best_of_n": {"n": 3}, "profile": {"choices": [LONG]}}}
    )
    assert answer.json()["align"]["profile"] == plain


# --- stored profiles ---

STORED = """
[server]
api_keys_env = "PROFILE_TEST_KEYS"
default_rewards = {number = 1.0, brevity = 0.0}
[profiles]
store = "sqlite+aiosqlite:///STORE"
store_text = TEXT
spreads = {number = 3.0, brevity = 1.0}
traits = {terse = "brevity"}
[traits.terse]
prompt = "Answer in one word."
[engine]
kind = "fake"
replies = [{text = "candidate 3"}, {text = "candidate 1"}, {text = "candidate 9 9 9"}]
[rewards.number]
kind = "callable"
function = "tests.server.scorers:number"
[rewards.brevity]
kind = "rules"
words_weight = -1.0
"""
HI = [{"role": "user", "content": "hi"}]
CHOICE = {"messages": HI, "candidates": ["candidate 1", "more than candidate 9"], "chosen": 0}
ANN = {"authorization": "Bearer ann"}
BOB = {"authorization": "Bearer bob"}


@pytest.fixture
def keeping(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`keeping(store_text=False)`: a server that keeps profiles in a new file.

    `number` is the function of `tests.server.scorers` behind the reward of this name.
    """
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    monkeypatch.setenv("PROFILE_TEST_KEYS", "ann,bob")
    running: list[Live] = []

    def keep(
        *, store_text: bool = False, name: str = "profiles.db", number: str = "number"
    ) -> Live:
        text = STORED.replace("STORE", str(tmp_path / name)).replace(
            "TEXT", str(store_text).lower()
        )
        text = text.replace("scorers:number", f"scorers:{number}")
        path = tmp_path / "infer-align.toml"
        path.write_text(text, encoding="utf-8")
        running.append(start(configuration.load(path)))
        return running[-1]

    yield keep
    for live in running:
        end(live)


def send(live: Live, body: Any, headers: Any = ANN, path: str = "/v1/align/feedback") -> Any:
    return live.post(body, path, headers=headers)


def test_the_routes_are_described_where_profiles_are_kept(keeping: Any) -> None:
    paths = keeping().get("/openapi.json", headers=ANN).json()["paths"]
    assert {*paths["/v1/align/profiles/{id}"]} == {"get", "delete"}
    assert {"/v1/align/feedback", "/v1/align/profiles/{id}/question"} <= {*paths}


def test_feedback_makes_a_profile_that_answers_follow(keeping: Any) -> None:
    live = keeping()
    for count in (1, 2, 3):
        answer = send(live, {"profile": "u17", **CHOICE})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == count
    assert answer.json()["weights"]["brevity"] > 0
    align = {"best_of_n": {"n": 3}, "profile": {"id": "u17"}}
    body = {"messages": HI, "align": align}
    report = send(live, body, path="/v1/chat/completions").json()["align"]["profile"]
    assert report["id"] == "u17"
    assert report["choices"] == 3
    assert report["weights"]["brevity"] == pytest.approx(answer.json()["weights"]["brevity"])
    shown = live.get("/v1/align/profiles/u17", headers=ANN).json()
    assert shown["weights"] == answer.json()["weights"]
    assert any("brevity" in sentence and "more" in sentence for sentence in shown["words"])
    low, high = shown["scales"]["terse"]["bounds"]
    assert low < 0 < shown["scales"]["terse"]["scale"] <= high
    assert any(sentence.startswith("trait terse: ") for sentence in shown["words"])
    assert live.metric("infer_align_profile_choices_total") == 3
    document = live.get("/openapi.json", headers=ANN).json()
    validator(document, "Feedback").validate(answer.json())
    validator(document, "Profile").validate(shown)


@pytest.mark.parametrize("profile_id", ["u17", "u18", "x' OR '1'='1"])
def test_another_key_gets_the_same_404_as_a_made_up_id(keeping: Any, profile_id: str) -> None:
    live = keeping()
    send(live, {"profile": "u17", **CHOICE})
    errors = []
    for path in ("", "/export"):
        answer = live.get(f"/v1/align/profiles/{profile_id}{path}", headers=BOB)
        assert answer.status_code == 404
        errors.append(answer.json()["error"]["message"].replace(profile_id, "X"))
    with live.http() as client:
        answer = client.delete(f"/v1/align/profiles/{profile_id}", headers=BOB)
    assert answer.status_code == 404
    body = {"messages": HI, "candidates": ["a", "b"]}
    path = f"/v1/align/profiles/{profile_id}/question"
    assert send(live, body, BOB, path).status_code == 404
    made_up = live.get("/v1/align/profiles/none", headers=BOB).json()["error"]["message"]
    assert {made_up.replace("none", "X")} == {error.replace('"', "'") for error in errors}
    assert live.get("/v1/align/profiles/u17", headers=ANN).json()["choices"] == 1
    request = {"messages": HI, "align": {"profile": {"id": "u17"}}}
    refused = send(live, request, BOB, "/v1/chat/completions")
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "align.profile.id")


def test_a_deleted_profile_is_gone(keeping: Any) -> None:
    live = keeping()
    send(live, {"profile": "u17", **CHOICE})
    with live.http() as client:
        assert client.delete("/v1/align/profiles/u17", headers=ANN).json()["deleted"] is True
        assert client.delete("/v1/align/profiles/u17", headers=ANN).status_code == 404
    assert live.get("/v1/align/profiles/u17", headers=ANN).status_code == 404


def test_texts_are_kept_only_if_the_configuration_says_so(keeping: Any, tmp_path: Any) -> None:
    live = keeping()
    send(live, {"profile": "u17", "request_id": "r1", **CHOICE})
    (choice,) = live.get("/v1/align/profiles/u17/export", headers=ANN).json()["choices"]
    assert choice["text"] is None
    assert choice["request_id"] == "r1"
    assert set(choice["differences"]) == {"number", "brevity"}
    assert not [path for path in tmp_path.iterdir() if b"more than candidate" in path.read_bytes()]
    align = {"profile": {"id": "u17", "adapt": "in_context"}}
    refused = send(live, {"messages": HI, "align": align}, path="/v1/chat/completions")
    assert refused.status_code == 400
    assert "store_text" in refused.json()["error"]["message"]


def test_kept_texts_stand_in_the_prompt(keeping: Any) -> None:
    live = keeping(store_text=True)
    send(live, {"profile": "u17", "description": "A child.", **CHOICE})
    align = {"profile": {"id": "u17", "adapt": "in_context"}}
    answer = send(live, {"messages": HI, "align": align}, path="/v1/chat/completions").json()
    assert answer["align"]["profile"]["choices"] == 1
    exported = live.get("/v1/align/profiles/u17/export", headers=ANN).json()
    assert exported["description"] == "A child."
    assert exported["choices"][0]["text"]["rejected"] == "more than candidate 9"


def test_a_question_is_asked_about_given_or_drawn_answers(keeping: Any) -> None:
    live = keeping()
    send(live, {"profile": "u17", "description": "new", "weights": {"brevity": 0.5}})
    path = "/v1/align/profiles/u17/question"
    given = {"messages": HI, "candidates": ["candidate 1", "candidate 1", "so much more 9"]}
    asked = send(live, given, path=path)
    assert asked.status_code == 200, asked.text
    assert asked.json()["pair"] == [0, 2]
    same = send(live, {"messages": HI, "candidates": ["a", "a"]}, path=path)
    assert (same.status_code, same.json()["error"]["param"]) == (400, "candidates")
    one = send(live, {"messages": HI, "n": 1}, path=path)
    assert one.status_code == 424
    assert "raise temperature or n, or send candidates" in one.json()["error"]["message"]
    # A null counts as left out, as in other requests.
    drawn = send(live, {"messages": HI, "n": 3, "seed": 1, "align": None}, path=path)
    assert len(drawn.json()["candidates"]) == 3
    refused = send(live, {"messages": HI, "align": {}}, path=path)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "align")
    assert drawn.json()["answers"] == [drawn.json()["candidates"][i] for i in drawn.json()["pair"]]


def test_a_rating_says_how_much_better_an_answer_is(keeping: Any) -> None:
    live = keeping()
    for name, rating in (("up", 1), ("half", 0.5), ("down", -1)):
        send(live, {"profile": name, "rating": rating, **CHOICE})
    weights = {
        name: live.get(f"/v1/align/profiles/{name}", headers=ANN).json()["weights"]["brevity"]
        for name in ("up", "half", "down")
    }
    assert weights["down"] < 0 < weights["half"] < weights["up"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"profile": "a b", **CHOICE}, "profile"),
        ({"profile": "u", "messages": HI}, "chosen"),
        ({"profile": "u", "candidates": ["a", "b"], "chosen": 0}, "messages"),
        ({"profile": "u", **CHOICE, "chosen": 2}, "chosen"),
        ({"profile": "u", **CHOICE, "rejected": 0}, "rejected"),
        ({"profile": "u", **CHOICE, "candidates": ["only"]}, "rejected"),
        ({"profile": "u", **CHOICE, "rejected": 1, "rating": 1}, "rating"),
        ({"profile": "u", **CHOICE, "rating": 0}, "rating"),
        ({"profile": "u", **CHOICE, "rating": 7}, "rating"),
        ({"profile": "u", "weights": {"nubmer": 1}}, "weights.nubmer"),
        ({"profile": "u", "chose": 1}, "chose"),
        ({**CHOICE}, "profile"),
        ({"profile": "u", **CHOICE, "candidates": ["a"] * 1000}, "candidates"),
    ],
)
def test_wrong_feedback_is_refused_by_name(keeping: Any, body: Any, param: str) -> None:
    live = keeping()
    answer = send(live, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert live.get("/v1/align/profiles/u", headers=ANN).status_code == 404


def test_a_replica_reads_what_another_wrote(keeping: Any) -> None:
    first, second = keeping(), keeping()
    send(first, {"profile": "u17", **CHOICE})
    send(second, {"profile": "u17", **CHOICE})
    for live in (first, second):
        assert live.get("/v1/align/profiles/u17", headers=ANN).json()["choices"] == 2


def test_feedback_that_is_sent_again_counts_once_per_request(keeping: Any) -> None:
    live = keeping()
    body = {"profile": "u17", "request_id": "r1", **CHOICE}
    first, again = send(live, body).json(), send(live, body).json()
    assert (first.pop("added"), again.pop("added")) == (1, 0)
    assert first == again
    other = send(live, {**body, "request_id": "r2"}).json()
    assert (other["added"], other["choices"]) == (1, 2)
    assert live.metric("infer_align_profile_choices_total") == 2


def test_feedback_says_which_rewards_could_not_score_it(keeping: Any, tmp_path: Any) -> None:
    live = keeping()
    assert send(live, {"profile": "u17", **CHOICE}).json()["failed"] == {}
    # `number` reads the last word of an answer.
    wordless = {**CHOICE, "candidates": ["no number", "none either"]}
    answer = send(live, {"profile": "u17", **wordless})
    assert answer.json()["failed"] == {"number": 1}
    assert (answer.json()["added"], answer.json()["choices"]) == (1, 2)


def test_equal_candidates_of_a_request_are_one_choice(keeping: Any) -> None:
    live = keeping()
    answers = ["candidate 1", "candidate 9", "candidate 9"]
    body = {"profile": "u17", "request_id": "r1", **CHOICE, "candidates": answers}
    first, again = send(live, body).json(), send(live, body).json()
    assert (first["added"], again["added"]) == (1, 0)
    assert first["choices"] == again["choices"] == 1


def test_feedback_that_is_sent_again_says_what_the_stored_choice_lacks(keeping: Any) -> None:
    body = {"profile": "u17", "request_id": "r1", **CHOICE}
    first = send(keeping(number="fails"), body).json()
    again = send(keeping(), body).json()
    assert (first["added"], again["added"]) == (1, 0)
    assert first["failed"] == again["failed"] == {"number": 1}


@pytest.mark.slow
def test_many_clients_at_once_lose_nothing(keeping: Any) -> None:
    live = keeping()
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"profile": f"u{i % 2}", **CHOICE} for i in range(32)]
        answers = list(pool.map(lambda body: send(live, body), bodies))
    assert {answer.status_code for answer in answers} == {200}
    for name in ("u0", "u1"):
        assert live.get(f"/v1/align/profiles/{name}", headers=ANN).json()["choices"] == 16


def test_answers_go_on_without_a_store(keeping: Any) -> None:
    live = keeping(name="no such folder/profiles.db")
    refused = send(live, {"profile": "u17", **CHOICE})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_unavailable"
    request = {"messages": HI, "align": {"profile": {"id": "u17"}}}
    assert send(live, request, path="/v1/chat/completions").status_code == 503
    request = {"messages": HI, "align": {"profile": {"choices": [LONG]}}}
    assert send(live, request, path="/v1/chat/completions").status_code == 200
    assert live.get("/ready").json()["ready"] is True


def test_a_server_without_a_store_says_so(numbers: Any) -> None:
    answer = numbers.post({"profile": "u17", **CHOICE}, "/v1/align/feedback")
    assert answer.status_code == 400
    assert "[profiles] store" in answer.json()["error"]["message"]
    assert numbers.get("/v1/align/profiles/u17").status_code == 400
