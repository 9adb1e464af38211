"""Export as compressed-tensors: the safetensors and the `quantization_config` that transformers and vLLM read.

Format: compressed-tensors 0.20 (pack-quantized, float-quantized, mxfp4-pack-quantized).
Activations stay as they are, as they do here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..model.weights import Weight
from ..scheme import Plain
from ..scheme.base import Parts, PartSpec, Scheme
from ..scheme.fp8_block import BLOCK, Fp8Block
from ..scheme.grouped import Grouped
from ..scheme.int8 import Int8
from ..scheme.packing import unpack
from .bits import pack
from .held import Held, Say
from .resolve import Model
from .writer import Tensor, shard_name, shards, write, write_index

SHARD = 4 << 30  # bytes of a file
BITS = (2, 4)  # of schemes by groups: other widths lie differently in older versions of the format


@dataclass(frozen=True)
class Form:
    """A scheme in the format's words. `group`: inputs that share a scale; 0: a row."""

    format: str
    bits: int
    group: int

    def config(self) -> dict[str, Any]:
        """The `weights` of a group of the config."""
        said: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        if self.format == "mxfp4-pack-quantized":
            said |= {"type": "float", "scale_dtype": "torch.uint8"}
        if self.format == "float-quantized":
            return said | {"type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]}
        return said | ({"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"})


def form_of(scheme: Scheme) -> Form | None:
    """None where the format has no word for the scheme."""
    if isinstance(scheme, Int8):
        return Form("pack-quantized", 8, scheme.group)
    if isinstance(scheme, Fp8Block):
        return Form("float-quantized", 8, BLOCK)
    if scheme.name == "mxfp4":
        return Form("mxfp4-pack-quantized", 4, 32)
    if isinstance(scheme, Grouped) and scheme.even and not scheme.affine and scheme.bits in BITS:
        return Form("pack-quantized", scheme.bits, scheme.group)
    return None


class CompressedTensors:
    """See held.Format."""

    way_out = "`quantize --scheme int4-g32-sym,head=bf16` (or int8) makes what can be exported."

    def __init__(self, model: Model) -> None:
        pass

    def refuses(self, weight: Weight, scheme: Scheme) -> str | None:
        if isinstance(scheme, Plain):
            return None
        form = form_of(scheme)
        if form is None:
            return "is a form that compressed-tensors has no word for"
        if weight.role == "embed":
            return "is an embedding (or a head tied to it), which transformers reads in 16 bits alone"
        if form.format == "float-quantized" and weight.experts:
            return "are experts in FP8 blocks, which transformers reads in DeepSeek's own format alone"
        if form.group and weight.shape[1] % form.group:
            return f"has {weight.shape[1]} inputs, which are no whole groups of {form.group}"
        return None

    def write(self, held: Held, out: Path, say: Say) -> int:
        config = held.model.plain_config()
        config.pop("torch_dtype", None)  # the older name of dtype
        config |= {"dtype": _dtype(held), **_quantization(held)}
        files = _files(held)
        out.mkdir(parents=True)
        where: dict[str, str] = {}
        total = 0
        for at, content in enumerate(files, 1):
            file, tensors = shard_name(at, len(files)), [t for w, name in content for t in _tensors(held, w, name)]
            write(out / file, tensors, _values(held, content))
            where |= {name: file for name, _ in tensors}
            total += sum(spec.nbytes for _, spec in tensors)
            say(f"{file}: {total / 1e9:.2f} GB")
        held.model.tokenizer().save(out)
        write_index(out, where, total, config)
        return total


def _dtype(held: Held) -> str:
    """Of the weights that are not packed, for the config: that of the embedding."""
    (dtype, _), *_ = held.schemes["model.embed_tokens.weight"].layout().values()
    return dtype


def _files(held: Held) -> list[list[tuple[Weight, str]]]:
    """(weight, its name or an expert's) of each file."""
    named = ((weight, name) for weight in held.weights() for name in weight.tensor_names)
    return shards((((w, name), sum(spec.nbytes for _, spec in _tensors(held, w, name))) for w, name in named), SHARD)


def _tensors(held: Held, weight: Weight, name: str) -> list[Tensor]:
    scheme = held.schemes[weight.name]
    form = form_of(scheme)
    if form is None:
        assert isinstance(scheme, Plain)
        return [(name, PartSpec(scheme.dtype, (), weight.shape))]
    rows, cols = weight.shape
    if form.format == "float-quantized":
        scale = PartSpec("float32", (), (-(-rows // BLOCK), -(-cols // BLOCK)))
        return [(name, PartSpec("float8_e4m3fn", (), weight.shape)), (f"{name}_scale", scale)]
    if form.format == "mxfp4-pack-quantized":
        parts = (("packed", cols // 2), ("scale", cols // form.group))
        return [(f"{name}_{part}", PartSpec("uint8", (), (rows, width))) for part, width in parts]
    dtype = "float32" if form.bits == 8 else "float16"
    return [
        (f"{name}_packed", PartSpec("int32", (), (rows, -(-cols * form.bits // 32)))),
        (f"{name}_scale", PartSpec(dtype, (), (rows, cols // form.group if form.group else 1))),
        (f"{name}_shape", PartSpec("int64", (), (2,))),
    ]


def _values(held: Held, content: list[tuple[Weight, str]]) -> Iterator[torch.Tensor]:
    """What `_tensors` announces, in its order."""
    for weight, name in content:
        parts, form = held.parts(weight, name), form_of(held.schemes[weight.name])
        yield parts["values"] if form is None or form.format == "float-quantized" else _packed(parts, form, weight)
        if form is not None:
            yield parts["scales"]
        if form is not None and form.format == "pack-quantized":
            yield torch.tensor(weight.shape)


def _packed(parts: Parts, form: Form, weight: Weight) -> torch.Tensor:
    """Codes from 0, which the format takes as less by 2^(bits - 1), as ours do."""
    if form.bits == 8:
        return pack(parts["values"].view(torch.uint8) ^ 128, 8)
    words = pack(unpack(parts["values"], form.bits)[:, : weight.shape[1]], form.bits)
    return words.view(torch.uint8) if form.format == "mxfp4-pack-quantized" else words


def _quantization(held: Held) -> dict[str, Any]:
    """The config's `quantization_config`; nothing where all weights are plain. UsageError where experts differ."""
    forms = {w.name: (w, form_of(held.schemes[w.name])) for w in held.weights() if _is_linear(w)}
    if not any(form for _, form in forms.values()):
        return {}
    experts = {form for weight, form in forms.values() if weight.experts}
    if len(experts) > 1 or experts == {None}:
        raise UsageError(
            "The experts have several forms, or are plain where other layers are not: transformers reads neither.",
            "`quantize` with one scheme for all experts: --scheme int8,expert=int4-g32-sym,head=bf16.",
        )
    groups = _groups(forms, experts.pop() if experts else None)
    ignored = [name.removesuffix(".weight") for name, (_, form) in forms.items() if form is None]
    formats = {form.format for form in groups}
    said = {
        f"group_{at}": {"targets": targets, "weights": form.config(), "format": form.format}
        for at, (form, targets) in enumerate(groups.items())
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": said,
            "ignore": ignored + ["lm_head"] * held.model.spec.tied,
        }
    }


def _groups(forms: dict[str, tuple[Weight, Form | None]], experts: Form | None) -> dict[Form, list[str]]:
    """Form -> its targets. The most common form of the others goes to every linear layer, and comes first.

    transformers finds the experts' form by a regular expression that speaks of experts.
    """
    dense = [form for weight, form in forms.values() if form is not None and not weight.experts]
    base = max(dict.fromkeys(dense), key=dense.count) if dense else experts
    assert base is not None
    groups = {base: ["Linear"]}
    for name, (weight, form) in forms.items():
        if form not in (None, base) and not weight.experts:
            groups.setdefault(form, []).append(name.removesuffix(".weight"))
    if experts not in (None, base):
        groups.setdefault(experts, []).append(r"re:.*\.mlp\.experts\..*")
    return groups


def _is_linear(weight: Weight) -> bool:
    """Whether transformers has an nn.Linear for it, or had one before it stacked the experts."""
    return len(weight.shape) == 2 and weight.role not in ("embed", "router")
