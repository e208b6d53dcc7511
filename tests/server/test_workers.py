"""`[server] workers`: several real processes behind one address."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from infer_align import config as configuration
from infer_align.errors import ConfigError
from tests.server.processes import LIMIT_SECONDS, LOCAL, Process, run

pytestmark = pytest.mark.slow

FAKE = '[engine]\nkind = "fake"\nreplies = [{text = "one two three"}]\n'
WORKERS = f"{FAKE}[server]\nworkers = 2\n"
HELD = (
    f"{WORKERS}worker_timeout_seconds = 5\n[rewards.held]\n"
    'kind = "callable"\nfunction = "tests.server.scorers:held_by_a_file"\n'
)
BODY = {"messages": [{"role": "user", "content": "hello"}]}
BEST_OF_2 = {**BODY, "align": {"best_of_n": {"n": 2}}}

ConfigFile = Callable[[str], Path]


@pytest.fixture(scope="module")
def hold_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for which the requests of the server `held` wait."""
    return tmp_path_factory.mktemp("hold") / "go"


@pytest.fixture(scope="module")
def held_config(config_file: ConfigFile) -> Path:
    """The configuration of the server `held`."""
    return config_file(HELD)


@pytest.fixture(scope="module")
def held(held_config: Path, hold_file: Path) -> Iterator[Process]:
    """A server with two workers; the last test that uses it ends it."""
    yield from serve_until_ended(held_config, TEST_HOLD_FILE=str(hold_file))


@pytest.fixture(scope="module")
def limited(config_file: ConfigFile) -> Iterator[Process]:
    """A server with two workers and a limit of the rate; the last test that uses it ends it."""
    yield from serve_until_ended(config_file(f"{WORKERS}[limits]\nrequests_per_minute = 10\n"))


def serve_until_ended(path: Path, **environment: str) -> Iterator[Process]:
    """Start a server, and kill it after the tests unless it has ended.

    A fork cannot have workers, so the server is a fresh process.
    """
    server = Process("--port", "0", str(path), fresh=True, **environment)
    yield server
    if server.popen.poll() is None:
        server.popen.kill()
    server.wait()


def post(url: str, body: object = BODY) -> httpx2.Response:
    """Send a request on a connection of its own."""
    return httpx2.post(f"{url}/v1/chat/completions", json=body, **LOCAL)


def model_times(url: str) -> set[int]:
    """Return the times of creation that the workers list for their models."""
    times: set[int] = set()
    for _ in range(20):
        (model,) = httpx2.get(f"{url}/v1/models", **LOCAL).json()["data"]
        times.add(model["created"])
    return times


def process_ids(server: Process) -> list[int]:
    """Return the process ids of all workers that were started, in this order."""
    return [event["worker"] for event in server.events() if event["event"] == "worker started"]


def access_lines(server: Process) -> list[dict[str, Any]]:
    return [event for event in server.events() if event.get("route") == "/v1/chat/completions"]


def metric(url: str, line: str) -> float:
    text = httpx2.get(f"{url}/metrics", **LOCAL).text
    samples = [each for each in text.splitlines() if each.startswith(line)]
    return sum(float(sample.rpartition(" ")[2]) for sample in samples)


def until(condition: Callable[[], bool]) -> None:
    end_time = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < end_time
        time.sleep(0.02)


