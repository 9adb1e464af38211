"""Plans: R1 from its config alone, what fits, and plans that must be refused (fault 25)."""

import json
import time
from math import prod

import pytest

from undistilled.checkpoint.resolve import find
from undistilled.errors import BadArtefact, DoesNotFit, UsageError
from undistilled.plan import cost
from undistilled.plan.check import check, check_devices
from undistilled.plan.hardware import load_machine
from undistilled.plan.plan import read_plan
from undistilled.plan.solve import Ask, solve


@pytest.fixture(scope="module")
def r1():
    return find("deepseek-r1")


def make(model, machine="8x-h200", **ask):
    return solve(model.name, model.config, model.spec, load_machine(machine), Ask(**ask))


def test_r1_is_planned_whole_and_fast(r1):
    load_machine("8x-h200")
    began = time.perf_counter()
    plan = make(r1, mtp=True)
    assert time.perf_counter() - began < 3
    assert plan.tensors == 91_991
    assert sum(row.nbytes for row in plan.rows if row.role not in ("norm",)) == pytest.approx(688_574_839_360, rel=1e-4)
    assert plan.parameters == 671_026_419_200
    assert plan.kv.bytes_per_token == 70_272
    assert plan.fits


def test_bytes_of_rows_are_the_prediction(r1):
    plan = make(r1, scheme="int4")
    for name, device in plan.predicted.devices.items():
        assert sum(row.nbytes for row in plan.rows if row.store == name) == device.bytes.weights
        b = device.bytes
        assert b.total == b.weights + b.kv + b.activations + b.runtime


def test_longer_contexts_take_more(r1):
    plan = make(r1)
    totals = [sum(c.total_bytes.values()) for c in plan.predicted.contexts]
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_r1_does_not_fit_a_laptop_and_says_what_would_help(r1):
    plan = make(r1, "laptop-16gb")
    assert not plan.fits and "GB" in plan.advice
    with pytest.raises(DoesNotFit):
        check(plan, r1.spec, r1.config)


def test_advice_is_true(r1):
    plan = make(r1, "4x-rtx4090", scheme="fp8_block")
    assert not plan.fits
    scheme = plan.advice.split("--scheme ")[1].split()[0]
    assert make(r1, "4x-rtx4090", scheme=scheme).fits


def test_too_long_a_context_names_the_limit(r1):
    with pytest.raises(UsageError, match="163840"):
        make(r1, context=200_000)


def edited(plan, tmp_path, **changes):
    raw = plan.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split("__")
        at = raw
        for key in parents:
            at = at[int(key)] if key.isdigit() else at[key]
        at[last] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(raw))
    return file


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"rows__5__scheme": "int5"}, "rows|Row"),
        ({"rows__5__nbytes": 12}, "Row"),
        ({"rows__5__nbytes": -1}, "rows.5.nbytes"),
        ({"rows__5__shape": [1, 2]}, "Row"),
        ({"rows__5__name": "model.layers.0.nothing"}, "row|Row"),
        ({"kv__blocks": 0}, "kv.blocks"),
        ({"kv__blocks": 1}, "blocks"),
        ({"kv__dtype": "int3"}, "kv.dtype"),
        ({"limits__context": 10**9}, "context"),
        ({"version": 99}, "version"),
        ({"model_hash": "0"}, "another"),
        ({"surprise": 1}, "surprise"),
        ({"kv__blocks": 10**9}, "prediction"),
        ({"kv__bytes_per_token": 1}, "bytes_per_token"),
        ({"limits__batch": 10**6}, "prediction"),
        ({"limits__chunk": 10**6}, "prediction"),
        ({"predicted__devices": {}}, "no device"),
        ({"rows__0__store": "meta", "rows__0__compute": "meta"}, "no device"),
        ({"rows__0__store": "unloaded", "rows__0__compute": "unloaded", "rows__0__nbytes": 0}, "no device"),
        ({"rows__0__scheme": "fp8_block"}, "never stored"),
        ({"rows__1__scheme": "int4"}, "never stored"),
        ({"rows__5__compute": "cuda:7"}, "compute"),
        ({"rows__5__role": "norm"}, "Row"),
        ({"rows__5__tensors": 9}, "tensors"),
        ({"predicted__devices__cuda:0__bytes__total": 1}, "prediction"),
        ({"predicted__devices__cuda:0__bytes__kv": -5}, "prediction"),
        ({"architecture": "gpt2"}, "architecture"),
        ({"parameters": -1}, "parameters"),
        ({"tensors": 3}, "tensors"),
        ({"scheme": "int8"}, "scheme is int8; it works out as fp8_block"),
        ({"scheme": "mixed"}, "scheme is mixed; it works out as fp8_block"),
        ({"scheme": "nonsense"}, "scheme"),
        ({"predicted__prefill_tokens_per_s": -1.0}, "predicted.prefill_tokens_per_s"),
        ({"predicted__decode_tokens_per_s": float("nan")}, "predicted.decode_tokens_per_s"),
        ({"predicted__decode_tokens_per_s": float("inf")}, "predicted.decode_tokens_per_s"),
        ({"predicted__decode_bytes_per_token": 1}, "predicted.decode_bytes_per_token"),
        ({"predicted__contexts": []}, "predicted.contexts"),
        ({"predicted__contexts__0__context": -1}, "predicted.contexts.0.context"),
        ({"predicted__contexts__0__context": 10**9}, "predicted.contexts"),
        ({"predicted__contexts__0__kv_bytes": {}}, "predicted.contexts at 1024"),
        ({"predicted__contexts__0__total_bytes__cuda:0": 5}, "predicted.contexts at 1024"),
        ({"predicted__contexts__0__fits": False}, "predicted.contexts at 1024"),
        ({"predicted__devices__cuda:0__fits": False}, r"devices.cuda:0.fits"),
        ({"predicted__devices__cuda:0__available": 5}, r"devices.cuda:0.fits"),
        ({"predicted__devices__cuda:0__available": -5}, "available"),
        ({"fits": False}, "fits is False"),
    ],
)
def test_edited_plans_are_refused_by_name(r1, tmp_path, changes, names):
    with pytest.raises(BadArtefact, match=names):
        check(read_plan(edited(make(r1), tmp_path, **changes)), r1.spec, r1.config)


