"""What a model's own activations say about its weights: second moments of inputs, and of gradients of outputs.

T tokens, K inputs, N outputs, E experts. For a change d of a row r of a weight, the divergence of the model's
next-token distribution grows, to second order, by 1/2 G[r] d M d^T nats a token, where M = E[x x^T] and
G[r] = E[g_r^2]: g is the gradient at the output of -log p of a token drawn from the model itself, which makes
E[g g^T] the Fisher information. Inputs and gradients are taken as independent, and outputs of each other, as
K-FAC does (Martens and Grosse 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..model.batch import Packed
from ..model.decoder import Decoder
from ..model.layers import Linear, LocalBank, Weighted
from ..ops.experts import by_expert
from ..ops.registry import force_reference
from ..ops.swiglu import silu_mul

FEW = 32  # tokens that say too little of an expert


@dataclass
class Moments:
    """Sums over tokens. inputs [K, K], or [E, K, K]; outputs [N] or [E, N]; tokens: all, and by expert [E]."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    met: torch.Tensor | None = None
    tokens: int = 0

    def of(self, experts: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean moments (inputs [..., K, K], outputs [..., N]) of one matrix, or of these experts.

        E[x x^T] is over all tokens: those that an expert did not meet count as zeros; E[g^2] over those that it met.
        An expert that met fewer than FEW has what all experts of its layer met, in the measure of its own popularity.
        """
        every = max(self.tokens, 1)
        if self.met is None or experts is None:
            return self.inputs / every, self.outputs / every
        met, inputs = self.met[experts], self.inputs[experts]
        rare, all_met = met < FEW, self.met.sum().clamp(min=1)
        if rare.any():
            common = self.inputs.sum(0) / all_met
            inputs = torch.where(rare[:, None, None], common * (met + 1)[:, None, None], inputs)
        outputs = self.outputs[experts] / met.clamp(min=1)[:, None]
        return inputs / every, torch.where(rare[:, None], self.outputs.sum(0) / all_met, outputs)


class Calibration:
    """Moments by weight name. Weights that share an input share its moments."""

    def __init__(self, decoder: Decoder) -> None:
        self.moments: dict[str, Moments] = {}
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None  # the last input, and where it was added
        for path, module in decoder.named_modules():
            if isinstance(module, Linear):
                self._watch(f"model.{path}.weight" if path != "lm_head" else "lm_head.weight", module)
        for path, module in decoder.named_modules():
            for name, child in list(module.named_children()):
                if isinstance(child, LocalBank):
                    at = f"model.{path.removesuffix('.banks')}.experts.*"
                    setattr(module, name, WatchedBank(child, at, self.moments))

    def _watch(self, name: str, module: Linear) -> None:
        def after(_module: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
            x = inputs[0].detach()
            found = self._moments(name, x, y.shape[-1])
            found.tokens += len(x)
            if y.requires_grad:
                y.register_hook(_adder(found.outputs))

        module.register_forward_hook(after)

    def _moments(self, name: str, x_TK: torch.Tensor, outputs: int) -> Moments:
        """The moments of `name`, with this input added: once where several weights have it."""
        before = self.seen if self.seen and self.seen[0].data_ptr() == x_TK.data_ptr() else None
        if name not in self.moments:
            inputs = before[1] if before else x_TK.new_zeros(x_TK.shape[-1], x_TK.shape[-1])
            self.moments[name] = Moments(inputs, x_TK.new_zeros(outputs))
        found = self.moments[name]
        if not before:
            found.inputs += x_TK.T @ x_TK
        self.seen = (x_TK, found.inputs)  # keeps x, so that its memory is nobody else's
        return found


def _adder(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds the squares of a gradient [T, N] to `total` [N] and leaves the gradient as it is."""

    def add(g_TN: torch.Tensor) -> None:
        total.add_(g_TN.float().square().sum(0))

    return add


class WatchedBank(nn.Module):
    """A bank that computes expert by expert and adds up what each met."""

    def __init__(self, bank: LocalBank, at: str, moments: dict[str, Moments]) -> None:
        super().__init__()
        self.gate, self.up, self.down = bank.gate, bank.up, bank.down
        experts, width, hidden = bank.gate.stored.shape
        self.met_E = torch.zeros(experts)
        into, out = torch.zeros(experts, hidden, hidden), torch.zeros(experts, width, width)
        self.of = {
            "gate": Moments(into, torch.zeros(experts, width), self.met_E),
            "up": Moments(into, torch.zeros(experts, width), self.met_E),
            "down": Moments(out, torch.zeros(experts, hidden), self.met_E),
        }
        moments |= {f"{at}.{name}_proj.weight": found for name, found in self.of.items()}

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        out_TD = torch.zeros_like(x_TD)
        for found in self.of.values():
            found.tokens += len(x_TD)
        for expert, (rows, picks) in by_expert(ids_Tk, len(self.met_E)):
            x = x_TD[rows]
            self._add("gate", expert, x)
            h = silu_mul(self._one("gate", expert, x), self._one("up", expert, x))
            self._add("down", expert, h)
            y = self._one("down", expert, h)
            out_TD = out_TD.index_add(0, rows, y * weights_Tk[rows, picks, None])
            self.met_E[expert] += len(rows)
        return out_TD

    def _one(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weighted: Weighted = getattr(self, name)
        y = x @ weighted.stored.expert(expert).dense(x.dtype).T
        if y.requires_grad:
            y.register_hook(_adder(self.of[name].outputs[expert]))
        return y

    def _add(self, name: str, expert: int, x: torch.Tensor) -> None:
        x = x.detach()
        self.of[name].inputs[expert] += x.T @ x

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return handle


def calibrate(
    decoder: Decoder, windows: Sequence[list[int]], *, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> dict[str, Moments]:
    """Moments of every matrix of `decoder` (float32, on the CPU or a GPU) over windows of token ids.

    The decoder is watched for good: use it for nothing else.
    """
    found = Calibration(decoder)
    decoder.embed_tokens.register_forward_hook(lambda _module, _ids, h_TD: h_TD.requires_grad_(True))
    draw = torch.Generator().manual_seed(seed)
    with force_reference():
        for at, window in enumerate(windows):
            ids = torch.tensor(window)
            batch = Packed(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            with torch.enable_grad():
                log_TV = decoder.logits(decoder(batch, [()] * len(decoder.layers))).log_softmax(-1)
                drawn = torch.multinomial(log_TV.detach().exp(), 1, generator=draw)
                (-log_TV.gather(-1, drawn).sum()).backward()
            found.seen = None
            say(f"calibration: {at + 1} of {len(windows)} windows")
    return found.moments
