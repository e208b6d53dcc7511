"""Small models are computed by one CPU thread, and nothing else is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

torch = pytest.importorskip("torch")

from infer_align.checkpoints.threads import SMALL_MODEL, compute_alone  # noqa: E402


def model(weights: int) -> torch.nn.Module:
    """Return a model of this size that takes no memory."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(1).expand(weights), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("sizes", "alone"),
    [
        ([1], True),
        ([SMALL_MODEL - 1, 7], True),
        ([SMALL_MODEL], False),
        ([7, SMALL_MODEL], False),
        ([SMALL_MODEL, 7], False),
    ],
)
def test_a_thread_computes_alone_if_all_its_models_are_small(several_threads, sizes, alone):
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as later:
        thread.submit(compute_alone, [model(size) for size in sizes]).result()
        expected = 1 if alone else several_threads
        assert thread.submit(torch.get_num_threads).result() == expected
        assert later.submit(torch.get_num_threads).result() == several_threads
    assert torch.get_num_threads() == several_threads


def test_threads_that_change_at_once_leave_the_others_as_they_were(several_threads):
    together = Barrier(8)

    def change() -> int:
        together.wait()
        compute_alone([model(7)])
        return torch.get_num_threads()

    for _ in range(20):
        with ThreadPoolExecutor(8) as threads, ThreadPoolExecutor(1) as later:
            changed = [threads.submit(change) for _ in range(8)]
            assert {each.result() for each in changed} == {1}
            assert later.submit(torch.get_num_threads).result() == several_threads


def test_quantized_weights_count(several_threads):
    quantized = torch.nn.Module()
    quantized.register_buffer("numbers", torch.zeros(1, dtype=torch.int8).expand(SMALL_MODEL))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compute_alone, [quantized]).result()
        assert thread.submit(torch.get_num_threads).result() == several_threads


def test_a_model_on_another_device_changes_nothing(several_threads):
    with ThreadPoolExecutor(1) as thread:
        elsewhere = torch.nn.Linear(2, 2, device="meta")
        thread.submit(compute_alone, [elsewhere]).result()
        assert thread.submit(torch.get_num_threads).result() == several_threads
