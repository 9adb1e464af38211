"""The layers that architectures share. Each holds its weights as parts of a scheme and calls an op.

A layer asks `make(name)` for its weights: the loader answers with memory of the planned scheme and home.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Protocol

import torch
from torch import nn

from ..ops import linear
from ..ops.add import add
from ..ops.experts import experts
from ..ops.linear import apply
from ..ops.norm import add_norm, rms_norm
from ..ops.router import logits, route
from ..ops.swiglu import silu_mul
from ..ops.table import embed
from ..scheme import Stored
from .spec import Moe

Make = Callable[[str], Stored]


class Weighted(nn.Module):
    """A module around one stored weight, whose parts are its parameters."""

    values: torch.Tensor  # the part that every scheme has

    def __init__(self, make: Make, name: str) -> None:
        super().__init__()
        self.stored = make(name)
        for part, tensor in self.stored.parts.items():
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
            self.stored.parts[part] = self._parameters[part]  # type: ignore[assignment]


def vector(weight: Weighted | None) -> torch.Tensor | None:
    """The values of a vector that may be absent."""
    return None if weight is None else weight.values


class Linear(Weighted):
    """y = x W^T (+ b), whatever the scheme of W."""

    def __init__(self, make: Make, name: str, bias: bool = False) -> None:
        super().__init__(make, f"{name}.weight")
        self.bias: Weighted | None = Weighted(make, f"{name}.bias") if bias else None

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return apply(x_TK, self.stored, vector(self.bias))


def both(x_TK: torch.Tensor, first: Linear, second: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """What two linears without biases make of the same input."""
    if torch.is_grad_enabled():  # who watches a layer's gradients (calibration) does so by its module
        return first(x_TK), second(x_TK)
    kernel = linear.both.resolve(first.stored, second.stored, x_TK.dtype)
    return kernel.run(x_TK, first.stored, second.stored)


class Norm(Weighted):
    def __init__(self, make: Make, name: str, eps: float) -> None:
        super().__init__(make, f"{name}.weight")
        self.eps = eps

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, self.values, self.eps)

    def of_sum(self, h_TD: torch.Tensor, y_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(h + y, its norm)."""
        return add_norm(h_TD, y_TD, self.values, self.eps)


class Embedding(Weighted):
    """Rows of the embedding, decompressed one by one."""

    def __init__(self, make: Make, name: str) -> None:
        super().__init__(make, f"{name}.weight")

    def forward(self, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return embed.resolve(self.stored, dtype).run(tokens_T, self.stored, dtype)


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020)."""

    def __init__(self, make: Make, name: str) -> None:
        super().__init__()
        self.gate_proj = Linear(make, f"{name}.gate_proj")
        self.up_proj = Linear(make, f"{name}.up_proj")
        self.down_proj = Linear(make, f"{name}.down_proj")

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_mul(*both(x_TD, self.gate_proj, self.up_proj)))


class Bank(Protocol):
    """A set of experts that share a home and a scheme."""

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> object: ...
    def collect(self, handle: object) -> torch.Tensor: ...


class LocalBank(nn.Module):
    """All experts on this device: `submit` computes, `collect` hands over."""

    def __init__(self, make: Make, name: str) -> None:
        super().__init__()
        self.gate = Weighted(make, f"{name}.*.gate_proj.weight")
        self.up = Weighted(make, f"{name}.*.up_proj.weight")
        self.down = Weighted(make, f"{name}.*.down_proj.weight")

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate.stored, self.up.stored, self.down.stored
        return experts.resolve(gate, x_TD.dtype).run(x_TD, ids_Tk, weights_Tk, gate, up, down)

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return handle


class MoeLayer(nn.Module):
    """Shared experts, and a loop over banks of routed ones."""

    def __init__(self, make: Make, name: str, moe: Moe) -> None:
        super().__init__()
        self.moe = moe
        self.gate = Weighted(make, f"{name}.gate.weight")
        sigmoid = moe.scoring == "sigmoid"
        self.bias: Weighted | None = Weighted(make, f"{name}.gate.e_score_correction_bias") if sigmoid else None
        self.banks = nn.ModuleList([LocalBank(make, f"{name}.experts")])
        self.shared_experts = SwiGlu(make, f"{name}.shared_experts") if moe.shared else None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        gate = self.gate.stored
        logits_TE = logits.resolve(gate, x_TD.dtype).run(x_TD, gate)
        ids, weights = route(logits_TE, vector(self.bias), self.moe)
        handles = [bank.submit(x_TD, ids, weights) for bank in self.banks]  # type: ignore[operator]
        parts = [self.shared_experts(x_TD)] if self.shared_experts is not None else []
        parts += [bank.collect(h) for bank, h in zip(self.banks, handles, strict=True)]  # type: ignore[operator]
        return reduce(add, parts)