class Senders:
    """Requests that wait for a file, each on a connection and a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads: list[threading.Thread] = []
        self.answers: list[int] = []

    def start(self) -> None:
        thread = threading.Thread(target=self._send)
        thread.start()
        self._threads.append(thread)

    def _send(self) -> None:
        try:
            self.answers.append(post(self._url, BEST_OF_2).status_code)
        except httpx2.TransportError:
            self.answers.append(0)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LIMIT_SECONDS)


def test_requests_are_spread_and_one_scrape_covers_all_workers(held: Process) -> None:
    server = held
    url = server.url()
    until(lambda: metric(url, "infer_align_workers ") == 2)
    sent = 0
    while len({line["worker"] for line in access_lines(server)}) < 2:
        assert post(url).status_code == 200
        sent += 1
        assert sent < 1000
    assert {line["worker"] for line in access_lines(server)} == set(process_ids(server))
    requests = 'infer_align_requests_total{route="/v1/chat/completions",status="200"}'
    # A line is written just after its answer.
    until(lambda: metric(url, requests) == sent)
    assert metric(url, 'infer_align_tokens_total{kind="returned"}') == 3 * sent
    assert metric(url, "infer_align_request_seconds_count ") == sent
    assert metric(url, "infer_align_ready ") == 1
    screen = "".join(server.screen.lines)
    assert screen.count("infer-align serves") == 1
    assert "2 processes; each runs 32 requests and queues 128" in screen


def test_a_killed_worker_loses_its_own_requests_alone(held: Process, hold_file: Path) -> None:
    server = held
    url = server.url()
    until(lambda: metric(url, "infer_align_workers ") == 2)
    killed, other = map(psutil.Process, process_ids(server))
    created = model_times(url)
    assert len(created) == 1
    senders = Senders(url)
    # Every held request is a connection of one of the two.
    sent = 0
    while not (connections(killed) and connections(other)):
        senders.start()
        sent += 1
        # One at a time, so that no more wait than the workers run.
        until(lambda count=sent: len(connections(killed)) + len(connections(other)) == count)
    until(lambda: metric(url, "infer_align_running_requests ") == sent)
    lost = len(connections(killed))
    killed.send_signal(signal.SIGKILL)
    server.log.find("worker lost")
    assert [post(url).status_code for _ in range(20)] == [200] * 20
    until(lambda: metric(url, "infer_align_running_requests ") == sent - lost)
    hold_file.touch()
    senders.join()
    assert sorted(senders.answers) == [0] * lost + [200] * (sent - lost)
    until(lambda: len(process_ids(server)) == 3)
    until(lambda: metric(url, "infer_align_workers ") == 2)
    assert model_times(url) == created


def test_a_hung_worker_is_replaced_and_the_others_go_on(held: Process, hold_file: Path) -> None:
    server = held
    url = server.url()
    hold_file.unlink(missing_ok=True)
    started = process_ids(server)
    hung, other = [psutil.Process(number) for number in started if psutil.pid_exists(number)]
    senders = Senders(url)
    sent = 0
    while not (connections(hung) and connections(other)):
        senders.start()
        sent += 1
        until(lambda count=sent: len(connections(hung)) + len(connections(other)) == count)
    lost = len(connections(hung))
    hung.send_signal(signal.SIGSTOP)
    server.log.find("worker killed: it does not answer")
    # The connections of the stopped process are closed, those of the other are not.
    until(lambda: len(senders.answers) == lost)
    assert senders.answers == [0] * lost
    assert [post(url).status_code for _ in range(20)] == [200] * 20
    hold_file.touch()
    senders.join()
    assert sorted(senders.answers) == [0] * lost + [200] * (sent - lost)
    until(lambda: metric(url, "infer_align_workers ") == 2)
    assert other.is_running()
    assert len(process_ids(server)) == len(started) + 1
    (killed,) = [event for event in server.events() if "does not answer" in event["event"]]
    assert (killed["worker"], killed["seconds"]) == (hung.pid, 5)


def connections(process: psutil.Process) -> list[Any]:
    return [each for each in process.net_connections() if each.status == "ESTABLISHED"]


def test_sighup_reads_the_configuration_without_a_lost_request(
    held: Process, held_config: Path
) -> None:
    server, path = held, held_config
    url = server.url()
    until(lambda: metric(url, "infer_align_workers ") == 2)
    path.write_text(f"{HELD}[limit]\n", encoding="utf-8")
    server.popen.send_signal(signal.SIGHUP)
    server.log.find("the configuration stays as it was: .limit.: no such section")
    path.write_text(
        f'{HELD}[rewards.none]\nkind = "callable"\nfunction = "no_such_module:f"\n',
        encoding="utf-8",
    )
    server.popen.send_signal(signal.SIGHUP)
    server.log.find("the configuration stays as it was: .*no_such_module")
    assert post(url).status_code == 200
    more_workers = HELD.replace("workers = 2", "workers = 3\nserved_name = 'new'")
    path.write_text(more_workers, encoding="utf-8")
    server.popen.send_signal(signal.SIGHUP)
    statuses = [post(url).status_code]
    while not any("read again" in line for line in server.log.lines):
        statuses.append(post(url).status_code)
    assert set(statuses) == {200}
    until(lambda: metric(url, "infer_align_workers ") == 3)
    # On a busy machine, an old worker may accept a last connection before it sees that it ends.
    until(lambda: post(url).json()["model"] == "new")


def test_sigterm_finishes_running_requests_of_every_worker(held: Process, hold_file: Path) -> None:
    server = held
    url = server.url()
    hold_file.unlink(missing_ok=True)
    earlier = len(server.events())
    senders = Senders(url)
    for _ in range(8):
        senders.start()
    until(lambda: metric(url, "infer_align_running_requests ") == 8)
    server.popen.send_signal(signal.SIGTERM)
    until(lambda: is_refused(url))
    assert not senders.answers
    hold_file.touch()
    senders.join()
    assert senders.answers == [200] * 8
    assert server.wait() == 0
    assert {event["level"] for event in server.events()[earlier:]} == {"info"}


def is_refused(url: str) -> bool:
    try:
        httpx2.get(f"{url}/health", **LOCAL)
    except httpx2.TransportError:
        return True
    return False


def test_a_rate_is_counted_over_all_workers(limited: Process) -> None:
    url = limited.url()
    start = time.monotonic()
    statuses = [post(url).status_code for _ in range(60)]
    refilled = (time.monotonic() - start) * 10 / 60
    assert 10 <= statuses.count(200) <= 10 + refilled
    assert statuses.count(429) == 60 - statuses.count(200)


def test_an_address_is_in_use_until_the_workers_of_a_killed_supervisor_end(
    limited: Process, config_file: ConfigFile
) -> None:
    server = limited
    url = server.url()
    port = url.rpartition(":")[2]
    done = run("serve", str(config_file(WORKERS)), "--set", f"server.port={port}")
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    until(lambda: metric(url, "infer_align_workers ") == 2)
    # A replacement has seen the pipes and the sockets of the others.
    first, _ = process_ids(server)
    os.kill(first, signal.SIGKILL)
    until(lambda: len(process_ids(server)) == 3)
    until(lambda: metric(url, "infer_align_workers ") == 2)
    processes = [psutil.Process(number) for number in process_ids(server)[1:]]
    os.kill(server.popen.pid, signal.SIGKILL)
    until(lambda: not any(process.is_running() for process in processes))


def test_a_worker_that_cannot_load_stops_the_start(config_file: ConfigFile) -> None:
    text = f'{WORKERS}[rewards.none]\nkind = "callable"\nfunction = "no_such_module:f"\n'
    path = config_file(text)
    server = Process("--port", "0", str(path), fresh=True)
    assert server.wait() == 2
    assert "no_such_module" in "".join(server.log.lines)
    assert "Traceback" not in "".join(server.log.lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[engine]\nkind = "transformers"\nmodel = "demo"\n[server]\nworkers = 2\n',
            r"the engine of \[engine\] loads a model .* one replica per GPU",
        ),
        (
            f'{WORKERS}[engines.judge]\nkind = "transformers"\nmodel = "demo"\n',
            r"the engine of \[engines.judge\] loads a model",
        ),
        (f"{WORKERS}[limits]\nmax_running = 1\n", r"max_running: 1 is fewer than .*workers = 2"),
        (f"{FAKE}[server]\nworkers = 0\n", "server.workers: 0"),
        # Workers that are only busy would be killed again and again.
        (
            f"{WORKERS}worker_timeout_seconds = 0.5\n",
            r"server\.worker_timeout_seconds: 0\.5 is not allowed; must be .* equal to 1",
        ),
    ],
)
def test_workers_that_cannot_serve_are_refused(
    config_file: ConfigFile, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.load(config_file(text))
