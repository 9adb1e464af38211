"""Checkpoints that other programs quantised: how each weight lies in the file, from `quantization_config` alone.

Read: AWQ (AutoAWQ's gemm layout), GPTQ (2, 3, 4 and 8 bits) and compressed-tensors (pack-quantized, int-quantized,
float-quantized, mxfp4-pack-quantized). Each weight is held by a scheme of ours; what none can hold is refused here,
before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BadArtefact
from .fields import MAX_SIZE
from .spec import NATIVE, ModelSpec
from .weights import Weight, weights

FLOAT = {"fp8": "fp8_block", "mxfp4": "mxfp4"}  # layout of floating-point codes -> the scheme that holds it
WAY_OUT = "Take the released weights and `undistilled quantize` them."


@dataclass(frozen=True)
class Packed:
    """One linear layer. `layout`: a row of checkpoint/packed.py; `group`: inputs that share a scale, 0 for a row's.

    `symmetric`: zero points are all 2^(bits - 1). `ordered`: False where any input may belong to any group.
    """

    layout: str
    bits: int
    group: int = 0
    symmetric: bool = True
    ordered: bool = True
    zero: int = 0  # what is added to a stored zero point

    @property
    def scheme(self) -> str | None:
        """The scheme that holds it; None where there is none, and it is read dense."""
        if self.layout in FLOAT:
            return FLOAT[self.layout]
        if not self.ordered or (self.bits == 8 and not self.symmetric):
            return None
        if self.bits == 8 and not self.group:
            return "int8"
        group = next(g for g in (128, 64, 32) if self.group % g == 0)  # longer groups repeat their scale
        by_group = "" if group == 128 and self.bits != 8 else f"-g{group}"
        return f"int{self.bits}{by_group}{'-sym' if self.symmetric and self.bits != 8 else ''}"


def _bad(what: str, way_out: str = WAY_OUT) -> BadArtefact:
    return BadArtefact(f"config.json: quantization_config: {what}.", way_out)


def _checked(form: Packed) -> Packed:
    if type(form.bits) is not int or form.bits not in (2, 3, 4, 5, 6, 8):
        raise _bad(f"{form.bits!r:.80} bits are not read", "Known: 2 to 6 and 8 bits.")
    if type(form.group) is not int or not 0 <= form.group <= MAX_SIZE or form.group % 32:
        raise _bad(f"groups of {form.group!r:.80} inputs are not read", "Known: multiples of 32, or whole rows.")
    return form


def _group(said: Any) -> int:
    """-1 and null say that a row shares its scale."""
    return 0 if said in (-1, None) else said


def _pattern(text: str) -> re.Pattern[str]:
    """A regular expression of a checkpoint; one that could search for hours is refused."""
    if len(text) > 400 or len(re.findall(r"[*+{]", text)) > 4 or re.search(r"\)[*+{]", text):
        raise _bad(f"the regular expression {text!r:.80} is not read", "Name the modules more simply.")
    try:
        return re.compile(text)
    except re.error as error:
        raise _bad(f"{text!r:.80} is no regular expression ({error})") from None


Find = Callable[[Weight, str], Packed | None]  # (weight, module's name) -> how it is packed; None: it is not


def _awq(quant: dict[str, Any]) -> Find:
    version = str(quant.get("version", "gemm")).lower()
    if version != "gemm" or quant.get("bits", 4) != 4 or not quant.get("zero_point", True):
        raise _bad(f"AWQ {version!r:.80} with {quant.get('bits')!r:.80} bits", "Known: gemm, 4 bits, with zero points.")
    form = _checked(Packed("awq", 4, _group(quant.get("group_size", 128)), symmetric=False))
    kept = [str(part) for part in quant.get("modules_to_not_convert") or ()]
    return lambda weight, module: form if weight.is_linear and not any(part in module for part in kept) else None


def _gptq(quant: dict[str, Any]) -> Find:
    said = str(quant.get("checkpoint_format") or "gptq")
    if said not in ("gptq", "gptq_v2") or quant.get("is_marlin_format"):
        raise _bad(f"GPTQ's checkpoint_format {said!r:.80}", "Known: gptq and gptq_v2.")
    only = {str(part) for block in quant.get("modules_in_block_to_quantize") or () for part in _listed(block)}
    rules = [
        (rule[:2], _pattern(rule[2:] if rule[:2] in ("-:", "+:") else rule), own)
        for rule, own in (quant.get("dynamic") or {}).items()
    ]

    def find(weight: Weight, module: str) -> Packed | None:
        if not (weight.is_linear or (weight.role == "head" and quant.get("lm_head"))):
            return None
        if only and weight.is_linear and not any(module.endswith(f".{part}") for part in only):
            return None
        own = dict(quant)
        for sign, pattern, changes in rules:
            if pattern.match(module):
                if sign == "-:":
                    return None
                own |= changes
        return _gptq_form(own, added=int(said == "gptq"))

    return find


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _gptq_form(quant: dict[str, Any], added: int) -> Packed:
    group = _group(quant.get("group_size", 128))
    ordered = not (quant.get("desc_act") and group)
    form = Packed("gptq", quant.get("bits", 4), group, bool(quant.get("sym", True)), ordered, added)
    if form.bits in (5, 6):
        raise _bad(f"GPTQ with {form.bits} bits")
    return _checked(form)


LAYOUTS = {
    ("pack-quantized", "int"): "packed",
    ("int-quantized", "int"): "plain",
    ("naive-quantized", "int"): "plain",
    ("naive-quantized", "float"): "fp8",
    ("float-quantized", "float"): "fp8",
    ("mxfp4-pack-quantized", "float"): "mxfp4",
}


def _compressed_tensors(quant: dict[str, Any]) -> Find:
    groups = [_target(quant, group) for group in (quant.get("config_groups") or {}).values()]
    if not groups or quant.get("quantization_status", "compressed") != "compressed":
        raise _bad("no compressed config_groups")
    ignored = _Names(quant.get("ignore") or ())

    def find(weight: Weight, module: str) -> Packed | None:
        linear = len(weight.shape) == 2 and weight.role not in ("embed", "router")
        if len(weight.shape) != 2 or ignored.match(module) or (linear and ignored.linear):
            return None
        by_name = (form for names, form in groups if names.match(module))
        by_class = (form for names, form in groups if names.linear and linear)
        return next(by_name, None) or next(by_class, None)

    return find


class _Names:
    """Targets of compressed-tensors: modules' names, classes, and regular expressions after "re:"."""

    def __init__(self, said: Iterable[str]) -> None:
        self.exact = {str(name) for name in said}
        self.linear = "Linear" in self.exact
        self.patterns = [_pattern(name.removeprefix("re:")) for name in self.exact if name.startswith("re:")]

    def match(self, module: str) -> bool:
        return module in self.exact or any(pattern.match(module) for pattern in self.patterns)


