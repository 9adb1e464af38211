"""Export as GGUF: Llama's family, in the types that hold our schemes exactly.

Q4_0 and Q4_1 are int4-sym and int4, whose longer groups repeat their scales; Q8_0 is int8 where its scales are
float16 numbers. Names and layouts: gguf_names.py, gguf_source.py, which read such files back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UsageError
from ..model.spec import ModelSpec
from ..model.weights import Weight
from ..scheme import Plain
from ..scheme.base import Parts, Scheme
from ..scheme.grouped import Grouped
from ..scheme.int8 import Int8
from .gguf_names import gguf_name, llama3_table, unpermute_rows
from .gguf_types import BY_NAME, TYPES
from .gguf_vocabulary import vocabulary
from .gguf_writer import ToWrite, write_gguf
from .held import Held, Say
from .resolve import Model

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> GGUF's name
PLAIN = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
NUMBER = {kind.name: number for number, kind in TYPES.items()}
BLOCK = 32  # inputs of a block of every quantised type that is written


def type_of(scheme: Scheme) -> str | None:
    """The GGUF type whose blocks hold the scheme's codes; None where there is none."""
    if isinstance(scheme, Plain):
        return PLAIN[scheme.name]
    if isinstance(scheme, Int8):
        return "Q8_0"
    if isinstance(scheme, Grouped) and scheme.even and scheme.bits == 4:
        return "Q4_1" if scheme.affine else "Q4_0"
    return None


class GGUF:
    """See held.Format."""

    way_out = "`quantize --scheme int4-g32-sym,head=int4-g32-sym` (or int4-g32) makes what can be exported."

    def __init__(self, model: Model) -> None:
        if model.spec.model_type not in ARCHITECTURES:
            raise UsageError(
                f"{model.name} is a {model.spec.model_type}; as GGUF only {', '.join(ARCHITECTURES)} are exported.",
                "--format compressed-tensors exports it.",
            )
        self.source = model.source()

    def refuses(self, weight: Weight, scheme: Scheme) -> str | None:
        kind = type_of(scheme)
        if kind is None:
            return "is a form that no type of GGUF holds"
        if not isinstance(scheme, Plain) and weight.shape[1] % BLOCK:
            return f"has {weight.shape[1]} inputs, which are no whole blocks of {BLOCK}"
        if kind == "Q8_0":
            scales = self.source.parts(weight.name, 0, weight.shape[0])["scales"]
            if not torch.equal(scales.half().float(), scales):
                return "has float32 scales, which Q8_0 would round to float16"
        return None

    def write(self, held: Held, out: Path, say: Say) -> int:
        spec = held.model.spec
        metadata = _metadata(spec, held.model.name) | vocabulary(held.model.tokenizer(), spec.vocab)
        kept = [weight for weight in held.weights() if not weight.mtp]
        table = _rope_table(spec)
        extra = [] if table is None else [ToWrite("rope_freqs.weight", 0, TYPES[0], table.shape)]
        tensors = extra + [_tensor(held, weight) for weight in kept]

        def values():
            if table is not None:
                yield table.view(np.uint8)
            yield from (_blocks(held, weight) for weight in kept)

        say(f"{len(tensors)} tensors")
        return write_gguf(out, metadata, tensors, values())


def _tensor(held: Held, weight: Weight) -> ToWrite:
    name = type_of(held.schemes[weight.name]) if len(weight.shape) == 2 else "F32"  # llama.cpp takes norms in float32
    assert name is not None
    return ToWrite(gguf_name(weight.name), NUMBER[name], BY_NAME[name], weight.shape)


def _blocks(held: Held, weight: Weight) -> np.ndarray:
    """The tensor's bytes, uint8, its rows in the order that GGUF has them in."""
    scheme, parts, spec = held.schemes[weight.name], held.parts(weight, weight.name), held.model.spec
    heads = {"attention.q": spec.heads, "attention.k": spec.kv_heads}.get(_of_bias(weight))
    if heads is not None and ARCHITECTURES[spec.model_type] == "llama":
        order = unpermute_rows(weight.shape[0], heads).argsort()
        parts = {name: part[order] for name, part in parts.items()}
    if isinstance(scheme, Plain):
        values = parts["values"].float() if len(weight.shape) == 1 else parts["values"]
        return values.contiguous().view(torch.uint8).numpy()
    return torch.cat([*_meta(scheme, parts, weight), _codes(scheme, parts)], -1).numpy()


def _of_bias(weight: Weight) -> str:
    """The role; a bias counts as its matrix."""
    return f"attention.{weight.name.split('.')[-2][0]}" if weight.role == "bias" else weight.role


def _meta(scheme: Scheme, parts: Parts, weight: Weight) -> list[torch.Tensor]:
    """Scales, and minimums where there are some, of each block: float16 as bytes [N, K / 32, 2]."""
    group = getattr(scheme, "group", 0) or weight.shape[1]
    of_block = torch.arange(weight.shape[1] // BLOCK) * BLOCK // group
    names = [name for name in ("scales", "minimums") if name in parts]
    return [parts[name][:, of_block].half()[..., None].contiguous().view(torch.uint8) for name in names]


def _codes(scheme: Scheme, parts: Parts) -> torch.Tensor:
    """[N, K / 32, bytes]; four bits lie in GGUF's blocks as they do in ours."""
    values = parts["values"]
    return values.view(torch.uint8).unflatten(-1, (-1, BLOCK)) if isinstance(scheme, Int8) else values


def _rope_table(spec: ModelSpec) -> np.ndarray | None:
    return llama3_table(spec.rope.factor, spec.rope.theta, spec.head_dim) if spec.rope.kind == "llama3" else None


def _metadata(spec: ModelSpec, name: str) -> dict[str, Any]:
    arch = ARCHITECTURES[spec.model_type]
    rope = spec.rope
    found: dict[str, Any] = {
        "context_length": spec.max_context,
        "embedding_length": spec.hidden,
        "block_count": spec.layers,
        "feed_forward_length": spec.intermediate,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.freq_base": float(rope.theta),
        "rope.dimension_count": spec.head_dim,
        "vocab_size": spec.vocab,
    }
    if rope.kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        found |= {"rope.scaling.original_context_length": rope.original_max}
        found |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    _check_rope(spec)
    keyed = {f"{arch}.{key}": value for key, value in found.items()}
    return {"general.architecture": arch, "general.name": name, **keyed}


def _check_rope(spec: ModelSpec) -> None:
    """UsageError for what GGUF has no key for, or what gguf_names.py would read as something else."""
    rope = spec.rope
    released = (rope.low_freq_factor, rope.high_freq_factor, rope.original_max) == (1.0, 4.0, 8192)
    odd = rope.kind == "yarn" and (rope.attention_factor is not None or not rope.truncate or rope.mscale)
    if odd or (rope.kind == "llama3" and not released):
        raise UsageError(f"GGUF cannot say this model's rope scaling ({rope.kind}).", "Export as compressed-tensors.")
