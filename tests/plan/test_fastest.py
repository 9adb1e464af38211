"""--ranks: of all ways to cut a model, the one that is predicted fastest of those that fit."""

import pytest
from test_order import four

from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact, UsageError
from undistilled.events import subscribed
from undistilled.generate.engine import plan_for
from undistilled.plan.ask import Ask
from undistilled.plan.degrees import Degrees, candidates
from undistilled.plan.fastest import compared
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import solve

R1, NANO = find("deepseek-r1"), find("r1-nano")
PAIRS = ({0, 1}, {2, 3})
ALL = tuple({a, b} for a in range(4) for b in range(a))


def asked(ranks, **more):
    return Ask(more.pop("scheme", "int4"), degrees=Degrees(ranks=ranks), **more)


def chosen(model, machine, ask):
    return solve(model.name, model.config, model.spec, machine, ask)


def tried_of(model, machine, ask):
    """Every layout that `ask` leaves open."""
    gpus = sum(d.kind == "cuda" and ask.device != "cpu" for d in machine.devices)
    ways = candidates(ask.degrees, model.spec, gpus)
    return compared(ways, model.spec, machine, ask, ask.scheme, model.spec.max_context)


def degrees_of(plan):
    return (plan.mesh.tp, plan.mesh.pp, plan.mesh.ep) if plan.mesh else (1, 1, 1)


def test_every_way_is_there_once():
    eight = list(candidates(Degrees(ranks=8), R1.spec, 8))
    assert len(set(eight)) == len(eight) == 10 and {way.size for way in eight} == {8}
    assert len(list(candidates(Degrees(ranks=0), R1.spec, 4))) == 13
    dense = find("smollm2").spec
    assert {(d.tp, d.pp) for d in candidates(Degrees(ranks=4), dense, 0)} == {(4, 1), (2, 2), (1, 4)}
    assert max(d.pp for d in candidates(Degrees(ranks=64), dense, 0)) <= dense.layers


@pytest.mark.parametrize("batch", [1, 16])
def test_it_is_the_fastest_of_the_plans_that_fit(batch):
    """Against plans that are made one by one."""
    machine, found = load_machine("8x-h200"), {}
    for way in candidates(Degrees(ranks=8), R1.spec, 8):
        plan = chosen(R1, machine, Ask("fp8_block", batch=batch, degrees=way))
        if plan.fits:
            p = plan.predicted
            found[degrees_of(plan)] = 1 / p.prefill_tokens_per_s + 1 / p.decode_tokens_per_s
    made = chosen(R1, machine, asked(8, scheme="fp8_block", batch=batch))
    assert made.fits and len(found) > 3
    assert found[degrees_of(made)] == min(found.values())


def joined(*fast):
    """Four GPUs that hold R1 twice over; these pairs have NVLink, the others talk over a network."""
    machine = four(*fast)
    devices = [d.model_copy(update={"free_bytes": 200 * 10**9}) for d in machine.devices]
    slow = {"latency_s": 100e-6, "bytes_per_s": 3e9}
    links = [link.model_copy(update=slow if link.kind == "pcie" else {}) for link in machine.links]
    return machine.model_copy(update={"devices": tuple(devices), "links": tuple(links)})


def test_links_decide():
    """What is linked fast shares layers; a network is crossed between stages."""
    assert degrees_of(chosen(R1, joined(*ALL), asked(4))) == (4, 1, 1)
    assert degrees_of(chosen(R1, joined(*PAIRS), asked(4))) == (2, 2, 1)
    assert degrees_of(chosen(R1, joined(), asked(4))) == (1, 4, 1)


def test_auto_takes_no_more_ranks_than_help():
    machine = load_machine("4x-rtx4090")
    assert chosen(NANO, machine, asked(0)).mesh is None  # sums would cost more than they save
    assert chosen(NANO, load_machine("this"), asked(0, device="cpu")).mesh is None
    assert chosen(R1, load_machine("8x-h100"), asked(0)).mesh.size > 4  # fewer do not hold it


def test_where_none_fits_the_closest_is_taken_and_said():
    heard = []
    with subscribed(heard.append):
        plan = chosen(R1, load_machine("4x-rtx4090"), asked(4, context=2048))
    said = next(e.fields for e in heard if e.name == "plan.layouts")
    assert not plan.fits and said["fit"] == 0 and "lacks least" in said["said"]
    assert min(t.full for t in said["tried"]) == said["tried"][0].full > 1
    assert degrees_of(plan) == (2, 2, 1) and said["tried"][0].degrees == Degrees(tp=2, pp=2)


def test_what_cannot_be_cut_is_left_out():
    tried = tried_of(NANO, load_machine("this"), asked(7, scheme="fp8_block", device="cpu"))
    assert tried[0].degrees == Degrees(pp=7) and "o_proj" in tried[1].refused.message and not tried[1].fits


def test_where_nothing_can_be_cut_it_says_why():
    with pytest.raises(UsageError, match="17 ranks, but 4 GPUs") as error:
        chosen(NANO, load_machine("4x-rtx4090"), asked(17))
    assert "--cluster ray" in error.value.hint
    with pytest.raises(UsageError, match="multi-token-prediction layer is not cut"):
        chosen(R1, load_machine("8x-h200"), asked(0, mtp=True))
    with pytest.raises(BadArtefact, match=r"/nope\.json"):
        chosen(NANO, load_machine("4x-rtx4090"), Ask("int8", degrees=Degrees(ranks=0, copies=2, counts="/nope.json")))


def test_one_gpu_beside_a_cpu_is_one_process():
    """Which only predicts, as it does without --ranks; the plan says so, and what runs."""
    plan = chosen(R1, load_machine("rtx4090-384gb"), asked(0))
    assert plan.fits and plan.mesh is None and "--device cpu runs" in plan.notes[0]
    whole = chosen(R1, load_machine("4x-rtx4090"), asked(0))
    assert whole.fits and whole.mesh is None and "no run takes one process" in whole.notes[0]
    assert "--device cpu runs" in whole.notes[0]  # for the GPUs hold it in no form


def test_where_no_way_that_runs_fits_another_form_is_named():
    plan = chosen(R1, load_machine("8x-h100"), asked(0, scheme="fp8_block"))
    assert plan.mesh is None and "--scheme experts-int4 --ranks 8 (tp 8) runs" in plan.notes[0]


def test_parts_of_a_batch_go_with_pipelines_alone():
    ask = Ask("int8", batch=8, degrees=Degrees(ranks=0, microbatches=4))
    tried = tried_of(NANO, load_machine("4x-rtx4090"), ask)
    assert all(t.degrees.microbatches == (4 if t.degrees.pp > 1 else None) for t in tried)
    assert tried[0].degrees.size == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ranks": "4", "tp": 2}, "--ranks chooses --tp"),
        ({"ranks": "two"}, "from 1 to 1024, or auto"),
        ({"ranks": 0}, "--ranks 0"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UsageError, match=said):
        Degrees.of(options)


def test_a_run_takes_them_too():
    assert plan_for(NANO, {"ranks": "2", "device": "cpu", "context": 64}).mesh.size == 2
    assert plan_for(NANO, {"ranks": "auto", "device": "cpu", "context": 64}).mesh is None
