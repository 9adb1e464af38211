"""Stages sit on the fastest links, pipelines cross the slow ones."""

import pytest

from undistilled.checkpoint.resolve import find
from undistilled.parallel.cluster import merged
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import Link, Timed, load_machine
from undistilled.plan.order import Links, ordered
from undistilled.plan.solve import Ask, solve

FAST, SLOW = {"latency_s": 7e-6, "bytes_per_s": 370e9}, {"latency_s": 20e-6, "bytes_per_s": 25e9}


def four(*fast):
    """Four GPUs of which these pairs have NVLink, by their numbers."""
    whole = load_machine("4x-rtx4090")
    links = []
    for a in range(4):
        for b in range(a):
            speed, kind = (FAST, "nvlink") if {a, b} in fast else (SLOW, "pcie")
            links.append(Link(a=f"cuda:{a}", b=f"cuda:{b}", kind=kind, source="measured", **speed))
    return whole.model_copy(update={"links": tuple(links)})


def devices_of(machine, **degrees):
    model = find("r1-nano")
    ask = Ask("int8", 128, degrees=Degrees(**degrees))
    made = solve(model.name, model.config, model.spec, machine, ask)
    return [int(name.split(":")[1]) for name in made.mesh.devices], made


@pytest.mark.parametrize("degrees", [{"tp": 2, "pp": 2}, {"ep": 2, "pp": 2}])
def test_pairs_share_layers_and_stages_cross(degrees):
    found, made = devices_of(four({0, 2}, {1, 3}), **degrees)
    assert found == [0, 2, 1, 3]
    across, _ = devices_of(four({0, 1}, {2, 3}), **degrees)
    assert across == [0, 1, 2, 3]
    unlinked = devices_of(four(), **degrees)[1]
    assert made.predicted.ranks[0].collective_s < unlinked.predicted.ranks[0].collective_s


def test_two_ranks_take_the_pair_that_is_linked():
    assert devices_of(four({1, 3}), tp=2)[0] == [1, 3]


def test_where_links_are_alike_the_order_stays():
    assert devices_of(four(), tp=2, pp=2)[0] == [0, 1, 2, 3]
    assert devices_of(four(), pp=4)[0] == [0, 1, 2, 3]


def test_stages_follow_the_fastest_hand_over():
    assert devices_of(four({0, 3}, {3, 1}), pp=4)[0] == [0, 3, 1, 2]


def test_a_stage_stays_on_its_host():
    """Two hosts of two GPUs whose numbers are mixed up."""
    both = merged([load_machine("4x-rtx4090")] * 2)
    gpus = [d for d in both.devices if d.kind == "cuda"]
    mixed = [gpus[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    found = ordered(mixed, 4, 2, Links(both.links))
    assert [{int(d.name.split(":")[1]) // 4 for d in found[at : at + 4]} for at in (0, 4)] == [{0}, {1}]


def test_collectives_are_as_measured_at_sizes_around_them():
    sums = (Timed(bytes=100, seconds=1.0), Timed(bytes=300, seconds=2.0))
    link = Link(a="a", b="b", bytes_per_s=10, latency_s=5, kind="nvlink", source="measured", sums=sums)
    links = Links([link])
    found = [links.sum_seconds("b", "a", n) for n in (1, 100, 200, 300, 500)]
    assert found == [1.0, 1.0, 1.5, 2.0, 3.0]
    assert links.gather_seconds("a", "b", 100) == 15  # not measured: by the rate
    noise = (Timed(bytes=100, seconds=2.0), Timed(bytes=300, seconds=1.0), Timed(bytes=300, seconds=1.0))
    assert Links([link.model_copy(update={"sums": noise})]).sum_seconds("a", "b", 1000) == 2.0
