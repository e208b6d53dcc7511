"""Rate limits and token budgets: the worst case is charged, and unused tokens are returned."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infer_align.errors import DeadlineExceeded, EngineFailed, Overloaded, Unavailable
from infer_align_server.limits.buckets import MAX_CALLERS, SharedBuckets
from infer_align_server.limits.rate_limit import RateLimit
from infer_align_server.limits.token_budget import charged
from tests.server.conftest import FOREVER

KEYS = '[server]\napi_keys_env = "TEST_BUDGET_KEYS"\n'
WORDS = '[engine]\nkind = "fake"\nreplies = [{text = "' + " ".join(["word"] * 30) + '"}]\n'
SLOW = (
    '[engine]\nkind = "fake"\n'
    'replies = [{text = "1 2 3 4 5 6 7 8 9 10", seconds_per_token = 0.3}]\n'
)
SILENT = f'[engine]\nkind = "fake"\nreplies = [{{text = "1", first_token_seconds = {FOREVER}}}]\n'
FAILS = '[engine]\nkind = "fake"\nreplies = [{text = "one two", error = "broken"}]\n'


class Clock:
    """A clock in seconds that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowance(per_minute: int) -> tuple[RateLimit, Clock]:
    clock = Clock()
    return RateLimit(per_minute, "things", "too_many", clock), clock


def refusal(bucket: RateLimit, caller: str, amount: int) -> float | None:
    """Take an amount; return the seconds to wait if it is refused."""
    try:
        bucket.take(caller, amount)
    except Overloaded as refused:
        return refused.retry_after
    return None


USES = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 200), st.floats(0, 30), st.floats(0, 1)),
    max_size=60,
)


@pytest.mark.slow
@given(st.integers(1, 100), USES)
def test_retry_after_is_true_and_the_average_holds(
    per_minute: int, uses: list[tuple[str, int, float, float]]
) -> None:
    bucket, clock = allowance(per_minute)
    net = {"a": 0, "b": 0}
    started = clock.now
    for caller, amount, pause, unspent in uses:
        clock.now += pause
        if wait := refusal(bucket, caller, amount):
            missing = min(amount, per_minute) - bucket.available(caller)
            assert 0 < wait <= missing * 60 / per_minute * 1.001
            clock.now += wait
            bucket.take(caller, amount)  # retry_after was right
        back = int(unspent * amount)
        bucket.give_back(caller, back)
        net[caller] += amount - back
        allowed = (
            per_minute * (1 + (clock.now - started) / 60) + 200
        )  # a full bucket, what flowed in, one debt
        assert net[caller] <= allowed + 1e-6
        assert bucket.available(caller) <= per_minute


def test_an_amount_above_the_bucket_is_allowed_when_it_is_full() -> None:
    bucket, clock = allowance(60)
    bucket.take("a", 180)
    assert bucket.available("a") == -120
    with pytest.raises(Overloaded) as caught:
        bucket.take("a", 180)
    assert caught.value.retry_after == pytest.approx(180)
    clock.now += 180
    bucket.take("a", 180)
    bucket.give_back("a", 180)
    assert bucket.available("a") == 60


def test_callers_have_separate_buckets_and_zero_is_no_limit() -> None:
    bucket, _ = allowance(1)
    bucket.take("a")
    bucket.take("b")
    with pytest.raises(Overloaded, match=r"limit is 1 things per minute and caller\. Wait 60 s"):
        bucket.take("a")
    unlimited, _ = allowance(0)
    for _ in range(1000):
        unlimited.take("a", 10**9)
    unlimited.give_back("a", 5)
    assert not unlimited.limited


@pytest.mark.anyio
async def test_tokens_beyond_the_worst_case_are_charged_too() -> None:
    bucket, _ = allowance(100)
    async with charged(bucket, "a", 10) as charge:
        charge.spent = 70
    assert bucket.available("a") == 30
    async with charged(bucket, "a", 10) as charge:
        charge.spent = 3
    assert bucket.available("a") == 27


@pytest.mark.anyio
async def test_a_deadline_is_charged_and_a_failure_is_not() -> None:
    bucket, _ = allowance(100)
    for error, paid in ((DeadlineExceeded("late"), 10), (EngineFailed("broken"), 0)):
        before = bucket.available("a")
        with contextlib.suppress(type(error)):
            async with charged(bucket, "a", 10) as charge:
                assert charge.start(None) is None, "a budget does not turn streaming on"
                raise error
        assert before - bucket.available("a") == paid


@pytest.mark.slow
def test_a_bucket_refills_and_full_buckets_are_deleted() -> None:
    rate, clock = allowance(60)
    for _ in range(60):
        rate.take("busy")
    with pytest.raises(Overloaded) as caught:
        rate.take("busy")
    assert caught.value.retry_after == pytest.approx(1.0)
    clock.now += 1.0
    rate.take("busy")
    for i in range(MAX_CALLERS + 100):
        rate.take(f"caller {i}")
        clock.now += 0.001
    assert len(rate._buckets) <= MAX_CALLERS


# --- through the server ---


