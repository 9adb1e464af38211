"""Ranks of a run exchange what maps their memory, also where one of them was a rank of other runs before."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from undistilled.parallel.symmetric import Counted


def exchanged(store, number, rank):
    """As PyTorch's symmetric memory does, by numbers that count on in a process: all ranks' values, then a barrier."""
    store.set(f"CUDASymmetricMemory/{number}/{rank}", bytes([0, 255, rank]))
    found = store.multi_get([f"CUDASymmetricMemory/{number}/{other}" for other in range(2)])
    store.barrier(f"CUDASymmetricMemory/{number + 1}", 2, timedelta(seconds=10))
    return found


@pytest.fixture
def stores():
    met = dist.HashStore()
    met.set_timeout(timedelta(seconds=10))  # who waits for another number fails
    return [Counted(dist.PrefixStore("a run's stage 0", met)) for _ in range(2)]


@pytest.mark.parametrize("numbers", [(0, 0), (7, 0), (2, 11)])
def test_a_process_that_was_a_rank_before_meets_a_new_one(stores, numbers):
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(exchanged, stores, numbers, range(2)))
    assert found == [[b"\x00\xff\x00", b"\x00\xff\x01"]] * 2


def test_each_kind_of_exchange_counts_by_itself(stores):
    stores[0].set("one/7/0", "a")
    stores[0].set("other/2/0", "b")
    stores[1].set("one/0/1", "c")
    assert (stores[1].get("one/0/0"), stores[1].get("other/5/0"), stores[0].get("one/7/1")) == (b"a", b"b", b"c")
    assert stores[1].check(["one/0/0"]) and not stores[0].check(["one/8/0"])


def test_other_names_stay(stores):
    stores[0].set("backend", "cuda")
    assert stores[1].get("backend") == b"cuda"
    stores[0].set("a/b/c", "d")
    assert stores[1].get("a/b/c") == b"d"
