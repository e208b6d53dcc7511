"""Tasks that may end their process run in a copy of it."""

from __future__ import annotations

import errno
import os
import resource
import time

import psutil
import pytest

from infer_align.decoding import trial


def test_what_the_task_says_comes_back() -> None:
    assert trial.failure(lambda: None) is None
    assert trial.failure(lambda: "it is wrong: \u20ac") == "it is wrong: \u20ac"


def test_a_process_with_many_open_files_can_try_a_task() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("this machine allows too few open files")
    files: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # As many as clients could have open connections.
        while not files or files[-1] < 1100:
            files.append(os.open(os.devnull, os.O_RDONLY))
        assert trial.failure(lambda: "it is wrong") == "it is wrong"
        assert trial.failure(os.abort) == trial.TOO_MUCH
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_task_changes_nothing_here() -> None:
    seen: list[int] = []

    def task() -> str:
        seen.append(1)
        return str(os.getpid())

    assert trial.failure(task) != str(os.getpid())
    assert seen == []


def abort() -> None:
    os.abort()


def fail() -> None:
    raise ValueError("of the task")


def leave() -> None:
    raise SystemExit(0)


def allocate() -> None:
    bytearray(2 * trial.MEMORY_BYTES)


def compute() -> None:
    while True:
        pass


@pytest.mark.parametrize("task", [abort, fail, leave, allocate, compute])
def test_a_task_that_ends_its_process_is_too_much(
    task: trial.Task, capfd: pytest.CaptureFixture[str]
) -> None:
    process = psutil.Process()
    before = process.num_fds(), process.children()
    assert trial.failure(task) == trial.TOO_MUCH
    assert (process.num_fds(), process.children()) == before
    assert capfd.readouterr().err == ""


def test_a_task_that_waits_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WALL_SECONDS", 0.05)
    assert trial.failure(lambda: time.sleep(1000)) == trial.TOO_MUCH


def test_without_room_for_a_copy_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    before = psutil.Process().num_fds()
    monkeypatch.setattr(os, "fork", fork)
    assert trial.failure(abort) is None
    assert psutil.Process().num_fds() == before
    assert "to try a request in: Resource temporarily unavailable" in caplog.text
