"""What ranks read and hold: slices of every tensor, each byte once over all of them."""

import pytest
import torch

from tiny import WIDE, write_checkpoint
from undistilled.checkpoint.resolve import find
from undistilled.load.build import Memory, build
from undistilled.plan.cut import CUT
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.ranks import cuts_of
from undistilled.plan.solve import Ask, solve


def planned(model, scheme, **degrees):
    ask = Ask(scheme, 64, 2, device="cpu", degrees=Degrees(**degrees))
    return solve(model.name, model.config, model.spec, load_machine("this"), ask)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """In FP8 blocks with scales, as R1 is released."""
    folder = tmp_path_factory.mktemp("w") / "m"
    return find(str(write_checkpoint(folder, WIDE["deepseek"], fp8=True, dtype=torch.bfloat16)))


@pytest.mark.parametrize("degrees", [{"tp": 4}, {"tp": 2, "ep": 2}, {"pp": 2, "tp": 2}, {"tp": 3}])
def test_each_byte_is_read_once_over_all_ranks(released, degrees):
    """Norms and what else every rank holds aside; nothing is read that is not kept."""
    plan = planned(released, None, **degrees)
    whole = released.source()
    build(planned(released, None), released.spec, whole)
    read, kept = 0, 0
    for rank in range(plan.mesh.size):
        source = released.source()
        decoder = build(plan, released.spec, source, rank=rank)
        read += source.bytes_read
        kept += sum(p.numel() * p.element_size() for p in set(decoder.parameters()))
    cuts = cuts_of(plan, released.spec)
    again = 0
    for weight in cuts.weights.values():
        holders = sum(cuts.slice(weight.name, rank) is not None for rank in range(plan.mesh.size))
        if weight.role not in CUT:
            again += (holders - 1) * sum(
                whole.entries[name].stop - whole.entries[name].start
                for tensor in weight.tensor_names
                for name in (tensor, tensor + "_scale_inv")
                if name in whole.entries
            )
    assert read == whole.bytes_read + again
    assert kept <= read * 1.01  # vectors are float32 in memory


def test_planned_bytes_of_a_rank_are_the_loaded_ones(released):
    for scheme in (None, "int8", "int4"):
        plan = planned(released, scheme, tp=2, pp=2)
        for rank in range(4):
            memory = Memory(plan, released.spec, rank)
            for name in memory.rows:
                if memory.cuts.slice(name, rank) is not None:
                    memory(name)
            assert sum(s.nbytes for s in memory.held.values()) == plan.predicted.ranks[rank].bytes.weights


def test_converting_on_the_way_is_slicing_what_one_process_converts(released):
    """INT8's scale is a whole row's: a rank that holds half of a row has the same values as one that holds it all."""
    for scheme in ("int8", "int4", "fp32"):
        whole = Memory(planned(released, scheme), released.spec)
        plan = planned(released, scheme, tp=2)
        name = "model.layers.0.self_attn.o_proj.weight"
        from undistilled.load.ranges import fill

        fill(whole(name), released.source(), name)
        for rank in range(2):
            part = Memory(plan, released.spec, rank)
            place = part.place(name)
            fill(part(name), released.source(), name, place)
            expected = whole(name).narrow("in", place.start, place.stop)
            assert torch.equal(part(name).dense(torch.float32), expected.dense(torch.float32)), (scheme, rank)