def test_rows_changed_by_hand_are_called_mixed(r1, tmp_path):
    """With its own label such a plan would make a receipt that says what was not measured."""
    name = "model.layers.0.self_attn.q_a_proj.weight"
    plan = make(r1, scheme="int8")
    at = next(i for i, row in enumerate(plan.rows) if row.name == name)
    before, need = plan.rows[at].nbytes, 2 * prod(plan.rows[at].shape)
    changes = {f"rows__{at}__scheme": "bf16", f"rows__{at}__nbytes": need}
    with pytest.raises(BadArtefact, match="scheme is int8; it works out as mixed"):
        check(read_plan(edited(plan, tmp_path, **changes)), r1.spec, r1.config)
    device, more = plan.rows[at].store, need - before
    raw = plan.model_dump(mode="json")["predicted"]
    for key in ("weights", "total"):
        changes[f"predicted__devices__{device}__bytes__{key}"] = raw["devices"][device]["bytes"][key] + more
    for i, context in enumerate(raw["contexts"]):
        changes[f"predicted__contexts__{i}__total_bytes__{device}"] = context["total_bytes"][device] + more
    changes["predicted__decode_bytes_per_token"] = raw["decode_bytes_per_token"] + more
    check(read_plan(edited(plan, tmp_path, scheme="mixed", **changes)), r1.spec, r1.config)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"version": 1}', b"[" * 100_000, b"\xff\xfe{", b'{"model": "\xff"}']
)
def test_nonsense_is_refused(tmp_path, text):
    file = tmp_path / "plan.json"
    file.write_bytes(text)
    with pytest.raises(BadArtefact, match=r"plan\.json"):
        read_plan(file)


def test_a_plan_written_is_the_plan_read(r1, tmp_path):
    plan = make(r1)
    plan.write(tmp_path / "p.json")
    assert read_plan(tmp_path / "p.json") == plan


def test_a_plan_for_another_machine_is_refused(r1):
    with pytest.raises(DoesNotFit, match="cuda:0"):
        check_devices(make(r1), {"cpu": 10**12})
    with pytest.raises(DoesNotFit, match="GB"):
        check_devices(make(r1, "8x-h200"), dict.fromkeys([f"cuda:{i}" for i in range(8)] + ["cpu"], 10**9))


def test_a_plan_over_several_devices_is_not_run(r1):
    plan = make(r1, "8x-h200")
    with pytest.raises(DoesNotFit, match="one device"):
        check_devices(plan, {name: 10**12 for name in plan.predicted.devices})


def test_mtp_is_counted_and_loaded_only_when_asked_for(r1):
    without, with_mtp = make(r1), make(r1, mtp=True)
    assert sum(d.bytes.weights for d in with_mtp.predicted.devices.values()) > sum(
        d.bytes.weights for d in without.predicted.devices.values()
    )
    assert with_mtp.predicted.decode_bytes_per_token == without.predicted.decode_bytes_per_token


PRODUCTS = ("bf16_products", "int16_products")


