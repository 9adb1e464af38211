"""Who holds what: shares, stages, refusals, and what a plan for ranks is checked against."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undistilled import scheme as schemes
from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact, UsageError
from undistilled.model.weights import weights
from undistilled.observe.ranks import rebalanced
from undistilled.plan.check import check
from undistilled.plan.cut import Cuts
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.mesh import Mesh, even, ranges
from undistilled.plan.recipes import scheme_of
from undistilled.plan.solve import Ask, solve
from undistilled.plan.speeds import skew
from undistilled.plan.stages import balanced

R1 = find("deepseek-r1")
STORED = {w.name: scheme_of(w, R1.spec, "fp8_block") for w in weights(R1.spec) if not w.mtp}


def mesh(pp=1, layers=61, **more):
    size = pp * more.get("tp", 1) * more.get("ep", 1)
    return Mesh(stages=tuple(even(layers, pp)), devices=("cpu",) * size, **more)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.integers(0, 300))
def test_ranges_cover_without_gaps(shares, count):
    found = ranges(shares, count)
    assert [a for a, _ in found] == [0, *(b for _, b in found[:-1])] and found[-1][1] == count
    if count >= len(shares):
        assert all(a < b for a, b in found)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=9), st.lists(st.floats(0.5, 2), min_size=1, max_size=3))
def test_stages_are_the_best_of_all_splits(costs, speeds):
    from itertools import combinations

    def slowest(ends):
        edges = [0, *ends, len(costs)]
        return max(sum(costs[a:b]) / s for a, b, s in zip(edges, edges[1:], speeds, strict=False))

    best = min(slowest(ends) for ends in combinations(range(1, len(costs)), len(speeds) - 1))
    found = balanced(costs, speeds)
    assert slowest([b for _, b in found[:-1]]) == pytest.approx(best)


@pytest.mark.parametrize("degrees", [{"tp": 3}, {"tp": 8}, {"tp": 4, "ep": 2}, {"ep": 16}, {"tp": 2, "pp": 4}])
def test_slices_of_r1_make_it_whole(degrees):
    """Every element of what is cut is held once, and whole quanta of FP8 blocks."""
    cuts = Cuts(R1.spec, mesh(**degrees), STORED)
    for name in STORED:
        weight = cuts.weights[name]
        slices = [s for rank in range(cuts.mesh.size) if (s := cuts.slice(name, rank)) is not None]
        held = sum(schemes.bytes_of(schemes.get("bf16"), s.shape(weight)) for s in slices)
        full = schemes.bytes_of(schemes.get("bf16"), weight.full_shape)
        assert held == full * (1 if slices[0].axis or weight.experts else len(slices)), name
        for s in slices if STORED[name] == "fp8_block" else ():
            size = weight.shape[0 if s.axis == "out" else 1]
            assert s.axis is None or (s.start % 128 == 0 and (s.stop % 128 == 0 or s.stop == size)), name


def test_what_cannot_be_cut_is_refused_by_name():
    with pytest.raises(UsageError, match=r"65 ranks.*heads.*2 at a time.*q_b_proj.*fp8_block"):
        Cuts(R1.spec, mesh(tp=65), STORED).slice("model.embed_tokens.weight", 0)
    small = find("smollm2")
    with pytest.raises(UsageError, match="9 heads with 3 key-value heads cannot be shared by 4"):
        Cuts(small.spec, mesh(layers=30, tp=4), {}).spec_of(0)


def planned(**degrees):
    model = find("r1-nano")
    ask = Ask("int8", 128, device="cpu", degrees=Degrees(**degrees))
    return model, solve(model.name, model.config, model.spec, load_machine("this"), ask)


def test_a_part_of_less_than_a_quantum_is_one_ranks():
    """r1-nano's experts have half of what FP8 keeps together: one rank has all of the shared one."""
    nano = find("r1-nano")
    made = solve("r1-nano", nano.config, nano.spec, load_machine("this"), Ask(device="cpu", degrees=Degrees(tp=2)))
    assert made.scheme == "fp8_block" and made.fits
    stored = {row.name: row.scheme for row in made.rows if row.store != "unloaded"}
    cuts, name = Cuts(nano.spec, made.mesh, stored), "model.layers.1.mlp.shared_experts.gate_proj.weight"
    assert [cuts.slice(name, rank).shape(cuts.weights[name]) for rank in (0, 1)] == [(64, 256), (0, 256)]


def test_a_plan_says_what_its_ranks_talk_about():
    made = solve("r1", R1.config, R1.spec, load_machine("8x-h200"), Ask(degrees=Degrees(tp=4, pp=2)))
    sums, handed = made.notes
    assert "65 sums of 14.3 KB over 4 ranks" in sums and "nvlink, datasheet" in sums
    assert "gets 14.3 KB" in handed


@pytest.mark.parametrize("device", [None, "cpu"])
def test_parts_of_a_batch_are_predicted(device):
    """Two stages of GPUs work at once on two parts; more read the experts more often. Stages of one CPU share it."""

    def decode(microbatches, batch=32):
        ask = Ask("int4", 1024, batch, device=device, degrees=Degrees(pp=2, microbatches=microbatches))
        return solve("r1", R1.config, R1.spec, load_machine("8x-h200"), ask).predicted.decode_tokens_per_s

    assert (decode(2) > 1.1 * decode(1)) == (device is None)
    assert decode(8) < decode(2)
    assert decode(8, 1) == decode(1, 1)


