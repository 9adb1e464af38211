"""Where activations wait for the backward pass: kept, computed again, or in the CPU's memory (claim H1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from ..errors import UsageError
from ..model.decoder import Decoder


def _offload(block: nn.Module) -> nn.Module:
    """Only a block's input waits, in pinned memory of the CPU; the rest is computed again."""
    return offload_wrapper(checkpoint_wrapper(block))


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "keep": lambda block: block,
    "recompute": checkpoint_wrapper,
    "offload": _offload,
}


def wrap(decoder: Decoder, way: str) -> None:
    """Make every block handle its activations in one of WAYS."""
    if way not in WAYS:
        raise UsageError(f"Activations cannot be handled as {way!r}.", f"Known: {', '.join(WAYS)}.")
    for at, block in enumerate(decoder.layers):
        decoder.layers[at] = WAYS[way](block)
