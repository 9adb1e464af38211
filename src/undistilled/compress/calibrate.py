"""What a model's own activations say about its weights: second moments of inputs, and of gradients of outputs.

T tokens, K inputs, N outputs, E experts. For a change d of a row r of a weight, the divergence of the model's
next-token distribution grows, to second order, by 1/2 G[r] d M d^T nats a token, where M = E[x x^T] and
G[r] = E[g_r^2]: g is the gradient at the output of -log p of a token drawn from the model itself, which makes
E[g g^T] the Fisher information. Inputs and gradients are taken as independent, and outputs of each other, as
K-FAC does (Martens and Grosse 2015). sweep.py runs the model, block by block; here is what it collects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..model.layers import Linear, LocalBank
from ..ops.experts import by_expert
from .hessian import Hessian

FEW = 32  # tokens that say too little of an expert
DIMMEST = 1e-4  # of the mean square of an expert's inputs: what one counts as at least
SEEN = 3  # inputs that are remembered: between q_a and kv_a, which share theirs, comes q_b
LARGEST = 256 << 20  # bytes of a layer's [E, K, K]; where they would be more, its experts share one [K, K]


@dataclass
class Moments:
    """Sums over tokens. inputs [K, K], or [E, K, K]; outputs [N] or [E, N]; tokens: all, and by expert [E].

    With `diagonals` [E, K], `inputs` [K, K] is of all experts together, and theirs differ by the diagonal alone.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    met: torch.Tensor | None = None
    tokens: int = 0
    diagonals: torch.Tensor | None = None

    def of(self, experts: slice | None) -> tuple[Hessian, torch.Tensor]:
        """Mean moments (of inputs, of outputs [..., N]) of one matrix, or of these experts.

        E[x x^T] is over all tokens: those that an expert did not meet count as zeros; E[g^2] over those that it met.
        An expert that met fewer than FEW has what all experts of its layer met, in the measure of its own popularity.
        """
        hessian = Hessian(self.inputs, 1 / max(self.tokens, 1))
        if self.met is None or experts is None:
            return hessian, self._outputs(experts)
        if self.diagonals is not None:
            own, every = _floored(self._own(experts)), _floored(self.inputs.diagonal())
            return hessian.stretched((own / every).sqrt()), self._outputs(experts)
        inputs, rare = self.inputs[experts], self._rare(experts)
        if rare.any():
            inputs = torch.where(rare[:, None, None], self.inputs.sum(0) * self._popularity(experts)[:, None], inputs)
        return Hessian(inputs, hessian.scale), self._outputs(experts)

    def diagonal(self, experts: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the diagonals of the inputs' moments only, [..., K]."""
        if self.met is None or experts is None:
            return self.inputs.diagonal() / max(self.tokens, 1), self._outputs(experts)
        return self._own(experts) / max(self.tokens, 1), self._outputs(experts)

    def _own(self, experts: slice) -> torch.Tensor:
        """Sums of squares of each expert's inputs [.., K]."""
        own = self.diagonals if self.diagonals is not None else self.inputs.diagonal(dim1=-2, dim2=-1)
        common = own.sum(0) * self._popularity(experts)
        return torch.where(self._rare(experts)[:, None], common, own[experts])

    def _outputs(self, experts: slice | None) -> torch.Tensor:
        if self.met is None or experts is None:
            return self.outputs / max(self.tokens, 1)
        own = self.outputs[experts] / self.met[experts].clamp(min=1)[:, None]
        return torch.where(self._rare(experts)[:, None], self.outputs.sum(0) / self.met.sum().clamp(min=1), own)

    def _rare(self, experts: slice) -> torch.Tensor:
        assert self.met is not None
        return self.met[experts] < FEW

    def _popularity(self, experts: slice) -> torch.Tensor:
        """The share of a layer's (token, choice) pairs that each expert has, [.., 1]; none has nothing at all."""
        assert self.met is not None
        return ((self.met[experts] + 1) / self.met.sum().clamp(min=1))[:, None]


def _floored(diagonal: torch.Tensor) -> torch.Tensor:
    """So that an input that an expert never met is no zero to divide by."""
    return diagonal.maximum(DIMMEST * diagonal.mean(-1, keepdim=True) + 1e-30)


def look_up(embedding: str) -> str:
    """The name of the moments of an embedding's rows as they are looked up, where it is the head too."""
    return f"{embedding}:look-up"


def looked_up(ids: torch.Tensor, g_TD: torch.Tensor, vocab: int) -> Moments:
    """Moments of an embedding of `vocab` rows: a change d of row v is worth 1/2 p[v] d E[g g^T] d^T nats, where g are
    the gradients at what was looked up and p says how often a row is.

    Rows that were not met get the share of the tokens that were met once (Good 1953), at most half."""
    counts = torch.bincount(ids, minlength=vocab).float()
    unmet = counts == 0
    share = min(0.5, float((counts == 1).sum()) / len(ids)) if unmet.any() else 0.0
    rows = (1 - share) * counts + unmet * (share * len(ids) / unmet.sum().clamp(min=1))
    g_TD = g_TD.float()
    return Moments(g_TD.T @ g_TD, rows.to(g_TD.device), tokens=len(ids))


class Watch:
    """Adds up moments of a block's matrices, by weight name, wherever gradients are on.

    Weights that share an input share its moments.
    """

    def __init__(self, module: nn.Module, at: str) -> None:
        """`at`: the module's name in the checkpoint, such as "model.layers.3"."""
        self.moments: dict[str, Moments] = {}
        self.seen: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=SEEN)  # inputs, and where they were added
        home = next(module.parameters()).device
        for path, child in module.named_modules():
            if isinstance(child, Linear):
                self._watch(".".join(filter(None, (at, path, "weight"))), child)
            for name, bank in child.named_children():
                if isinstance(bank, LocalBank):
                    experts = f"{at}.{path.removesuffix('.banks')}.experts.*"
                    setattr(child, name, WatchedBank(bank, experts, self.moments, home))

    def _watch(self, name: str, module: Linear) -> None:
        def after(_module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
            if y.requires_grad:
                x = inputs[0].detach()
                found = self._moments(name, x, y.shape[-1])
                found.tokens += len(x)
                y.register_hook(_adder(found.outputs))

        module.register_forward_hook(after)

    def _moments(self, name: str, x_TK: torch.Tensor, outputs: int) -> Moments:
        """The moments of `name`, with this input added: once where several weights have it."""
        before = next((total for seen, total in self.seen if seen.data_ptr() == x_TK.data_ptr()), None)
        if name not in self.moments:
            inputs = x_TK.new_zeros(x_TK.shape[-1], x_TK.shape[-1]) if before is None else before
            self.moments[name] = Moments(inputs, x_TK.new_zeros(outputs))
        found = self.moments[name]
        if before is None:
            found.inputs += x_TK.T @ x_TK
            self.seen.append((x_TK, found.inputs))  # keeps x, so that its memory is nobody else's
        return found


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds the squares of a gradient [T, N] to `total` [N] and leaves the gradient as it is."""

    def add(g_TN: torch.Tensor) -> None:
        total.add_(g_TN.float().square().sum(0))

    return add


class WatchedBank(nn.Module):
    """A bank that computes expert by expert, holds one of them at a time, and adds up what each met.

    Where gradients are on it computes nothing forward: a block adds a bank's result to its own, so that the
    gradient does not depend on it, and experts need not be read twice.
    """

    def __init__(self, bank: LocalBank, at: str, moments: dict[str, Moments], home: torch.device) -> None:
        super().__init__()
        self.stored = {name: getattr(bank, name).stored for name in ("gate", "up", "down")}
        self.met_E = torch.zeros(self.stored["gate"].shape[0])
        into, out = (_Sums(self.stored[name].shape, home) for name in ("gate", "down"))
        self.sums = {"gate": into, "up": into, "down": out}
        self.of = {}
        for name, sums in self.sums.items():
            outputs = torch.zeros(self.stored[name].shape[:2])
            self.of[name] = Moments(sums.inputs, outputs, self.met_E, 0, sums.diagonals)
            moments[f"{at}.{name}_proj.weight"] = self.of[name]

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        return _Experts.apply(x_TD, weights_Tk, ids_Tk, self)

    def dense(self, expert: int, device: torch.device) -> list[torch.Tensor]:
        """Gate, up and down of one expert, [N, K] in float32."""
        return [stored.expert(expert).dense(torch.float32).to(device) for stored in self.stored.values()]

    def add(self, expert: int, inputs: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        """Tokens that `expert` met: inputs of gate and down [T, K], gradients at the outputs of all three [T, N]."""
        for name, x_TK in inputs.items():
            self.sums[name].add(expert, x_TK)
        for name, g_TN in gradients.items():
            self.of[name].outputs[expert] += g_TN.square().sum(0).cpu()
        self.met_E[expert] += len(inputs["gate"])

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return handle


class _Sums:
    """Sums of x x^T: an expert's own, or one for all with each expert's diagonal. `home`: where x is."""

    def __init__(self, shape: tuple[int, ...], home: torch.device) -> None:
        experts, _, width = shape
        own = 4 * experts * width * width <= LARGEST
        self.inputs = torch.zeros((experts, width, width) if own else (width, width), device=home)
        self.diagonals = None if own else torch.zeros(experts, width, device=home)

    def add(self, expert: int, x_TK: torch.Tensor) -> None:
        total = x_TK.T @ x_TK
        (self.inputs[expert] if self.diagonals is None else self.inputs).add_(total)
        if self.diagonals is not None:
            self.diagonals[expert] += total.diagonal()


class _Experts(torch.autograd.Function):
    """The experts' SwiGLU, weighted and summed; its gradients by hand, so that one expert is held at a time."""

    @staticmethod
    def forward(ctx, x_TD, weights_Tk, ids_Tk, bank):
        ctx.bank = bank
        ctx.save_for_backward(x_TD, weights_Tk, ids_Tk)
        out_TD = torch.zeros_like(x_TD)
        if x_TD.requires_grad:
            return out_TD
        for expert, (rows, picks) in by_expert(ids_Tk, len(bank.met_E)):
            gate, up, down = bank.dense(expert, x_TD.device)
            x = x_TD[rows]
            y = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
            out_TD.index_add_(0, rows, y * weights_Tk[rows, picks, None])
        return out_TD

    @staticmethod
    def backward(ctx, g_TD):
        x_TD, weights_Tk, ids_Tk = ctx.saved_tensors
        bank: WatchedBank = ctx.bank
        dx_TD, dweights_Tk = torch.zeros_like(x_TD), torch.zeros_like(weights_Tk)
        for moments in bank.of.values():
            moments.tokens += len(x_TD)
        for expert, (rows, picks) in by_expert(ids_Tk, len(bank.met_E)):
            gate, up, down = bank.dense(expert, x_TD.device)
            x, g = x_TD[rows], g_TD[rows]
            a, b = x @ gate.T, x @ up.T
            slope = a.sigmoid()
            silu = a * slope
            h = silu * b
            dweights_Tk[rows, picks] = (g * (h @ down.T)).sum(-1)
            dy = g * weights_Tk[rows, picks, None]
            dh = dy @ down
            da, db = dh * b * (slope + silu * (1 - slope)), dh * silu
            dx_TD.index_add_(0, rows, da @ gate + db @ up)
            bank.add(expert, {"gate": x, "down": h}, {"gate": da, "up": db, "down": dy})
        return dx_TD, dweights_Tk, None, None
