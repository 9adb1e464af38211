"""Packers of other programs' checkpoints, element by element as those programs write them: slow, and obvious."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from undistilled.model.spec import spec_from_config
from undistilled.model.weights import weights

AWQ_MAP = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [n, ...] -> int32 [n * bits / 32, ...]: the bits of all, the lowest first."""
    words = np.zeros((-(-codes.shape[0] * bits // 32), *codes.shape[1:]), np.uint64)
    for i, code in enumerate(codes.astype(np.uint64)):
        for bit in range(bits):
            at = i * bits + bit
            words[at // 32] |= (code >> np.uint64(bit) & np.uint64(1)) << np.uint64(at % 32)
    return words.astype(np.uint32).view(np.int32)


def awq_words(codes: np.ndarray) -> np.ndarray:
    """[n, N] -> int32 [n, N / 8]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for col in range(words.shape[1]):
        for nibble, place in enumerate(AWQ_MAP):
            words[:, col] |= codes[:, 8 * col + place].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq(codes, zeros, scales, bits, index):
    found = {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scales.T}
    return {part: np.ascontiguousarray(value) for part, value in found.items()}


def gptq(codes, zeros, scales, bits, index, added=1):
    stored = (zeros - added) % (1 << bits)
    found = {
        "qweight": stream(codes.T, bits),
        "qzeros": stream(stored, bits).T,
        "scales": scales.T,
        "g_idx": index.astype(np.int32),
    }
    return {part: np.ascontiguousarray(value) for part, value in found.items()}


def quantised(folder, write, quant, *, bits=4, group=32, symmetric=False, index=None, skip=()):
    """Give the checkpoint's linear layers random codes, packed by `write`; weight's name -> dense values, float64."""
    config = json.loads((folder / "config.json").read_text())
    spec = spec_from_config(config)
    tensors, dense = load_file(folder / "model.safetensors"), {}
    rng = np.random.default_rng(0)
    for name in [n for w in weights(spec) if w.is_linear for n in w.tensor_names]:
        if any(part in name for part in skip):
            continue
        rows, cols = tensors.pop(name).shape
        groups = -(-cols // (group or cols))
        codes = rng.integers(0, 1 << bits, (rows, cols))
        zeros = np.full((rows, groups), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (rows, groups))
        scales = (rng.uniform(0.5, 1.5, (rows, groups)) / ((1 << bits) * cols**0.5)).astype(np.float16)
        places = np.arange(cols) // (group or cols) if index is None else index(cols)
        for part, value in write(codes, zeros, scales, bits, places).items():
            tensors[name.removesuffix("weight") + part] = torch.from_numpy(value)
        dense[name] = (codes - zeros[:, places]) * scales[:, places].astype(np.float64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quant}))
    return dense
