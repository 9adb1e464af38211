"""What the kernels for dynamic blocks take to compile, and of a processor: for a GPU, without one.

    python benchmarks/gpu_compile.py [--capability 90]

Prints for each form of the kernel seconds of a core, instructions, registers and bytes of stack (where registers were
spilled). Triton's wheel brings the assembler and the disassembler.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

FORMS = [("linear", 0, groups) for groups in (1, 2, 4, 8)]
FORMS += [(name, stage, groups) for stage, name in ((1, "up"), (2, "down")) for groups in (1, 4)]
POINTERS = {"x": "i32", "factors": "fp32", "parts": "fp32", "counters": "i32", "weight": "i64", "other": "i64"}
POINTERS |= {"pairs": "i32", "shares": "fp32"}
NUMBERS = ("T", "N", "STRIDE", "SPLIT", "k_each", "each")


def compiled(stage, groups, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from undistilled.ops.triton import tiles

    settings = tiles._settings(groups)
    constants = {"STAGE": stage, "GROUPS": settings.pop("GROUPS")}
    results = "fp32" if stage and groups == 1 else "bf16"
    signature = {name: f"*{kind}" for name, kind in (POINTERS | {"y": results}).items()}
    signature |= dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in tiles._product.arg_names}
    source = ASTSource(tiles._product, signature, constants, {})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


def resources(binary):
    """(instructions, registers, bytes of stack)."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        used, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", used).groups())
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE)), registers, stack


def core_seconds():
    """Of this process and the assembler: other work on the machine counts less than in time that passes."""
    return sum(os.times()[:4])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args().capability
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty one, so that everything is compiled
        for name, stage, groups in FORMS:
            began = core_seconds()
            kernel = compiled(stage, groups, capability)
            seconds = core_seconds() - began
            instructions, registers, stack = resources(kernel.asm["cubin"])
            rows = f"up to {8 * groups} columns"
            print(f"{name:7}{rows:>18}{seconds:7.1f} s{instructions:7} instructions{registers:5} registers{stack:4} B")


if __name__ == "__main__":
    main()
