"""Layers of a pipeline by time, and by memory where time alone would not fit."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undistilled.checkpoint.resolve import find
from undistilled.errors import DoesNotFit
from undistilled.plan.check import check, check_devices
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.ranks import layouts_of
from undistilled.plan.solve import Ask, solve
from undistilled.plan.stages import balanced, held

NANO = find("r1-nano")


def machine(*free):
    """GPUs of one speed, with so many bytes free."""
    whole = load_machine("4x-rtx4090")
    gpus = iter(free)
    devices = [
        d.model_copy(update={"free_bytes": room, "memory_bytes": room}) if d.kind == "cuda" else d
        for d in whole.devices
        if d.kind != "cuda" or (room := next(gpus, None))
    ]
    return whole.model_copy(update={"devices": tuple(devices)})


def planned(*free, context=128, scheme="bf16", **degrees):
    ask = Ask(scheme, context, degrees=Degrees(**degrees))
    return solve(NANO.name, NANO.config, NANO.spec, machine(*free), ask)


def totals(plan):
    return [rank.bytes.total for rank in plan.predicted.ranks]


@given(
    st.lists(st.integers(1, 9), min_size=3, max_size=8),
    st.lists(st.integers(1, 9), min_size=3, max_size=8),
    st.lists(st.integers(1, 30), min_size=2, max_size=3),
)
def test_the_best_of_all_splits_that_fit(costs, sizes, rooms):
    sizes = (sizes * 3)[: len(costs)]
    splits = [[0, *ends, len(costs)] for ends in combinations(range(1, len(costs)), len(rooms) - 1)]
    fits = [e for e in splits if all(sum(sizes[a:b]) <= r for a, b, r in zip(e, e[1:], rooms, strict=False))]
    found = held(costs, [1.0] * len(rooms), lambda stage, a, b: sum(sizes[a:b]) <= rooms[stage])
    assert (found is None) == (not fits)
    if found:
        slowest = min(max(sum(costs[a:b]) for a, b in pairwise(e)) for e in fits)
        assert max(sum(costs[a:b]) for a, b in found) == slowest


@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("degrees", [{}, {"tp": 2}])
def test_a_stage_of_less_memory_has_fewer_layers(small, degrees):
    """Halves by time; where one GPU of a stage has less than its half, as many layers as it holds."""
    inner = degrees.get("tp", 1)
    even = planned(*[10**11] * 2 * inner, pp=2, **degrees)
    halves, need = [b - a for a, b in even.mesh.stages], totals(even)
    assert abs(halves[0] - halves[1]) <= 2
    free = [10**11] * 2 * inner
    free[small * inner] = int(need[small * inner] - 0.4 * even.predicted.ranks[small * inner].bytes.weights)
    made = planned(*free, pp=2, **degrees)
    check(made, NANO.spec, NANO.config)
    assert made.fits and made.mesh.stages[small][1] - made.mesh.stages[small][0] < halves[small]
    assert made.mesh.stages == planned(*free, pp=2, **degrees).mesh.stages
    # one layer more would not fit
    layers = made.mesh.stages[0][1] + (1 if small == 0 else -1)
    stages = ((0, layers), (layers, NANO.spec.layers))
    worse = made.mesh.model_copy(update={"stages": stages})
    tight = layouts_of(made.model_copy(update={"mesh": worse}), NANO.spec).at(128, 1)
    assert not tight.fits


def test_what_fits_nowhere_says_the_way_out():
    made = planned(10**11, 10**9, pp=2)
    room = totals(made)[1]
    made = planned(room // 4, room // 4, pp=2)
    assert not made.fits and made.advice


def test_without_a_bound_it_is_time_alone():
    assert held([1.0] * 8, [1.0, 3.0], lambda *_: True) == balanced([1.0] * 8, [1.0, 3.0]) == [(0, 2), (2, 8)]


def test_a_device_with_less_room_than_planned():
    """The way out is another plan: of what is free now."""
    made = planned(10**11, 10**11, pp=2)
    free = totals(made)[1] - 10**6
    with pytest.raises(DoesNotFit, match=r"cuda:1.*Plan again: layers are then shared out by the memory"):
        check_devices(made, {"cuda:0": 10**11, "cuda:1": free})
    check_devices(planned(10**11, free, pp=2), {"cuda:0": 10**11, "cuda:1": free})
