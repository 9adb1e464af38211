"""Puts the collectives that a cut model needs beside its layers, which know nothing of them.

T tokens, D hidden, E experts, k chosen.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn

from ..model.decoder import Block, Decoder
from ..model.layers import Embedding, Linear, LocalBank, MoeLayer, SwiGlu
from ..ops.cpu.program import between
from ..plan.cut import Cuts
from .comm import Comm


class PartBank(nn.Module):
    """The experts that a group of ranks holds, known to the router by their numbers in the model.

    An expert of several holders is computed by one of them, by turns. Whose turn it is follows from the numbers of a
    token's experts alone, so that no company changes a token's sums.
    """

    numbers_PE: torch.Tensor  # by turn and expert: its place here, or past the last where it is another group's turn

    def __init__(self, bank: LocalBank, held: tuple[int, ...], holders: list[tuple[int, ...]], group: int) -> None:
        super().__init__()
        self.bank = bank
        places_E = torch.full((len(holders),), len(held))
        places_E[list(held)] = torch.arange(len(held))
        numbers_PE = torch.where(self.turns(holders) == group, places_E, len(held))
        self.register_buffer("numbers_PE", numbers_PE.to(bank.gate.stored.device))
        self.all = held == tuple(range(len(holders))) and all(groups == (group,) for groups in holders)

    @staticmethod
    def turns(holders: list[tuple[int, ...]]) -> torch.Tensor:
        """[P, E]: by turn and expert, the group that computes it."""
        count = math.lcm(*(len(groups) for groups in holders))
        return torch.tensor([[groups[turn % len(groups)] for groups in holders] for turn in range(count)])

    def places(self, ids_Tk: torch.Tensor) -> torch.Tensor:
        """Of the chosen experts, where they lie here."""
        return ids_Tk if self.all else between(self._places, ids_Tk)

    def _places(self, ids_Tk: torch.Tensor) -> torch.Tensor:
        turns = len(self.numbers_PE)
        if turns == 1:
            return self.numbers_PE[0][ids_Tk].to(ids_Tk.dtype)
        return self.numbers_PE[ids_Tk.sum(-1, keepdim=True) % turns, ids_Tk].to(ids_Tk.dtype)

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        return self.bank.submit(x_TD, self.places(ids_Tk), weights_Tk)

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return self.bank.collect(handle)


class PartEmbedding(nn.Module):
    """Rows of this rank's part of the vocabulary; the others' come by the sum."""

    def __init__(self, part: Embedding, start: int, comm: Comm) -> None:
        super().__init__()
        self.part, self.start, self.comm = part, start, comm

    def forward(self, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return between(partial(self._rows, dtype=dtype), tokens_T)

    def _rows(self, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        own, rows = tokens_T - self.start, self.part.stored.shape[0]
        inside = (own >= 0) & (own < rows)
        h_TD = self.part(own.clamp(0, rows - 1), dtype)
        return self.comm.all_reduce(h_TD * inside[:, None])


class Nothing(nn.Module):
    """A part of no width of a SwiGLU: it adds nothing."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return between(torch.zeros_like, x_TD)


def share(decoder: Decoder, cuts: Cuts, rank: int, comm: Comm) -> None:
    """Make this rank's part of a decoder one with the parts of its stage's other ranks."""
    for block in decoder.layers:
        block.register_forward_hook(lambda *_: comm.progress())
    if cuts.mesh.inner == 1:
        return
    for layer, block in zip(cuts.mesh.layers(rank), decoder.layers, strict=True):
        assert isinstance(block, Block)
        _share_block(block, cuts, rank, layer, comm)
    embed = "model.embed_tokens.weight"
    if decoder.first:
        place = cuts.slice(embed, rank)
        assert place is not None
        decoder.embed_tokens = PartEmbedding(decoder.embed_tokens, place.start, comm)  # type: ignore[assignment]
    if decoder.last:
        name = embed if decoder.spec.tied else "lm_head.weight"
        places = [cuts.slice(name, peer) for peer in cuts.mesh.peers(rank)]
        widths = [place.stop - place.start for place in places if place is not None]
        decoder.lm_head.register_forward_hook(lambda _module, _inputs, y_TV: comm.all_gather(y_TV, widths))


def _share_block(block: Block, cuts: Cuts, rank: int, layer: int, comm: Comm) -> None:
    def reduce(_module: nn.Module, _inputs: object, y_TD: torch.Tensor) -> torch.Tensor:
        return comm.all_reduce(y_TD)

    output = block.self_attn.o_proj
    assert isinstance(output, Linear)
    if cuts.mesh.within(rank):  # the sum has the bias once
        output.bias = None
    output.register_forward_hook(reduce)
    block.mlp = _mlp(block.mlp, cuts, rank, layer)
    block.mlp.register_forward_hook(reduce)


def _mlp(mlp: nn.Module, cuts: Cuts, rank: int, layer: int) -> nn.Module:
    if isinstance(mlp, MoeLayer):
        held, holders = cuts.experts(rank, layer), cuts.holders(layer)
        bank = mlp.banks[0]
        assert isinstance(bank, LocalBank)
        mlp.banks = nn.ModuleList([PartBank(bank, held, holders, cuts.group(rank))] if held else [])
        if mlp.shared_experts is not None and not mlp.shared_experts.gate_proj.stored.shape[0]:
            mlp.shared_experts = None
        return mlp if held or mlp.shared_experts is not None else Nothing()
    assert isinstance(mlp, SwiGlu)
    return mlp if mlp.gate_proj.stored.shape[0] else Nothing()
