"""Memory for weights: tensors lie apart, on lines, one behind another, and go back to the system."""

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undistilled.load import pages
from undistilled.plan.probe import node_cores

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.float8_e4m3fn]
shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@settings(max_examples=20)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=30), st.sampled_from([1 << 10, 1 << 16]))
def test_tensors_lie_apart_and_on_lines(wanted, stretch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "STRETCH", stretch)
        given = pages.Pages()
        tensors = [given.empty(shape, dtype) for shape, dtype in wanted]
    for at, (tensor, (shape, dtype)) in enumerate(zip(tensors, wanted, strict=True)):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        tensor.reshape(-1).view(torch.uint8).fill_(at)
    for at, tensor in enumerate(tensors):
        if tensor.numel():
            assert tensor.data_ptr() % pages.LINE == 0
            assert (tensor.reshape(-1).view(torch.uint8) == at).all()


def test_a_tensor_longer_than_a_stretch_has_one_of_its_own():
    given = pages.Pages()
    long, short = given.empty((pages.STRETCH + 1,), torch.uint8), given.empty((3,), torch.uint8)
    long[-1], short[0] = 5, 7
    assert long[-1] == 5 and short[0] == 7


def test_memory_goes_back_with_the_last_of_a_stretch():
    given = pages.Pages()
    area = given.empty((pages.STRETCH,), torch.uint8).fill_(1)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    before = resident()
    del area, given
    assert before - resident() > pages.STRETCH // 2


def test_more_than_there_is_is_an_error_that_the_loader_knows():
    with pytest.raises((OSError, RuntimeError)):
        pages.Pages().empty((1 << 50,), torch.uint8)


def test_pages_come_from_all_nodes_in_turn(monkeypatch):
    spread = []
    monkeypatch.setattr(pages, "spread", lambda memory, over: spread.append(over))
    for here, free, expected in (((0, 1), True, [(0, 1)]), ((0, 1), False, []), ((0,), True, [])):
        monkeypatch.setattr(pages, "node_cores", lambda here=here: dict.fromkeys(here, frozenset({0})))
        monkeypatch.setattr(pages, "unbound", lambda free=free: free)
        spread.clear()
        pages.Pages().empty((4,), torch.uint8)
        assert spread == expected
    monkeypatch.undo()
    memory = pages.Pages().empty((pages.STRETCH,), torch.uint8)
    here = tuple(node_cores()) or (0,)
    if not pages.spread(memory, here):
        pytest.skip("this system lets nobody say where pages lie")
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("this system does not tell where pages lie")
    assert any(line.startswith(f"{memory.data_ptr():x} interleave:") for line in maps.read_text().splitlines())
    memory[:: pages.PAGE] = 1
    assert memory[:: pages.PAGE].all()
    assert not pages.spread(memory, (1023,))
