"""Every weight that a model has: name, role and logical shape, from its spec alone.

Names are those of the released Hugging Face checkpoints; `*` stands for the number of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .spec import ModelSpec

LINEAR_ROLES = ("attention", "dense", "shared", "expert")


@dataclass(frozen=True)
class Weight:
    """One weight, or `experts` equal ones. `shape` is (out, in), or (in,) for a vector."""

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    experts: int = 0
    mtp: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape with the expert axis in front, where there is one."""
        return (self.experts, *self.shape) if self.experts else self.shape

    @property
    def count(self) -> int:
        return self.experts or 1

    @property
    def params(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def is_linear(self) -> bool:
        """Whether a scheme for the large matrices applies to it."""
        return self.role.split(".")[0] in LINEAR_ROLES and len(self.shape) == 2

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The checkpoint's names, one for each expert."""
        if not self.experts:
            return (self.name,)
        return tuple(self.name.replace("*", str(e)) for e in range(self.experts))


def weights(spec: ModelSpec) -> Iterator[Weight]:
    """All weights in the order in which a token meets them; the MTP layers come last."""
    yield Weight("model.embed_tokens.weight", "embed", (spec.vocab, spec.hidden))
    for layer in range(spec.layers):
        yield from _block(spec, layer, mtp=False)
    yield Weight("model.norm.weight", "norm", (spec.hidden,))
    if not spec.tied:
        yield Weight("lm_head.weight", "head", (spec.vocab, spec.hidden))
    for layer in range(spec.layers, spec.layers + spec.mtp_layers):
        yield from _mtp(spec, layer)


def _mtp(spec: ModelSpec, layer: int) -> Iterator[Weight]:
    at = f"model.layers.{layer}"
    yield Weight(f"{at}.embed_tokens.weight", "embed", (spec.vocab, spec.hidden), layer, mtp=True)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield Weight(f"{at}.{norm}.weight", "norm", (spec.hidden,), layer, mtp=True)
    yield Weight(f"{at}.eh_proj.weight", "mtp.eh_proj", (spec.hidden, 2 * spec.hidden), layer, mtp=True)
    yield Weight(f"{at}.shared_head.head.weight", "head", (spec.vocab, spec.hidden), layer, mtp=True)
    yield from _block(spec, layer, mtp=True)


def _block(spec: ModelSpec, layer: int, mtp: bool) -> Iterator[Weight]:
    at = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Weight(f"{at}.{norm}.weight", "norm", (spec.hidden,), layer, mtp=mtp)
    attention = _mla if spec.mla else _gqa
    for name, role, shape in attention(spec):
        yield Weight(f"{at}.self_attn.{name}", role, shape, layer, mtp=mtp)
    if spec.moe is None or (layer < spec.moe.first_dense and not mtp):
        yield from _swiglu(f"{at}.mlp", "dense", spec.hidden, spec.intermediate, layer, mtp)
        return
    moe = spec.moe
    yield Weight(f"{at}.mlp.gate.weight", "router", (moe.experts, spec.hidden), layer, mtp=mtp)
    if moe.scoring == "sigmoid":
        yield Weight(f"{at}.mlp.gate.e_score_correction_bias", "router_bias", (moe.experts,), layer, mtp=mtp)
    yield from _swiglu(f"{at}.mlp.experts.*", "expert", spec.hidden, moe.width, layer, mtp, moe.experts)
    if moe.shared:
        yield from _swiglu(f"{at}.mlp.shared_experts", "shared", spec.hidden, moe.width * moe.shared, layer, mtp)


def _swiglu(at: str, role: str, hidden: int, width: int, layer: int, mtp: bool, experts: int = 0) -> Iterator[Weight]:
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Weight(f"{at}.{name}_proj.weight", f"{role}.{name}", shape, layer, experts, mtp)


def _mla(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    mla = spec.mla
    assert mla is not None
    queries = spec.heads * mla.qk_head_dim
    if mla.q_lora_rank:
        yield "q_a_proj.weight", "attention.q_a", (mla.q_lora_rank, spec.hidden)
        yield "q_a_layernorm.weight", "norm", (mla.q_lora_rank,)
        yield "q_b_proj.weight", "attention.q_b", (queries, mla.q_lora_rank)
    else:
        yield "q_proj.weight", "attention.q", (queries, spec.hidden)
    yield "kv_a_proj_with_mqa.weight", "attention.kv_a", (mla.cache_width, spec.hidden)
    yield "kv_a_layernorm.weight", "norm", (mla.kv_lora_rank,)
    lifted = spec.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield "kv_b_proj.weight", "attention.kv_b", (lifted, mla.kv_lora_rank)
    yield "o_proj.weight", "attention.o", (spec.hidden, spec.heads * mla.v_head_dim)


def _gqa(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for name, rows, cols in (
        ("q", q, spec.hidden),
        ("k", kv, spec.hidden),
        ("v", kv, spec.hidden),
        ("o", spec.hidden, q),
    ):
        yield f"{name}_proj.weight", f"attention.{name}", (rows, cols)
        if name in spec.attention_bias:
            yield f"{name}_proj.bias", "bias", (rows,)
    if spec.qk_norm:
        yield "q_norm.weight", "norm", (spec.head_dim,)
        yield "k_norm.weight", "norm", (spec.head_dim,)


def counts(spec: ModelSpec) -> tuple[int, int]:
    """(parameters in all, parameters that one token meets), without the MTP layers.

    The embedding is a look-up: of it, a token meets one row.
    """
    total = active = 0
    for w in weights(spec):
        if w.mtp:
            continue
        total += w.params
        if w.role == "embed":
            active += spec.vocab * spec.hidden if spec.tied else spec.hidden
        elif w.experts and spec.moe:
            active += w.params // w.experts * spec.moe.per_token
        else:
            active += w.params
    return total, active
