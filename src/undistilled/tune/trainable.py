"""A decoder that can learn: float32 weights with gradients, a bank of experts to train, and the loss.

T tokens, D hidden, E experts, k chosen for each token, W expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .. import scheme as schemes
from ..model.batch import Packed
from ..model.decoder import Block, Decoder, Mtp
from ..model.layers import LocalBank, MoeLayer
from ..model.spec import ModelSpec
from ..model.weights import Weight, weights
from ..ops.swiglu import silu_mul
from ..scheme import Stored

MTP_SHARE = 0.3  # of the second token's loss (DeepSeek-V3, section 4.2)


class TrainBank(nn.Module):
    """All experts on this device, every one computed for every token and weighted by its share.

    For experts as narrow as r1-nano's one wide product costs a GPU less than sorting tokens by expert.
    `counts_E` adds up how many tokens chose each expert.
    """

    counts_E: torch.Tensor

    def __init__(self, bank: LocalBank) -> None:
        super().__init__()
        self.gate, self.up, self.down = bank.gate, bank.up, bank.down
        experts = bank.gate.stored.shape[0]
        self.register_buffer("counts_E", torch.zeros(experts, device=bank.gate.stored.device), persistent=False)

    def submit(self, x_TD: torch.Tensor, ids_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        gate, up, down = (w.stored.dense(x_TD.dtype) for w in (self.gate, self.up, self.down))
        share_TE = weights_Tk.new_zeros(len(x_TD), len(gate)).scatter(1, ids_Tk, weights_Tk)
        if self.training:
            self.counts_E += (share_TE.detach() > 0).sum(0)
        h_TEW = silu_mul(x_TD @ gate.flatten(0, 1).T, x_TD @ up.flatten(0, 1).T).unflatten(-1, gate.shape[:2])
        h_TEW = h_TEW * share_TE.to(x_TD.dtype)[..., None]
        return h_TEW.flatten(-2) @ down.transpose(1, 2).flatten(0, 1)

    def collect(self, handle: torch.Tensor) -> torch.Tensor:
        return handle


class Student(nn.Module):
    """The decoder with its MTP layer, and the mean losses of a packed batch.

    `named` has every weight of the checkpoint by name; the MTP layer shares embedding and head with the model.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.score = cross_entropy
        self.named: dict[str, Stored] = {}
        self.decoder = Decoder(self._maker(spec, device), spec, dtype, mtp=True)
        for mtp in self.mtp_layers:
            mtp.embed_tokens, mtp.head = self.decoder.embed_tokens, self.decoder.lm_head
        for name in list(self.named):
            if name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
                shared = self.decoder.embed_tokens if "embed" in name else self.decoder.lm_head
                self.named[name] = shared.stored
        for layer in self.moe_layers:
            layer.banks = nn.ModuleList(TrainBank(bank) for bank in layer.banks)  # type: ignore[arg-type]
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        for layer in self.moe_layers:
            assert layer.bias is not None
            layer.bias.values.requires_grad_(False)  # set by balance, not by gradients

    def _maker(self, spec: ModelSpec, device: torch.device) -> Callable[[str], Stored]:
        known = {w.name: w for w in weights(spec)}
        depth = spec.layers

        def make(name: str) -> Stored:
            values = initial(known[name], depth, device)
            self.named[name] = Stored(schemes.get("fp32"), known[name].full_shape, {"values": values})
            return self.named[name]

        return make

    def compile_parts(self) -> None:
        """Compile the blocks and the loss, each once for all layers, rather than the whole model at length."""
        self._choose_kernels()
        for module in self.modules():
            if isinstance(module, Block):
                module.compile()
        self.score = torch.compile(cross_entropy)

    @torch.no_grad()
    def _choose_kernels(self) -> None:
        """A token through the model, so that every op remembers its kernel and no compiled code has to choose."""
        device = self.decoder.embed_tokens.values.device
        one = torch.zeros(1, dtype=torch.int64, device=device)
        self(Packed(one, one, torch.tensor([0, 1], dtype=torch.int32, device=device), 1), one, one)

    @property
    def moe_layers(self) -> list[MoeLayer]:
        return [m for m in self.modules() if isinstance(m, MoeLayer)]

    @property
    def mtp_layers(self) -> list[Mtp]:
        return [m for m in self.decoder.mtp if isinstance(m, Mtp)]

    def forward(self, batch: Packed, targets_T: torch.Tensor, second_T: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(loss to minimise, mean loss of the next token, of the one after). Targets of -100 do not count."""
        h_TD = self.hidden(batch)
        first = self.score(self.decoder.lm_head(self.decoder.norm(h_TD)), targets_T)
        second = self.score(self.second(h_TD, batch), second_T)
        return first + MTP_SHARE * second, first.detach(), second.detach()

    def hidden(self, batch: Packed) -> torch.Tensor:
        """Hidden states [T, D] before the final norm."""
        return self.decoder(batch, [()] * len(self.decoder.layers))

    def second(self, h_TD: torch.Tensor, batch: Packed) -> torch.Tensor:
        """Logits [T, V] of the token after next; a document's last token sees the next document's first, unscored."""
        following = Packed(
            batch.tokens_T.roll(-1), batch.positions_T, batch.bounds_S, batch.longest, batch.cos_TF, batch.sin_TF
        )
        return self.mtp_layers[0](h_TD, following, ())

    @torch.no_grad()
    def balance(self, rate: float, reduce: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Move each router's bias toward even loads by `rate` (DeepSeek-V3, section 2.1.2); counts begin anew.

        `reduce` adds a tensor up over all ranks. Returns the shares [layers, E] of the choices since the last call.
        """
        counts = torch.stack([layer.banks[0].counts_E for layer in self.moe_layers])  # type: ignore[misc]
        reduce(counts)
        for layer, load_E in zip(self.moe_layers, counts, strict=True):
            assert layer.bias is not None
            layer.bias.values += rate * torch.sign(load_E.mean() - load_E)
            layer.banks[0].counts_E.zero_()  # type: ignore[operator]
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def cross_entropy(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """The mean over targets that count; 0 where none does."""
    total = F.cross_entropy(logits_TV.float(), targets_T, ignore_index=-100, reduction="sum")
    return total / (targets_T >= 0).sum().clamp(min=1)


def initial(weight: Weight, depth: int, device: torch.device) -> torch.Tensor:
    """Float32 values to begin with: norms 1, biases 0, matrices normal, those that end a block narrower by depth."""
    if weight.role == "norm":
        return torch.ones(weight.full_shape, device=device)
    if weight.role == "router_bias":
        return torch.zeros(weight.full_shape, device=device)
    std = 0.02 if weight.role in ("embed", "head", "router") else weight.shape[-1] ** -0.5
    if weight.role in ("attention.o", "dense.down", "expert.down", "shared.down"):
        std *= (2 * depth) ** -0.5
    return torch.randn(weight.full_shape, device=device) * std
