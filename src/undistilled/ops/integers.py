"""Activations rounded to INT8 or INT16 by groups of inputs, for products of integers.

A group's scale is its largest magnitude by 127 or 32767, and every input becomes the nearest multiple of it, ties to
even.
"""

from __future__ import annotations

import torch

from ..scheme import Scheme, across, grouped, int8, tiles

GROUP, LARGEST = int8.ACTIVATIONS, int8.LARGEST  # by products
LEAST = 2.0**-100  # groups whose largest magnitude is less become zeros


def serves(scheme: Scheme) -> bool:
    """Whether a scheme's codes are integers that such activations may be multiplied with."""
    return isinstance(scheme, int8.Int8 | grouped.Grouped | tiles.Tiles | across.Across)


def rounded(x: torch.Tensor, products: str) -> torch.Tensor:
    """x [..., K] with every group of inputs as codes of a row of LARGEST times their scale, in x's dtype."""
    groups, limit = int8.grouped(x.float(), GROUP[products]), LARGEST[products]
    most = groups.abs().amax(-1, keepdim=True)
    most = most.masked_fill(most < LEAST, 0.0)
    inverse = most.new_tensor(limit) / most  # a number by a tensor would be its reciprocal's product
    codes = (groups * inverse.masked_fill(most == 0, 0.0)).round()
    return (codes * (most / limit)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
