"""INT8, symmetric: one scale for each output channel ("int8") or each group of inputs ("int8-g128")."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dim

ACTIVATIONS = {"int8": 32, "int16": 128}  # inputs whose activations share a scale in products of integers
LARGEST = {"int8": 127.0, "int16": 32767.0}  # what they may be rounded to, and the code of a group's largest


def grouped(w, group: int):
    """[..., in] -> [..., groups, group], padded with zeros; group 0 is the whole row."""
    import torch.nn.functional as F

    group = group or w.shape[-1]
    return F.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))


@dataclass(frozen=True)
class Int8:
    """`group` inputs share a scale; 0 means all of a row's."""

    name: str = "int8"
    group: int = 0

    def layout(self):
        return {
            "values": ("int8", (Dim("out"), Dim("in"))),
            "scales": ("float32", (Dim("out"), Dim("in", self.group))),
        }

    def compress(self, w):
        import torch

        groups = grouped(w.float(), self.group)
        lowest, highest = groups.aminmax(dim=-1)
        scales = torch.maximum(highest, -lowest) / 127
        inverse = scales.reciprocal().masked_fill_(scales == 0, 0.0)
        values = groups.mul(inverse[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        return {"values": values.flatten(-2)[..., : w.shape[-1]].contiguous(), "scales": scales}

    def decompress(self, parts, shape, dtype):
        groups = grouped(parts["values"].float(), self.group)
        dense = (groups * parts["scales"][..., None]).flatten(-2)[..., : shape[-1]]
        return dense.to(dtype)


SCHEMES = (Int8(), *(Int8(f"int8-g{g}", g) for g in (32, 64, 128)))