def test_experts_fall_unevenly_on_few_tokens():
    """Of 8 experts in 4 of 8 groups the busiest eighth has 3.5; a large batch touches all alike."""
    moe = R1.spec.moe
    one, two, four, eight = (tuple(even(256, n)) for n in (1, 2, 4, 8))
    assert skew(moe, one, 1) == 1.0
    assert 2.7 < skew(moe, eight, 1) < 3.7
    assert skew(moe, two, 1) < skew(moe, four, 1) < skew(moe, eight, 1)
    assert skew(moe, eight, 32) < 1.5 and skew(moe, eight, 512) < 1.05

    def decode(**degrees):
        ask = Ask("int4", 1024, 1, degrees=Degrees(**degrees))
        return solve("r1", R1.config, R1.spec, load_machine("8x-h200"), ask).predicted.decode_tokens_per_s

    assert decode(tp=8) > decode(tp=2, ep=4) > decode(ep=8)


def test_an_edited_figure_of_a_rank_is_named():
    model, plan = planned(tp=2)
    ranks = [r.model_copy(update={"bytes": r.bytes.model_copy(update={"kv": 5})}) for r in plan.predicted.ranks]
    edited = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"ranks": ranks})})
    with pytest.raises(BadArtefact, match=r"prediction for rank 0, kv is 5; it works out as \d+\.") as error:
        check(edited, model.spec, model.config)
    assert "makes it again" in error.value.hint


def test_a_plan_for_ranks_is_a_file_that_holds():
    model, plan = planned(tp=2, pp=2)
    again = type(plan).model_validate_json(plan.model_dump_json())
    check(again, model.spec, model.config)
    assert len(again.predicted.ranks) == 4 and again.predicted.devices["cpu"].bytes.total == sum(
        rank.bytes.total for rank in again.predicted.ranks
    )


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda d: d["mesh"].update(stages=[[0, 5], [6, 16]]), "stages"),
        (lambda d: d["mesh"].update(devices=["cpu", "cpu"]), "2 devices for 4 ranks"),
        (lambda d: d["mesh"].update(stages=[[0, 2], [2, 16]]), "its layer is in stage:1"),
        (lambda d: d["kv"].update(blocks=d["kv"]["blocks"] * 1000), "rank 0"),
        (lambda d: d["limits"].update(chunk=10**6), "rank 0"),
        (lambda d: d["rows"][5].update(store="stage:7", compute="stage:7"), "stage:7"),
        (lambda d: d["predicted"]["ranks"][1]["bytes"].update(weights=5), "rank 1"),
        (lambda d: d["mesh"].update(devices=["cuda:0"] * 4), "cuda:0"),
    ],
)
def test_an_edited_mesh_is_refused(tmp_path, edit, says):
    import json

    from undistilled.plan.plan import read_plan

    model, plan = planned(tp=2, pp=2)
    said = plan.model_dump(mode="json")
    edit(said)
    (tmp_path / "p.json").write_text(json.dumps(said))
    with pytest.raises(BadArtefact, match=says):
        check(read_plan(tmp_path / "p.json"), model.spec, model.config)


@pytest.mark.parametrize("options, says", [({"ep": 0}, "--ep 0"), ({"pp": 99}, "16 layers")])
def test_degrees_that_make_no_sense(options, says):
    with pytest.raises(UsageError, match=says):
        planned(**options)


def test_two_ranks_need_two_gpus(tmp_path):
    plan = solve("r1", R1.config, R1.spec, load_machine("8x-h200"), Ask(degrees=Degrees(tp=8)))
    check(plan, R1.spec, R1.config)
    mesh = plan.mesh.model_copy(update={"devices": ("cuda:0",) * 8})
    with pytest.raises(BadArtefact, match="A GPU for each"):
        check(plan.model_copy(update={"mesh": mesh}), R1.spec, R1.config)


def test_heads_that_several_ranks_repeat_are_whole_quanta_too(tmp_path):
    from tiny import CONFIGS, write_checkpoint

    model = find(str(write_checkpoint(tmp_path / "m", CONFIGS["llama"])))

    def over_four(scheme):
        ask = Ask(scheme, 64, device="cpu", degrees=Degrees(tp=4))
        return solve(model.name, model.config, model.spec, load_machine("this"), ask)

    over_four("int8")
    with pytest.raises(UsageError, match=r"4 ranks would cut .*proj.* at .*fp8_block keeps together"):
        over_four("fp8_block")


@pytest.mark.parametrize("degrees", [{"tp": 2000}, {"pp": 2, "microbatches": 100}, {"microbatches": 4}])
def test_too_many_or_for_nothing(degrees):
    with pytest.raises(UsageError, match=r"At most|--pp"):
        planned(**degrees)


def test_more_ranks_than_gpus():
    with pytest.raises(UsageError, match="8 ranks, but 4 GPUs"):
        solve("r1", R1.config, R1.spec, load_machine("4x-rtx4090"), Ask(degrees=Degrees(tp=8)))


def test_a_stage_that_is_twice_as_slow_gets_half_the_layers():
    before = mesh(pp=2, layers=12)
    after = rebalanced(before, [1.0] * 12, [6.0, 12.0])
    assert after.stages == ((0, 8), (8, 12))
