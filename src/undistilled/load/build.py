"""From a plan and a checkpoint to a decoder in memory, streaming.

Memory is taken once, in the planned scheme; tensors then come by ranges of rows and go straight to their
place. The peak is the loaded model plus one range of rows on its way.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from time import perf_counter

import torch

from .. import scheme as schemes
from ..checkpoint.source import Source
from ..errors import BadArtefact, DoesNotFit
from ..events import emit
from ..model.decoder import Decoder
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..ops.cpu import matrix
from ..plan.cut import Slice
from ..plan.plan import Plan, Row
from ..plan.ranks import cuts_of
from ..plan.recipes import products_of
from ..scheme import Stored
from .pages import Pages
from .ranges import fill

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name


def _keep_buffers() -> None:
    """Ask glibc to keep freed buffers of a range's size: giving each back and faulting it in again costs a third
    of the time. Nothing where there is no glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 32 << 20)  # M_TRIM_THRESHOLD, bytes


def _release_buffers() -> None:
    """Give back what `_keep_buffers` kept, now that no more ranges come."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """Gives each weight the memory of what `rank` holds of it, as the plan's row says, and remembers it by name."""

    def __init__(self, plan: Plan, spec: ModelSpec, rank: int = 0) -> None:
        self.compute, self.rank, self.mesh = plan.compute_dtype, rank, plan.mesh
        self.cuts = cuts_of(plan, spec) if plan.mesh else None
        self.rows: dict[str, Row] = {row.name: row for row in plan.rows}
        self.known = {w.name: w for w in weights(spec)}
        self.held: dict[str, Stored] = {}
        self.pages = Pages()

    def place(self, name: str) -> Slice:
        """What the rank holds of a weight of its own."""
        experts = self.known[name].experts
        whole = Slice(experts=tuple(range(experts)) if experts else None)
        return (self.cuts.slice(name, self.rank) if self.cuts else None) or whole

    def device(self, row: Row) -> str:
        return self.mesh.devices[self.rank] if self.mesh else row.store

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
        return self.pages.empty(shape, dtype) if device == "cpu" else torch.empty(shape, dtype=dtype, device=device)

    def __call__(self, name: str) -> Stored:
        if name not in self.held:
            row, shape = self.rows[name], self.place(name).shape(self.known[name])
            scheme, device = schemes.get(row.scheme), self.device(row)
            products = products_of(row.role, row.scheme, device.split(":")[0], self.compute)
            if device == "cpu" and row.role != "attention.kv_b":  # whose rows meet queries and sums one by one
                scheme = matrix.laid(scheme, shape, products)
            try:
                parts = {
                    part: self.empty(spec.shape, getattr(torch, spec.dtype), device)
                    for part, spec in schemes.parts_of(scheme, shape).items()
                }
            except (OSError, RuntimeError, torch.OutOfMemoryError) as error:
                raise DoesNotFit(f"No memory for {name} ({row.nbytes} bytes) on {device}: {error}") from None
            self.held[name] = Stored(scheme, shape, parts, products)
        return self.held[name]

    def tensors(self, name: str) -> list[tuple[Stored, str]]:
        """Where each of the checkpoint's tensors of a weight goes."""
        stored, names, place = self.held[name], self.known[name].tensor_names, self.place(name)
        if place.experts is None:
            return [(stored, names[0])]
        return [(stored.expert(at), names[expert]) for at, expert in enumerate(place.experts)]


def build(plan: Plan, spec: ModelSpec, source: Source, *, rank: int = 0, progress: Progress | None = None) -> Decoder:
    """The decoder that `plan` describes, or what `rank` has of it, with its weights.

    BadArtefact names what is wrong with a tensor.
    """
    _keep_buffers()
    memory = Memory(plan, spec, rank)
    mtp = any(memory.known[row.name].mtp and row.store != "unloaded" for row in plan.rows)
    layers = plan.mesh.layers(rank) if plan.mesh else range(spec.layers)
    seen = memory.cuts.spec_of(rank) if memory.cuts else spec
    with torch.no_grad():
        decoder = Decoder(memory, seen, DTYPE[plan.activation_dtype], mtp=mtp, layers=layers).eval()
        _check_names(spec, source, [memory.known[name] for name in memory.held])
        total = sum(stored.nbytes for stored in memory.held.values())
        done, began = 0, perf_counter()
        for name in memory.held:
            for one, tensor in memory.tensors(name):
                fill(one, source, tensor, memory.place(name))
                done += one.nbytes
                if progress:
                    progress(done, total, tensor)
        _release_buffers()
        emit("load.done", bytes=done, seconds=perf_counter() - began)
    return decoder


def _check_names(spec: ModelSpec, source: Source, wanted: list[Weight]) -> None:
    present = source.names()
    _check_strangers(spec, source, present)
    missing = [n for w in wanted for n in w.tensor_names if n not in present]
    if missing:
        raise BadArtefact(
            f"{source.files[0].parent}: tensor {missing[0]!r} is missing ({len(missing)} in all).",
            "A shard is missing, or config.json is another model's.",
        )
    for w in wanted:
        for n in w.tensor_names:
            if tuple(source.shape(n)) != w.shape:
                raise BadArtefact(
                    f"{source.files[0].parent}: tensor {n!r} is {list(source.shape(n))}, "
                    f"config.json implies {list(w.shape)}."
                )


def _check_strangers(spec: ModelSpec, source: Source, present: set[str]) -> None:
    """A tensor that config.json does not imply means that the model is another than it says."""
    known = {n for w in weights(spec) for n in w.tensor_names} | {"lm_head.weight"}
    for name in sorted(present - known):
        layer = name.removeprefix("model.layers.").split(".")[0]
        beyond = layer.isdigit() and int(layer) >= spec.layers  # layers that predict further tokens
        if name.startswith(("model.", "lm_head.")) and not beyond and not name.endswith("inv_freq"):
            raise BadArtefact(
                f"{source.files[0].parent}: tensor {name!r} has no place in a {spec.model_type} of this config.json.",
                "Leaving it out would change the model's answers. Is config.json the right one?",
            )
