"""Admission is fair to callers, keeps each caller's order, holds its bounds and leaks nothing."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_align import config as configuration
from infer_align.errors import DeadlineExceeded, Overloaded
from infer_align_server.limits.admission import MAX_CALLERS, Admission

Arrivals = list[tuple[str, int]]


async def served(
    arrivals: Arrivals, leave: frozenset[int] = frozenset(), **limits: int
) -> list[int]:
    """Return the order in which requests that wait at the same time are admitted.

    The requests in `leave` disconnect while they wait.
    """
    admission = Admission(configuration.Limits(**{"max_running": 1, "max_queue": 10_000, **limits}))
    order = []
    gate = asyncio.Event()

    async def hold() -> None:
        async with admission.admit(1, caller="gate"):
            await gate.wait()

    async def one(i: int, caller: str, tokens: int) -> None:
        async with admission.admit(tokens, caller=caller):
            order.append(i)
            await asyncio.sleep(0)

    first = asyncio.create_task(hold())
    await asyncio.sleep(0)
    tasks = [asyncio.create_task(one(i, *arrival)) for i, arrival in enumerate(arrivals)]
    await asyncio.sleep(0)
    for i in leave:
        tasks[i].cancel()
    gate.set()
    await asyncio.gather(first, *tasks, return_exceptions=True)
    assert (admission.running, admission.running_tokens, admission.queued) == (0, 0, 0)
    return order


TRAFFIC = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=40)


@pytest.mark.slow
@given(TRAFFIC)
@settings(max_examples=200, deadline=None)
def test_waiting_callers_get_equal_shares(arrivals: Arrivals) -> None:
    order = asyncio.run(served(arrivals))
    assert sorted(order) == list(range(len(arrivals))), "every request is admitted in the end"
    waiting = Counter(caller for caller, _ in arrivals)
    largest = {
        caller: max(max(1, n) for name, n in arrivals if name == caller) for caller in waiting
    }
    admitted_tokens: Counter[str] = Counter()
    for i in order:
        caller, tokens = arrivals[i]
        admitted_tokens[caller] += max(1, tokens)
        waiting[caller] -= 1
        waiting_callers = [
            name for name, remaining in waiting.items() if remaining
        ]  # the bound holds while both wait
        for a in waiting_callers:
            for b in waiting_callers:
                assert abs(admitted_tokens[a] - admitted_tokens[b]) <= largest[a] + largest[b], (
                    a,
                    b,
                    admitted_tokens,
                )


@pytest.mark.slow
@given(TRAFFIC, st.data())
@settings(max_examples=100, deadline=None)
def test_each_caller_keeps_its_order_when_requests_leave(
    arrivals: Arrivals, data: st.DataObject
) -> None:
    leave = (
        data.draw(st.frozensets(st.sampled_from(range(len(arrivals))))) if arrivals else frozenset()
    )
    order = asyncio.run(served(arrivals, leave))
    assert set(order) == set(range(len(arrivals))) - leave
    for caller in "abc":
        of_caller = [i for i in order if arrivals[i][0] == caller]
        assert of_caller == sorted(of_caller)


@pytest.mark.parametrize(
    ("running", "waiting", "message"),
    [
        (1, 0, "1 request is running and 0 are waiting, the limit of this server"),
        (1, 1, "1 request is running and 1 is waiting,"),
        (2, 1, "2 requests are running and 1 is waiting,"),
        (2, 3, "2 requests are running and 3 are waiting,"),
    ],
)
def test_a_refusal_says_what_runs_and_what_waits(running: int, waiting: int, message: str) -> None:
    async def scenario() -> None:
        limits = configuration.Limits(max_running=running, max_queue=waiting)
        admission = Admission(limits)
        gate = asyncio.Event()

        async def one(caller: str) -> None:
            async with admission.admit(1, caller=caller):
                await gate.wait()

        tasks = [asyncio.create_task(one("flood")) for _ in range(running + waiting)]
        await asyncio.sleep(0)
        refused = [one("flood")]
        if waiting > 1:
            # A request of another caller takes the place of one that waits.
            tasks.append(asyncio.create_task(one("other")))
            refused.append(tasks.pop(running + waiting - 1))
        for each in refused:
            with pytest.raises(Overloaded) as caught:
                await each
            assert caught.value.message.startswith(message)
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_flood_does_not_starve_another_caller() -> None:
    flood = [("flood", 100)] * 500
    order = asyncio.run(served([*flood, ("quiet", 100), ("quiet", 100)]))
    assert order.index(500) <= 2
    assert order.index(501) <= 4


def test_a_caller_with_small_requests_gets_more_turns() -> None:
    arrivals = [("large", 1000)] * 5 + [("small", 10)] * 300
    order = asyncio.run(served(arrivals))
    before_the_third = order[: order.index(2)]
    assert sum(i >= 5 for i in before_the_third) >= 100


def test_an_absent_caller_gains_nothing() -> None:
    """A new caller gets its share from now on, and nothing for the time before it came."""

    async def scenario() -> list[str]:
        admission = Admission(configuration.Limits(max_running=1))
        order = []
        late = []

        async def one(caller: str) -> None:
            async with admission.admit(10, caller=caller):
                order.append(caller)
                if len(order) == 10:
                    late.extend(asyncio.create_task(one("late")) for _ in range(5))
                await asyncio.sleep(0)

        await asyncio.gather(*(one("early") for _ in range(20)))
        await asyncio.gather(*late)
        return order

    order = asyncio.run(scenario())
    assert order[:10] == ["early"] * 10
    assert order[10:20].count("late") == 5, "one each, in turn"
    assert "late" not in order[20:]
    assert order[10:14].count("late") == 2


def test_a_caller_that_held_every_place_waits_behind_a_new_one() -> None:
    """Requests that ran without waiting count too."""

    async def scenario() -> list[str]:
        admission = Admission(configuration.Limits(max_running=3))
        order = []
        gate = asyncio.Event()

        async def one(caller: str) -> None:
            async with admission.admit(10, caller=caller):
                order.append(caller)
                await gate.wait()

        tasks = [asyncio.create_task(one("a")) for _ in range(5)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("b")))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scenario()) == ["a", "a", "a", "b", "a", "a"]


def test_a_flood_does_not_keep_others_out_of_the_queue() -> None:
    async def scenario() -> None:
        admission = Admission(configuration.Limits(max_running=1, max_queue=4))
        gate = asyncio.Event()

        async def one(caller: str) -> str:
            async with admission.admit(1, caller=caller):
                await gate.wait()
            return caller

        tasks = [asyncio.create_task(one("flood")) for _ in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await one("flood")
        assert caught.value.code == "queue_full"
        assert (caught.value.retry_after or 0) >= 1
        other_tasks = [asyncio.create_task(one(f"other {i}")) for i in range(4)]
        await asyncio.sleep(0)
        assert admission.queued == 4
        gate.set()
        done = await asyncio.gather(*tasks, *other_tasks, return_exceptions=True)
        gone = [isinstance(result, Overloaded) for result in done]
        assert gone == [False, False, True, True, True, False, False, False, True], (
            "down to one place each, the newest goes first"
        )
        assert (admission.running, admission.queued) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(1, 30), st.sampled_from(["stay", "leave", "late"])
        ),
        max_size=30,
    )
)
@settings(max_examples=100, deadline=None)
def test_bounds_hold_and_nothing_leaks(arrivals: list[tuple[str, int, str]]) -> None:
    async def scenario() -> None:
        admission = Admission(
            configuration.Limits(max_running=2, max_running_tokens=40, max_queue=5)
        )

        async def one(caller: str, tokens: int, behaviour: str) -> None:
            async with admission.admit(tokens, 0.0 if behaviour == "late" else None, caller):
                assert admission.running <= 2
                assert admission.running_tokens <= 40
                await asyncio.sleep(0)

        tasks = []
        for arrival in arrivals:
            tasks.append(asyncio.create_task(one(*arrival)))
            if arrival[2] == "leave":
                await asyncio.sleep(0)
                tasks[-1].cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(
                result, Overloaded | DeadlineExceeded | asyncio.CancelledError
            ), result
        assert (admission.running, admission.running_tokens, admission.queued) == (0, 0, 0)
        assert not admission._virtual_times

    asyncio.run(scenario())


def test_callers_of_the_past_are_deleted() -> None:
    async def scenario() -> None:
        admission = Admission(configuration.Limits(max_running=MAX_CALLERS * 2))
        gate = asyncio.Event()

        async def hold() -> None:
            async with admission.admit(1, caller="first"):
                await gate.wait()

        first = asyncio.create_task(hold())
        for i in range(MAX_CALLERS + 5):
            async with admission.admit(1, caller=f"caller {i}"):
                await asyncio.sleep(0)
            admission._now += 1
        assert len(admission._virtual_times) < 100
        gate.set()
        await first

    asyncio.run(scenario())


def test_admission_is_first_come_first_served_and_leaks_nothing() -> None:
    limits = configuration.Limits(max_running=2, max_running_tokens=10, max_queue=50)

    async def scenario() -> list[int]:
        admission = Admission(limits)
        order = []

        async def one(i: int) -> None:
            async with admission.admit(5 if i % 3 else 10):
                order.append(i)
                await asyncio.sleep(0.001)

        tasks = [asyncio.create_task(one(i)) for i in range(30)]
        await asyncio.sleep(0)
        for i in (5, 11, 28):
            tasks[i].cancel()
        await asyncio.wait(tasks)
        assert (admission.running, admission.running_tokens, admission.queued) == (0, 0, 0)
        return order

    assert asyncio.run(scenario()) == [i for i in range(30) if i not in {5, 11, 28}]


def test_leaving_at_the_moment_of_admission_leaks_nothing() -> None:
    async def scenario() -> None:
        admission = Admission(configuration.Limits(max_running=1))
        release = asyncio.Event()

        async def hold(event: asyncio.Event) -> None:
            async with admission.admit(1):
                await event.wait()

        first = asyncio.create_task(hold(release))
        await asyncio.sleep(0)
        second = asyncio.create_task(hold(asyncio.Event()))
        third = asyncio.create_task(hold(release))
        await asyncio.sleep(0)
        release.set()
        first.add_done_callback(lambda _: second.cancel())
        await asyncio.wait({first, second, third}, timeout=60)
        assert third.done(), "the place of the one that left goes on to the next"
        assert (admission.running, admission.running_tokens, admission.queued) == (0, 0, 0)

    asyncio.run(scenario())


def test_a_deadline_in_the_queue_leaks_nothing() -> None:
    async def scenario() -> None:
        admission = Admission(configuration.Limits(max_running=1))
        async with admission.admit(1):
            for seconds in (0.0, 0.01):
                with pytest.raises(DeadlineExceeded):
                    async with admission.admit(1, seconds):
                        pytest.fail("admitted")
        assert (admission.running, admission.queued) == (0, 0)

    asyncio.run(scenario())


def test_a_flood_with_one_key_does_not_delay_another(
    serve: Any, monkeypatch: pytest.MonkeyPatch, hold: threading.Event
) -> None:
    monkeypatch.setenv("TEST_FAIR_KEYS", "flood,quiet")
    live = serve(
        '[server]\napi_keys_env = "TEST_FAIR_KEYS"\n[limits]\nmax_running = 1\n'
        '[engine]\nkind = "fake"\nreplies = [{text = "one 2"}]\n'
        '[rewards.hanging]\nkind = "callable"\nfunction = "tests.server.scorers:hanging"\n'
    )
    statuses: list[int] = []

    def send(key: str) -> None:
        body = {
            "messages": [{"role": "user", "content": key}],
            "max_tokens": 5,
            "align": {"best_of_n": {"n": 2}},
        }
        answer = live.post(body, headers={"authorization": f"Bearer {key}"})
        statuses.append(answer.status_code)

    flood = [threading.Thread(target=send, args=("flood",)) for _ in range(15)]
    for thread in flood:
        thread.start()
    # The reward holds the first request; the others wait.
    assert live.until(lambda: live.service.admission.queued == 14)
    quiet = threading.Thread(target=send, args=("quiet",))
    quiet.start()
    assert live.until(lambda: live.service.admission.queued == 15)
    hold.set()
    for thread in [*flood, quiet]:
        thread.join()
    assert statuses == [200] * 16
    order = [body["messages"][0]["content"] for body in live.engine.bodies]
    assert order.index("quiet") <= 5, "not behind the whole queue"
    assert live.idle()
