"""The only loop over blocks. T tokens, D hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import BadArtefact
from ..ops.add import add
from ..ops.rope import angles, frequencies
from . import deepseek, llama
from .batch import Batch, Cache, Packed
from .layers import Embedding, Linear, Make, MoeLayer, Norm, SwiGlu
from .spec import ModelSpec

ATTENTION = {
    "llama": llama.Attention,
    "mistral": llama.Attention,
    "qwen2": llama.Attention,
    "qwen3": llama.Attention,
    "deepseek_v2": deepseek.Attention,
    "deepseek_v3": deepseek.Attention,
}


def mlp(make: Make, name: str, spec: ModelSpec, dense: bool) -> nn.Module:
    """The feed-forward part of a block: dense, or a mixture of experts."""
    if dense or spec.moe is None:
        return SwiGlu(make, name)
    return MoeLayer(make, name, spec.moe)


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, make: Make, spec: ModelSpec, layer: int, mtp: bool = False) -> None:
        super().__init__()
        at = f"model.layers.{layer}"
        self.input_layernorm = Norm(make, f"{at}.input_layernorm", spec.norm_eps)
        self.self_attn = ATTENTION[spec.model_type](make, f"{at}.self_attn", spec)
        self.post_attention_layernorm = Norm(make, f"{at}.post_attention_layernorm", spec.norm_eps)
        dense = not mtp and spec.moe is not None and layer < spec.moe.first_dense
        self.mlp = mlp(make, f"{at}.mlp", spec, dense)

    def forward(self, h_TD: torch.Tensor, batch: Batch | Packed, cache: Cache) -> torch.Tensor:
        # as transform(attend(h)), but that a sum and its norm are one op
        y_TD = self.self_attn(self.input_layernorm(h_TD), batch, cache)
        h_TD, x_TD = self.post_attention_layernorm.of_sum(h_TD, y_TD)
        return add(h_TD, self.mlp(x_TD))

    def attend(self, h_TD: torch.Tensor, batch: Batch | Packed, cache: Cache) -> torch.Tensor:
        """The half in which tokens see each other."""
        return add(h_TD, self.self_attn(self.input_layernorm(h_TD), batch, cache))

    def transform(self, h_TD: torch.Tensor) -> torch.Tensor:
        """The half that takes each token by itself."""
        return add(h_TD, self.mlp(self.post_attention_layernorm(h_TD)))


class Mtp(nn.Module):
    """A multi-token-prediction layer: one token further, from [norm(next embedding), norm(hidden)]."""

    def __init__(self, make: Make, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        at = f"model.layers.{layer}"
        self.embed_tokens = Embedding(make, f"{at}.embed_tokens")
        self.enorm = Norm(make, f"{at}.enorm", spec.norm_eps)
        self.hnorm = Norm(make, f"{at}.hnorm", spec.norm_eps)
        self.eh_proj = Linear(make, f"{at}.eh_proj")
        self.block = Block(make, spec, layer, mtp=True)
        self.norm = Norm(make, f"{at}.shared_head.norm", spec.norm_eps)
        self.head = Linear(make, f"{at}.shared_head.head")

    def forward(self, h_TD: torch.Tensor, batch: Batch | Packed, cache: Cache) -> torch.Tensor:
        """Logits [T, vocab] of the token after next; batch.tokens_T are the next tokens."""
        embedded = self.enorm(self.embed_tokens(batch.tokens_T, h_TD.dtype))
        h_TD = self.eh_proj(torch.cat((embedded, self.hnorm(h_TD)), -1))
        return self.head(self.norm(self.block(h_TD, batch, cache)))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head of any architecture; or, of a pipeline's stage, what belongs to its `layers`."""

    def __init__(
        self, make: Make, spec: ModelSpec, dtype: torch.dtype, mtp: bool = False, layers: range | None = None
    ) -> None:
        super().__init__()
        mine = range(spec.layers) if layers is None else layers
        self.first, self.last = mine.start == 0, mine.stop == spec.layers
        if mtp and not spec.mtp_layers:
            raise BadArtefact("This model has no multi-token-prediction layer.", "Leave --mtp out.")
        self.spec, self.dtype = spec, dtype
        if self.first:
            self.embed_tokens = Embedding(make, "model.embed_tokens")
        self.layers = nn.ModuleList(Block(make, spec, layer) for layer in mine)
        if self.last:
            self.norm = Norm(make, "model.norm", spec.norm_eps)
            self.lm_head = Linear(make, "model.embed_tokens" if spec.tied else "lm_head")
        self.mtp = nn.ModuleList(Mtp(make, spec, spec.layers + i) for i in range(spec.mtp_layers if mtp else 0))
        self.frequencies, self.rope_factor = frequencies(spec.rope)

    def prepare(self, batch: Batch | Packed) -> None:
        """Work out the batch's rotary angles, once for all layers."""
        device = batch.positions_T.device
        self.frequencies = self.frequencies.to(device)
        batch.cos_TF, batch.sin_TF = angles(batch.positions_T, self.frequencies, self.rope_factor)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, batch: Batch | Packed, caches: Sequence[Cache], h_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [T, D] after the last block, before the final norm; `h_TD`: of the stage before this one."""
        self.prepare(batch)
        return self.hidden(batch, caches, h_TD)

    def hidden(
        self, batch: Batch | Packed, caches: Sequence[Cache], h_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`forward` of a batch whose angles are there."""
        if h_TD is None:
            h_TD = self.embed_tokens(batch.tokens_T, self.dtype)
        for block, cache in zip(self.layers, caches, strict=False):
            h_TD = block(h_TD, batch, cache)
        return h_TD

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab] in float32."""
        return self.lm_head(self.norm(h_TD)).float()
