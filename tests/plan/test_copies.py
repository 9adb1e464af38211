"""Copies of experts: which are made, what they take, and that each choice is computed once."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact, UsageError
from undistilled.parallel.share import PartBank
from undistilled.plan.check import check
from undistilled.plan.copies import MOST, Counts, choose, imbalance, loads
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.plan import read_plan
from undistilled.plan.ranks import cuts_of
from undistilled.plan.solve import Ask, solve

NANO = find("r1-nano")


def counts_of(rows, model="r1-nano"):
    return Counts(model=model, text="made up", tokens=100, layers=dict(enumerate(rows, 1)))


def planned(tmp_path, **degrees):
    """r1-nano, whose first experts are chosen most, with copies."""
    file = tmp_path / "counts.json"
    file.write_text(counts_of([[200 - 5 * e for e in range(32)]] * 15).model_dump_json())
    given = Degrees(**{"copies": 3, "counts": str(file)} | degrees)
    ask = Ask("int8", 128, device="cpu", degrees=given)
    return solve(NANO.name, NANO.config, NANO.spec, load_machine("this"), ask)


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=24), st.integers(2, 4), st.integers(0, 6))
def test_copies_never_make_it_worse(row, groups, number):
    owners = [e * groups // len(row) for e in range(len(row))]
    copies = choose(counts_of([row]), owners, groups, number)
    holders = [[owner] for owner in owners]
    before = max(loads(row, holders, groups))
    for layer, expert, group in copies:
        assert layer == 1 and group not in holders[expert]
        holders[expert].append(group)
        after = max(loads(row, holders, groups))
        assert after < before
        before = after
    assert len(copies) <= number and max(map(len, holders)) <= MOST


def test_the_hot_expert_of_the_busy_group_goes_to_the_idle_one():
    assert choose(counts_of([[90, 10, 5, 5]]), [0, 0, 1, 1], 2, 1) == ((1, 0, 1),)
    assert imbalance(loads([90, 10, 5, 5], [[0, 1], [0], [1], [1]], 2)) == pytest.approx(1.0)
    assert choose(counts_of([[10, 10, 10, 10]]), [0, 0, 1, 1], 2, 5) == ()


@given(st.integers(2, 4), st.integers(0, 2**32))
def test_every_choice_is_computed_once(groups, seed):
    draw = torch.Generator().manual_seed(seed)
    holders = []
    for _ in range(16):
        order = torch.randperm(groups, generator=draw).tolist()
        holders.append(tuple(order[: int(torch.randint(1, groups + 1, (), generator=draw))]))
    ids_Tk = torch.stack([torch.randperm(16, generator=draw)[:4] for _ in range(50)])
    turns_PE = PartBank.turns(holders)
    taken = turns_PE[ids_Tk.sum(-1, keepdim=True) % len(turns_PE), ids_Tk]
    for expert, by in zip(ids_Tk.flatten().tolist(), taken.flatten().tolist(), strict=True):
        assert by in holders[expert]


def test_a_plan_counts_its_copies(tmp_path):
    plain, copied = planned(tmp_path, ep=2, copies=0, counts=None), planned(tmp_path, ep=2)
    assert [group for _, _, group in copied.mesh.copies] == [1] * 45  # three in each of 15 layers
    a, b = ([rank.bytes.weights for rank in made.predicted.ranks] for made in (plain, copied))
    expert = sum(r.nbytes // 32 for r in plain.rows if r.role.startswith("expert.") and r.layer == 1)
    assert b[0] == a[0] and b[1] - a[1] == 45 * expert
    cuts = cuts_of(copied, NANO.spec)
    assert cuts.experts(1, 1) == (*range(16, 32), 0, 1, 2) and cuts.experts(0, 1) == tuple(range(16))
    assert cuts.holders(3)[:4] == [(0, 1), (0, 1), (0, 1), (0,)]
    copied.write(tmp_path / "plan.json")
    check(read_plan(tmp_path / "plan.json"), NANO.spec, NANO.config)


@pytest.mark.parametrize(
    "copies, says",
    [([[1, 0, 0]], "whose it is"), ([[0, 0, 1]], "no expert"), ([[1, 40, 1]], "no expert"), ([[1, 0, 2]], "no group"),
     ([[1, 0, 1], [1, 0, 1]], "twice"), ([[1, 0, 1]], "rank 1")],
)  # fmt: skip
def test_copies_that_make_no_sense(tmp_path, copies, says):
    plan = planned(tmp_path, ep=2).model_dump(mode="json")
    plan["mesh"]["copies"] = copies
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadArtefact, match=says):
        check(read_plan(tmp_path / "plan.json"), NANO.spec, NANO.config)


def test_what_is_asked_for_makes_sense(tmp_path):
    with pytest.raises(UsageError, match="Give both"):
        planned(tmp_path, ep=2, copies=0)
    with pytest.raises(UsageError, match="nobody to copy"):
        planned(tmp_path, tp=2)
    (tmp_path / "other.json").write_text(counts_of([[1, 2, 3]], "another").model_dump_json())
    with pytest.raises(BadArtefact, match="another model's experts"):
        planned(tmp_path, ep=2, counts=str(tmp_path / "other.json"))
    with pytest.raises(BadArtefact, match="undistilled routing"):
        planned(tmp_path, ep=2, counts=str(tmp_path / "none.json"))
