"""Documents into batches of one size: packed end to end, with their bounds, and the targets to learn.

T tokens of a batch, S bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checkpoint.tokenizer import Tokenizer
from ..model.batch import Packed
from .examples import LONGEST, Document, Mixture

PROSE = "prose.npy"  # ids of the prose, uint16
IGNORED = -100  # a target that does not count
SHORTEST = 24  # tokens of a document, on average at least: how many bounds a batch has room for


@dataclass
class Sample:
    """One batch. tokens_T, positions_T, targets_T (the next token), second_T (the one after) int64; bounds_S int32."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    targets_T: torch.Tensor
    second_T: torch.Tensor
    bounds_S: torch.Tensor

    def to(self, device: torch.device) -> Sample:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        if device.type == "cuda":
            moved = {name: t.pin_memory() for name, t in moved.items()}
        return Sample(**{name: t.to(device, non_blocking=True) for name, t in moved.items()})

    def packed(self) -> Packed:
        return Packed(self.tokens_T, self.positions_T, self.bounds_S, LONGEST)


def pack(documents: Iterable[Document], size: int) -> Sample:
    """The documents end to end; the last is cut at `size`, and what is missing there is filled with ignored tokens."""
    tokens = np.zeros(size, dtype=np.int64)
    positions, targets, second = np.zeros_like(tokens), np.full(size, IGNORED), np.full(size, IGNORED)
    bounds, at = [0], 0
    for document in documents:
        ids = np.asarray(document.ids)
        length = min(len(ids), size - at)
        stop, learned = at + length, document.given - 1
        tokens[at:stop], positions[at:stop] = ids[:length], np.arange(length)
        targets[at + learned : stop] = _following(ids, 1, length)[learned:]
        second[at + learned : stop] = _following(ids, 2, length)[learned:]
        bounds.append(stop)
        at = stop
        if at == size:
            break
    ids_T, at_T, first_T, then_T = map(torch.from_numpy, (tokens, positions, targets, second))
    return Sample(ids_T, at_T, first_T, then_T, _bounds(bounds, size))


def _following(ids: np.ndarray, step: int, length: int) -> np.ndarray:
    """What lies `step` tokens further, for the first `length` tokens; IGNORED behind the end."""
    return np.concatenate((ids[step:], np.full(step, IGNORED)))[:length]


def _bounds(bounds: list[int], size: int) -> torch.Tensor:
    """Always the same number of bounds, so that a compiled step sees one shape: empty documents fill up.

    What no document covers is cut into documents of at most LONGEST, which the attention kernel is promised.
    """
    while bounds[-1] < size:
        bounds.append(min(size, bounds[-1] + LONGEST))
    room = size // SHORTEST + 8
    if len(bounds) > room:
        raise ValueError(f"{len(bounds)} documents in {size} tokens")
    return torch.tensor(bounds + [size] * (room - len(bounds)), dtype=torch.int32)


class Batches(IterableDataset):
    """Packed batches of the mixture, each worker with documents of its own.

    `folder` has the tokenizer and prose.npy. Workers read them there: what they are handed has to fit into a pipe,
    or they would start one after the other.
    """

    def __init__(self, folder: Path, size: int, seed: int, first: int = 0) -> None:
        self.folder, self.size, self.seed, self.first = folder, size, seed, first

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = info.id if info else 0
        tokenizer, prose = Tokenizer.from_folder(self.folder), np.load(self.folder / PROSE)
        documents = iter(Mixture(tokenizer, prose, seed=hash((self.seed, self.first, worker))))
        while True:
            yield pack(documents, self.size)


def loader(batches: Batches, workers: int) -> Iterator[Sample]:
    """Batches made by `workers` processes ahead of time; 0 makes them here."""
    ahead = {"prefetch_factor": 4, "multiprocessing_context": "spawn"} if workers else {}
    return iter(DataLoader(batches, batch_size=None, num_workers=workers, **ahead))  # type: ignore[arg-type]
