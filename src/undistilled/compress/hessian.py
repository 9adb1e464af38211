"""Second moments of inputs, of one matrix or of several, that may share most of what is costly about them.

B matrices (or none), N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DAMP = 0.01  # of the mean of the diagonal, added to it


@dataclass(frozen=True)
class Hessian:
    """scale * stretch[i] * whole[i, j] * stretch[j]. whole [K, K] or [B, K, K]; stretch [K] or [B, K], None: ones.

    Weights that have one input, and experts that differ by their diagonals only, share `whole`, and so its factor.
    """

    whole: torch.Tensor
    scale: float = 1.0
    stretch: torch.Tensor | None = None

    def diagonal(self) -> torch.Tensor:
        """[..., K]"""
        found = self.whole.diagonal(dim1=-2, dim2=-1) * self.scale
        return found if self.stretch is None else found * self.stretch.square()

    def dense(self) -> torch.Tensor:
        """[..., K, K]"""
        found = self.whole * self.scale
        return found if self.stretch is None else found * self.stretch[..., :, None] * self.stretch[..., None, :]

    def lost(self, d: torch.Tensor) -> torch.Tensor:
        """d M d^T [..., N] of each row of [..., N, K]."""
        d = d if self.stretch is None else d * self.stretch[..., None, :]
        return self.scale * ((d @ self.whole) * d).sum(-1)

    def stretched(self, by: torch.Tensor) -> Hessian:
        """With inputs `by` [..., K] times as large."""
        return replace(self, stretch=by if self.stretch is None else self.stretch * by)

    def to(self, device: torch.device | str) -> Hessian:
        stretch = None if self.stretch is None else self.stretch.to(device)
        return Hessian(self.whole.to(device), self.scale, stretch)


@dataclass(frozen=True)
class Factor:
    """upper [B, K, K]: the Cholesky factor of the inverse of damped moments whose inputs lie in `order` [B, K]."""

    upper: torch.Tensor
    order: torch.Tensor


def factor(whole: torch.Tensor) -> Factor:
    """Of [K, K] or [B, K, K]; the inputs of largest moment come first."""
    h_BKK = whole.float().reshape(-1, *whole.shape[-2:])
    diagonal = h_BKK.diagonal(dim1=-2, dim2=-1)
    damp = DAMP * diagonal.mean(-1, keepdim=True) + 1e-10
    order = diagonal.argsort(-1, descending=True)
    wide = order[:, :, None].expand_as(h_BKK)
    h = h_BKK.gather(1, wide).gather(2, wide.transpose(1, 2))
    h.diagonal(dim1=-2, dim2=-1).add_(damp)
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return Factor(torch.linalg.cholesky(h, upper=True), order)


class Factored:
    """Factors of the matrices that were met last, since neighbours in a block share their input."""

    KEPT = 2

    def __init__(self) -> None:
        self.last: list[tuple[torch.Tensor, str, Factor]] = []

    def of(self, whole: torch.Tensor, device: torch.device | str = "cpu") -> Factor:
        at = str(device)
        for known, where, found in self.last:
            if known is whole and where == at:
                return found
        found = factor(whole.to(device))
        if whole.dim() == 2:
            self.last = [*self.last, (whole, at, found)][-self.KEPT :]
        return found
