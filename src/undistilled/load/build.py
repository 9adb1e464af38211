"""From a plan and a checkpoint to a decoder in memory, streaming.

Memory is taken once, in the planned scheme; tensors then come by ranges of rows and go straight to their
place. The peak is the loaded model plus one range of rows on its way.
"""

from __future__ import annotations

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
from ..plan.plan import Plan, Row
from ..scheme import Stored
from ..scheme.base import Parts

RANGE = 2 << 20  # elements of a tensor that are on their way at once
DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name


class Memory:
    """Gives each weight its memory, as the plan's row says, and remembers it by name."""

    def __init__(self, plan: Plan) -> None:
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
            self.held[name] = Stored(scheme, shape, parts)
        return self.held[name]


def build(
    plan: Plan, spec: ModelSpec, source: Source, *, mtp: bool = False, progress: Progress | None = None
) -> Decoder:
    """The decoder that `plan` describes, with its weights. BadArtefact names what is wrong with a tensor."""
    known = {w.name: w for w in weights(spec)}
    memory = Memory(plan)
    with torch.no_grad():
        decoder = Decoder(memory, spec, DTYPE[plan.compute_dtype], mtp=mtp).eval()
        _check_names(source, [known[name] for name in memory.held])
        total = sum(stored.nbytes for stored in memory.held.values())
        done, began = 0, perf_counter()
        for name, stored in memory.held.items():
            for at, tensor in enumerate(known[name].tensor_names):
                one = stored.expert(at) if known[name].experts else stored
                fill(one, source, tensor)
                done += one.nbytes
                if progress:
                    progress(done, total, tensor)
        emit("load.done", bytes=done, seconds=perf_counter() - began)
    return decoder


def _check_names(source: Source, wanted: list[Weight]) -> None:
    present = source.names()
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
        return target.scheme.compress(values)
    parts = source.parts(name, start, stop)
    _check_finite(parts, source, name)
    if native == target.scheme.name:
        return parts
    read = Stored(schemes.get(native), (stop - start, *target.shape[1:]), parts)
    compressed = target.scheme.compress(dense(read, torch.float32))
    _check_finite(compressed, source, name)  # float16 scales overflow where BF16 values do not
    return compressed


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
