"""Activations rounded to INT8 by groups of 32 inputs, for products of integers.

A group's scale is its largest magnitude by 127, and every input becomes the nearest multiple of it, ties to even.
"""

from __future__ import annotations

import torch

from ..scheme import Scheme, grouped, int8

GROUP = int8.ACTIVATIONS
LEAST = 2.0**-100  # groups whose largest magnitude is less become zeros


def serves(scheme: Scheme) -> bool:
    """Whether a scheme's codes are integers that such activations may be multiplied with."""
    return isinstance(scheme, int8.Int8) or (isinstance(scheme, grouped.Grouped) and scheme.name.startswith("int4"))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] with every GROUP inputs as INT8 codes times their scale, in x's dtype."""
    groups = int8.grouped(x.float(), GROUP)
    most = groups.abs().amax(-1, keepdim=True)
    most = most.masked_fill(most < LEAST, 0.0)
    inverse = most.new_tensor(127.0) / most  # a number by a tensor would be its reciprocal's product
    codes = (groups * inverse.masked_fill(most == 0, 0.0)).round()
    return (codes * (most / 127)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
