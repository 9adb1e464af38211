"""How many kernels Triton compiles for dynamic blocks, by the keys under which it keeps them. No GPU is needed."""

import os
import random
from collections import Counter

import pytest
import torch
from exact import stored

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from undistilled.ops.triton import blocks_dense, halves, tiles
from undistilled.ops.triton import experts as routed

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
KERNELS = [(tiles, "_product"), (halves, "_halves"), (halves, "_begin"), (blocks_dense, "_dense"), (routed, "_sum")]


class Recorded:
    """A kernel whose launches only leave their key."""

    def __init__(self, kernel, keys):
        self.name, self.keys = kernel.fn.__name__, keys
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **named):
        _, specialized, options = self.bind(*arguments, **named)
        self.keys.add((self.name, str(specialized), str(options)))


@pytest.fixture
def keys(monkeypatch):
    found = set()
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), found))
    monkeypatch.setattr(tiles, "counters", lambda device, blocks: torch.zeros(blocks, dtype=torch.int32))
    return found


def weight(*shape):
    """In tiles of 32 to 128 columns and any widths."""
    cols = random.choice([32, 64, 128])
    counts = Counter(random.choices(range(2, 7), k=-(-shape[-1] // cols)))
    return stored(f"tiles16x{cols}" + "".join(f"-{b}x{n}" for b, n in sorted(counts.items())), *shape)


def launched(tokens):
    """A linear, a dense copy and experts of mixes and shapes drawn anew."""
    outputs, inputs, width = random.randint(1, 60), random.randint(257, 512), random.randint(33, 64)
    w = weight(outputs, inputs)
    tiles.few(torch.zeros(tokens, inputs).bfloat16(), w)
    tiles.dense(w)
    bank = weight(4, width, inputs), weight(4, width, inputs), weight(4, inputs, width)
    ids = torch.zeros(tokens, 2, dtype=torch.int64)
    tiles.experts(torch.zeros(tokens, inputs).bfloat16(), ids, torch.zeros(tokens, 2), *bank)


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_model_of_any_mixes_has_the_same_kernels(keys, monkeypatch, tokens):
    random.seed(tokens)
    for few in (routed.FEW, 0):
        monkeypatch.setattr(routed, "FEW", few)
        for _ in range(30):
            launched(tokens)
    kernels = Counter(name for name, *_ in keys)
    assert kernels["_product"] == 5  # linears, and both products of few experts and of many
    assert kernels["_dense"] == 3  # columns of a tile
    assert kernels["_halves"] <= 12  # powers of two of inputs, for dtypes of x and what experts multiply
