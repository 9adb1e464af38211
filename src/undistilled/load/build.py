"""From a plan and a checkpoint to a decoder in memory, streaming.

Memory is taken once, in the planned scheme; tensors then come by ranges of rows and go straight to their
place. The peak is the loaded model plus one range of rows on its way.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
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
from ..ops.linear import dense
from ..plan.cost import RANGE
from ..plan.plan import Plan, Row
from ..plan.recipes import products_of
from ..scheme import Stored
from ..scheme.base import Parts

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
    """Gives each weight its memory, as the plan's row says, and remembers it by name."""

    def __init__(self, plan: Plan) -> None:
        self.compute = plan.compute_dtype
        self.rows: dict[str, Row] = {row.name: row for row in plan.rows}
        self.held: dict[str, Stored] = {}

    def __call__(self, name: str) -> Stored:
        if name not in self.held:
            row = self.rows[name]
            shape = (row.experts[1] - row.experts[0], *row.shape) if row.experts else tuple(row.shape)
            scheme = schemes.get(row.scheme)
            try:
                parts = {
                    part: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=row.store)
                    for part, spec in schemes.parts_of(scheme, shape).items()
                }
            except (RuntimeError, torch.OutOfMemoryError) as error:
                raise DoesNotFit(f"No memory for {name} ({row.nbytes} bytes) on {row.store}: {error}") from None
            products = products_of(row.role, row.scheme, row.compute, self.compute)
            self.held[name] = Stored(scheme, shape, parts, products)
        return self.held[name]


def build(plan: Plan, spec: ModelSpec, source: Source, *, progress: Progress | None = None) -> Decoder:
    """The decoder that `plan` describes, with its weights. BadArtefact names what is wrong with a tensor."""
    known = {w.name: w for w in weights(spec)}
    _keep_buffers()
    memory = Memory(plan)
    mtp = any(known[row.name].mtp and row.store != "unloaded" for row in plan.rows)
    with torch.no_grad():
        decoder = Decoder(memory, spec, DTYPE[plan.activation_dtype], mtp=mtp).eval()
        _check_names(spec, source, [known[name] for name in memory.held])
        total = sum(stored.nbytes for stored in memory.held.values())
        done, began = 0, perf_counter()
        for name, stored in memory.held.items():
            for at, tensor in enumerate(known[name].tensor_names):
                one = stored.expert(at) if known[name].experts else stored
                fill(one, source, tensor)
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


def fill(target: Stored, source: Source, name: str) -> None:
    """Stream one tensor into its place, range by range, each checked for NaN and infinity."""
    rows, matrix = target.shape[0], len(target.shape) > 1
    native = source.scheme(name)
    step = _step(target, native) if matrix else rows
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        parts = _parts(target, source, name, native, start, stop)
        place = target.narrow("out", start, stop) if matrix else target
        for part, tensor in place.parts.items():
            tensor.copy_(parts[part])


def _step(target: Stored, native: str | None) -> int:
    """Rows in a range: about RANGE elements, whole quanta of both schemes."""
    quantum = schemes.row_quantum(target.scheme)
    if native is not None:
        quantum = math.lcm(quantum, schemes.row_quantum(schemes.get(native)))
    return max(1, RANGE // target.shape[1] // quantum) * quantum


def _parts(target: Stored, source: Source, name: str, native: str | None, start: int, stop: int) -> Parts:
    """Rows [start, stop) in the target's scheme; what was read is checked before it is turned into anything."""
    if native is None:
        values = source.dense(name, start, stop)
        _check_finite({"values": values}, source, name)
        return _compressed(target, values, source, name)
    parts = source.parts(name, start, stop)
    _check_finite(parts, source, name)
    if native == target.scheme.name:
        return parts
    read = Stored(schemes.get(native), (stop - start, *target.shape[1:]), parts)
    return _compressed(target, dense(read, torch.float32), source, name)


def _compressed(target: Stored, values: torch.Tensor, source: Source, name: str) -> Parts:
    """float16 overflows where the values that were read do not."""
    parts = target.scheme.compress(values)
    if any(t.dtype is torch.float16 and not t.isfinite().all() for t in parts.values()):
        raise BadArtefact(
            f"{source.files[0].parent}: tensor {name!r} overflows the float16 numbers of {target.scheme.name}.",
            "Use bf16, int8 or fp8_block.",
        )
    return parts


def _check_finite(parts: dict[str, torch.Tensor], source: Source, name: str) -> None:
    for part, tensor in parts.items():
        if tensor.dtype is torch.float8_e4m3fn:
            bad = ((tensor.view(torch.uint8) & 127) == 127).any()
        elif tensor.dtype.is_floating_point:
            bad = ~tensor.isfinite().all()
        else:
            continue
        if bad:
            raise BadArtefact(
                f"{source.files[0].parent}: tensor {name!r} holds NaN or infinity ({part}).", "Download it again."
            )
