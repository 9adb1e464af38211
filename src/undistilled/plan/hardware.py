"""What a machine is: its devices, what moves bytes between them, and the ceilings that a roofline needs.

Bytes are bytes, not GiB; rates are per second; times are seconds. A ceiling's `source` says whether it was
measured here, read from a datasheet (a dense peak that no run reaches), or only estimated.
"""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import BadArtefact, UsageError

LARGEST_FILE = 1 << 20  # bytes: a machine of 64 devices takes a tenth of it
Source = Literal["measured", "datasheet", "estimated"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Ceilings(_Frozen):
    """The most that a device does, from PyTorch. None: it has no path faster than the wider type's."""

    read_bytes_per_s: float = Field(gt=0)  # of its own memory, by all its threads
    read_one_thread_bytes_per_s: float | None = Field(default=None, gt=0)
    fp32_flops: float = Field(gt=0)  # a second; a multiply and an add are two
    bf16_flops: float = Field(gt=0)
    int8_ops: float | None = Field(default=None, gt=0)
    fp8_flops: float | None = Field(default=None, gt=0)
    launch_s: float = Field(gt=0)  # one small operation, called from Python
    source: Source
    measured_at: str | None = None  # UTC, ISO 8601


class Device(_Frozen):
    """A processor with memory. `unified`: it shares its memory with the machine's other unified devices."""

    name: str = Field(pattern=r"^(cpu|cuda:\d+)$")
    kind: Literal["cpu", "cuda"]
    model: str
    memory_bytes: int = Field(gt=0)
    free_bytes: int = Field(ge=0)  # what a run may use now, within the cgroup's limits
    features: tuple[str, ...] = ()  # avx2, neon, ... or sm_90
    cores: int = Field(gt=0)  # a CPU's logical cores that this process may use; a GPU's CUDA cores, 1 if unknown
    numa_nodes: int = Field(default=1, gt=0)
    unified: bool = False
    bf16_products: bool = False  # whether our CPU kernels have products of BF16 activations there
    int16_products: bool = False  # whether they have fast ones of INT16
    ceilings: Ceilings
    note: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Device:
        if self.name.split(":")[0] != self.kind:
            raise ValueError(f"{self.name} is no {self.kind}")
        if self.free_bytes > self.memory_bytes:
            raise ValueError(f"{self.name}: free_bytes exceeds memory_bytes")
        return self


class Timed(_Frozen):
    """What a collective over two ends took."""

    bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class Link(_Frozen):
    """How bytes get from `a` to `b` or back: rate of one direction, from pinned memory where one end is the CPU.

    sums: of as many bytes as each end has; gathers: of as many as both have together. By size, where measured.
    """

    a: str
    b: str
    bytes_per_s: float = Field(gt=0)
    pageable_bytes_per_s: float | None = Field(default=None, gt=0)  # from memory that is not pinned
    latency_s: float = Field(gt=0)  # of a copy of a few bytes, waited for
    kind: Literal["pcie", "nvlink", "memory", "network"]
    source: Source
    note: str = ""
    sums: tuple[Timed, ...] = ()
    gathers: tuple[Timed, ...] = ()


class Disk(_Frozen):
    """Where models and caches lie. The rate is of one sequential reader past the page cache."""

    path: str
    free_bytes: int = Field(ge=0)
    read_bytes_per_s: float | None = Field(default=None, gt=0)


class Machine(_Frozen):
    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    devices: tuple[Device, ...] = Field(min_length=1)
    links: tuple[Link, ...] = ()
    disk: Disk | None = None
    os: str = ""
    python: str = ""
    torch: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _names_agree(self) -> Machine:
        names = [d.name for d in self.devices]
        if len(set(names)) != len(names):
            raise ValueError("devices: two have the same name")
        for link in self.links:
            for end in (link.a, link.b):
                if end not in names:
                    raise ValueError(f"links: no device {end!r}")
        return self

    def device(self, name: str) -> Device:
        """UsageError names the devices that there are."""
        for device in self.devices:
            if device.name == name:
                return device
        raise UsageError(f"{self.name} has no device {name!r}.", f"It has {', '.join(d.name for d in self.devices)}.")

    def free_bytes(self) -> int:
        """Over all devices, memory that several share counted once."""
        shared = [d.free_bytes for d in self.devices if d.unified]
        return sum(d.free_bytes for d in self.devices if not d.unified) + max(shared, default=0)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "machine") -> Machine:
        """BadArtefact names `where` and the first field that makes no sense."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise BadArtefact(
                f"{where}: {field}: {first['msg']}.", f"Compare it with a preset in {_presets()}."
            ) from None


def _presets() -> Path:
    return Path(str(resources.files(__package__).joinpath("machines")))


def known_machines() -> list[str]:
    """The names of the presets, sorted."""
    return sorted(file.stem for file in _presets().glob("*.json"))


def load_machine(spec: str) -> Machine:
    """`this` (probed now; rates measured before, else estimates), the name of a preset, or a machine file.

    Raises UsageError for a name that is neither, BadArtefact for a file that is missing or malformed.
    """
    if spec == "this":
        from .machine_cache import remembered
        from .probe import probe

        return remembered(probe())
    if spec in known_machines():
        return _read(_presets() / f"{spec}.json")
    file = Path(spec)
    if file.is_file() or file.suffix == ".json" or os.sep in spec:
        return _read(file)
    if "," in spec:
        raise UsageError(f"{spec!r} names several machines.", "Add --cluster ray, which makes one of them.")
    raise UsageError(f"Unknown machine {spec!r}.", f"Known: this, {', '.join(known_machines())}, or a machine file.")


def _read(file: Path) -> Machine:
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise BadArtefact(f"{file}: over {LARGEST_FILE} bytes; this is no machine file.")
        text = data.decode()
    except OSError as error:
        raise BadArtefact(f"{file}: {error.strerror}.", f"Presets: {', '.join(known_machines())}.") from None
    except UnicodeDecodeError:
        raise BadArtefact(f"{file}: not UTF-8 text; this is no machine file.") from None
    return Machine.from_json(text, str(file))


def describe(machine: Machine) -> list[tuple[str, str]]:
    """Rows (what, value with its unit) for a person."""
    rows = [("machine", machine.name)]
    for device in machine.devices:
        rows += _describe_device(device)
    for link in machine.links:
        pageable = f", pageable {_rate(link.pageable_bytes_per_s)}" if link.pageable_bytes_per_s else ""
        rate = f"{_rate(link.bytes_per_s)}{pageable}, {link.latency_s * 1e6:.1f} µs"
        rows.append((f"{link.a} – {link.b}", f"{link.kind}, {rate} ({link.source})"))
    if machine.disk:
        read = machine.disk.read_bytes_per_s
        speed = f"reads {_rate(read)}" if read else "read rate not measured"
        rows.append(("disk", f"{machine.disk.path}: {machine.disk.free_bytes / 1e9:.1f} GB free, {speed}"))
    versions = [machine.os, machine.python and f"Python {machine.python}", machine.torch and f"torch {machine.torch}"]
    rows.append(("software", ", ".join(v for v in versions if v)))
    rows.append(("note", machine.note))
    return [(name, value) for name, value in rows if value]


def _describe_device(device: Device) -> list[tuple[str, str]]:
    c, name = device.ceilings, device.name
    nodes = f", {device.numa_nodes} NUMA nodes" if device.numa_nodes > 1 else ""
    unit = "CUDA cores" if device.kind == "cuda" else "core" if device.cores == 1 else "cores"
    cores = f", {device.cores} {unit}{nodes}" if device.kind == "cpu" or device.cores > 1 else ""
    shared = ", shared with the other processors" if device.unified else ""
    when = f"{c.source}, {c.measured_at}" if c.measured_at else c.source
    one = f", {_rate(c.read_one_thread_bytes_per_s)} by one thread" if c.read_one_thread_bytes_per_s else ""
    rates = {"fp32": c.fp32_flops, "bf16": c.bf16_flops, "fp8": c.fp8_flops, "int8": c.int8_ops}
    compute = ", ".join(f"{k} {_si(rate, 'OP/s' if k == 'int8' else 'FLOP/s')}" for k, rate in rates.items() if rate)
    return [
        (name, f"{device.model}{cores}" + (f" ({', '.join(device.features)})" if device.features else "")),
        (f"{name} memory", f"{device.free_bytes / 1e9:.1f} GB free of {device.memory_bytes / 1e9:.1f} GB{shared}"),
        (f"{name} reads", f"{_rate(c.read_bytes_per_s)}{one} ({when})"),
        (f"{name} computes", f"{compute} ({when})"),
        (f"{name} starts an op", f"in {c.launch_s * 1e6:.1f} µs ({when})"),
        (f"{name} note", device.note),
    ]


def _si(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value / 1e6:.3g} M{unit}"


def _rate(value: float | None) -> str:
    return f"{(value or 0) / 1e9:.3g} GB/s" if (value or 0) < 1e12 else f"{(value or 0) / 1e12:.3g} TB/s"
