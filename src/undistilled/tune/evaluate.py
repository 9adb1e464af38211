"""How far a student is, without generating: which held-out answers it would write token by token.

Where the most likely token is the wanted one at every place of an answer, greedy decoding writes that answer. So the
share of such answers is a lower bound of exact match, at the price of one forward pass.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..checkpoint.tokenizer import Tokenizer
from ..prove import suite
from ..prove.levels import LEVELS
from .examples import LONGEST, Document, encode
from .packing import Sample, pack
from .trainable import Student


class HeldOut:
    """`count` held-out questions of each task, packed in batches of `size` tokens."""

    def __init__(self, tokenizer: Tokenizer, count: int, size: int) -> None:
        self.batches: list[tuple[Sample, list[str]]] = []
        waiting: list[Document] = []
        for task in sorted(LEVELS):
            for item in suite.test_items(task, count):
                document = encode(item, tokenizer)
                if len(document.ids) > LONGEST:
                    continue
                if sum(len(d.ids) for d in waiting) + len(document.ids) > size:
                    self._close(waiting, size)
                    waiting = []
                waiting.append(document)
        self._close(waiting, size)

    def _close(self, documents: list[Document], size: int) -> None:
        self.batches.append((pack(documents, size), [d.kind for d in documents]))

    @torch.no_grad()
    def __call__(self, student: Student, device: torch.device) -> dict[str, Any]:
        """exact: share of answers by task; second_token: share of second tokens that the MTP layer gets right."""
        student.eval()
        found: dict[str, list[float]] = defaultdict(list)
        second_right = second_all = 0
        for sample, kinds in self.batches:
            with torch.compiler.set_stance("force_eager"):  # a pass in a while is not worth its own compilation
                whole, right, scored = _score(student, sample.to(device))
            for kind, good in zip(kinds, whole, strict=False):
                found[kind].append(float(good))
            second_right, second_all = second_right + right, second_all + scored
        student.train()
        exact = {task: sum(marks) / len(marks) for task, marks in found.items()}
        return {
            "exact": exact,
            "exact_mean": sum(exact.values()) / len(exact),
            "second_token": second_right / second_all,
        }


def _score(student: Student, sample: Sample) -> tuple[list[bool], int, int]:
    """(for each document whether all of its answer is right, second tokens that are right, and in all)."""
    batch = sample.packed()
    h_TD = student.hidden(batch)
    first_T = student.decoder.lm_head(student.decoder.norm(h_TD)).argmax(-1)
    wrong_T = ((first_T != sample.targets_T) & (sample.targets_T >= 0)).long()
    before = torch.cat((wrong_T.new_zeros(1), wrong_T.cumsum(0)))
    counts = before[sample.bounds_S[1:].long()] - before[sample.bounds_S[:-1].long()]
    second_T = student.second(h_TD, batch).argmax(-1)
    scored = sample.second_T >= 0
    return (counts == 0).tolist(), int((second_T == sample.second_T)[scored].sum()), int(scored.sum())
