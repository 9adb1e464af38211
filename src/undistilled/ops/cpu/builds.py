"""The builds of the kernels: the same sources, compiled once for each kind of processor.

setup.py reads this table too, as a file of its own: nothing of the package is imported here.
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


class Build(NamedTuple):
    name: str
    flags: tuple[str, ...]
    """What the compiler is told of the processor."""
    needs: tuple[str, ...] = ()
    """Flags of /proc/cpuinfo without which it must not be called."""

    @property
    def file(self) -> str:
        return f"kernels_{self.name}.so"

    @property
    def rounds(self) -> bool:
        """Whether it has products of activations rounded to BF16."""
        return "avx512_bf16" in self.needs

    @property
    def integers(self) -> bool:
        """Whether it multiplies integers with instructions of their own."""
        return "avx2" in self.needs or "asimddp" in self.needs

    @property
    def crosses(self) -> bool:
        """Whether weights may lie across (across.cpp), and many rows meet the others turned over (crossed.cpp)."""
        return "avx2" in self.needs


X86 = (  # from what needs most to what needs least
    Build("avx512_bf16", ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"), (*V4, "avx512_vnni", "avx512_bf16")),
    Build("avx512", ("-march=x86-64-v4", "-mavx512vnni"), (*V4, "avx512_vnni")),
    Build("avx2", ("-march=x86-64-v3",), V3),
)
ARM = (Build("dotprod", ("-march=armv8.2-a+dotprod",), ("asimddp",)), Build("neon", ("-march=armv8-a",)))
OTHERS = (Build("native", ("-march=native",)),)
MACHINES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}


def builds() -> tuple[Build, ...]:
    """Those for this kind of machine, the best first."""
    return MACHINES.get(platform.machine().lower(), OTHERS)


def sources(folder: Path = FOLDER) -> str:
    """What tells one state of the sources from another; empty where they are not there."""
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16] if files else ""


def cpuinfo(file: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The fields of the first processor, keys in lower case; none where the file cannot be read."""
    fields: dict[str, str] = {}
    try:
        for line in file.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass
    return fields


def asked() -> tuple[Path, tuple[Build, ...]]:
    """The folder of the kernels and the builds to choose from: UNDISTILLED_KERNELS names a build or another folder."""
    wanted = os.environ.get("UNDISTILLED_KERNELS", "")
    named = tuple(build for build in builds() if build.name == wanted)
    return (FOLDER, named) if named else (Path(wanted) if wanted else FOLDER, builds())


def choose(fields: dict[str, str]) -> Build | str:
    """The best build that is there and that a processor with these fields of cpuinfo has, or why there is none."""
    folder, wanted = asked()
    there = [build for build in wanted if (folder / build.file).exists()]
    if not there:
        names = ", ".join(build.file for build in wanted)
        return f"no native kernels in {folder} ({names}): the package was built without a compiler"
    flags = fields.get("flags", fields.get("features", "")).split()
    if not fields:  # macOS has no /proc/cpuinfo; what it runs on has AVX2, or products of bytes
        flags = [*X86[-1].needs, *ARM[0].needs]
    suits = next((build for build in there if set(build.needs) <= set(flags)), None)
    lacking = " ".join(flag for flag in there[-1].needs if flag not in flags)
    return suits or f"{folder / there[-1].file} needs a processor with {lacking}"
