"""Our own checkpoints: Hugging Face folders whose config.json says the scheme of every weight.

A weight in a plain scheme is a tensor of its own name. One in FP8 blocks has `weight_scale_inv` beside it, as R1 has.
Of any other scheme, each part is a tensor `<weight>.<part>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import scheme as schemes
from ..errors import BadArtefact
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..scheme.base import Parts, PartSpec, Scheme, cut, parts_of
from .safetensors import ALL, SCALE, SafetensorsSource
from .source import Columns


def tensor_of(weight: str, scheme: Scheme, part: str) -> str:
    """The name of the tensor that holds a part."""
    if isinstance(scheme, schemes.Plain):
        return weight
    if scheme.name == "fp8_block":
        return weight + (SCALE if part == "scales" else "")
    return f"{weight}.{part}"


class CompressedSource(SafetensorsSource):
    """A folder that `undistilled quantize` wrote."""

    LONGEST = 8  # dimensions of a part

    def __init__(self, folder: Path, config: dict[str, Any], spec: ModelSpec) -> None:
        super().__init__(folder, config)
        self.weights: dict[str, Weight] = {}
        self.schemes: dict[str, Scheme] = {}
        for weight in weights(spec):
            if weight.name in spec.stored:
                scheme = schemes.get(spec.stored[weight.name])
                for name in weight.tensor_names:
                    self.weights[name], self.schemes[name] = weight, scheme

    def names(self) -> set[str]:
        return {n for n, s in self.schemes.items() if all(self._tensor(n, p) in self.entries for p in self._specs(n))}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weight(name).shape

    def scheme(self, name: str) -> str:
        self._weight(name)
        return self.schemes[name].name

    def parts(self, name: str, start: int, stop: int, columns: Columns = None) -> Parts:
        rows, *inputs = self._weight(name).shape
        return {
            part: self.read(
                self._checked(name, part, spec),
                *_range(spec, start, stop, rows),
                within=_within(spec, columns, inputs[0]) if columns else ALL,
            )
            for part, spec in self._specs(name).items()
        }

    def dense(self, name: str, start: int, stop: int):
        import torch

        scheme, shape = self.schemes[name], self._weight(name).shape
        stored = schemes.Stored(scheme, (stop - start, *shape[1:]), self.parts(name, start, stop))
        from ..ops.linear import dense

        return dense(stored, torch.float32)

    def _weight(self, name: str) -> Weight:
        if name not in self.weights:
            raise BadArtefact(f"{self.folder}: config.json says nothing of {name!r}.", "Was it edited?")
        return self.weights[name]

    def _specs(self, name: str) -> dict[str, PartSpec]:
        return parts_of(self.schemes[name], self.weights[name].shape)

    def _tensor(self, name: str, part: str) -> str:
        return tensor_of(name, self.schemes[name], part)

    def _checked(self, name: str, part: str, spec: PartSpec) -> str:
        tensor = self._tensor(name, part)
        entry = self._entry(tensor)
        if entry.shape != spec.shape or str(entry.dtype) != f"torch.{spec.dtype}":
            raise BadArtefact(
                f"{entry.file}: {tensor!r} is {list(entry.shape)} {entry.dtype}, "
                f"{self.schemes[name].name} implies {list(spec.shape)} {spec.dtype}."
            )
        return tensor


def _range(spec: PartSpec, start: int, stop: int, rows: int) -> tuple[int, int]:
    """Rows of a part that hold rows [start, stop) of the weight."""
    place = cut(spec.dims[0], start, stop, rows)
    return (0, spec.shape[0]) if place.start is None else (place.start, place.stop)


def _within(spec: PartSpec, columns: tuple[int, int], inputs: int) -> slice:
    """What of a part's second dimension holds these columns of the weight; all of it where it follows no input."""
    dim = spec.dims[1] if len(spec.dims) > 1 else None
    return cut(dim, *columns, inputs) if dim and dim.axis == "in" else ALL
