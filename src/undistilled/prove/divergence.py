"""How far a plan's next-token distributions are from the original's, on a text.

The text is cut in windows that are scored on their own. A window of W tokens gives W - 1 positions: those whose
next token is in the window, so that divergence, agreement and perplexity are over the same positions.
The two models are never in memory together: the first one's log-probabilities wait in a file.
P positions of a window, R rows at once, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BadArtefact, DoesNotFit
from .interval import around, mean_and_error, wilson
from .score import Scorer

EDGES = [10.0 ** (e / 2) for e in range(-12, 3)]  # nats: of the histogram, 1e-6 to 10
MANY = 8  # windows from which the standard error is by windows


def windows(ids: list[int], size: int, tokens: int, bos: int | None = None) -> list[list[int]]:
    """The first `tokens` ids in windows of `size`, each begun by `bos` where the model wants one.

    BadArtefact where the text is too short for a single prediction.
    """
    step = size - (bos is not None)
    head = [] if bos is None else [bos]
    limit = min(tokens, len(ids))
    cut = [head + ids[at : min(at + step, limit)] for at in range(0, limit, step)] if step > 0 else []
    cut = [w for w in cut if len(w) > 1]
    if not cut:
        raise BadArtefact(f"The text gives {limit} tokens in windows of {size}; that is no next token to compare.")
    return cut


@dataclass
class Recording:
    """A file of log-probabilities [positions, V] in float32, and the rows as they come back."""

    path: Path
    vocab: int
    positions: int

    def room(self) -> None:
        """DoesNotFit where the disk has no room for it."""
        need, free = self.positions * self.vocab * 4, shutil.disk_usage(self.path.parent).free
        if need > free:
            raise DoesNotFit(
                f"{self.path.parent} has {free / 1e9:.1f} GB free; the original's probabilities take {need / 1e9:.1f}.",
                "Use fewer --tokens, or set TMPDIR to a larger disk.",
            )

    def rows(self) -> np.ndarray:
        """[positions, V], read from the file as it is touched."""
        return np.memmap(self.path, np.float32, "r", shape=(self.positions, self.vocab))


def _scored(scorer: Scorer, window: list[int]):
    """(first position, float32 log-probabilities [R, V] on the CPU), for the positions with a next token."""
    at, last = 0, len(window) - 1
    for logits_RV in scorer.rows(window):
        kept = logits_RV[: last - at]
        if len(kept):
            yield at, kept.log_softmax(-1).cpu()
        at += len(logits_RV)


def record(scorer: Scorer, cut: list[list[int]], path: Path) -> Recording:
    """Run the original over the windows and keep its log-probabilities in `path`."""
    recording = Recording(path, scorer.decoder.spec.vocab, sum(len(w) - 1 for w in cut))
    recording.room()
    with path.open("wb") as file:
        for window in cut:
            for _, logprobs_RV in _scored(scorer, window):
                logprobs_RV.contiguous().numpy().tofile(file)
    return recording


@dataclass
class Positions:
    """What is known of every position of one window, float64 [P]."""

    kl: list[float] = field(default_factory=list)
    original: list[float] = field(default_factory=list)  # log-probability of the token that came
    plan: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)


def exact(logprobs_RV: torch.Tensor) -> torch.Tensor:
    """Float64 log-probabilities that sum to one exactly enough for KL never to be negative by rounding."""
    return logprobs_RV.double().log_softmax(-1)


def kl_rows(original_RV: torch.Tensor, plan_RV: torch.Tensor) -> torch.Tensor:
    """KL(original || plan) in nats of each row, [R] float64, from float64 log-probabilities."""
    return (original_RV.exp() * (original_RV - plan_RV)).sum(-1)


def compare(scorer: Scorer, cut: list[list[int]], recording: Recording) -> dict[str, Any]:
    """Run the plan over the windows and set it against the recording: the receipt's quality figures."""
    known, row, found = recording.rows(), 0, []
    for window in cut:
        here = Positions()
        for at, logprobs_RV in _scored(scorer, window):
            count = len(logprobs_RV)
            original = exact(torch.from_numpy(np.array(known[row : row + count])))
            _add(here, original, exact(logprobs_RV), torch.tensor(window[at + 1 : at + 1 + count]))
            row += count
        found.append(here)
    return summary(found)


def _add(here: Positions, original_RV: torch.Tensor, plan_RV: torch.Tensor, came_R: torch.Tensor) -> None:
    here.kl += kl_rows(original_RV, plan_RV).tolist()
    here.original += original_RV.gather(-1, came_R[:, None])[:, 0].tolist()
    here.plan += plan_RV.gather(-1, came_R[:, None])[:, 0].tolist()
    here.same += (original_RV.argmax(-1) == plan_RV.argmax(-1)).tolist()


def summary(found: list[Positions]) -> dict[str, Any]:
    """Figures over all positions. The histogram's first bin is below its first edge, its last at or above the last.

    Standard errors are by windows (one cluster each) where there are at least 8, else by single positions;
    `se_by` says which. Neighbouring positions are alike, so one by tokens is likely to be too small.
    """
    kl = [x for w in found for x in w.kl]
    same = sum(x for w in found for x in w.same)
    return {
        "kl_nats": _kl_figures(found, kl),
        "top1_agreement": same / len(kl),
        "top1_interval": wilson(same, len(kl)),
        "perplexity": _perplexity(found),
    }


def _clustered(found: list[Positions], values: list[list[float]]) -> dict[str, Any]:
    by_windows = len(found) >= MANY
    groups = values if by_windows else [[x] for v in values for x in v]
    mean, error = mean_and_error([math.fsum(g) for g in groups], [len(g) for g in groups])
    by = "windows" if by_windows else "tokens"
    return {"mean": mean, "se": error, "se_by": by, "interval": around(mean, error, len(groups))}


def _kl_figures(found: list[Positions], kl: list[float]) -> dict[str, Any]:
    counts = np.bincount(np.searchsorted(EDGES, kl, side="right"), minlength=len(EDGES) + 1)
    figures = _clustered(found, [w.kl for w in found])
    if figures["interval"]:
        figures["interval"][0] = max(0.0, figures["interval"][0])  # what it is an interval of is never negative
    return figures | {
        "p99": float(np.quantile(kl, 0.99)),
        "max": max(kl),
        "n": len(kl),
        "windows": len(found),
        "histogram": {"edges": EDGES, "counts": counts.tolist()},
    }


def _perplexity(found: list[Positions]) -> dict[str, Any]:
    """exp of the mean negative log-probability; `log_ratio` is ln(plan / original), paired by position."""
    count = sum(len(w.kl) for w in found)
    worse = [[a - b for a, b in zip(w.original, w.plan, strict=True)] for w in found]
    return {
        "original": math.exp(-math.fsum(x for w in found for x in w.original) / count),
        "plan": math.exp(-math.fsum(x for w in found for x in w.plan) / count),
        "log_ratio": _clustered(found, worse),
    }
