"""Random weights in any scheme, made in place: no dense copy ever exists."""

from functools import partial

import torch

from undistilled import scheme as schemes
from undistilled.load.pages import Pages
from undistilled.ops.cpu import matrix
from undistilled.scheme import Stored

PAGES = Pages()

MIX = {2: 0.25, 3: 0.45, 4: 0.25, 5: 0.05}  # of tiles; values take 3.1 bits on average


def scheme_for(name: str, inputs: int) -> str:
    """The scheme's name; `mix64` stands for dynamic blocks of 64 columns, their tiles in 2 to 5 bits as MIX says."""
    if not name.startswith("mix"):
        return name
    cols = int(name[3:])
    counts = {bits: round(share * inputs / cols) for bits, share in MIX.items()}
    counts[3] += inputs // cols - sum(counts.values())
    return f"tiles16x{cols}" + "".join(f"-{bits}x{count}" for bits, count in counts.items() if count)


def random_weight(name: str, *shape: int, device: str = "cuda", products: str | None = None) -> Stored:
    """A weight of random bytes and scales, lying as it would be loaded; `products` as in Stored."""
    scheme = schemes.get(scheme_for(name, shape[-1]))
    if device == "cpu":
        scheme = matrix.laid(scheme, shape, products)
    specs = schemes.parts_of(scheme, shape)
    parts = {part: _part(part, spec, device) for part, spec in specs.items()}
    if scheme.name.startswith("fp8"):
        parts["values"].view(torch.uint8).bitwise_and_(0xF7)  # no NaN
    return Stored(scheme, shape, parts, products)


def _part(name: str, spec, device: str) -> torch.Tensor:
    empty = PAGES.empty if device == "cpu" else partial(torch.empty, device=device)
    t = empty(spec.shape, dtype=getattr(torch, spec.dtype))
    if name == "order":
        t.copy_(torch.rand(spec.shape, device=device).argsort(-1))
    elif name.startswith("values") and t.dtype.itemsize > 1:
        t.normal_()
    elif name.startswith("values"):
        t.view(torch.uint8).random_(0, 256)
    elif t.dtype is torch.uint8:
        t.random_(118, 122)
    elif name == "minimums":
        t.uniform_(-0.02, 0.0)
    else:
        t.copy_(torch.empty(spec.shape, device=device).uniform_(0.5, 1.5) * (1 if "float8" in spec.dtype else 0.01))
    return t
