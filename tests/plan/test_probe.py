"""What the probe finds: GPUs from a driver, limits from cgroups, a CPU from its description. All of it faked."""

import sys
import types

import pytest

from undistilled.ops.cpu.builds import builds, cpuinfo
from undistilled.plan import cgroup, gpus, probe
from undistilled.plan.hardware import load_machine

GIB = 2**30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDISTILLED_CACHE", str(tmp_path / "cache"))


class FakeNvml(types.SimpleNamespace):
    """Two RTX 4090; whatever else is asked fails, as on an old driver."""

    NVML_CLOCK_MEM, NVML_CLOCK_SM = "mem", "sm"

    def __getattr__(self, name):
        def refuse(*_):
            raise RuntimeError(f"{name} not supported")

        return refuse

    def nvmlInit(self): ...

    def nvmlShutdown(self): ...

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, n):
        return n

    def nvmlDeviceGetUUID(self, h):
        return f"GPU-{'ab'[h]}123".encode()

    def nvmlDeviceGetName(self, h):
        return f"RTX 4090 #{h}"

    def nvmlDeviceGetCudaComputeCapability(self, h):
        return (8, 9)

    def nvmlDeviceGetMemoryInfo(self, h):
        return types.SimpleNamespace(total=24 * GIB, free=23 * GIB)

    def nvmlDeviceGetNumGpuCores(self, h):
        return 16384

    def nvmlDeviceGetMaxClockInfo(self, h, k):
        return {"mem": 10501, "sm": 2520}[k]

    def nvmlDeviceGetMemoryBusWidth(self, h):
        return 384

    def nvmlDeviceGetMaxPcieLinkGeneration(self, h):
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, h):
        return 16


def test_gpus_by_clock(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found, links = gpus.probe_gpus((64 * GIB, 60 * GIB))
    assert [d.name for d in found] == ["cuda:0", "cuda:1"] and found[0].features == ("sm_89",)
    datasheet = load_machine("4x-rtx4090").device("cuda:0").ceilings
    for field in ("read_bytes_per_s", "fp32_flops", "bf16_flops", "fp8_flops", "int8_ops"):
        assert getattr(found[0].ceilings, field) == pytest.approx(getattr(datasheet, field), rel=0.01)
    assert [(k.a, k.b) for k in links] == [("cpu", "cuda:0"), ("cpu", "cuda:1")]
    assert links[0].bytes_per_s == pytest.approx(31.5e9, rel=0.01)


@pytest.mark.parametrize(
    ("setting", "models"),
    [("1", ["#1"]), ("1,0", ["#1", "#0"]), ("", []), ("-1", []), ("GPU-b", ["#1"]), ("0,9,1", ["#0"])],
)
def test_visible_gpus(monkeypatch, setting, models):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    assert [d.model.split()[-1] for d in gpus.probe_gpus((1, 0))[0]] == models


def test_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(probe, "torch_version", lambda: "2.13.0+cpu")
    machine = probe.probe()
    assert len(machine.devices) == 1 and "without CUDA" in machine.note
    monkeypatch.setattr(probe, "torch_version", lambda: "2.13.0")
    assert len(probe.probe().devices) == 3


def _cgroup(tmp_path, own, files):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "fs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "fs", tmp_path / "own"


def test_cgroup_v2(tmp_path):
    files = {"a/memory.max": "max\n", "a/b/memory.max": f"{8 * GIB}\n", "a/b/memory.current": f"{3 * GIB}\n",
             "a/b/memory.stat": f"anon 5\ninactive_file {GIB}\n", "a/cpu.max": "250000 100000\n",
             "a/b/cpu.max": "max 100000\n"}  # fmt: skip
    root, own = _cgroup(tmp_path, "0::/a/b\n", files)
    assert cgroup.memory_room(root, own) == (8 * GIB, 6 * GIB)
    assert cgroup.cpu_quota(root, own) == 2.5


def test_cgroup_v1_inside_a_container(tmp_path):
    files = {"memory/memory.limit_in_bytes": str(4 * GIB), "memory/memory.usage_in_bytes": str(GIB),
             "cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}  # fmt: skip
    root, own = _cgroup(tmp_path, "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n", files)
    assert cgroup.memory_room(root, own) == (4 * GIB, 3 * GIB)
    assert cgroup.cpu_quota(root, own) == 1.5


@pytest.mark.parametrize(
    "files",
    [{}, {"memory.max": "max", "cpu.max": "max 100000"}, {"memory.max": "gibberish", "cpu.max": "x"},
     {"memory.max": str(2**63 - 4096), "cpu.max": "100000 0"}],
)  # fmt: skip
def test_no_limit(tmp_path, files):
    root, own = _cgroup(tmp_path, "0::/\n", files)
    assert cgroup.memory_room(root, own) is None and cgroup.cpu_quota(root, own) is None
    assert cgroup.memory_room(root, tmp_path / "absent") is None


def test_limits_reach_the_probe(monkeypatch):
    monkeypatch.setattr(probe, "memory_room", lambda: (2 * GIB, GIB))
    monkeypatch.setattr(probe, "cpu_quota", lambda: 1.5)
    cpu = probe.probe().device("cpu")
    assert (cpu.memory_bytes, cpu.free_bytes <= GIB, cpu.cores) == (2 * GIB, True, 1)


def test_cpuinfo_of_x86_and_arm(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Xeon\nflags\t\t: fpu avx2 fma avx512f amx_int8 amx_tile\n")
    assert probe.cpu_model(cpuinfo(file)) == ("Xeon", ("avx2", "fma", "avx512f", "amx_int8"))
    file.write_text("processor : 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n")
    assert probe.cpu_model(cpuinfo(file))[1] == ("neon", "dotprod", "i8mm", "bf16", "sve")
    assert probe.cpu_model(cpuinfo(tmp_path / "absent"))[1] == ()


def test_numa_nodes(tmp_path):
    (tmp_path / "has_memory").write_text("0-1,3\n")
    assert probe.numa_nodes(tmp_path) == 3
    assert probe.numa_nodes(tmp_path / "absent") == 1


def test_a_driver_that_answers_nonsense(monkeypatch):
    nvml = FakeNvml(nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(total=0, free=0))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.probe_gpus((GIB, GIB)) == ((), ())


def test_integrated_gpu_shares_memory(monkeypatch):
    def unsupported(_):
        raise RuntimeError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(nvmlDeviceGetMemoryInfo=unsupported))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(probe, "torch_version", lambda: "2.13.0")
    machine = probe.probe()
    assert [d.unified for d in machine.devices] == [True, True]
    assert machine.free_bytes() == machine.device("cpu").free_bytes


def test_bf16_products_need_a_build_and_every_instruction(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDISTILLED_KERNELS", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    rounding = next(build for build in builds() if build.rounds)
    flags = " ".join(rounding.needs)
    assert not probe.bf16_products({"flags": flags})
    (tmp_path / rounding.file).touch()
    assert probe.bf16_products({"flags": f"fpu {flags}"})
    assert not probe.bf16_products({"flags": flags.replace("avx512dq", "")})
    assert not probe.bf16_products({})


def test_int16_products_need_a_build_for_avx2(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDISTILLED_KERNELS", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    least = builds()[-1]
    flags = " ".join(least.needs)
    assert not probe.int16_products({"flags": flags})
    (tmp_path / least.file).touch()
    assert probe.int16_products({"flags": flags}) and not probe.bf16_products({"flags": flags})
    assert not probe.int16_products({"flags": flags.replace("f16c", "")})
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    (tmp_path / builds()[-1].file).touch()
    assert not probe.int16_products({})
