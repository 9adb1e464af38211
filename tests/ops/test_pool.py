"""The kernels' threads: as many as PyTorch's, any number of callers, forked children, busy neighbours."""

import multiprocessing
import os
import threading
import time

import pytest
import torch
from test_native import _restore_threads  # noqa: F401

from undistilled.ops.cpu import native
from undistilled.ops.cpu.matrix import KIND, matrix

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.why_missing())

N, K = 2048, 576


@pytest.fixture(scope="module")
def weight():
    values = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    return matrix(KIND["int8"], values, torch.rand(N, 1), None, N, K, K)


def ours() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_there_are_as_many_threads_as_pytorch_has(weight):
    x = torch.randn(3, K)
    counts, results = {}, {}
    for size in (1, 4, 2, 3):
        torch.set_num_threads(size)
        results[size] = native.linear(x, weight)
        counts[size] = ours()
    assert {size: count - counts[1] for size, count in counts.items()} == {1: 0, 2: 1, 3: 2, 4: 3}
    assert all(torch.equal(y, results[1]) for y in results.values())


def test_callers_in_several_threads_do_not_wait_for_each_other_to_be_right(weight):
    torch.set_num_threads(2)
    xs = [torch.randn(m, K) for m in (1, 2, 40)]
    want = [native.linear(x, weight) for x in xs]
    wrong = []

    def call(at):
        for _ in range(200):
            if not torch.equal(native.linear(xs[at], weight), want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _child(x, weight, queue):
    queue.put(native.linear(x, weight).numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(weight):
    torch.set_num_threads(2)
    x = torch.randn(1, K)
    want = native.linear(x, weight)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(x, weight, queue))
    child.start()
    assert torch.equal(torch.from_numpy(queue.get(timeout=20)), want)
    child.join(20)
    assert child.exitcode == 0


def _burn(stop):
    while not stop.is_set():
        sum(range(10000))


def test_a_busy_neighbour_takes_no_more_than_its_share(weight):
    """Two threads on the cores they are given, one other process on them: a third of the time is the neighbour's.
    Spinning at barriers made this 20 times as long; 8 leaves room for a noisy machine."""
    torch.set_num_threads(max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    x = torch.randn(1, K)

    def seconds():
        began = time.perf_counter()
        for _ in range(2000):
            native.linear(x, weight)
        return time.perf_counter() - began

    seconds()
    alone = min(seconds() for _ in range(3))
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    neighbour = context.Process(target=_burn, args=(stop,))
    neighbour.start()
    time.sleep(0.5)
    try:
        beside = min(seconds() for _ in range(2))
    finally:
        stop.set()
        neighbour.join()
    print(f"alone {alone * 500:.1f} us a call, beside a busy process {beside * 500:.1f}")
    assert beside < 8 * alone
