"""Layouts: the table of contexts, advice and how the GPUs are filled."""

import re

import pytest

from undistilled.checkpoint.resolve import find
from undistilled.plan import cost
from undistilled.plan.hardware import Machine, load_machine
from undistilled.plan.layout import BLOCK
from undistilled.plan.solve import Ask, solve


@pytest.fixture(scope="module")
def r1():
    return find("deepseek-r1")


@pytest.fixture(scope="module")
def smollm2():
    return find("smollm2")


def make(model, machine, **ask):
    found = load_machine(machine) if isinstance(machine, str) else machine
    return solve(model.name, model.config, model.spec, found, Ask(**ask))


def desk(gigabytes: float) -> Machine:
    """A CPU with this much memory free."""
    found = load_machine("workstation-64gb")
    cpu = next(d for d in found.devices if d.kind == "cpu")
    cpu = cpu.model_copy(update={"free_bytes": int(gigabytes * 1e9), "memory_bytes": int(1e9 + gigabytes * 1e9)})
    return Machine(name="desk", devices=(cpu,))


@pytest.mark.parametrize(
    "machine, ask",
    [
        ("h200-1tb", {"scheme": "int4", "device": "cpu"}),
        ("8x-h100", {"scheme": "fp8_block"}),
        ("4x-rtx4090", {"scheme": "int4"}),
    ],
)
def test_each_row_of_the_table_is_the_plan_for_that_context(r1, machine, ask):
    plan = make(r1, machine, **ask)
    assert plan.predicted.contexts[-1].context == r1.spec.max_context
    for said in plan.predicted.contexts:
        other = make(r1, machine, context=said.context, **ask)
        assert said.total_bytes == {n: d.bytes.total for n, d in other.predicted.devices.items()}
        assert said.kv_bytes == {n: d.bytes.kv for n, d in other.predicted.devices.items()}
        assert said.fits == other.fits


def advised(model, machine, **ask):
    """The ask with the options that the advice names."""
    plan = make(model, machine, **ask)
    assert not plan.fits
    options = dict(re.findall(r"--(context|batch|scheme) (\S+)", plan.advice))
    assert options and " it fits" in plan.advice
    return {k: v if k == "scheme" else int(v) for k, v in options.items()}


@pytest.mark.parametrize("context, batch", [(2048, 2000), (8192, 500), (8000, 330)])
def test_advice_names_the_largest_context_that_fits(smollm2, context, batch):
    found = advised(smollm2, desk(24), context=context, batch=batch)
    assert set(found) == {"context"} and found["context"] % BLOCK == 0
    assert make(smollm2, desk(24), context=found["context"], batch=batch).fits
    assert not make(smollm2, desk(24), context=found["context"] + 1, batch=batch).fits


def test_advice_names_the_largest_batch_where_no_context_fits(smollm2):
    found = advised(smollm2, desk(1), context=64, batch=5000)
    assert set(found) == {"batch"}
    assert make(smollm2, desk(1), context=64, batch=found["batch"]).fits
    assert not make(smollm2, desk(1), context=64, batch=found["batch"] + 1).fits


def test_advice_gives_up_both_where_it_must(smollm2):
    found = advised(smollm2, desk(0.65), context=8192, batch=5000)
    assert set(found) == {"context", "batch"} and make(smollm2, desk(0.65), **found).fits


def test_advice_names_a_scheme_where_the_weights_do_not_fit(smollm2):
    found = advised(smollm2, desk(0.5), context=64)
    assert set(found) == {"scheme"} and make(smollm2, desk(0.5), context=64, **found).fits


def test_a_context_is_named_only_where_the_weights_fit(r1, smollm2):
    assert "In experts-nl2 it takes" in make(r1, "laptop-16gb").advice
    for gigabytes, named in ((0.3, True), (0.05, False)):  # nl3-g64 is about 70 MB, the libraries 277 MB
        plan = make(smollm2, desk(gigabytes))
        assert not plan.fits and ("at --context" in plan.advice) is named


@pytest.mark.parametrize(
    "machine, scheme, most", [("8x-h100", "fp8_block", 100e9), ("4x-rtx4090", "int4", 300e9), ("8x-h100", "bf16", 8e11)]
)
def test_no_gpu_has_room_while_experts_spill(r1, machine, scheme, most):
    plan = make(r1, machine, scheme=scheme)
    experts = {row.layer: row.nbytes for row in plan.rows if row.experts}
    devices = plan.predicted.devices
    assert plan.fits and devices["cpu"].bytes.weights < most
    for name, device in devices.items():
        if name != "cpu":
            # less is left than one layer's matrix of all experts, or the stage's layers are all there
            spilt = [row for row in plan.rows if row.experts and row.store == "cpu"]
            mine = {row.layer for row in plan.rows if row.role == "attention.o" and row.store == name}
            left = device.available - device.bytes.total
            assert left < max(experts.values()) or not any(row.layer in mine for row in spilt)
            assert device.bytes.total > 0.9 * device.available


def test_gpus_that_hold_everything_stay_balanced(r1):
    held = [d.bytes.weights for d in make(r1, "8x-h200").predicted.devices.values()]
    assert len(held) == 8 and max(held) - min(held) < 12e9  # a layer is 11.5 GB


def test_what_a_small_model_takes_besides_its_weights_is_small(smollm2, r1):
    """The tokenizer's memory goes with the vocabulary, the loader's with the largest matrix."""
    small, large = (make(m, desk(1000), context=64).predicted.devices["cpu"].bytes for m in (smollm2, r1))
    entries = r1.spec.vocab - smollm2.spec.vocab
    assert large.runtime - small.runtime == cost.TOKENIZER * entries
    config = smollm2.config | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 4096}
    from undistilled.model.spec import spec_from_config

    tiny = solve("tiny", config, spec_from_config(config), desk(10), Ask(context=64)).predicted.devices["cpu"].bytes
    assert tiny.activations < 5e6 and tiny.runtime < 280e6
