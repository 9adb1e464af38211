"""How fast ranks are predicted to go: what each reads, what all of a stage repeat, and who is slowest."""

import json

import pytest

from undistilled.checkpoint.resolve import find
from undistilled.plan import cost
from undistilled.plan.copies import Counts
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.ranks import layouts_of
from undistilled.plan.reads import part
from undistilled.plan.solve import Ask, solve
from undistilled.plan.speeds import skew

R1, NANO = find("deepseek-r1"), find("r1-nano")
EIGHT = load_machine("8x-h200")
GPUS = [d for d in EIGHT.devices if d.kind == "cuda"]


def planned(model=R1, machine=EIGHT, scheme="int4", context=1024, batch=1, device=None, **degrees):
    ask = Ask(scheme, context, batch, device=device, degrees=Degrees(**degrees))
    return solve(model.name, model.config, model.spec, machine, ask)


def reads(plan, model=R1):
    return layouts_of(plan, model.spec).reads


def held(plan, *roles):
    return sum(row.nbytes for row in plan.rows if row.store != "unloaded" and row.role in roles)


@pytest.mark.parametrize("degrees", [{"tp": 8}, {"tp": 2, "ep": 4}, {"tp": 7}, {"tp": 2, "pp": 2}])
def test_experts_are_read_once_and_compressions_by_every_rank(degrees):
    plan = planned(**degrees)
    each, inner = reads(plan), plan.mesh.inner
    assert sum(r.experts for r in each) == pytest.approx(held(plan, "expert.gate", "expert.up", "expert.down"))
    repeated = held(plan, "attention.q_a", "attention.kv_a", "norm", "router", "router_bias")
    embed = held(plan, "embed")
    assert sum(r.embed for r in each) == pytest.approx(embed)
    whole = sum(row.nbytes for row in plan.rows if row.store != "unloaded") - embed - sum(r.experts for r in each)
    assert sum(r.dense for r in each) == pytest.approx(whole + (inner - 1) * repeated, rel=1e-6)


def test_products_are_shared_out_but_for_compressions():
    plan = planned(tp=8)
    layouts = layouts_of(plan, R1.spec)
    inner = [p for p in layouts.loaded if p.weight.layer]
    shares = {p.row.role: sum(part(layouts.cuts, p, rank) for rank in range(8)) for p in inner}
    assert shares["attention.q_a"] == shares["attention.kv_a"] == 8
    assert all(shares[role] == pytest.approx(1) for role in ("attention.o", "shared.up", "expert.up", "expert.down"))


@pytest.mark.parametrize("tokens", [1, 32, 4096])
@pytest.mark.parametrize("ranks", [2, 3, 7, 8])
def test_no_rank_reads_more_experts_than_it_has(ranks, tokens):
    """Nor, as all do on average, other than what is chosen."""
    layouts = layouts_of(planned(ep=ranks), R1.spec)
    busiest = skew(R1.spec.moe, layouts.cuts.bounds, tokens)
    for reads in layouts.reads:
        more = reads.read(R1.spec, tokens, busiest) - reads.dense - reads.embed * min(1, tokens / R1.spec.vocab)
        assert reads.experts * cost.chosen(R1.spec, tokens) * 0.999 <= more <= reads.experts


def test_uneven_groups_are_drawn_as_they_are():
    """Of 256 experts 179 and 77: the large group reads about its 0.7 of what a token chooses, not all of it."""
    found = skew(R1.spec.moe, ((0, 179), (179, 256)), 1)
    assert 1.0 < found < 2.0
    assert skew(R1.spec.moe, ((0, 179), (179, 256)), 4096) == pytest.approx(1, abs=1e-3)


def test_what_ranks_repeat_is_not_shared_out():
    """Every rank reads all latents of its layers: eight ranks read a long context no faster than one."""
    spec, (short, long) = R1.spec, (planned(tp=8, context=n) for n in (1024, 131072))
    seconds = 1 / long.predicted.decode_tokens_per_s - 1 / short.predicted.decode_tokens_per_s
    cached = spec.kv_bytes_per_token(2) * (131072 - 1024)
    assert seconds == pytest.approx(cached / EIGHT.device("cuda:0").ceilings.read_bytes_per_s, rel=1e-6)


def test_the_largest_share_sets_the_pace():
    """A GPU with half the memory takes half as much; as many layers as ever wait for the other."""

    def over(*gigabytes):
        gpus = [d.model_copy(update={"free_bytes": n * 10**9}) for d, n in zip(GPUS, gigabytes, strict=False)]
        return planned(NANO, EIGHT.model_copy(update={"devices": tuple(gpus)}), "bf16", 64, tp=2)

    alike, uneven = over(80, 80), over(80, 40)
    assert uneven.mesh.shares and not alike.mesh.shares
    assert uneven.predicted.decode_tokens_per_s < alike.predicted.decode_tokens_per_s
    assert uneven.predicted.prefill_tokens_per_s < alike.predicted.prefill_tokens_per_s


def test_copies_of_experts_are_held_and_not_read_more(tmp_path):
    file = tmp_path / "counts.json"
    rows = {layer: [200 - 5 * e for e in range(32)] for layer in range(1, 16)}
    file.write_text(json.dumps(Counts(model="r1-nano", text="made up", tokens=100, layers=rows).model_dump()))
    more = {"scheme": "int8", "context": 128, "device": "cpu", "ep": 2}
    with_copies = planned(NANO, load_machine("this"), copies=3, counts=str(file), **more)
    without = planned(NANO, load_machine("this"), **more)
    a, b = reads(with_copies, NANO), reads(without, NANO)
    assert sum(r.held for r in a) > sum(r.held for r in b)
    assert [r.experts for r in a] == pytest.approx([r.experts for r in b], rel=1e-6)


def test_processes_of_a_cpu_share_its_bandwidth():
    """Two read what one reads, and what they repeat on top."""
    one, two = (planned(NANO, load_machine("this"), "int8", 128, 1, "cpu", **d) for d in ({}, {"tp": 2}))
    assert two.predicted.decode_tokens_per_s < one.predicted.decode_tokens_per_s


def test_experts_of_a_long_prompt_go_at_their_kernels_rate():
    """A GPU multiplies unpacked experts at a quarter of what a dense product reaches (docs/status.md)."""
    device = EIGHT.device("cuda:0")
    assert cost.rate(device, "experts fp8_block") == 0.27 * device.ceilings.bf16_flops
    assert cost.rate(device, "experts nl3") < cost.rate(device, "experts int4") < cost.rate(device, "bfloat16")
    few, many = (planned(scheme=s, tp=8).predicted.prefill_tokens_per_s for s in ("nl3-g64", "int4"))
    assert few < many
