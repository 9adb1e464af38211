"""Moments on disk: a safetensors file a layer, of which one is in memory at a time.

An input that several weights share is kept once: the others name the weight that has it, in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .calibrate import Moments
from .files import whole

FIELDS = ("inputs", "outputs", "met", "diagonals")


def save(file: Path, found: dict[str, Moments]) -> None:
    """Write moments by weight name; the file is there when it is whole."""
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[str, int], str] = {}
    index: dict[str, dict] = {}
    for name, moments in found.items():
        index[name] = {"tokens": moments.tokens}
        for field in FIELDS:
            tensor = getattr(moments, field)
            if tensor is not None:
                key = seen.setdefault((field, tensor.data_ptr()), f"{name}:{field}")
                tensors[key] = tensor.cpu()
                index[name][field] = key
    with whole(file) as part:
        save_file(tensors, part, {"index": json.dumps(index)})


class Store(Mapping[str, Moments]):
    """Moments by weight name, of all layers of a folder."""

    def __init__(self, folder: Path) -> None:
        self.where: dict[str, tuple[Path, dict]] = {}
        for file in sorted(folder.glob("moments-*.safetensors")):
            with safe_open(file, "pt") as f:
                index = json.loads(f.metadata()["index"])
            self.where |= {name: (file, entry) for name, entry in index.items()}
        self._open: tuple[Path, dict[str, torch.Tensor]] = (folder, {})

    def __getitem__(self, name: str) -> Moments:
        file, entry = self.where[name]
        if self._open[0] != file:
            self._open = (file, {})
        held = self._open[1]
        with safe_open(file, "pt") as f:
            for field in FIELDS:
                if field in entry and entry[field] not in held:
                    held[entry[field]] = f.get_tensor(entry[field])
        fields = {field: held[entry[field]] for field in FIELDS if field in entry}
        return Moments(tokens=entry["tokens"], **fields)

    def met(self) -> Iterator[torch.Tensor]:
        """How many tokens each expert met, [E], layer by layer; nothing else is read."""
        for key, file in {entry["met"]: file for file, entry in self.where.values() if "met" in entry}.items():
            with safe_open(file, "pt") as f:
                yield f.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)
