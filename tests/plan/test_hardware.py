"""Machines: what is probed, measured, remembered, refused and shown."""

import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undistilled.errors import BadArtefact, UsageError
from undistilled.plan import machine_cache, measure, probe
from undistilled.plan.hardware import Machine, describe, known_machines, load_machine

GIB = 2**30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDISTILLED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", known_machines())
def test_preset_is_sane(name):
    machine = load_machine(name)
    assert machine.name == name
    assert Machine.from_json(machine.to_json()) == machine
    assert machine.device("cpu").kind == "cpu"
    for device in machine.devices:
        c = device.ceilings
        assert c.source == "datasheet" and c.measured_at is None
        assert 0 < device.free_bytes < device.memory_bytes
        assert 30e9 < c.read_bytes_per_s < 10e12
        assert c.fp32_flops < 200e12 and 1e-6 <= c.launch_s < 1e-4
        assert "launch_s" in device.note
    for gpu in machine.devices[1:]:
        assert gpu.ceilings.fp32_flops < gpu.ceilings.bf16_flops < gpu.ceilings.int8_ops
        assert any({k.a, k.b} == {"cpu", gpu.name} for k in machine.links)


def test_presets_that_are_promised():
    promised = {"4x-rtx4090", "rtx4090-384gb", "h200-1tb", "8x-h200", "8x-h100", "h100", "jetson-agx-orin",
                "jetson-agx-orin-32gb", "laptop-16gb", "workstation-64gb"}  # fmt: skip
    assert promised <= set(known_machines())
    eight = load_machine("8x-h200")
    assert len(eight.devices) == 9 and sum(k.kind == "nvlink" for k in eight.links) == 28
    orin = load_machine("jetson-agx-orin")
    assert all(d.unified for d in orin.devices)
    assert orin.free_bytes() == 58 * GIB  # once, not for each processor


def test_unknown_names_and_devices():
    with pytest.raises(UsageError, match="8x-h100"):
        load_machine("cray-1")
    with pytest.raises(UsageError, match="cpu"):
        load_machine("laptop-16gb").device("cuda:0")


def test_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(load_machine("h100").to_json())
    assert load_machine(str(file)) == load_machine("h100")


def _broken(change):
    data = load_machine("h100").to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "the file"),
        ("[]", "the file"),
        ("{", "the file"),
        (_broken(lambda d: d.update(schema_version=2)), "schema_version"),
        (_broken(lambda d: d.update(devices=[])), "devices"),
        (_broken(lambda d: d.update(surprise=1)), "surprise"),
        (_broken(lambda d: d["devices"][0]["ceilings"].update(read_bytes_per_s=0)), "read_bytes_per_s"),
        (_broken(lambda d: d["devices"][0]["ceilings"].update(bf16_flops=float("nan"))), "bf16_flops"),
        (_broken(lambda d: d["devices"][0]["ceilings"].update(launch_s=float("inf"))), "launch_s"),
        (_broken(lambda d: d["devices"][0].update(free_bytes=1 << 60)), "free_bytes"),
        (_broken(lambda d: d["devices"][0].update(name="tpu")), "devices.0.name"),
        (_broken(lambda d: d["devices"][0].update(kind="cuda")), "devices.0"),
        (_broken(lambda d: d["devices"].append(d["devices"][0])), "same name"),
        (_broken(lambda d: d["links"][0].update(b="cuda:7")), "cuda:7"),
        (_broken(lambda d: d["devices"][1].pop("memory_bytes")), "memory_bytes"),
    ],
)
def test_malformed_files_name_the_field(tmp_path, text, field):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(BadArtefact, match=field):
        load_machine(str(file))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_no_file_escapes_as_another_error(tmp_path, data):
    file = tmp_path / "fuzz.json"
    file.write_bytes(data)
    with pytest.raises(BadArtefact):
        load_machine(str(file))


def test_missing_and_huge_files(tmp_path):
    with pytest.raises(BadArtefact, match="No such file"):
        load_machine(str(tmp_path / "none.json"))
    (tmp_path / "huge.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BadArtefact, match="no machine file"):
        load_machine(str(tmp_path / "huge.json"))


def test_this_machine_without_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    machine = load_machine("this")
    cpu = machine.device("cpu")
    assert [d.name for d in machine.devices] == ["cpu"] and machine.links == ()
    assert cpu.ceilings.source == "estimated"
    assert 0 < cpu.free_bytes <= cpu.memory_bytes
    assert 1 <= cpu.cores <= os.cpu_count()
    assert Machine.from_json(machine.to_json()) == machine
    text = "\n".join(f"{a}: {b}" for a, b in describe(machine))
    assert "GB/s" in text and "FLOP/s" in text and "µs" in text and "estimated" in text


def test_probing_imports_no_torch():
    import subprocess

    code = "import sys, undistilled.plan.hardware as h; h.load_machine('this'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_measuring_with_a_tiny_budget(cache):
    said = []
    machine = measure.measure(None, 0.2, said.append)
    cpu = machine.device("cpu")
    assert cpu.ceilings.source == "measured" and cpu.ceilings.measured_at
    assert 1e8 < cpu.ceilings.read_bytes_per_s < 5e12
    assert 1e8 < cpu.ceilings.fp32_flops < 1e15 and 1e-8 < cpu.ceilings.launch_s < 1e-2
    assert said and [f.name for f in cache.iterdir()] == [machine_cache.cache_file(machine).name]
    again = load_machine("this")
    assert again.device("cpu").ceilings == cpu.ceilings
    assert again.disk.read_bytes_per_s == machine.disk.read_bytes_per_s


def test_only_this_machine_is_measured():
    with pytest.raises(UsageError, match="laptop-16gb"):
        measure.measure(load_machine("laptop-16gb"), 0.1)


def test_cache_is_whole_or_absent(cache, monkeypatch):
    machine = probe.probe()
    file = machine_cache.remember(machine)
    whole = file.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        machine_cache.remember(machine.model_copy(update={"note": "new"}))
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_broken_or_foreign_cache_is_ignored():
    machine = probe.probe()
    file = machine_cache.remember(machine)
    file.write_text('{"schema_version": 99}')
    assert machine_cache.remembered(machine) == machine
    grown = machine.model_copy(update={"torch": "9.9"})
    assert machine_cache.cache_file(grown) != file


@pytest.mark.gpu
def test_measuring_a_gpu():
    from undistilled.plan.measure_cuda import cuda_ceilings

    device = probe.probe().device("cuda:0")
    ceilings = cuda_ceilings(device, 2, lambda _: None)
    assert ceilings.read_bytes_per_s > 50e9 and ceilings.bf16_flops > ceilings.fp32_flops
