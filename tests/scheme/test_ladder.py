"""Ladders find what a search through all levels finds."""

import pytest
import torch

from undistilled import scheme as schemes
from undistilled.compress.solvers import tiles
from undistilled.scheme.grouped import SCHEMES, normal
from undistilled.scheme.tiles import WIDTHS

CPU = torch.device("cpu")


def values(levels):
    """Some of every kind: levels, what lies halfway, right beside that (of tables: elsewhere an offset rounds it away)
    and what lies beyond."""
    rungs = torch.tensor(sorted(set(levels)))
    between = (rungs[1:] + rungs[:-1]) / 2
    near = [] if (rungs.diff() == 1).all() else [between.nextafter(torch.tensor(to)) for to in (-1e9, 1e9)]
    return torch.cat([rungs, between, *near, torch.randn(2000) * 1.5 * rungs.max(), torch.tensor([-1e6, 1e6])])


def searched(levels, x):
    """The nearest levels; of two as near the lower one, or the even one where levels are neighbouring integers."""
    rungs = torch.tensor(sorted(set(levels)))
    between = (rungs[1:] + rungs[:-1]) / 2
    low = rungs[torch.bucketize(x, between)]
    if (rungs.diff() == 1).all():
        low = torch.where(torch.isin(x, between) & (low % 2 == 1), low + 1, low)
    return low


@pytest.mark.parametrize("name", sorted({s.name for s in SCHEMES if s.group in (16, 32, 64)}))
def test_a_ladder_finds_what_a_search_finds(name):
    scheme = schemes.get(name)
    x = values(scheme.levels)
    codes, levels = scheme.ladder(CPU).nearest(x)
    assert torch.equal(levels, searched(scheme.levels, x))
    assert torch.equal(scheme.level(codes), levels) and torch.equal(scheme.rank(x), codes)
    assert torch.equal(scheme.snapped(x), levels)


def test_tables_of_all_widths_lie_one_after_another():
    x = torch.cat([values(normal(bits, 32).levels) for bits in WIDTHS])
    begins = tiles._begins(WIDTHS, CPU)
    for bits, begin in zip(WIDTHS, begins, strict=True):
        codes, levels = tiles._ladders(CPU).nearest(x, begin.expand(len(x)))
        assert torch.equal(codes, normal(bits, 32).rank(x)) and torch.equal(levels, normal(bits, 32).snapped(x))


def test_a_table_is_made_once_for_a_device():
    scheme = schemes.get("nl3-g64")
    assert scheme.ladder(CPU).levels is scheme.ladder(torch.device("cpu")).levels
    assert scheme.ladder(CPU).levels is schemes.get("nl3-g32").ladder(CPU).levels
