"""Memory of several processes: here of several threads, which meet it the same way."""

import os
import threading
import time

import pytest
import torch

from undistilled.parallel import shared
from undistilled.parallel.shared import Shared, place

pytestmark = pytest.mark.skipif(not shared.ORDERED, reason="not on this processor")
RANKS, LIMIT = 3, 4096


@pytest.fixture
def made():
    path = place()
    first = Shared(path, RANKS, 0, LIMIT)
    try:
        yield [first, *(Shared(path, RANKS, rank, LIMIT) for rank in range(1, RANKS))]
    finally:
        os.unlink(path)


def test_everybody_reads_what_everybody_wrote(made):
    """Many times, of changing sizes and types, at paces of their own."""
    wrong = []

    def run(rank):
        draw = torch.Generator().manual_seed(rank)
        for turn in range(400):
            dtype = torch.float32 if turn % 3 else torch.int64
            count = 1 + turn * 7 % 400
            parts = made[rank].gathered(torch.full((count,), turn * RANKS + rank, dtype=dtype))
            if torch.rand(1, generator=draw) < 0.05:
                time.sleep(0.001)
            if [p.unique().tolist() for p in parts] != [[turn * RANKS + r] for r in range(RANKS)]:
                wrong.append((rank, turn))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_nobody_waits_for_who_is_lost(made):
    said = []

    def run():
        with pytest.raises(RuntimeError, match="lost"):
            made[0].gathered(torch.ones(3))
        said.append("left")

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.1)
    assert not said
    made[0].left = True
    thread.join(5)
    assert said


def test_of_another_machine():
    with pytest.raises(FileNotFoundError):
        Shared(place(), RANKS, 1, LIMIT)


def test_no_room():
    path = place()
    with pytest.raises(OSError, match=r"space|large"):
        Shared(path, 1, 0, 1 << 55)
    assert not os.path.exists(path)
