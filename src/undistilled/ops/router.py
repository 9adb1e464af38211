"""Which experts a token goes to. T tokens, E experts, k chosen for each.

Source: DeepSeek-V3 (2024), equations 12 to 16, and the release's inference/model.py. The bias takes part
in choosing only; the weights are the unbiased scores of the chosen.
"""

from __future__ import annotations

import torch

from ..model.spec import Moe
from ..scheme import Stored
from . import triton as cuda
from .cpu import native
from .linear import apply
from .registry import op


@op
def logits(x_TD: torch.Tensor, gate: Stored) -> torch.Tensor:
    """The router's logits [T, E] in float32, of x as it is."""
    return apply(x_TD.float(), gate)


@logits.register("triton", cuda.rates, "our Triton kernel: BF16 products, exact in FP32, for up to 64 tokens")
def _triton_logits(x_TD: torch.Tensor, gate: Stored) -> torch.Tensor:
    from .triton import router as kernels

    if len(x_TD) > cuda.FEW:
        return logits.reference.run(x_TD, gate)
    return kernels.logits(x_TD, gate.parts["values"])


@op
def route(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert ids [T, k], int64 or int32, weights [T, k] float32) from the router's float32 logits."""
    scores = logits_TE.sigmoid() if moe.scoring == "sigmoid" else logits_TE.softmax(-1)
    choice = scores if bias_E is None else scores + bias_E
    if moe.groups > 1:
        choice = _best_groups(choice, moe)
    ids = choice.topk(moe.per_token, -1).indices
    chosen = scores.gather(-1, ids)
    if moe.normalise:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return ids, chosen * moe.scale


@route.register("native", native.serves, "our C kernel: of equal choices the first")
def _native(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    groups = (moe.groups, moe.top_groups) if moe.groups > 1 else (1, 1)
    sigmoid = moe.scoring == "sigmoid"
    return native.route(logits_TE, bias_E, moe.per_token, groups, sigmoid, moe.normalise, moe.scale)


@route.register("triton", cuda.scores, "our Triton kernel: a token's scores, groups and choices in one launch")
def _triton(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, moe: Moe) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton import router as kernels

    return kernels.route(logits_TE, bias_E, moe)


def _best_groups(choice_TE: torch.Tensor, moe: Moe) -> torch.Tensor:
    groups = choice_TE.unflatten(-1, (moe.groups, -1))
    # V3 scores a group by the sum of its best two experts, V2 by its best one
    rating = groups.topk(2, -1).values.sum(-1) if moe.scoring == "sigmoid" else groups.amax(-1)
    kept = torch.zeros_like(rating, dtype=torch.bool).scatter_(1, rating.topk(moe.top_groups, -1).indices, True)
    lowest = float("-inf") if moe.scoring == "sigmoid" else 0.0
    return groups.masked_fill(~kept[..., None], lowest).flatten(-2)
