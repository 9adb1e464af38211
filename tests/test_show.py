"""What a person sees: tables in 80 columns, without a cut word or a line that says the same again."""

import pytest
from rich.console import Console

from undistilled import show, show_plan, show_quality
from undistilled.checkpoint.resolve import find
from undistilled.events import subscribed
from undistilled.observe.inspect import inspect
from undistilled.plan.degrees import Degrees
from undistilled.plan.hardware import load_machine
from undistilled.plan.solve import Ask, solve


@pytest.fixture
def shown(monkeypatch):
    """The lines that were printed so far, in a terminal of 80 columns."""
    console = Console(width=80, highlight=False, force_terminal=False, record=True)
    monkeypatch.setattr(show, "out", console)
    return lambda: [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("machine", ["8x-h100", "8x-h200", "4x-rtx4090", "laptop-16gb", "mac-studio-512gb"])
def test_a_plan_takes_80_columns(shown, machine):
    model = find("deepseek-r1")
    plan = solve(model.name, model.config, model.spec, load_machine(machine), Ask())
    show_plan.plan(plan)
    lines = shown()
    assert not any("…" in line for line in lines) and max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if line.startswith("device"))
    devices = lines[head + 1 : head + 1 + len(plan.predicted.devices)]
    assert [line.split()[0] for line in devices] == list(plan.predicted.devices)  # a line each
    at = next(i for i, line in enumerate(lines) if line.startswith("context"))
    table = lines[at + 1 : at + 1 + len(plan.predicted.contexts)]
    assert [line.split()[0] for line in table] == [f"{c.context:,}" for c in plan.predicted.contexts]
    assert all(line.endswith(("fits", "too large")) for line in (*devices, *table))


def test_layouts_take_80_columns_and_say_why_not(shown):
    model = find("r1-nano")
    ask = Ask("fp8_block", device="cpu", degrees=Degrees(ranks=7))
    with subscribed(show_plan.layouts):
        solve(model.name, model.config, model.spec, load_machine("this"), ask)
    lines = shown()
    assert not any("…" in line for line in lines) and max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("pp 7")).endswith("taken")
    assert "in fp8_block needs." in " ".join(lines)


def test_doctor_says_a_reason_once(shown):
    why = "our C kernel: FP32 activations, one result whatever the batch"
    same = {"device": "cpu", "products": "float32"}
    kernels = [same | {"scheme": f"int{n}", "kernel": "native", "why": why} for n in range(14)]
    kernels.append(same | {"scheme": "odd", "kernel": "reference", "why": "nothing faster"})
    has = {"native_kernels": "avx2", "native_tiles": True}
    show.doctor({"rows": [("cpu", "some")], **has, "kernels": kernels, "presets": ["h100"]})
    text = " ".join(shown())
    assert "built for avx2, INT16 products of many rows by AMX" in text
    assert text.count("our C kernel") == text.count("native") == 1
    assert all(f"int{n}," in text or f"int{n} " in text for n in range(14)) and "nothing faster" in text
    assert "built for avx2" in text


@pytest.mark.parametrize("right", [None, 0.456])
def test_the_demo_compares_in_80_columns(shown, right):
    kl = {"mean": 0.01234, "se": 0.00123}
    row = {"scheme": "fp8_block", "weights": 33.4e6, "peak_bytes": 314.4e6, "right": right, "prefill": 1234.0,
           "decode": 22.0, "kl_nats": kl, "top1_agreement": 1.0}  # fmt: skip
    show.comparison([row | {"kl_nats": None}, row])
    lines = shown()
    assert len(lines) == 4 and max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    assert ("46%" in lines[-1]) == (right is not None)


def test_the_suite_and_the_bench_keep_their_figures_whole(shown):
    task = {"n": 100, "original": 1.0, "plan": 0.98, "difference": -0.02, "difference_interval": (-0.102, 0.031),
            "tokens_per_answer": {"original": 1012, "plan": 998}}  # fmt: skip
    nothing = {"original": 0, "plan": 0}
    show_quality._suite({"tasks": {"fraction_simplification": task}, "mean": task, "unfinished": nothing,
                         "thinking": True, "max_tokens": 1024})  # fmt: skip
    speed = {"median": 12345.0, "min": 12000.0, "max": 13000.0}
    show.bench(
        {
            "model": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "scheme": "int4-g32-sym",
            "compute_dtype": "bfloat16",
            "prefill_tokens_per_s": speed,
            "decode_tokens_per_s": speed,
            "peak_bytes": 1e9,
            "threads": 2,
            "others_cores": 1.26,
            "predicted": {"prefill_tokens_per_s": 1e5, "decode_tokens_per_s": 1e5, "bytes": {"cpu": 1e9}},
        }
    )
    lines = shown()
    assert any("-2.0 (-10.2 to +3.1)  1012 to 998" in line for line in lines)
    assert "SmolLM2-135M-Instruct.Q4_1.gguf as int4-g32-sym, bfloat16 products" in lines
    assert "prefill   12,345  12,000  13,000    100,000" in lines
    assert any("Other programs took 1.3 cores meanwhile" in line for line in lines)


def test_a_gguf_is_shown_as_it_lies_there(shown):
    """98 MB of Q4_1 are read as 269 MB of BF16: both are said, to people and to scripts."""
    found, path = inspect("smollm2"), find("smollm2").path
    assert found["file"] == {"type": "Q4_1", "bytes": path.stat().st_size}
    assert found["released_scheme"] == "bf16" and found["bytes"] == 269_100_288
    assert inspect("deepseek-r1")["file"] is None
    show.inspection(found)
    assert "released as    Q4_1, 98.4 MB (GGUF); read as bf16, 269.1 MB, 272 tensors" in shown()
