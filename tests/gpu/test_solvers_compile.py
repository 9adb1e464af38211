"""The solvers' kernels compile for a GPU, in every form, where there is none."""

import os

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from undistilled.compress.solvers import gptq_cuda, search_cuda

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
TABLE = {"table": "*u8", "levels": "*fp32"}
LADDER = dict.fromkeys(("least", "most", "fine"), "fp32")


def compiled(kernel, types, constants, **options):
    """`types`: of arguments; one that is neither there nor a constant is None."""
    constants = constants | {name: None for name in kernel.arg_names if name not in types and name not in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32), options=options
    )


@pytest.mark.parametrize("missing", [("low", "begin"), ("low",), ("begin", "table", "levels")])
def test_gptq(missing):
    pointers = dict.fromkeys(("w", "scale", "low", "upper", "lost"), "*fp32") | {"begin": "*i32", "codes": "*u8"}
    numbers = dict.fromkeys(("k", "n", "programs", "by_stack", "upper_by_stack", "upper_by_row"), "i32")
    types = pointers | TABLE | LADDER | numbers | {"upper_by_input": "i32"}
    for name in missing:
        del types[name]
    constants = {"INPUTS": 64, "OUTPUTS": gptq_cuda.OUTPUTS}
    kernel = compiled(gptq_cuda._rounded, types, constants, num_warps=1)
    assert kernel.asm["ptx"].count("st.local") == 0  # registers hold all


@pytest.mark.parametrize("group", [16, 128])
@pytest.mark.parametrize("missing", [("low", "minimums"), ("table", "levels")])
@pytest.mark.parametrize("name", ["_refitted", "_best"])
def test_search(name, missing, group):
    kernel = getattr(search_cuda, name)
    pointers = ("values", "importance", "base", "low", "factors", "scales", "minimums")
    numbers = ("total", "rows", "by_row", "group", "candidates")
    types = dict.fromkeys(pointers, "*fp32") | TABLE | LADDER | {"highest": "fp32"} | dict.fromkeys(numbers, "i32")
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in missing}
    constants = {"GROUPS": search_cuda.TILE // group, "WIDTH": group}
    assert compiled(kernel, types, constants).asm["ptx"].count("st.local") == 0
