"""The scheduler alone: chunks, blocks, limits; hypothesis drives it with random requests."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undistilled.errors import RequestError
from undistilled.schedule.blocks import BlockPool
from undistilled.schedule.request import Request, Sampling
from undistilled.schedule.scheduler import Scheduler


def scheduler(blocks=8, size=4, **options):
    limits = {"max_batch": 4, "max_context": blocks * size, "chunk": 8} | options
    return Scheduler(BlockPool(blocks, size), **limits)


def request(name, length, count=4):
    return Request(name, list(range(length)), Sampling(max_tokens=count))


def test_imports_no_torch():
    import subprocess

    code = "import sys, undistilled.schedule.scheduler; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_prompt_is_cut_at_multiples_of_the_chunk():
    s = scheduler()
    s.add(request("a", 19))
    cuts = []
    while not cuts or cuts[-1][1] < 19:
        for work in (step := s.step()).prompts:
            cuts.append((work.start, work.stop))
            s.done(work, None if not work.samples else 1)
        assert step
    assert cuts == [(0, 8), (8, 16), (16, 19)]


@pytest.mark.parametrize("length, code", [(0, None), (32, "context_length_exceeded"), (99, "context_length_exceeded")])
def test_prompts_that_cannot_run_are_refused(length, code):
    with pytest.raises(RequestError) as caught:
        scheduler().add(request("a", length))
    assert caught.value.code == code and caught.value.status == 400


def test_a_full_queue_is_a_503():
    s = scheduler(max_waiting=2)
    s.add(request("a", 3))
    s.add(request("b", 3))
    with pytest.raises(RequestError) as caught:
        s.add(request("c", 3))
    assert caught.value.status == 503


def test_a_block_returned_twice_is_an_error():
    pool = BlockPool(2, 4)
    blocks = pool.take(2)
    pool.give_back(blocks)
    with pytest.raises(ValueError):
        pool.give_back(blocks)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=8),
    blocks=st.integers(8, 24),
    chunk=st.integers(1, 9),
)
def test_every_request_ends_and_every_block_comes_back(lengths, blocks, chunk):
    s = scheduler(blocks=blocks, chunk=chunk, max_context=32)
    left = {str(i): count for i, (_, count) in enumerate(lengths)}
    for i, (length, count) in enumerate(lengths):
        s.add(request(str(i), length, count))
    for _ in range(2000):
        step = s.step()
        owners = [b for seq in s.running for b in seq.blocks]
        assert len(owners) == len(set(owners)) == s.pool.used
        for work in step.prompts + step.rows:
            assert len(work.sequence.blocks) * 4 >= work.stop
            name = work.sequence.request.id
            if work.samples:
                s.done(work, 7)
                left[name] -= 1
                if left[name] == 0:
                    s.finish(work.sequence)
            else:
                s.done(work, None)
        if s.idle:
            break
    assert s.idle and s.pool.used == 0 and not any(left.values())
