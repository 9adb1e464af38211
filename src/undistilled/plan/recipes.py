"""Which scheme each role gets. One table: what a person asks for -> role -> scheme.

Vectors (norms, biases) stay float32: they are a thousandth of the bytes. A router decides discretely, so
its scores keep 16 bits. A tied embedding is also the head, so it takes the head's scheme.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import scheme as schemes
from ..model.spec import ModelSpec
from ..model.weights import Weight

# families of schemes for the large matrices -> scheme of the head; None: the same as the matrices
HEAD = {"int8": "int8", "int4": "int8", "fp8_block": "bf16"}

ROUNDED_OFF = ("fp16", "fp32")  # schemes with values that BF16 does not hold: they multiply in float32

MIXED = "mixed"  # what a plan's rows are called where they follow no recipe


def family(scheme: str) -> str:
    """ "int4-g32-sym" -> "int4"."""
    return scheme.split("-")[0]


def scheme_of(weight: Weight, spec: ModelSpec, asked: str) -> str:
    """The scheme that `weight` gets when a person asks for `asked`."""
    schemes.get(asked)
    if weight.role in ("norm", "bias", "router_bias"):
        return "fp32"
    if weight.is_linear:
        return asked
    wide = asked if family(asked) in ("bf16", "fp16", "fp32") else "bf16"
    if weight.role == "head" or (weight.role == "embed" and spec.tied):
        return HEAD.get(family(asked), asked)
    return wide


def products_of(role: str, scheme: str, home: str, compute: str) -> str | None:
    """The dtype that a weight's products round their activations to, on a CPU; None: they stay as they are.

    A GPU's activations have the plan's dtype already. A router's product decides which experts run.
    """
    rounds = home == "cpu" and compute != "float32" and role != "router" and scheme not in ROUNDED_OFF
    return compute if rounds else None


def label(given: Sequence[tuple[Weight, str]], spec: ModelSpec, said: str) -> str:
    """What the schemes of these weights may be called: `said` or another recipe that all of them follow, else MIXED."""
    known = [s for s in (said, *schemes.SCHEMES) if s in schemes.SCHEMES]
    return next((s for s in known if all(scheme == scheme_of(w, spec, s) for w, scheme in given)), MIXED)
