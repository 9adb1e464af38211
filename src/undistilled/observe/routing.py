"""How often a model's routers choose each expert, and how unevenly that spreads over ranks with and without copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..generate.engine import Engine
from ..model.layers import LocalBank, MoeLayer
from ..parallel.share import PartBank
from ..plan.copies import Counts, choose, imbalance
from ..plan.mesh import even
from ..schedule.request import Request, Sampling


class Noted(nn.Module):
    """A bank that keeps what its router chose. `chosen`: ids [T, k] of each pass."""

    def __init__(self, bank: LocalBank) -> None:
        super().__init__()
        self.bank = bank
        self.chosen: list[torch.Tensor] = []

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        self.chosen.append(ids_Tk.cpu())
        return self.bank.submit(x_TD, ids_Tk, weights_Tk)

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return self.bank.collect(handle)


def choices(engine: Engine, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
    """Layer -> experts [T, k] that its router chose for each token of a text, read in windows of the plan's context.

    UsageError where the model has no routers, or its experts are not all in this process.
    """
    noted: dict[int, Noted] = {}
    for layer, block in enumerate(engine.decoder.layers):
        mlp = block.mlp
        if isinstance(mlp, MoeLayer) and isinstance(mlp.banks[0], LocalBank):
            noted[layer] = Noted(mlp.banks[0])
            mlp.banks = nn.ModuleList([noted[layer]])
    if not noted:
        raise UsageError(f"{engine.name} has no routed experts here.", "Choose another model, without --ep and --tp.")
    width = engine.max_context - 1
    for at in range(0, len(tokens), width):
        window = list(tokens[at : at + width])
        engine.run_all([Request(f"window-{at}", window, Sampling(max_tokens=1, temperature=0))])
    return {layer: torch.cat(bank.chosen) for layer, bank in noted.items()}


def counted(engine: Engine, found: dict[int, torch.Tensor], text: str) -> Counts:
    """`choices` as what a plan with copies is made from."""
    assert engine.spec.moe is not None
    experts = engine.spec.moe.experts
    layers = {layer: torch.bincount(ids.flatten(), minlength=experts).tolist() for layer, ids in found.items()}
    return Counts(model=engine.name, text=text, tokens=len(next(iter(found.values()))), layers=layers)


def balance(engine: Engine, found: dict[int, torch.Tensor], groups: int, number: int) -> dict[str, Any]:
    """The busiest group's tokens over the mean, of every layer, on the text's second half: as the experts are cut, and
    with `number` copies a layer chosen by the first half."""
    assert engine.spec.moe is not None
    half = len(next(iter(found.values()))) // 2
    first = counted(engine, {layer: ids[:half] for layer, ids in found.items()}, "")
    owners = [group for group, (a, b) in enumerate(even(engine.spec.moe.experts, groups)) for _ in range(a, b)]
    copies = choose(first, owners, groups, number)
    plain, copied = [], []
    for layer, ids in found.items():
        holders: list[tuple[int, ...]] = [(owner,) for owner in owners]
        plain.append(_measured(ids[half:], holders, groups))
        for _, expert, group in (c for c in copies if c[0] == layer):
            holders[expert] = (*holders[expert], group)
        copied.append(_measured(ids[half:], holders, groups))
    return {"groups": groups, "copies": number, "plain": plain, "copied": copied}


def _measured(ids_Tk: torch.Tensor, holders: list[tuple[int, ...]], groups: int) -> float:
    """Imbalance of the choices that each group computes, by the turns that its ranks take."""
    turns_PE = PartBank.turns(holders)
    taken = turns_PE[ids_Tk.sum(-1, keepdim=True) % len(turns_PE), ids_Tk]
    return imbalance(torch.bincount(taken.flatten(), minlength=groups).tolist())
