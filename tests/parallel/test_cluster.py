"""Several machines as one: names, memory, and links that cross the network."""

import sys

import pytest

from undistilled.errors import UndistilledError, UsageError
from undistilled.parallel.cluster import merged
from undistilled.parallel.places import machine_of
from undistilled.plan.hardware import load_machine


def test_two_machines_are_one():
    one = load_machine("8x-h100")
    both = merged([one, one])
    gpus = [d.name for d in both.devices if d.kind == "cuda"]
    assert gpus == [f"cuda:{i}" for i in range(16)]
    [cpu] = [d for d in both.devices if d.kind == "cpu"]
    assert cpu.free_bytes == 2 * one.device("cpu").free_bytes
    kinds = {frozenset((link.a, link.b)): link.kind for link in both.links}
    assert kinds[frozenset(("cuda:0", "cuda:8"))] == "network"
    within = {(link.a, link.b): link for link in one.links if "cpu" not in (link.a, link.b)}
    for (a, b), link in within.items():
        moved = frozenset(f"cuda:{int(end.split(':')[1]) + 8}" for end in (a, b))
        assert kinds[moved] == link.kind


def test_one_machine_is_itself():
    one = load_machine("8x-h100")
    assert merged([one]) is one


def test_a_cluster_that_is_planned_for_ahead(monkeypatch):
    """Machines are named, and no Ray is asked."""
    monkeypatch.setitem(sys.modules, "ray", None)
    planned = machine_of("ray", "8x-h100, h100")
    assert sum(d.kind == "cuda" for d in planned.devices) == 9 and planned.name == "8x-h100 and 1 more"
    assert machine_of("ray", "h100") == load_machine("h100") == machine_of("local", "h100")
    with pytest.raises(UsageError, match=r"undistilled\[cluster\]"):
        machine_of("ray")
    with pytest.raises(UndistilledError, match="nope"):
        machine_of("ray", "h100,nope")
    with pytest.raises(UsageError, match="Known: ray"):
        machine_of("slurm", "h100")
