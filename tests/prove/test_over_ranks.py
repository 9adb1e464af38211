"""A receipt of a plan over ranks is the one of the same weights in one process, up to the rounding of sums."""

import json

import pytest
import toy

from undistilled.checkpoint.resolve import find
from undistilled.plan.check import check
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve
from undistilled.prove.plans import suite_plan
from undistilled.prove.receipt import prove


def bench(argv):
    """What `undistilled bench --json` prints of two ranks."""
    peaks = [{"peak_bytes": peak} for peak in (300_000_000, 200_000_000)]
    return json.dumps(toy.BENCH | {"ranks": peaks})


def plan_of(folder, **degrees):
    model = find(str(folder))
    ask = Ask("int8", 128, device="cpu", degrees=Degrees(**degrees))
    return model, solve(model.name, model.config, model.spec, load_machine("this"), ask)


@pytest.fixture(scope="module")
def given(text, tmp_path_factory):
    tasks = [toy.task_file(tmp_path_factory.mktemp("asked"))]
    return {"text": text, "tasks": tasks, "tokens": 300, "window": 64}


@pytest.fixture(scope="module")
def alone(folder, given):
    return prove(str(folder), scheme="int8", context=128, command=toy.bench, **given)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_plan_over_ranks_is_proven(alone, folder, given, tmp_path, degrees):
    _, plan = plan_of(folder, **degrees)
    plan.write(tmp_path / "plan.json")
    found = prove(str(folder), plan_file=tmp_path / "plan.json", command=bench, **given)
    assert found["kl_nats"]["mean"] == pytest.approx(alone["kl_nats"]["mean"], rel=1e-3)
    assert found["perplexity"]["plan"] == pytest.approx(alone["perplexity"]["plan"], rel=1e-4)
    assert found["perplexity"]["original"] == alone["perplexity"]["original"]
    assert found["tasks"]["toy"] == alone["tasks"]["toy"]
    assert found["plan"]["device"] == "cpu (2 ranks)" and found["plan"]["bytes"] == alone["plan"]["bytes"]
    assert found["memory"]["measured"] == 500_000_000
    assert found["memory"]["predicted"] == sum(rank.bytes.total for rank in plan.predicted.ranks)


def test_the_suite_has_room_on_every_rank(folder):
    model, plan = plan_of(folder, tp=2)
    made = suite_plan(plan, model.spec, 100, 5)
    assert made.limits.batch == 5 and made.mesh == plan.mesh
    check(made, model.spec, model.config)  # its ranks' bytes are what its limits take
    assert all(b.bytes.kv > a.bytes.kv for a, b in zip(plan.predicted.ranks, made.predicted.ranks, strict=True))
