"""Decode attention over a paged cache, for rows of many requests: grouped-query and, in latent space, MLA.

R rows, H query heads, C key-value heads (1 for MLA). A program takes some query heads of one key-value head and a span
of one row's context; a second kernel joins the spans in their order. The spans do not depend on the other rows, but a
row that is alone has its programs narrower where those of many would leave most of the GPU idle.
A key is [main | tail] (latent and rotated part; plain keys have no tail); MLA's value is its key's main part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .after import EARLY, after
from .room import room

JOINED = 16  # spans that are loaded at once
PROGRAMS = 264  # up to which a lone row's are narrow


@dataclass(frozen=True)
class Shape:
    """What a program takes: query heads, tokens at once, tokens of a span; warps, and depth of the pipeline."""

    heads: int
    tokens: int
    span: int
    warps: int
    depth: int


MANY, FEW = Shape(64, 64, 256, 8, 2), Shape(16, 32, 256, 4, 2)  # by query heads of a key-value head
LONE, LONE_FEWER = Shape(16, 64, 256, 8, 2), Shape(16, 128, 128, 8, 1)  # for one row: of over 64 such heads, and of 64
ROOM = 222 << 10  # bytes of shared memory that MANY takes


def shape_of(rows: int, times: int, longest: int, device: torch.device) -> Shape:
    """For so many query heads of a key-value head, and contexts of up to `longest` tokens."""
    if times < MANY.heads or room(device) < ROOM:
        return FEW
    lone = LONE if times > MANY.heads else LONE_FEWER
    programs = -(-times // LONE.heads) * -(-longest // LONE.span)
    return lone if rows == 1 and programs <= PROGRAMS else MANY


@triton.jit
def _spans(
    q, keys, values, tables, contexts, out, logs, scale, B, size, H, TIMES, Z, P, V, KH, VH, SPANS,
    ZP: tl.constexpr, PP: tl.constexpr, VP: tl.constexpr, BT: tl.constexpr, SPAN: tl.constexpr,
    HB: tl.constexpr, SHARED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """out [R, SPANS, H, V], logs [R, SPANS, H] (log of the sum of exponentials, base 2). KH, VH: slot strides."""
    after()
    r, block, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + r)
    begin = span * SPAN
    if begin >= context:
        return
    per = tl.cdiv(TIMES, HB)
    kv = block // per
    inner = block % per * HB + tl.arange(0, HB)
    h = kv * TIMES + inner
    real = inner < TIMES
    z, p, v = tl.arange(0, ZP), tl.arange(0, PP), tl.arange(0, VP)
    q_at = q + (r * H + h).to(tl.int64)[:, None] * (Z + P)
    main = tl.load(q_at + z[None, :], mask=real[:, None] & (z < Z)[None, :], other=0.0)
    if TAIL:
        tail = tl.load(q_at + Z + p[None, :], mask=real[:, None] & (p < P)[None, :], other=0.0)
    top = tl.full([HB], float("-inf"), tl.float32)
    total = tl.zeros([HB], tl.float32)
    acc = tl.zeros([HB, VP], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + SPAN, context), BT):
        t = first + tl.arange(0, BT)
        seen = t < context
        page = tl.load(tables + r * B + t // size, mask=seen, other=0)
        slot = (page * size + t % size).to(tl.int64)
        k_at = keys + slot[:, None] * KH + kv * (Z + P)
        k = tl.load(k_at + z[None, :], mask=seen[:, None] & (z < Z)[None, :], other=0.0).to(q.dtype.element_ty)
        score = tl.dot(main, tl.trans(k))
        if TAIL:
            k2 = tl.load(k_at + Z + p[None, :], mask=seen[:, None] & (p < P)[None, :], other=0.0)
            score = tl.dot(tail, tl.trans(k2.to(q.dtype.element_ty)), score)
        score = tl.where(seen[None, :], score * (scale * 1.4426950408889634), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        if SHARED:
            value = k
        else:
            v_at = values + slot[:, None] * VH + kv * V + v[None, :]
            value = tl.load(v_at, mask=seen[:, None] & (v < V)[None, :], other=0.0).to(q.dtype.element_ty)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
        top = higher
    at = (r * SPANS + span) * H + h
    tl.store(logs + at, top + tl.log2(total), mask=real)
    o_at = out + at.to(tl.int64)[:, None] * V + v[None, :]
    tl.store(o_at, acc / total[:, None], mask=real[:, None] & (v < V)[None, :])


@triton.jit
def _join(out, logs, contexts, y, H, V, SPANS, VP: tl.constexpr, SPAN: tl.constexpr, MANY: tl.constexpr):
    """The spans of a row and head, weighted; MANY of them at once, in their order."""
    after()
    r, h = tl.program_id(0), tl.program_id(1)
    s, v = tl.arange(0, MANY), tl.arange(0, VP)
    count = tl.cdiv(tl.load(contexts + r), SPAN)
    top = -float("inf")
    for i in range(0, count, MANY):
        at = (r * SPANS + i + s) * H + h
        top = tl.maximum(top, tl.max(tl.load(logs + at, mask=i + s < count, other=-float("inf")), 0))
    total = 0.0
    acc = tl.zeros([VP], tl.float32)
    for i in range(0, count, MANY):
        at = (r * SPANS + i + s) * H + h
        seen = i + s < count
        share = tl.exp2(tl.load(logs + at, mask=seen, other=-float("inf")) - top)
        total += tl.sum(share, 0)
        values = out + at.to(tl.int64)[:, None] * V + v[None, :]
        part = tl.load(values, mask=seen[:, None] & (v < V)[None, :], other=0.0)
        acc += tl.sum(share[:, None] * part, 0)
    tl.store(y + (r * H + h).to(tl.int64) * V + v, (acc / total).to(y.dtype.element_ty), mask=v < V)


def _attend(q, keys, values, tables, contexts, size, scale, main, tail, width, shared):
    R, H, kv_heads = q.shape[0], q.shape[1], 1 if shared else keys.shape[1]
    y = q.new_empty(R, H, width)
    if R == 0:
        return y
    # contexts in host memory: nobody waits for the GPU. On the device (in a graph): as many as the tables can hold
    longest = int(contexts.max()) if contexts.device.type == "cpu" else tables.shape[1] * size
    times = H // kv_heads
    shape = shape_of(R, times, longest, q.device)
    spans, seen = -(-longest // shape.span), contexts.to(q.device, non_blocking=True)
    out = torch.empty(R, spans, H, width, dtype=torch.float32, device=q.device)
    logs = torch.empty(R, spans, H, dtype=torch.float32, device=q.device)
    padded = [max(16, triton.next_power_of_2(n)) for n in (main, tail, width)]
    _spans[(R, kv_heads * -(-times // shape.heads), spans)](
        q, keys, values, tables, seen, out, logs, scale, tables.shape[1], size, H, times, main, tail, width,
        keys.stride(0), values.stride(0), spans, ZP=padded[0], PP=padded[1], VP=padded[2], BT=shape.tokens,
        SPAN=shape.span, HB=shape.heads, SHARED=shared, TAIL=tail > 0, num_warps=shape.warps, num_stages=shape.depth,
        **EARLY,
    )  # fmt: skip
    _join[(R, H)](out, logs, seen, y, H, width, spans, VP=padded[2], SPAN=shape.span, MANY=JOINED, num_warps=4, **EARLY)
    return y


def mla_rows(q_RHW, cache, table_RB, context_R, size, latent, scale):
    """As ops.mla.mla_rows."""
    q = q_RHW.contiguous()
    return _attend(q, cache, cache, table_RB, context_R, size, scale, latent, q.shape[2] - latent, latent, True)


def attend_rows(q_RHD, k_cache, v_cache, table_RB, context_R, size, scale):
    """As ops.attention.attend_rows."""
    q, width = q_RHD.contiguous(), v_cache.shape[-1]
    return _attend(q, k_cache, v_cache, table_RB, context_R, size, scale, q.shape[2], 0, width, False)
