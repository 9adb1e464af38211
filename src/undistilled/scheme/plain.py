"""bf16, fp16, fp32: one part, the values themselves."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Dim


@dataclass(frozen=True)
class Plain:
    name: str
    dtype: str

    def layout(self):
        return {"values": (self.dtype, (Dim("out"), Dim("in")))}

    def compress(self, w):
        import torch

        return {"values": w.to(getattr(torch, self.dtype))}

    def decompress(self, parts, shape, dtype):
        return parts["values"].to(dtype)


SCHEMES = (Plain("bf16", "bfloat16"), Plain("fp16", "float16"), Plain("fp32", "float32"))