@pytest.mark.parametrize(
    "ask, here, elsewhere",
    [
        ({}, "bfloat16", "float32"),
        ({"scheme": "int8"}, "int16", "int16"),
        ({"scheme": "experts-int4"}, "int16", "int16"),
        ({"scheme": "fp8_block,expert=int4"}, "int16", "int16"),
        ({"scheme": "bf16,expert=nl3-g64"}, "bfloat16", "int16"),
        ({"scheme": "fp16"}, "float32", "float32"),
        ({"scheme": "fp32"}, "float32", "float32"),
        ({"dtype": "float32"}, "float32", "float32"),
        ({"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"dtype": "int8", "scheme": "experts-nl3"}, "int8", "int8"),
    ],
)
def test_a_cpu_multiplies_in_what_its_kernels_are_fast_in(ask, here, elsewhere):
    model = find("r1-nano")
    machine = load_machine("laptop-16gb")
    cpu = machine.device("cpu").model_copy(update={"bf16_products": True})
    for found, expected in ((machine, elsewhere), (machine.model_copy(update={"devices": (cpu,)}), here)):
        plan = solve(model.name, model.config, model.spec, found, Ask(device="cpu", **ask))
        assert (plan.compute_dtype, plan.activation_dtype) == (expected, "float32")
        check(plan, model.spec, model.config)
    plain = machine.model_copy(update={"devices": (cpu.model_copy(update=dict.fromkeys(PRODUCTS, False)),)})
    plan = solve(model.name, model.config, model.spec, plain, Ask(device="cpu", **ask))
    assert plan.compute_dtype == ("float32" if elsewhere == "int16" else elsewhere)


def test_rates_are_those_of_kernels_that_were_measured():
    machine = load_machine("laptop-16gb")
    cpu = machine.device("cpu")
    plain, amx = (cpu.model_copy(update={"features": f}) for f in ((), ("avx2", "amx_bf16")))
    base = cpu.ceilings.fp32_flops
    assert cost.rate(cpu, "int16") == pytest.approx(1.3 * base) and cost.rate(plain, "int16") == base
    tiles = cpu.model_copy(update={"features": ("avx2", "amx_int8")})
    assert cost.rate(tiles, cost.TILED) == pytest.approx(3 * base)
    assert cost.rate(cpu, cost.TILED) == pytest.approx(1.3 * base)
    assert cost.in_tiles("int8") and cost.in_tiles("nl4-g64") and not cost.in_tiles("mxfp4")
    assert cost.rate(amx, "bfloat16") <= 0.75 * base and cost.rate(plain, "bfloat16") == cpu.ceilings.bf16_flops
    model = find("r1-nano")

    def prompt(**ask):
        plan = solve(model.name, model.config, model.spec, machine, Ask(device="cpu", **ask))
        return plan.predicted.prefill_tokens_per_s

    assert prompt(dtype="float32") == pytest.approx(prompt(dtype="bfloat16"), rel=0.2)  # FP8 is float32 either way
    assert prompt(scheme="int4", dtype="int8") > prompt(scheme="int4") > prompt(scheme="int4", dtype="float32")


def test_products_that_a_scheme_or_a_cpu_never_takes_are_refused():
    model = find("r1-nano")
    for dtype, scheme in (("float8", "bf16"), ("bfloat16", "fp32"), ("bfloat16", "fp16")):
        with pytest.raises(UsageError, match=r"float8|float32"):
            make(model, "laptop-16gb", dtype=dtype, scheme=scheme)
    for dtype, scheme in (("int8", "bf16"), ("int16", "fp8_channel"), ("int16", "fp8_block")):
        with pytest.raises(UsageError, match="integers"):
            make(model, "laptop-16gb", dtype=dtype, scheme=scheme)
    with pytest.raises(UsageError, match="cuda:0"):
        make(model, "h100", dtype="int8", scheme="int8")
    plan = make(model, "laptop-16gb", scheme="fp16")
    for dtype in ("float16", "bfloat16", "int8", "int16"):
        with pytest.raises(BadArtefact, match=r"float32|float16|integers"):
            check(plan.model_copy(update={"compute_dtype": dtype}), model.spec, model.config)


def test_values_that_bf16_does_not_hold_and_routers_keep_float32_products():
    from undistilled.plan.recipes import products_of

    for scheme in ("int8-g64", "nl3-g64", "int3", "mxfp4", "tiles16x32-2x3-3x5"):
        assert products_of("attention.o", scheme, "cpu", "bfloat16") == "bfloat16"
        assert products_of("router", scheme, "cpu", "bfloat16") is None
        assert products_of("attention.o", scheme, "cpu", "float32") is None
    for scheme in ("fp16", "fp32"):
        assert products_of("attention.o", scheme, "cpu", "bfloat16") is None
    for scheme in ("int8-g32", "int4-g32-sym", "int3", "nl3-g64", "tiles16x32-2x3-3x5"):
        assert products_of("attention.o", scheme, "cpu", "int8") == "int8"
    for scheme in ("fp8_channel", "fp8_block", "bf16"):
        assert products_of("attention.o", scheme, "cpu", "int16") is None
    for role in ("router", "attention.kv_b"):
        assert products_of(role, "int8", "cpu", "int8") is None
    spec = find("deepseek-r1").spec
    sizes = {
        compute: cost.activation_bytes(
            spec, chunk=512, batch=1, context=4096, compute=compute, kind="cpu", scheme="int3"
        )
        for compute in ("float32", "bfloat16", "int8", "int16")
    }
    assert min(sizes.values()) == sizes["float32"]
