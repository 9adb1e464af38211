"""Which scheme each role gets. One table: what a person asks for -> role -> scheme.

Asked for is a scheme or a recipe, and after commas what departs from it: "int8,expert=int4,attention.o=bf16". A role's
first part stands for all of them ("expert" for expert.gate, expert.up, expert.down); a longer name wins.

Vectors (norms, biases) stay float32: they are a thousandth of the bytes. A router decides discretely, so
its scores keep 16 bits. A tied embedding is also the head, so it takes the head's scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from .. import scheme as schemes
from ..errors import UsageError
from ..model.spec import ModelSpec
from ..model.weights import LINEAR_ROLES, Weight
from ..scheme import int8

# families of schemes for the large matrices -> scheme of the head; others: bf16 where they are FP8, else int8
HEAD = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32", "fp8_block": "bf16", "fp8_channel": "bf16"}
WIDE = ("bf16", "fp16", "fp32")  # families that the embedding and the router take too

ROUNDED_OFF = ("fp16", "fp32")  # families with values that BF16 does not hold: they multiply in float32
FLOATS = (*HEAD,)  # families of which no value is an integer times a scale
INTEGERS = (*int8.LARGEST,)  # what products of the others may round activations to

# a name -> what it stands for. Routed experts are 97% of R1's bytes, and at 4 bits cost the least of all parts
RECIPES = {
    "experts-int4": "int8,expert=int4",
    "experts-nl3": "int8,expert=nl3-g64",
    "experts-nl2": "int8,expert=nl2-g64,expert.down=nl3-g64",
}
MIXED = "mixed"  # what a plan's rows are called where they follow no recipe, and a checkpoint that says its own
ROLES = (*LINEAR_ROLES, "head", "embed", "router", "mtp")


def family(scheme: str) -> str:
    """ "int4-g32-sym" -> "int4"."""
    return scheme.split("-")[0]


@cache
def parse(asked: str) -> tuple[str, Mapping[str, str]]:
    """(scheme of the large matrices, role -> scheme that departs from it). UsageError names what is not known."""
    base, *rest = asked.split(",")
    if "=" in base:
        raise UsageError(f"{asked!r:.80} names no scheme for the other weights.", f"Put it first: int8,{asked:.80}")
    if base in RECIPES:
        base, *before = RECIPES[base].split(",")
        rest = [*before, *rest]
    roles = {}
    for item in rest:
        role, sign, scheme = item.partition("=")
        if not sign or role.split(".")[0] not in ROLES:
            raise UsageError(f"{item!r} in the scheme {asked!r} is no role=scheme.", f"Roles: {', '.join(ROLES)}.")
        schemes.get(scheme)
        roles[role] = scheme
    if base != MIXED:
        _check(base)
    return base, roles


def _check(base: str) -> None:
    try:
        schemes.get(base)
    except UsageError as error:
        raise UsageError(error.message, f"{error.hint} Recipes: {', '.join(RECIPES)}.") from None


def scheme_of(weight: Weight, spec: ModelSpec, asked: str) -> str:
    """The scheme that `weight` gets when a person asks for `asked`."""
    base, roles = parse(asked)
    if weight.role in ("norm", "bias", "router_bias"):
        return "fp32"
    tied_head = weight.role == "embed" and spec.tied
    for role in (weight.role, weight.role.split(".")[0], *(("head",) if tied_head else ())):
        if role in roles:
            return roles[role]
    if base == MIXED:
        return _own(weight, spec)
    if weight.is_linear:
        return base
    if weight.role == "head" or tied_head:
        return HEAD.get(family(base), "int8")
    return base if family(base) in WIDE else "bf16"


def _own(weight: Weight, spec: ModelSpec) -> str:
    if weight.name not in spec.stored:
        raise UsageError(f"{MIXED!r} is what a checkpoint says of itself; this one says nothing of {weight.name}.")
    return spec.stored[weight.name]


def rounds(scheme: str) -> bool:
    """Whether a scheme, or a recipe's, may multiply in BF16: its codes are exact there."""
    return family(scheme) not in ROUNDED_OFF


def products_of(role: str, scheme: str, home: str, compute: str) -> str | None:
    """The dtype that a weight's products round their activations to, on a CPU; None: they stay as they are.

    A GPU's activations have the plan's dtype already. A router's product decides which experts run. MLA's lift is
    folded into queries in decoding, where nothing is rounded: nor are its products in a prompt, to integers.
    """
    if home != "cpu" or compute == "float32" or role == "router":
        return None
    if family(scheme) == "fp8_block":
        return None  # exact, and no slower
    if compute in INTEGERS:
        return compute if family(scheme) not in FLOATS and role != "attention.kv_b" else None
    return compute if rounds(scheme) else None


def label(given: Sequence[tuple[Weight, str]], spec: ModelSpec, said: str) -> str:
    """What the schemes of these weights may be called: `said` or another recipe that all of them follow, else MIXED."""
    known = [said, *schemes.SCHEMES, *RECIPES]
    return next((s for s in known if _follow(given, spec, s)), MIXED)


def _follow(given: Sequence[tuple[Weight, str]], spec: ModelSpec, asked: str) -> bool:
    try:
        return all(scheme == scheme_of(w, spec, asked) for w, scheme in given)
    except UsageError:
        return False
