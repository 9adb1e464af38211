"""The integer programme against every possible answer."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undistilled.compress.allocate import _by_price, allocate
from undistilled.errors import DoesNotFit

OPTION = st.tuples(st.floats(0, 100), st.integers(1, 50))


@settings(max_examples=60)
@given(groups=st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5), share=st.floats(0, 1))
def test_no_choice_is_better(groups, share):
    least, most = (sum(f(size for _, size in options) for options in groups) for f in (min, max))
    budget = int(least + share * (most - least))
    chosen = allocate(groups, budget)
    taken = [options[i] for options, i in zip(groups, chosen, strict=True)]
    assert sum(size for _, size in taken) <= budget
    best = min(
        sum(loss for loss, _ in every)
        for every in itertools.product(*groups)
        if sum(size for _, size in every) <= budget
    )
    assert sum(loss for loss, _ in taken) <= best * (1 + 1e-3) + 1e-3


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(DoesNotFit, match="smallest"):
        allocate([[(1.0, 10), (0.5, 20)], [(1.0, 10)]], 19)


@settings(max_examples=60)
@given(groups=st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5), share=st.floats(0, 1))
def test_without_a_programme_the_budget_is_kept_too(groups, share):
    least, most = (sum(f(size for _, size in options) for options in groups) for f in (min, max))
    budget = int(least + share * (most - least))
    taken = [options[i] for options, i in zip(groups, _by_price(groups, budget), strict=True)]
    assert sum(size for _, size in taken) <= budget


def test_a_programme_that_runs_out_of_time_leaves_what_a_price_finds(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    scale = torch.rand(200, generator=draw).mul(9).exp()
    groups = [[(float(s) * 4.0**-b, b * 1000) for b in range(2, 9)] for s in scale]
    best = sum(groups[g][i][0] for g, i in enumerate(allocate(groups, 640_000)))
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: SimpleNamespace(x=None))
    chosen = allocate(groups, 640_000)
    assert sum(groups[g][i][1] for g, i in enumerate(chosen)) <= 640_000
    assert best <= sum(groups[g][i][0] for g, i in enumerate(chosen)) * (1 + 1e-3) < 1.05 * best


@pytest.mark.parametrize("count", [2_000, pytest.param(47_000, marks=pytest.mark.slow)])
def test_r1_size_takes_under_a_minute(count):
    """61 layers, 256 experts each on its own: 47,000 weights with ten options."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.rand(count, generator=draw).mul(12).exp()
    groups = [[(float(s) * 4.0**-b, b * 1_835_008) for b in range(2, 9)] for s in scale]
    began = time.perf_counter()
    chosen = allocate(groups, int(3.2 * count * 1_835_008))
    assert time.perf_counter() - began < 60
    assert 3.19 < sum(groups[g][i][1] for g, i in enumerate(chosen)) / count / 1_835_008 <= 3.2
