"""Rows out of a table and into one: the embedding, and the cache. T tokens, D hidden."""

from __future__ import annotations

import torch

from ..scheme import Stored, row_quantum
from .cpu import native
from .linear import checked, native_reads
from .registry import op


@op
def embed(tokens_T: torch.Tensor, weight: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a stored weight [V, D], decompressed one by one: [T, D]. Ids are in [0, V)."""
    together, (count, k) = row_quantum(weight.scheme), (len(tokens_T), weight.shape[1])
    if together == 1:
        rows = {name: part[tokens_T] for name, part in weight.parts.items()}
        return weight.scheme.decompress(rows, (count, k), dtype)
    sides = {name: part[tokens_T // together] for name, part in weight.parts.items()}  # rows that lie side by side
    several = weight.scheme.decompress(sides, (count * together, k), dtype).view(count, together, k)
    return several[torch.arange(count, device=tokens_T.device), tokens_T % together]


@embed.register("native", native_reads, "our C kernel: the rows straight from their codes")
def _native_embed(tokens_T: torch.Tensor, weight: Stored, dtype: torch.dtype) -> torch.Tensor:
    return native.pick_rows(checked(weight), tokens_T)


@op
def write_rows(values: torch.Tensor, table: torch.Tensor, slots_T: torch.Tensor) -> None:
    """table[slots_T[t]] = values[t], in the table's dtype; values [T, ...], table [slots, ...]."""
    table.index_copy_(0, slots_T, values.to(table.dtype))


@write_rows.register("native", native.serves, "our C kernel: rounded and written in one")
def _native_write(values: torch.Tensor, table: torch.Tensor, slots_T: torch.Tensor) -> None:
    native.write_rows(table, slots_T, values.contiguous())