@pytest.fixture
def budgeted(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`budgeted(engine, tokens per minute)`: a server with the keys a and b."""
    monkeypatch.setenv("TEST_BUDGET_KEYS", "a,b")

    def serve_budgeted(engine: str, tokens: int, name: str) -> Any:
        limits = f"[limits]\ncandidate_tokens_per_minute = {tokens}\n"
        live = serve(f"# {name}\n{KEYS}{limits}{engine}")
        # No bucket fills while the test runs.
        live.service.tokens._clock = Clock()
        return live

    return serve_budgeted


def ask(live: Any, key: str = "a", **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return live.post(body, headers={"authorization": f"Bearer {key}"})


def available(live: Any, key: int = 0) -> float:
    return float(live.service.tokens.available(f"key {key}"))


@pytest.mark.parametrize("stream", [False, True])
def test_the_worst_case_is_charged_and_unused_tokens_are_returned(
    budgeted: Any, stream: bool
) -> None:
    live = budgeted(WORDS, 100, f"refused {stream}")
    assert ask(live, max_tokens=90, stream=stream).status_code == 200
    assert live.idle()
    assert available(live) == 70, "thirty of ninety were spent"
    assert ask(live, max_tokens=35, n=2, stream=stream).status_code == 200, "sixty of seventy"
    assert live.idle()
    refused = ask(live, max_tokens=99, stream=stream)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "token_budget_exceeded"
    assert "may need 99" in refused.json()["error"]["message"]
    wait = int(refused.headers["retry-after"])
    assert wait == 54
    assert ask(live, "b", max_tokens=99, stream=stream).status_code == 200, (
        "another key's budget is its own"
    )
    assert ask(live, max_tokens=5, stream=stream).status_code == 200, "less fits"


def test_selection_counts_every_candidate(budgeted: Any) -> None:
    live = budgeted(
        f'[rewards.brief]\nkind = "rules"\nwords_weight = -1.0\n{WORDS}', 1000, "selection"
    )
    assert ask(live, max_tokens=40, align={"best_of_n": {"n": 20}}).status_code == 200
    assert available(live) == 400, "twenty times thirty were spent"


def test_a_refused_or_failed_request_pays_for_streamed_tokens(budgeted: Any) -> None:
    live = budgeted(FAILS, 6, "fails")
    assert ask(live, n=0).status_code == 400
    assert available(live) == 6
    assert ask(live, max_tokens=500).status_code == 502
    assert available(live) == 6, "tokens that were not streamed are not charged"
    assert ask(live, max_tokens=500, stream=True).status_code in {200, 502}
    assert live.idle()
    assert available(live) == 4, "two words were streamed before the failure"


def request_head(key: str, content: bytes) -> str:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(content)}\r\n\r\n"
    )


def hang_up(live: Any, has_started: Any, **fields: Any) -> None:
    """Send a request, wait until it has started, then disconnect."""
    content = json.dumps(
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 500, **fields}
    ).encode()
    head = request_head("a", content)
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as raw:
        raw.sendall(head.encode() + content)
        assert live.until(has_started)
        if fields.get("stream"):
            assert b"200" in raw.recv(100)
    assert live.idle()


def test_a_disconnect_pays_for_streamed_tokens(budgeted: Any) -> None:
    live = budgeted(SLOW, 6, "shown")
    hang_up(live, lambda: live.engine.running == 1, stream=True)
    assert -4 <= available(live) < 6


def test_a_disconnect_without_streamed_tokens_pays_the_worst_case(budgeted: Any) -> None:
    live = budgeted(SILENT, 1000, "nothing shown")
    hang_up(live, lambda: live.engine.running == 1)
    assert available(live) == 500


def test_a_disconnect_in_the_queue_pays_nothing(budgeted: Any) -> None:
    live = budgeted(f"max_running = 1\n{SILENT}", 100_000, "queue")
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    content = json.dumps(body).encode()
    head = request_head("b", content)
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as first:
        first.sendall(head.encode() + content)
        assert live.until(lambda: live.engine.running == 1)
        content = json.dumps({**body, "max_tokens": 500}).encode()
        head = request_head("a", content)
        with socket.create_connection(("127.0.0.1", live.port), timeout=60) as second:
            second.sendall(head.encode() + content)
            assert live.until(lambda: live.service.admission.queued == 1)
            assert available(live) == 99_500
        assert live.until(lambda: live.service.admission.queued == 0)
        assert live.until(lambda: available(live) == 100_000)
    assert live.idle()


def test_processes_share_the_buckets_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    SharedBuckets.make_file(path)
    clock = Clock()
    first, second, other = (
        RateLimit(60, unit, "too_many", clock, SharedBuckets(path, unit))
        for unit in ("things", "things", "other things")
    )
    first.take("a", 50)
    assert second.available("a") == 10
    assert refusal(second, "a", 20) == pytest.approx(10.0)
    assert other.available("a") == 60
    second.give_back("a", 15)
    assert first.available("a") == 25
    clock.now += 5
    assert first.available("a") == 30


def test_a_refusal_changes_no_shared_bucket(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    SharedBuckets.make_file(path)
    rate = RateLimit(10, "things", "too_many", Clock(), SharedBuckets(path, "things"))
    rate.take("a", 10)
    assert refusal(rate, "a", 1) is not None
    assert rate.available("a") == 0


def test_full_shared_buckets_are_deleted(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    SharedBuckets.make_file(path)
    clock = Clock()
    rate = RateLimit(60, "things", "too_many", clock, SharedBuckets(path, "things"))
    for i in range(MAX_CALLERS - 1):
        rate.take(str(i))
    clock.now += 60
    rate.take("last", 30)
    with sqlite3.connect(path) as connection:
        callers = connection.execute("SELECT caller FROM buckets").fetchall()
    connection.close()
    assert callers == [("last",)]


def test_shared_limits_that_cannot_be_counted_refuse_the_request(tmp_path: Path) -> None:
    path = tmp_path / "limits.sqlite"
    SharedBuckets.make_file(path)
    rate = RateLimit(60, "things", "too_many", Clock(), SharedBuckets(path, "things"))
    rate.take("a", 10)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE buckets")
    connection.close()
    with pytest.raises(Unavailable, match="cannot be counted: no such table"):
        rate.take("a", 10)
    # The answer of a request that has ended is not lost.
    rate.give_back("a", 5)