def _target(quant: dict[str, Any], group: dict[str, Any]) -> tuple[_Names, Packed]:
    said, args = str(group.get("format") or quant.get("format")), group.get("weights") or {}
    kind, strategy, bits = str(args.get("type", "int")), args.get("strategy"), args.get("num_bits", 8)
    layout = LAYOUTS.get((said, kind))
    if layout is None or bits != {"fp8": 8, "mxfp4": 4}.get(layout, bits) or args.get("actorder") == "group":
        known = ", ".join(f"{a} of {b}" for a, b in LAYOUTS)
        raise _bad(f"compressed-tensors {said!r:.80}, {kind!r:.80} of {bits!r:.80} bits", f"Known: {known}.")
    names = _Names(group.get("targets") or ())
    if layout == "fp8":
        if strategy not in ("tensor", "block") or args.get("block_structure") not in (None, [128, 128]):
            raise _bad(f"FP8 with a scale by {strategy!r:.80}", "Known: by tensor and by block of 128 x 128.")
        return names, Packed("fp8", 8)
    if layout == "mxfp4":
        return names, Packed("mxfp4", 4, 32)
    if strategy not in ("group", "channel") or (layout == "plain" and bits != 8):
        raise _bad(f"{bits!r:.80} bits with a scale by {strategy!r:.80}", "Known: by group and by channel.")
    size = _group(args.get("group_size")) if strategy == "group" else 0
    return names, _checked(Packed(layout, bits, size, bool(args.get("symmetric", True))))


METHODS: dict[str, Callable[[dict[str, Any]], Find]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}


def forms(config: dict[str, Any], spec: ModelSpec) -> dict[str, Packed]:
    """How every packed weight lies in the file, by the weight's name. BadArtefact names what cannot be read."""
    quant = config["quantization_config"]
    find = METHODS[quant["quant_method"]](quant)
    found = {}
    for weight in weights(spec):
        kinds = {find(weight, name.removesuffix(".weight")) for name in weight.tensor_names}
        if len(kinds) > 1:
            raise _bad(f"the experts of {weight.name} are not all stored alike")
        if (form := kinds.pop()) is not None:
            if form.layout == "mxfp4" and weight.shape[1] % 32:
                raise _bad(f"{weight.name} has {weight.shape[1]} inputs, no whole blocks of 32")
            found[weight.name] = form
    return found


def with_stored(spec: ModelSpec, config: dict[str, Any]) -> ModelSpec:
    """`spec` with the scheme of every weight, as a checkpoint of another program implies it."""
    plain = NATIVE.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), "bf16")
    packed = forms(config, spec)
    stored = {}
    for weight in weights(spec):
        form = packed.get(weight.name)
        stored[weight.name] = (form and form.scheme) or (plain if len(weight.shape) == 2 else "fp32")
    return replace(spec, stored=stored)
