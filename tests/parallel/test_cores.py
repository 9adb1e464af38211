"""Ranks of a machine whose memory has several nodes: each on the cores of one."""

import os

import psutil
import pytest
import torch

from byte_tokens import write_tokenizer
from tiny import DEEPSEEK, write_checkpoint
from undistilled.generate.engine import open_engine
from undistilled.parallel import local
from undistilled.parallel.cores import confine, shared_out
from undistilled.plan.probe import node_cores
from undistilled.schedule.request import Request, Sampling

A, B, C, D = ({0, 1}, {2, 3}, {4, 5}, {6, 7})


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        (1, [A, B], []),
        (2, [A], []),
        (2, [A, B], [(0, 1), (2, 3)]),
        (4, [A, B], [(0, 1), (0, 1), (2, 3), (2, 3)]),
        (2, [A, B, C, D], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (3, [A, B], []),
        (3, [A, B, C, D], []),
        (2, [{0}, {1, 2, 3}], []),  # two threads each, one of them on one core
        (2, [{0, 1}, {2, 3, 4}], [(0, 1), (2, 3, 4)]),
    ],
)
def test_ranks_take_whole_nodes(ranks, nodes, expected):
    assert shared_out(ranks, nodes) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say where a process runs")
def test_nodes_are_those_of_this_process_with_memory(tmp_path):
    here = sorted(os.sched_getaffinity(0))
    for name, text in {"has_memory": "0-1,4\n", "has_cpu": "0-2\n"}.items():
        (tmp_path / name).write_text(text)
    for node, cores in enumerate((f"{here[0]}\n", "4000-4001\n", f"{here[0]}\n")):  # 4000: no core of ours
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cores)
    assert node_cores(tmp_path) == {0: {here[0]}}
    assert node_cores(tmp_path / "none") == {}


def everywhere():
    """Where this process' threads may run."""
    return {tuple(sorted(os.sched_getaffinity(int(thread)))) for thread in os.listdir("/proc/self/task")}


def tokens(engine):
    sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    found = engine.run_all([Request("a", engine.tokenizer.encode("abc abc", control=False), sampling)])
    return [t for output in found["a"] for t in output.tokens]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not say where a process runs")
def test_each_rank_runs_on_its_node_and_the_driver_is_free_afterwards(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", DEEPSEEK | {"vocab_size": 256})
    write_tokenizer(folder)
    options = {"model": str(folder), "scheme": "fp32", "device": "cpu", "tp": 2}
    before = sorted(os.sched_getaffinity(0))
    if len(before) < 2:
        pytest.skip("one core")
    threads = torch.get_num_threads()
    engine = open_engine(options)
    expected = tokens(engine)
    engine.close()
    monkeypatch.setattr(local, "node_cores", lambda: {0: frozenset(before[:1]), 1: frozenset(before[1:2])})
    engine = open_engine(options)
    try:
        (rank,) = (p for p in psutil.Process().children() if any("rank=1" in word for word in p.cmdline()))
        assert rank.cpu_affinity() == before[1:2]
        assert tokens(engine) == expected
        assert everywhere() == {tuple(before[:1])}
    finally:
        engine.close()
        torch.set_num_threads(threads)
    assert everywhere() == {tuple(before)}


def test_no_cores_change_nothing():
    before = confine(())
    assert confine(()) == before
